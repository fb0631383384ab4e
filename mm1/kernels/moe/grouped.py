"""Multiply rows sorted by expert by their expert's matrix.

    y[r]  = a[r] · b[e] (+ bias[e])   for rows r of expert e: offsets[e-1] ≤ r < offsets[e];  0 past the last offset
    dw[e] = a[rows of e]ᵀ · dy[rows of e],   zeros for an expert without rows

a [M, K], b [E, K, N] -> y [M, N]; b may have any strides, so that a weight [E, N, K] is passed as its transpose.
2·M·K·N operations; at least M·(K + N) + E·K·N elements are read or written.
"""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mm1.kernels import tiles
from mm1.kernels.cost_model import Predicted, Product
from mm1.kernels.device import Device
from mm1.kernels.dispatch import (
    Cost,
    cdiv,
    custom_op,
    device_of,
    expect,
    expect_alike,
    expect_float,
    expect_tensor,
    launch,
    strides,
)
from mm1.kernels.language import tl, triton
from mm1.kernels.moe import reference
from mm1.kernels.tiles import (
    Config,
    Shape,
    dot,
    load_rows,
    load_weight,
    mapped_tile,
    split_columns,
    store_tile,
    tile_of,
)
from mm1.kernels.tuning import Tunable, config_for


@triton.jit(do_not_specialize=["num_m"])
def _gemm_kernel(
    a, b, b2, bias_ptr, y_ptr, y_desc, tiles_ptr, stride_am, stride_ak, stride_be, stride_bk, stride_bn, stride_b2e,
    stride_b2k, stride_b2n, stride_ym, E, K, N, num_m, A_TMA: tl.constexpr, B_TMA: tl.constexpr, Y_TMA: tl.constexpr,
    PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Store y [M, N]; PAIR: a is [M, 2K], and b2 multiplies the second half of its columns."""
    num_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        expert, row, end, pid_n = mapped_tile(tiles_ptr, tile, num_m, num_n, GROUP_M)
        if expert >= 0:
            n = pid_n * BLOCK_N
            rows = tl.minimum(row + tl.arange(0, BLOCK_M), end - 1)
            depth = tl.where(expert < E, K, 0)  # rows past the last offset are zeros
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, depth, BLOCK_K):
                tile_a = load_rows(a, rows, row, k, stride_am, stride_ak, K, BLOCK_K, A_TMA)
                tile_b = load_weight(b, expert, k, n, stride_be, stride_bk, stride_bn, K, N, BLOCK_K, BLOCK_N, B_TMA)
                acc = dot(tile_a, tile_b, acc)
            if PAIR:
                # The second half of a's columns. Where K is not a multiple of BLOCK_K the loop above read columns of
                # this half too, and multiplied them by zeros: b has no rows past K.
                for k in range(0, depth, BLOCK_K):
                    tile_a = load_rows(a, rows, row, K + k, stride_am, stride_ak, 2 * K, BLOCK_K, A_TMA)
                    tile_b = load_weight(
                        b2, expert, k, n, stride_b2e, stride_b2k, stride_b2n, K, N, BLOCK_K, BLOCK_N, B_TMA
                    )
                    acc = dot(tile_a, tile_b, acc)
            if HAS_BIAS:
                offs_n = n + tl.arange(0, BLOCK_N)
                inside = offs_n < tl.where(expert < E, N, 0)
                acc += tl.load(bias_ptr + expert.to(tl.int64) * N + offs_n, inside, other=0.0).to(tl.float32)[None, :]
            store_tile(y_ptr, y_desc, acc, row, end, n, stride_ym, N, BLOCK_M, BLOCK_N, Y_TMA)


@triton.jit
def _load_columns(
    x_ptr, x_desc, slots_ptr, row, end, column, stride_m, stride_n, N, FAN: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Load [BLOCK_K, BLOCK_N] of x from `row` on; MASKED: rows before `end` only.

    FAN > 0: a row is that of its slot's token, and each token has FAN slots.
    """
    if TMA and not MASKED:
        return x_desc.load([row, column])
    else:
        rows = row + tl.arange(0, BLOCK_K)
        offs_n = column + tl.arange(0, BLOCK_N)
        inside = (offs_n < N)[None, :]
        if MASKED:
            inside = inside & (rows < end)[:, None]
        if FAN > 0:
            rows = tl.load(slots_ptr + tl.minimum(rows, end - 1)) // FAN
        places = rows.to(tl.int64)[:, None] * stride_m + offs_n.to(tl.int64)[None, :] * stride_n
        return tl.load(x_ptr + places, inside, other=0.0)


@triton.jit
def _dw_kernel(
    a_ptr, a_desc, b_ptr, b_desc, slots_ptr, scale_ptr, w_ptr, bias_ptr, offsets_ptr, by_size_ptr, stride_am, stride_ak,
    stride_bm, stride_bn, stride_we, stride_wk, stride_wn, stride_se, stride_sk, E, K, N, A_FAN: tl.constexpr,
    B_FAN: tl.constexpr, A_TMA: tl.constexpr, B_TMA: tl.constexpr, ACCUMULATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Store w[e] [K, N] (+)= Σ aᵀ b over the expert's rows, and bias[e] [K] = Σ a, with HAS_SCALE times the scale."""
    num_m = tl.cdiv(K, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), E * num_m * num_n, tl.num_programs(0)):
        expert = tl.load(by_size_ptr + tile // (num_m * num_n))
        pid_m, pid_n = tile_of(tile % (num_m * num_n), num_m, num_n, GROUP_M)
        m = pid_m * BLOCK_M
        n = pid_n * BLOCK_N
        begin = tl.load(offsets_ptr + expert - 1, expert > 0, other=0)
        end = tl.load(offsets_ptr + expert)
        whole = begin + (end - begin) // BLOCK_K * BLOCK_K
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        bias = tl.zeros((BLOCK_M,), tl.float32)
        for row in range(begin, whole, BLOCK_K):
            a = _load_columns(
                a_ptr, a_desc, slots_ptr, row, end, m, stride_am, stride_ak, K, A_FAN, A_TMA, False, BLOCK_K, BLOCK_M
            )
            b = _load_columns(
                b_ptr, b_desc, slots_ptr, row, end, n, stride_bm, stride_bn, N, B_FAN, B_TMA, False, BLOCK_K, BLOCK_N
            )
            acc = dot(a.T, b, acc)
            if HAS_BIAS:
                bias += _column_sums(a, slots_ptr, scale_ptr, row, end, HAS_SCALE, BLOCK_K)
        if whole < end:
            a = _load_columns(
                a_ptr, a_desc, slots_ptr, whole, end, m, stride_am, stride_ak, K, A_FAN, A_TMA, True, BLOCK_K, BLOCK_M
            )
            b = _load_columns(
                b_ptr, b_desc, slots_ptr, whole, end, n, stride_bm, stride_bn, N, B_FAN, B_TMA, True, BLOCK_K, BLOCK_N
            )
            acc = dot(a.T, b, acc)
            if HAS_BIAS:
                bias += _column_sums(a, slots_ptr, scale_ptr, whole, end, HAS_SCALE, BLOCK_K)
        w = w_ptr + expert.to(tl.int64) * stride_we
        _store_dw(acc, w, m, n, stride_wk, stride_wn, K, N, ACCUMULATE, BLOCK_M, BLOCK_N)
        if HAS_BIAS:
            offs_m = m + tl.arange(0, BLOCK_M)
            bias_ptrs = bias_ptr + expert.to(tl.int64) * stride_se + offs_m * stride_sk
            tl.store(bias_ptrs, bias.to(bias_ptr.dtype.element_ty), offs_m < tl.where(pid_n == 0, K, 0))


@triton.jit
def _store_dw(
    acc, w_ptr, m, n, stride_k, stride_n, K, N, ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store a tile of w[e]; ACCUMULATE: add it, 64 columns at a time: with 256 at once 121 instructions spill."""
    if ACCUMULATE and BLOCK_N > 64:
        left, right = split_columns(acc, BLOCK_M, BLOCK_N)
        _store_dw(left, w_ptr, m, n, stride_k, stride_n, K, N, ACCUMULATE, BLOCK_M, BLOCK_N // 2)
        _store_dw(right, w_ptr, m, n + BLOCK_N // 2, stride_k, stride_n, K, N, ACCUMULATE, BLOCK_M, BLOCK_N // 2)
    else:
        offs_m = m + tl.arange(0, BLOCK_M)
        offs_n = n + tl.arange(0, BLOCK_N)
        w_ptrs = w_ptr + (offs_m.to(tl.int64)[:, None] * stride_k + offs_n.to(tl.int64)[None, :] * stride_n)
        inside = (offs_m < K)[:, None] & (offs_n < N)[None, :]
        if ACCUMULATE:
            acc += tl.load(w_ptrs, inside, other=0.0)
        tl.store(w_ptrs, acc.to(w_ptr.dtype.element_ty), inside)


@triton.jit
def _column_sums(a, slots_ptr, scale_ptr, row, end, HAS_SCALE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the sums of a's columns, each row times its slot's scale."""
    a = a.to(tl.float32)
    if HAS_SCALE:
        rows = row + tl.arange(0, BLOCK_K)
        slots = tl.load(slots_ptr + rows, rows < end, other=0)
        a = a * tl.load(scale_ptr + slots, rows < end, other=0.0)[:, None]
    return tl.sum(a, 0)


class DwShape(NamedTuple):
    """Hold the sizes of a weight gradient: an expert's result [k, n] is a reduction over its rows."""

    rows: int
    experts: int
    k: int
    n: int
    gathered: bool = False  # the rows of one operand are those of the slots' tokens
    bias: bool = False


def legal_dw(config: Config, shape: DwShape, dtype: torch.dtype, device: Device) -> bool:
    """Tell whether the kernel fits into shared memory and registers."""
    # With tiles of 128 × 256 the sums for the bias spilled registers on an H200.
    return tiles.legal(config, _tiled(shape), dtype, device, stores=False) and not (shape.bias and config.block_n > 128)


def default_dw(shape: DwShape, dtype: torch.dtype, device: Device) -> Config:
    """Choose the configuration of a product with many rows, with at most 128 columns where a bias is summed."""
    config = tiles.default(_tiled(shape), dtype, device)
    return replace(config, block_n=min(config.block_n, 128)) if shape.bias else config


def work_dw(config: Config, shape: DwShape, dtype: torch.dtype, device: Device) -> Product:
    """Describe the work of one run, with rows spread evenly over experts."""
    count = shape.experts * cdiv(shape.k, config.block_m) * cdiv(shape.n, config.block_n)
    moved = shape.rows * (shape.k + shape.n) + shape.experts * shape.k * shape.n
    m, n, k, size = config.block_m, config.block_n, config.block_k, dtype.itemsize
    by_addresses = m * k * (not config.tma) + n * k * (shape.gathered or not config.tma)
    return Product(
        count, cdiv(shape.rows, shape.experts), m, n, k, config.warps, config.stages,
        tiles.shared_bytes(config, _tiled(shape), size, device, stores=False), moved * size, size,
        addressed=by_addresses, finishing=5.5, programs=1 if config.persistent else None,
    )  # fmt: skip


def _tiled(shape: DwShape) -> Shape:
    """Return the sizes of a product with the same tiles."""
    return Shape(shape.k, 1, 128, shape.n)


GEMM = Tunable("grouped_gemm", Shape, Config, tiles.space, tiles.legal, tiles.default, tiles.seconds)
DW = Tunable("grouped_gemm_dw", DwShape, Config, tiles.space, legal_dw, default_dw, Predicted(work_dw))


def gemm(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None = None, b2: Tensor | None = None, *, tail: bool = False,
    maps: tiles.Maps | None = None,
) -> Tensor:  # fmt: skip
    """Launch the forward kernel: a [M, K] · b [E, K, N] by expert -> [M, N].

    b2 [E, K, N] multiplies the second half of the columns of a, which is then [M, 2K]. tail: fill rows past the last
    offset with zeros; else they are undefined. maps: those of `offsets`, which the caller's products share.
    """
    M, (E, K, N) = a.shape[0], b.shape
    device, y = device_of(a), a.new_empty(M, N)
    if y.numel() == 0:
        return y
    config = config_for(GEMM, Shape(M, E, K, N), a.dtype, device)
    tile_map, _, num_m = (maps or tiles.Maps(offsets)).of(M, config.block_m, tail)
    a_desc = tiles.descriptor(a, [config.block_m, config.block_k], config)
    pair, b2 = b2 is not None, b if b2 is None else b2
    b_any, b2_any, order = tiles.weight_operands(config, b, b2)
    config = tiles.narrowed(config, order)
    y_desc = tiles.descriptor(y, [config.block_m, config.block_n], config)
    grid = tiles.programs(num_m * cdiv(N, config.block_n), config, device)
    launch(
        _gemm_kernel, grid, a=a if a_desc is None else a_desc, b=b_any, b2=b2_any, bias_ptr=bias, y_ptr=y,
        y_desc=y_desc, tiles_ptr=tile_map, **strides(a, "stride_am", "stride_ak"),
        **strides(b, "stride_be", "stride_bk", "stride_bn"), **strides(b2, "stride_b2e", "stride_b2k", "stride_b2n"),
        stride_ym=y.stride(0), E=E, K=K, N=N, num_m=num_m, A_TMA=a_desc is not None, B_TMA=order,
        Y_TMA=y_desc is not None, PAIR=pair, HAS_BIAS=bias is not None, GROUP_M=config.group_m, **config.arguments,
    )  # fmt: skip
    return y


def dw(
    a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, *, slots: Tensor | None = None, a_fan: int = 0, b_fan: int = 0,
    bias: Tensor | None = None, scale: Tensor | None = None, accumulate: bool = False, maps: tiles.Maps | None = None,
) -> None:  # fmt: skip
    """Launch the weight-gradient kernel: out [E, K, N] (+)= aᵀ b by expert, over its rows of a [., K] and b [., N].

    a_fan, b_fan: where not 0, the operand's row is slots[row] // fan. bias [E, K] receives the sums of a's rows, each
    times scale[slots[row]] if there is a scale. accumulate: add to `out` instead of overwriting it. maps: as for gemm.
    """
    E, K, N = out.shape
    if K == 0 or (N == 0 and bias is None):
        return
    if N == 0:  # the sums of a alone
        b, out, N = b.new_zeros(len(b), 1), out.new_empty(E, K, 1), 1
    device = device_of(a)
    shape = DwShape(len(a) if b_fan else len(b), E, K, N, bool(a_fan or b_fan), bias is not None)
    config = config_for(DW, shape, a.dtype, device)
    a_desc = None if a_fan else tiles.descriptor(a, [config.block_k, config.block_m], config)
    b_desc = None if b_fan else tiles.descriptor(b, [config.block_k, config.block_n], config)
    grid = tiles.programs(E * cdiv(K, config.block_m) * cdiv(N, config.block_n), config, device)
    # A row of a token takes two loads, slot and row; Triton for CUDA gives each of them half of the stages.
    stages = 2 * config.stages - 1 if shape.gathered and device.vendor == "nvidia" else config.stages
    launch(
        _dw_kernel, grid, a_ptr=a, a_desc=a_desc, b_ptr=b, b_desc=b_desc, slots_ptr=slots,
        scale_ptr=scale, w_ptr=out, bias_ptr=bias, offsets_ptr=offsets,
        by_size_ptr=(maps or tiles.Maps(offsets)).by_size,
        **strides(a, "stride_am", "stride_ak"), **strides(b, "stride_bm", "stride_bn"),
        **strides(out, "stride_we", "stride_wk", "stride_wn"), **strides(bias, "stride_se", "stride_sk"), E=E, K=K,
        N=N, A_FAN=a_fan, B_FAN=b_fan, A_TMA=a_desc is not None, B_TMA=b_desc is not None, ACCUMULATE=accumulate,
        HAS_BIAS=bias is not None, HAS_SCALE=scale is not None, GROUP_M=config.group_m,
        **config.arguments | {"num_stages": stages},
    )  # fmt: skip


def _gemm(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return gemm(a, b, offsets, bias, tail=True)


def _dw_and_sums(a: Tensor, dy: Tensor, offsets: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Return dw [E, K, N] and, with `bias`, the bias's gradient [E, N]."""
    out = a.new_empty(len(offsets), a.shape[1], dy.shape[1])
    sums = a.new_empty(len(offsets), dy.shape[1] if bias else 0)
    # The kernel sums the rows of its first operand, so with a bias it computes the transpose.
    if bias:
        dw(dy, a, offsets, out.transpose(1, 2), bias=sums)
    else:
        dw(a, dy, offsets, out)
    return out, sums


def _accumulate(a: Tensor, dy: Tensor, offsets: Tensor, into: Tensor) -> None:
    dw(a, dy, offsets, into, accumulate=True)


def _dw_cpu(a: Tensor, dy: Tensor, offsets: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    sums = [dy[begin:end].sum(0) if bias else dy.new_empty(0) for begin, end in pairwise([0, *offsets.tolist()])]
    return reference.grouped_gemm_dw(a, dy, offsets), torch.stack(sums)


def _accumulate_cpu(a: Tensor, dy: Tensor, offsets: Tensor, into: Tensor) -> None:
    into += reference.grouped_gemm_dw(a.float(), dy.float(), offsets)


_forward = custom_op("grouped_gemm", _gemm, reference.grouped_gemm)
_dw = custom_op("grouped_gemm_dw", _dw_and_sums, _dw_cpu)
_dw_into = custom_op("grouped_gemm_dw_", _accumulate, _accumulate_cpu, mutates=("into",))


@_forward.register_fake
def _(a, b, offsets, bias):
    return a.new_empty(a.shape[0], b.shape[2])


@_dw.register_fake
def _(a, dy, offsets, bias):
    sums = a.new_empty(offsets.shape[0], dy.shape[1] if bias else 0)
    return a.new_empty(offsets.shape[0], a.shape[1], dy.shape[1]), sums


def _save(ctx, inputs, output):
    a, b, offsets, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(a, b, offsets)


def _backward(ctx, dy: Tensor):
    a, b, offsets = ctx.saved_tensors
    da = _forward(dy, b.transpose(1, 2), offsets, None) if ctx.needs_input_grad[0] else None
    db = dbias = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        db, dbias = _dw(a, dy, offsets, ctx.has_bias)
    return da, db, None, dbias if ctx.has_bias else None


def _save_dw(ctx, inputs, output):
    a, dy, offsets, ctx.bias = inputs
    ctx.save_for_backward(a, dy, offsets)


def _backward_dw(ctx, ddw: Tensor, dsums: Tensor):
    a, dy, offsets = ctx.saved_tensors
    da = _forward(dy, ddw.transpose(1, 2), offsets, None) if ctx.needs_input_grad[0] else None
    ddy = _forward(a, ddw, offsets, dsums if ctx.bias else None) if ctx.needs_input_grad[1] else None
    return da, ddy, None, None


_forward.register_autograd(_backward, setup_context=_save)
_dw.register_autograd(_backward_dw, setup_context=_save_dw)


def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a[r] · b[e] (+ bias[e]) for each row r of expert e, [M, N]; rows past the last offset are zeros.

    a [M, K], b [E, K, N] of any strides and bias [E, N] have one dtype: fp32, bf16 or fp16, on a CPU also fp64.
    offsets int32 [E], ascending: the end of each expert's rows, on a's device. Raises ValueError for other shapes,
    dtypes or devices. a, b and bias have gradients, and these gradients are differentiable again.
    """
    op = "grouped_gemm"
    expect_alike(op, a=a, b=b, offsets=offsets, bias=bias)
    expect_float(op, "a", a)
    expect(a.ndim == 2 and b.ndim == 3, op, "a and b", (tuple(a.shape), tuple(b.shape)), "[M, K], [E, K, N]")
    expect(a.shape[1] == b.shape[1], op, "b", tuple(b.shape), ["E", a.shape[1], "N"])
    expect(a.dtype == b.dtype, op, "dtype of b", b.dtype, a.dtype)
    expect(b.shape[0] > 0, op, "b", tuple(b.shape), "at least one expert")
    expect_tensor(op, "offsets", offsets, torch.int32, b.shape[0])
    expect_tensor(op, "bias", bias, a.dtype, b.shape[0], b.shape[2])
    return _forward(a, b, offsets.contiguous(), None if bias is None else bias.contiguous())


def grouped_gemm_dw(a: Tensor, dy: Tensor, offsets: Tensor, *, into: Tensor | None = None) -> Tensor:
    """Return a[rows of e]ᵀ · dy[rows of e] for each expert e, [E, K, N]; zeros for an expert without rows.

    a [M, K] and dy [M, N] have one dtype, offsets int32 [E] are as in grouped_gemm. into: an fp32 buffer [E, K, N], to
    which the result is added, and which is returned, without a gradient. Raises ValueError for other shapes, dtypes or
    devices.
    """
    op = "grouped_gemm_dw"
    expect_alike(op, a=a, dy=dy, offsets=offsets, into=into)
    expect_float(op, "a", a)
    expect(a.ndim == 2 and dy.ndim == 2, op, "a and dy", (tuple(a.shape), tuple(dy.shape)), "[M, K], [M, N]")
    expect(a.shape[0] == dy.shape[0], op, "rows of dy", dy.shape[0], a.shape[0])
    expect(a.dtype == dy.dtype, op, "dtype of dy", dy.dtype, a.dtype)
    expect_tensor(op, "offsets", offsets, torch.int32, max(offsets.numel(), 1))
    expect_tensor(op, "into", into, torch.float32, offsets.shape[0], a.shape[1], dy.shape[1])
    if into is None:
        return _dw(a, dy, offsets.contiguous(), False)[0]
    _dw_into(a, dy, offsets.contiguous(), into)
    return into


def cost(rows: int, experts: int, k: int, n: int, *, itemsize: int = 2, backward: bool = False) -> Cost:
    """Return the cost of grouped_gemm; backward: of the gradients of a and b alone.

    experts: number of experts with at least one row, whose weights must be read.
    """
    if backward:
        return Cost(4 * rows * k * n, (rows * (2 * k + n) + 2 * experts * k * n) * itemsize)
    return Cost(2 * rows * k * n, (rows * (k + n) + experts * k * n) * itemsize)
