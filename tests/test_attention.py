import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import gradients, relative_error

from mm1.kernels.attention import varlen as module
from mm1.kernels.attention.varlen import attention, choose, segments
from mm1.kernels.tuning import pinned

LENGTHS = [[5, 7, 7, 1], [0, 3, 0], [12], [], [4, 4, 4]]


def cu_seqlens(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int32).cumsum(0).tolist()], dtype=torch.int32)


def by_hand(q, k, v, lengths, causal):
    """Each segment alone, in fp64, with torch's own attention."""
    out, start = 0 * (q.sum() + k.sum() + v.sum()) + torch.zeros_like(q, dtype=torch.float64), 0
    for n in lengths:
        rows = slice(start, start + n)
        a, b, c = (x[rows].double().transpose(0, 1)[None] for x in (q, k, v))
        if n:
            y = torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=causal, enable_gqa=True)
            out[rows] = y[0].transpose(0, 1)
        start += n
    return out


def inputs(rows, heads=4, groups=2, width=16):
    sizes = (heads, groups, groups)
    return [torch.randn(rows, h, width, requires_grad=True) for h in sizes]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["segments", "reference"])
@pytest.mark.parametrize("padding", [0, 3])
def test_each_segment_attends_to_itself_alone(lengths, causal, backend, padding):
    q, k, v = inputs(sum(lengths) + padding)
    y = attention(q, k, v, cu_seqlens(lengths), causal=causal, backend=backend)
    truth = by_hand(q, k, v, lengths, causal)
    assert relative_error(y, truth) < 1e-6
    for found, expected in zip(gradients(y, [q, k, v]), gradients(truth, [q, k, v])):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("width", [64, 80])
def test_head_widths_of_vit_l_and_vit_h(width):
    q, k, v = inputs(30, 2, 2, width)
    y = attention(q, k, v, cu_seqlens([20, 10]), causal=False)
    assert relative_error(y, by_hand(q, k, v, [20, 10], False)) < 1e-6


@pytest.mark.parametrize("backend", ["segments", "reference"])
def test_queries_are_the_last_of_their_keys_in_a_cache(backend):
    used, new, capacity = [5, 3, 6], [2, 1, 6], 8
    k, v = torch.randn(3 * capacity, 2, 16), torch.randn(3 * capacity, 2, 16)
    q = torch.randn(sum(new), 4, 16)
    y = attention(q, k, v, cu_seqlens(new), causal=True, cu_seqlens_k=cu_seqlens([capacity] * 3),
                  used_k=torch.tensor(used, dtype=torch.int32), backend=backend)  # fmt: skip
    start = 0
    for b, (u, n) in enumerate(zip(used, new)):
        rows = slice(b * capacity, b * capacity + u)
        full = torch.randn(u, 4, 16)
        full[u - n :] = q[start : start + n]
        truth = by_hand(full, k[rows], v[rows], [u], True)[u - n :]
        assert relative_error(y[start : start + n], truth) < 1e-6
        start += n


@pytest.mark.parametrize("lengths, padding", [([5, 7, 0, 1], 3), ([4, 4], 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_with_a_mask_of_segments(lengths, padding, causal):
    q, k, v = (x.detach() for x in inputs(sum(lengths) + padding))  # on CPU it has no gradients
    y = attention(q, k, v, cu_seqlens(lengths), causal=causal, backend="flex")
    assert relative_error(y, by_hand(q, k, v, lengths, causal)) < 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_segments_of_one_length_are_a_dense_batch(causal):
    q, k, v = inputs(15)
    y = attention(q, k, v, cu_seqlens([5] * 3), causal=causal, max_length=5, backend="sdpa")
    truth = by_hand(q, k, v, [5] * 3, causal)
    assert relative_error(y, truth) < 1e-6
    for found, expected in zip(gradients(y, [q, k, v]), gradients(truth, [q, k, v])):
        assert relative_error(found, expected) < 1e-5
    for length in (None, 4):
        with pytest.raises(ValueError, match=f'max_length for backend "sdpa" is {length}, expected the length of each'):
            attention(q, k, v, cu_seqlens([5] * 3), causal=causal, max_length=length, backend="sdpa")


@pytest.mark.parametrize("backend, package", [("flash", "flash_attn"), ("xformers", "xformers")])
def test_a_package_that_is_not_there_is_named(backend, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    q, k, v = inputs(6)
    with pytest.raises(ImportError, match=r'needs pip install "mm1-engine\[gpu\]"'):
        attention(q, k, v, cu_seqlens([6]), causal=True, backend=backend)


def row(backend, forward, backward, width=80, causal=False, dtype="bfloat16"):
    return {"head_width": width, "causal": causal, "dtype": dtype, "backend": backend, "forward": forward,
            "backward": backward}  # fmt: skip


ROWS = [row("varlen", 0.5, 0.3), row("triton", 0.4, 0.5), row("flash", 0.7, 0.2), row("sdpa", 0.9, 0.9),
        row("flex", 0.6, 0.6, causal=True)]  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(module, "table", lambda gpu: ROWS if gpu == "h200" else [])
    monkeypatch.setattr(module, "_installed", lambda backend: backend != "flash")
    return monkeypatch


def test_the_fastest_measured_back_end_that_is_installed(measured):
    def best(backward=False, used=False, width=80, causal=False, dtype="bfloat16", gpu="h200"):
        return choose(gpu, width, causal, dtype, backward, used)

    assert best() == "varlen"
    assert best(backward=True) == "triton"
    assert best(causal=True) == "flex"
    measured.setattr(module, "_installed", lambda backend: True)
    assert best() == "flash"
    assert best(used=True) == "varlen"
    assert best(backward=True) == "triton"


def test_without_a_measurement_there_is_a_default(measured):
    for width, dtype, expected in (
        (64, "bfloat16", "varlen"), (80, "float16", "varlen"), (80, "float32", "triton"), (24, "float32", "reference"),
        (160, "float32", "reference"), (64, "float64", "reference"),
    ):  # fmt: skip
        assert choose("h200", width, False, dtype, True, False) == expected
        assert choose("b200", width, False, dtype, True, False) == expected


def test_the_table_is_a_file_of_the_package(monkeypatch, tmp_path):
    folder = tmp_path / "autotune" / "tables" / "attention"
    folder.mkdir(parents=True)
    (folder / "some-gpu.json").write_text(json.dumps(ROWS))
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    assert module.table("some-gpu") == ROWS
    assert module.table("another-gpu") == []


def test_every_table_has_rows_that_can_be_looked_up():
    for path in (Path(module.__file__).parents[1] / "autotune" / "tables" / "attention").glob("*.json"):
        for found in json.loads(path.read_text()):
            assert found.keys() == ROWS[0].keys()
            assert found["backend"] in module.BACKENDS


def test_the_choice_is_a_constant_of_compiled_code(measured):
    def run(x):
        return 2 * x if choose("h200", 80, False, "bfloat16", x.requires_grad, False) == "triton" else 3 * x

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert compiled(torch.ones(())) == 3
    assert compiled(torch.ones((), requires_grad=True)) == 2


def test_tables_are_read_while_code_is_compiled():
    def run(x):
        return 2 * x if choose("h200", 80, False, "bfloat16", False, False) in module.BACKENDS else 3 * x

    assert torch.compile(run, fullgraph=True, backend="eager")(torch.ones(())) == 2


def test_a_pinned_back_end_is_taken():
    q, k, v = inputs(6)
    with pinned(attention="sdpa"):
        y = attention(q, k, v, cu_seqlens([3, 3]), causal=True, max_length=3)
    assert y.grad_fn.name() != attention(q, k, v, cu_seqlens([3, 3]), causal=True).grad_fn.name()


def test_non_contiguous_inputs():
    qkv = torch.randn(12, 3, 4, 16)
    q, k, v = qkv.unbind(1)
    y = attention(q, k, v, cu_seqlens([5, 7]), causal=True)
    assert torch.equal(y, attention(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens([5, 7]), causal=True))


def test_op_contract():
    q, k, v = inputs(12)
    cu = cu_seqlens([5, 7])
    torch.library.opcheck(segments, (q, k, v, cu, cu, None, True))


def test_compiles_whole():
    q, k, v = inputs(12)
    cu = cu_seqlens([5, 7])
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, cu, causal=True), fullgraph=True)
    y, truth = compiled(q, k, v), attention(q, k, v, cu, causal=True)
    assert torch.equal(y, truth)
    for found, expected in zip(gradients(y, [q, k, v]), gradients(truth, [q, k, v])):
        assert relative_error(found, expected) < 1e-6


def masked(q, k, v, lengths_q, lengths_k, used=None):
    """Causal, aligned to the end, segment by segment in fp64; rows that see nothing are zeros."""
    out, begin_q, begin_k = [], 0, 0
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for b, (n, room) in enumerate(zip(lengths_q, lengths_k)):
        m = room if used is None else used[b]
        hidden = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
        a, c, d = q[begin_q : begin_q + n].double(), k[begin_k : begin_k + m], v[begin_k : begin_k + m]
        scores = torch.einsum("ihd,jhd->hij", a, c) / q.shape[2] ** 0.5
        weights = scores.masked_fill(hidden, -1e300).softmax(-1) * ~hidden if m else scores
        out.append(torch.einsum("hij,jhd->ihd", weights, d))
        begin_q, begin_k = begin_q + n, begin_k + room
    return torch.cat([*out, 0 * q[begin_q:]]) + 0 * (q.sum() + k.sum() + v.sum())


UNEQUAL = [
    ([6], [3]),
    ([6, 6, 6], [3, 3, 3]),
    ([5, 2, 4, 4, 1, 0], [2, 5, 4, 0, 1, 3]),
    ([1, 1], [0, 2]),
    ([7, 7], [1, 1]),
]


@pytest.mark.parametrize("lengths_q, lengths_k", UNEQUAL, ids=str)
@pytest.mark.parametrize("backend", ["segments", "reference", "flex"])
def test_queries_before_the_first_key_see_nothing(lengths_q, lengths_k, backend):
    q, k, v = torch.randn(sum(lengths_q) + 2, 4, 16), *torch.randn(2, sum(lengths_k), 2, 16)
    given = [x.requires_grad_(backend != "flex") for x in (q, k, v)]
    y = attention(*given, cu_seqlens(lengths_q), causal=True, cu_seqlens_k=cu_seqlens(lengths_k), backend=backend)
    truth = masked(*given, lengths_q, lengths_k)
    assert relative_error(y, truth) < 1e-6
    if backend != "flex":
        for found, expected in zip(gradients(y, given), gradients(truth, given)):
            assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("backend", ["segments", "reference"])
def test_a_cache_may_hold_fewer_keys_than_there_are_queries(backend):
    q, k, v = torch.randn(9, 4, 16), *torch.randn(2, 15, 2, 16)
    new, room, used = [4, 2, 3], [5, 5, 5], [2, 5, 0]
    y = attention(q, k, v, cu_seqlens(new), causal=True, cu_seqlens_k=cu_seqlens(room), used_k=torch.tensor(used),
                  backend=backend)  # fmt: skip
    assert relative_error(y, masked(q, k, v, new, room, used)) < 1e-6


@pytest.mark.parametrize("backend", ["segments", "reference"])
@pytest.mark.parametrize("lengths_q, lengths_k", [([4, 0, 3], [4, 0, 3]), ([4, 2], [2, 4])], ids=str)
def test_fp64_gradients_are_those_of_finite_differences(backend, lengths_q, lengths_k):
    q, k, v = torch.randn(8, 2, 4), *torch.randn(2, 7, 1, 4)
    given = [x.double().requires_grad_() for x in (q, k, v)]
    cu_q, cu_k = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
    for causal in (True, False):
        assert torch.autograd.gradcheck(
            lambda q, k, v, c=causal: attention(q, k, v, cu_q, causal=c, cu_seqlens_k=cu_k, backend=backend), given
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_dtypes_may_differ(dtype):
    q, k, v = inputs(12)
    half = v.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = attention(q, k, half, cu_seqlens([5, 7]), causal=True)
    assert y.dtype == dtype
    assert relative_error(y, by_hand(q, k, half, [5, 7], True)) < 1e-2
    found = gradients(y, [q, k, half])
    assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype]


def test_offsets_of_64_bits_are_taken():
    q, k, v = inputs(12)
    cu = cu_seqlens([5, 7])
    y = attention(q, k, v, cu.long(), causal=True, cu_seqlens_k=cu.long())
    assert torch.equal(y, attention(q, k, v, cu, causal=True))


def test_meta_tensors_have_shapes():
    q, k, v = (x.detach().to("meta") for x in inputs(12))
    y = attention(q, k, v, cu_seqlens([5, 7]).to("meta"), causal=True, backend="segments")
    assert y.shape == q.shape
    assert y.is_meta


class Attention(torch.nn.Module):
    def forward(self, q, k, v, cu):
        return attention(q, k, v, cu, causal=True)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_any_numbers_of_rows_and_segments(strict):
    rows, segments = torch.export.Dim("rows", min=0), torch.export.Dim("segments", min=1)
    q, k, v = (x.detach() for x in inputs(12))
    program = torch.export.export(
        Attention(), (q, k, v, cu_seqlens([5, 7])), strict=strict,
        dynamic_shapes=({0: rows}, {0: rows}, {0: rows}, {0: segments}),
    ).module()  # fmt: skip
    for lengths in ([5, 7], [1], [], [3, 0, 4, 9]):
        q, k, v = (x.detach() for x in inputs(sum(lengths)))
        cu = cu_seqlens(lengths)
        assert torch.equal(program(q, k, v, cu), attention(q, k, v, cu, causal=True))


def test_derivatives_that_are_not_computed_are_refused():
    q, k, v = inputs(6)
    cu = cu_seqlens([6])
    (dq,) = torch.autograd.grad(attention(q, k, v, cu, causal=True).sum(), [q], create_graph=True)
    with pytest.raises(RuntimeError, match="attention: gradients of gradients are not computed"):
        dq.square().sum().backward()
    q, k, v = (x.detach() for x in (q, k, v))
    with pytest.raises(RuntimeError, match="attention: v has a tangent"):
        torch.func.jvp(lambda v: attention(q, k, v, cu, causal=True), (v,), (v,))


@pytest.mark.parametrize("backend", ["segments", "reference", "flex"])
@pytest.mark.parametrize(
    "change, told",
    [
        ({"cu_seqlens": [0, 7]}, r"cu_seqlens is \[0, 7\], expected offsets that rise from 0 to at most the 6 rows"),
        ({"cu_seqlens": [0, 4, 3]}, r"cu_seqlens is \[0, 4, 3\]"),
        ({"cu_seqlens": [-1, 3]}, r"cu_seqlens is \[-1, 3\]"),
        ({"cu_seqlens_k": [0, 9]}, r"cu_seqlens_k is \[0, 9\]"),
        ({"used_k": [7]}, r"used_k is \[7\], expected at most the segments' numbers of keys, \[6\]"),
        ({"used_k": [-1]}, r"used_k is \[-1\]"),
    ],
)
def test_offsets_that_cannot_be_are_refused(backend, change, told):
    q, k, v = (x.detach() for x in inputs(6))
    given = {"cu_seqlens": [0, 6], **change}
    with pytest.raises(ValueError, match=f"attention: {told}"):
        attention(q, k, v, causal=True, backend=backend, **{name: torch.tensor(x) for name, x in given.items()})


@pytest.mark.parametrize(
    "change, told",
    [
        ({"k": torch.randn(6, 3, 16), "v": torch.randn(6, 3, 16)}, "heads of q is 4, expected a multiple of 3"),
        ({"k": torch.randn(6, 0, 16), "v": torch.randn(6, 0, 16)}, "heads of q is 4, expected a multiple of 0"),
        ({"k": torch.randn(5, 2, 16), "v": torch.randn(5, 2, 16)}, r"k is \(5, 2, 16\), expected \[6, G, Dh\]"),
        ({"v": torch.randn(6, 2, 16).bfloat16()}, "dtype of v is torch.bfloat16, expected torch.float32, that of q"),
        ({"q": torch.ones(6, 4, 16, dtype=torch.long)}, "dtype of q is torch.int64"),
        ({"v": torch.randn(6, 2, 16, device="meta")}, "device of v is meta, expected cpu, that of q"),
        ({"cu_seqlens": torch.tensor([0, 6], device="meta")}, "device of cu_seqlens is meta"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens is torch.float32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens is"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 6])}, r"cu_seqlens_k is \(3,\), expected \(2,\)"),
        ({"used_k": torch.tensor([3, 3])}, r"used_k is \(2,\), expected \(1,\)"),
        ({"backend": "fast"}, "backend is fast"),
    ],
)
def test_refuses_bad_arguments(change, told):
    q, k, v = inputs(6)
    given = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens([6]), "causal": True}
    with pytest.raises(ValueError, match=f"attention: {told}"):
        attention(**given | change)


def test_backends_of_gpus_say_so_on_a_cpu():
    q, k, v = inputs(6)
    with pytest.raises(ValueError, match='device for backend "varlen" is cpu, expected a GPU'):
        attention(q, k, v, cu_seqlens([6]), causal=True, backend="varlen")
    with pytest.raises(ValueError, match='device for gradients of backend "flex" is cpu, expected a GPU'):
        attention(q, k, v, cu_seqlens([6]), causal=True, backend="flex")
    with pytest.raises(ValueError, match=r'begins in cu_seqlens for backend "sdpa" is \[0, 2\], expected one each 3'):
        attention(q, k, v, cu_seqlens([2, 4]), causal=True, backend="sdpa", max_length=3)
