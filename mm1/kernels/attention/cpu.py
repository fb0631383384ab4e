"""Compute attention on a CPU by torch's flash attention, with neighbouring segments of equal lengths as one batch.

Every mask is two rectangles. All queries of a segment see its first P keys, and the last n queries see the other
n = Lk - P keys causally:

    P = Lk (full),  max(Lk - Lq, 0) (causal),  max(Lk - Lq, prefix) up to Lk (prefix)

Thus no mask is stored, and the only hidden pairs computed are those in a causal square. A query of both rectangles has
two softmaxes, which are merged by the logarithms of their sums. Backward runs the rectangles one by one with the merged
result and logarithm, and adds their gradients (Dao 2023, FlashAttention-2, algorithm 2).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mm1.kernels.dispatch import expect, refuse_second_order, unit_stride, wide

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Part(NamedTuple):
    """Hold a rectangle of a segment, which reaches to its last query."""

    query: int  # the first
    key: int  # the first
    keys: int
    causal: bool


class _Run(NamedTuple):
    """Hold neighbouring segments of equal lengths; their queries are adjacent, their keys begin `step` rows apart."""

    segments: int
    start_q: int
    length_q: int
    start_k: int
    length_k: int
    step: int
    prefix: int  # keys that all queries of a segment see

    def parts(self) -> Iterator[_Part]:
        """Yield the rectangles that are not empty."""
        rest = self.length_k - self.prefix
        if self.prefix:
            yield _Part(0, 0, self.prefix, False)
        if rest:
            yield _Part(self.length_q - rest, self.prefix, rest, True)

    def queries(self, x: Tensor, part: _Part) -> Tensor:
        """Return the view [n, H, Lq, Dh] of the part's queries in x [T, H, Dh]."""
        return self._view(x, self.start_q + part.query, self.length_q - part.query, self.length_q)

    def keys(self, x: Tensor, part: _Part) -> Tensor:
        """Return the view [n, H, Lk, Dh] of the part's keys in x [S, H, Dh]."""
        return self._view(x, self.start_k + part.key, part.keys, self.step)

    def _view(self, x: Tensor, start: int, length: int, step: int) -> Tensor:
        # One call instead of slice, unflatten and transpose, whose overhead dominates with short segments.
        row, head, item = x.stride()
        size = (self.segments, x.shape[1], length, x.shape[2])
        return x.as_strided(size, (step * row, head, row, item), x.storage_offset() + start * row)


@torch.library.custom_op("mm1::attention_segments", mutates_args=())
def segments(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, prefix: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return attention [T, H, Dh] and the logarithm of each softmax's sum [T, H], fp32 or fp64.

    Neighbouring segments of equal lengths and prefixes run fastest. prefix int [B] implies causal.
    """
    q, k, v = _operands(q, k, v)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(*q.shape[:2], 1, dtype=wide(q.dtype))
    end = 0
    for run in _runs(cu_q, cu_k, used_k, prefix, causal, len(q), len(k)):
        last = run.start_q + run.segments * run.length_q
        # Clear the rows before the run, which see nothing, and in the run the queries before the first key.
        y[end : run.start_q if run.prefix or run.length_q == run.length_k else last].zero_()
        for part in run.parts():
            result, sums = _FORWARD(run.queries(q, part), run.keys(k, part), run.keys(v, part), 0.0, part.causal)
            sums = sums.unsqueeze(3)
            to, to_sums = run.queries(y, part), run.queries(lse, part)
            if part.key:
                share = (sums - to_sums).sigmoid()
                result = torch.lerp(to.to(lse.dtype), result.to(lse.dtype), share)
                sums = torch.logaddexp(to_sums, sums)
            to.copy_(result)
            to_sums.copy_(sums)
        end = last
    y[end:].zero_()
    return y, lse.squeeze(2)


@torch.library.custom_op("mm1::attention_segments_backward", mutates_args=())
def segments_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    used_k: Tensor | None, prefix: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, in their shapes, computed run by run as in forward."""
    groups, lse = k.shape[1], lse.unsqueeze(2)
    q, k, v = _operands(q, k, v)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for run in _runs(cu_q, cu_k, used_k, prefix, causal, len(q), len(k)):
        for part in run.parts():
            grads = _BACKWARD(
                run.queries(dy, part), run.queries(q, part), run.keys(k, part), run.keys(v, part),
                run.queries(y, part), run.queries(lse, part).squeeze(3).contiguous(), 0.0, part.causal,
            )  # fmt: skip
            (Tensor.add_ if part.key else Tensor.copy_)(run.queries(dq, part), grads[0])
            run.keys(dk, part).copy_(grads[1])
            run.keys(dv, part).copy_(grads[2])
    if groups != q.shape[1]:
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


segments.register_fake(lambda q, *others: (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide(q.dtype))))
segments_backward.register_fake(lambda dy, q, k, v, *others: tuple(x.new_empty(x.shape) for x in (q, k, v)))


def _save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, used_k, prefix, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, used_k, prefix)


def _gradients(ctx, dy: Tensor, _):
    return *segments_backward(dy.contiguous(), *ctx.saved_tensors, ctx.causal), None, None, None, None, None


segments.register_autograd(_gradients, setup_context=_save)
refuse_second_order(segments_backward, "attention")


def repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """Return x [S, G, Dh] with each key-value head repeated, [S, H, Dh] for the H heads of q."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with the heads of q, and a last stride of 1, which torch's flash attention on a CPU assumes."""
    return unit_stride(q), unit_stride(repeat_heads(k, q)), unit_stride(repeat_heads(v, q))


def checked_lengths(
    cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, rows: int, keys: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Check offsets int [B + 1] on the host; return the starts of queries and of keys, and each segment's lengths.

    Raises ValueError for offsets that decrease or exceed the rows, and for more used keys than a segment has.
    """
    starts = []
    for name, cu, size in (("cu_seqlens", cu_q, rows), ("cu_seqlens_k", cu_k, keys)):
        offsets = cu.tolist()
        rises = offsets[0] >= 0 and offsets[-1] <= size and all(a <= b for a, b in pairwise(offsets))
        expect(rises, "attention", name, offsets, f"offsets that rise from 0 to at most the {size} rows")
        starts.append(offsets)
    lengths_q, lengths_k = ([end - start for start, end in pairwise(offsets)] for offsets in starts)
    if used_k is not None:
        used = used_k.tolist()
        fits = all(0 <= n <= length for n, length in zip(used, lengths_k))
        expect(fits, "attention", "used_k", used, f"at most the segments' numbers of keys, {lengths_k}")
        lengths_k = used
    return *starts, lengths_q, lengths_k


def _prefix(length_q: int, length_k: int, prefix: int, causal: bool) -> int:
    """Return the number of keys of a segment that all its queries see."""
    if not causal or length_q == 1:
        return length_k
    return min(max(length_k - length_q, prefix, 0), length_k)


def _runs(
    cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, prefix: Tensor | None, causal: bool, rows: int, keys: int
) -> Iterator[_Run]:
    """Yield the runs that have queries and keys, in order."""
    starts_q, starts_k, lengths_q, lengths_k = checked_lengths(cu_q, cu_k, used_k, rows, keys)
    prefixes = [0] * len(lengths_q) if prefix is None else prefix.tolist()
    sizes = [(q, k, _prefix(q, k, s, causal)) for q, k, s in zip(lengths_q, lengths_k, prefixes)]
    first = 0
    while first < len(sizes):
        step = starts_k[first + 1] - starts_k[first]
        last = first + 1
        while last < len(sizes) and sizes[last] == sizes[first] and starts_k[last] - starts_k[last - 1] == step:
            last += 1
        length_q, length_k, prefix_keys = sizes[first]
        if length_q and length_k:
            yield _Run(last - first, starts_q[first], length_q, starts_k[first], length_k, step, prefix_keys)
        first = last
