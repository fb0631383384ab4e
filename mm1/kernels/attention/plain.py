"""Compute attention in plain torch on any device, in parts of bounded memory, where a GPU cannot run the kernels.

Arguments and results are those of flash.py and paged.py, so that forward may run here and backward there. Segment by
segment, PART scores at a time are computed in fp32, or in fp64 for fp64, to which only a part's own rows are converted:

    lse_i = log Σ_j exp(q_i·k_j / √Dh),   p_ij = exp(q_i·k_j / √Dh - lse_i),   y = p v
    dp = dy vᵀ,   ds = p (dp - Σ_j dy_j y_j),   dq = ds k / √Dh,   dk = dsᵀ q / √Dh,   dv = pᵀ dy

The host reads the segments' lengths.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mm1.kernels.attention.cpu import checked_lengths, repeat_heads
from mm1.kernels.dispatch import cdiv, wide

PART = 1 << 27  # scores, 512 MB of fp32


class _Part(NamedTuple):
    """Hold rows of queries of a segment, the rows of its keys, and which pairs are hidden."""

    queries: slice
    keys: slice
    hidden: Tensor | None  # bool [queries, keys]

    def rows(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the part's own rows of q, k and v in fp32 or fp64, all with the heads of q."""
        own = q[self.queries].to(wide(q.dtype))
        keys, values = (repeat_heads(x[self.keys].to(own.dtype), own) for x in (k, v))
        return own, keys, values

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return q·k / √Dh [H, queries, keys] of the part's own rows, -inf for hidden pairs."""
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
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
    y = q.new_zeros(q.shape)
    lse = y.new_full((q.shape[1], len(q)), float("inf"), dtype=wide(q.dtype))
    for part in _parts(q, k, cu_q, cu_k, used_k, prefix, causal):
        own, keys, values = part.rows(q, k, v)
        scores = part.scores(own, keys)
        sums = scores.logsumexp(-1)
        sums.masked_fill_(sums == float("-inf"), float("inf"))  # a row that sees nothing weighs all keys by zero
        p, lse[:, part.queries] = (scores - sums[..., None]).exp_(), sums
        y[part.queries] = torch.einsum("hqk,khd->qhd", p, values).to(y.dtype)
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    used_k: Tensor | None, prefix: Tensor | None, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q [T, H, Dh], k and v [S, G, Dh] in their dtypes."""
    units, groups = wide(q.dtype), k.shape[1]
    dq, (dk, dv) = q.new_zeros(q.shape), (x.new_zeros(x.shape, dtype=units) for x in (k, v))
    for part in _parts(q, k, cu_q, cu_k, used_k, prefix, causal):
        own, keys, values = part.rows(q, k, v)
        d = dy[part.queries].to(units)
        p = (part.scores(own, keys) - lse[:, part.queries, None]).exp_()
        dv[part.keys] += torch.einsum("hqk,qhd->khd", p, d).unflatten(1, (groups, -1)).sum(2)
        delta = (d * y[part.queries]).sum(-1).t()  # [H, queries]
        ds = torch.einsum("qhd,khd->hqk", d, values).sub_(delta[..., None]).mul_(p).mul_(q.shape[2] ** -0.5)
        dq[part.queries] = torch.einsum("hqk,khd->qhd", ds, keys).to(dq.dtype)
        dk[part.keys] += torch.einsum("hqk,qhd->khd", ds, own).unflatten(1, (groups, -1)).sum(2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def paged(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor, rows: int) -> Tensor:
    """Return attention [T, H, Dh] to the keys and values in pages; see paged.forward."""
    y, page = q.new_zeros(q.shape), k.shape[1]
    for (start, end), length, table in zip(pairwise(cu_q.tolist()), lengths.tolist(), tables):
        pages = table[: cdiv(length, page)].long()  # later entries may have no meaning
        cu_rows, cu_k = (torch.tensor([0, n], dtype=torch.int32, device="cpu") for n in (end - start, length))
        keys, values = (x[pages].flatten(0, 1)[:length] for x in (k, v))
        y[start:end] = forward(q[start:end], keys, values, cu_rows, cu_k, None, None, True)[0]
    return y
