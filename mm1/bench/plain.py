"""Define plain torch's versions of functions of the engine, with the same arguments and results, for benchmarks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.engine.layers.layer import product_dtype
from mm1.kernels.abstractor.reference import block, by_size
from mm1.kernels.attention import Mask, attention
from mm1.kernels.attention.reference import places
from mm1.kernels.patches.grids import Grids
from mm1.kernels.patches.reference import runs


def batched_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, mask: Mask, max_length: int) -> Tensor:
    """Compute torch's dense attention in segments of max_length rows each."""
    rows = max_length * (len(cu_seqlens) - 1)
    q, k, v, rest = q[:rows], k[:rows], v[:rows], len(q) - rows
    y = attention(q, k, v, cu_seqlens, mask=mask, max_length=max_length, backend="sdpa")
    return F.pad(y, (0, 0, 0, 0, 0, rest))


class MaskedAttention:
    """Compute torch's causal attention over all pairs of rows, with a mask that all layers of a step share."""

    seen: Tensor | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, mask: Mask, max_length: int
    ) -> Tensor:  # fmt: skip
        if self.seen is None:
            segment = places(cu_seqlens, len(q))[0]
            self.seen = (segment[:, None] == segment[None]).tril()
        grouped = q.shape[1] != k.shape[1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, self.seen, enable_gqa=grouped)[0].transpose(0, 1)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, mask: Mask, max_length: int) -> Tensor:
    """Compute torch's full attention with each segment padded to max_length, and a mask of the padding."""
    segments = len(cu_seqlens) - 1
    segment, place = places(cu_seqlens, len(q))
    inside = torch.arange(len(q), device=q.device) < cu_seqlens[-1]
    at = torch.where(inside, segment * max_length + place, segments * max_length)
    # A segment without rows sees one row of zeros, because softmax of no values is NaN.
    seen = torch.arange(max_length, device=q.device) < cu_seqlens.diff().clamp(min=1)[:, None]
    q, k, v = (
        x.new_zeros(segments * max_length + 1, *x.shape[1:]).index_copy(0, at, x)[:-1].unflatten(0, (segments, -1))
        for x in (q, k, v)
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, seen[:, None, None])
    return F.pad(y.transpose(1, 2).flatten(0, 1), (0, 0, 0, 0, 0, 1)).index_select(0, at)


def conv_block(x: Tensor, grids: Grids, weights: dict[str, Tensor], *, pool: tuple[int, int] | None = None) -> Tensor:
    """Compute a convolutional block for each size, without waiting for the device."""
    rows = grids.patches if pool is None else grids.images * math.prod(pool)

    def net(image: Tensor) -> Tensor:
        y = block(image, weights)
        return y if pool is None else F.adaptive_avg_pool2d(y, pool)

    return by_size(x, _runs(grids), (rows, len(weights["conv1.conv.weight"])), net).to(product_dtype(x))


def _runs(grids: Grids) -> list[tuple[int, int, int]]:
    """Return (n, h, w) of runs of images of one size.

    If all are of one size, the run includes images that fill the batch, so that every batch has the same shape.
    """
    if grids.sizes is None:  # the grids after the pool
        side = math.isqrt(grids.patches // grids.images)
        return [(grids.images, side, side)]
    same = len(set(grids.sizes)) == 1 and grids.patches == grids.images * math.prod(grids.sizes[0])
    return [(grids.images, *grids.sizes[0])] if same else runs(grids.sizes)
