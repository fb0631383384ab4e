import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, relative_error

from mm1.kernels.grids import Grids
from mm1.kernels.patch_embed import embed_patches, patch_embed

SIZES = [(2, 3), (1, 1), (4, 2), (2, 3), (1, 7)]
MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)


def parameters(p, width=8, table=(3, 4)):
    return [torch.randn(s, requires_grad=True) for s in [(width, p * p * 3), (width,), (*table, width)]]


def by_hand(images, p, weight, bias, table, mode, antialias, align):
    """Image by image: torch's convolution and torch's interpolation, in fp64."""
    kernel = weight.double().view(-1, p, p, 3).permute(0, 3, 1, 2)
    rows = []
    for image in images:
        x = image.double() / 255
        x = (x - torch.tensor(MEAN, dtype=torch.float64)) / torch.tensor(STD, dtype=torch.float64)
        y = F.conv2d(x.permute(2, 0, 1)[None], kernel, bias.double(), stride=p)[0]
        options = {} if mode == "nearest" else {"antialias": antialias, "align_corners": align}
        y = y + F.interpolate(table.double().permute(2, 0, 1)[None], y.shape[1:], mode=mode, **options)[0]
        rows.append(y.flatten(1).T)
    return torch.cat(rows)


@pytest.mark.parametrize("p", [4, 14])
@pytest.mark.parametrize("mode, antialias, align", [
    ("bilinear", True, False), ("bilinear", False, True), ("bicubic", True, False), ("bicubic", False, False),
    ("nearest", False, False),
])  # fmt: skip
def test_matches_convolution_and_interpolate(p, mode, antialias, align):
    weight, bias, table = parameters(p)
    images = [torch.randint(0, 256, (h * p, w * p, 3), dtype=torch.uint8) for h, w in SIZES]
    y, cu_seqlens = patch_embed(
        images, [(h * p, w * p) for h, w in SIZES], weight, bias, table, patch_size=p, mean=MEAN, std=STD,
        interpolation=mode, antialias=antialias, align_corners=align,
    )  # fmt: skip
    truth = by_hand(images, p, weight, bias, table, mode, antialias, align)
    assert relative_error(y, truth) < 1e-5
    assert cu_seqlens.tolist() == [0, *itertools.accumulate(h * w for h, w in SIZES)]
    for found, expected in zip(gradients(y, [weight, bias, table]), gradients(truth, [weight, bias, table])):
        assert relative_error(found, expected) < 1e-5


def test_packed_padded_and_listed_pixels_agree():
    p, (weight, bias, table) = 4, parameters(4)
    images = [torch.randint(0, 256, (h * p, w * p, 3), dtype=torch.uint8) for h, w in SIZES]
    listed, _ = patch_embed(images, [(h * p, w * p) for h, w in SIZES], weight, bias, table, patch_size=p)
    grids = Grids(SIZES, images=9, patches=40)
    packed = torch.cat([image.reshape(-1, 3) for image in images])
    padded, cu_seqlens = patch_embed(packed, grids, weight, bias, table, patch_size=p)
    assert torch.equal(padded[: grids.used], listed)
    assert cu_seqlens.tolist()[5:] == [grids.used] * 5


def test_cut_patches_and_no_table():
    weight, bias, table = parameters(4)
    patches = torch.randn(6, 48, requires_grad=True)
    assert torch.equal(embed_patches(patches, [(2, 3)], weight, bias), F.linear(patches, weight, bias))
    y = embed_patches(patches, [(2, 3)], weight, bias, table)
    assert relative_error(gradients(y, [patches])[0], gradients(F.linear(patches, weight), [patches])[0]) < 1e-6


def test_no_image_gives_no_tokens_and_zero_gradients():
    weight, bias, table = parameters(4)
    y, cu_seqlens = patch_embed([], [], weight, bias, table, patch_size=4)
    assert y.shape == (0, 8)
    assert cu_seqlens.tolist() == [0]
    assert all(not g.any() for g in gradients(y, [weight, bias, table]))


def test_compiles_whole():
    p, (weight, bias, table) = 4, parameters(4)
    pixels, grids = torch.randint(0, 256, (6 * p * p, 3), dtype=torch.uint8), Grids([(2, 3)])
    call = lambda w: patch_embed(pixels, grids, w, bias, table, patch_size=p)[0]  # noqa: E731
    assert relative_error(torch.compile(call, fullgraph=True)(weight), call(weight)) < 1e-6


def test_refuses_bad_arguments():
    weight, bias, table = parameters(4)
    with pytest.raises(ValueError, match=r"patch_embed: sizes is \(9, 8\), expected multiples of 4"):
        patch_embed([torch.zeros(9, 8, 3)], [(9, 8)], weight, patch_size=4)
    with pytest.raises(ValueError, match="embed_patches: interpolation"):
        embed_patches(torch.zeros(6, 48), [(2, 3)], weight, bias, table, interpolation="lanczos")
    with pytest.raises(ValueError, match="embed_patches: patches"):
        embed_patches(torch.zeros(5, 48), [(2, 3)], weight)
    with pytest.raises(ValueError, match="not positive"):
        embed_patches(torch.zeros(0, 48), [(0, 3)], weight)
