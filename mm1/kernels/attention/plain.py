"""Compute attention in plain torch on any device, in parts of bounded memory, where a GPU cannot run the kernels.

Arguments and results are those of flash.py and paged.py, so that forward may run here and backward there. Segment by
segment, PART scores at a time are computed in fp32, or in fp64 for fp64:

    lse_i = log Σ_j exp(q_i·k_j / √Dh),   p_ij = exp(q_i·k_j / √Dh - lse_i),   y = p v
    dp = dy vᵀ,   ds = p (dp - Σ_j dy_j y_j),   dq = ds k / √Dh,   dk = dsᵀ q / √Dh,   dv = pᵀ dy

The host reads the segments' lengths.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mm1.kernels.attention.cpu import checked_lengths, repeat_heads
from mm1.kernels.dispatch import wide

PART = 1 << 27  # scores, 512 MB of fp32


class _Part(NamedTuple):
    """Hold rows of queries of a segment, the rows of its keys, and which pairs are hidden."""

    queries: slice
    keys: slice
    hidden: Tensor | None  # bool [queries, keys]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return q·k / √Dh [H, queries, keys], -inf for hidden pairs."""
        scores = torch.einsum("qhd,khd->hqk", q[self.queries], k[self.keys]) * q.shape[2] ** -0.5
        return scores if self.hidden is None else scores.masked_fill_(self.hidden, float("-inf"))


def _parts(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, prefix: Tensor | None, causal: bool
) -> Iterator[_Part]:
    """Yield the parts of all segments that have queries and keys."""
    segments = zip(*checked_lengths(cu_q, cu_k, used_k, len(q), len(k)))
    prefixes = [0] * (len(cu_q) - 1) if prefix is None else prefix.tolist()
    # checked_lengths returns one more offset than segments, which zip leaves out.
    for (start_q, start_k, length_q, length_k), seen in zip(segments, prefixes):
        if not (length_q and length_k):
            continue
        step = max(1, PART // (q.shape[1] * length_k))
        for first in range(0, length_q, step):
            rows, hidden = range(first, min(first + step, length_q)), None
            if causal:
                row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
                key = torch.arange(length_k, device=q.device)
                hidden = (key > row + length_k - length_q) & (key >= seen)
            yield _Part(slice(start_q + rows.start, start_q + rows.stop), slice(start_k, start_k + length_k), hidden)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, prefix: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y [T, H, Dh] in the dtype of q and lse fp32 or fp64 [H, T], +inf where a row sees nothing."""
    dtype, units = q.dtype, wide(q.dtype)
    q, k, v = q.to(units), repeat_heads(k, q).to(units), repeat_heads(v, q).to(units)
    y = torch.zeros(q.shape, dtype=units, device=q.device)
    lse = y.new_full((q.shape[1], len(q)), float("inf"))
    for part in _parts(q, k, cu_q, cu_k, used_k, prefix, causal):
        scores = part.scores(q, k)
        sums = scores.logsumexp(-1)
        sums.masked_fill_(sums == float("-inf"), float("inf"))  # a row that sees nothing weighs all keys by zero
        p, lse[:, part.queries] = (scores - sums[..., None]).exp_(), sums
        y[part.queries] = torch.einsum("hqk,khd->qhd", p, v[part.keys])
    return y.to(dtype), lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    used_k: Tensor | None, prefix: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q [T, H, Dh], k and v [S, G, Dh] in their dtypes."""
    dtype, units, groups = q.dtype, wide(q.dtype), k.shape[1]
    q, k, v, dy = q.to(units), repeat_heads(k, q).to(units), repeat_heads(v, q).to(units), dy.to(units)
    delta = (dy * y).sum(-1).t()  # [H, T]
    dq, dk, dv = (torch.zeros(x.shape, dtype=units, device=x.device) for x in (q, k, v))
    for part in _parts(q, k, cu_q, cu_k, used_k, prefix, causal):
        p = (part.scores(q, k) - lse[:, part.queries, None]).exp_()
        dv[part.keys] += torch.einsum("hqk,qhd->khd", p, dy[part.queries])
        dp = torch.einsum("qhd,khd->hqk", dy[part.queries], v[part.keys])
        ds = p.mul_(dp.sub_(delta[:, part.queries, None])).mul_(q.shape[2] ** -0.5)
        dq[part.queries] = torch.einsum("hqk,khd->qhd", ds, k[part.keys])
        dk[part.keys] += torch.einsum("hqk,qhd->khd", ds, q[part.queries])
    dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def paged(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor, rows: int) -> Tensor:
    """Return attention [T, H, Dh] to the keys and values in pages; see paged.forward."""
    page, groups, width = k.shape[1:]
    used = -(-int(lengths.max()) // page) if len(lengths) else 0
    pages = tables[:, :used].long().clamp(0, len(k) - 1)  # a segment's last entries may have no meaning
    keys, values = (x[pages].view(-1, groups, width) for x in (k, v))
    cu_k = torch.arange(len(lengths) + 1, dtype=torch.int32, device=q.device) * (used * page)
    return forward(q, keys, values, cu_q, cu_k, lengths, None, True)[0]
