"""Mixture-of-experts MLP over routed tokens.

    h = x[t] · gate_up[e]ᵀ;  s = act(h[:F]) · h[F:];  y[t] = Σ_k weight[t, k] · s · down[e]ᵀ,   e = index[t, k]

x [T, D], index [T, K], weight [T, K], gate_up [E, 2F, D], down [E, D, F] -> [T, D]. 6·T·K·D·F operations, 12 backward.

Forward, over rows sorted by expert: one product with the gather in its loads and the activation in its epilogue (gate
and up are two accumulators, so their layout does not matter), one with contiguous stores, and a gather that sums each
token's rows in fp32 and in order: nothing is scattered, no atomics, the same bits every time.

Backward keeps x and h, or x alone (recompute), never s or y (Guo et al. 2025, SonicMoE):
    da   = dy[t] · down[e]                   ∂/∂weight[t, k] = ⟨da, s⟩       without the weight
    dh   = weight · da · ∂s/∂h               one kernel gives dh, ⟨da, s⟩ and weight · s
    dx[t] = Σ_k dh · gate_up[e];   dgate_up[e] = dhᵀ x[t];   ddown[e] = dy[t]ᵀ (weight · s)
Source: Jiang et al. 2024 (Mixtral), section 2.2.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mm1.kernels.device import Device
from mm1.kernels.dispatch import (
    INTERPRETED,
    Cost,
    autocast_dtype,
    cdiv,
    device_of,
    expect,
    expect_alike,
    expect_float,
    expect_integers,
    expect_read,
    launch,
    on_cpu,
    refuse_second_order,
    wide,
)
from mm1.kernels.language import tl, triton
from mm1.kernels.moe import cpu as experts_cpu
from mm1.kernels.moe import few_tokens
from mm1.kernels.moe.activation import ACTIVATIONS, activate, slopes
from mm1.kernels.moe.combine import combine_sorted
from mm1.kernels.moe.grouped import dw, gemm
from mm1.kernels.moe.routing import Order, sort, sort_by_expert
from mm1.kernels.tiles import (
    Config,
    Shape,
    default,
    descriptor,
    dot,
    legal,
    load_rows,
    load_weight,
    narrowed,
    programs,
    seconds,
    space,
    store_tile,
    tile_map,
    tile_of,
    weight_operands,
)
from mm1.kernels.tuning import Tunable, config_for, pinned_or


def legal_dh(config: Config, shape: Shape, dtype: torch.dtype, device: Device) -> bool:
    """Of the kernel that ends in gate, up and their slopes: sums must leave registers for them."""
    return legal(config, shape, dtype, device) and 32 <= config.block_n <= _widest_dh(device)


def default_dh(shape: Shape, dtype: torch.dtype, device: Device, widest: int = 128) -> Config:
    config = default(shape, dtype, device)
    return replace(config, block_n=min(config.block_n, _widest_dh(device), widest))


def _widest_dh(device: Device) -> int:
    return 128 if device.shared > 100 << 10 else 64


UP = Tunable("experts_up", Shape, Config, space, legal, default, seconds)
DH = Tunable("experts_dh", Shape, Config, space, legal_dh, default_dh, seconds)


@triton.jit
def _up_kernel(
    x_ptr, gate, up, gate_bias_ptr, up_bias_ptr, slots_ptr, s_ptr, s_desc, h_ptr, hg_desc, hu_desc, tiles_ptr,
    stride_xm, stride_xk, stride_ge, stride_gk, stride_gn, stride_ue, stride_uk, stride_un, stride_be, stride_bn, D, F,
    num_m, FAN: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, ACT: tl.constexpr,
    LIMIT: tl.constexpr, SHIFT: tl.constexpr, W_TMA: tl.constexpr, S_TMA: tl.constexpr, H_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """s [rows, F], and h [rows, 2F] with KEEP."""
    num_n = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        expert = tl.load(tiles_ptr + pid_m)
        if expert >= 0:
            row = tl.load(tiles_ptr + num_m + pid_m)
            end = tl.load(tiles_ptr + 2 * num_m + pid_m)
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
    ACT: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, W_TMA: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dh [rows, 2F], weight · s [rows, F], and by tile of F the rows' share of ⟨dy, y⟩."""
    num_n = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, num_m, num_n, GROUP_M)
        expert = tl.load(tiles_ptr + pid_m)
        if expert >= 0:
            row = tl.load(tiles_ptr + num_m + pid_m)
            end = tl.load(tiles_ptr + 2 * num_m + pid_m)
            n = pid_n * BLOCK_N
            rows = row + tl.arange(0, BLOCK_M)
            slots = tl.load(slots_ptr + tl.minimum(rows, end - 1))
            tokens = slots // FAN
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
            weight = tl.load(weight_ptr + slots)[:, None]
            # Half by half: the registers do not hold gate, up, slopes and sums of a whole tile.
            left, right = tl.split(tl.permute(tl.reshape(da, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            dots += _dh_part(
                left, weight, h_ptr, dh_ptr, ws_ptr, rows, end, n, F, GATED, ACT, LIMIT, SHIFT, BLOCK_N // 2
            )
            dots += _dh_part(
                right, weight, h_ptr, dh_ptr, ws_ptr, rows, end, n + BLOCK_N // 2, F, GATED, ACT, LIMIT, SHIFT,
                BLOCK_N // 2,
            )  # fmt: skip
            tl.store(dots_ptr + pid_n.to(tl.int64) * S + rows, dots, rows < end)


@triton.jit
def _dh_part(
    da, weight, h_ptr, dh_ptr, ws_ptr, rows, end, n, F, GATED: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dh and weight · s of some columns, return their share of ⟨da, s⟩."""
    offs_n = n + tl.arange(0, BLOCK_N)
    inside = (rows < end)[:, None] & (offs_n < F)[None, :]
    places = rows.to(tl.int64)[:, None] * (2 * F if GATED else F) + offs_n[None, :]
    gate = tl.load(h_ptr + places, inside, other=0.0).to(tl.float32)
    up = gate
    if GATED:
        up = tl.load(h_ptr + F + places, inside, other=0.0).to(tl.float32)
    s, slope_g, slope_u = slopes(gate, up, ACT, GATED, LIMIT, SHIFT)
    dots = tl.sum(da * s, 1)
    da = da * weight
    tl.store(dh_ptr + places, (da * slope_g).to(dh_ptr.dtype.element_ty), inside)
    if GATED:
        tl.store(dh_ptr + F + places, (da * slope_u).to(dh_ptr.dtype.element_ty), inside)
    places = rows.to(tl.int64)[:, None] * F + offs_n[None, :]
    tl.store(ws_ptr + places, (weight * s).to(ws_ptr.dtype.element_ty), inside)
    return dots


def halves(whole: Tensor, up: Tensor | None, gated: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views [E, F, …] of gate and up, whichever way they are laid out; without a gate the same twice."""
    if not gated:
        return whole, whole
    if up is not None:
        return whole, up
    if interleaved:
        return whole[:, 0::2], whole[:, 1::2]
    width = whole.shape[1] // 2
    return whole[:, :width], whole[:, width:]


def up_rows(x, slots, offsets, fan, gate_up, up, width, bias, activation, limit, shift, interleaved, keep):
    """s [S, F], and h [S, 2F] if it is to be kept, over rows sorted by expert."""
    S, D = len(slots), x.shape[1]
    gated = up is not None or gate_up.shape[1] == 2 * width
    device = device_of(x)
    at = Shape(S, len(offsets), D, width, gated), x.dtype, device
    # Biases and limits take registers that the tables' tiles, found without them, may not leave.
    plain = bias is None and limit is None
    config = config_for(UP, *at) if plain else pinned_or("experts_up", lambda: default(*at))
    tiles, _, num_m = tile_map(offsets, S, config.block_m)
    gate, up = (half.transpose(1, 2) for half in halves(gate_up, up, gated, interleaved))
    gate_bias, up_bias = (None, None) if bias is None else halves(bias, None, gated, interleaved)
    gate_any, up_any, order = weight_operands(config, gate, up)
    config = narrowed(config, order, at[0].sums)
    s = x.new_empty(S, width)
    h = x.new_empty(S, (1 + gated) * width if keep else 0)
    h_gate, h_up = halves(h, None, gated, False)
    tile = [config.block_m, config.block_n]
    s_desc, hg_desc, hu_desc = (descriptor(t, tile, config) for t in (s, h_gate, h_up))
    launch(
        _up_kernel, programs(num_m * cdiv(width, config.block_n), config, device), x, gate_any, up_any,
        gate_bias, up_bias, slots, s, s_desc, h, hg_desc, hu_desc, tiles, *x.stride(), *gate.stride(), *up.stride(),
        *((0, 0) if gate_bias is None else gate_bias.stride()), D, width, num_m, fan, gated, bias is not None, keep,
        activation, limit, shift, order, s_desc is not None, hg_desc is not None and hu_desc is not None,
        config.block_m, config.block_n, config.block_k, config.group_m, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return s, h


def gradient_of_h(
    dy: Tensor, h: Tensor, slots: Tensor, offsets: Tensor, fan: int, weight: Tensor, down: Tensor,
    down_bias: Tensor | None, activation: str, limit: float | None, shift: float, gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dh [S, 2F], weight · s [S, F], and ⟨dy, y⟩ of each row as parts [., S] to be added."""
    S, device, (E, D, width) = len(slots), device_of(h), down.shape
    at = Shape(S, E, D, width), h.dtype, device
    plain = down_bias is None and limit is None
    widest = 128 if device.wgmma else 64  # 128 columns spill 20 times on an A100, 83 on a B200
    config = config_for(DH, *at) if plain else pinned_or("experts_dh", lambda: default_dh(*at, widest))
    tiles, _, num_m = tile_map(offsets, S, config.block_m)
    num_n = cdiv(width, config.block_n)
    dh, ws, dots = torch.empty_like(h), h.new_empty(S, width), weight.new_empty(num_n, S)
    down_any, order = weight_operands(config, down)
    launch(
        _dh_kernel, programs(num_m * num_n, config, device), dy, down_any, down_bias, h, slots, weight, dh, ws, dots,
        tiles, *dy.stride(), *down.stride(), D, width, S, num_m, fan, gated, down_bias is not None, activation, limit,
        shift, order, config.block_m, config.block_n, config.block_k, config.group_m, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return dh, ws, dots


def forward(
    x: Tensor, slots: Tensor, position: Tensor, offsets: Tensor, weight: Tensor, gate_up: Tensor, up: Tensor | None,
    down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, limit: float | None,
    shift: float, interleaved: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [T, D], and h [T·K, 2F] with `keep` (else without columns)."""
    K, width = position.shape[1], down.shape[2]
    s, h = up_rows(x, slots, offsets, K, gate_up, up, width, gate_up_bias, activation, limit, shift, interleaved, keep)
    y = gemm(s, down.transpose(1, 2), offsets, down_bias)
    return combine_sorted(y, position, offsets, weight), h


def backward(
    dy: Tensor, x: Tensor, h: Tensor, slots: Tensor, position: Tensor, offsets: Tensor, weight: Tensor,
    gate_up: Tensor, up: Tensor | None, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    activation: str, limit: float | None, shift: float, interleaved: bool, weights: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, weight and, with `weights`, gate_up, up, down and the biases (empty where there is none)."""
    K, width = position.shape[1], down.shape[2]
    gated = up is not None or gate_up.shape[1] == 2 * width
    if not h.shape[1]:
        _, h = up_rows(
            x, slots, offsets, K, gate_up, up, width, gate_up_bias, activation, limit, shift, interleaved, True
        )
    dh, ws, dots = gradient_of_h(dy, h, slots, offsets, K, weight, down, down_bias, activation, limit, shift, gated)
    dweight = torch.where(position < offsets[-1], dots.sum(0)[position], 0.0)

    split = gated and (up is not None or interleaved)  # gate and up are not one weight of 2F rows
    if split:
        gate, other = halves(gate_up, up, gated, interleaved)
        dx = gemm(dh, gate, offsets, None, other)
    else:
        dx = gemm(dh, gate_up, offsets)
    dx = combine_sorted(dx, position, offsets, None)
    if not weights:
        return [dx, dweight, *(x.new_empty(0) for _ in range(5))]
    dgate_up, dup, ddown, dgate_up_bias, ddown_bias = empty_gradients(gate_up, up, down, gate_up_bias, down_bias)
    parts = [(dgate_up, dgate_up_bias, dh)]
    if split:
        outs = halves(dgate_up, None if up is None else dup, gated, interleaved)
        biases = (dgate_up_bias,) * 2 if gate_up_bias is None else halves(dgate_up_bias, None, gated, interleaved)
        parts = zip(outs, biases, dh.split(width, 1))
    for out, bias, rows in parts:
        dw(rows, x, offsets, out, slots=slots, b_fan=K, bias=None if gate_up_bias is None else bias)
    dw(dy, ws, offsets, ddown, slots=slots, a_fan=K, bias=None if down_bias is None else ddown_bias, scale=weight)
    return [dx, dweight, dgate_up, dup, ddown, dgate_up_bias, ddown_bias]


def empty_gradients(*weights: Tensor | None) -> list[Tensor]:
    """Room for each weight's gradient, in the weight's own layout where that is dense; empty for none."""
    some = next(w for w in weights if w is not None)
    return [some.new_empty(0) if w is None else torch.empty_like(w) for w in weights]


def forward_few(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, up: Tensor | None, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, limit: float | None, shift: float,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    """Compute moe_mlp without gradients, by the kernels for few tokens where there are few."""
    if not few_tokens.few(index.numel(), down.shape[0]):  # as an exported program may find at other sizes
        order, biases = sort(index, down.shape[0]), (gate_up_bias, down_bias)
        return forward(x, *order, weight, gate_up, up, down, *biases, activation, limit, shift, interleaved, False)[0]
    gated = up is not None or gate_up.shape[1] == 2 * down.shape[2]
    biases = (None, None) if gate_up_bias is None else halves(gate_up_bias, None, gated, interleaved)
    gate, up = halves(gate_up, up, gated, interleaved)
    return few_tokens.few_tokens(
        x, index, weight, gate, up if gated else None, down, *biases, down_bias, activation, limit, shift
    )


_forward = torch.library.custom_op("mm1::moe_mlp", forward, mutates_args=())
_backward = torch.library.custom_op("mm1::moe_mlp_backward", backward, mutates_args=())
_few = torch.library.custom_op("mm1::moe_mlp_few", forward_few, mutates_args=())
on_cpu(_forward, experts_cpu.forward)
on_cpu(_backward, experts_cpu.backward)


@_forward.register_fake
def _(x, slots, position, offsets, weight, gate_up, up, down, gate_up_bias, down_bias, activation, limit, shift,
      interleaved, keep):  # fmt: skip
    width = gate_up.shape[1] if up is None else 2 * gate_up.shape[1]
    return x.new_empty(x.shape), x.new_empty(slots.shape[0], width if keep else 0)


@_backward.register_fake
def _(dy, x, h, slots, position, offsets, weight, gate_up, up, down, gate_up_bias, down_bias, activation, limit, shift,
      interleaved, weights):  # fmt: skip
    given = (gate_up, up, down, gate_up_bias, down_bias)
    grads = empty_gradients(*given) if weights else [x.new_empty(0) for _ in given]
    return [x.new_empty(x.shape), torch.empty_like(weight), *grads]


@_few.register_fake
def _(x, index, weight, gate_up, up, down, gate_up_bias, down_bias, activation, limit, shift, interleaved):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, *order_and_weights, ctx.activation, ctx.limit, ctx.shift, ctx.interleaved, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], *order_and_weights)


def _gradients(ctx, dy: Tensor, _):
    saved = ctx.saved_tensors
    weights = any(ctx.needs_input_grad[5:10])
    dx, dweight, *grads = _backward(dy, *saved, ctx.activation, ctx.limit, ctx.shift, ctx.interleaved, weights)
    given = saved[6:]
    grads = [grad if weights and weight is not None else None for grad, weight in zip(grads, given)]
    return dx, None, None, None, dweight, *grads, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
refuse_second_order(_backward, "moe_mlp")


def moe_mlp(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    up: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    limit: float | None = None,
    shift: float = 0.0,
    interleaved: bool = False,
    order: Order | None = None,
    recompute: bool = False,
) -> Tensor:
    """x [T, D], index int [T, K], weight [T, K], gate_up [E, 2F, D] (not gated: [E, F, D]), down [E, D, F] -> [T, D].

    Weights may have any strides: what is stored [E, D, 2F] goes in as its transpose(1, 2), without a copy. With up
    [E, F, D] gate and up are tensors of their own, and gate_up is the gate. interleaved: gate and up alternate row by
    row instead of standing in halves. gate_up_bias [E, 2F], down_bias [E, D]. activation, limit, shift: see
    activation.py. An index outside 0 … E - 1 contributes nothing and its weight's gradient is zero. order:
    sort_by_expert(index, E), if it is there already. recompute: keep only x for backward, and compute the first product
    again.

    Under autocast x, weights and biases are cast to its dtype. x, gate_up, down in one of fp32, bf16, fp16, on a CPU
    also fp64; weight in any float.
    """
    given = gate_up, up, down, gate_up_bias, down_bias
    expect_alike("moe_mlp", x=x, index=index, weight=weight, gate_up=gate_up, down=down, up=up,
                 gate_up_bias=gate_up_bias, down_bias=down_bias,
                 **({} if order is None else order._asdict()))  # fmt: skip
    _check(x, index, weight, *given, activation, order)
    dtype = autocast_dtype(x) or x.dtype
    # Weights are read as they lie; what is small is laid out for the kernels.
    given = [None if w is None else w.to(dtype) if w.ndim == 3 else w.to(dtype).contiguous() for w in given]
    x, weight = x.to(dtype), weight.to(wide(dtype)).contiguous()
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, *given))
    on_gpu = INTERPRETED or x.device.type != "cpu"
    # An exported program is for any number of tokens, so it asks how many there are when it runs.
    if on_gpu and not recorded and (torch.compiler.is_exporting() or few_tokens.few(index.numel(), down.shape[0])):
        return _few(x, index, weight, *given, activation, limit, shift, interleaved)
    order = sort_by_expert(index, down.shape[0]) if order is None else Order(*(t.contiguous() for t in order))
    keep = recorded and not recompute
    return _forward(x, *order, weight, *given, activation, limit, shift, interleaved, keep)[0]


def _check(x, index, weight, gate_up, up, down, gate_up_bias, down_bias, activation, order) -> None:
    def shaped(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
        if tensor is not None:
            found = tuple(tensor.shape)
            expect(found in shapes, "moe_mlp", name, found, shapes if len(shapes) > 1 else shapes[0])

    weights = {"gate_up": gate_up, "up": up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    for name, tensor in {"x": x, **weights}.items():  # first, as packed weights have other shapes too
        expect_float("moe_mlp", name, tensor)
    expect_read("moe_mlp", "weight", weight)
    expect_integers("moe_mlp", "index", index, 2)
    expect(x.ndim == 2, "moe_mlp", "x", tuple(x.shape), "[T, D]")
    expect(gate_up.ndim == 3, "moe_mlp", "gate_up", tuple(gate_up.shape), "[E, 2F, D]")
    expect(down.ndim == 3 and down.shape[0] > 0, "moe_mlp", "down", tuple(down.shape), "[E, D, F]")
    # Where sizes disagree, the tensor is named that two others outvote.
    T = x.shape[0] if x.shape[:1] == weight.shape[:1] else index.shape[0]
    D = x.shape[1] if x.shape[1:] == gate_up.shape[2:] else down.shape[1]
    E, _, F = down.shape
    shaped("index", index, (T, index.shape[1]))
    shaped("down", down, (E, D, F))
    shaped("x", x, (T, D))
    shaped("weight", weight, tuple(index.shape))
    # Without up a gate_up of F rows has no gate; with it, it is the gate.
    shaped("gate_up", gate_up, (E, F, D), *([(E, 2 * F, D)] if up is None else []))
    shaped("up", up, (E, F, D))
    shaped("gate_up_bias", gate_up_bias, (E, gate_up.shape[1]))
    shaped("down_bias", down_bias, (E, D))
    if order is not None:
        shaped("slots", order.slots, (index.numel(),))
        shaped("position", order.position, tuple(index.shape))
        shaped("offsets", order.offsets, (E,))
    expect(up is None or gate_up_bias is None, "moe_mlp", "gate_up_bias", "given", "None where gate and up are apart")
    expect(activation in ACTIVATIONS, "moe_mlp", "activation", activation, tuple(ACTIVATIONS))
    if autocast_dtype(x) is None:
        for name, w in weights.items():
            expect(w is None or w.dtype == x.dtype, "moe_mlp", f"dtype of {name}", w is not None and w.dtype, x.dtype)


def cost(tokens: int, k: int, experts: int, width: int, ffn: int, *, itemsize: int = 2, backward: bool = False) -> Cost:
    """Gated; experts: those with at least one token. backward: of the gradients alone, without recomputation."""
    flops, weights = 6 * tokens * k * width * ffn, experts * 3 * width * ffn
    if backward:  # reads x, dy and the first product of each slot, writes dx; weights are read, their gradients written
        return Cost(2 * flops, (3 * tokens * width + 2 * tokens * k * ffn + 2 * weights) * itemsize)
    return Cost(flops, (2 * tokens * width + weights) * itemsize)
