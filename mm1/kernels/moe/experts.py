"""Compute the mixture-of-experts MLP over routed tokens.

    h = x[t] · gate_up[e]ᵀ;  s = act(h[:F]) · h[F:];  y[t] = Σ_k weight[t, k] · s · down[e]ᵀ,   e = index[t, k]

x [T, D], index [T, K], weight [T, K], gate_up [E, 2F, D], down [E, D, F] -> [T, D]. 6·T·K·D·F operations, 12 backward.

Forward computes, over rows sorted by expert, one product that gathers tokens as it loads them and applies the
activation before it stores (gate and up are two accumulators, so their layout does not matter), a second product with
contiguous stores, and a gather that sums each token's rows in fp32 and in order. Without scatters and atomics, the same
inputs give the same bits every time.

Forward saves x and h, or x alone with `recompute`, but never s or y (Guo et al. 2025, SonicMoE). Backward computes
    da   = dy[t] · down[e];   ∂/∂weight[t, k] = ⟨da, s⟩
    dh   = weight · da · ∂s/∂h               one kernel computes dh, ⟨da, s⟩ and weight · s
    dx[t] = Σ_k dh · gate_up[e];   dgate_up[e] = dhᵀ x[t];   ddown[e] = dy[t]ᵀ (weight · s)
Source: Jiang et al. 2024 (Mixtral), section 2.2.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mm1.kernels import tiles
from mm1.kernels.cost_model import Predicted
from mm1.kernels.device import Device
from mm1.kernels.dispatch import (
    INTERPRETED,
    Cost,
    autocast_dtype,
    cdiv,
    custom_op,
    device_of,
    expect_alike,
    launch,
    refuse_second_order,
    strides,
    wide,
)
from mm1.kernels.language import tl, triton
from mm1.kernels.moe import cpu, few_tokens
from mm1.kernels.moe.activation import activate, slopes
from mm1.kernels.moe.arguments import check, empty_gradients, halves, projections
from mm1.kernels.moe.combine import combine
from mm1.kernels.moe.grouped import dw, gemm
from mm1.kernels.moe.routing import Order, sort, sort_by_expert, sort_plain
from mm1.kernels.tiles import Config, Shape, dot, load_rows, load_weight, mapped_tile, split_columns, store_tile
from mm1.kernels.tuning import Tunable, config_for, pinned_or


def legal_dh(config: Config, shape: Shape, dtype: torch.dtype, device: Device) -> bool:
    """Tell whether the kernel fits, with registers left for gate, up and their slopes."""
    widest = 128 if device.shared > 100 << 10 else 64
    return tiles.legal(config, shape, dtype, device, stores=False) and 32 <= config.block_n <= widest


def default_dh(shape: Shape, dtype: torch.dtype, device: Device, widest: int = 128) -> Config:
    """Choose the configuration of an ordinary product, with at most `widest` columns.

    A step of 128 columns takes 280 ns on an H200, so that the 2 steps ahead of 3 stages may not hide a load: there it
    has 4 stages, which spill on an A100.
    """
    config = tiles.default(shape, dtype, device)
    columns = min(config.block_n, widest, 128 if device.shared > 100 << 10 else 64)
    warps = 8 if columns == 128 and not device.asynchronous else config.warps  # with 4 26 registers spill on an A100
    stages = 4 if device.asynchronous and dtype.itemsize == 2 else config.stages
    return tiles.fitted(replace(config, block_n=columns, warps=warps, stages=stages), shape, dtype, device)


# `up` computes gate and up, and stores both and their product: 1.5 elements for each sum. For each sum `dh` reads gate
# and up, and stores their gradients and s.
UP, DH = (
    Tunable(name, Shape, Config, tiles.space, legal, default, Predicted(partial(tiles.work, gathered=True, **ends)))
    for name, legal, default, ends in (
        ("experts_up", tiles.legal, tiles.default, {"finish": 1.5, "finishing": 12, "stored": 1.5}),
        ("experts_dh", legal_dh, default_dh, {"finish": 5, "finishing": 36, "stored": 5, "stores": False}),
    )
)


@triton.jit(do_not_specialize=["num_m"])
def _up_kernel(
    x_ptr, gate, up, gate_bias_ptr, up_bias_ptr, slots_ptr, s_ptr, s_desc, h_ptr, hg_desc, hu_desc, tiles_ptr,
    stride_xm, stride_xk, stride_ge, stride_gk, stride_gn, stride_ue, stride_uk, stride_un, stride_be, stride_bn, D, F,
    num_m, FAN: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, ACT: tl.constexpr,
    LIMIT: tl.constexpr, SHIFT: tl.constexpr, W_TMA: tl.constexpr, S_TMA: tl.constexpr, H_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Store s [rows, F] and, with KEEP, h [rows, 2F], gates before ups."""
    num_n = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        expert, row, end, pid_n = mapped_tile(tiles_ptr, tile, num_m, num_n, GROUP_M)
        if expert >= 0:
            n = pid_n * BLOCK_N
            tokens = tl.load(slots_ptr + tl.minimum(row + tl.arange(0, BLOCK_M), end - 1)) // FAN
            acc_g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc_u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, D, BLOCK_K):
                x = load_rows(x_ptr, tokens, row, k, stride_xm, stride_xk, D, BLOCK_K, False)
                w = load_weight(gate, expert, k, n, stride_ge, stride_gk, stride_gn, D, F, BLOCK_K, BLOCK_N, W_TMA)
                acc_g = dot(x, w, acc_g)
                if GATED:
                    w = load_weight(up, expert, k, n, stride_ue, stride_uk, stride_un, D, F, BLOCK_K, BLOCK_N, W_TMA)
                    acc_u = dot(x, w, acc_u)
            if HAS_BIAS:
                offs_n = n + tl.arange(0, BLOCK_N)
                places = expert.to(tl.int64) * stride_be + offs_n * stride_bn
                acc_g += tl.load(gate_bias_ptr + places, offs_n < F, other=0.0).to(tl.float32)[None, :]
                if GATED:
                    acc_u += tl.load(up_bias_ptr + places, offs_n < F, other=0.0).to(tl.float32)[None, :]
            if KEEP:
                width = 2 * F if GATED else F
                store_tile(h_ptr, hg_desc, acc_g, row, end, n, width, F, BLOCK_M, BLOCK_N, H_TMA)
                if GATED:
                    store_tile(h_ptr + F, hu_desc, acc_u, row, end, n, width, F, BLOCK_M, BLOCK_N, H_TMA)
            s = activate(acc_g, acc_u, ACT, GATED, LIMIT, SHIFT)
            store_tile(s_ptr, s_desc, s, row, end, n, F, F, BLOCK_M, BLOCK_N, S_TMA)


@triton.jit
def _dh_kernel(
    dy_ptr, down, bias_ptr, h_ptr, slots_ptr, weight_ptr, dh_ptr, ws_ptr, dots_ptr, tiles_ptr, stride_ym, stride_yk,
    stride_we, stride_wk, stride_wn, D, F, S, num_m, FAN: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACT: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, W_TMA: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Store dh [rows, 2F], weight · s [rows, F], and each tile's part of ⟨dy, y⟩ of its rows.

    EARLY: load the first gates before the products, and all else together after them, where registers hold it. One load
    waits for memory then, else six.
    """
    num_n = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        expert, row, end, pid_n = mapped_tile(tiles_ptr, tile, num_m, num_n, GROUP_M)
        if expert >= 0:
            n = pid_n * BLOCK_N
            rows = row + tl.arange(0, BLOCK_M)
            slots = tl.load(slots_ptr + tl.minimum(rows, end - 1))
            tokens = slots // FAN
            # Two halves, as registers do not hold gate, up, slopes and accumulators of a whole tile.
            HALF: tl.constexpr = BLOCK_N // 2
            if EARLY:
                gate_l = _load_half(h_ptr, rows, end, n, F, GATED, HALF)
            da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            dots = tl.zeros((BLOCK_M,), tl.float32)
            for k in range(0, D, BLOCK_K):
                dy = load_rows(dy_ptr, tokens, row, k, stride_ym, stride_yk, D, BLOCK_K, False)
                w = load_weight(down, expert, k, n, stride_we, stride_wk, stride_wn, D, F, BLOCK_K, BLOCK_N, W_TMA)
                da = dot(dy, w, da)
                if HAS_BIAS:
                    offs_k = k + tl.arange(0, BLOCK_K)
                    bias = tl.load(bias_ptr + expert.to(tl.int64) * D + offs_k, offs_k < D, other=0.0)
                    dots += tl.sum(dy.to(tl.float32) * bias.to(tl.float32)[None, :], 1)
            if pid_n > 0:
                dots = tl.zeros((BLOCK_M,), tl.float32)
            left, right = split_columns(da, BLOCK_M, BLOCK_N)
            if not EARLY:
                gate_l = _load_half(h_ptr, rows, end, n, F, GATED, HALF)
            up_l = _load_half(h_ptr + F, rows, end, n, F, GATED, HALF) if GATED else gate_l
            if EARLY:
                gate_r = _load_half(h_ptr, rows, end, n + HALF, F, GATED, HALF)
                up_r = _load_half(h_ptr + F, rows, end, n + HALF, F, GATED, HALF) if GATED else gate_r
            dots += _dh_part(
                left, gate_l, up_l, weight_ptr + slots, dh_ptr, ws_ptr, rows, end, n, F, GATED, ACT, LIMIT, SHIFT, HALF
            )
            if not EARLY:
                gate_r = _load_half(h_ptr, rows, end, n + HALF, F, GATED, HALF)
                up_r = _load_half(h_ptr + F, rows, end, n + HALF, F, GATED, HALF) if GATED else gate_r
            dots += _dh_part(
                right, gate_r, up_r, weight_ptr + slots, dh_ptr, ws_ptr, rows, end, n + HALF, F, GATED, ACT, LIMIT,
                SHIFT, HALF,
            )  # fmt: skip
            tl.store(dots_ptr + pid_n.to(tl.int64) * S + rows, dots, rows < end)


@triton.jit
def _places(rows, end, n, stride, F, BLOCK_N: tl.constexpr):
    """Return the places of BLOCK_N columns from n on, and which of them are before row `end` and column F."""
    offs_n = n + tl.arange(0, BLOCK_N)
    return rows.to(tl.int64)[:, None] * stride + offs_n[None, :], (rows < end)[:, None] & (offs_n < F)[None, :]


@triton.jit
def _load_half(h_ptr, rows, end, n, F, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load BLOCK_N columns of h."""
    places, inside = _places(rows, end, n, 2 * F if GATED else F, F, BLOCK_N)
    return tl.load(h_ptr + places, inside, other=0.0)


@triton.jit
def _dh_part(
    da, gate, up, weights, dh_ptr, ws_ptr, rows, end, n, F, GATED: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dh and weight · s of BLOCK_N columns, and return their part of ⟨da, s⟩."""
    s, slope_g, slope_u = slopes(gate.to(tl.float32), up.to(tl.float32), ACT, GATED, LIMIT, SHIFT)
    dots = tl.sum(da * s, 1)
    weight = tl.load(weights)[:, None]
    da = da * weight
    places, inside = _places(rows, end, n, 2 * F if GATED else F, F, BLOCK_N)
    tl.store(dh_ptr + places, (da * slope_g).to(dh_ptr.dtype.element_ty), inside)
    if GATED:
        tl.store(dh_ptr + F + places, (da * slope_u).to(dh_ptr.dtype.element_ty), inside)
    places, inside = _places(rows, end, n, F, F, BLOCK_N)
    tl.store(ws_ptr + places, (weight * s).to(ws_ptr.dtype.element_ty), inside)
    return dots


def up_rows(x, slots, offsets, fan, gate_up, up, width, bias, activation, limit, shift, interleaved, keep, maps=None):
    """Compute the first product of rows sorted by expert; return s [S, F] and, with `keep`, h [S, 2F]."""
    S, D = len(slots), x.shape[1]
    gated = up is not None or gate_up.shape[1] == 2 * width
    device = device_of(x)
    at = Shape(S, len(offsets), D, width, gated), x.dtype, device
    # Biases and limits take registers that the tables' tiles, measured without them, may not leave.
    plain = bias is None and limit is None
    config = config_for(UP, *at) if plain else pinned_or("experts_up", lambda: tiles.default(*at))
    tile_map, _, num_m = (maps or tiles.Maps(offsets)).of(S, config.block_m)
    gate, up = (half.transpose(1, 2) for half in halves(gate_up, up, gated, interleaved))
    gate_bias, up_bias = (None, None) if bias is None else halves(bias, None, gated, interleaved)
    gate_any, up_any, order = tiles.weight_operands(config, gate, up)
    config = tiles.narrowed(config, order, at[0].sums)
    s = x.new_empty(S, width)
    h = x.new_empty(S, (1 + gated) * width if keep else 0)
    h_gate, h_up = halves(h, None, gated, False)
    tile = [config.block_m, config.block_n]
    s_desc, hg_desc, hu_desc = (tiles.descriptor(t, tile, config) for t in (s, h_gate, h_up))
    grid = tiles.programs(num_m * cdiv(width, config.block_n), config, device)
    launch(
        _up_kernel, grid, x_ptr=x, gate=gate_any, up=up_any, gate_bias_ptr=gate_bias, up_bias_ptr=up_bias,
        slots_ptr=slots, s_ptr=s, s_desc=s_desc, h_ptr=h, hg_desc=hg_desc, hu_desc=hu_desc, tiles_ptr=tile_map,
        **strides(x, "stride_xm", "stride_xk"),
        **strides(gate, "stride_ge", "stride_gk", "stride_gn"), **strides(up, "stride_ue", "stride_uk", "stride_un"),
        **strides(gate_bias, "stride_be", "stride_bn"), D=D, F=width, num_m=num_m, FAN=fan, GATED=gated,
        HAS_BIAS=bias is not None, KEEP=keep, ACT=activation, LIMIT=limit, SHIFT=shift, W_TMA=order,
        S_TMA=s_desc is not None, H_TMA=hg_desc is not None and hu_desc is not None, GROUP_M=config.group_m,
        **config.arguments,
    )  # fmt: skip
    return s, h


def gradient_of_h(
    dy: Tensor, h: Tensor, slots: Tensor, offsets: Tensor, fan: int, weight: Tensor, down: Tensor,
    down_bias: Tensor | None, activation: str, limit: float | None, shift: float, gated: bool,
    maps: tiles.Maps | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dh [S, 2F], weight · s [S, F], and parts [tiles of F, S] whose sum is ⟨dy, y⟩ of each row."""
    S, device, (E, D, width) = len(slots), device_of(h), down.shape
    at = Shape(S, E, D, width), h.dtype, device
    plain = down_bias is None and limit is None
    widest = 128 if device.wgmma else 64  # with 128 columns 20 registers spill on an A100, 83 on a B200
    config = config_for(DH, *at) if plain else pinned_or("experts_dh", lambda: default_dh(*at, widest))
    tile_map, _, num_m = (maps or tiles.Maps(offsets)).of(S, config.block_m)
    num_n = cdiv(width, config.block_n)
    dh, ws, dots = torch.empty_like(h), h.new_empty(S, width), weight.new_empty(num_n, S)
    down_any, order = tiles.weight_operands(config, down)
    launch(
        _dh_kernel, tiles.programs(num_m * num_n, config, device), dy_ptr=dy, down=down_any, bias_ptr=down_bias,
        h_ptr=h, slots_ptr=slots, weight_ptr=weight, dh_ptr=dh, ws_ptr=ws, dots_ptr=dots, tiles_ptr=tile_map,
        **strides(dy, "stride_ym", "stride_yk"), **strides(down, "stride_we", "stride_wk", "stride_wn"), D=D, F=width,
        S=S, num_m=num_m, FAN=fan, GATED=gated, HAS_BIAS=down_bias is not None, ACT=activation, LIMIT=limit,
        SHIFT=shift, W_TMA=order, EARLY=plain and device.asynchronous, GROUP_M=config.group_m, **config.arguments,
    )  # fmt: skip
    return dh, ws, dots


def moe_mlp_forward(
    x: Tensor, order: Sequence[Tensor], weight: Tensor, gate_up: Tensor, up: Tensor | None, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, limit: float | None, shift: float,
    interleaved: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y [T, D] and h [T·K, 2F], which has no columns without `keep`. order: slots, position, offsets."""
    slots, position, offsets = order
    K, width = position.shape[1], down.shape[2]
    operands, maps = (x, slots, offsets, K, gate_up, up, width, gate_up_bias), tiles.Maps(offsets)
    s, h = up_rows(*operands, activation, limit, shift, interleaved, keep, maps)
    y = gemm(s, down.transpose(1, 2), offsets, down_bias, maps=maps)
    return combine(y, position, weight, offsets=offsets), h


def moe_mlp_backward(
    dy: Tensor, x: Tensor, h: Tensor, order: Sequence[Tensor], weight: Tensor, gate_up: Tensor, up: Tensor | None,
    down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, limit: float | None,
    shift: float, interleaved: bool, weight_gradients: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of x, weight, gate_up, up, down, gate_up_bias and down_bias.

    Those of weights and biases are empty without weight_gradients, or where the tensor is None.
    """
    slots, position, offsets = order
    K, width = position.shape[1], down.shape[2]
    gated = up is not None or gate_up.shape[1] == 2 * width
    gate, maps = (activation, limit, shift), tiles.Maps(offsets)
    if not h.shape[1]:
        _, h = up_rows(x, slots, offsets, K, gate_up, up, width, gate_up_bias, *gate, interleaved, True, maps)
    dh, ws, dots = gradient_of_h(dy, h, slots, offsets, K, weight, down, down_bias, *gate, gated, maps)
    dweight = torch.where(position < offsets[-1], dots.sum(0)[position], 0.0)

    (first, _), *second = projections(gate_up, up, None, width, interleaved)
    rows = gemm(dh, first, offsets, None, *(w for w, _ in second), maps=maps)
    dx = combine(rows, position, None, offsets=offsets)
    parameters = gate_up, up, down, gate_up_bias, down_bias
    gradients = empty_gradients(x, parameters, weight_gradients)
    if weight_gradients:
        dgate_up, dup, _, dbias, ddown_bias = (None if p is None else g for p, g in zip(parameters, gradients))
        products = projections(dgate_up, dup, dbias, width, interleaved)
        for (out, bias), part in zip(products, dh.split(first.shape[1], 1)):
            dw(part, x, offsets, out, slots=slots, b_fan=K, bias=bias, maps=maps)
        dw(dy, ws, offsets, gradients[2], slots=slots, a_fan=K, bias=ddown_bias, scale=weight, maps=maps)
    return [dx, dweight, *gradients]


def moe_mlp_few(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, up: Tensor | None, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, limit: float | None, shift: float,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    """Compute moe_mlp without gradients; calls with few tokens use the kernels for few tokens."""
    if not few_tokens.few(index.numel(), down.shape[0]):  # an exported program runs at sizes other than its example's
        order, biases, gate = sort(index, down.shape[0]), (gate_up_bias, down_bias), (activation, limit, shift)
        return moe_mlp_forward(x, order, weight, gate_up, up, down, *biases, *gate, interleaved, False)[0]
    gated = up is not None or gate_up.shape[1] == 2 * down.shape[2]
    biases = (None, None) if gate_up_bias is None else halves(gate_up_bias, None, gated, interleaved)
    gate, up = halves(gate_up, up, gated, interleaved)
    return few_tokens.few_tokens(
        x, index, weight, gate, up if gated else None, down, *biases, down_bias, activation, limit, shift
    )


def moe_mlp_few_plain(
    x, index, weight, gate_up, up, down, gate_up_bias, down_bias, activation, limit, shift, interleaved
) -> Tensor:
    """Compute moe_mlp_few in plain torch."""
    order, biases, gate = sort_plain(index, down.shape[0]), (gate_up_bias, down_bias), (activation, limit, shift)
    return cpu.forward(x, order, weight, gate_up, up, down, *biases, *gate, interleaved, False)[0]


_forward = custom_op("moe_mlp", moe_mlp_forward, cpu.forward)
_backward = custom_op("moe_mlp_backward", moe_mlp_backward, cpu.backward)
_few = custom_op("moe_mlp_few", moe_mlp_few, plain=moe_mlp_few_plain)


@_forward.register_fake
def _(x, order, weight, gate_up, up, down, gate_up_bias, down_bias, activation, limit, shift, interleaved, keep):
    width = gate_up.shape[1] if up is None else 2 * gate_up.shape[1]
    return x.new_empty(x.shape), x.new_empty(order[0].shape[0], width if keep else 0)


@_backward.register_fake
def _(dy, x, h, order, weight, gate_up, up, down, gate_up_bias, down_bias, activation, limit, shift, interleaved,
      weight_gradients):  # fmt: skip
    gradients = empty_gradients(x, (gate_up, up, down, gate_up_bias, down_bias), weight_gradients)
    return [x.new_empty(x.shape), torch.empty_like(weight), *gradients]


@_few.register_fake
def _(x, index, weight, gate_up, up, down, gate_up_bias, down_bias, activation, limit, shift, interleaved):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, order, *weights, ctx.activation, ctx.limit, ctx.shift, ctx.interleaved, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], *order, *weights)


def _gradients(ctx, dy: Tensor, _):
    x, h, slots, position, offsets, weight, *parameters = ctx.saved_tensors
    needed = any(ctx.needs_input_grad[3:8])
    settings = ctx.activation, ctx.limit, ctx.shift, ctx.interleaved, needed
    dx, dweight, *gradients = _backward(dy, x, h, [slots, position, offsets], weight, *parameters, *settings)
    gradients = [g if needed and p is not None else None for g, p in zip(gradients, parameters)]
    return dx, [None] * 3, dweight, *gradients, *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_save)
refuse_second_order(_backward, "moe_mlp")


def moe_mlp(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *, up: Tensor | None = None,
    gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None, activation: str = "silu",
    limit: float | None = None, shift: float = 0.0, interleaved: bool = False, order: Order | None = None,
    recompute: bool = False,
) -> Tensor:  # fmt: skip
    """Return the weighted sum of each token's K experts, [T, D] in x's dtype.

    x [T, D], index int [T, K], weight [T, K], gate_up [E, 2F, D] (without a gate [E, F, D]), down [E, D, F].
    up [E, F, D]: gate and up are two tensors, and gate_up is the gate. interleaved: rows of gate and up alternate;
    else gate_up holds all rows of gate, then those of up. gate_up_bias [E, 2F], down_bias [E, D]. activation, limit,
    shift: see activation.py. order: a precomputed sort_by_expert(index, E). recompute: save only x for backward, which
    then computes the first product again.

    An index outside 0 … E - 1 adds nothing, and the gradient of its weight is zero. Weights may have any strides: pass
    a weight stored as [E, D, 2F] as its transpose(1, 2), without a copy. x, weights and biases have one dtype: fp32,
    bf16 or fp16, on a CPU also fp64. Under autocast they are cast to its dtype. weight has any float dtype. Sums are
    computed in fp32 (fp64 for fp64). Raises ValueError for other shapes, dtypes or devices, naming the argument.
    """
    parameters = gate_up, up, down, gate_up_bias, down_bias
    expect_alike("moe_mlp", x=x, index=index, weight=weight, gate_up=gate_up, down=down, up=up,
                 gate_up_bias=gate_up_bias, down_bias=down_bias,
                 **({} if order is None else order._asdict()))  # fmt: skip
    check(x, index, weight, *parameters, activation, order)
    dtype = autocast_dtype(x) or x.dtype
    # Kernels read weights at any strides, and contiguous biases.
    parameters = [None if p is None else p.to(dtype) if p.ndim == 3 else p.to(dtype).contiguous() for p in parameters]
    x, weight = x.to(dtype), weight.to(wide(dtype)).contiguous()
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, *parameters))
    on_gpu = INTERPRETED or x.device.type != "cpu"
    # An exported program runs with any number of tokens, so the op itself decides by their number.
    if on_gpu and not recorded and (torch.compiler.is_exporting() or few_tokens.few(index.numel(), down.shape[0])):
        return _few(x, index, weight, *parameters, activation, limit, shift, interleaved)
    rows = [t.contiguous() for t in (sort_by_expert(index, down.shape[0]) if order is None else order)]
    keep = recorded and not recompute
    return _forward(x, rows, weight, *parameters, activation, limit, shift, interleaved, keep)[0]


def cost(tokens: int, k: int, experts: int, width: int, ffn: int, *, itemsize: int = 2, backward: bool = False) -> Cost:
    """Return the cost of a gated moe_mlp; backward: of the gradients alone, without recomputation.

    experts: number of experts with at least one token, whose weights must be read.
    """
    flops, weights = 6 * tokens * k * width * ffn, experts * 3 * width * ffn
    if backward:  # reads x, dy and the first product of each slot, writes dx; weights are read, their gradients written
        return Cost(2 * flops, (3 * tokens * width + 2 * tokens * k * ffn + 2 * weights) * itemsize)
    return Cost(flops, (2 * tokens * width + weights) * itemsize)
