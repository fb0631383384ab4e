"""Resample a table of learned positions to each image's grid, as torch.nn.functional.interpolate does.

    y[p] = Σ_ij wy[i] wx[j] · table[i, j]       over the taps of p's row and column in its image

table [Gh, Gw, D] -> y [P, D]; weights in fp32. Kernels compute a tap's index and weight in a few operations from the
place and the sides of image and table, so the host prepares nothing. Along each axis bilinear has 2 taps, bicubic 4;
with antialiasing 2s or 4s where the axis shrinks by s; an axis of the table's own length has 1. Reads the table, writes
P·D. The gradient is a gather: for each row of the table over the image rows that used it, then a small product along
columns. Source: torch's UpSampleKernel (bilinear, Keys' cubic with a = -0.75, antialiased a = -0.5, nearest).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mm1.kernels.dispatch import (
    cdiv,
    custom_op,
    device_of,
    expect,
    expect_alike,
    expect_float,
    launch,
    power_of_2,
    refuse_second_order,
    strides,
    wide,
)
from mm1.kernels.language import tl, triton
from mm1.kernels.patches import cpu
from mm1.kernels.patches.grids import Grids, as_grids, image_of, load_image

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
BLOCK_ROWS, BLOCK_WIDTH = 16, 128  # the tile of y that one program computes
BLOCK_COLUMNS = 32  # image columns of one step of the gradient
BLOCK_TAPS = 128  # patches whose taps one program computes
TAPS = tl.constexpr(9)  # fields that describe a patch's taps
SIDES = ["Gh", "Gw"]  # of the table: a side of 1 would be a Python int in the kernel, which has no type to convert


@triton.jit
def place_of(inside, w, MERGE: tl.constexpr):
    """Return row and column of an image's patch number `inside`."""
    block = inside // (MERGE * MERGE)
    corner = inside % (MERGE * MERGE)
    across = tl.maximum(w // MERGE, 1)
    return block // across * MERGE + corner // MERGE, block % across * MERGE + corner % MERGE


@triton.jit
def _number_of(row, column, w, MERGE: tl.constexpr):
    """Return the number of the patch at row and column of its image."""
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
def _total(first, count, taps, centre, inverse, MODE: tl.constexpr, ANTIALIAS: tl.constexpr):
    """Return the sum of a place's weights, by which antialiasing divides; taps: an upper bound of count."""
    total = centre * 0.0 + 1.0
    if ANTIALIAS:
        total = centre * 0.0
        for t in range(taps):
            total += tl.where(t < count, _weight(first + t, centre, inverse, MODE, ANTIALIAS), 0.0)
        total = tl.where(count > 0, total, 1.0)
    return total


@triton.jit
def taps_of(row, column, h, w, valid, Gh, Gw, MODE: tl.constexpr, ANTIALIAS: tl.constexpr, ALIGN: tl.constexpr):
    """Return the taps of places of images: number (-1: no image), first, centre and inverse width of the filter along
    rows and columns, and the reciprocal of the total weight."""
    y, ny, cy, iy = _taps(row, h, Gh, MODE, ANTIALIAS, ALIGN)
    x, nx, cx, ix = _taps(column, w, Gw, MODE, ANTIALIAS, ALIGN)
    ny = tl.where(valid, tl.maximum(ny, 0), -1)
    nx = tl.where(valid, nx, 0)
    total = _total(y, ny, tl.max(ny, 0), cy, iy, MODE, ANTIALIAS) * _total(
        x, nx, tl.max(nx, 0), cx, ix, MODE, ANTIALIAS
    )
    return ny, nx, y, x, cy, cx, iy, ix, 1 / total


@triton.jit
def store_taps(
    taps_ptr, rows, P, row, column, h, w, valid, Gh, Gw, HAS_TABLE: tl.constexpr, MODE: tl.constexpr,
    ANTIALIAS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Store the fields of `taps_of` in taps fp32 [TAPS, P]; without a table only the first one, which is 1 or -1."""
    if HAS_TABLE:
        taps = taps_of(row, column, h, w, valid, Gh, Gw, MODE, ANTIALIAS, ALIGN)
        for i in tl.static_range(TAPS):
            tl.store(taps_ptr + tl.cast(P, tl.int64) * i + rows, taps[i].to(tl.float32), rows < P)
    else:
        tl.store(taps_ptr + rows, tl.where(valid, 1.0, -1.0), rows < P)


@triton.jit
def load_taps(taps_ptr, rows, P, HAS_TABLE: tl.constexpr):
    """Load the fields that `store_taps` stored: four int32 [rows], and five fp32."""
    taps = ()
    for i in tl.static_range(TAPS if HAS_TABLE else 1):
        field = tl.load(taps_ptr + tl.cast(P, tl.int64) * i + rows, rows < P, other=-1.0)
        taps = taps + ((field.to(tl.int32) if i < 4 else field),)
    return taps


@triton.jit
def resample(table_ptr, taps, Gh, Gw, offs_n, N, MODE: tl.constexpr, ANTIALIAS: tl.constexpr):
    """Return columns of the table [Gh, Gw, N] at places with these taps, fp32 [rows, len(offs_n)]."""
    ny, nx, y, x, cy, cx, iy, ix, scale = taps
    acc = tl.zeros((ny.shape[0], offs_n.shape[0]), tl.float32)
    for ty in range(tl.max(ny, 0)):
        wy = tl.where(ty < ny, _weight(y + ty, cy, iy, MODE, ANTIALIAS), 0.0) * scale
        at_y = tl.minimum(tl.maximum(y + ty, 0), Gh - 1) * Gw
        for tx in range(tl.max(nx, 0)):
            weight = wy * tl.where(tx < nx, _weight(x + tx, cx, ix, MODE, ANTIALIAS), 0.0)
            at = at_y + tl.minimum(tl.maximum(x + tx, 0), Gw - 1)
            places = at.to(tl.int64)[:, None] * N + offs_n[None, :]
            inside = (weight != 0)[:, None] & (offs_n < N)[None, :]
            acc += weight[:, None] * tl.load(table_ptr + places, inside, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["P", *SIDES])
def _taps_kernel(
    owner_ptr, images_ptr, taps_ptr, P, Gh, Gw, MERGE: tl.constexpr, MODE: tl.constexpr, ANTIALIAS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the taps of every patch."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, first, h, w, valid = image_of(owner_ptr, images_ptr, rows, P)
    row, column = place_of(rows - first, w, MERGE)
    store_taps(taps_ptr, rows, P, row, column, h, w, valid, Gh, Gw, True, MODE, ANTIALIAS, ALIGN)


@triton.jit(do_not_specialize=SIDES)
def _positions_kernel(
    table_ptr, owner_ptr, images_ptr, y_ptr, P, N, Gh, Gw, MERGE: tl.constexpr, MODE: tl.constexpr,
    ANTIALIAS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store a tile of y [P, N]."""
    num_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    _, first, h, w, valid = image_of(owner_ptr, images_ptr, rows, P)
    row, column = place_of(rows - first, w, MERGE)
    taps = taps_of(row, column, h, w, valid, Gh, Gw, MODE, ANTIALIAS, ALIGN)
    y = resample(table_ptr, taps, Gh, Gw, offs_n, N, MODE, ANTIALIAS)
    places = rows.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), (rows < P)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _pull(tap, place, out, size, MODE: tl.constexpr, ANTIALIAS: tl.constexpr, ALIGN: tl.constexpr):
    """Return the weight of table entry `tap` at the place; tap and place broadcast against each other."""
    first, count, centre, inverse = _taps(place, out, size, MODE, ANTIALIAS, ALIGN)
    if ANTIALIAS:
        weight = tl.where((tap >= first) & (tap < first + count), _weight(tap, centre, inverse, MODE, ANTIALIAS), 0.0)
        taps = tl.max(count, 1) if len(count.shape) == 2 else count
        taps = tl.max(taps, 0) if len(count.shape) == 2 else taps
        return weight / _total(first, count, taps, centre, inverse, MODE, ANTIALIAS)
    else:
        weight = tl.zeros_like(tap * centre)
        TAPS: tl.constexpr = 4 if MODE == "bicubic" else (2 if MODE == "bilinear" else 1)
        for t in tl.static_range(TAPS):
            at = tl.minimum(tl.maximum(first + t, 0), size - 1)
            share = tl.where(t < count, _weight(first + t, centre, inverse, MODE, ANTIALIAS), 0.0)
            weight += tl.where(at == tap, share, 0.0)
        return weight


@triton.jit(do_not_specialize=SIDES)
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
        first, count, h, w = load_image(images_ptr, image)
        # The rows whose filter reaches g: their centre is within its support, plus one row for rounding.
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
            # Columns past the image count as zeros, whatever their weight.
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


def empty_taps(owner: Tensor, table: Tensor | None) -> Tensor:
    """Return an uninitialised tensor for the taps of patches in a table, fp32 [fields, P]."""
    return owner.new_empty(1 if table is None else TAPS.value, len(owner), dtype=torch.float32)


def taps(table: Tensor, images: Tensor, owner: Tensor, merge: int, mode: str, antialias: bool, align: bool) -> Tensor:
    """Return the taps of every patch, fp32 [9, P]: the fields of `taps_of`."""
    y, P = empty_taps(owner, table), len(owner)
    launch(
        _taps_kernel, cdiv(P, BLOCK_TAPS), owner_ptr=owner, images_ptr=images, taps_ptr=y, P=P, Gh=table.shape[0],
        Gw=table.shape[1], MERGE=merge, MODE=mode, ANTIALIAS=antialias, ALIGN=align, BLOCK=BLOCK_TAPS, num_warps=4,
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
    half = dy.dtype != torch.float32 and device.vendor == "nvidia"
    block_n, precision = (64, "tf32") if half else (32, "ieee")  # TF32's 11 bits hold a half-precision gradient
    # A few waves of programs, each with its share of the images, summed in a fixed order.
    splits = min(len(images), max(1, cdiv(4 * device.units, Gh * cdiv(N, block_n))))
    share = cdiv(len(images), splits)
    splits = cdiv(len(images), share)
    part = dy.new_empty(splits, Gh, Gw, N, dtype=torch.float32)
    launch(
        _dtable_kernel, splits * Gh * cdiv(N, block_n), dy_ptr=dy, images_ptr=images, part_ptr=part,
        **strides(dy, "stride_p", "stride_n"), images=len(images), N=N, Gh=Gh, Gw=Gw, share=share, MERGE=merge,
        MODE=mode, ANTIALIAS=antialias, ALIGN=align, PRECISION=precision, BLOCK_G=max(16, power_of_2(Gw)),
        BLOCK_C=BLOCK_COLUMNS, BLOCK_N=block_n,
        num_warps=8 if device.family == "sm_89" else 4,  # on sm_89 ptxas spills with 4 warps
    )  # fmt: skip
    return part[0] if splits == 1 else part.sum(0)


_forward = custom_op("positions", forward, cpu.positions)
backward_op = custom_op("positions_backward", backward, cpu.positions_backward)
_forward.register_fake(lambda table, images, owner, *settings: table.new_empty(owner.shape[0], table.shape[2]))
backward_op.register_fake(lambda dy, images, shape, *settings: dy.new_empty(shape, dtype=wide(dy.dtype)))


def _save(ctx, inputs, output):
    table, images, _, *ctx.settings = inputs
    ctx.shape, ctx.dtype = table.shape, table.dtype
    ctx.save_for_backward(images)


def _grad(ctx, dy: Tensor):
    dtable = backward_op(dy, *ctx.saved_tensors, ctx.shape, *ctx.settings).to(ctx.dtype)
    return dtable, *(None,) * 6


_forward.register_autograd(_grad, setup_context=_save)
refuse_second_order(backward_op, "positions")


def positions(
    table: Tensor,
    grids: "Grids | Sequence[tuple[int, int]]",
    interpolation: str = "bilinear",
    antialias: bool = True,
    align_corners: bool = False,
) -> Tensor:
    """Resample table [Gh, Gw, D] to each image's grid; return [P, D] in the table's dtype, zeros in rows of no image.

    grids: the images' (h, w), or Grids. interpolation: "bilinear", "bicubic" or "nearest". The result and both flags
    are those of torch.nn.functional.interpolate. The table is fp32, bf16 or fp16, on a CPU also fp64, and has a
    gradient. Raises ValueError for other shapes, dtypes or settings, TypeError for a table that is no tensor.
    """
    expect_alike("positions", table=table)
    expect(table.ndim == 3 and min(table.shape[:2]) > 0, "positions", "table", tuple(table.shape), "[Gh, Gw, D]")
    expect(interpolation in INTERPOLATIONS, "positions", "interpolation", interpolation, INTERPOLATIONS)
    expect_float("positions", "table", table)
    grids = as_grids(grids, table.device)
    settings = settings_of(interpolation, antialias, align_corners)
    return _forward(table, grids.table, grids.owner, grids.merge, *settings)


def settings_of(interpolation: str, antialias: bool, align_corners: bool) -> tuple[str, bool, bool]:
    """Return the settings of the kernels; nearest uses neither flag, so it must not be compiled for each value."""
    return (interpolation, antialias, align_corners) if interpolation != "nearest" else ("nearest", False, False)
