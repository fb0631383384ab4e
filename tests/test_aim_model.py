"""AIM's loss, gradients and features are those of a plain twin, image by image; no patch sees what it predicts."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from mm1.engine.data.batch import Batch, next_patch_rows, pack_images
from mm1.engine.data.document import Budget, Document
from mm1.engine.data.record import View
from mm1.engine.layers.config import PixelHead
from mm1.engine.layers.patch_order import ORDERS, image_order, packed_order
from mm1.engine.layers.workload import Layout
from mm1.engine.models import registry
from mm1.engine.models.aim import AIM
from mm1.engine.models.aim_config import MODELS, AIMConfig
from mm1.engine.settings import hints
from mm1.engine.train.ledger import ledger, workload
from mm1.engine.train.plan import activations
from mm1.engine.train.prepare import compile_blocks

PATCH = 4
IMAGES = [((3, 5), 4), ((1, 1), 1), ((6, 6), 1), ((2, 3), 5), ((1, 2), 1), ((6, 6), 20), ((7, 1), 3)]  # grid, prefix


def small_aim(**changes) -> AIMConfig:
    c = MODELS["aim-clipart"]
    vision = dataclasses.replace(c.vision, width=32, layers=3, heads=2, ffn=48)
    return dataclasses.replace(c, **{"vision": vision, "head": PixelHead(24, 2, 40)} | changes)


def image(grid: tuple[int, int], prefix: int, key: str = "test") -> Document:
    """An image of random pixels, but with a patch of one colour."""
    (h, w), count = grid, grid[0] * grid[1]
    pixels = torch.randint(0, 256, (h * PATCH, w * PATCH, 3), dtype=torch.uint8)
    pixels[-PATCH:, -PATCH:] = 200
    return Document(np.zeros(count, np.int32), (View("image", pixels.numpy()),), key, np.arange(count) < prefix)


def packed(images=IMAGES, seed: int = 0, budget: Budget | None = None) -> Batch:
    torch.manual_seed(seed)
    documents = [image(grid, prefix, f"image {i}") for i, (grid, prefix) in enumerate(images)]
    patches = sum(len(d.tokens) for d in documents)
    return pack_images(documents, budget or Budget(patches, len(images), patches, len(images)), patch=PATCH)


def images_of(batch: Batch) -> list[tuple[torch.Tensor, int]]:
    """The pixels [H, W, 3] and the prefix of each image of a batch."""
    result, first = [], 0
    for (h, w), prefix in zip(batch.media.grids.sizes, batch.prefix.tolist()):
        rows = h * w * PATCH**2
        result.append((batch.media.values[first : first + rows].view(h * PATCH, w * PATCH, 3), prefix))
        first += rows
    return result


class Twin:
    """AIM in plain torch from the paper and its published facts, one image at a time, in fp64."""

    def __init__(self, model: AIM):
        self.c, self.w = model.config, {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], self.c.vision.eps)

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def places(self, h, w, width):
        table = torch.zeros(h, w, width, dtype=torch.float64)
        for i in range(q := width // 4):
            f = 10_000 ** (-i / q)
            for r in range(h):
                for c in range(w):
                    table[r, c, i::q] = torch.tensor(
                        [math.sin(c * f), math.cos(c * f), math.sin(r * f), math.cos(r * f)]
                    )
        return table.view(h * w, width)

    def patches(self, pixels):
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (self.c.vision.mean, self.c.vision.std))
        x = (pixels.double() / 255 - mean) / std
        cut = [
            x[r : r + PATCH, c : c + PATCH].flatten()
            for r in range(0, len(x), PATCH)
            for c in range(0, x.shape[1], PATCH)
        ]
        return torch.stack(cut), len(x) // PATCH, x.shape[1] // PATCH

    def features(self, pixels, prefix, layers=None):
        patches, h, w = self.patches(pixels)
        order = torch.tensor(image_order(self.c.order, h, w))
        c, n = self.c.vision, h * w
        x = self.norm(patches @ self.w["vision.patch_weight"].T + self.w["vision.patch_bias"], "vision.patch_norm")
        x, outputs = (x + self.places(h, w, c.width))[order], []
        place = torch.arange(n)
        sees = (place <= place[:, None]) | (place < (n if prefix is None else prefix))
        for i in range(c.layers):
            at = f"vision.blocks.{i}"
            q, k, v = self.linear(self.norm(x, f"{at}.norm1"), f"{at}.qkv").view(n, 3, c.heads, -1).permute(1, 2, 0, 3)
            scores = q @ k.mT / math.sqrt(c.width // c.heads)
            y = scores.masked_fill(~sees, -torch.inf).softmax(-1) @ v
            x = x + self.linear(y.transpose(0, 1).flatten(1), f"{at}.out")
            x = x + self.linear(F.gelu(self.linear(self.norm(x, f"{at}.norm2"), f"{at}.fc1")), f"{at}.fc2")
            outputs.append(x)
        x = self.norm(x, "vision.final_norm") if layers is None else sum(outputs[i] for i in layers) / len(layers)
        return x[order.argsort()]

    def losses(self, pixels, prefix):
        """The losses of patches S … K - 1."""
        patches, h, w = self.patches(pixels)
        x = self.linear(self.features(pixels, prefix), "head.projection") + self.places(h, w, self.c.head.width)
        for i in range(self.c.head.blocks):
            at = f"head.blocks.{i}"
            x = x + self.norm(x, f"{at}.norm1")
            x = x + self.linear(F.gelu(self.linear(self.norm(x, f"{at}.norm2"), f"{at}.fc1")), f"{at}.fc2")
        predictions = self.linear(self.norm(x, "head.norm"), "head.output")
        count = patches.shape[1]
        center = patches.mean(1, keepdim=True)
        variance = (patches - center).square().sum(1, keepdim=True) / (count - 1)
        targets = (patches - center) / (variance + 1e-6).sqrt()
        order = torch.tensor(image_order(self.c.order, h, w))
        predictions, targets = predictions[order], targets[order]
        return (predictions[:-1] - targets[1:]).square().mean(1)[max(prefix, 1) - 1 :]


@pytest.fixture
def model() -> AIM:
    model = AIM(small_aim()).init_weights(1)
    with torch.no_grad():  # biases and norms that do nothing would hide that they are missing
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.mark.parametrize("order", ORDERS)
def test_loss_and_gradients_are_the_twins(model, order):
    model.config = dataclasses.replace(model.config, order=order)
    batch, twin = packed(), Twin(model)
    losses = [twin.losses(*each) for each in images_of(batch)]
    truth = torch.cat(losses)
    assert batch.target_count == len(truth) == sum(max(0, h * w - s) for (h, w), s in IMAGES)
    found = model(batch)
    assert relative_error(found.loss, truth.sum()) < 1e-6
    found.objective.backward()
    truth.sum().backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad, twin.w[name].grad) < 1e-5, name
    alone = [x.mean() if len(x) else torch.tensor(math.nan) for x in losses]
    torch.testing.assert_close(
        model.document_losses(batch).double(), torch.stack(alone), equal_nan=True, rtol=1e-5, atol=0
    )
    assert relative_error(model.loss(batch.media.values, batch.media.grids, batch.prefix), truth.mean()) < 1e-6


def test_images_count_alike_where_the_average_is_theirs(model):
    """As if each image with a target were alone, whatever the number of its targets."""
    model.config = dataclasses.replace(model.config, average="images")
    batch = packed()
    found, alone = model(batch), model.document_losses(batch)
    mean = alone[~alone.isnan()].mean()
    assert relative_error(found.objective, mean * batch.target_count) < 1e-6
    truth = torch.autograd.grad(mean * batch.target_count, model.head.output.weight)
    assert relative_error(torch.autograd.grad(found.objective, model.head.output.weight)[0], truth[0]) < 1e-5
    targets = torch.tensor([h * w for h, w in batch.media.grids.sizes]) - batch.prefix
    assert relative_error(found.loss, (alone * targets).nansum()) < 1e-6
    assert model(packed([((1, 1), 1)])).objective == 0


@pytest.mark.parametrize("layers", [None, [2], [0, 1]])
@pytest.mark.parametrize("prefix", [None, "batch"])
def test_features_are_the_twins(model, layers, prefix):
    model.config = dataclasses.replace(model.config, order="spiral")
    batch, twin = packed(), Twin(model)
    found = model.features(batch.media.values, batch.media.grids.sizes, batch.prefix if prefix else None, layers)
    truth = [twin.features(pixels, s if prefix else None, layers) for pixels, s in images_of(batch)]
    assert relative_error(found, torch.cat(truth)) < 1e-5


def test_an_image_alone_and_in_a_padded_batch_has_the_same_loss(model):
    batch = packed(budget=Budget(200, 16, 200, 16, max_patches=40))
    assert batch.media.grids.patches == 200
    found = model.document_losses(batch)
    for loss, (pixels, prefix) in zip(found, images_of(batch)):
        h, w, _ = pixels.shape
        alone = model.loss(pixels.reshape(-1, 3), [(h // PATCH, w // PATCH)], torch.tensor([prefix]))
        assert (loss.isnan() and alone == 0) or relative_error(loss, alone) < 1e-6


@pytest.mark.parametrize("order", ORDERS)
def test_no_output_changes_with_a_patch_that_it_may_not_see(model, order):
    """Perturb the j-th patch: it changes later rows, and if it belongs to the prefix all, but not a bit of others."""
    model.config = dataclasses.replace(model.config, order=order)
    grid, prefix, places = (4, 4), 5, image_order(order, 4, 4)
    batch = packed([(grid, prefix)])
    pixels, grids = batch.media.values, batch.media.grids
    before = model.features(pixels, grids, batch.prefix)
    for j in range(16):
        other, (r, c) = pixels.view(16, 16, 3).clone(), divmod(places[j], 4)
        other[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH] ^= 85
        after = model.features(other.view(-1, 3), grids, batch.prefix)
        changed = (after != before).any(1)[[*places]]
        sees = torch.arange(16) >= (j if j >= prefix else 0)
        assert torch.equal(changed, sees), j


def test_a_batch_without_a_target_changes_nothing(model):
    for images in ([((1, 1), 1)], [((1, 1), 1), ((1, 1), 1)]):
        batch = packed(images)
        assert batch.target_count == 0
        losses = model(batch)
        losses.objective.backward()
        assert losses.loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        model.zero_grad()
    assert model.loss(torch.zeros(0, 3, dtype=torch.uint8), [], torch.zeros(0, dtype=torch.int32)) == 0
    assert model.features(torch.zeros(0, 3, dtype=torch.uint8), []).shape == (0, 32)


def test_rows_with_a_target_are_those_before_the_predicted_patches():
    assert next_patch_rows([(2, 3), (1, 1), (1, 4)], [2, 1, 0]).tolist() == [1, 2, 3, 4, 7, 8, 9]
    assert next_patch_rows([], []).tolist() == []
    batch = packed([((2, 3), 2), ((1, 4), 1)])
    assert batch.keys == ("image 1", "image 0"), "the smaller one first"
    assert batch.target_rows.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert batch.used_tokens == 10
    padded = packed([((2, 3), 2), ((1, 4), 1)], budget=Budget(10, 2, 10, 2, target_rows=9))
    assert padded.target_rows.tolist() == [0, 1, 2, 5, 6, 7, 8, -1, -1]
    with pytest.raises(ValueError, match="pack_images: 7 targets exceed Budget"):
        packed([((2, 3), 2), ((1, 4), 1)], budget=Budget(10, 2, 10, 2, target_rows=6))


@pytest.mark.parametrize("order", ["raster", "spiral"])
def test_losses_by_place_and_of_patches_of_several_colours_are_means_of_the_twins(model, order):
    model.config = dataclasses.replace(model.config, order=order)
    batch, twin = packed(budget=Budget(150, 8, 150, 8, target_rows=96)), Twin(model)
    losses, places, textured = [], [], []
    for pixels, prefix in images_of(batch):
        patches, h, w = twin.patches(pixels)
        losses += twin.losses(pixels, prefix).tolist()
        places += [i * 8 // (h * w) for i in range(prefix, h * w)]
        one = [(p.view(-1, 3) == p[:3]).all().item() for p in patches[[*image_order(order, h, w)]]]
        textured += [not plain for plain in one[prefix:]]
        assert h * w < 3 or sum(one) == 1
    losses, places, textured = np.array(losses), np.array(places), np.array(textured)
    counts = model(batch).counts
    assert counts[1].tolist() == [*np.bincount(places, minlength=8), textured.sum()]
    found = model.metrics(counts + counts)
    assert found["loss_textured"] == pytest.approx(losses[textured].mean(), rel=1e-5)
    truth = [losses[places == i].mean() for i in range(8)]
    assert found["loss_by_place"] == pytest.approx(truth, rel=1e-5)
    assert textured.sum() < len(textured)


def test_rows_without_a_target_change_no_loss_and_no_gradient(model):
    """The head on a padded budget, and on every patch, as on the rows with a target alone."""
    batch = packed()
    patches = batch.media.grids.patches
    padded = packed(budget=Budget(patches, len(IMAGES), patches, len(IMAGES), target_rows=96))
    place = torch.full((patches,), -1)
    place[batch.target_rows] = batch.target_rows
    full = dataclasses.replace(batch, target_rows=place)
    found = {}
    for name, each in {"exact": batch, "padded": padded, "full": full}.items():
        assert each.target_count == batch.target_count < len(padded.target_rows) < patches
        losses = model(each)
        losses.objective.backward()
        found[name] = (losses.loss.detach(), [p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    loss, gradients = found.pop("exact")
    for other, others in found.values():
        assert relative_error(other, loss) < 1e-6
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(others, gradients))


def test_a_prefix_or_layer_that_does_not_exist_is_named(model):
    pixels = torch.zeros(7 * 16, 3, dtype=torch.uint8)
    for prefix, expected in ([1, 6], "image 1 of 6 patches has a prefix of 6"), ([-1, 1], "image 0 of 1 patches"):
        with pytest.raises(ValueError, match=expected):
            model.loss(pixels, [(1, 1), (2, 3)], torch.tensor(prefix))
    for layers in ([3], [], [-1]):
        with pytest.raises(ValueError, match=r"features: layers are .*, expected numbers from 0 to 2"):
            model.features(pixels, [(1, 7)], layers=layers)


def test_sizes_have_the_papers_parameters():
    """Trunks of table 1 without embedding and norms, heads of section 4.3."""
    trunks = {"aim-0.6b": 0.68, "aim-1b": 1.21, "aim-3b": 2.72, "aim-7b": 6.44}
    for name, billions in trunks.items():
        model = registry.on_meta(registry.named(name))
        blocks = sum(p.numel() for block in model.vision.blocks for p in block.parameters())
        assert round(blocks / 1e9, 2) == billions
        head = sum(p.numel() for p in model.head.parameters())
        width = model.config.vision.width
        assert head == width * 2048 + 2048 + 12 * (2 * 2048 * 8192 + 4 * 2048) + 2 * 2048 + 588 * 2049
    assert 0.9e6 < sum(p.numel() for p in registry.on_meta(registry.named("aim-clipart")).parameters()) < 1.2e6


def test_matrices_begin_xavier_uniform():
    model = AIM(MODELS["aim-clipart"]).init_weights(0)
    block, head = model.vision.blocks[0], model.head.blocks[0]
    for weight, inputs, outputs in (
        (block.qkv.weight, 128, 128), (block.fc1.weight, 128, 512), (model.vision.patch_weight, 48, 128),
        (head.fc2.weight, 512, 128), (model.head.output.weight, 128, 48),
    ):  # fmt: skip
        bound = math.sqrt(6 / (inputs + outputs))
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not model.vision.patch_bias.any()
    assert not model.head.output.bias.any()
    assert model.vision.final_norm.weight.eq(1).all()


def test_another_prefix_compiles_nothing(model):
    """Nor does another number of targets, of images or of patches, even of one image."""
    compiled = AIM(model.config)
    compiled.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    compile_blocks(compiled, fullgraph=True, backend="aot_eager")
    budget = Budget(150, 8, 150, 8, max_patches=36, target_rows=144)
    others = [IMAGES, [((6, 6), 35), ((6, 6), 2)], [((5, 5), 24)], [((6, 6), 1)] * 4]
    for i, images in enumerate(others):
        batch = packed(images, i, budget)
        with torch.compiler.set_stance("default" if not i else "fail_on_recompile"):
            found, truth = compiled(batch), model(batch)
            found.objective.backward()
        assert relative_error(found.loss, truth.loss) < 1e-5


def test_operations_are_those_that_run(model):
    """The ledger counts what torch's own counter sees, but for attention on the rows that a prefix hides."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = packed([((6, 6), 36 - 16), ((6, 6), 4)] * 2)
    with FlopCounterMode(display=False) as counter:
        model(batch)
    counted = ledger(model.config, batch)
    linear = {name: n for name, n in counted.forward.items() if name != "vision attention"}
    padding = {name: n for name, n in counted.padding.items() if name != "vision attention"}
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    own = linear["patch embedding"] + linear["prediction"]  # ops of their own, which the counter may not know
    assert sum(linear.values()) - own <= products <= sum(linear.values()) + sum(padding.values())
    pairs = 2 * sum(s * s + (36 * 37 - s * (s + 1)) // 2 for s in (20, 4))
    assert counted.forward["vision attention"] == 3 * 4 * pairs * 32


def test_what_is_kept_for_backward_is_what_the_plan_says(model):
    from test_recompute import Alive

    batch = packed([((6, 6), 20), ((6, 6), 4)] * 4)
    with Alive() as alive:
        losses = model(batch)
    assert losses.loss.requires_grad
    found, expected = alive.bytes, sum(activations(model.config, workload(batch), Layout(4)).values())
    assert 0.75 < expected / found < 1.25


@pytest.mark.parametrize("h, w", [(1, 1), (1, 7), (6, 1), (4, 4), (5, 5), (3, 8), (7, 4)])
def test_orders_are_permutations_as_they_are_named(h, w):
    orders = {order: [divmod(i, w) for i in image_order(order, h, w)] for order in ORDERS}
    cells = [(r, c) for r in range(h) for c in range(w)]
    assert all(sorted(order) == cells for order in orders.values())
    assert orders["raster"] == cells
    assert orders["columns"] == [(r, c) for c in range(w) for r in range(h)]
    even = [(r, c) for r, c in cells if (r + c) % 2 == 0]
    assert orders["checkerboard"] == even + [cell for cell in cells if cell not in even]
    assert h * w < 5 or orders["random"] != cells
    spiral = orders["spiral"]
    assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in itertools.pairwise(spiral)), "each beside the last"
    rings = [min(r, c, h - 1 - r, w - 1 - c) for r, c in spiral]
    assert rings == sorted(rings, reverse=True), "from the centre outwards"


def test_orders_of_packed_images_stand_one_after_the_other():
    assert packed_order("columns", [(2, 2), (1, 1), (2, 3)], 13).tolist() == [0, 2, 1, 3, 4, 5, 8, 6, 9, 7, 10, 11, 12]
    assert packed_order("spiral", [], 2).tolist() == [0, 1]
    assert hints(AIMConfig)["order"].__metadata__[0].names == ORDERS
