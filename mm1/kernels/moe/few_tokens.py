"""Compute the mixture-of-experts MLP for few tokens, as in decoding.

The result is that of experts.py, without sorting, maps or saved activations. Each program searches the at most 256
slots for those of its expert, multiplies up to 16 of them at a time, and reads its rows of that expert's weight once.
The time is that of reading the weights of the experts in use, 3·D·F elements each. Weights of 8 bits are converted to
x's dtype in registers, and each row's scale multiplies the row's sums.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from mm1.kernels import tiles
from mm1.kernels.cost_model import Predicted
from mm1.kernels.device import Device
from mm1.kernels.dispatch import cdiv, device_of, launch, strides
from mm1.kernels.language import tl, triton
from mm1.kernels.moe.activation import activate
from mm1.kernels.moe.combine import combine
from mm1.kernels.tiles import Config, Shape, dot, fitted, load_weight, weight_operands
from mm1.kernels.tuning import Tunable, config_for

MAX_SLOTS = 256
SEARCHED = (64, MAX_SLOTS)  # numbers of slots that a program searches; each is another code
ROWS = 16  # the smallest number of rows of a matrix instruction


def few(slots: int, experts: int) -> bool:
    """Tell whether calls with this number of slots use the kernels for few tokens."""
    return 0 < slots <= min(MAX_SLOTS, ROWS * experts)


def default(shape: Shape, dtype: torch.dtype, device: Device) -> Config:
    """Choose tiles so narrow that every multiprocessor has two programs, with many bytes in flight."""
    config = Config(ROWS, 64, 256 // dtype.itemsize, group_m=1, warps=4, stages=4, tma=device.tma)
    active = min(shape.rows, shape.experts)
    while config.block_n > 16 and active * cdiv(shape.n, config.block_n) < 2 * device.units:
        config = replace(config, block_n=config.block_n // 2)
    return fitted(config, shape, dtype, device)


def legal(config: Config, shape: Shape, dtype: torch.dtype, device: Device) -> bool:
    """Tell whether the kernel fits; it is never persistent, and its tiles are not grouped."""
    supported = config.block_m == ROWS and not config.persistent and config.group_m == 1
    return supported and tiles.legal(config, shape, dtype, device, stores=False)


def space(shape: Shape, dtype: torch.dtype, device: Device) -> Iterator[Config]:
    """Yield the configurations worth measuring, legal or not."""
    axes = product((ROWS,), (16, 32, 64, 128), (64, 128, 256), (1,), (4, 8), (2, 3, 4, 5), (True, False))
    return (Config(*axis) for axis in axes)


FEW = Tunable("few_tokens", Shape, Config, space, legal, default, Predicted(partial(tiles.work, stores=False)))


@triton.jit(do_not_specialize=["S"])
def _few_kernel(
    a_ptr, gate, up, gate_scale_ptr, up_scale_ptr, gate_bias_ptr, up_bias_ptr, index_ptr, y_ptr, stride_am, stride_ak,
    stride_ge, stride_gk, stride_gn, stride_ue, stride_uk, stride_un, stride_se, stride_sn, stride_be, stride_bn, S, E,
    D, N, FAN: tl.constexpr, GATED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    LIMIT: tl.constexpr, SHIFT: tl.constexpr, W_TMA: tl.constexpr, BY_SLOT: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store y[slot] = act(a[slot // FAN] · gate[e], a[slot // FAN] · up[e]).

    ACT None: store the product with gate alone. index_ptr None: all slots belong to the one expert.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0) // num_n
    n = tl.program_id(0) % num_n * BLOCK_N
    s = tl.arange(0, BLOCK_S)
    index = tl.zeros((BLOCK_S,), tl.int32) if index_ptr is None else tl.load(index_ptr + s, s < S, other=-1)
    # With fewer slots than experts each slot has programs, and those of an expert's first slot compute all its slots.
    expert = tl.load(index_ptr + pid) if BY_SLOT else pid
    mine = (index == expert) & (s < S)
    count = tl.sum(mine.to(tl.int32), 0)
    if BY_SLOT:
        first_one = tl.sum((mine & (s < pid)).to(tl.int32), 0) == 0
        count = tl.where(first_one & (expert >= 0) & (expert < E), count, 0)
        expert = expert.to(tl.int32)
    place = tl.cumsum(mine.to(tl.int32), 0) - 1
    offs_n = n + tl.arange(0, BLOCK_N)
    for first in range(0, count, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        slots = tl.sum(tl.where(mine[None, :] & (place[None, :] == i[:, None]), s[None, :], 0), 1)
        rows = (slots // FAN).to(tl.int64)[:, None] * stride_am
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            inside = (i < count)[:, None] & (offs_k < D)[None, :]
            a = tl.load(a_ptr + rows + offs_k.to(tl.int64)[None, :] * stride_ak, inside, other=0.0)
            w = load_weight(gate, expert, k, n, stride_ge, stride_gk, stride_gn, D, N, BLOCK_K, BLOCK_N, W_TMA)
            acc = dot(a, w.to(a.dtype), acc)
            if GATED:
                w = load_weight(up, expert, k, n, stride_ue, stride_uk, stride_un, D, N, BLOCK_K, BLOCK_N, W_TMA)
                acc_u = dot(a, w.to(a.dtype), acc_u)
        if HAS_SCALE:
            places = expert.to(tl.int64) * stride_se + offs_n * stride_sn
            acc *= tl.load(gate_scale_ptr + places, offs_n < N, other=0.0)[None, :]
            if GATED:
                acc_u *= tl.load(up_scale_ptr + places, offs_n < N, other=0.0)[None, :]
        if HAS_BIAS:
            places = expert.to(tl.int64) * stride_be + offs_n * stride_bn
            acc += tl.load(gate_bias_ptr + places, offs_n < N, other=0.0).to(tl.float32)[None, :]
            if GATED:
                acc_u += tl.load(up_bias_ptr + places, offs_n < N, other=0.0).to(tl.float32)[None, :]
        if ACT is not None:
            acc = activate(acc, acc_u, ACT, GATED, LIMIT, SHIFT)
        inside = (i < count)[:, None] & (offs_n < N)[None, :]
        tl.store(y_ptr + slots.to(tl.int64)[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), inside)


def by_slot(
    a: Tensor, index: Tensor | None, fan: int, gate: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None, activation: str | None = None, limit: float | None = None, shift: float = 0.0,
    gate_scale: Tensor | None = None, up_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return one product, and its activation, for each slot: a [S / fan, D], gate and up [E, N, D] -> [S, N].

    gate_scale, up_scale: fp32 [E, N] for weights of 8 bits. up: None without a gate. index: int [T, K], or None if
    there is one expert.
    """
    S, (E, N, D) = len(a) * fan if index is None else index.numel(), gate.shape
    device, gated = device_of(a), up is not None
    config = config_for(FEW, Shape(S, E, D, N, gated), a.dtype, device)
    gate_b, up_b = gate.transpose(1, 2), (gate if up is None else up).transpose(1, 2)
    gate_any, up_any, order = weight_operands(config, gate_b, up_b)
    y = a.new_empty(S, N)
    launch(
        _few_kernel, min(S, E) * cdiv(N, config.block_n), a_ptr=a, gate=gate_any, up=up_any, gate_scale_ptr=gate_scale,
        up_scale_ptr=up_scale, gate_bias_ptr=gate_bias, up_bias_ptr=up_bias, index_ptr=index, y_ptr=y,
        **strides(a, "stride_am", "stride_ak"), **strides(gate_b, "stride_ge", "stride_gk", "stride_gn"),
        **strides(up_b, "stride_ue", "stride_uk", "stride_un"), **strides(gate_scale, "stride_se", "stride_sn"),
        **strides(gate_bias, "stride_be", "stride_bn"), S=S, E=E, D=D, N=N, FAN=fan, GATED=gated,
        HAS_SCALE=gate_scale is not None, HAS_BIAS=gate_bias is not None, ACT=activation, LIMIT=limit, SHIFT=shift,
        W_TMA=order, BY_SLOT=S < E, BLOCK_S=next(size for size in SEARCHED if size >= S), **config.arguments,
    )  # fmt: skip
    return y


def few_tokens(
    x: Tensor, index: Tensor, weight: Tensor, gate: Tensor, up: Tensor | None, down: Tensor, gate_bias: Tensor | None,
    up_bias: Tensor | None, down_bias: Tensor | None, activation: str, limit: float | None, shift: float,
    gate_scale: Tensor | None = None, up_scale: Tensor | None = None, down_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute moe_mlp for at most MAX_SLOTS slots; gate and up [E, F, D] of any strides."""
    index, fan = index.contiguous(), index.shape[1]
    s = by_slot(x, index, fan, gate, up, gate_bias, up_bias, activation, limit, shift, gate_scale, up_scale)
    y = by_slot(s, index, 1, down, gate_bias=down_bias, gate_scale=down_scale)
    return combine(y, index, weight, experts=len(down))
