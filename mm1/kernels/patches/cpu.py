"""Embed patches on a CPU: cut the patches image by image, then multiply all of them at once.

The product is added to the positions. Half precision is computed in fp32, which is some hundred times faster on CPUs
without units for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mm1.kernels.dispatch import wide
from mm1.kernels.patches import position_tables as positions


def forward_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor | None, images: Tensor, owner: Tensor, patch: int,
    scale: Sequence[float], shift: Sequence[float], merge: int, mode: str, antialias: bool, align: bool,
) -> Tensor:  # fmt: skip
    dtype = wide(weight.dtype)
    patches, used = _cut(x, images, len(owner), patch, merge, dtype)
    folded, shifts = _per_value(weight.to(dtype), scale, shift)
    offset = (weight.to(dtype) * shifts).sum(1)
    offset = offset if bias is None else bias.to(dtype) + offset
    y = _project(patches, folded, offset, table, images, owner, merge, mode, antialias, align)
    y[used:].zero_()
    return y.to(weight.dtype)


def embed_cpu(
    patches: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, images: Tensor, owner: Tensor, merge: int,
    mode: str, antialias: bool, align: bool,
) -> Tensor:  # fmt: skip
    dtype = wide(weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    y = _project(patches.to(dtype), weight.to(dtype), bias, table, images, owner, merge, mode, antialias, align)
    return y.to(weight.dtype)


def _project(patches, weight, bias, table, images, owner, merge, mode, antialias, align) -> Tensor:
    if table is None:
        return torch.nn.functional.linear(patches, weight, bias)
    y = positions.forward_cpu(table.to(weight.dtype), images, owner, merge, mode, antialias, align)
    y.addmm_(patches, weight.t())
    return y if bias is None else y.add_(bias)


def backward_cpu(
    dy: Tensor, x: Tensor, weight: Tensor, images: Tensor, owner: Tensor, patch: int, scale: Sequence[float],
    shift: Sequence[float], merge: int, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = wide(weight.dtype)
    dx, dw, db = x.new_empty(0), torch.empty_like(weight), weight.new_empty(len(weight))
    if need_weight:
        patches, used = _cut(x, images, len(owner), patch, merge, dtype)
        rows = dy[:used].to(dtype)
        sums = rows.sum(0)
        scaled, shifts = _per_value(rows.t() @ patches[:used], scale, shift)
        dw = scaled.addcmul_(sums[:, None], shifts[None]).to(weight.dtype)
        db = sums.to(weight.dtype)
    if need_x:
        dpatches = dy.to(dtype) @ _per_value(weight.to(dtype), scale, shift)[0]
        dx = torch.zeros_like(x)
        for first, rows, h, w in positions.present(images):
            image = dx[first * patch * patch : (first + rows) * patch * patch].view(h, patch, w, patch, 3)
            part = dpatches[first : first + rows]
            if merge > 1:
                part = part[positions.block_order(h, w, merge).argsort()]
            image.copy_(part.view(h, w, patch, patch, 3).transpose(1, 2))
    return dx, dw, db


def _per_value(matrix: Tensor, scale: Sequence[float], shift: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return matrix [., K] times each channel's scale, and the shift [K] of each value."""
    count = matrix.shape[1] // 3
    scales, shifts = (matrix.new_tensor(values).repeat(count) for values in (scale, shift))
    return matrix * scales, shifts


def _cut(x: Tensor, images: Tensor, patches: int, p: int, merge: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Cut pixels [ΣHW, 3] into patches [P, p·p·3], bytes less 128; return them and how many belong to images."""
    cut = x.new_empty(patches, p * p * 3, dtype=dtype)
    end = 0
    for first, rows, h, w in positions.present(images):
        image = x[first * p * p : (first + rows) * p * p].view(h, p, w, p, 3).transpose(1, 2)
        if merge > 1:
            image = image.reshape(h * w, -1)[positions.block_order(h, w, merge)].view(h, w, p, p, 3)
        cut[first : first + rows].view(h, w, p, p, 3).copy_(image)
        end = first + rows
    cut[end:].zero_()
    if x.dtype == torch.uint8:
        cut[:end] -= 128
    return cut, end
