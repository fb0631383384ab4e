"""AIM's encoder, whose positions are a formula at whatever grid an image has."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from mm1.engine.layers.vision import sincos
from mm1.errors import UserError
from mm1.kernels.patches.grids import Grids

pytest.importorskip("transformers")
from test_convert import of_vision, pictures, randomized


class Aim(torch.nn.Module):
    """El-Nouby et al. 2024, section 3.2 of its encoder, image by image, under the names of its files."""

    def __init__(self, side=28, patch=14, width=32, blocks=2, heads=2):
        super().__init__()
        nn, norm = torch.nn, lambda: torch.nn.LayerNorm(width, 1e-6)
        linear = lambda a, b: nn.Linear(a * width, b * width, bias=False)  # noqa: E731
        self.heads = heads
        self.config = {"img_size": side, "patch_size": patch, "embed_dim": width, "num_blocks": blocks,
                       "num_heads": heads, "num_classes": 10}  # fmt: skip
        patchifier = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch), "norm": norm()})
        self.preprocessor = nn.ModuleDict({"patchifier": patchifier})
        self.trunk = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({
            "norm_1": norm(), "norm_2": norm(),
            "attn": nn.ModuleDict({"qkv": linear(1, 3), "proj": linear(1, 1)}),
            "mlp": nn.ModuleDict({"fc1": linear(1, 4), "fc2": linear(4, 1)}),
        }) for _ in range(blocks)), "post_trunk_norm": norm()})  # fmt: skip
        self.head = nn.ModuleDict({"linear": nn.Linear(width, 10)})

    def forward(self, pixels):
        p = self.preprocessor["patchifier"]
        x = p["proj"](pixels)
        rows, columns, width = *x.shape[2:], x.shape[1]
        x = p["norm"](x.flatten(2).transpose(1, 2))
        place = torch.zeros(rows, columns, width)
        for r in range(rows):
            for c in range(columns):
                for i in range(width // 4):
                    f = 10_000.0 ** (-i / (width // 4))
                    place[r, c, i :: width // 4] = torch.tensor([c * f, c * f, r * f, r * f])
        quarter = width // 4
        for at, wave in ((0, torch.sin), (1, torch.cos), (2, torch.sin), (3, torch.cos)):
            columns_of = slice(at * quarter, (at + 1) * quarter)
            place[..., columns_of] = wave(place[..., columns_of])
        x = x + place.flatten(0, 1)
        for block in self.trunk["blocks"]:
            q, k, v = block["attn"]["qkv"](block["norm_1"](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + block["attn"]["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + block["mlp"]["fc2"](F.gelu(block["mlp"]["fc1"](block["norm_2"](x))))
        return x


def test_aim_gives_the_last_blocks_rows():
    aim = randomized(Aim())
    vision = of_vision(aim.config, aim.state_dict())
    images = torch.randint(0, 256, (3, 28, 28, 3), dtype=torch.uint8)
    mean, std = torch.tensor(vision.config.mean), torch.tensor(vision.config.std)
    assert mean[0] == 0.485
    truth = aim(((images / 255 - mean) / std).permute(0, 3, 1, 2)).flatten(0, 1)
    found = vision(images.view(-1, 3), Grids([(2, 2)] * 3))
    assert relative_error(found, truth) < 1e-5


@pytest.mark.parametrize("grids", [[(3, 3)], [(1, 5), (4, 2), (1, 1)], [(6, 6), (2, 3)]])
def test_aims_positions_are_the_formula_at_every_grid(grids):
    """Not resampled: shown grids that it was not trained at, on images of several sizes in one batch."""
    aim = randomized(Aim())
    vision = of_vision(aim.config, aim.state_dict())
    assert not hasattr(vision, "positions"), "nothing of them is learned"
    images = [pictures(1, 14 * h, 14 * w) for h, w in grids]
    mean, std = torch.tensor(vision.config.mean), torch.tensor(vision.config.std)
    truth = torch.cat([aim(((x / 255 - mean) / std).permute(0, 3, 1, 2))[0] for x in images])
    pixels = torch.cat([x.reshape(-1, 3) for x in images])
    assert relative_error(vision(pixels, Grids(grids)), truth) < 1e-5
    padded = Grids(grids, images=len(grids) + 2, patches=len(truth) + 7)
    assert relative_error(vision(pixels, padded)[: len(truth)], truth) < 1e-5


def test_sincos_positions_are_those_of_the_formula_in_fp64():
    grids = [(2, 3), (40, 1)]
    f = 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    truth = torch.tensor([(r, c) for h, w in grids for r in range(h) for c in range(w)]).double()
    row, column = (truth[:, i, None] * f for i in (0, 1))
    truth = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)
    assert relative_error(sincos(Grids(grids), 32), truth) < 1e-6
    assert sincos(Grids([]), 32).shape == (0, 32)


def test_what_is_not_aims_is_told():
    aim = Aim()
    with pytest.raises(UserError, match=r"use_bias is True, expected False"):
        of_vision(aim.config | {"use_bias": True}, aim.state_dict())
    with pytest.raises(UserError, match=r"img_size is 30, expected a multiple of the patch_size 14"):
        of_vision(aim.config | {"img_size": 30}, aim.state_dict())
    with pytest.raises(UserError, match=r"trunk\.blocks\.1.* is missing"):
        of_vision(aim.config, {n: x for n, x in aim.state_dict().items() if "blocks.1" not in n})
    with pytest.raises(UserError, match=r"embed_dim is missing"):
        of_vision({"num_blocks": 2, "patch_size": 14}, aim.state_dict())
