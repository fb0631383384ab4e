"""Adaptive average pooling of packed images of any grids to one common grid.

    y[n, i, j] = mean of x over rows floor(i·h/oh) … ceil((i+1)·h/oh) and columns likewise, of image n

x [P, C] -> [N·oh·ow, C]; the windows of torch.nn.AdaptiveAvgPool2d: they overlap where h is no multiple of oh, and
repeat where h < oh. Reads P·C, writes N·oh·ow·C.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import Cost, expect
from mm1.kernels.grids import Grids, as_grids


def adaptive_pool(x: Tensor, grids: "Grids | Sequence[tuple[int, int]]", out: tuple[int, int] = (12, 12)) -> Tensor:
    """Pool x [P, C] to `out` places an image -> [N·oh·ow, C]; an absent image gives zeros."""
    grids = as_grids(grids)
    expect(x.ndim == 2 and x.shape[0] == grids.patches, "adaptive_pool", "x", tuple(x.shape), f"[{grids.patches}, C]")
    expect(min(out) > 0, "adaptive_pool", "out", out, "positive sides")
    if not grids.sizes:
        return x.new_zeros(grids.images * out[0] * out[1], x.shape[1]) + 0 * x.sum()
    members, starts = grids.windows(out, x.device)
    # A bag of rows with its mean is a pooling window; the sums and their gradient are free of atomics.
    return F.embedding_bag(members, x.float(), starts, mode="mean", include_last_offset=True).to(x.dtype)


def cost(patches: int, images: int, channels: int, out: tuple[int, int] = (12, 12), *, itemsize: int = 2) -> Cost:
    places = images * out[0] * out[1]
    return Cost(max(patches, places) * channels, (patches + places) * channels * itemsize)
