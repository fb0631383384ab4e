"""The mixture-of-experts MLP for a handful of tokens: decoding.

The same result as experts.py without sorting, maps or saved activations: a program looks through the at most 256 slots
itself for those of its expert, up to 16 at a time, and streams a stretch of that expert's weights once. Bound by
reading the weights of the experts in use, 3·D·F elements each; where these are of 8 bits, they become x's dtype in
registers, and a scale of each row is applied to its sums.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from mm1.kernels import tiles
from mm1.kernels.device import Device
from mm1.kernels.dispatch import cdiv, device_of, launch, power_of_2
from mm1.kernels.language import tl, triton
from mm1.kernels.moe.activation import activate
from mm1.kernels.moe.combine import combine_slots
from mm1.kernels.tiles import Config, Shape, dot, fitted, load_weight, weight_operands
from mm1.kernels.tuning import Tunable, config_for

MAX_SLOTS = 256
ROWS = 16  # the least a matrix instruction takes


def few(slots: int, experts: int) -> bool:
    """Whether so many go this way."""
    return 0 < slots <= min(MAX_SLOTS, ROWS * experts)


def default(shape: Shape, dtype: torch.dtype, device: Device) -> Config:
    """Stretches of a weight narrow enough that every multiprocessor has two programs, many bytes in flight."""
    config = Config(ROWS, 64, 256 // dtype.itemsize, group_m=1, warps=4, stages=4, tma=device.tma)
    active = min(shape.rows, shape.experts)
    while config.block_n > 16 and active * cdiv(shape.n, config.block_n) < 2 * device.units:
        config = replace(config, block_n=config.block_n // 2)
    return fitted(config, shape, dtype, device)


def legal(config: Config, shape: Shape, dtype: torch.dtype, device: Device) -> bool:
    """Every program starts where the others do: nothing walks, nothing is grouped."""
    plain = config.block_m == ROWS and not config.persistent and config.group_m == 1
    return plain and tiles.legal(config, shape, dtype, device)


def space(shape: Shape, dtype: torch.dtype, device: Device) -> Iterator[Config]:
    """What is worth measuring where it is legal."""
    axes = product((ROWS,), (16, 32, 64, 128), (64, 128, 256), (1,), (4, 8), (2, 3, 4, 5), (True, False))
    return (Config(*axis) for axis in axes)


FEW = Tunable("few_tokens", Shape, Config, space, legal, default, tiles.seconds)


@triton.jit
def _few_kernel(
    a_ptr, gate, up, gate_scale_ptr, up_scale_ptr, gate_bias_ptr, up_bias_ptr, index_ptr, y_ptr, stride_am, stride_ak,
    stride_ge, stride_gk, stride_gn, stride_ue, stride_uk, stride_un, stride_se, stride_sn, stride_be, stride_bn, S, E,
    D, N, FAN: tl.constexpr, GATED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    LIMIT: tl.constexpr, SHIFT: tl.constexpr, W_TMA: tl.constexpr, BY_SLOT: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[slot] = act(a[slot // FAN] · gate[e], … · up[e]); ACT None: the first product alone. index_ptr None: all slots
    are of one expert."""
    num_n = tl.cdiv(N, BLOCK_N)
    which = tl.program_id(0) // num_n
    n = tl.program_id(0) % num_n * BLOCK_N
    s = tl.arange(0, BLOCK_S)
    index = tl.zeros((BLOCK_S,), tl.int32) if index_ptr is None else tl.load(index_ptr + s, s < S, other=-1)
    # With fewer slots than experts there is a program a slot, and the first slot of an expert works for all of them.
    expert = tl.load(index_ptr + which) if BY_SLOT else which
    mine = (index == expert) & (s < S)
    count = tl.sum(mine.to(tl.int32), 0)
    if BY_SLOT:
        first_one = tl.sum((mine & (s < which)).to(tl.int32), 0) == 0
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
    a: Tensor, index: Tensor | None, fan: int, gate: Tensor, up: Tensor | None, gate_bias: Tensor | None,
    up_bias: Tensor | None, activation: str | None, limit: float | None, shift: float,
    gate_scale: Tensor | None = None, up_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """gate, up [E, N, D], in 8 bits with scales fp32 [E, N] -> [S, N]; without a gate up is None, of one expert index
    may be."""
    S, (E, N, D) = len(a) * fan if index is None else index.numel(), gate.shape
    device, gated = device_of(a), up is not None
    config = config_for(FEW, Shape(S, E, D, N, gated), a.dtype, device)
    gate_b, up_b = gate.transpose(1, 2), (gate if up is None else up).transpose(1, 2)
    gate_any, up_any, order = weight_operands(config, gate_b, up_b)
    y = a.new_empty(S, N)
    a_program_a_slot = S < E
    strides_s, strides_b = ((0, 0) if t is None else t.stride() for t in (gate_scale, gate_bias))
    launch(
        _few_kernel, (S if a_program_a_slot else E) * cdiv(N, config.block_n), a, gate_any, up_any, gate_scale,
        up_scale, gate_bias, up_bias, index, y, *a.stride(), *gate_b.stride(), *up_b.stride(), *strides_s, *strides_b,
        S, E, D, N, fan, gated, gate_scale is not None, gate_bias is not None, activation, limit, shift, order,
        a_program_a_slot, power_of_2(S), config.block_m, config.block_n, config.block_k, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return y


def few_tokens(
    x: Tensor, index: Tensor, weight: Tensor, gate: Tensor, up: Tensor | None, down: Tensor, gate_bias: Tensor | None,
    up_bias: Tensor | None, down_bias: Tensor | None, activation: str, limit: float | None, shift: float,
    gate_scale: Tensor | None = None, up_scale: Tensor | None = None, down_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As moe_mlp's forward, for at most MAX_SLOTS slots; gate and up [E, F, D] of any strides."""
    index, fan = index.contiguous(), index.shape[1]
    s = by_slot(x, index, fan, gate, up, gate_bias, up_bias, activation, limit, shift, gate_scale, up_scale)
    y = by_slot(s, index, 1, down, None, down_bias, None, None, None, 0.0, down_scale)
    return combine_slots(y, index, len(down), weight)
