"""Compare packed attention by every backend of a CPU with the mask's definition, pair by pair."""

import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import gradients, relative_error

from mm1.kernels.attention import Causal, Full, Prefix, attention, backends, varlen
from mm1.kernels.attention.backends import (
    BACKENDS,
    Inputs,
    ZeroGradientPast,
    fastest,
    prefix_in_two_calls,
    read_table,
    zero_past,
)
from mm1.kernels.attention.cpu import segments
from mm1.kernels.tuning import pinned, tables

LENGTHS = [[5, 7, 7, 1], [0, 3, 0], [12], [], [4, 4, 4]]
MASKS = ["full", "causal", "prefix"]
PREFIXES = [3, 0, 9, 1, 2, 5]  # of the segments in order: shorter than most, none, longer than all


def cu_seqlens(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int32).cumsum(0).tolist()], dtype=torch.int32)


def mask_of(name, segments):
    return {"full": Full(), "causal": Causal(), "prefix": Prefix(torch.tensor(PREFIXES[:segments], dtype=torch.long))}[
        name
    ]


def visible(n, m, mask, segment):
    """Return bool [n, m]: whether n queries see m keys of a segment; the last query has the place of the last key."""
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)
    if mask == Full():
        return torch.ones(n, m, dtype=torch.bool)
    return (j <= i) | (j < mask.lengths[segment]) if isinstance(mask, Prefix) else j <= i


def by_hand(q, k, v, lengths_q, mask, lengths_k=None, used=None):
    """Return attention of each segment alone, over all pairs in fp64; rows that see nothing and padding are zeros."""
    lengths_k = lengths_q if lengths_k is None else lengths_k
    out, begin_q, begin_k = [], 0, 0
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for b, (n, room) in enumerate(zip(lengths_q, lengths_k)):
        m = room if used is None else used[b]
        seen = visible(n, m, mask, b)
        x, y, z = q[begin_q : begin_q + n].double(), k[begin_k : begin_k + m], v[begin_k : begin_k + m]
        scores = torch.einsum("ihd,jhd->hij", x, y) / q.shape[2] ** 0.5
        weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen if m else scores
        out.append(torch.einsum("hij,jhd->ihd", weights, z))
        begin_q, begin_k = begin_q + n, begin_k + room
    return torch.cat([*out, 0 * q[begin_q:].double()]) + 0 * (q.sum() + k.sum() + v.sum())


def inputs(rows, heads=4, groups=2, width=16, keys=None, dtype=torch.float32):
    sizes = (rows, heads), *[(rows if keys is None else keys, groups)] * 2
    return [torch.randn(*size, width, dtype=dtype, requires_grad=True) for size in sizes]


def assert_same(y, truth, tensors, forward=1e-6, backward=1e-5):
    assert relative_error(y, truth) < forward
    for name, grad, expected in zip("qkv", gradients(y, tensors), gradients(truth, tensors)):
        assert relative_error(grad, expected) < backward, name


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["segments", "reference"])
@pytest.mark.parametrize("padding", [0, 3])
def test_each_segment_attends_to_itself_alone(lengths, mask, backend, padding):
    tensors, mask = inputs(sum(lengths) + padding), mask_of(mask, len(lengths))
    y = attention(*tensors, cu_seqlens(lengths), mask=mask, backend=backend)
    assert_same(y, by_hand(*tensors, lengths, mask), tensors)


SIZES = [1, 2, 3, 17, 64, 300]


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("backend", ["segments", "reference", "two calls"])
def test_a_prefix_is_exact_in_fp64(length, backend):
    """Test prefixes of 0 keys, 1, all but one, all, and more than all, in a single segment and among others."""
    for prefix in {0, 1, length - 1, length, length + 7}:
        for others in ([], [5, 0, 1, length]):
            lengths = [length, *others]
            mask = Prefix(torch.tensor([prefix, *[2, 1, 0, length // 2][: len(others)]]))
            tensors = inputs(sum(lengths) + 2, width=8, dtype=torch.float64)
            cu = cu_seqlens(lengths)
            if backend == "two calls":
                call = Inputs(*tensors, cu, cu, None, Prefix(mask.lengths.int()), None)
                y = prefix_in_two_calls(BACKENDS["segments"].run, call)
            else:
                y = attention(*tensors, cu, mask=mask, backend=backend)
            assert_same(y, by_hand(*tensors, lengths, mask), tensors, 1e-12, 1e-10)


def test_a_prefix_of_nothing_is_causal_and_of_everything_full_to_the_bit():
    lengths = [5, 17, 1]
    tensors, cu = inputs(23), cu_seqlens(lengths)
    for prefix, mask in ((torch.tensor([0, -3, 0]), Causal()), (torch.tensor([5, 2**40, 1]), Full())):
        y, same = (attention(*tensors, cu, mask=m) for m in (Prefix(prefix), mask))
        assert torch.equal(y, same)
        assert all(torch.equal(a, b) for a, b in zip(gradients(y, tensors), gradients(same, tensors)))


@pytest.mark.parametrize("mask", MASKS)
def test_a_segment_gets_the_same_bits_packed_and_alone(mask):
    """The same holds where neighbours of equal length and prefix are computed in one batch with it."""
    lengths = [33, 33, 7, 7, 1, 64]
    mask = Prefix(torch.tensor([9, 9, 7, 2, 1, 63])) if mask == "prefix" else mask_of(mask, 6)
    tensors = inputs(sum(lengths))
    packed = attention(*tensors, cu_seqlens(lengths), mask=mask)
    dy = torch.randn_like(packed)
    grads = torch.autograd.grad(packed, tensors, dy)
    for b, (first, last) in enumerate(pairwise(cu_seqlens(lengths).tolist())):
        own = [x[first:last].detach().requires_grad_() for x in tensors]
        alone = Prefix(mask.lengths[b : b + 1]) if isinstance(mask, Prefix) else mask
        y = attention(*own, cu_seqlens([last - first]), mask=alone)
        assert torch.equal(y, packed[first:last])
        for grad, expected in zip(torch.autograd.grad(y, own, dy[first:last]), grads):
            assert torch.equal(grad, expected[first:last])


def test_a_query_depends_on_no_key_it_does_not_see():
    q, k, v = (x.detach() for x in inputs(12))
    lengths, mask = [12], Prefix(torch.tensor([4]))
    y = attention(q, k, v, cu_seqlens(lengths), mask=mask)
    seen = visible(12, 12, mask, 0)
    for j in range(12):
        other = [x.index_fill(0, torch.tensor([j]), 7.0) for x in (k, v)]
        changed = (attention(q, *other, cu_seqlens(lengths), mask=mask) != y).flatten(1).any(1)
        assert torch.equal(changed, seen[:, j])


@pytest.mark.parametrize("width", [64, 80])
def test_head_widths_of_vit_l_and_vit_h(width):
    tensors = inputs(30, 2, 2, width)
    assert_same(attention(*tensors, cu_seqlens([20, 10]), mask=Full()), by_hand(*tensors, [20, 10], Full()), tensors)


@pytest.mark.parametrize("backend", ["segments", "reference", "two calls"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "lengths_q, lengths_k, used",
    [([2, 1, 6], [8] * 3, [5, 3, 6]), ([4, 2, 3], [5] * 3, [2, 5, 0]), ([1, 1, 3], [9, 4, 9], None)],
    ids=["a cache", "fewer keys than queries", "without used_k"],
)
def test_queries_are_the_last_of_their_keys(lengths_q, lengths_k, used, mask, backend):
    mask = mask_of(mask, 3)
    tensors = inputs(sum(lengths_q) + 1, keys=sum(lengths_k) + 2, dtype=torch.float64)
    cu_q, cu_k = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
    used_k = None if used is None else torch.tensor(used, dtype=torch.int32)
    if backend == "two calls":
        if not isinstance(mask, Prefix):
            return
        call = Inputs(*tensors, cu_q, cu_k, used_k, Prefix(mask.lengths.int()), None)
        y = prefix_in_two_calls(BACKENDS["segments"].run, call)
    else:
        y = attention(*tensors, cu_q, mask=mask, cu_seqlens_k=cu_k, used_k=used_k, backend=backend)
    assert_same(y, by_hand(*tensors, lengths_q, mask, lengths_k, used), tensors, 1e-12, 1e-10)


@pytest.mark.parametrize("lengths, padding", [([5, 7, 0, 1], 3), ([4, 4], 0)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_flex_attention_with_a_mask_of_segments(lengths, padding, mask):
    tensors, mask = [x.detach() for x in inputs(sum(lengths) + padding)], mask_of(mask, len(lengths))
    y = attention(*tensors, cu_seqlens(lengths), mask=mask, backend="flex")  # on a CPU it has no gradients
    assert relative_error(y, by_hand(*tensors, lengths, mask)) < 1e-6


@pytest.mark.parametrize("mask", MASKS)
def test_segments_of_one_length_are_a_dense_batch(mask):
    tensors, mask = inputs(15), mask_of(mask, 3)
    y = attention(*tensors, cu_seqlens([5] * 3), mask=mask, max_length=5, backend="sdpa")
    assert_same(y, by_hand(*tensors, [5] * 3, mask), tensors)
    for length in (None, 4):
        with pytest.raises(ValueError, match=f'max_length for backend "sdpa" is {length}, expected the length of each'):
            attention(*tensors, cu_seqlens([5] * 3), mask=mask, max_length=length, backend="sdpa")


def test_rows_that_a_library_leaves_unwritten_get_no_gradient():
    x, rows, dy = torch.randn(5, 2, 4, requires_grad=True), torch.tensor(3), torch.randn(5, 2, 4)
    dy[3:] = torch.nan
    expected = torch.cat([dy[:3], torch.zeros(2, 2, 4)])
    for run in (ZeroGradientPast.apply, torch.compile(ZeroGradientPast.apply, fullgraph=True, backend="eager")):
        y = run(x, rows)
        assert torch.equal(y, x)
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], expected)
    assert torch.equal(zero_past(dy, rows), expected)


@pytest.mark.parametrize("mask", MASKS)
def test_pairs_are_those_that_the_mask_shows(mask):
    lengths = [5, 12, 0, 1]
    mask = mask_of(mask, 4)
    pairs = sum(int(visible(n, n, mask, b).sum()) for b, n in enumerate(lengths))
    assert mask.pairs(lengths) == pairs
    cost = varlen.cost(lengths, 4, 2, 16, mask=mask, itemsize=2)
    assert cost.flops == 4 * pairs * 4 * 16
    assert cost.bytes == 2 * 18 * 6 * 16 * 2
    assert varlen.cost(lengths, 4, 2, 16, mask=mask, backward=True).flops == cost.flops * 5 / 2


def test_another_prefix_compiles_nothing():
    tensors, cu, graphs = inputs(12), cu_seqlens([5, 7]), []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(q, k, v, lengths):
        return attention(q, k, v, cu, mask=Prefix(lengths)).square()

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for prefix in ([1, 3], [0, 0], [5, 7], [9, 1]):
        lengths = torch.tensor(prefix)
        assert torch.equal(compiled(*tensors, lengths), call(*tensors, lengths))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "backend, module",
    [("flash-attn", "flash_attn"), ("flash-attn-3", "flash_attn_interface"), ("xformers", "xformers")],
)
def test_a_missing_package_is_named(backend, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    q, k, v = inputs(6)
    told = f'attention: backend "{backend}" needs the Python package {backend}: .*{module}'
    with pytest.raises(ImportError, match=told):
        attention(q, k, v, cu_seqlens([6]), mask=Causal(), backend=backend)


def row(backend, forward, backward, width=80, causal=False, dtype="bfloat16"):
    return {"head_width": width, "causal": causal, "dtype": dtype, "backend": backend, "forward": forward,
            "backward": backward}  # fmt: skip


ROWS = [row("varlen", 0.5, 0.3), row("triton", 0.4, 0.5), row("flash-attn", 0.7, 0.2), row("sdpa", 0.9, 0.9),
        row("flex", 0.6, 0.6, causal=True)]  # fmt: skip


def test_the_fastest_measured_backend_that_is_usable_is_taken():
    def best(usable=("varlen", "triton", "flex", "flash-attn"), mask="Full", dtype="bfloat16", backward=False):
        return fastest(ROWS, usable, 80, mask, dtype, backward)

    assert best() == "flash-attn"
    assert best(usable=("varlen", "triton")) == "varlen"
    assert best(backward=True) == "triton"
    assert best(mask="Causal") == "flex"
    assert best(mask="Prefix") == "triton"  # which alone computes it in one call without hidden tiles


def test_without_a_measurement_there_is_a_default():
    for width, mask, dtype, expected in (
        (64, "Full", "bfloat16", "varlen"), (80, "Causal", "float16", "varlen"), (80, "Full", "float32", "triton"),
        (24, "Full", "float32", "reference"), (160, "Causal", "float32", "reference"),
        (64, "Full", "float64", "reference"), (64, "Prefix", "bfloat16", "triton"),
        (160, "Prefix", "bfloat16", "varlen"), (160, "Prefix", "float32", "reference"),
        (64, "Prefix", "float64", "reference"),
    ):  # fmt: skip
        assert fastest([], BACKENDS, width, mask, dtype, True) == expected
        assert backends.choose_backend("no such GPU", width, mask, dtype, True, False) == expected


def test_rows_are_read_from_a_file(tmp_path):
    (tmp_path / "some-gpu.json").write_text(json.dumps(ROWS))
    assert read_table(tmp_path / "some-gpu.json") == ROWS
    assert read_table(tmp_path / "another-gpu.json") == []


def test_every_table_has_rows_that_can_be_looked_up():
    for path in (tables() / "attention").glob("*.json"):
        for entry in read_table(path):
            assert entry.keys() == ROWS[0].keys()
            assert entry["backend"] in BACKENDS


def test_the_choice_is_a_constant_of_compiled_code():
    def run(x):
        chosen = backends.choose_backend(
            "no such GPU", 80, "Full", str(x.dtype).removeprefix("torch."), x.requires_grad, False
        )
        return 2 * x if chosen == "triton" else 3 * x

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert compiled(torch.ones(())) == 2
    assert compiled(torch.ones((), dtype=torch.bfloat16)) == 3


def test_a_pinned_back_end_is_taken():
    q, k, v = inputs(6)
    with pinned(attention="sdpa"):
        y = attention(q, k, v, cu_seqlens([3, 3]), mask=Causal(), max_length=3)
    assert y.grad_fn.name() != attention(q, k, v, cu_seqlens([3, 3]), mask=Causal()).grad_fn.name()


def test_non_contiguous_inputs():
    qkv = torch.randn(12, 3, 4, 16)
    q, k, v = qkv.unbind(1)
    y = attention(q, k, v, cu_seqlens([5, 7]), mask=Causal())
    assert torch.equal(y, attention(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens([5, 7]), mask=Causal()))


def test_op_contract():
    q, k, v = inputs(12)
    cu = cu_seqlens([5, 7])
    for prefix in (None, torch.tensor([3, 9], dtype=torch.int32)):
        torch.library.opcheck(segments, (q, k, v, cu, cu, None, prefix, True))


def test_compiles_whole():
    q, k, v = inputs(12)
    cu = cu_seqlens([5, 7])
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, cu, mask=Causal()), fullgraph=True)
    y, truth = compiled(q, k, v), attention(q, k, v, cu, mask=Causal())
    assert torch.equal(y, truth)
    for found, expected in zip(gradients(y, [q, k, v]), gradients(truth, [q, k, v])):
        assert relative_error(found, expected) < 1e-6


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
    y = attention(*given, cu_seqlens(lengths_q), mask=Causal(), cu_seqlens_k=cu_seqlens(lengths_k), backend=backend)
    truth = by_hand(*given, lengths_q, Causal(), lengths_k)
    assert relative_error(y, truth) < 1e-6
    if backend != "flex":
        for found, expected in zip(gradients(y, given), gradients(truth, given)):
            assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("backend", ["segments", "reference"])
@pytest.mark.parametrize("lengths_q, lengths_k", [([4, 0, 3], [4, 0, 3]), ([4, 2], [2, 4])], ids=str)
def test_fp64_gradients_are_those_of_finite_differences(backend, lengths_q, lengths_k):
    q, k, v = torch.randn(8, 2, 4), *torch.randn(2, 7, 1, 4)
    given = [x.double().requires_grad_() for x in (q, k, v)]
    cu_q, cu_k = cu_seqlens(lengths_q), cu_seqlens(lengths_k)
    for name in MASKS:
        mask = mask_of(name, len(lengths_q))
        assert torch.autograd.gradcheck(
            lambda q, k, v, m=mask: attention(q, k, v, cu_q, mask=m, cu_seqlens_k=cu_k, backend=backend), given
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_dtypes_may_differ(dtype):
    q, k, v = inputs(12)
    half = v.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = attention(q, k, half, cu_seqlens([5, 7]), mask=Causal())
    assert y.dtype == dtype
    assert relative_error(y, by_hand(q, k, half, [5, 7], Causal())) < 1e-2
    found = gradients(y, [q, k, half])
    assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype]


def test_offsets_of_64_bits_are_taken():
    q, k, v = inputs(12)
    cu = cu_seqlens([5, 7])
    y = attention(q, k, v, cu.long(), mask=Causal(), cu_seqlens_k=cu.long())
    assert torch.equal(y, attention(q, k, v, cu, mask=Causal()))


def test_meta_tensors_have_shapes():
    q, k, v = (x.detach().to("meta") for x in inputs(12))
    y = attention(q, k, v, cu_seqlens([5, 7]).to("meta"), mask=Causal(), backend="segments")
    assert y.shape == q.shape
    assert y.is_meta


class Attention(torch.nn.Module):
    def forward(self, q, k, v, cu, mask):
        return attention(q, k, v, cu, mask=Causal() if mask is None else mask)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_exports_with_any_numbers_of_rows_and_segments(mask, strict):
    rows, count = torch.export.Dim("rows", min=0), torch.export.Dim("count", min=1)

    def case(lengths):
        own = mask_of(mask, len(lengths)) if mask == "prefix" else None
        return *(x.detach() for x in inputs(sum(lengths))), cu_seqlens(lengths), own

    program = torch.export.export(
        Attention(), case([5, 7]), strict=strict,
        dynamic_shapes=(*[{0: rows}] * 3, {0: count + 1}, Prefix({0: count}) if mask == "prefix" else None),
    ).module()  # fmt: skip
    for lengths in ([5, 7], [1], [3, 0, 4, 9]):
        arguments = case(lengths)
        assert torch.equal(program(*arguments), Attention()(*arguments))


def test_derivatives_that_are_not_computed_are_refused():
    q, k, v = inputs(6)
    cu = cu_seqlens([6])
    (dq,) = torch.autograd.grad(attention(q, k, v, cu, mask=Causal()).sum(), [q], create_graph=True)
    with pytest.raises(RuntimeError, match="attention: gradients of gradients are not computed"):
        dq.square().sum().backward()
    q, k, v = (x.detach() for x in (q, k, v))
    with pytest.raises(RuntimeError, match="attention: v has a tangent"):
        torch.func.jvp(lambda v: attention(q, k, v, cu, mask=Causal()), (v,), (v,))


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
        attention(q, k, v, mask=Causal(), backend=backend, **{name: torch.tensor(x) for name, x in given.items()})


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
        ({"mask": Prefix(torch.tensor([3, 3]))}, r"mask.lengths is \(2,\), expected \(1,\)"),
        ({"mask": Prefix(torch.tensor([3.0]))}, "mask.lengths is torch.float32"),
        ({"mask": Prefix(torch.tensor([3], device="meta"))}, "device of mask.lengths is meta, expected cpu"),
        ({"mask": Prefix(torch.tensor([3])), "backend": "xformers"}, 'mask for backend "xformers" is Prefix, expected'),
        (
            {"used_k": torch.tensor([3]), "backend": "flash-attn"},
            'used_k for backend "flash-attn" is a tensor, expected None',
        ),
    ],
)
def test_refuses_bad_arguments(change, told):
    q, k, v = inputs(6)
    given = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens([6]), "mask": Causal()}
    with pytest.raises(ValueError, match=f"attention: {told}"):
        attention(**given | change)


def test_backends_of_gpus_say_so_on_a_cpu():
    q, k, v = inputs(6)
    with pytest.raises(ValueError, match='device for backend "varlen" is cpu, expected a GPU'):
        attention(q, k, v, cu_seqlens([6]), mask=Causal(), backend="varlen")
    with pytest.raises(ValueError, match='device for gradients of backend "flex" is cpu, expected a GPU'):
        attention(q, k, v, cu_seqlens([6]), mask=Causal(), backend="flex")
    with pytest.raises(ValueError, match=r'begins in cu_seqlens for backend "sdpa" is \[0, 2\], expected one each 3'):
        attention(q, k, v, cu_seqlens([2, 4]), mask=Causal(), backend="sdpa", max_length=3)


@pytest.mark.parametrize("mask", [True, None, Full, torch.tensor([3])], ids=str)
def test_other_values_than_masks_are_refused(mask):
    with pytest.raises(TypeError, match=r"attention: mask is .*, expected Full\(\), Causal\(\) or Prefix\(lengths\)"):
        attention(*inputs(6), cu_seqlens([6]), mask=mask)


@pytest.mark.parametrize("backend, module", [("flash-attn", "flash_attn"), ("flash-attn-3", "flash_attn_interface")])
def test_flash_attn_gets_a_prefix_in_two_calls(backend, module, monkeypatch):
    calls = []

    def attend(q, k, v, cu_q, cu_k, longest_q, longest_k, *, causal):
        calls.append((causal, tuple(cu_q.shape), tuple(cu_k.shape), longest_q, longest_k))
        return (q, None) if backend == "flash-attn-3" else q

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_varlen_func=attend))
    tensors = [x.detach().to("meta") for x in inputs(12)]
    mask, cu = Prefix(torch.empty(2, dtype=torch.int32, device="meta")), cu_seqlens([5, 7]).to("meta")
    assert attention(*tensors, cu, mask=mask, max_length=7, backend=backend).shape == (12, 4, 16)
    assert calls == [(causal, (5,), (5,), 7, 7) for causal in (True, False)]


@pytest.mark.parametrize("mask", MASKS)
def test_torch_varlen_takes_every_mask(mask):
    """The tensors are on "meta": without a GPU only shapes can be tested."""
    tensors = [x.detach().to("meta", torch.bfloat16) for x in inputs(12)]
    mask = Prefix(torch.empty(2, dtype=torch.int32, device="meta")) if mask == "prefix" else mask_of(mask, 2)
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    assert attention(*tensors, cu, mask=mask, backend="varlen").shape == (12, 4, 16)
