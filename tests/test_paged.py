"""Attention over pages gives what attention over rows in order gives, wherever the pages lie."""

import pytest
import torch
from conftest import DEVICE, not_interpreted, relative_error

from mm1.autotune.static import compile_launch
from mm1.kernels import paged
from mm1.kernels.attention import attention
from mm1.kernels.dispatch import DEVICES, INTERPRETED, recording
from mm1.kernels.paged import paged_attention

PAGE = 4
SEGMENTS = {  # (new rows, keys in all)
    "a token of each": [(1, 1), (1, 9), (1, 4), (1, 30)],
    "tokens that see equally many": [(1, 9)] * 3,
    "tokens of equally many pages": [(1, 9), (1, 12), (1, 11)],
    "prompts": [(5, 5), (1, 1), (7, 7)],
    "behind prefixes": [(3, 20), (6, 8), (1, 17), (2, 2)],
    "some without": [(0, 5), (1, 6), (0, 0), (2, 9)],
}
HEADS = {"one group": (2, 1), "four groups": (4, 4), "two heads a group": (4, 2), "20 heads a group": (20, 1)}


def problem(segments, heads=(4, 2), width=16, dtype=torch.float32, side_by_side=False):
    """Pages in random order, or in order; what no segment has is not a number."""
    torch.manual_seed(0)
    H, G = heads
    need = [-(-length // PAGE) for _, length in segments]
    order = torch.arange(sum(need) + 3) if side_by_side else torch.randperm(sum(need) + 3)
    tables, start = torch.zeros(len(segments), max(need), dtype=torch.int32), 0
    for b, count in enumerate(need):
        tables[b, :count] = order[start : start + count]
        start += count
    k, v = torch.full((2, len(order), PAGE, G, width), float("nan"))
    rows = [torch.randn(2, length, G, width) for _, length in segments]
    for b, (own, (_, length)) in enumerate(zip(rows, segments)):
        for j in range(length):
            k[tables[b, j // PAGE], j % PAGE], v[tables[b, j // PAGE], j % PAGE] = own[:, j]
    new = torch.tensor([n for n, _ in segments])
    cu_q = torch.nn.functional.pad(new.cumsum(0), (1, 0)).int()
    q = torch.randn(int(cu_q[-1]), H, width)
    lengths = torch.tensor([length for _, length in segments], dtype=torch.int32)
    q, k, v = (x.to(DEVICE, dtype) for x in (q, k, v))
    return q, k, v, cu_q.to(DEVICE), tables.to(DEVICE), lengths.to(DEVICE), max(n for n, _ in segments), rows


def in_order(q, cu_q, lengths, rows):
    """Of the same rows end to end, by the packed attention's reference in fp64."""
    k, v = torch.cat(rows, 1).double()
    cu_k = torch.nn.functional.pad(lengths.cpu().cumsum(0), (1, 0)).int()
    return attention(q.double().cpu(), k, v, cu_q.cpu(), causal=True, cu_seqlens_k=cu_k, backend="reference")


@pytest.mark.parametrize("side_by_side", [False, True], ids=["scattered", "in order"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_it_is_attention_over_the_rows_in_order(segments, heads, side_by_side):
    *given, rows, own = problem(segments, heads, side_by_side=side_by_side)
    found = paged_attention(*given, rows=rows)
    assert relative_error(found.cpu(), in_order(given[0], given[3], given[5], own)) < 2e-6
    assert relative_error(paged.reference(*given).cpu(), in_order(given[0], given[3], given[5], own)) < 2e-6


@pytest.mark.parametrize("width", [16, 32, 80])
def test_widths_and_16_bits(width):
    *given, rows, own = problem(SEGMENTS["behind prefixes"], width=width, dtype=torch.bfloat16)
    found = paged_attention(*given, rows=rows)
    assert found.dtype == torch.bfloat16
    own = [x.bfloat16() for x in own]
    assert relative_error(found.cpu(), in_order(given[0], given[3], given[5], own)) < 8e-3


@pytest.mark.parametrize("most", [1, 2, 64])
def test_keys_split_over_programs_give_one_softmax(most, monkeypatch):
    """Many blocks of keys in one program, whose maximum rises, to one block a program."""
    monkeypatch.setattr(paged, "KEYS", 16)
    monkeypatch.setattr(paged, "MOST_SPLITS", most)
    *given, rows, own = problem([(1, 70), (2, 33), (1, 3)])
    assert paged.splits(3, 2, given[4].shape[1] * PAGE, 132) == min(most, 8)
    assert relative_error(paged_attention(*given, rows=rows).cpu(), in_order(given[0], given[3], given[5], own)) < 2e-6


def test_queries_of_any_strides_and_layers_of_one_tensor():
    *given, rows, own = problem(SEGMENTS["behind prefixes"] + [(1, 13)], side_by_side=True)
    q, k, v, *rest = given
    both = torch.stack([k, v], 2)  # [pages, page, 2, G, Dh]
    wide = torch.cat([q, q], 2)[:, :, : q.shape[2]]
    apart = torch.stack([k, v], 1)  # [pages, 2, page, G, Dh]: rows of neighbouring pages are not evenly spaced
    for k, v in ((both[:, :, 0], both[:, :, 1]), (apart[:, 0], apart[:, 1])):
        found = paged_attention(wide, k, v, *rest, rows=rows)
        assert relative_error(found.cpu(), in_order(q, given[3], given[5], own)) < 2e-6


def test_no_segment_at_all():
    q, k = torch.zeros(0, 4, 16, device=DEVICE), torch.zeros(2, PAGE, 2, 16, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    cu_q = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert paged_attention(q, k, k, cu_q, none.view(0, 1), none).shape == (0, 4, 16)


@pytest.mark.skipif(INTERPRETED, reason="a graph is compiled")
def test_it_is_one_node_of_a_graph():
    *given, rows, _ = problem(SEGMENTS["a token of each"])
    call = torch.compile(lambda *x: paged_attention(*x, rows=1) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(*given), paged_attention(*given, rows=rows) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: lambda q: q[:, :3]}, "heads is 3, expected a multiple of 2"),
        ({2: lambda v: v[:1]}, "v is"),
        ({1: lambda k: k.double(), 2: lambda v: v.double()}, "dtypes"),
    ],
)
def test_arguments_that_do_not_fit_are_told(change, message):
    *given, _, _ = problem(SEGMENTS["prompts"])
    for at, how in change.items():
        given[at] = how(given[at])
    with pytest.raises(ValueError, match=message):
        paged_attention(*given)


def test_it_counts_what_is_seen():
    cost = paged.cost([1, 3], [5, 4], heads=4, groups=2, width=16)
    assert cost.flops == 4 * (5 + 4 + 3 + 2) * 4 * 16
    assert cost.bytes == 2 * 16 * (2 * 2 * 9 + 2 * 4 * 4)


@not_interpreted
@pytest.mark.parametrize("device", ["a100", "h200", "b200", "rtx5090", "mi300x"])
def test_its_code_fits_every_gpu(device):
    """A token of one document in MM1-3B, of many in a 7B, and a prompt behind a prefix."""
    for B, rows, heads, groups in ((1, 1, 24, 24), (64, 1, 32, 8), (4, 100, 32, 8)):
        q = torch.empty(B * rows, heads, 128, device="meta", dtype=torch.bfloat16)
        k = torch.empty(4096, 16, groups, 128, device="meta", dtype=torch.bfloat16)
        numbers = (torch.empty(n, device="meta", dtype=torch.int32) for n in (B + 1, B))
        cu_q, lengths = numbers
        tables = torch.empty(B, 256, device="meta", dtype=torch.int32)
        with recording(DEVICES[device]) as found:
            paged.forward(q, k, k, cu_q, tables, lengths, rows)
        assert len(found) == 2
        for launch in found:
            code = compile_launch(launch, DEVICES[device])
            assert code.spills == 0, code
            assert code.shared <= DEVICES[device].shared, code
            assert launch.kernel is paged._merge_kernel or code.matrix, code
