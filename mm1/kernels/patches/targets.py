"""Say where the targets of predicted patches are, and compute them in plain torch, for CPUs and where kernels fail.

The formula is that of loss.py; half precision is computed in fp32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.patches.pixels import CENTRE


class Targets(NamedTuple):
    """Hold where the targets of R rows are: packed pixels, patches, their images, the patch's sides, and scales."""

    pixels: Tensor  # uint8 [ΣHW, C]
    rows: Tensor  # int [R], the patch of each row; a row of no patch has no loss
    images: Tensor  # Grids.table
    owner: Tensor  # Grids.owner
    height: int
    width: int
    merge: int
    scale: Sequence[float]  # of u - CENTRE in each channel, for the byte u
    shift: Sequence[float]
    eps: float

    @classmethod
    def of(
        cls, pixels: Tensor, rows: Tensor, geometry: Sequence[Tensor], patch: Sequence[int], scale: Sequence[float],
        shift: Sequence[float], eps: float,
    ) -> "Targets":  # fmt: skip
        """Return targets from geometry, the table and owner of Grids, and patch, the height, width and merge."""
        (images, owner), (height, width, merge) = geometry, patch
        return cls(pixels, rows, images, owner, height, width, merge, scale, shift, eps)

    @property
    def area(self) -> int:
        """Return the pixels of a patch."""
        return self.height * self.width


def places(targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the bytes of each row's patch begin, its image's line (both int64 [R]), and whether it has one."""
    rows, P, m = targets.rows.long(), len(targets.owner), targets.merge
    valid = (rows >= 0) & (rows < P)
    image = F.pad(targets.owner, (0, 1), value=-1)[torch.where(valid, rows, P)].long()
    first, count, _, w = F.pad(targets.images, (0, 0, 0, 1))[image].long().unbind(1)  # -1: the added image of no rows
    inside = rows - first
    valid = valid & (inside < count)
    across = (w // m).clamp(min=1)
    block, corner = inside // m**2, inside % m**2
    row, column = block // across * m + corner // m, block % across * m + corner % m
    line = w * targets.width * targets.pixels.shape[1]
    length = targets.width * targets.pixels.shape[1]
    begin = first * targets.height * length + row * targets.height * line + column * length
    return torch.where(valid, begin, 0), torch.where(valid, line, 0), valid


def _normalised(targets: Targets, begin: Tensor, line: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the normalised patches [n, K] at these places, in fp32 or fp64."""
    n, C, N = len(begin), targets.pixels.shape[1], targets.area
    K, across = N * C, targets.width * C
    if targets.pixels.shape[0] == 0:
        return begin.new_zeros(n, K, dtype=dtype)
    starts = begin[:, None] + torch.arange(targets.height, device=begin.device) * line[:, None]
    t = targets.pixels.view(-1).unfold(0, across, 1)[starts].view(n, K).to(dtype)
    # Products with the channel of each value are faster than sums and broadcasts over three neighbours.
    channels = torch.eye(C, dtype=dtype, device=t.device).repeat(N, 1)  # [K, C]
    scale, shift = (t.new_tensor(values) for values in (targets.scale, targets.shift))
    sums = t @ channels
    means = (sums - CENTRE * N) * (scale / N) + shift
    means = means - means[:, :1]
    means = means - means.mean(1, keepdim=True)
    t.addmm_(sums, channels.t(), beta=N, alpha=-1).mul_((scale / N).repeat(N)).addmm_(means, channels.t())
    variance = torch.linalg.vector_norm(t, dim=1).square_() / max(K - 1, 1)
    return t.mul_((variance + targets.eps).rsqrt_()[:, None])


def errors(x: Tensor, w: Tensor, bias: Tensor | None, targets: Targets, begin: Tensor, line: Tensor) -> Tensor:
    """Return x · wᵀ + bias - targets, [n, K] in x's dtype."""
    t = _normalised(targets, begin, line, x.dtype)
    if bias is not None:
        t -= bias
    return t.addmm_(x, w.t(), beta=-1)
