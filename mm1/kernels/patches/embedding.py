"""Embed the patches of images of any sizes in one packed batch.

    tokens[p] = W · (pixels of patch p / 255 - mean) / std + b + resample(table, grid of p's image)[place of p]

uint8 or float pixels [ΣHW, 3] -> tokens [P, Dv], K = p·p·3 values of a patch in (row, column, channel) order;
2·P·K·Dv operations. Pixels are first cut into patches [P, K] of the weight's dtype (pixels.py), shifted to -128 … 127,
which every dtype represents exactly; mean and std are folded into the weight and the bias. Bytes: 3·ΣHW pixels, P·K
values written and read, P·Dv results. A product that gathers pixels itself moves fewer, but gathers and converts them
again for every tile of columns. The cut also stores where each patch lies in the position table, so that a tile only
adds weighted table entries and the bias to its accumulator.

Only the arguments are saved for backward, which cuts the pixels again.
Source: Dosovitskiy et al. 2021 (ViT), section 3.1 and 3.2 (resampled positions).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mm1.kernels.dispatch import (
    READ,
    Cost,
    cdiv,
    custom_op,
    device_of,
    expect,
    expect_alike,
    expect_float,
    expect_read,
    launch,
    refuse_second_order,
    strides,
    unit_stride,
)
from mm1.kernels.language import tl, triton
from mm1.kernels.patches import cpu, position_tables
from mm1.kernels.patches.grids import Grids, as_grids
from mm1.kernels.patches.pixels import cut, fold, normalisation, scatter, unfold
from mm1.kernels.patches.position_tables import INTERPOLATIONS, SIDES, load_taps, resample, settings_of
from mm1.kernels.patches.tiles import EMBED, EMBED_DW, PatchShape, splits_of
from mm1.kernels.tiles import PART, descriptor, dot, load_rows, part_of, tile_of
from mm1.kernels.tuning import config_for


@triton.jit
def _finish(
    acc, bias_ptr, table_ptr, taps, y_ptr, rows, n, P, N, Gh, Gw, CUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr, MODE: tl.constexpr, ANTIALIAS: tl.constexpr,
):  # fmt: skip
    """Add bias and positions to columns n, n + 1, … of a tile, and store them."""
    offs_n = n + tl.arange(0, acc.shape[1])
    if HAS_TABLE:
        acc += resample(table_ptr, taps, Gh, Gw, offs_n, N, MODE, ANTIALIAS)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, offs_n < N, other=0.0).to(tl.float32)[None, :]
    if CUT:
        acc = tl.where((taps[0] >= 0)[:, None], acc, 0.0)
    places = rows.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptr + places, acc.to(y_ptr.dtype.element_ty), (rows < P)[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["P", *SIDES])
def _embed_kernel(
    x, w, bias_ptr, table_ptr, taps_ptr, y_ptr, P, N, Gh, Gw, stride_x, stride_w, K: tl.constexpr, CUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TABLE: tl.constexpr, MODE: tl.constexpr, ANTIALIAS: tl.constexpr, X_TMA: tl.constexpr,
    W_TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Store y [P, Dv] = patches [P, K] · Wᵀ + bias + positions; CUT: zeros in rows of no image."""
    m, n = tile_of(tl.program_id(0), tl.cdiv(P, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = load_rows(x, tl.minimum(rows, P - 1), m * BLOCK_M, k, stride_x, 1, K, BLOCK_K, X_TMA)
        b = load_rows(w, tl.minimum(columns, N - 1), n * BLOCK_N, k, stride_w, 1, K, BLOCK_K, W_TMA)
        acc = dot(a, b.T, acc)
    taps = load_taps(taps_ptr, rows, P, HAS_TABLE)
    # In parts: a whole tile of table entries and a wide accumulator together spilled registers.
    PARTS: tl.constexpr = BLOCK_N // PART if BLOCK_N > PART else 1
    for p in tl.static_range(PARTS):
        _finish(
            part_of(acc, p, PARTS), bias_ptr, table_ptr, taps, y_ptr, rows, n * BLOCK_N + p * PART, P, N, Gh, Gw, CUT,
            HAS_BIAS, HAS_TABLE, MODE, ANTIALIAS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["P", "share"])
def _embed_dw_kernel(
    x, taps_ptr, dy_ptr, part_ptr, bias_ptr, P, N, stride_x, stride_dm, stride_dn, share, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store part[s] [Dv, K] = dyᵀ · patches and bias[s] = Σ dy, over `share` patches from patch s · share on.

    BLOCK_M is along Dv. x [P, stride_x]: cut patches.
    """
    num_m = tl.cdiv(N, BLOCK_M)
    num_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    split = tl.program_id(0) // (num_m * num_n)
    pid_m = tl.program_id(0) % (num_m * num_n) // num_n
    pid_n = tl.program_id(0) % num_n
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * share
    end = tl.minimum(begin + share, P)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ones = tl.full((BLOCK_K, 16), 1.0, tl.float32).to(dy_ptr.dtype.element_ty)
    bias = tl.zeros((BLOCK_M, 16), tl.float32)  # of equal columns
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        valid = tl.load(taps_ptr + rows, rows < end, other=-1.0) >= 0
        places = rows.to(tl.int64)[:, None] * stride_dm + offs_m.to(tl.int64)[None, :] * stride_dn
        dy = tl.load(dy_ptr + places, valid[:, None] & (offs_m < N)[None, :], other=0.0)
        places = rows.to(tl.int64)[:, None] * stride_x + offs_k[None, :]
        b = tl.load(x + places, (rows < end)[:, None] & (offs_k < stride_x)[None, :], other=0.0)
        acc = dot(dy.T, b, acc)
        if pid_n == 0:
            bias = dot(dy.T, ones, bias)
    places = (split * N + offs_m).to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(part_ptr + places, acc, (offs_m < N)[:, None] & (offs_k < K)[None, :])
    if pid_n == 0:
        tl.store(bias_ptr + split * N + offs_m, tl.max(bias, 1), offs_m < N)


def _embed(
    x: Tensor, k: int, weight: Tensor, bias: Tensor | None, table: Tensor | None, taps: Tensor, cut: bool, mode: str,
    antialias: bool,
) -> Tensor:  # fmt: skip
    """Launch the forward kernel with patches x [P, ≥ k] and weight [Dv, ≥ k], both zero past k or of k columns."""
    P, N, dtype = len(x), len(weight), weight.dtype
    config = config_for(EMBED, PatchShape(P, k, N), dtype, device_of(x))
    y = x.new_empty(P, N, dtype=dtype)
    patches = descriptor(x, [config.block_m, config.block_k], config)
    w = descriptor(weight, [config.block_n, config.block_k], config)
    Gh, Gw = table.shape[:2] if table is not None else (1, 1)
    launch(
        _embed_kernel, cdiv(P, config.block_m) * cdiv(N, config.block_n), x=x if patches is None else patches,
        w=weight if w is None else w, bias_ptr=bias, table_ptr=table if table is None else table.contiguous(),
        taps_ptr=taps, y_ptr=y, P=P, N=N, Gh=Gh, Gw=Gw, stride_x=x.stride(0), stride_w=weight.stride(0),
        K=min(x.shape[1], weight.shape[1]), CUT=cut, HAS_BIAS=bias is not None, HAS_TABLE=table is not None, MODE=mode,
        ANTIALIAS=antialias, X_TMA=patches is not None, W_TMA=w is not None, GROUP_M=config.group_m,
        **config.arguments,
    )  # fmt: skip
    return y


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor | None, images: Tensor, owner: Tensor, patch: int,
    scale: Sequence[float], shift: Sequence[float], merge: int, mode: str, antialias: bool, align: bool,
) -> Tensor:  # fmt: skip
    """Embed pixels x [ΣHW, 3] -> [P, Dv].

    The value of a byte u in channel c is scale[c] · (u - 128) + shift[c], that of a float x is scale[c] · x + shift[c].
    """
    patches, taps = cut(x, table, images, owner, patch, merge, mode, antialias, align, weight.dtype)
    folded, bias = fold(weight, bias, scale, shift)
    return _embed(patches, weight.shape[1], folded, bias, table, taps, True, mode, antialias)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, images: Tensor, owner: Tensor, patch: int, scale: Sequence[float],
    shift: Sequence[float], merge: int, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dW and db; dx is empty, dW and db are undefined where they are not needed."""
    (P, N), K = dy.shape, weight.shape[1]
    device = device_of(x)
    dx, dw, db = x.new_empty(0), torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(N)
    if need_weight:
        config = config_for(EMBED_DW, PatchShape(P, K, N), dy.dtype, device)
        patches, taps = cut(x, None, images, owner, patch, merge, "nearest", False, False, dy.dtype)
        part = cdiv(N, config.block_m) * cdiv(K, config.block_n)
        splits = splits_of(P, part, config, device)
        share = cdiv(cdiv(P, splits), config.block_k) * config.block_k
        splits = cdiv(P, share) if P else 0
        parts = dy.new_empty(splits, N, K, dtype=torch.float32)
        sums = dy.new_empty(splits, N, dtype=torch.float32)
        launch(
            _embed_dw_kernel, splits * part, x=patches, taps_ptr=taps, dy_ptr=dy, part_ptr=parts, bias_ptr=sums, P=P,
            N=N, stride_x=patches.shape[1], **strides(dy, "stride_dm", "stride_dn"), share=share, K=K,
            **config.arguments,
        )  # fmt: skip
        unfold(parts, sums, dw, db, scale, shift)
    if need_x:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)  # pixels of no image have no gradient
        scatter(dy @ fold(weight, None, scale, shift)[0], images, owner, patch, merge, dx)
    return dx, dw, db


def embed(
    patches: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, images: Tensor, owner: Tensor, merge: int,
    mode: str, antialias: bool, align: bool,
) -> Tensor:  # fmt: skip
    """Embed cut patches [P, K] -> [P, Dv]."""
    K = weight.shape[1]
    if weight.stride(1) != 1 or weight.stride(0) * weight.element_size() % 16:
        weight = fold(weight, None, (1.0,) * 3, (0.0,) * 3)[0]
    taps = position_tables.taps(table, images, owner, merge, mode, antialias, align)
    return _embed(unit_stride(patches), K, weight, bias, table, taps, False, mode, antialias)


_forward = custom_op("patch_embed", forward, cpu.patch_embed)
_embed_op = custom_op("embed_patches", embed, cpu.embed_patches)
_backward = custom_op("patch_embed_backward", backward, cpu.patch_embed_backward)


@_embed_op.register_fake
@_forward.register_fake
def _(x, weight, bias, table, images, owner, *settings):
    return weight.new_empty(owner.shape[0], weight.shape[0])


@_backward.register_fake
def _(dy, x, weight, images, owner, patch, scale, shift, merge, need_x, need_weight):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save(ctx, inputs, output):
    x, weight, _, table, images, owner, *ctx.settings = inputs
    ctx.shape, ctx.dtype = (None, None) if table is None else (table.shape, table.dtype)
    ctx.save_for_backward(x, weight, images, owner)


def _grad(ctx, dy: Tensor):
    x, weight, images, owner = ctx.saved_tensors
    patch, scale, shift, merge, *interpolation = ctx.settings
    need_x, need_weight, need_bias, need_table = ctx.needs_input_grad[:4]
    dx = dw = db = dtable = None
    if need_x or need_weight or need_bias:
        need_weight = need_weight or need_bias
        dx, dw, db = _backward(dy, x, weight, images, owner, patch, scale, shift, merge, need_x, need_weight)
    if need_table:
        dtable = position_tables.backward_op(dy, images, ctx.shape, merge, *interpolation).to(ctx.dtype)
    return dx if need_x else None, dw, db if need_bias else None, dtable, *(None,) * 9


def _grad_embed(ctx, dy: Tensor):
    patches, weight, images, _ = ctx.saved_tensors
    merge, *interpolation = ctx.settings
    need_patches, need_weight, need_bias, need_table = ctx.needs_input_grad[:4]
    dtable = None
    if need_table:
        dtable = position_tables.backward_op(dy, images, ctx.shape, merge, *interpolation).to(ctx.dtype)
    dpatches, dw = dy @ weight if need_patches else None, dy.t() @ patches if need_weight else None
    return dpatches, dw, dy.sum(0) if need_bias else None, dtable, *(None,) * 6


_forward.register_autograd(_grad, setup_context=_save)
refuse_second_order(_backward, "patch_embed")
_embed_op.register_autograd(_grad_embed, setup_context=_save)


def patch_embed(
    pixels: Tensor | Sequence[Tensor],
    sizes: "Grids | Sequence[tuple[int, int]]",
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    patch_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = "bilinear",
    antialias: bool = True,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """Embed the patches of N images; return tokens [P, Dv] in the weight's dtype, and cu_seqlens int32 [N+1].

    pixels: list of uint8 or float [H, W, 3], or one packed [ΣHW, 3]. sizes: list of (H, W) in pixels, or the Grids of
    the batch; with Grids, packed pixels may be padded to P · patch_size². weight: [Dv, p·p·3], the values of a patch in
    (row, column, channel) order, or a convolution's [Dv, 3, p, p]. bias [Dv]. pos_embed [Gh, Gw, Dv]: resampled to each
    image's grid as torch.nn.functional.interpolate does, and added; interpolation "bilinear", "bicubic", "nearest", or
    None to add nothing. uint8 pixels are divided by 255; then mean is subtracted and std divides, one value a channel.

    Rows of no image are zeros. Float pixels, weight, bias and pos_embed have gradients. weight is fp32, bf16 or fp16,
    on a CPU also fp64. Raises ValueError for other shapes, dtypes, devices or settings, TypeError for arguments that
    are no tensors.
    """
    op, p = "patch_embed", patch_size
    images = {"pixels": pixels} if isinstance(pixels, Tensor) else {f"pixels[{i}]": x for i, x in enumerate(pixels)}
    expect_alike(op, **images, weight=weight, bias=bias, pos_embed=pos_embed)
    fits = weight.shape[1:] in ((p * p * 3,), (3, p, p))
    expect(fits, op, "weight", tuple(weight.shape),
           f"[Dv, {p * p * 3}] in (row, column, channel) order, or a convolution's [Dv, 3, {p}, {p}]")  # fmt: skip
    weight = weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight
    if isinstance(sizes, Grids):
        grids = sizes.to(weight.device)
    else:
        for height, width in sizes:
            expect(height > 0 and width > 0, op, "sizes", (height, width), "positive sides")
            expect(height % p == 0 and width % p == 0, op, "sizes", (height, width), f"multiples of {p}")
        grids = Grids([(height // p, width // p) for height, width in sizes], device=weight.device)
    if not isinstance(pixels, Tensor):
        shapes = [tuple(image.shape) for image in pixels]
        expected = [(h * p, w * p, 3) for h, w in grids.sizes or ()]
        expect(shapes == expected, op, "pixels", shapes, expected)
        pixels = torch.cat([image.reshape(-1, 3) for image in pixels]) if shapes else weight.new_zeros(0, 3)
    shape, area = tuple(pixels.shape), p * p
    # Compare with the padded size first: the number of used rows must not become a constant of a compiled program.
    fits = shape == (grids.patches * area, 3) or grids.used is None or shape == (grids.used * area, 3)
    expect(fits, op, "pixels", shape, (grids.patches * area, 3))
    expect(pixels.dtype in (torch.uint8, *READ), op, "dtype of pixels", pixels.dtype, (torch.uint8, *READ))
    scale_shift = normalisation(op, pixels.dtype == torch.uint8, mean, std)
    table, *settings = _table(op, pos_embed, weight, bias, interpolation, antialias, align_corners)
    tokens = _forward(
        pixels.contiguous(), weight, bias, table, grids.table, grids.owner, p, *scale_shift, grids.merge, *settings
    )
    return tokens, grids.cu_seqlens


def embed_patches(
    patches: Tensor,
    grids: "Grids | Sequence[tuple[int, int]]",
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    interpolation: str | None = "bilinear",
    antialias: bool = True,
    align_corners: bool = False,
) -> Tensor:
    """Embed cut patches [P, K]: patches · weightᵀ + bias + positions, [P, Dv] in the weight's dtype.

    weight [Dv, K], bias [Dv], pos_embed [Gh, Gw, Dv]; grids: the images' (h, w), or Grids. patches may have any float
    dtype. Rows of no image are projected like all others, and get no position. Positions, gradients, dtypes and errors
    are those of patch_embed.
    """
    op = "embed_patches"
    expect_alike(op, patches=patches, weight=weight, bias=bias, pos_embed=pos_embed)
    grids = as_grids(grids, weight.device)
    expect(patches.ndim == 2, op, "patches", tuple(patches.shape), "[P, K]")
    expect(patches.shape[0] == grids.patches, op, "rows of patches", patches.shape[0], grids.patches)
    expect(weight.ndim == 2 and weight.shape[1] == patches.shape[1], op, "weight",
           tuple(weight.shape), f"[Dv, {patches.shape[1]}]")  # fmt: skip
    table, *settings = _table(op, pos_embed, weight, bias, interpolation, antialias, align_corners)
    expect_read(op, "patches", patches)
    patches = patches.to(weight.dtype)
    if table is None:
        return torch.nn.functional.linear(patches, weight, bias)
    return _embed_op(patches, weight, bias, table, grids.table, grids.owner, grids.merge, *settings)


def _table(op, table, weight, bias, interpolation, antialias, align_corners):
    """Check weight, bias and table; return the table, None for no positions, and the settings of its resampling."""
    width = weight.shape[0]
    expect_float(op, "weight", weight)
    expect_read(op, "bias", bias)
    expect_read(op, "pos_embed", table)
    expect(bias is None or bias.shape == (width,), op, "bias", bias is not None and tuple(bias.shape), f"[{width}]")
    expect(interpolation in (*INTERPOLATIONS, None), op, "interpolation", interpolation, (*INTERPOLATIONS, None))
    if table is None or interpolation is None:
        return None, *settings_of("nearest", False, False)
    expect(table.ndim == 3 and table.shape[2] == width and min(table.shape) > 0, op, "pos_embed", tuple(table.shape),
           f"[Gh, Gw, {width}]")  # fmt: skip
    return table, *settings_of(interpolation, antialias, align_corners)


def cost(patches: int, width: int, k: int, *, table: int = 0, itemsize: int = 2, bytes_in: int = 1) -> Cost:
    """Return the cost of patch_embed or embed_patches.

    k: values of a patch, of bytes_in bytes each (1: uint8 pixels). table: Gh·Gw, the entries of the position table.
    Backward costs the same, with gradients of weight, bias and table but not of pixels.
    """
    weights = (k * width + table * width) * itemsize
    return Cost(2 * patches * k * width, patches * k * bytes_in + patches * width * itemsize + weights)
