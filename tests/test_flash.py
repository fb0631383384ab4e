"""Test the Triton kernels of attention: interpreted (TRITON_INTERPRET=1), on a GPU (CUDA_VISIBLE_DEVICES=0), or only
compiled, for GPUs that this machine lacks."""

import pytest
import torch
from conftest import DEVICE, INTERPRETED, compiles, gradients, needs_gpu, needs_triton, relative_error

from mm1.autotune.static import compile_launch, specialize
from mm1.kernels import dispatch
from mm1.kernels.attention import Causal, Full, Prefix, attention, flash, reference
from mm1.kernels.attention.pieces import pieces
from mm1.kernels.attention.tile_map import map_kernel
from mm1.kernels.attention.tiles import Config, FlashShape, default
from mm1.kernels.dispatch import DEVICES, recording
from mm1.kernels.tuning import pinned

# p and ds are rounded to the inputs' dtype before they are multiplied; the interpreter cuts bf16 off.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2 if INTERPRETED else 5e-3, torch.float16: 1e-3}
RAGGED = [18, 0, 1, 17]
MASKS = ["full", "causal", "prefix"]
KERNELS = ("flash", "flash_dq", "flash_dkv")


@pytest.fixture(autouse=True)
def _small_tiles():
    """Use tiles of unequal sides where interpreted, so that no error is hidden by symmetry."""
    small = {"flash": Config(16, 16, 4, 1), "flash_dq": Config(16, 32, 4, 1), "flash_dkv": Config(32, 16, 4, 1)}
    with pinned(**(small if INTERPRETED else {})):
        yield


def starts(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def mask_of(name, segments):
    """Return a mask; prefixes are shorter than their segments in RAGGED (18, 0, 1, 17), 0, longer, 1, …."""
    prefixes = torch.tensor([[7, 3, 0, 30, 1, 16][b % 6] for b in range(segments)], dtype=torch.int32, device=DEVICE)
    return {"full": Full(), "causal": Causal(), "prefix": Prefix(prefixes)}[name]


def truth_of(q, k, v, lengths, mask, lengths_k=None):
    """Return the reference's result in fp64."""
    cu_k = None if lengths_k is None else starts(lengths_k)
    return reference.attention(q.double(), k.double(), v.double(), starts(lengths), mask=mask, cu_seqlens_k=cu_k)


def inputs(rows, keys=None, heads=(2, 1), width=16, dtype=torch.float32):
    keys = rows if keys is None else keys
    sizes = (rows, heads[0], width), (keys, heads[1], width), (keys, heads[1], width)
    return [torch.randn(size, device=DEVICE).to(dtype).requires_grad_() for size in sizes]


def compare(q, k, v, lengths, mask, lengths_k=None):
    """Compare y and every gradient with fp64; return y."""
    tensors, mask = [q, k, v], mask_of(mask, len(lengths))
    y = attention(q, k, v, starts(lengths), mask=mask, backend="triton",
                  cu_seqlens_k=None if lengths_k is None else starts(lengths_k))  # fmt: skip
    truth = truth_of(q, k, v, lengths, mask, lengths_k)
    assert y.dtype == q.dtype
    assert relative_error(y, truth) < TOLERANCE[q.dtype]
    for name, grad, expected in zip("qkv", gradients(y, tensors), gradients(truth, tensors)):
        assert relative_error(grad, expected) < TOLERANCE[q.dtype], name
    return y


@needs_triton
@pytest.mark.parametrize("width", [16, 48, 64, 80, 112, 128])
@pytest.mark.parametrize("mask", MASKS)
def test_every_width_is_the_sum_of_its_pieces(width, mask):
    compare(*inputs(23, heads=(1, 1), width=width), [20, 3], mask)


@needs_triton
@pytest.mark.parametrize("lengths, padding", [(RAGGED, 0), (RAGGED, 7), ([], 5), ([0, 0], 0), ([1, 1], 20)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_each_segment_attends_to_itself_alone(lengths, padding, mask, poisoned):
    y = compare(*inputs(sum(lengths) + padding), lengths, mask)
    assert not y[sum(lengths) :].any()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_half_precision(dtype, mask):
    compare(*inputs(sum(RAGGED), dtype=dtype, width=80, heads=(1, 1)), RAGGED, mask)


@needs_triton
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_heads_of_a_group_share_keys_and_values(heads, mask):
    compare(*inputs(20, heads=heads), [17, 3], mask)


@needs_triton
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "lengths, lengths_k", [([3, 1, 18, 0], [9, 1, 35, 5]), ([5, 4], [0, 33]), ([35, 3], [18, 2])], ids=str
)
def test_keys_with_segments_of_their_own(lengths, lengths_k, mask, poisoned):
    """Causal is aligned to the end: with fewer keys than queries the first queries see none."""
    compare(*inputs(sum(lengths) + 2, sum(lengths_k) + 3), lengths, mask, lengths_k)


@needs_triton
@pytest.mark.parametrize("length", [1, 33])
def test_every_prefix_of_a_segment(length):
    """Test prefixes of 0 keys, 1, all but one, all and more, below and above the sides of tiles of 16 and 32 rows."""
    for prefix in {0, 1, 15, 16, 17, length - 1, length, length + 40, 2**31 - 1, -5}:
        lengths, mask = [length, 5], Prefix(torch.tensor([prefix, 2], dtype=torch.int32, device=DEVICE))
        tensors = inputs(length + 6, heads=(1, 1))
        y = attention(*tensors, starts(lengths), mask=mask, backend="triton")
        truth = truth_of(*tensors, lengths, mask)
        assert relative_error(y, truth) < 1e-6
        for name, grad, expected in zip("qkv", gradients(y, tensors), gradients(truth, tensors)):
            assert relative_error(grad, expected) < 1e-6, (name, prefix)


@needs_triton
def test_a_prefix_of_nothing_is_causal_and_of_everything_full_to_the_bit():
    tensors, cu = inputs(36), starts([19, 17])
    for prefix, mask in ((torch.zeros(2), Causal()), (torch.tensor([19, 99]), Full())):
        y, same = (attention(*tensors, cu, mask=m, backend="triton") for m in (Prefix(prefix.int().to(DEVICE)), mask))
        assert torch.equal(y, same)
        for grad, expected in zip(gradients(y, tensors), gradients(same, tensors)):
            assert torch.equal(grad, expected)


@needs_triton
@pytest.mark.parametrize("mask", MASKS)
def test_a_cache_that_is_not_full(mask, poisoned):
    used, new, capacity = [35, 3, 0], [2, 1, 6], 40
    tensors, mask = inputs(sum(new), len(new) * capacity), mask_of(mask, 3)
    arguments = {"mask": mask, "cu_seqlens_k": starts([capacity] * 3)}
    y = attention(*tensors, starts(new), **arguments, used_k=starts(used).diff(), backend="triton")
    q, k, v = (x.double() for x in tensors)
    truth = reference.attention(q, k, v, starts(new), **arguments, used_k=starts(used).diff())
    assert relative_error(y, truth) < 1e-6
    for grad, expected in zip(gradients(y, tensors), gradients(truth, tensors)):
        assert relative_error(grad, expected) < 1e-6


@needs_triton
def test_padding_leaks_nowhere():
    q, k, v = inputs(30)
    tensors = [x.detach().clone() for x in (q, k, v)]
    for x in tensors:
        x[23:] = torch.nan
    tensors = [x.requires_grad_() for x in tensors]
    for name in MASKS:
        mask = mask_of(name, 2)
        y = attention(*tensors, starts([20, 3]), mask=mask, backend="triton")
        truth = truth_of(q, k, v, [20, 3], mask)
        assert relative_error(y, truth) < 1e-6
        dy = torch.where(torch.arange(30, device=DEVICE)[:, None, None] < 23, torch.randn_like(y), torch.nan)
        for grad, expected in zip(
            torch.autograd.grad(y, tensors, dy), torch.autograd.grad(truth, [q, k, v], dy.double().nan_to_num())
        ):
            assert relative_error(grad[:23], expected[:23]) < 1e-6
            assert not grad[23:].any()


FORMS = {
    "views of one projection": lambda x: x.unbind(1),
    "heads before rows": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2).unbind(1),
    "columns apart": lambda x: x.repeat_interleave(2, 3)[..., ::2].unbind(1),
    "one row for all": lambda x: x[:1].expand_as(x).unbind(1),
}


@needs_triton
@pytest.mark.parametrize("form", FORMS)
def test_inputs_of_any_strides(form):
    qkv = torch.randn(25, 3, 2, 48, device=DEVICE, requires_grad=True)
    y = attention(*FORMS[form](qkv), starts([14, 11]), mask=Causal(), backend="triton")
    truth = truth_of(*FORMS[form](qkv), [14, 11], Causal())
    assert relative_error(y, truth) < 1e-6
    dy = torch.randn(1, 2, 48, device=DEVICE).expand_as(y)
    found, expected = torch.autograd.grad(y, qkv, dy)[0], torch.autograd.grad(truth, qkv, dy.double())[0]
    assert relative_error(found, expected) < 1e-6


@needs_triton
def test_views_of_one_projection_are_read_where_they_lie():
    q, k, v = torch.empty(8, 3, 2, 80, device="meta").unbind(1)
    cu = torch.empty(3, device="meta", dtype=torch.int32)
    with recording(DEVICES["h200"]) as launches:
        flash.forward(q, k, v, cu, cu, None, None, False)
    tensors = [launches[-1].arguments[f"{name}_ptr"] for name in "qkv"]
    assert all(read is tensor for read, tensor in zip(tensors, (q, k, v)))


@needs_triton
def test_large_scores_stay_finite():
    q, k, v = inputs(20)
    with torch.no_grad():
        q *= 1000
    y = attention(q, k, v, starts([20]), mask=Full(), backend="triton")
    assert relative_error(y, truth_of(q, k, v, [20], Full())) < 1e-4


@needs_triton
@pytest.mark.parametrize("mask", ["full", "prefix"])
def test_more_segments_than_the_map_compares_at_once(mask):
    lengths = [0] * 60 + [1, 0, 0, 17, 0, 2] + [0] * 70
    compare(*inputs(sum(lengths) + 2, heads=(1, 1)), lengths, mask)


@needs_triton
def test_the_same_bits_twice():
    q, k, v = inputs(sum(RAGGED), dtype=torch.bfloat16)

    def run():
        y = attention(q, k, v, starts(RAGGED), mask=mask_of("prefix", 4), backend="triton")
        return [y, *gradients(y, [q, k, v])]

    first = run()
    assert all(torch.equal(a, b) for _ in range(1 if INTERPRETED else 39) for a, b in zip(first, run()))


@needs_triton
@pytest.mark.parametrize("prefix", [None, [2, 9]])
def test_op_contracts(prefix):
    q, k, v = inputs(9)
    cu, prefix = starts([5, 3]), None if prefix is None else torch.tensor(prefix, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.mm1.flash.default, (q, k, v, cu, cu, None, prefix, True))
    y, lse = (x.detach() for x in torch.ops.mm1.flash(q, k, v, cu, cu, None, prefix, True))
    q, k, v = (x.detach() for x in (q, k, v))
    torch.library.opcheck(torch.ops.mm1.flash_backward.default, (y, q, k, v, y, lse, cu, cu, None, prefix, True))


@needs_triton
@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_compiles_whole(mask):
    tensors, cu, mask = inputs(20), starts([11, 6]), mask_of(mask, 2)
    run = torch.compile(lambda q, k, v: attention(q, k, v, cu, mask=mask, backend="triton").square(), fullgraph=True)
    y, truth = run(*tensors), truth_of(*tensors, [11, 6], mask).square()
    assert relative_error(y, truth) < 1e-6
    for grad, expected in zip(gradients(y, tensors), gradients(truth, tensors)):
        assert relative_error(grad, expected) < 1e-6


@needs_triton
@pytest.mark.slow
def test_rows_past_two_to_the_31_elements():
    far = torch.empty(34 << 26, dtype=torch.float16, device=DEVICE).view(34, 1 << 26)
    qkv = far[:, -96:].unflatten(1, (3, 2, 16))
    qkv[:] = torch.randn(qkv.shape, device=DEVICE)
    q, k, v = qkv.unbind(1)
    y = attention(q, k, v, starts([34]), mask=Full(), backend="triton")
    assert relative_error(y, truth_of(q, k, v, [34], Full())) < 1e-3


@needs_gpu
def test_never_waits_for_the_device():
    q, k, v = inputs(sum(RAGGED))
    cu, dy = starts(RAGGED), torch.randn_like(q)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(attention(q, k, v, cu, mask=Causal(), backend="triton"), [q, k, v], dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_refuses_bad_arguments():
    if not INTERPRETED and DEVICE == "cpu":
        with pytest.raises(ValueError, match="flash: device is cpu, expected a GPU, or TRITON_INTERPRET=1"):
            attention(*inputs(6), starts([6]), mask=Causal(), backend="triton")
        return
    with pytest.raises(ValueError, match="flash: head width is 24, expected a multiple of 16 up to 128"):
        attention(*inputs(6, width=24), starts([6]), mask=Causal(), backend="triton")
    with pytest.raises(ValueError, match="flash: dtypes"):
        attention(*inputs(6, dtype=torch.float64), starts([6]), mask=Causal(), backend="triton")


@pytest.mark.parametrize("width", range(16, 129, 16))
def test_pieces_are_the_width_and_nothing_more(width):
    parts = pieces(width)
    assert sum(columns for _, columns in parts) == width
    assert [first for first, _ in parts] == [sum(c for _, c in parts[:i]) for i in range(len(parts))]
    assert all(columns & (columns - 1) == 0 and columns >= 16 for _, columns in parts)


# The compiled code of the kernels.

SHAPES = {
    "ViT-H": (64 * 729, 16, 16, 80, "full"), "ViT-L": (64 * 576, 16, 16, 64, "full"),
    "decoder": (8192, 32, 8, 128, "causal"), "AIM": (64 * 256, 16, 16, 128, "prefix"),
}  # fmt: skip


def launches(shape, device, dtype=torch.bfloat16):
    """Return the launches of forward and backward, without those of the maps."""
    T, H, G, width, mask = shape

    def empty(*size, dtype=dtype):
        return torch.empty(*size, dtype=dtype, device="meta")

    q, k, v = empty(T, 3, H, width).unbind(1) if H == G else (empty(T, heads, width) for heads in (H, G, G))
    y, lse, cu = empty(T, H, width), empty(H, T, dtype=torch.float32), empty(65, dtype=torch.int32)
    prefix = empty(64, dtype=torch.int32) if mask == "prefix" else None
    with recording(DEVICES[device]) as recorded:
        flash.forward(q, k, v, cu, cu, None, prefix, mask != "full")
        flash.backward(y, q, k, v, y, lse, cu, cu, None, prefix, mask != "full")
    assert len({str(specialize(launch)) for launch in recorded if launch.kernel is map_kernel}) >= 2
    return [launch for launch in recorded if launch.kernel is not map_kernel]


def check(shape, device, dtype=torch.bfloat16, spills=0):
    for launch in launches(shape, device, dtype):
        code = compile_launch(launch, DEVICES[device])
        assert code.shared <= DEVICES[device].shared, code
        assert code.spills <= spills, code
        if dtype == torch.float32:
            assert code.matrix == 0 or device == "mi300x", "TF32 where fp32 is meant"
            continue
        assert code.matrix, code
        if device == "h200":
            assert code.matrix == code.instructions["HGMMA"], "mma.sync where wgmma is meant"
        if device != "mi300x":
            assert code.instructions["LDGSTS"], "no loads in flight"


@compiles
@pytest.mark.parametrize("shape", SHAPES)
def test_h200_code_has_wgmma_and_no_spills(shape):
    check(SHAPES[shape], "h200")


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", flash.WIDTHS)
def test_every_width_has_code_that_fits_every_gpu(width, device):
    # Where 128 registers let two programs run at once, ptxas puts one value away outside the loops (A100, 48).
    check((64 * 729, 16, 16, width, "full"), device, spills=2)
    check((8192, 32, 8, width, "causal"), device, spills=2)
    check((64 * 256, 16, 16, width, "prefix"), device, spills=2)
    if width in (80, 128):  # products of single multiplications
        for mask in ("full", "prefix"):
            check((8192, 16, 16, width, mask), device, torch.float32, spills=8)


@compiles
@pytest.mark.parametrize("prefixes", [False, True])
def test_the_map_is_compiled_for_any_number_of_segments_and_rows_at_once(prefixes):
    """These numbers and prefixes are no constants of the code."""
    forms = set()
    for B, rows in ((1, 64), (16, 1), (20, 48), (700, 1024)):
        q = torch.empty(rows, 2, 16, device="meta")
        cu = torch.empty(B + 1, device="meta", dtype=torch.int32)
        with recording(DEVICES["h200"]) as recorded:
            flash.forward(q, q, q, cu, cu, None, cu[1:] if prefixes else None, prefixes)
        signature, constants, _ = specialize(recorded[0])
        forms.add(str((signature, constants)))
    assert len(forms) == 1


def test_a_small_gpu_gets_fewer_stages():
    small = dispatch.Device("small", "sm_90", 1, 80 << 10)
    shape = FlashShape(4096, 16, 16, 128, False)
    assert default("flash", shape, torch.bfloat16, small).stages < Config().stages


@needs_triton
def test_offsets_past_the_rows_read_nothing_beyond_them(poisoned):
    """On a GPU they cannot be refused without a synchronization, so segments are cut at the last row."""
    q, k, v = inputs(20, 12)
    past, own = [starts(lengths) for lengths in ([8, 30, 5], [8, 12, 0])]
    past[0] = -3
    keys_past, keys = [starts(lengths) for lengths in ([6, 9, 40], [6, 6, 0])]
    for prefix, causal in ((None, False), (None, True), (torch.tensor([3, 90, 2], dtype=torch.int32), True)):
        prefix = None if prefix is None else prefix.to(DEVICE)
        y = flash.flash(q, k, v, past, keys_past, None, prefix, causal)
        truth = flash.flash(q, k, v, own, keys, None, prefix, causal)
        assert torch.equal(y, truth)
        for grad, expected in zip(gradients(y, [q, k, v]), gradients(truth, [q, k, v])):
            assert torch.equal(grad, expected)
