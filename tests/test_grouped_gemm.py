"""Test grouped_gemm on a CPU, interpreted (TRITON_INTERPRET=1), or on a GPU (CUDA_VISIBLE_DEVICES=0)."""

from itertools import pairwise

import pytest
import torch
from conftest import DEVICE, INTERPRETED, needs_gpu, needs_triton, not_interpreted, relative_error, tiles

from mm1.kernels.moe.grouped import grouped_gemm, grouped_gemm_dw

pytestmark = pytest.mark.usefixtures("small_tiles")

# Sums are computed in fp32, so errors are those of the last rounding: rms 1.65e-3 for bf16, an eighth of it for fp16.
# The interpreter truncates bf16, which doubles the error.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3 if INTERPRETED else 2e-3, torch.float16: 3e-4}
LAYOUTS = {"kn": lambda b: b, "nk": lambda b: b.transpose(1, 2).contiguous().transpose(1, 2)}


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def ends(sizes):
    return torch.tensor(sizes, device=DEVICE).cumsum(0).int()


def in_fp64(a, b, offsets, bias=None):
    """Multiply expert by expert, without the reference, which is also the op of a CPU."""
    bounds = list(pairwise([0, *offsets.tolist()]))
    rows = [a[start:end].double() @ b[e].double() for e, (start, end) in enumerate(bounds)]
    if bias is not None:
        rows = [y + bias[e].double() for e, y in enumerate(rows)]
    return torch.cat([*rows, a.new_zeros(len(a) - bounds[-1][1], b.shape[2], dtype=torch.float64)])


def dw_in_fp64(a, dy, offsets):
    bounds = pairwise([0, *offsets.tolist()])
    return torch.stack([a[start:end].double().t() @ dy[start:end].double() for start, end in bounds])


def compare(a, b, offsets, bias=None, *, tolerance, dy=None):
    """Compare y and every gradient with products of each expert in fp64."""
    inputs = [t.detach().requires_grad_() for t in (a, b, bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, truth = grouped_gemm(*inputs[:2], offsets, *inputs[2:]), in_fp64(*exact[:2], offsets, *exact[2:])
    assert relative_error(y, truth) < tolerance
    dy = torch.randn_like(y) if dy is None else dy
    actual, expected = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(truth, exact, dy.double())
    for name, g, t in zip("ab+", actual, expected):
        assert relative_error(g, t) < tolerance, name


SHAPES = [([17, 0, 3], 24, 20), ([7, 1], 7, 33)]
if not INTERPRETED:
    SHAPES += [([100, 577, 0, 7, 1], 600, 727), ([5] * 30, 100, 60), ([300], 64, 128)]


@pytest.mark.parametrize("sizes, K, N", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_expert_multiplies_its_own_rows(sizes, K, N, dtype, layout):
    a, b = randn(sum(sizes), K, dtype=dtype), LAYOUTS[layout](randn(len(sizes), K, N, dtype=dtype))
    compare(a, b, ends(sizes), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bias_is_added_to_the_rows_of_its_expert(dtype):
    a, b, bias = randn(24, 24, dtype=dtype), randn(3, 24, 20, dtype=dtype), randn(3, 20, dtype=dtype)
    compare(a, b, ends([17, 0, 3]), bias, tolerance=1.5 * TOLERANCE[dtype])  # on CPU product and sum are both rounded


ZEROS = [[219, 0, 5, 81, 1, 1, 117, 0], [0, 0, 30], [30, 0, 0], [0, 30, 0], [0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("sizes", [[s // 12 for s in ZEROS[0]], *ZEROS[2:5]] if INTERPRETED else ZEROS, ids=str)
def test_experts_without_rows_have_zero_gradients_whatever_was_in_memory(sizes, poisoned):
    a, b, bias = randn(sum(sizes), 20), randn(len(sizes), 20, 24), randn(len(sizes), 24)
    compare(a, b, ends(sizes), bias, tolerance=1e-6)
    dw = grouped_gemm_dw(a, randn(sum(sizes), 24), ends(sizes))
    assert not dw[torch.tensor(sizes) == 0].any()


@pytest.mark.parametrize("behind", [1, 40])
def test_rows_behind_the_last_expert_are_zeros_and_leak_nowhere(behind, poisoned):
    a, dy = randn(20 + behind, 24), randn(20 + behind, 20)
    a[20:], dy[20:] = torch.nan, torch.inf
    b, bias = randn(3, 24, 20).requires_grad_(), randn(3, 20).requires_grad_()
    a.requires_grad_()
    y = grouped_gemm(a, b, ends([3, 0, 17]), bias)
    assert relative_error(y[:20], in_fp64(a[:20], b, ends([3, 0, 17]), bias)) < 1e-6
    assert not y[20:].any()
    da, db, dbias = torch.autograd.grad(y, [a, b, bias], dy)
    assert not da[20:].any()
    assert relative_error(db, dw_in_fp64(a[:20], dy[:20], ends([3, 0, 17]))) < 1e-6
    assert dbias.isfinite().all()
    into = torch.zeros(3, 24, 20, device=DEVICE)
    assert torch.equal(grouped_gemm_dw(a, dy, ends([3, 0, 17]), into=into)[1], into[1])
    assert relative_error(into, db) < 1e-6


A = {
    "columns of a wider one": lambda a: torch.cat([a, a], 1)[:, : a.shape[1]],
    "every second row": lambda a: a.repeat_interleave(2, 0)[::2],
    "transposed": lambda a: a.T.contiguous().T,
    "one row for all": lambda a: a[:1].expand(len(a), -1),
    "one column for all": lambda a: a[:, :1].expand(-1, a.shape[1]),
    "off by one element": lambda a: torch.cat([a.new_zeros(1), a.flatten()])[1:].view(a.shape),
}


@pytest.mark.parametrize("form", A)
def test_a_and_its_gradient_may_have_any_strides(form):
    a, b, dy, offsets = randn(30, 24), randn(3, 24, 20), randn(30, 20), ends([4, 0, 23])
    compare(A[form](a), b, offsets, tolerance=1e-6, dy=A[form](dy))


def test_weight_bias_and_offsets_may_have_any_strides():
    a, offsets = randn(30, 24), ends([4, 0, 23])
    for b in (randn(1, 24, 20).expand(3, -1, -1), randn(3, 24, 1).expand(-1, -1, 20), randn(24, 3, 20).transpose(0, 1),
              randn(3, 48, 60)[:, ::2, ::3]):  # fmt: skip
        assert relative_error(grouped_gemm(a, b, offsets), in_fp64(a, b, offsets)) < 1e-6
    b = randn(3, 24, 20)
    for bias in (randn(20, 3).T, randn(1, 20).expand(3, -1), randn(3, 1).expand(-1, 20), randn(3, 40)[:, ::2]):
        assert relative_error(grouped_gemm(a, b, offsets, bias), in_fp64(a, b, offsets, bias)) < 1e-6
    apart = torch.stack([offsets, offsets - offsets], 1)[:, 0]
    assert torch.equal(grouped_gemm(a, b, apart), grouped_gemm(a, b, offsets))
    assert torch.equal(grouped_gemm_dw(a, a, apart), grouped_gemm_dw(a, a, offsets))


@pytest.mark.parametrize("M, K, N", [(0, 8, 12), (21, 1, 12), (21, 8, 1), (1, 1, 1), (21, 0, 12), (0, 0, 3)])
def test_sizes_of_one_and_of_none(M, K, N, poisoned):
    a, dy, offsets, into = randn(M, K), randn(M, N), ends([M // 3, 0, M // 2]), randn(3, K, N)
    truth = into.double() + dw_in_fp64(a, dy, offsets)
    assert relative_error(grouped_gemm_dw(a, dy, offsets, into=into), truth) < 1e-6
    compare(a, randn(3, K, N), offsets, randn(3, N), tolerance=1e-6)
    compare(randn(M, K), randn(3, K, N), ends([M, 0, 0]), tolerance=1e-6)


@pytest.mark.parametrize("wanted", ["a", "b", "bias"])
def test_one_gradient_alone_is_the_same(wanted):
    inputs = {"a": randn(30, 24), "b": randn(3, 24, 20), "bias": randn(3, 20)}
    names, offsets, dy = list(inputs), ends([4, 0, 23]), randn(30, 20)
    every = [t.clone().requires_grad_() for t in inputs.values()]
    y = grouped_gemm(*every[:2], offsets, every[2])
    expected = torch.autograd.grad(y, every, dy)[names.index(wanted)]
    inputs[wanted].requires_grad_()
    y = grouped_gemm(inputs["a"], inputs["b"], offsets, inputs["bias"])
    assert torch.equal(torch.autograd.grad(y, inputs[wanted], dy)[0], expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_weight_gradients_accumulate_in_fp32(dtype):
    offsets = ends([17, 0, 4])
    steps = [(randn(23, 24, dtype=dtype), randn(23, 20, dtype=dtype)) for _ in range(2)]
    begin = randn(3, 24, 20)
    for into in (begin.clone(), LAYOUTS["nk"](begin)):
        for a, dy in steps:
            assert grouped_gemm_dw(a, dy, offsets, into=into) is into
        truth = begin.double() + sum(dw_in_fp64(a, dy, offsets) for a, dy in steps)
        assert relative_error(into, truth) < 1e-6
        assert torch.equal(into[1], begin[1])


def test_gradients_of_gradients():
    offsets = ends([17, 0, 4])
    inputs = [randn(23, 24).requires_grad_(), randn(3, 24, 20).requires_grad_(), randn(23, 20).requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    actual = []
    for (a, b, dy), product in ((inputs, grouped_gemm), (exact, in_fp64)):
        da, db = torch.autograd.grad(product(a, b, offsets), [a, b], dy, create_graph=True)
        actual.append(torch.autograd.grad(da.sin().sum() + db.cos().sum(), [a, b, dy]))
    for g, t in zip(*actual):
        assert relative_error(g, t) < 1e-5


@not_interpreted
def test_op_contracts():
    a, b, dy = randn(20, 8).requires_grad_(), randn(3, 8, 4).requires_grad_(), randn(20, 4).requires_grad_()
    offsets, bias = ends([4, 0, 13]), randn(3, 4).requires_grad_()
    torch.library.opcheck(torch.ops.mm1.grouped_gemm.default, (a, b, offsets, None))
    torch.library.opcheck(torch.ops.mm1.grouped_gemm.default, (a, LAYOUTS["nk"](b), offsets, bias))
    torch.library.opcheck(torch.ops.mm1.grouped_gemm_dw.default, (a, dy, offsets, False))
    torch.library.opcheck(torch.ops.mm1.grouped_gemm_dw.default, (a.detach(), dy.detach(), offsets, True))
    torch.library.opcheck(torch.ops.mm1.grouped_gemm_dw_.default, (a.detach(), dy.detach(), offsets, randn(3, 8, 4)))


@not_interpreted
def test_compiles_whole():
    a, b, bias = (t.requires_grad_() for t in (randn(20, 8), randn(3, 8, 4), randn(3, 4)))
    offsets, into = ends([4, 0, 13]), torch.zeros(3, 8, 4, device=DEVICE)

    def step(a, b, bias, into):
        y = grouped_gemm(a, b, offsets, bias)
        grouped_gemm_dw(a.detach(), y.detach(), offsets, into=into)
        return y.square()

    compiled = torch.compile(step, fullgraph=True)
    y, truth = compiled(a, b, bias, into), in_fp64(a, b, offsets, bias).square()
    assert relative_error(y, truth) < 1e-6
    assert relative_error(into, dw_in_fp64(a, in_fp64(a, b, offsets, bias), offsets)) < 1e-6
    inputs = [a, b, bias]
    for g, t in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(truth.sum(), inputs)):
        assert relative_error(g, t) < 1e-6


@needs_triton
@pytest.mark.parametrize("dtype, tma", [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_the_walk_over_tiles_changes_no_bit(dtype, tma):
    a, dy, bias = randn(24, 40, dtype=dtype), randn(24, 24, dtype=dtype), randn(3, 24, dtype=dtype)
    b, offsets, results = randn(3, 40, 24, dtype=dtype), ends([17, 0, 5]), []
    for changes in ({}, {"persistent": True, "tma": tma}):
        with tiles(**changes):
            results.append([
                grouped_gemm(a, b, offsets), grouped_gemm(a, LAYOUTS["nk"](b), offsets, bias),
                grouped_gemm_dw(a, dy, offsets), grouped_gemm_dw(dy, a, offsets, into=torch.ones(3, 24, 40).to(DEVICE)),
            ])  # fmt: skip
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(other, results[0]))
    for y, truth in zip(results[0], (in_fp64(a, b, offsets), in_fp64(a, b, offsets, bias), dw_in_fp64(a, dy, offsets))):
        assert relative_error(y, truth) < TOLERANCE[dtype]


@needs_triton
def test_a_wide_tile_is_added_in_parts():
    a, dy, offsets, begin = randn(40, 20), randn(40, 200), ends([17, 0, 21]), randn(3, 20, 200)
    into = []
    for columns in (16, 256):
        with tiles(block_n=columns):
            into.append(grouped_gemm_dw(a, dy, offsets, into=begin.clone()))
    assert torch.equal(*into)
    assert relative_error(into[1], begin.double() + dw_in_fp64(a, dy, offsets)) < 1e-6


@not_interpreted
def test_forty_runs_give_the_same_bits():
    a, b, offsets = randn(24, 24).bfloat16(), randn(3, 24, 20).bfloat16(), ends([17, 0, 3])
    dy, bias = randn(24, 20).bfloat16(), randn(3, 20).bfloat16()
    inputs = [t.requires_grad_() for t in (a, b, bias)]

    def run():
        y = grouped_gemm(a, b, offsets, bias)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    first = run()
    assert all(torch.equal(x, y) for _ in range(39) for x, y in zip(first, run()))


def test_the_error_measure_sees_a_wrong_expert():
    a, b, offsets = randn(40, 24), randn(4, 24, 20), ends([17, 0, 3, 20])
    b_wrong = b * torch.tensor([1, 1, 1.02, 1], device=DEVICE)[:, None, None]  # 3 of 40 rows, by 2 %
    assert relative_error(grouped_gemm(a, b_wrong, offsets), in_fp64(a, b, offsets)) > TOLERANCE[torch.bfloat16]
    shifted = offsets + torch.tensor([1, 1, 0, 0], dtype=torch.int32, device=DEVICE)
    assert relative_error(grouped_gemm(a, b, shifted), in_fp64(a, b, offsets)) > 0.1


def sparse(*shape, dtype=torch.bfloat16):
    """Allocate memory whose pages a CPU maps at their first write."""
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


@pytest.mark.slow
def test_weights_past_two_to_the_31_elements():
    E, K, N = 300, 2048, 4096
    b = sparse(E, K, N)
    for expert in (3, E - 1):
        b[expert] = randn(K, N, dtype=torch.bfloat16) / K**0.5
    offsets = ends([5 * (e == 3) + 7 * (e == E - 1) for e in range(E)])
    a, dy = randn(12, K, dtype=torch.bfloat16), randn(12, N, dtype=torch.bfloat16)
    two = (b[[3, E - 1]], ends([5, 7]))
    with tiles(block_m=16, block_n=256, block_k=128) if INTERPRETED else tiles(block_n=128, block_k=64):
        assert relative_error(grouped_gemm(a, b, offsets), in_fp64(a, *two)) < TOLERANCE[torch.bfloat16]
        da = grouped_gemm(dy, b.transpose(1, 2), offsets)
    assert relative_error(da, in_fp64(dy, two[0].transpose(1, 2), two[1])) < TOLERANCE[torch.bfloat16]


@pytest.mark.slow
def test_rows_and_gradients_past_two_to_the_31_elements():
    M, K, N = 40, 24, 20
    a = sparse(M << 26)[:].view(M, 1 << 26)[:, :K]  # rows far apart
    dy = sparse(M << 26).view(M, 1 << 26)[:, -N:]
    a[:], dy[:] = randn(M, K), randn(M, N)
    offsets = ends([17, 0, 23])
    into = sparse(3 << 30, dtype=torch.float32).view(3, 1 << 10, 1 << 20)[:, -K:, -N:]
    into[:] = 1
    assert relative_error(grouped_gemm_dw(a, dy, offsets, into=into), 1 + dw_in_fp64(a, dy, offsets)) < 1e-6
    b = randn(3, K, N).bfloat16()
    assert relative_error(grouped_gemm(a, b, offsets), in_fp64(a, b, offsets)) < TOLERANCE[torch.bfloat16]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="a million tiles")
def test_results_past_two_to_the_31_elements():
    a, b = randn(70_000, 8).bfloat16(), randn(2, 8, 32_768).bfloat16()
    y = grouped_gemm(a, b, ends([10, 69_980]))
    assert relative_error(y[-30:-10], a[-30:-10].double() @ b[1].double()) < TOLERANCE[torch.bfloat16]
    assert not y[-10:].any()


def test_a_bias_may_be_differentiated_twice():
    a, b, bias = (randn(*shape).requires_grad_() for shape in ((9, 5), (3, 5, 7), (3, 7)))
    weights = randn(3, 7)

    def twice(product):
        first = torch.autograd.grad(product().pow(3).sum(), bias, create_graph=True)[0]
        return torch.autograd.grad((first * weights).sum(), [a, b, bias])

    offsets = ends([4, 0, 3])
    for actual, expected in zip(
        twice(lambda: grouped_gemm(a, b, offsets, bias)),
        twice(lambda: torch.cat([a[:4] @ b[0] + bias[0], a[4:7] @ b[2] + bias[2]])),
    ):
        assert relative_error(actual, expected) < 1e-5


def test_refuses_bad_arguments():
    a, b, offsets = randn(4, 4), randn(3, 4, 6), ends([1, 1, 2])
    for match, arguments in {
        "grouped_gemm: a and b": (a[0], b, offsets),
        r"grouped_gemm: b is \(3, 5, 6\), expected \[E, 4, N\]": (a, randn(3, 5, 6), offsets),
        "grouped_gemm: dtype of b": (a, b.bfloat16(), offsets),
        r"grouped_gemm: offsets is torch.int32 \(1,\)": (a, b, offsets[:1]),
        "grouped_gemm: offsets is torch.int64": (a, b, offsets.long()),
        r"grouped_gemm: b is \(0, .*expected at least one expert": (a, b[:0], offsets[:0]),
        r"grouped_gemm: b is \(0, .*at least one expert": (a, b[:0], offsets[:1]),
        r"grouped_gemm: bias is torch.float32 \(3, 5\)": (a, b, offsets, randn(3, 5)),
        "grouped_gemm: bias is torch.bfloat16": (a, b, offsets, randn(3, 6).bfloat16()),
    }.items():
        with pytest.raises(ValueError, match=match):
            grouped_gemm(*arguments)
    for match, arguments, into in (
        ("grouped_gemm_dw: rows of dy is 3, expected 4", (a, a[:3], offsets), None),
        ("grouped_gemm_dw: dtype of dy", (a, a.half(), offsets), None),
        ("grouped_gemm_dw: offsets", (a, a, offsets.long()), None),
        ("grouped_gemm_dw: offsets", (a, a, offsets[0]), None),
        ("grouped_gemm_dw: into", (a, a, offsets), randn(3, 4, 5)),
        ("grouped_gemm_dw: into", (a, a, offsets), randn(3, 4, 4).bfloat16()),
    ):
        with pytest.raises(ValueError, match=match):
            grouped_gemm_dw(*arguments, into=into)


@needs_gpu
def test_never_waits_for_the_device():
    a, b, bias = (t.requires_grad_() for t in (randn(40, 24), randn(4, 24, 20), randn(4, 20)))
    offsets, dy = ends([17, 0, 3, 19]), randn(40, 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(grouped_gemm(a, b, offsets, bias), [a, b, bias], dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
