"""patch_loss equals the reference in fp64: values and gradients, for every shape of image, patch and channel."""

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DEVICE,
    INTERPRETED,
    assert_exports,
    gradients,
    needs_gpu,
    needs_triton,
    not_interpreted,
    relative_error,
)

from mm1.kernels.patches import Grids, loss, patch_loss, reference
from mm1.kernels.tiles import Config
from mm1.kernels.tuning import pinned

SIZES = [(2, 3), (1, 1), (4, 2), (2, 3), (1, 7)]
USED = sum(h * w for h, w in SIZES)
ROWS = [3, -1, 0, 27, 13, 6, 7, 27, 28, 2**31 - 1, -(2**31), 20]  # the fourth is the last patch; 28 is past it
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
GREY = {"mean": (0.5,), "std": (0.25,)}
TWO = {"mean": (0.2, 0.7), "std": (0.3, 0.1)}
# The interpreter cuts bf16 off instead of rounding.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2 if INTERPRETED else 1e-2}


def tiles_of(block_m, block_n, block_k):
    """Pin tiles where interpreted."""
    small = Config(block_m=block_m, block_n=block_n, block_k=block_k, group_m=2, warps=4, stages=2, tma=False)
    return pinned(**({"patch_loss": small} if INTERPRETED else {}))


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    """Use tiles and chunks so small that tiny shapes have several and a remainder."""
    monkeypatch.setitem(loss.CHUNK, "cpu", 5 * 48 * 4)
    with tiles_of(16, 32, 16):
        yield


def problem(p=4, q=None, normal=IMAGENET, width=20, rows=ROWS, sizes=SIZES, dtype=torch.float32):
    """Return x, weight, bias, and pixels, rows and settings by name."""
    q, channels = q or p, len(normal["mean"])
    area, K = sum(h * w for h, w in sizes) * p * q, p * q * channels
    x, weight, bias = (torch.randn(s, device=DEVICE).to(dtype) for s in ((len(rows), width), (K, width), (K,)))
    pixels = torch.randint(0, 256, (area, channels), dtype=torch.uint8, device=DEVICE)
    inputs = [x.requires_grad_(), (weight / 4).detach().requires_grad_(), bias.requires_grad_()]
    return inputs, {"pixels": pixels, "rows": torch.tensor(rows, dtype=torch.int64, device=DEVICE), "grids": sizes,
                    "patch_size": (p, q) if q != p else p, **normal}  # fmt: skip


def compare(inputs, others, tolerance=1e-5, call=patch_loss, **changes):
    """Compare loss and gradients with the reference's in fp64."""
    actual = call(*inputs, **others, **changes)
    wide = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    truth = reference.patch_loss(*wide, **others, **changes)
    assert actual.dtype == torch.float32
    assert relative_error(actual, truth) < tolerance
    kept = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]
    for i, found, expected in zip(
        kept, gradients(actual, [inputs[i] for i in kept]), gradients(truth, [wide[i] for i in kept])
    ):
        assert found.dtype == inputs[i].dtype
        assert relative_error(found, expected) < tolerance, ("x", "weight", "bias")[i]
    return actual


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_gradients_are_the_references(dtype):
    actual = compare(*problem(dtype=dtype), tolerance=TOLERANCE[dtype])
    assert [i for i, value in enumerate(actual.tolist()) if value == 0] == [1, 8, 9, 10], "rows of no patch"


@pytest.mark.parametrize(
    "p, q, normal",
    [(1, 1, GREY), (1, 1, IMAGENET), (2, 3, TWO), (3, 2, IMAGENET), (5, 1, GREY), (1, 16, GREY), (7, 7, IMAGENET),
     pytest.param(14, 14, IMAGENET, marks=not_interpreted), pytest.param(40, 8, TWO, marks=not_interpreted)],
    ids=str,
)  # fmt: skip
def test_patches_of_any_sides_and_channels(p, q, normal):
    compare(*problem(p, q, normal))


def test_the_reference_is_what_the_paper_says():
    """The target by torch's own mean and unbiased variance of one patch after the other, cut by slices."""
    (x, weight, bias), others = problem(dtype=torch.float64, rows=[*range(USED)])
    mean, std = (torch.tensor(IMAGENET[name], dtype=torch.float64, device=DEVICE) for name in ("mean", "std"))
    losses, first = [], 0
    for h, w in SIZES:
        image = others["pixels"][first : first + h * w * 16].view(4 * h, 4 * w, 3)
        first += h * w * 16
        for row in range(0, 4 * h, 4):
            for column in range(0, 4 * w, 4):
                patch = ((image[row : row + 4, column : column + 4].double() / 255 - mean) / std).flatten()
                target = (patch - patch.mean()) / (patch.var(unbiased=True) + 1e-6).sqrt()
                losses.append(F.mse_loss(weight @ x[len(losses)] + bias, target))
    assert relative_error(reference.patch_loss(x, weight, bias, **others), torch.stack(losses)) < 1e-14


def test_padding_and_merged_blocks():
    """Rows and pixels past the images count for nothing; blocks of 2 × 2 patches number the same patches otherwise."""
    inputs, others = problem()
    exact = patch_loss(*inputs, **others)
    pixels = torch.cat([others["pixels"], torch.full((3 * 16, 3), 99, dtype=torch.uint8, device=DEVICE)])
    for buffer in (others["pixels"], pixels):
        changes = {"pixels": buffer, "grids": Grids(SIZES, images=9, patches=USED + 3)}
        actual = compare(inputs, others | changes)
        assert torch.equal(actual, exact)
    sizes = [(4, 6), (2, 2), (6, 2)]
    order = torch.cat([
        first + torch.arange(h * w).view(h // 2, 2, w // 2, 2).transpose(1, 2).flatten()
        for (h, w), first in zip(sizes, (0, 24, 28))
    ])  # fmt: skip
    inputs, others = problem(sizes=sizes, rows=[*range(len(order))])
    by_block = compare(inputs, others | {"grids": Grids(sizes, merge=2)})
    row_by_row = patch_loss(*inputs, **others | {"rows": order.to(DEVICE)})
    assert relative_error(by_block, row_by_row) < 1e-6


def test_images_on_the_device_may_leave_gaps():
    """Grids whose sizes the host does not know: rows 3 to 5 belong to no image, and the last image lost its end."""
    tensors = [torch.tensor(values, device=DEVICE) for values in ([0, 6], [3, 4], [1, 2], [3, 4])]  # first, rows, h, w
    inputs, others = problem(sizes=[(1, 10)], rows=[0, 2, 3, 5, 6, 9, 10])
    losses = patch_loss(*inputs, **others | {"grids": Grids.of_tensors(*tensors, 10)})
    assert [value > 0 for value in losses.tolist()] == [True, True, False, False, True, True, False]
    both = [(slice(0, 2), (1, 3), slice(0, 3 * 16)), (slice(4, 6), (2, 4), slice(6 * 16, 14 * 16))]
    pixels = torch.cat([others["pixels"], others["pixels"]])[: 14 * 16]
    grids = Grids.of_tensors(*tensors, 14)
    losses = patch_loss(*inputs, **others | {"grids": grids, "pixels": pixels})
    for rows, size, of in both:
        part = [inputs[0][rows], *inputs[1:]]
        truth = reference.patch_loss(
            *(t.double() for t in part), **others | {"pixels": pixels[of], "grids": [size],
                                                     "rows": others["rows"][rows] - of.start // 16}
        )  # fmt: skip
        assert relative_error(losses[rows], truth) < 1e-5


@pytest.mark.parametrize("value", [0, 1, 77, 254, 255])
def test_patches_without_contrast_have_targets_of_zero(value):
    same = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    inputs, others = problem(normal=same)
    others["pixels"] = torch.full_like(others["pixels"], value)
    compare(inputs, others)
    predictions = F.linear(*(t.detach() for t in inputs))
    valid = (others["rows"] >= 0) & (others["rows"] < USED)
    assert relative_error(patch_loss(*inputs, **others), predictions.square().mean(1) * valid) < 1e-6
    compare(inputs, others | IMAGENET)  # here the channels differ, so that there is a contrast


@pytest.mark.parametrize("step", [1, 255])
def test_one_value_that_differs_is_exact(step):
    """The variance of almost equal bytes is that of their differences, not of large squares."""
    inputs, others = problem(p=14 if not INTERPRETED else 4, normal={"mean": (0.0,) * 3, "std": (1.0,) * 3})
    others["pixels"] = torch.full_like(others["pixels"], 255 - step)
    others["pixels"][::97, 1] += step
    compare(inputs, others, tolerance=2e-5)


def test_without_rows_or_images_loss_and_gradients_are_zero():
    inputs, others = problem(rows=[])
    losses = patch_loss(*inputs, **others)
    assert losses.shape == (0,)
    assert all(not g.any() for g in gradients(losses, inputs))
    for grids in ([], Grids([], images=2, patches=5)):
        inputs, others = problem(sizes=[], rows=[0, -1, 4])
        losses = patch_loss(*inputs, **others | {"grids": grids})
        assert losses.tolist() == [0, 0, 0]
        assert all(not g.any() for g in gradients(losses, inputs))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_gradients_that_are_needed_are_computed(frozen):
    inputs, others = problem()
    truth = gradients(patch_loss(*inputs, **others), inputs)
    for i in frozen:
        inputs[i].requires_grad_(False)
    actual = patch_loss(*inputs, **others)
    kept = [i for i in range(3) if i not in frozen]
    for i, found in zip(kept, gradients(actual, [inputs[i] for i in kept])):
        assert torch.equal(found, truth[i])
    without_bias = [*inputs[:2], None]
    if 1 in kept:
        compare(without_bias, others)


def test_what_waits_for_backward_is_the_arguments():
    (x, weight, bias), others = problem(width=4, rows=[*range(USED)] * 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        patch_loss(x, weight, bias, **others)
    floats = sum(t.numel() for t in saved if t.is_floating_point())
    assert floats == x.numel() + weight.numel() + bias.numel() < x.shape[0] * weight.shape[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_chooses_the_dtype_of_the_products(dtype):
    inputs, others = problem()
    with torch.autocast(DEVICE, dtype):
        compare(inputs, others, tolerance=TOLERANCE[dtype])
        actual = patch_loss(*inputs, **others)
    rounded = [t.detach().to(dtype).float() for t in inputs[:2]]
    assert relative_error(actual, patch_loss(*rounded, inputs[2], **others)) < (1e-2 if INTERPRETED else 1e-6)
    assert relative_error(actual, patch_loss(*inputs, **others)) > 1e-6


def test_the_share_of_a_row_in_a_mean_over_many_does_not_vanish_in_fp16():
    """2 g / K is 4e-9 here; fp16's smallest number is 6e-8."""
    inputs, others = problem()
    g = torch.full((len(ROWS),), 1e-7, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        losses = patch_loss(*inputs, **others)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    truth = torch.autograd.grad(reference.patch_loss(*wide, **others), wide, g.double())
    for found, expected in zip(torch.autograd.grad(losses, inputs, g, retain_graph=True), truth):
        assert relative_error(found, expected) < TOLERANCE[torch.float16]
    for gradient in torch.autograd.grad(losses, inputs, torch.zeros_like(g)):
        assert not gradient.any()


def test_a_gradient_of_rows_of_no_patch_counts_for_nothing():
    inputs, others = problem()
    invalid = (others["rows"] < 0) | (others["rows"] >= USED)
    g = torch.randn(len(ROWS), device=DEVICE)
    truth = torch.autograd.grad(patch_loss(*inputs, **others), inputs, g)
    for found, expected in zip(
        torch.autograd.grad(patch_loss(*inputs, **others), inputs, g.masked_fill(invalid, float("nan"))), truth
    ):
        assert torch.equal(found, expected)
    assert not truth[0][invalid].any()


@needs_triton
@pytest.mark.parametrize("block_n", [64, 128])
def test_wide_tiles_are_finished_in_parts(block_n):
    inputs, others = problem(p=7)  # 147 columns
    with tiles_of(16, block_n, 32):
        compare(inputs, others)


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="kernels of a GPU do not compute in fp64")
def test_in_fp64_gradients_are_those_of_finite_differences():
    inputs, others = problem(p=2, q=3, normal=TWO, width=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: patch_loss(*inputs, **others), inputs)


@not_interpreted
def test_new_sizes_do_not_recompile():
    inputs, others = problem(rows=[0, 5, -1, 2])
    del others["pixels"], others["grids"]
    call = torch.compile(lambda x, g: patch_loss(*inputs, x, grids=g, **others), fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in (SIZES, [(5, 5)], [(1, 1)] * 7, []):
            grids = Grids(sizes, images=8, patches=40, device=DEVICE)
            pixels = torch.randint(0, 256, (40 * 16, 3), dtype=torch.uint8, device=DEVICE)
            losses = call(pixels, grids)
            truth = patch_loss(*inputs, pixels, grids=grids, **others)
            assert relative_error(losses, truth) < 1e-6
            for a, b in zip(gradients(losses, inputs), gradients(truth, inputs)):
                assert relative_error(a, b) < 1e-6


@not_interpreted
@pytest.mark.parametrize("strict", [True, False])
def test_exports_for_any_rows_of_any_images(strict):
    def call(weight, bias, x, rows, pixels, *sides):
        grids = Grids.of_tensors(*sides, pixels.shape[0] // 16)
        return patch_loss(x, weight, bias, pixels, rows, grids, patch_size=4, **IMAGENET)

    cases = []
    for sizes in (SIZES, [(2, 3)], [(5, 4), (1, 7), (1, 1)]):
        h, w = torch.tensor(sizes, device=DEVICE).unbind(1)
        (x, weight, bias), others = problem(sizes=sizes, rows=[*range(len(sizes) + 2)])
        sides = (h * w).cumsum(0) - h * w, h * w, h, w
        cases.append((x.detach(), others["rows"], others["pixels"], *sides))
    rows, count = {0: torch.export.Dim("R", max=4096)}, {0: torch.export.Dim("N", min=1, max=64)}
    pixels = {0: 16 * torch.export.Dim("P", max=4096)}
    parameters = [weight.detach().requires_grad_(), bias.detach().requires_grad_()]
    assert_exports(call, (rows, rows, pixels, *[count] * 4), *cases, strict=strict, parameters=parameters)


@not_interpreted
def test_op_contracts():
    inputs, others = problem()
    grids, settings = Grids(SIZES, device=DEVICE), ([4, 4, 1], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], 1e-6, torch.float32)
    torch.library.opcheck(
        loss._forward, (*inputs, others["pixels"], others["rows"], [grids.table, grids.owner], *settings)
    )


@needs_gpu
def test_no_synchronisation_on_a_gpu():
    inputs, others = problem()
    others["grids"] = Grids(SIZES).to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        patch_loss(*inputs, **others).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_beyond_2_31_bytes_of_pixels():
    """The last image of 96 × 96 patches of 14 pixels begins beyond 2³¹ bytes."""
    p, side = 14, 96
    patches = side * side
    count = 2**31 // (patches * p * p * 3) + 2
    (x, weight, bias), others = problem(p, width=4, sizes=[(side, side)], rows=[0, 95, 96, patches - 1])
    pixels = torch.zeros(count * patches * p * p, 3, dtype=torch.uint8, device=DEVICE)
    pixels[-patches * p * p :] = others["pixels"]
    rows = others["rows"] + (count - 1) * patches
    many = others | {"pixels": pixels, "rows": rows, "grids": [(side, side)] * count}
    assert torch.equal(patch_loss(x, weight, bias, **many), patch_loss(x, weight, bias, **others))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.randn(47, 20)}, r"weight is \(47, 20\), expected \(48, 20\)"),
        ({"bias": torch.randn(47)}, r"bias is \(47,\), expected \[48\]"),
        ({"x": torch.randn(12, 20, 1)}, r"x is \(12, 20, 1\), expected \[R, D\]"),
        ({"rows": torch.zeros(11, dtype=torch.long)}, r"rows is \(11,\), expected \(12,\)"),
        ({"rows": torch.zeros(12)}, r"rows is torch.float32 \(12,\), expected integers"),
        ({"pixels": torch.zeros(28 * 16, 3)}, r"dtype of pixels is torch.float32, expected torch.uint8"),
        ({"pixels": torch.zeros(27 * 16, 3, dtype=torch.uint8)}, r"pixels is \(432, 3\), expected \(448, 3\)"),
        ({"pixels": torch.zeros(28 * 16 * 3, dtype=torch.uint8)}, r"pixels is \(1344,\), expected \[448, C\]"),
        ({"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\), expected 3 finite values"),
        ({"std": (0.5, 0.5, 0.0)}, r"std is \(0.5, 0.5, 0.0\), expected 3 positive values"),
        ({"patch_size": 0}, "patch_size is 0, expected positive sides"),
        ({"patch_size": (4, 2**15)}, r"patch_size is \(4, 32768\), expected positive sides of at most 65536 pixels"),
        ({"eps": 0.0}, "eps is 0.0, expected a positive number"),
    ],
)
def test_refuses_bad_arguments(change, message):
    (x, weight, bias), others = problem()
    arguments = {"x": x, "weight": weight, "bias": bias, **others}
    with pytest.raises(ValueError, match=f"patch_loss: {message}"):
        patch_loss(
            **arguments | {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in change.items()}
        )
