"""Predict patches by a linear layer, and compare each with its own pixels, normalised patch by patch, in one op.

    loss[r] = 1/K · Σ_k (W x_r + b - t_r)_k²,   t = (n - mean(n)) / sqrt(var(n) + eps),   n = (pixels/255 - mean) / std

x [R, D], W [K, D], uint8 pixels [ΣHW, C] -> fp32 [R], K = p·q·C values in (row, column, channel) order; var is the
unbiased variance of a patch's K values. Neither predictions nor float pixels are in memory: a first kernel gathers the
patches of the rows as bytes, and a program of the second keeps a tile of predictions in registers, subtracts targets
that it computes from bytes there, and stores sums of squares of each row. With D = 2048 and K = 588 in bf16 a row reads
4 KB of x and 0.6 KB of bytes; predictions that are stored and read again would add 2.3 KB.

A target is a_c (N u - S_c) + b_c of the byte u, where N = p·q and S_c sums the patch's bytes in channel c: the
parenthesis is an exact integer, so that a patch without contrast has targets of zero, whatever its mean.

2·R·K·D operations forward. Only the arguments are saved, so backward computes the product again: the second kernel
stores g · (prediction - target) of some rows at a time, and torch's products read them for dx and dW, together 6·R·K·D.
Kernels for dx and dW that compute the predictions themselves would save these 2.3 KB a row, but take 8·R·K·D.
Source: El-Nouby et al. 2024 (AIM), section 3.2 (loss); He et al. 2022 (MAE), section 3 (normalised targets).
"""

from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import Tensor

from mm1.kernels.dispatch import (
    Cost,
    autocast_dtype,
    cdiv,
    custom_op,
    device_of,
    expect,
    expect_alike,
    expect_float,
    expect_integers,
    expect_read,
    launch,
    power_of_2,
    refuse_second_order,
    unit_stride,
    wide,
    without_autocast,
)
from mm1.kernels.language import tl, triton
from mm1.kernels.linear_cross_entropy import wide_product
from mm1.kernels.patches.grids import Grids, as_grids, image_of
from mm1.kernels.patches.pixels import CENTRE, normalisation
from mm1.kernels.patches.position_tables import place_of
from mm1.kernels.patches.targets import Targets, places
from mm1.kernels.patches.targets import errors as plain_errors
from mm1.kernels.patches.tiles import LOSS, PatchShape
from mm1.kernels.tiles import PART, descriptor, dot, load_rows, part_of, tile_of
from mm1.kernels.tuning import config_for

# Bytes of a chunk's errors [rows, K], which stay in the cache of a CPU.
CHUNK = {"cuda": 256 << 20, "cpu": 2 << 20}
ROWS, PIXELS = 8, 64  # the tile that a program of the first kernel gathers at once
MOST_PIXELS = 65536  # of a patch: sums of their bytes are exact in fp32
_CENTRE = tl.constexpr(CENTRE)


@triton.jit(do_not_specialize=["R", "P"])
def _gather_kernel(
    pixels_ptr, rows_ptr, owner_ptr, images_ptr, bytes_ptr, valid_ptr, target_ptr, R, P, eps, UNIT: tl.constexpr,
    SHIFT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, MERGE: tl.constexpr,
    K_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the patch of each row as bytes [R, K_PADDED], whether it has one, and its a, S and b [R, 3, C].

    UNIT: each channel's scale / N.
    """
    N: tl.constexpr = HEIGHT * WIDTH
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    patch = tl.load(rows_ptr + at, at < R, other=-1).to(tl.int64)
    patch = tl.where((patch >= 0) & (patch < P), patch, P)  # P: of no image
    _, first, _, w, valid = image_of(owner_ptr, images_ptr, patch, P)
    row, column = place_of(patch - first, w, MERGE)
    line = w * (WIDTH * CHANNELS)
    begin = first.to(tl.int64) * (N * CHANNELS) + row * HEIGHT * line + column * (WIDTH * CHANNELS)
    tl.store(valid_ptr + at, valid, at < R)
    c = tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.int64)
    for start in range(0, N, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = i // WIDTH * line[:, None] + (i % WIDTH * CHANNELS)[None, :]
        places = begin[:, None, None] + inside[:, :, None] + c[None, None, :]
        real = (i < N)[None, :, None] & (c < CHANNELS)[None, None, :]
        value = tl.load(pixels_ptr + places, valid[:, None, None] & real, other=0)
        places = at[:, None, None] * K_PADDED + (i * CHANNELS)[None, :, None] + c[None, None, :]
        tl.store(bytes_ptr + places, value, (at < R)[:, None, None] & real)
        u = value.to(tl.int32)
        sums += tl.sum(u, 1)
        squares += tl.sum(u * u, 1).to(tl.int64)
    unit = tl.zeros((BLOCK_C,), tl.float32)
    shift = tl.zeros((BLOCK_C,), tl.float32)
    for channel in tl.static_range(CHANNELS):
        unit = tl.where(c == channel, UNIT[channel], unit)
        shift = tl.where(c == channel, SHIFT[channel], shift)
    spread = (N * squares - sums.to(tl.int64) * sums).to(tl.float32)  # N² times the variance of a channel's bytes
    means = (sums - _CENTRE * N).to(tl.float32) * unit[None, :] + shift[None, :]
    # Differences of channels' means, which are exact zeros where the channels are alike.
    means -= tl.sum(tl.where(c == 0, means, 0.0), 1)[:, None]
    means = tl.where(c < CHANNELS, means - (tl.sum(tl.where(c < CHANNELS, means, 0.0), 1) / CHANNELS)[:, None], 0.0)
    total = tl.sum(spread * unit * unit + means * means, 1) * N
    FREE: tl.constexpr = N * CHANNELS - 1 if N * CHANNELS > 1 else 1
    inverse = 1 / tl.sqrt(total / FREE + eps)
    places = at[:, None] * (3 * CHANNELS) + c[None, :]
    mask = (at < R)[:, None] & (c < CHANNELS)[None, :]
    tl.store(target_ptr + places, inverse[:, None] * unit[None, :], mask)
    tl.store(target_ptr + places + CHANNELS, sums.to(tl.float32), mask)
    tl.store(target_ptr + places + 2 * CHANNELS, inverse[:, None] * means, mask)


@triton.jit
def _minus_target(
    acc, bias_ptr, bytes_ptr, valid_ptr, target_ptr, rows, n, R, AREA: tl.constexpr, CHANNELS: tl.constexpr,
    K_PADDED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Add the bias to columns from n on and subtract their targets; return zeros past K and in rows of no patch."""
    k = n + tl.arange(0, acc.shape[1])
    real = rows < R
    at = rows.to(tl.int64)
    # Bytes past K are loaded and dropped, for the sake of a mask that allows wide loads.
    places = at[:, None] * K_PADDED + k[None, :]
    u = tl.load(bytes_ptr + places, real[:, None] & (k < K_PADDED)[None, :], other=0).to(tl.float32) * AREA
    target = tl.zeros(acc.shape, tl.float32)
    for channel in tl.static_range(CHANNELS):
        field = target_ptr + at * (3 * CHANNELS) + channel
        a = tl.load(field, real, other=0.0)
        total = tl.load(field + CHANNELS, real, other=0.0)
        b = tl.load(field + 2 * CHANNELS, real, other=0.0)
        value = (u - total[:, None]) * a[:, None] + b[:, None]
        target = tl.where((k % CHANNELS == channel)[None, :], value, target)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + k, k < AREA * CHANNELS, other=0.0).to(tl.float32)[None, :]
    valid = tl.load(valid_ptr + rows, real, other=0) != 0
    return tl.where(valid[:, None] & (k < AREA * CHANNELS)[None, :], acc - target, 0.0)


@triton.jit(do_not_specialize=["R"])
def _error_kernel(
    x, w, bias_ptr, bytes_ptr, valid_ptr, target_ptr, g_ptr, y_ptr, R, stride_x, stride_w, D: tl.constexpr,
    AREA: tl.constexpr, CHANNELS: tl.constexpr, K_PADDED: tl.constexpr, HAS_BIAS: tl.constexpr, GRAD: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute a tile of errors x [R, D] · Wᵀ + bias - targets, and store y.

    y: the sum of each row's squares over PART columns [., R]; with GRAD the errors times g [R], [R, K_PADDED].
    """
    K: tl.constexpr = AREA * CHANNELS
    m, n = tile_of(tl.program_id(0), tl.cdiv(R, BLOCK_M), (K + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_K):
        a = load_rows(x, tl.minimum(rows, R - 1), m * BLOCK_M, d, stride_x, 1, D, BLOCK_K, X_TMA)
        b = load_rows(w, tl.minimum(columns, K - 1), n * BLOCK_N, d, stride_w, 1, D, BLOCK_K, W_TMA)
        acc = dot(a, b.T, acc)
    PARTS: tl.constexpr = BLOCK_N // PART if BLOCK_N > PART else 1
    for p in tl.static_range(PARTS):
        part = part_of(acc, p, PARTS)
        first = n * BLOCK_N + p * PART
        error = _minus_target(
            part, bias_ptr, bytes_ptr, valid_ptr, target_ptr, rows, first, R, AREA, CHANNELS, K_PADDED, HAS_BIAS
        )
        if GRAD:
            k = first + tl.arange(0, part.shape[1])
            error *= tl.load(g_ptr + rows, rows < R, other=0.0)[:, None]
            places = rows.to(tl.int64)[:, None] * K_PADDED + k[None, :]
            mask = (rows < R)[:, None] & (k < K_PADDED)[None, :]
            tl.store(y_ptr + places, error.to(y_ptr.dtype.element_ty), mask)
        else:
            # Stored part by part: for a sum over all of them the loads of all parts were issued at once, and spilled.
            sums = y_ptr + (n * PARTS + p) * R.to(tl.int64) + rows
            tl.store(sums, tl.sum(error * error, 1), rows < R)


def _gather(targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's patch uint8 [R, K_PADDED], whether it has one, and the fp32 fields a, S and b [R, 3, C]."""
    R, C = len(targets.rows), targets.pixels.shape[1]
    patches = targets.pixels.new_empty(R, cdiv(targets.area * C, 16) * 16)
    valid = targets.rows.new_empty(R, dtype=torch.bool)
    fields = targets.rows.new_empty(R, 3, C, dtype=torch.float32)
    launch(
        _gather_kernel, cdiv(R, ROWS), pixels_ptr=targets.pixels, rows_ptr=targets.rows, owner_ptr=targets.owner,
        images_ptr=targets.images, bytes_ptr=patches, valid_ptr=valid, target_ptr=fields, R=R, P=len(targets.owner),
        eps=targets.eps, UNIT=tuple(s / targets.area for s in targets.scale), SHIFT=tuple(targets.shift),
        HEIGHT=targets.height, WIDTH=targets.width, CHANNELS=C, MERGE=targets.merge, K_PADDED=patches.shape[1],
        BLOCK_M=ROWS, BLOCK_I=PIXELS, BLOCK_C=power_of_2(C), num_warps=4,
    )  # fmt: skip
    return patches, valid, fields


def _errors(
    x: Tensor, w: Tensor, bias: Tensor | None, area: int, gathered: tuple[Tensor, ...], g: Tensor | None
) -> Tensor:
    """Return sums of squared errors over some columns, fp32 [., R]; with g [R] the errors times g, [R, K]."""
    (R, D), K, (patches, valid, fields) = x.shape, len(w), gathered
    config = config_for(LOSS, PatchShape(R, D, K), x.dtype, device_of(x))
    if g is None:
        y = x.new_empty(cdiv(K, config.block_n) * cdiv(config.block_n, PART.value), R, dtype=torch.float32)
    else:  # aligned rows, without which products of 16 bits are slow
        y = x.new_empty(R, patches.shape[1])
    rows = descriptor(x, [config.block_m, config.block_k], config)
    columns = descriptor(w, [config.block_n, config.block_k], config)
    launch(
        _error_kernel, cdiv(R, config.block_m) * cdiv(K, config.block_n), x=x if rows is None else rows,
        w=w if columns is None else columns, bias_ptr=bias, bytes_ptr=patches, valid_ptr=valid, target_ptr=fields,
        g_ptr=g, y_ptr=y, R=R, stride_x=x.stride(0), stride_w=w.stride(0), D=D, AREA=area, CHANNELS=K // area,
        K_PADDED=patches.shape[1], HAS_BIAS=bias is not None, GRAD=g is not None, X_TMA=rows is not None,
        W_TMA=columns is not None, GROUP_M=config.group_m, **config.arguments,
    )  # fmt: skip
    return y if g is None else y[:, :K]


def _chunks(rows: int, row_bytes: int, device: torch.device) -> list[slice]:
    """Return slices of the rows, whose errors take at most CHUNK bytes; all of about one size."""
    count = cdiv(rows * row_bytes, CHUNK["cpu" if device.type == "cpu" else "cuda"])
    step = cdiv(rows, max(count, 1))
    return [slice(first, first + step) for first in range(0, rows, max(step, 1))]


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, pixels: Tensor, rows: Tensor, geometry: Sequence[Tensor],
    patch: Sequence[int], scale: Sequence[float], shift: Sequence[float], eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the loss of each row, fp32 [R].

    geometry: table and owner of Grids. patch: height, width, merge. scale, shift: of u - 128. dtype: of the product.
    """
    targets = Targets.of(pixels, rows, geometry, patch, scale, shift, eps)
    x, w = (unit_stride(tensor.to(dtype)) for tensor in (x, weight))
    return _errors(x, w, bias, targets.area, _gather(targets), None).sum(0) / len(w)


def _plain(x, weight, bias, pixels, rows, geometry, patch, scale, shift, eps, dtype) -> Tensor:
    """Compute `forward` in plain torch; half precision is computed in fp32."""
    targets = Targets.of(pixels, rows, geometry, patch, scale, shift, eps)
    (R, _), (K, _), to = x.shape, weight.shape, wide(dtype)
    w, bias = weight.to(dtype).to(to), None if bias is None else bias.to(to)
    begin, line, valid = places(targets)
    loss = x.new_empty(R, dtype=to)
    for part in _chunks(R, K * to.itemsize, x.device):
        errors = plain_errors(x[part].to(dtype).to(to), w, bias, targets, begin[part], line[part])
        torch.linalg.vector_norm(errors, dim=1, out=loss[part])
    return torch.where(valid, loss.square_().div_(K), 0)


def backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pixels: Tensor, rows: Tensor,
    geometry: Sequence[Tensor], patch: Sequence[int], scale: Sequence[float], shift: Sequence[float], eps: float,
    dtype: torch.dtype, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight and bias from g [R]; those that `need` refuses have no rows."""
    targets = Targets.of(pixels, rows, geometry, patch, scale, shift, eps)
    gathered, w = _gather(targets), unit_stride(weight.to(dtype))

    def errors(part: slice, x: Tensor, g: Tensor) -> Tensor:
        return _errors(x, w, bias, targets.area, tuple(each[part] for each in gathered), g)

    return _gradients(errors, g, gathered[1], x, weight, bias, (dtype, dtype), need)


def _plain_backward(
    g, x, weight, bias, pixels, rows, geometry, patch, scale, shift, eps, dtype, need
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `backward` in plain torch."""
    targets, to = Targets.of(pixels, rows, geometry, patch, scale, shift, eps), wide(dtype)
    w, wide_bias = weight.to(dtype).to(to), None if bias is None else bias.to(to)
    begin, line, valid = places(targets)

    def errors(part: slice, x: Tensor, g: Tensor) -> Tensor:
        return plain_errors(x, w, wide_bias, targets, begin[part], line[part]).mul_(g[:, None])

    return _gradients(errors, g, valid, x, weight, bias, (dtype, to), need)


def _gradients(
    errors: Callable[[slice, Tensor, Tensor], Tensor], g: Tensor, valid: Tensor, x: Tensor, weight: Tensor,
    bias: Tensor | None, dtypes: tuple[torch.dtype, torch.dtype], need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the results of `backward`.

    errors(part, x, g): g times the errors of a slice of the rows. dtypes: x and weight are rounded to the first one;
    products are computed in the second.
    """
    (R, D), (rounded, dtype), (need_x, need_weight, need_bias) = x.shape, dtypes, need
    w, K = weight.to(rounded).to(dtype), len(weight)
    g = torch.where(valid, g, 0) * (2 / K)
    power = None
    if dtype == torch.float16 and R > 0:  # the share of one row in a mean over many would vanish
        power = torch.ldexp(torch.ones_like(g[0]), torch.frexp(g.abs().amax()).exponent)
        g = g / power
    dx = x.new_empty(R if need_x else 0, D, dtype=dtype)
    dw = x.new_zeros(K if need_weight else 0, D, dtype=wide(dtype))
    db = x.new_zeros(K if need_bias else 0, dtype=wide(dtype))
    for part in _chunks(R, K * dtype.itemsize, x.device):
        x_part = unit_stride(x[part].to(rounded).to(dtype))
        e = errors(part, x_part, g[part])
        if need_x:
            torch.mm(e, w, out=dx[part])
        if need_weight and dtype == dw.dtype:
            dw.addmm_(e.t(), x_part)
        elif need_weight:
            dw += wide_product(e.t(), x_part)
        if need_bias:
            db += e.sum(0, dtype=db.dtype)
    dx = dx.to(x.dtype)
    if power is not None:
        dx, dw, db = dx.mul_(power), dw.mul_(power), db.mul_(power)
    return dx, dw.to(weight.dtype), db.to(weight.dtype if bias is None else bias.dtype)


_forward = custom_op("patch_loss", forward, _plain)
_backward = custom_op("patch_loss_backward", without_autocast(backward), _plain_backward)


@_forward.register_fake
def _(x, weight, bias, pixels, rows, geometry, patch, scale, shift, eps, dtype):
    return x.new_empty(x.shape[0], dtype=wide(dtype))


@_backward.register_fake
def _(g, x, weight, bias, pixels, rows, geometry, patch, scale, shift, eps, dtype, need):
    (R, D), K = x.shape, weight.shape[0]
    return (
        x.new_empty(R if need[0] else 0, D), weight.new_empty(K if need[1] else 0, D),
        (weight if bias is None else bias).new_empty(K if need[2] else 0),
    )  # fmt: skip


def _save(ctx, inputs, output):
    *tensors, geometry, ctx.patch, ctx.scale, ctx.shift, ctx.eps, ctx.dtype = inputs
    ctx.save_for_backward(*tensors, *geometry)


def _grad(ctx, g: Tensor):
    *tensors, images, owner = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    settings = ctx.patch, ctx.scale, ctx.shift, ctx.eps, ctx.dtype
    gradients = _backward(g, *tensors, [images, owner], *settings, need)
    dx, dw, db = (gradient if needed else None for gradient, needed in zip(gradients, need))
    return dx, dw, db, None, None, [None, None], *(None,) * 5


_forward.register_autograd(_grad, setup_context=_save)
refuse_second_order(_backward, "patch_loss")


def patch_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pixels: Tensor,
    rows: Tensor,
    grids: "Grids | Sequence[tuple[int, int]]",
    *,
    patch_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    eps: float = 1e-6,
) -> Tensor:
    """Return the mean squared error of x · weightᵀ + bias and the normalised patches `rows`, fp32 [R] (fp64 for fp64).

    x [R, D], weight [p·q·C, D] and bias [p·q·C] in fp32, bf16 or fp16, on a CPU also fp64. pixels: uint8 [ΣHW, C],
    packed image after image, row by row. rows: int [R], patches of the packed batch; a row of no patch (-1 is padding)
    has a loss and gradients of zero. grids: the images' (h, w) in patches, or Grids, with which pixels may be padded.
    patch_size: height and width in pixels, (p, q), or one number for both. The target is (pixels / 255 - mean) / std in
    (row, column, channel) order, minus the patch's own mean, divided by √(variance + eps); the variance is the unbiased
    one of the patch's p·q·C values. Patches of one value and patches without contrast have targets of zero.

    x, weight and bias have gradients. Products are computed in autocast's dtype, or in the weight's without autocast.
    Gradients of gradients and forward-mode derivatives raise RuntimeError; other shapes, dtypes, devices or settings
    raise ValueError.
    """
    op = "patch_loss"
    expect_alike(op, x=x, weight=weight, bias=bias, pixels=pixels, rows=rows)
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    expect(height > 0 and width > 0 and height * width <= MOST_PIXELS, op, "patch_size", patch_size,
           f"positive sides of at most {MOST_PIXELS} pixels")  # fmt: skip
    expect(eps > 0 and isfinite(eps), op, "eps", eps, "a positive number")
    expect(pixels.dtype == torch.uint8, op, "dtype of pixels", pixels.dtype, torch.uint8)
    grids, area = as_grids(grids, weight.device), height * width
    expect(pixels.ndim == 2 and pixels.shape[1] > 0, op, "pixels", tuple(pixels.shape), [grids.patches * area, "C"])
    channels, shape = pixels.shape[1], tuple(pixels.shape)
    # Compare with the padded size first: the number of used rows must not become a constant of a compiled program.
    fits = shape[0] == grids.patches * area or grids.used is None or shape[0] == grids.used * area
    expect(fits, op, "pixels", shape, (grids.patches * area, channels))
    expect(x.ndim == 2, op, "x", tuple(x.shape), "[R, D]")
    K = area * channels
    expect(weight.shape == (K, x.shape[1]), op, "weight", tuple(weight.shape), (K, x.shape[1]))
    expect(bias is None or bias.shape == (K,), op, "bias", bias is not None and tuple(bias.shape), f"[{K}]")
    expect_float(op, "x", x)
    expect_float(op, "weight", weight)
    expect_read(op, "bias", bias)
    expect_integers(op, "rows", rows, 1)
    expect(rows.shape == x.shape[:1], op, "rows", tuple(rows.shape), tuple(x.shape[:1]))
    scale, shift = normalisation(op, True, mean, std, channels)
    dtype = autocast_dtype(weight) or weight.dtype
    return _forward(
        x, weight, None if bias is None else bias.contiguous(), pixels.contiguous(), rows.contiguous(),
        [grids.table, grids.owner], [height, width, grids.merge], scale, shift, eps, dtype,
    )  # fmt: skip


def cost(rows: int, width: int, k: int, *, itemsize: int = 2, backward: bool = False) -> Cost:
    """Return the cost of patch_loss; backward: of the gradients of x, weight and bias, which need the product again.

    k: values of a patch, each of one byte.
    """
    once = (rows + k) * width * itemsize
    if backward:
        return Cost(6 * rows * width * k, 2 * once + rows * (k + 4))
    return Cost(2 * rows * width * k, once + rows * (k + 4))
