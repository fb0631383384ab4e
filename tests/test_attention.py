import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import gradients, relative_error

from mm1.kernels import attention as module
from mm1.kernels.attention import attention, choose, segments
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


def test_refuses_bad_arguments():
    q, k, v = inputs(6)
    with pytest.raises(ValueError, match="attention: heads of q is 4, expected a multiple of 3"):
        attention(q, torch.randn(6, 3, 16), torch.randn(6, 3, 16), cu_seqlens([6]), causal=True)
    with pytest.raises(ValueError, match="backend"):
        attention(q, k, v, cu_seqlens([6]), causal=True, backend="fast")
