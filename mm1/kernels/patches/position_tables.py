"""Resample a table of learned positions to each image's grid, as torch.nn.functional.interpolate does.

    y[p] = Σ_ij wy[i] wx[j] · table[i, j]       over the taps of p's row and column in its image

table [Gh, Gw, D] -> y [P, D]; weights in fp32. Kernels compute a tap's index and weight from the place and the sides of
image and table in a few operations, so the host prepares nothing. Bilinear takes 2 taps an axis, bicubic 4;
antialiasing takes 2s or 4s where an axis shrinks by s; an axis of the table's own length takes 1. Reads the table,
writes P·D. The gradient is a gather: for each row of the table the image rows that used it, then along columns one
small product. Source: torch's UpSampleKernel (bilinear, Keys' cubic with a = -0.75, antialiased a = -0.5, nearest).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import (
    Device,
    cdiv,
    device_of,
    expect,
    expect_alike,
    expect_float,
    launch,
    on_cpu,
    power_of_2,
    refuse_second_order,
    strides,
    wide,
)
from mm1.kernels.language import tl, triton
from mm1.kernels.patches.grids import Grids, as_grids, image_of

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", None)
BLOCK_ROWS, BLOCK_WIDTH = 16, 128  # tile of y that one program computes
BLOCK_COLUMNS = 32  # image columns one step of the gradient takes


@triton.jit
def place_of(inside, w, MERGE: tl.constexpr):
    """Return row and column of an image's patch number `inside`."""
    if MERGE == 1:
        return inside // w, inside % w
    else:
        block = inside // (MERGE * MERGE)
        corner = inside % (MERGE * MERGE)
        across = tl.maximum(w // MERGE, 1)
        return block // across * MERGE + corner // MERGE, block % across * MERGE + corner % MERGE


@triton.jit
def _number_of(row, column, w, MERGE: tl.constexpr):
    """Return the number of the patch at row and column of its image."""
    if MERGE == 1:
        return row * w + column
    else:
        block = row // MERGE * (w // MERGE) + column // MERGE
        return block * (MERGE * MERGE) + row % MERGE * MERGE + column % MERGE


@triton.jit
def _scale(out, size, ALIGN: tl.constexpr):
    """Return the distance in the table that corresponds to one patch of the image."""
    if ALIGN:
        return tl.where(out > 1, (size - 1).to(tl.float32) / tl.maximum(out - 1, 1).to(tl.float32), 0.0)
    else:
        return size.to(tl.float32) / tl.maximum(out, 1).to(tl.float32)  # an absent image has no side


@triton.jit
def _taps(place, out, size, MODE: tl.constexpr, ANTIALIAS: tl.constexpr, ALIGN: tl.constexpr):
    """Return first tap, number of taps, centre and inverse width of the filter for places on an axis of `out`."""
    scale = _scale(out, size, ALIGN)
    inverse = scale * 0.0 + 1.0
    at = place.to(tl.float32)
    if MODE == "nearest":
        first = tl.minimum((at * scale).to(tl.int32), size - 1)
        count = first * 0 + 1
        centre = first.to(tl.float32)
    elif ANTIALIAS:
        support = tl.maximum(scale, 1.0) * (2.0 if MODE == "bicubic" else 1.0)
        inverse = 1.0 / tl.maximum(scale, 1.0)
        centre = scale * (at + 0.5)
        first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
        count = tl.minimum((centre + support + 0.5).to(tl.int32), size) - first
        centre -= 0.5
    else:
        centre = at * scale if ALIGN else (at + 0.5) * scale - 0.5
        if MODE == "bicubic":
            first = tl.floor(centre).to(tl.int32) - 1
            count = first * 0 + 4
        else:
            centre = tl.maximum(centre, 0.0)
            first = centre.to(tl.int32)
            count = first * 0 + 2
    same = out == size
    return (
        tl.where(same, place, first),
        tl.where(same, 1, count),
        tl.where(same, at, centre),
        tl.where(same, 1.0, inverse),
    )


@triton.jit
def _weight(tap, centre, inverse, MODE: tl.constexpr, ANTIALIAS: tl.constexpr):
    """Return a tap's weight before division by the total."""
    x = tl.abs(tap.to(tl.float32) - centre) * inverse
    if MODE == "bicubic":
        A = -0.5 if ANTIALIAS else -0.75
        near = ((A + 2) * x - (A + 3)) * x * x + 1
        far = ((A * x - 5 * A) * x + 8 * A) * x - 4 * A
        return tl.where(x <= 1, near, tl.where(x < 2, far, 0.0))
    elif MODE == "bilinear":
        return tl.maximum(1 - x, 0.0)
    else:
        return x * 0.0 + 1.0


@triton.jit
def _total(first, count, most, centre, inverse, MODE: tl.constexpr, ANTIALIAS: tl.constexpr):
    """Return the sum of a place's weights, by which antialiasing divides."""
    total = centre * 0.0 + 1.0
    if ANTIALIAS:
        total = centre * 0.0
        for t in range(most):
            total += tl.where(t < count, _weight(first + t, centre, inverse, MODE, ANTIALIAS), 0.0)
        total = tl.where(count > 0, total, 1.0)
    return total


@triton.jit
def resample(
    table_ptr, row, column, h, w, there, Gh, Gw, offs_n, N, MODE: tl.constexpr, ANTIALIAS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Return fp32 [rows, len(offs_n)] of the table [Gh, Gw, N] at places of images; zeros where `there` is false."""
    y, ny, cy, iy = _taps(row, h, Gh, MODE, ANTIALIAS, ALIGN)
    x, nx, cx, ix = _taps(column, w, Gw, MODE, ANTIALIAS, ALIGN)
    ny = tl.where(there, ny, 0)
    nx = tl.where(there, nx, 0)
    most_y = tl.max(ny, 0)
    most_x = tl.max(nx, 0)
    total = _total(y, ny, most_y, cy, iy, MODE, ANTIALIAS) * _total(x, nx, most_x, cx, ix, MODE, ANTIALIAS)
    acc = tl.zeros((row.shape[0], offs_n.shape[0]), tl.float32)
    for ty in range(most_y):
        wy = tl.where(ty < ny, _weight(y + ty, cy, iy, MODE, ANTIALIAS), 0.0) / total
        at_y = tl.minimum(tl.maximum(y + ty, 0), Gh - 1) * Gw
        for tx in range(most_x):
            weight = wy * tl.where(tx < nx, _weight(x + tx, cx, ix, MODE, ANTIALIAS), 0.0)
            at = at_y + tl.minimum(tl.maximum(x + tx, 0), Gw - 1)
            places = at.to(tl.int64)[:, None] * N + offs_n[None, :]
            inside = (weight != 0)[:, None] & (offs_n < N)[None, :]
            acc += weight[:, None] * tl.load(table_ptr + places, inside, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _positions_kernel(
    table_ptr, owner_ptr, images_ptr, y_ptr, P, N, Gh, Gw, MERGE: tl.constexpr, MODE: tl.constexpr,
    ANTIALIAS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store a tile of y [P, N]."""
    num_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    _, first, h, w, there = image_of(owner_ptr, images_ptr, rows, P)
    row, column = place_of(rows - first, w, MERGE)
    y = resample(table_ptr, row, column, h, w, there, Gh, Gw, offs_n, N, MODE, ANTIALIAS, ALIGN)
    places = rows.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), (rows < P)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _pull(tap, place, out, size, MODE: tl.constexpr, ANTIALIAS: tl.constexpr, ALIGN: tl.constexpr):
    """Return the weight of table entry `tap` at the place; tap and place broadcast against each other."""
    first, count, centre, inverse = _taps(place, out, size, MODE, ANTIALIAS, ALIGN)
    if ANTIALIAS:
        weight = tl.where((tap >= first) & (tap < first + count), _weight(tap, centre, inverse, MODE, ANTIALIAS), 0.0)
        most = tl.max(count, 1) if len(count.shape) == 2 else count
        most = tl.max(most, 0) if len(count.shape) == 2 else most
        return weight / _total(first, count, most, centre, inverse, MODE, ANTIALIAS)
    else:
        weight = tl.zeros_like(tap * centre)
        TAPS: tl.constexpr = 4 if MODE == "bicubic" else (2 if MODE == "bilinear" else 1)
        for t in tl.static_range(TAPS):
            at = tl.minimum(tl.maximum(first + t, 0), size - 1)
            share = tl.where(t < count, _weight(first + t, centre, inverse, MODE, ANTIALIAS), 0.0)
            weight += tl.where(at == tap, share, 0.0)
        return weight


@triton.jit
def _dtable_kernel(
    dy_ptr, images_ptr, part_ptr, stride_p, stride_n, images, N, Gh, Gw, share, MERGE: tl.constexpr,
    MODE: tl.constexpr, ANTIALIAS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store part[s, g] [Gw, N], the gradient of the table's row g from `share` images from s · share on."""
    num_n = tl.cdiv(N, BLOCK_N)
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.program_id(0) // num_n % Gh
    split = tl.program_id(0) // num_n // Gh
    offs_g = tl.arange(0, BLOCK_G)
    acc = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    for image in range(split * share, tl.minimum(split * share + share, images)):
        first = tl.load(images_ptr + image * 4)
        count = tl.load(images_ptr + image * 4 + 1)
        h = tl.load(images_ptr + image * 4 + 2)
        w = tl.load(images_ptr + image * 4 + 3)
        # Rows whose filter reaches g: their centre is within its support, with one row more for rounding.
        scale = _scale(h, Gh, ALIGN)
        reach = tl.maximum(scale, 1.0) * (2.0 if MODE == "bicubic" else 1.0) + 0.5
        begin = tl.where(scale > 0, (g - reach) / tl.maximum(scale, 1e-6) - 1.0, 0.0)
        end = tl.where(scale > 0, (g + reach) / tl.maximum(scale, 1e-6) + 2.0, h.to(tl.float32))
        begin = tl.minimum(tl.maximum(begin, 0.0), h.to(tl.float32)).to(tl.int32)
        end = tl.minimum(tl.maximum(end, 0.0), h.to(tl.float32)).to(tl.int32)
        for c in range(0, tl.where(count > 0, w, 0), BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            line = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
            for step in range(end - begin):
                row = begin + step
                weight = _pull(g, row, h, Gh, MODE, ANTIALIAS, ALIGN)
                if weight != 0:
                    inside = _number_of(row, offs_c, w, MERGE)
                    valid = (offs_c < w) & (inside < count)
                    places = (first + inside).to(tl.int64)[:, None] * stride_p + offs_n[None, :] * stride_n
                    dy = tl.load(dy_ptr + places, valid[:, None] & (offs_n < N)[None, :], other=0.0)
                    line += weight * dy.to(tl.float32)
            # Columns past the image hold zeros, whatever weight they would have.
            pull = _pull(offs_g[:, None], offs_c[None, :], w, Gw, MODE, ANTIALIAS, ALIGN)
            acc = tl.dot(tl.where((offs_c < w)[None, :], pull, 0.0), line, acc, input_precision=PRECISION)
    places = ((split * Gh + g).to(tl.int64) * Gw + offs_g)[:, None] * N + offs_n[None, :]
    tl.store(part_ptr + places, acc, (offs_g < Gw)[:, None] & (offs_n < N)[None, :])


def forward(
    table: Tensor, images: Tensor, owner: Tensor, merge: int, mode: str, antialias: bool, align: bool
) -> Tensor:
    """Resample table [Gh, Gw, D] -> [P, D]."""
    (Gh, Gw, N), P = table.shape, len(owner)
    y = table.new_empty(P, N)
    launch(
        _positions_kernel, cdiv(P, BLOCK_ROWS) * cdiv(N, BLOCK_WIDTH), table_ptr=table.contiguous(), owner_ptr=owner,
        images_ptr=images, y_ptr=y, P=P, N=N, Gh=Gh, Gw=Gw, MERGE=merge, MODE=mode, ANTIALIAS=antialias, ALIGN=align,
        BLOCK_M=BLOCK_ROWS, BLOCK_N=BLOCK_WIDTH, num_warps=4,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, images: Tensor, shape: Sequence[int], merge: int, mode: str, antialias: bool, align: bool
) -> Tensor:
    """Return the gradient of the table, fp32 of `shape` [Gh, Gw, D], from dy [P, D]."""
    Gh, Gw, N = shape
    device = device_of(dy)
    if len(images) == 0:
        return dy.new_zeros(Gh, Gw, N, dtype=torch.float32)
    block_n, precision = _product(dy.dtype, device)
    # A few waves of programs, each with its share of the images, summed in an order that does not depend on timing.
    splits = min(len(images), max(1, cdiv(4 * device.units, Gh * cdiv(N, block_n))))
    share = cdiv(len(images), splits)
    splits = cdiv(len(images), share)
    part = dy.new_empty(splits, Gh, Gw, N, dtype=torch.float32)
    launch(
        _dtable_kernel, splits * Gh * cdiv(N, block_n), dy_ptr=dy, images_ptr=images, part_ptr=part,
        **strides(dy, "stride_p", "stride_n"), images=len(images), N=N, Gh=Gh, Gw=Gw, share=share, MERGE=merge,
        MODE=mode, ANTIALIAS=antialias, ALIGN=align, PRECISION=precision, BLOCK_G=max(16, power_of_2(Gw)),
        BLOCK_C=BLOCK_COLUMNS, BLOCK_N=block_n,
        num_warps=8 if device.arch == "sm_89" else 4,  # with four, ptxas uses 96 registers on sm_89, and spills
    )  # fmt: skip
    return part[0] if splits == 1 else part.sum(0)


def _product(dtype: torch.dtype, device: Device) -> tuple[int, str]:
    """Return width and precision of the product along columns; TF32's 11 bits hold a half-precision gradient."""
    half = dtype != torch.float32 and device.arch.startswith("sm_")
    return (64, "tf32") if half else (32, "ieee")


_forward = torch.library.custom_op("mm1::positions", forward, mutates_args=())
_backward = torch.library.custom_op("mm1::positions_backward", backward, mutates_args=())


def present(images: Tensor) -> list[tuple[int, int, int, int]]:
    """Return (first row, rows, h, w) of the images that have rows."""
    return [(first, rows, h, w) for first, rows, h, w in images.tolist() if rows]


def forward_cpu(
    table: Tensor, images: Tensor, owner: Tensor, merge: int, mode: str, antialias: bool, align: bool
) -> Tensor:
    """Resample on a CPU: sum the taps of each place by embedding_bag."""
    Gh, Gw, N = table.shape
    counts = table.new_zeros(len(owner) + 1, dtype=torch.int64)
    indices, weights = [table.new_zeros(0, dtype=torch.int64)], [table.new_zeros(0, dtype=torch.float32)]
    for first, rows, h, w in present(images):
        index, weight = _image_taps(h, w, Gh, Gw, merge, mode, antialias, align)
        counts[first + 1 : first + 1 + rows] = index.shape[1]
        indices.append(index[:rows].view(-1))
        weights.append(weight[:rows].view(-1))
    entries = table.to(wide(table.dtype)).reshape(Gh * Gw, N)
    y = F.embedding_bag(
        torch.cat(indices), entries, counts.cumsum(0), mode="sum", include_last_offset=True,
        per_sample_weights=torch.cat(weights).to(entries.dtype),
    )  # fmt: skip
    return y.to(table.dtype)


def backward_cpu(
    dy: Tensor, images: Tensor, shape: Sequence[int], merge: int, mode: str, antialias: bool, align: bool
) -> Tensor:
    """Return the table's gradient on a CPU: sum gradients of equal grids, then multiply by one matrix for each axis."""
    Gh, Gw, N = shape
    dtype = wide(dy.dtype)
    sums: dict[tuple[int, int], Tensor] = {}
    for first, rows, h, w in present(images):
        part = F.pad(dy[first : first + rows].to(dtype), (0, 0, 0, h * w - rows))
        sums[h, w] = sums[h, w] + part if (h, w) in sums else part
    dtable = dy.new_zeros(Gh, Gw * N, dtype=dtype)
    for (h, w), total in sums.items():
        vertical, horizontal = (
            resample_matrix(size, out, mode, antialias, align).to(dtype) for size, out in ((Gh, h), (Gw, w))
        )
        if merge > 1:
            total = total[block_order(h, w, merge).argsort()]
        columns = horizontal.t() @ total.view(h, w, N)  # [h, Gw, N]
        dtable.addmm_(vertical.t(), columns.view(h, Gw * N))
    return dtable.view(Gh, Gw, N)


@lru_cache(maxsize=4096)
def resample_matrix(size: int, out: int, mode: str, antialias: bool, align_corners: bool) -> Tensor:
    """Return fp32 [out, size], the matrix of F.interpolate along one axis: its result for the identity.

    The result is cached for all later calls, so it depends neither on the default dtype and device nor on the grad and
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
    """Return int64 and fp32 [h·w, n]: table entries (of Gh·Gw) and their weights for every place of one grid."""
    (y, wy), (x, wx) = (_nonzero(resample_matrix(g, n, mode, antialias, align)) for g, n in ((Gh, h), (Gw, w)))
    index = (y[:, None, :, None] * Gw + x[None, :, None, :]).reshape(h * w, -1)
    weight = (wy[:, None, :, None] * wx[None, :, None, :]).reshape(h * w, -1)
    order = block_order(h, w, merge)
    return index[order], weight[order]


def _nonzero(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return columns and values of each row's largest entries, as many as the fullest row has that are not zero."""
    count = int((matrix != 0).sum(1).max())
    index = matrix.abs().topk(count, 1).indices.sort(1).values
    return index, matrix.gather(1, index)


def block_order(h: int, w: int, merge: int) -> Tensor:
    """Return int64 [h·w], the row-by-row number of each patch in the order of merge × merge blocks."""
    places = torch.arange(h * w, dtype=torch.int64, device="cpu")
    return places.view(h // merge, merge, w // merge, merge).transpose(1, 2).reshape(-1)


on_cpu(_forward, forward_cpu)
on_cpu(_backward, backward_cpu)


@_forward.register_fake
def _(table, images, owner, merge, mode, antialias, align):
    return table.new_empty(owner.shape[0], table.shape[2])


@_backward.register_fake
def _(dy, images, shape, merge, mode, antialias, align):
    return dy.new_empty(shape, dtype=wide(dy.dtype))


def _save(ctx, inputs, output):
    table, images, _, *ctx.settings = inputs
    ctx.shape, ctx.dtype = table.shape, table.dtype
    ctx.save_for_backward(images)


def _grad(ctx, dy: Tensor):
    dtable = _backward(dy, *ctx.saved_tensors, ctx.shape, *ctx.settings).to(ctx.dtype)
    return dtable, *(None,) * 6


_forward.register_autograd(_grad, setup_context=_save)
refuse_second_order(_backward, "positions")


def positions(
    table: Tensor,
    grids: "Grids | Sequence[tuple[int, int]]",
    interpolation: str = "bilinear",
    antialias: bool = True,
    align_corners: bool = False,
) -> Tensor:
    """Resample table [Gh, Gw, D] to each image's grid; return [P, D] in the table's dtype, zeros in rows of no image.

    grids: the images' (h, w), or Grids. interpolation: "bilinear", "bicubic" or "nearest"; the result and both settings
    are those of torch.nn.functional.interpolate. The table is fp32, bf16 or fp16, on a CPU also fp64, and has a
    gradient. Raises ValueError for other shapes, dtypes or settings.
    """
    expect_alike("positions", table=table)
    expect(table.ndim == 3 and min(table.shape[:2]) > 0, "positions", "table", tuple(table.shape), "[Gh, Gw, D]")
    expect_interpolation("positions", interpolation, INTERPOLATIONS[:-1])
    expect_float("positions", "table", table)
    grids = as_grids(grids, table.device)
    # Nearest has neither setting; their values must not compile another kernel.
    settings = (interpolation, antialias, align_corners) if interpolation != "nearest" else ("nearest", False, False)
    return _forward(table, grids.table, grids.owner, grids.merge, *settings)


def expect_interpolation(op: str, interpolation: Any, names: Sequence[str | None]) -> None:
    """Raise ValueError unless the interpolation is one of `names`."""
    expect(interpolation in names, op, "interpolation", interpolation, names)
