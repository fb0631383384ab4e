"""Specify the family's ops in plain torch, in the dtype of their arguments; in fp64 they are the truth of all tests.

The functions take the arguments of the public ops, and are differentiable. Neighbouring images of one size are computed
as a batch.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.patches.grids import Grids, as_grids


def runs(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Return (n, h, w) for each run of n neighbouring images of one size."""
    return [(len([*run]), h, w) for (h, w), run in groupby(sizes)]


def padded(parts: Sequence[Tensor], rows: int, like: Tensor) -> Tensor:
    """Concatenate parts [., D] and zeros to [rows, D]; without parts D and dtype are those of `like`."""
    count = sum(map(len, parts))
    if count < rows or not parts:
        like = parts[0] if parts else like
        parts = [*parts, like.new_zeros(rows - count, like.shape[1])]
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def interpolate(
    table: Tensor, h: int, w: int, interpolation: str = "bilinear", antialias: bool = True, align_corners: bool = False
) -> Tensor:
    """Resample table [Gh, Gw, D] -> [h, w, D].

    torch's antialiased result of a single column is wrong on a CPU where rows grow: [5, 1] → [7, 1] differs from
    [1, 5] → [1, 7] transposed. So a column is computed as a row.
    """
    if w == 1 < h:
        return interpolate(table.transpose(0, 1), w, h, interpolation, antialias, align_corners).transpose(0, 1)
    options = {} if interpolation == "nearest" else {"antialias": antialias, "align_corners": align_corners}
    return F.interpolate(table.permute(2, 0, 1)[None], (h, w), mode=interpolation, **options)[0].permute(1, 2, 0)


def positions(
    table: Tensor, grids: Grids | Sequence[tuple[int, int]], interpolation: str = "bilinear", antialias: bool = True,
    align_corners: bool = False,
) -> Tensor:  # fmt: skip
    """Resample table [Gh, Gw, D] to each image's grid; return [P, D], zeros in rows of no image."""
    grids = as_grids(grids, table.device)
    m, parts = grids.merge, []
    for n, h, w in runs(grids.sizes or ()):
        y = interpolate(table, h, w, interpolation, antialias, align_corners)
        y = y.view(h // m, m, w // m, m, -1).transpose(1, 2).reshape(h * w, -1) if m > 1 else y.flatten(0, 1)
        parts.append(y.repeat(n, 1))
    return padded(parts, grids.patches, table[0])


def cut(
    pixels: Tensor, grids: Grids, patch_size: int | tuple[int, int], mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Cut and normalise packed pixels [ΣHW, C] -> patches [P, p·q·C] of `dtype`, zeros in rows of no image.

    uint8 pixels are divided by 255; then mean is subtracted and std divides. Half precision is computed in fp32.
    """
    (p, q), C = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size, pixels.shape[1]
    m, parts, first = grids.merge, [], 0
    x = pixels.to(torch.promote_types(dtype, torch.float32))
    x = x / 255 if pixels.dtype == torch.uint8 else x
    x = x if mean is None else x - x.new_tensor(mean)
    x = x if std is None else x / x.new_tensor(std)
    for n, h, w in runs(grids.sizes or ()):
        rows = x[first : first + n * h * w * p * q].view(n, h // m, m, p, w // m, m, q, C)
        parts.append(rows.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(n * h * w, p * q * C))
        first += n * h * w * p * q
    return padded(parts, grids.patches, x.new_zeros(0, p * q * C)).to(dtype)


def patch_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, pixels: Tensor, rows: Tensor,
    grids: Grids | Sequence[tuple[int, int]], *, patch_size: int | tuple[int, int], mean: Sequence[float],
    std: Sequence[float], eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Return the mean squared error of x · weightᵀ + bias against the normalised patches `rows`, [R]; see loss.py."""
    grids, dtype = as_grids(grids, x.device), torch.promote_types(weight.dtype, torch.float32)
    patches = cut(pixels, grids, patch_size, mean, std, dtype)
    centred = patches - patches.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / max(patches.shape[1] - 1, 1)
    targets = F.pad(centred / (variance + eps).sqrt(), (0, 0, 0, 1))  # a last row for rows of no patch
    valid = (rows >= 0) & (rows < grids.cu_seqlens[-1])
    errors = F.linear(x, weight, bias).to(dtype) - targets[torch.where(valid, rows, grids.patches).long()]
    return torch.where(valid, errors.square().mean(1), 0)


def embed_patches(
    patches: Tensor, grids: Grids | Sequence[tuple[int, int]], weight: Tensor, bias: Tensor | None = None,
    pos_embed: Tensor | None = None, **interpolation: object,
) -> Tensor:  # fmt: skip
    """Return patches · weightᵀ + bias + positions, [P, Dv]; interpolation: the settings of `positions`."""
    y = F.linear(patches.to(weight.dtype), weight, bias)
    # CPUs and GPUs interpolate half precision less exactly than they round it.
    wide = None if pos_embed is None else pos_embed.to(torch.promote_types(pos_embed.dtype, torch.float32))
    return y if wide is None else y + positions(wide, grids, **interpolation).to(y.dtype)  # pyright: ignore


def patch_embed(
    pixels: Tensor, grids: Grids, weight: Tensor, bias: Tensor | None = None, pos_embed: Tensor | None = None, *,
    patch_size: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, **interpolation: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Embed packed pixels; return tokens [P, Dv], zeros in rows of no image, and cu_seqlens int32 [N+1].

    weight: [Dv, p·p·3], in (row, column, channel) order.
    """
    grids = grids.to(weight.device)
    patches = cut(pixels, grids, patch_size, mean, std, weight.dtype)
    tokens = embed_patches(patches, grids, weight, bias, pos_embed, **interpolation)
    if grids.used != grids.patches:
        used = torch.arange(len(tokens), device=tokens.device) < grids.cu_seqlens[-1]
        tokens = torch.where(used[:, None], tokens, 0)
    return tokens, grids.cu_seqlens
