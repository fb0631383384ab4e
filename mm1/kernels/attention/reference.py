"""Specify attention in plain torch: the truth of all tests.

    y[i, h] = Σ_j softmax_j(q[i, h] · k[j, g] / √Dh) v[j, g],   j in i's segment, where the mask lets i see j

All pairs of rows are computed in fp32, or in fp64 for fp64: O(T·S) memory, on any device, without synchronization.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.attention.masks import Causal, Full, Mask, Prefix


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, mask: Mask, cu_seqlens_k: Tensor | None = None,
    used_k: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return attention [T, H, Dh] in the dtype of q, differentiable; the arguments are those of varlen.attention.

    q [T, H, Dh], k and v [S, G, Dh], H a multiple of G, cu_seqlens and cu_seqlens_k int [B + 1], used_k int [B].
    Rows that see no key, and rows past the last segment, are zeros.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    sees = visible(cu_seqlens, cu_k, used_k, q.shape[0], k.shape[0], mask)
    row, key = torch.arange(q.shape[0], device=q.device), torch.arange(k.shape[0], device=q.device)
    seen = sees(row[:, None], key[None, :])
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k) * q.shape[2] ** -0.5
    # Not -inf: where a row sees nothing, softmax would be NaN, and so would its gradient.
    weights = scores.masked_fill(~seen, torch.finfo(wide).min).softmax(-1) * seen
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """Return causal attention [T, H, Dh] of new rows over pages; the arguments are those of paged.paged_attention.

    q [T, H, Dh], k and v [pages, page, G, Dh], cu_q int [B + 1], tables int [B, M], lengths int [B]. Waits for the
    device.
    """
    y = torch.zeros_like(q)
    starts = cu_q.tolist()
    for b, length in enumerate(lengths.tolist()):
        rows = q[starts[b] : starts[b + 1]]
        keys, values = (x[tables[b].long()].flatten(0, 1)[:length] for x in (k, v))
        cu_rows, cu_keys = (torch.tensor([0, len(x)], device=q.device) for x in (rows, keys))
        y[starts[b] : starts[b + 1]] = attention(rows, keys, values, cu_rows, mask=Causal(), cu_seqlens_k=cu_keys)
    return y


def visible(
    cu_q: Tensor, cu_k: Tensor, used_k: Tensor | None, rows: int, keys: int, mask: Mask
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function (i, j) -> bool: whether packed row i sees packed key j, for tensors of indices."""
    segment_q, place_q = places(cu_q, rows)
    segment_k, place_k = places(cu_k, keys)
    length_q, length_k = cu_q.diff(), cu_k.diff() if used_k is None else used_k
    # Rows past the last segment are in one more segment, without keys.
    length_q, length_k = F.pad(length_q, (0, 1)), F.pad(length_k, (0, 1))
    prefix = F.pad(mask.lengths, (0, 1)) if isinstance(mask, Prefix) else None

    def sees(i: Tensor, j: Tensor) -> Tensor:
        segment = segment_q[i]
        inside = (segment == segment_k[j]) & (place_k[j] < length_k[segment])
        if isinstance(mask, Full):
            return inside
        before = place_k[j] - place_q[i] <= length_k[segment] - length_q[segment]
        return inside & (before if prefix is None else before | (place_k[j] < prefix[segment]))

    return sees


def places(cu_seqlens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return each packed row's segment (B past the last one) and its place there, int [rows] both."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens, row, right=True) - 1
    return segment, row - cu_seqlens[segment]
