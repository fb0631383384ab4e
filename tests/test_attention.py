import pytest
import torch
from conftest import gradients, relative_error

from mm1.kernels.attention import attention, segments

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
