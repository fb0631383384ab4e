"""Test conv_block on a CPU, interpreted (TRITON_INTERPRET=1), or on a GPU (CUDA_VISIBLE_DEVICES=0)."""

import itertools

import pytest
import torch
from conftest import DEVICE, INTERPRETED, TRITON, compiles, needs_gpu, needs_triton, not_interpreted, relative_error
from test_adaptive_pool import images, patches, rows
from torch import nn

from mm1.autotune.static import compile_launch, distinct
from mm1.kernels import dispatch
from mm1.kernels.abstractor import bottleneck, gate, pooling, reference
from mm1.kernels.abstractor import rows as row_kernels
from mm1.kernels.abstractor.bottleneck import NAMES, REQUIRED, conv_block
from mm1.kernels.dispatch import DEVICES, Device, recording
from mm1.kernels.patches.grids import Grids
from mm1.kernels.tuning import pinned

GRIDS = [(1, 1), (3, 5)]  # the interpreter takes 7 ms a call of one function by another
if not INTERPRETED:
    GRIDS += [(18, 5), (1, 64), (64, 1), (33, 20), (33, 20), (12, 12)]
# What is between the products is rounded to bf16 or fp16 about ten times; the interpreter cuts bf16 off.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-2 if INTERPRETED else 2e-2, torch.float16: 4e-3}
ROW_KERNELS = ("conv_norm", "conv_join", "conv_join_backward", "conv_walk_value", "conv_walk_gated",
               "conv_walk_backward", "conv_walk_input", "adaptive_pool")  # fmt: skip


@pytest.fixture(autouse=True)
def _small_tiles():
    """Where interpreted, let the product have several tiles and a program several walks."""
    if not INTERPRETED:
        yield
        return
    tile = gate.Config(16, 16, 16, 2, 4, 2, tma=False)
    some = row_kernels.Config(rows=4, warps=4, programs=1)
    with pytest.MonkeyPatch.context() as patch, pinned(conv_gate=tile, **dict.fromkeys(ROW_KERNELS, some)):
        patch.setitem(dispatch.DEVICES, "h200", Device("small", "sm_90", 3, 227 << 10))
        yield


def weights_of(width_in=8, width=8, dtype=torch.float32):
    """Return the weights of a block, with a convolved shortcut where the widths differ."""
    C, S = width, max(width_in // 4, 1)
    shapes = [(C, width_in, 1, 1), (C,), (C,), (C, 1, 3, 3), (C,), (C,), (S, C, 1, 1), (S,), (C, S, 1, 1), (C,),
              (C, C, 1, 1), (C,), (C,), (C, width_in, 1, 1), (C,), (C,)]  # fmt: skip
    names = NAMES if width_in != width else NAMES[:REQUIRED]
    return {
        name: (0.5 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_() for name, shape in zip(names, shapes)
    }


def in_fp64(x, grids, weights, pool=None):
    """Return the reference's result."""
    double = {name: value.double() for name, value in weights.items()}
    return reference.conv_block(x.double()[: patches(grids)], grids, double, pool=pool)


def compare(x, grids, weights, *, tolerance, pool=None, dy=None, packed=None):
    """Compare y and every gradient with fp64."""
    x = x.detach().requires_grad_()
    y = conv_block(x, packed or grids, weights, pool=pool)
    truth = in_fp64(x, grids, weights, pool)
    used = y[: len(truth)]
    assert relative_error(used, truth) < tolerance
    assert not y[len(truth) :].any()
    dy = torch.randn_like(used) if dy is None else dy
    given = {"x": x, **weights}
    found = torch.autograd.grad(used, list(given.values()), dy)
    expected = torch.autograd.grad(truth, list(given.values()), dy.double())
    for name, a, b in zip(given, found, expected):
        assert a.dtype == given[name].dtype
        assert relative_error(a, b) < (4 if tolerance < 1e-4 else 2) * tolerance, name


@pytest.mark.parametrize("widths", [(8, 8), (6, 8)], ids=["identity shortcut", "convolved shortcut"])
def test_it_is_timms_bottleneck_image_by_image(widths):
    regnet, layers = pytest.importorskip("timm.models.regnet"), pytest.importorskip("timm.layers")
    block = regnet.Bottleneck(*widths, act_layer=nn.SiLU, norm_layer=layers.LayerNorm2d, group_size=1).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(patches(GRIDS), widths[0])
    weights = {name: p.detach().float() for name, p in block.named_parameters()}
    truth = torch.cat([rows(block(image)) for image in images(x.double(), GRIDS)])
    y = conv_block(x.to(DEVICE), GRIDS, {name: w.to(DEVICE) for name, w in weights.items()})
    assert relative_error(y.cpu(), truth) < 2e-6


FP32, BF16, FP16 = TOLERANCE
CASES = list(itertools.product([(8, 8), (6, 8), (40, 40), (24, 40)], [None, (3, 2)], TOLERANCE))
if INTERPRETED:
    CASES = [((8, 8), None, FP32), ((6, 8), (3, 2), FP32), ((6, 20), None, BF16), ((8, 8), (2, 2), FP16)]


@pytest.mark.parametrize("widths, pool, dtype", CASES, ids=str)
def test_block_and_its_gradients(widths, pool, dtype, poisoned):
    x = torch.randn(patches(GRIDS), widths[0], device=DEVICE).to(dtype)
    compare(x, GRIDS, weights_of(*widths, dtype=dtype), tolerance=TOLERANCE[dtype], pool=pool)


def test_strips_below_and_beside_each_other():
    grids = [(17, 2), (1, 6)] if INTERPRETED else [(40, 11), (16, 4), (17, 5)]
    compare(torch.randn(patches(grids), 8, device=DEVICE), grids, weights_of(), tolerance=2e-6)


@pytest.mark.parametrize("pool", [(4, 3)] if INTERPRETED else [None, (12, 12), (2, 2)])
def test_overlapping_windows_and_windows_larger_than_the_image(pool):
    grids = [(5, 4), (1, 1)] if INTERPRETED else [(27, 27), (1, 1), (5, 40)]
    compare(torch.randn(patches(grids), 8, device=DEVICE), grids, weights_of(), tolerance=2e-6, pool=pool)


@not_interpreted
def test_a_large_image():
    compare(torch.randn(96 * 96, 8, device=DEVICE), [(96, 96)], weights_of(), tolerance=3e-6)


@pytest.mark.parametrize("pool", [None, (2, 2)])
@pytest.mark.parametrize("widths", [(6, 8)] if INTERPRETED else [(8, 8), (6, 8)], ids=str)
def test_padding_and_absent_images_change_nothing(widths, pool, poisoned):
    """Neither the values of x nor the gradients in these rows count."""
    used = patches(GRIDS)
    x = torch.cat([torch.randn(used, widths[0]), 100 * torch.ones(9, widths[0])]).to(DEVICE)
    grids = Grids(GRIDS, images=len(GRIDS) + 3, patches=used + 9, device=DEVICE)
    weights = weights_of(*widths)
    if not INTERPRETED:
        compare(x, GRIDS, weights, tolerance=2e-6, pool=pool, packed=grids)
    x.requires_grad_()
    y = conv_block(x, grids, weights, pool=pool)
    places = len(GRIDS) * 4 if pool else used
    assert relative_error(y[:places], in_fp64(x, GRIDS, weights, pool)) < 2e-6
    assert not y[places:].any()
    dy = torch.randn_like(y)
    dy[places:] = torch.nan
    found = torch.autograd.grad(y, [x, *weights.values()], dy)
    assert all(g.isfinite().all() for g in found)
    assert not found[0][used:].any()


def test_images_between_which_rows_belong_to_none(poisoned):
    """Grids.of_tensors allows gaps between images, also between neighbours of one size."""
    sizes, starts = [(4, 3), (2, 5), (2, 5)], [2, 20, 31]
    column = lambda *values: torch.tensor(values, device=DEVICE)  # noqa: E731
    grids = Grids.of_tensors(column(*starts), column(12, 10, 10), column(4, 2, 2), column(3, 5, 5), 43)
    x, weights = torch.randn(43, 8, device=DEVICE), weights_of()
    inside = torch.cat([torch.arange(s, s + h * w) for s, (h, w) in zip(starts, sizes)]).to(DEVICE)
    y = conv_block(x.requires_grad_(), grids, weights)
    truth = in_fp64(x[inside], sizes, weights)
    assert relative_error(y[inside], truth) < 2e-6
    outside = torch.ones(43, dtype=torch.bool, device=DEVICE).index_fill(0, inside, False)
    assert not y[outside].any()
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *weights.values()], dy)
    expected = torch.autograd.grad(truth, [x, *weights.values()], dy[inside].double())
    for name, a, b in zip(["x", *weights], found, expected):
        assert relative_error(a, b) < 8e-6, name


@pytest.mark.parametrize("pool", [None, (2, 3)])
@pytest.mark.parametrize("count, length", [(0, 0), (0, 5), (2, 5)])
def test_no_image_at_all_gives_zeros(count, length, pool, poisoned):
    x, weights = torch.randn(length, 6, device=DEVICE, requires_grad=True), weights_of(6, 8)
    y = conv_block(x, Grids([], images=count, patches=length, device=DEVICE), weights, pool=pool)
    assert y.shape == (count * 6 if pool else length, 8)
    assert not y.any()
    for g, given in zip(torch.autograd.grad(y.sum(), [x, *weights.values()]), [x, *weights.values()]):
        assert g.shape == given.shape
        assert not g.any()


@not_interpreted
@pytest.mark.parametrize("pool", [None, (3, 2)])
def test_an_image_gives_the_same_bits_packed_moved_and_again(pool):
    """Other orders agree only up to rounding, because a CPU's product of other sizes rounds differently."""
    x, weights = torch.randn(patches(GRIDS), 8, device=DEVICE), weights_of()
    y = conv_block(x, GRIDS, weights, pool=pool)
    assert torch.equal(y, conv_block(x, GRIDS, weights, pool=pool))
    parts = x.split([h * w for h, w in GRIDS])
    alone = [conv_block(part, [size], weights, pool=pool) for part, size in zip(parts, GRIDS)]
    backwards = conv_block(torch.cat(parts[::-1]), GRIDS[::-1], weights, pool=pool)
    assert relative_error(y, torch.cat(alone)) < 1e-6
    assert relative_error(backwards, torch.cat(alone[::-1])) < 1e-6


@not_interpreted
def test_gradients_have_the_same_bits_again():
    x, weights = torch.randn(patches(GRIDS), 6, device=DEVICE, requires_grad=True), weights_of(6, 8)
    first, second = (
        torch.autograd.grad(conv_block(x, GRIDS, weights, pool=(3, 2)).square().sum(), [x, *weights.values()])
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@not_interpreted
def test_without_gradients_it_gives_the_same_bits():
    x, weights = torch.randn(patches(GRIDS), 6, device=DEVICE), weights_of(6, 8)
    with torch.no_grad():
        y = conv_block(x, GRIDS, weights)
    assert torch.equal(y, conv_block(x, GRIDS, weights))


@not_interpreted
@pytest.mark.parametrize("wanted", ["x", "weights"])
def test_one_kind_of_gradient_alone_is_the_same(wanted):
    x, weights = torch.randn(patches(GRIDS), 6, device=DEVICE, requires_grad=True), weights_of(6, 8)
    both = torch.autograd.grad(conv_block(x, GRIDS, weights).square().sum(), [x, *weights.values()])
    frozen = {name: w.detach() for name, w in weights.items()}
    if wanted == "x":
        one = torch.autograd.grad(conv_block(x, GRIDS, frozen).square().sum(), [x])
    else:
        one = torch.autograd.grad(conv_block(x.detach(), GRIDS, weights).square().sum(), list(weights.values()))
    for a, b in zip(one, both[:1] if wanted == "x" else both[1:]):
        assert torch.equal(a, b)


def test_x_weights_and_gradient_may_have_any_strides():
    x = torch.randn(16, patches(GRIDS), device=DEVICE).T[:, ::2]
    dy = torch.randn(1, 8, device=DEVICE).expand(patches(GRIDS), 8)
    weights = {}
    for name, w in weights_of().items():
        wide = torch.stack([w.detach(), w.detach()], -1)
        weights[name] = wide.unbind(-1)[0].requires_grad_()
        assert w.numel() == 1 or not weights[name].is_contiguous()
    compare(x, GRIDS, weights, tolerance=2e-6, dy=dy)


@not_interpreted
def test_autocast_takes_weights_to_its_dtype():
    x, weights = torch.randn(patches(GRIDS), 8, device=DEVICE), weights_of()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = conv_block(x, GRIDS, weights)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, in_fp64(x, GRIDS, weights)) < TOLERANCE[torch.bfloat16]
    grads = torch.autograd.grad(y.float().square().sum(), list(weights.values()))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@needs_triton
@pytest.mark.parametrize("change", [{"fused": False}, {"tma": True, "persistent": True}, {"group_m": 1}], ids=str)
def test_every_way_to_gate_gives_the_same(change):
    """Images are shorter than a tile, and one has several tiles."""
    options = {"block_m": 16, "block_n": 16, "block_k": 16, "group_m": 2, "warps": 4, "stages": 2, "tma": False}
    owner = torch.tensor([0] * 3 + [1] + [2] * 40 + [3] * 6 + [-1] * 2, dtype=torch.int32, device=DEVICE)
    b, gates, w = (torch.randn(*shape, device=DEVICE) for shape in ((len(owner), 24), (4, 24), (40, 24)))
    b[owner < 0] = 0
    truth = (b.double() * gates.double()[owner.clamp(min=0)]) @ w.double().T
    with pinned(conv_gate=gate.Config(**options | change)):
        for weight in (w, w.T.contiguous().T):
            assert relative_error(gate.gated_mm(b.clone(), gates, owner, weight), truth) < 1e-6


@needs_triton
@pytest.mark.parametrize("columns", [1, 2] if INTERPRETED else [1, 2, 4])
def test_every_way_to_walk_gives_the_same(columns):
    config = row_kernels.Config(rows=columns, warps=4, programs=1 + columns % 2)
    grids = [(2, 3)] if INTERPRETED else GRIDS
    with pinned(**dict.fromkeys(ROW_KERNELS, config)):
        compare(torch.randn(patches(grids), 8, device=DEVICE), grids, weights_of(), tolerance=2e-6)


@not_interpreted
@pytest.mark.parametrize("widths", [(8, 8), (6, 8)], ids=str)
def test_ops_keep_their_declarations(widths):
    grids = Grids(GRIDS, images=len(GRIDS) + 1, patches=patches(GRIDS) + 4, device=DEVICE)
    x = torch.randn(grids.patches, widths[0], device=DEVICE, requires_grad=True)
    weights = [w.detach().flatten(1).requires_grad_() if w.ndim == 4 else w for w in weights_of(*widths).values()]
    geometry = [grids.table, grids.owner, grids.strips]
    for pool in ([0, 0], [2, 3]):
        torch.library.opcheck(bottleneck._forward, (x, geometry, weights, pool, True))
        y, *saved = (t.detach() for t in bottleneck._forward(x, geometry, weights, pool, True))
        detached = [w.detach() for w in weights]
        torch.library.opcheck(
            bottleneck._backward, (torch.randn_like(y), x.detach(), saved, geometry, detached, pool, True, True)
        )


@not_interpreted
def test_compiled_it_takes_other_sizes_without_compiling_again():
    weights = weights_of(6, 8)
    compiled = torch.compile(lambda x, grids: conv_block(x, grids, weights, pool=(3, 2)), fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ([(4, 3), (2, 7)], [(5, 5)], [(1, 1), (9, 2), (3, 1)], []):
            x = torch.randn(30, 6, device=DEVICE, requires_grad=True)
            grids = Grids(sizes, images=4, patches=30, device=DEVICE)
            y, truth = compiled(x, grids), conv_block(x, grids, weights, pool=(3, 2))
            assert torch.equal(y, truth)
            found, expected = (torch.autograd.grad(t.square().sum(), [x, *weights.values()]) for t in (y, truth))
            assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_refuses_bad_arguments():
    x, weights = torch.randn(12, 8, device=DEVICE), weights_of()
    grids = [(4, 3)]
    with pytest.raises(ValueError, match=r"conv_block: x is \(12, 8\), expected \(6, 8\)"):
        conv_block(x, [(2, 3)], weights)
    with pytest.raises(ValueError, match=r"conv_block: x is \(12, 7\), expected \(12, 8\)"):
        conv_block(x[:, 1:], grids, weights)
    with pytest.raises(ValueError, match=r"conv_block: weights is without \['se.fc1.bias'\]"):
        conv_block(x, grids, {k: v for k, v in weights.items() if k != "se.fc1.bias"})
    with pytest.raises(ValueError, match=r"without \['downsample.bn.bias'\]"):
        conv_block(x[:, :6], grids, {k: v for k, v in weights_of(6, 8).items() if k != "downsample.bn.bias"})
    with pytest.raises(ValueError, match="width of x without downsample is 6, expected 8"):
        conv_block(x[:, :6], grids, {k: v for k, v in weights_of(6, 8).items() if "downsample" not in k})
    with pytest.raises(ValueError, match=r"conv2.conv.weight is \(8, 1, 1, 1\), expected \(8, 1, 3, 3\)"):
        conv_block(x, grids, weights | {"conv2.conv.weight": torch.ones(8, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"dtype of conv1.conv.weight is torch.float32, expected torch.bfloat16"):
        conv_block(x.bfloat16(), grids, weights)
    with pytest.raises(ValueError, match="conv_block: dtype of x"):
        conv_block(x.int(), grids, weights)
    with pytest.raises(ValueError, match="conv_block: pool"):
        conv_block(x, grids, weights, pool=(0, 3))
    with pytest.raises(ValueError, match="conv_block: merge of grids is 2, expected 1"):
        conv_block(x[:4], Grids([(2, 2)], merge=2, device=DEVICE), weights)
    if not TRITON:
        few = torch.tensor([[0], [3], [2], [2]]).unbind()
        with pytest.raises(ValueError, match="conv_block: patches of image 0 is 3, expected 4"):
            conv_block(x[:4], Grids.of_tensors(*few, 4), weights)


def launches(device, width_in, width, dtype=torch.bfloat16):
    """Return the different launches of a block, pooled and not, forward and backward, for 64 images of 27 × 27."""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    P, N, C, S = 64 * 729, 64, width, width_in // 4
    table, owner, strips = (empty(*shape, dtype=torch.int32) for shape in ((N, 4), (P,), (N + 1,)))
    given = [empty(*shape) for shape in ((C, width_in), (C,), (C,), (C, 9), (C,), (C,), (S, C), (S,), (C, S), (C,),
                                         (C, C), (C,), (C,))]  # fmt: skip
    given += [empty(C, width_in), empty(C), empty(C)] if width_in != width else []
    geometry = table, owner, strips
    x = empty(P, width_in)
    with recording(DEVICES[device]) as found:
        for pool in ((0, 0), (12, 12)):
            y, *saved = bottleneck.forward(x, geometry, given, pool, True)
            bottleneck.backward(y, x, saved, geometry, given, pool, True, True)
        pooling.backward(pooling.forward(x, table, owner, 12, 12), table, owner, 12, 12)
    return distinct(found)


def check(device, width_in, width, dtype=torch.bfloat16):
    for launch in launches(device, width_in, width, dtype):
        code = compile_launch(launch, DEVICES[device])
        assert code.spills <= (8 if dtype == torch.float32 else 0), code
        assert code.shared <= DEVICES[device].shared, code
        assert bool(code.matrix) == (code.name == "_gemm_kernel"), code
        if device == "h200" and code.matrix:
            assert code.matrix == code.instructions["HGMMA"], code
            assert code.instructions["UTMALDG"], code
            assert code.instructions["UTMASTG"], code


@needs_gpu
def test_no_synchronisation_on_a_gpu():
    weights, others, grids = weights_of(6), weights_of(8), Grids(GRIDS).to(DEVICE)
    x = torch.randn(grids.patches, 6, device=DEVICE, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        conv_block(conv_block(x, grids, weights), grids, others, pool=(2, 2)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@compiles
def test_h200_code_has_wgmma_bulk_copies_and_no_spills():
    check("h200", 1024, 1024)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("widths", [(1024, 1024), (1280, 1024), (1000, 1000)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_gpu_has_code_that_fits(device, widths):
    check(device, *widths)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_types_have_code_that_fits(dtype):
    check("h200", 1024, 1024, dtype)
