"""The Triton kernels of attention: interpreted (TRITON_INTERPRET=1), on a GPU (CUDA_VISIBLE_DEVICES=0), or compiled
for GPUs that are not here."""

import pytest
import torch
from conftest import DEVICE, INTERPRETED, compiles, gradients, needs_gpu, needs_triton, relative_error

from mm1.autotune.static import compile_launch, specialize
from mm1.kernels import dispatch
from mm1.kernels.attention import flash
from mm1.kernels.attention.tiles import Config, FlashShape, default
from mm1.kernels.attention.varlen import attention
from mm1.kernels.dispatch import DEVICES, recording
from mm1.kernels.tuning import pinned

# p and ds are rounded to the inputs' dtype before they are multiplied; the interpreter cuts bf16 off.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2 if INTERPRETED else 5e-3, torch.float16: 1e-3}
RAGGED = [18, 0, 1, 17]
KERNELS = ("flash", "flash_dq", "flash_dkv")


@pytest.fixture(autouse=True)
def _small_tiles():
    """Unequal sides, so that nothing passes by symmetry; a GPU runs its own defaults."""
    small = {"flash": Config(16, 16, 4, 1), "flash_dq": Config(16, 32, 4, 1), "flash_dkv": Config(32, 16, 4, 1)}
    with pinned(**(small if INTERPRETED else {})):
        yield


def starts(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def by_hand(q, k, v, lengths_q, lengths_k, causal):
    """Segment by segment in fp64; rows that see nothing, and rows past the last segment, are zeros."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out, begin_q, begin_k = [], 0, 0
    for n, m in zip(lengths_q, lengths_k):
        a, b, c = q[begin_q : begin_q + n], k[begin_k : begin_k + m], v[begin_k : begin_k + m]
        scores = torch.einsum("ihd,jhd->hij", a, b) / q.shape[2] ** 0.5
        if causal:
            hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0) if m else scores
        out.append(torch.einsum("hij,jhd->ihd", weights, c))
        begin_q, begin_k = begin_q + n, begin_k + m
    return torch.cat([*out, 0 * q[begin_q:]]) + 0 * (q.sum() + k.sum() + v.sum())


def inputs(rows, keys=None, heads=(2, 1), width=16, dtype=torch.float32):
    keys = rows if keys is None else keys
    sizes = (rows, heads[0], width), (keys, heads[1], width), (keys, heads[1], width)
    return [torch.randn(size, device=DEVICE).to(dtype).requires_grad_() for size in sizes]


def compare(q, k, v, lengths, causal, lengths_k=None):
    """y and every gradient against fp64."""
    given = [q, k, v]
    y = attention(q, k, v, starts(lengths), causal=causal, backend="triton",
                  cu_seqlens_k=None if lengths_k is None else starts(lengths_k))  # fmt: skip
    truth = by_hand(q, k, v, lengths, lengths if lengths_k is None else lengths_k, causal)
    assert y.dtype == q.dtype
    assert relative_error(y, truth) < TOLERANCE[q.dtype]
    for name, found, expected in zip("qkv", gradients(y, given), gradients(truth, given)):
        assert relative_error(found, expected) < TOLERANCE[q.dtype], name
    return y


@needs_triton
@pytest.mark.parametrize("width", [16, 48, 64, 80, 112, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_every_width_is_the_sum_of_its_pieces(width, causal):
    compare(*inputs(23, heads=(1, 1), width=width), [20, 3], causal)


@needs_triton
@pytest.mark.parametrize("lengths, padding", [(RAGGED, 0), (RAGGED, 7), ([], 5), ([0, 0], 0), ([1, 1], 20)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_each_segment_attends_to_itself_alone(lengths, padding, causal, poisoned):
    y = compare(*inputs(sum(lengths) + padding), lengths, causal)
    assert not y[sum(lengths) :].any()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(dtype, causal):
    compare(*inputs(sum(RAGGED), dtype=dtype, width=80, heads=(1, 1)), RAGGED, causal)


@needs_triton
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)], ids=str)
def test_heads_of_a_group_share_keys_and_values(heads):
    compare(*inputs(20, heads=heads), [17, 3], True)


@needs_triton
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths, lengths_k", [([3, 1, 18, 0], [9, 1, 35, 5]), ([5, 4], [0, 33]), ([35, 3], [18, 2])], ids=str
)
def test_keys_with_segments_of_their_own(lengths, lengths_k, causal, poisoned):
    """Causal is aligned to the end: with fewer keys than queries the first queries see none."""
    compare(*inputs(sum(lengths) + 2, sum(lengths_k) + 3), lengths, causal, lengths_k)


@needs_triton
def test_a_cache_that_is_not_full(poisoned):
    used, new, capacity = [35, 3, 0], [2, 1, 6], 40
    q, k, v = inputs(sum(new), len(new) * capacity)
    y = attention(q, k, v, starts(new), causal=True, cu_seqlens_k=starts([capacity] * 3), backend="triton",
                  used_k=torch.tensor(used, dtype=torch.int32, device=DEVICE))  # fmt: skip
    rows = torch.cat([torch.arange(n) + b * capacity for b, n in enumerate(used)]).to(DEVICE)
    truth = by_hand(q, k[rows], v[rows], new, used, True)
    assert relative_error(y, truth) < 1e-6
    for found, expected in zip(gradients(y, [q, k, v]), gradients(truth, [q, k, v])):
        assert relative_error(found, expected) < 1e-6


@needs_triton
def test_padding_leaks_nowhere():
    q, k, v = inputs(30)
    given = [x.detach().clone() for x in (q, k, v)]
    for x in given:
        x[23:] = torch.nan
    given = [x.requires_grad_() for x in given]
    y = attention(*given, starts([20, 3]), causal=False, backend="triton")
    truth = by_hand(q, k, v, [20, 3], [20, 3], False)
    assert relative_error(y, truth) < 1e-6
    dy = torch.where(torch.arange(30, device=DEVICE)[:, None, None] < 23, torch.randn_like(y), torch.nan)
    for found, expected in zip(
        torch.autograd.grad(y, given, dy), torch.autograd.grad(truth, [q, k, v], dy.nan_to_num())
    ):
        assert relative_error(found[:23], expected[:23]) < 1e-6
        assert not found[23:].any()


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
    y = attention(*FORMS[form](qkv), starts([14, 11]), causal=True, backend="triton")
    truth = by_hand(*FORMS[form](qkv), [14, 11], [14, 11], True)
    assert relative_error(y, truth) < 1e-6
    dy = torch.randn(1, 2, 48, device=DEVICE).expand_as(y)
    found, expected = torch.autograd.grad(y, qkv, dy)[0], torch.autograd.grad(truth, qkv, dy.double())[0]
    assert relative_error(found, expected) < 1e-6


@needs_triton
def test_views_of_one_projection_are_read_where_they_lie():
    q, k, v = torch.empty(8, 3, 2, 80, device="meta").unbind(1)
    cu = torch.empty(3, device="meta", dtype=torch.int32)
    with recording(DEVICES["h200"]) as launches:
        flash.forward(q, k, v, cu, cu, None, False)
    tensors = launches[-1].arguments[:3]
    assert all(found is given for found, given in zip(tensors, (q, k, v)))


@needs_triton
def test_large_scores_stay_finite():
    q, k, v = inputs(20)
    with torch.no_grad():
        q *= 1000
    y = attention(q, k, v, starts([20]), causal=False, backend="triton")
    assert relative_error(y, by_hand(q, k, v, [20], [20], False)) < 1e-4


@needs_triton
def test_more_segments_than_the_map_compares_at_once():
    lengths = [0] * 60 + [1, 0, 0, 17, 0, 2] + [0] * 70
    compare(*inputs(sum(lengths) + 2, heads=(1, 1)), lengths, False)


@needs_triton
def test_the_same_bits_twice():
    q, k, v = inputs(sum(RAGGED), dtype=torch.bfloat16)

    def run():
        y = attention(q, k, v, starts(RAGGED), causal=True, backend="triton")
        return [y, *gradients(y, [q, k, v])]

    first = run()
    assert all(torch.equal(a, b) for _ in range(1 if INTERPRETED else 39) for a, b in zip(first, run()))


@needs_triton
def test_op_contracts():
    q, k, v = inputs(9)
    cu = starts([5, 3])
    torch.library.opcheck(torch.ops.mm1.flash.default, (q, k, v, cu, cu, None, True))
    y, lse = (x.detach() for x in torch.ops.mm1.flash(q, k, v, cu, cu, None, True))
    q, k, v = (x.detach() for x in (q, k, v))
    torch.library.opcheck(torch.ops.mm1.flash_backward.default, (y, q, k, v, y, lse, cu, cu, None, True))


@needs_triton
def test_compiles_whole():
    q, k, v = inputs(20)
    cu = starts([11, 6])
    run = torch.compile(lambda q, k, v: attention(q, k, v, cu, causal=True, backend="triton").square(), fullgraph=True)
    y, truth = run(q, k, v), by_hand(q, k, v, [11, 6], [11, 6], True).square()
    assert relative_error(y, truth) < 1e-6
    for found, expected in zip(gradients(y, [q, k, v]), gradients(truth, [q, k, v])):
        assert relative_error(found, expected) < 1e-6


@needs_triton
@pytest.mark.slow
def test_rows_past_two_to_the_31_elements():
    far = torch.empty(34 << 26, dtype=torch.float16, device=DEVICE).view(34, 1 << 26)
    qkv = far[:, -96:].unflatten(1, (3, 2, 16))
    qkv[:] = torch.randn(qkv.shape, device=DEVICE)
    q, k, v = qkv.unbind(1)
    y = attention(q, k, v, starts([34]), causal=False, backend="triton")
    assert relative_error(y, by_hand(q, k, v, [34], [34], False)) < 1e-3


@needs_gpu
def test_never_waits_for_the_device():
    q, k, v = inputs(sum(RAGGED))
    cu, dy = starts(RAGGED), torch.randn_like(q)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(attention(q, k, v, cu, causal=True, backend="triton"), [q, k, v], dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_refuses_bad_arguments():
    if not INTERPRETED and DEVICE == "cpu":
        with pytest.raises(ValueError, match="flash: device is cpu, expected a GPU, or TRITON_INTERPRET=1"):
            attention(*inputs(6), starts([6]), causal=True, backend="triton")
        return
    with pytest.raises(ValueError, match="flash: head width is 24, expected a multiple of 16 up to 128"):
        attention(*inputs(6, width=24), starts([6]), causal=True, backend="triton")
    with pytest.raises(ValueError, match="flash: dtypes"):
        attention(*inputs(6, dtype=torch.float64), starts([6]), causal=True, backend="triton")


@pytest.mark.parametrize("width", range(16, 129, 16))
def test_pieces_are_the_width_and_nothing_more(width):
    found = flash.pieces(width)
    assert sum(columns for _, columns in found) == width
    assert [first for first, _ in found] == [sum(c for _, c in found[:i]) for i in range(len(found))]
    assert all(columns & (columns - 1) == 0 and columns >= 16 for _, columns in found)


# What the kernels compile to.

VIT_H, VIT_L, DECODER = (64 * 729, 16, 16, 80, False), (64 * 576, 16, 16, 64, False), (8192, 32, 8, 128, True)
SHAPES = {"ViT-H": VIT_H, "ViT-L": VIT_L, "decoder": DECODER}


def launches(shape, device, dtype=torch.bfloat16):
    """Forward's and backward's, without the maps."""
    T, H, G, width, causal = shape

    def empty(*size, dtype=dtype):
        return torch.empty(*size, dtype=dtype, device="meta")

    q, k, v = empty(T, 3, H, width).unbind(1) if H == G else (empty(T, heads, width) for heads in (H, G, G))
    y, lse, cu = empty(T, H, width), empty(H, T, dtype=torch.float32), empty(65, dtype=torch.int32)
    with recording(DEVICES[device]) as found:
        flash.forward(q, k, v, cu, cu, None, causal)
        flash.backward(y, q, k, v, y, lse, cu, cu, None, causal)
    assert len({str(specialize(launch)) for launch in found if launch.kernel is flash._map_kernel}) >= 2
    return [launch for launch in found if launch.kernel is not flash._map_kernel]


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
    check((64 * 729, 16, 16, width, False), device, spills=2)
    check((8192, 32, 8, width, True), device, spills=2)
    if width in (80, 128):  # products of single multiplications
        check((8192, 16, 16, width, False), device, torch.float32, spills=8)


@compiles
def test_the_map_is_compiled_for_any_number_of_segments_at_once():
    """Their number is no constant of the code."""
    q = torch.empty(64, 2, 16, device="meta")
    forms = set()
    for B in (18, 20, 700):
        cu = torch.empty(B + 1, device="meta", dtype=torch.int32)
        with recording(DEVICES["h200"]) as found:
            flash.forward(q, q, q, cu, cu, None, False)
        signature, constants, _ = specialize(found[0])
        forms.add(str((signature, constants)))
    assert len(forms) == 1


def test_a_small_gpu_gets_fewer_stages():
    small = dispatch.Device("small", "sm_90", 1, 80 << 10)
    shape = FlashShape(4096, 16, 16, 128, False)
    assert default("flash", shape, torch.bfloat16, small).stages < Config().stages


@needs_triton
def test_offsets_past_the_rows_read_nothing_beyond_them(poisoned):
    """On a GPU nobody can refuse them without waiting: the segments end where the rows do."""
    q, k, v = inputs(20, 12)
    past, own = [starts(lengths) for lengths in ([8, 30, 5], [8, 12, 0])]
    past[0] = -3
    keys_past, keys = [starts(lengths) for lengths in ([6, 9, 40], [6, 6, 0])]
    for causal in (False, True):
        y = flash.flash(q, k, v, past, keys_past, None, causal)
        truth = flash.flash(q, k, v, own, keys, None, causal)
        assert torch.equal(y, truth)
        for found, expected in zip(gradients(y, [q, k, v]), gradients(truth, [q, k, v])):
            assert torch.equal(found, expected)
