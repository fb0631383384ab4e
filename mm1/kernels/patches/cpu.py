"""Embed patches and resample positions on a CPU: cut the patches image by image, then multiply all of them at once.

The product is added to the positions. Half precision is computed in fp32, which is about a hundred times faster on CPUs
without half-precision units. Formulas: embedding.py, pixels.py and position_tables.py.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import wide
from mm1.kernels.fallback import Unsupported


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor | None, images: Tensor, owner: Tensor, patch: int,
    scale: Sequence[float], shift: Sequence[float], merge: int, mode: str, antialias: bool, align: bool,
) -> Tensor:  # fmt: skip
    """Embed pixels [ΣHW, 3] -> [P, Dv]; the arguments are those of embedding.forward."""
    dtype = wide(weight.dtype)
    patches, used = _cut(x, images, len(owner), patch, merge, dtype)
    folded, shifts = _per_value(weight.to(dtype), scale, shift)
    offset = (weight.to(dtype) * shifts).sum(1)
    offset = offset if bias is None else bias.to(dtype) + offset
    y = _project(patches, folded, offset, table, images, owner, merge, mode, antialias, align)
    y[used:].zero_()
    return y.to(weight.dtype)


def embed_patches(
    patches: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, images: Tensor, owner: Tensor, merge: int,
    mode: str, antialias: bool, align: bool,
) -> Tensor:  # fmt: skip
    """Embed cut patches [P, K] -> [P, Dv]."""
    dtype = wide(weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    y = _project(patches.to(dtype), weight.to(dtype), bias, table, images, owner, merge, mode, antialias, align)
    return y.to(weight.dtype)


def _project(patches, weight, bias, table, images, owner, merge, mode, antialias, align) -> Tensor:
    if table is None:
        return F.linear(patches, weight, bias)
    y = positions(table.to(weight.dtype), images, owner, merge, mode, antialias, align)
    y.addmm_(patches, weight.t())
    return y if bias is None else y.add_(bias)


def patch_embed_backward(
    dy: Tensor, x: Tensor, weight: Tensor, images: Tensor, owner: Tensor, patch: int, scale: Sequence[float],
    shift: Sequence[float], merge: int, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of pixels, weight and bias; see embedding.backward."""
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
        for first, rows, h, w in _whole_images(images):
            image = dx[first * patch * patch : (first + rows) * patch * patch].view(h, patch, w, patch, 3)
            part = dpatches[first : first + rows]
            if merge > 1:
                part = part[_block_order(h, w, merge).argsort()]
            image.copy_(part.view(h, w, patch, patch, 3).transpose(1, 2))
    return dx, dw, db


def _per_value(matrix: Tensor, scale: Sequence[float], shift: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return matrix [., K] times each channel's scale, and the shift [K] of each value."""
    count = matrix.shape[1] // 3
    scales, shifts = (matrix.new_tensor(values).repeat(count) for values in (scale, shift))
    return matrix * scales, shifts


def _cut(x: Tensor, images: Tensor, patches: int, p: int, merge: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Cut pixels [ΣHW, 3] into patches [P, p·p·3], minus 128 for bytes; return them and the number of used rows."""
    cut = x.new_empty(patches, p * p * 3, dtype=dtype)
    end = 0
    for first, rows, h, w in _whole_images(images):
        image = x[first * p * p : (first + rows) * p * p].view(h, p, w, p, 3).transpose(1, 2)
        if merge > 1:
            image = image.reshape(h * w, -1)[_block_order(h, w, merge)].view(h, w, p, p, 3)
        cut[first : first + rows].view(h, w, p, p, 3).copy_(image)
        end = first + rows
    cut[end:].zero_()
    if x.dtype == torch.uint8:
        cut[:end] -= 128
    return cut, end


def _images(images: Tensor) -> list[tuple[int, int, int, int]]:
    """Return (first row, rows, h, w) of the images that have rows."""
    return [(first, rows, h, w) for first, rows, h, w in images.tolist() if rows]


def _whole_images(images: Tensor) -> list[tuple[int, int, int, int]]:
    """Return what _images returns; raise Unsupported for an image of which some patches are missing."""
    for i, (_, rows, h, w) in enumerate(images.tolist()):
        if rows not in (0, h * w):
            raise Unsupported(f"patch_embed: patches of image {i} is {rows}, expected {h * w}")
    return _images(images)


def positions(
    table: Tensor, images: Tensor, owner: Tensor, merge: int, mode: str, antialias: bool, align: bool
) -> Tensor:
    """Resample table [Gh, Gw, D] -> [P, D]: embedding_bag sums the taps of each place."""
    Gh, Gw, _ = table.shape
    # The taps are computed on the host, whatever the table's device.
    counts = torch.zeros(len(owner) + 1, dtype=torch.int64, device="cpu")
    indices, weights = [counts[:0]], [torch.zeros(0, dtype=torch.float32, device="cpu")]
    for first, rows, h, w in _images(images):
        index, weight = _image_taps(h, w, Gh, Gw, merge, mode, antialias, align)
        counts[first + 1 : first + 1 + rows] = index.shape[1]
        indices.append(index[:rows].view(-1))
        weights.append(weight[:rows].view(-1))
    entries = table.to(wide(table.dtype)).flatten(0, 1)
    y = F.embedding_bag(
        torch.cat(indices).to(table.device), entries, counts.cumsum(0).to(table.device), mode="sum",
        include_last_offset=True, per_sample_weights=torch.cat(weights).to(entries),
    )  # fmt: skip
    return y.to(table.dtype)


def positions_backward(
    dy: Tensor, images: Tensor, shape: Sequence[int], merge: int, mode: str, antialias: bool, align: bool
) -> Tensor:
    """Return the gradient of the table: sum the gradients of equal grids, then multiply by a matrix for each axis."""
    Gh, Gw, N = shape
    dtype = wide(dy.dtype)
    sums: dict[tuple[int, int], Tensor] = {}
    for first, rows, h, w in _images(images):
        part = F.pad(dy[first : first + rows].to(dtype), (0, 0, 0, h * w - rows))
        sums[h, w] = sums[h, w] + part if (h, w) in sums else part
    dtable = dy.new_zeros(Gh, Gw * N, dtype=dtype)
    for (h, w), total in sums.items():
        vertical, horizontal = (
            _resample_matrix(size, out, mode, antialias, align).to(dy.device, dtype) for size, out in ((Gh, h), (Gw, w))
        )
        if merge > 1:
            total = total[_block_order(h, w, merge).argsort()]
        columns = horizontal.t() @ total.view(h, w, N)  # [h, Gw, N]
        dtable.addmm_(vertical.t(), columns.view(h, Gw * N))
    return dtable.view(Gh, Gw, N)


@lru_cache(maxsize=4096)
def _resample_matrix(size: int, out: int, mode: str, antialias: bool, align_corners: bool) -> Tensor:
    """Return fp32 [out, size], the matrix of F.interpolate along one axis: its result for the identity.

    Later calls get the cached result, so it must not depend on the default dtype and device, nor on the grad and
    inference mode of the first call.
    """
    options = {} if mode == "nearest" else {"align_corners": align_corners, "antialias": antialias}
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(size, dtype=torch.float32, device="cpu")[None, None]
        return F.interpolate(identity, (out, size), mode=mode, **options)[0, 0]


@lru_cache(maxsize=1024)
def _image_taps(
    h: int, w: int, Gh: int, Gw: int, merge: int, mode: str, antialias: bool, align: bool
) -> tuple[Tensor, Tensor]:
    """Return int64 and fp32 [h·w, n]: the table entries (of Gh·Gw) of each place of a grid, and their weights."""
    (y, wy), (x, wx) = (_nonzero(_resample_matrix(g, n, mode, antialias, align)) for g, n in ((Gh, h), (Gw, w)))
    index = (y[:, None, :, None] * Gw + x[None, :, None, :]).reshape(h * w, -1)
    weight = (wy[:, None, :, None] * wx[None, :, None, :]).reshape(h * w, -1)
    order = _block_order(h, w, merge)
    return index[order], weight[order]


def _nonzero(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return columns and values of each row's n largest entries; no row has more than n that are not zero."""
    count = int((matrix != 0).sum(1).max())
    index = matrix.abs().topk(count, 1).indices.sort(1).values
    return index, matrix.gather(1, index)


def _block_order(h: int, w: int, merge: int) -> Tensor:
    """Return int64 [h·w], the row-by-row number of each patch in the order of merge × merge blocks."""
    places = torch.arange(h * w, dtype=torch.int64, device="cpu")
    return places.view(h // merge, merge, w // merge, merge).transpose(1, 2).reshape(-1)
