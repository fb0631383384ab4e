"""Multiply by frozen weights of 8 bits with one scale per row, for decoding, whose time is that of reading weights.

    y = (x · wᵀ) · scale,   w int8 or float8 (e4m3) [N, K], scale fp32 [N];  no gradient

For few rows only the 8-bit weights are read: on a GPU by the kernel of few_tokens.py, which computes a linear layer as
a mixture of one expert. With many rows, as in prefill, the products take the time, and a GPU first converts the weights
of a layer to x's dtype. A CPU multiplies in bf16 for any dtype of x: this changes a result by 0.23 %, and rounding
normally distributed weights to int8 changes it by 0.8 %. torch's product of fp32 and int8 is scalar: for one row and a
weight of 2048 × 8192 it takes 14 ms, and 1.3 ms in bf16. On CPUs without units for bf16 many rows are multiplied in
fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import INTERPRETED, custom_op, expect, expect_alike, expect_tensor
from mm1.kernels.moe import experts, few_tokens

FEW_ROWS = 64  # with more, reading the weight again for each 16 rows costs more than converting it once
FEW_ROWS_CPU = 8  # torch multiplies row by row, which is fast only for few rows
CONVERTED = 1 << 20  # elements of a weight that a CPU converts at once, and multiplies while they are in cache


def _linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if len(x) > FEW_ROWS:
        return _linear_plain(x, weight, scale)
    return few_tokens.by_slot(x, None, 1, weight[None], gate_scale=scale[None])


def _moe(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    if not few_tokens.few(index.numel(), len(down)):
        weights = (dequantized(w, scale, x.dtype) for w, scale in ((gate_up, gate_up_scale), (down, down_scale)))
        return experts.moe_mlp(x, index, weight, *weights)
    (gate, up), (gate_scale, up_scale) = gate_up.chunk(2, 1), gate_up_scale.chunk(2, 1)
    return few_tokens.few_tokens(
        x, index, weight, gate, up, down, None, None, None, "silu", None, 0.0, gate_scale, up_scale, down_scale
    )


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(scale[..., None])


def _linear_plain(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, dequantized(weight, scale, x.dtype))


def _moe_plain(x, index, weight, gate_up, gate_up_scale, down, down_scale) -> Tensor:
    gate_up, down = dequantized(gate_up, gate_up_scale, x.dtype), dequantized(down, down_scale, x.dtype)
    return experts.moe_mlp_few_plain(x, index, weight, gate_up, None, down, None, None, "silu", None, 0.0, False)


def _linear_cpu(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    N, K = weight.shape
    # torch's product reads past the end of a row whose length is not a multiple of 16.
    if 0 < len(x) <= FEW_ROWS_CPU and K % 16 == 0:
        ones = x.new_ones(N, dtype=torch.bfloat16)
        y = torch._weight_int8pack_mm(x.to(torch.bfloat16).contiguous(), weight, ones)
        return (y * scale).to(x.dtype)
    units = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    rows = x.to(units)
    y, height = rows.new_empty(len(x), N), max(1, CONVERTED // K)
    scratch = rows.new_empty(min(height, N), K)
    for narrow, out in zip(weight.split(height), y.split(height, 1)):
        torch.mm(rows, scratch[: len(narrow)].copy_(narrow).t(), out=out)
    return (y * scale).to(x.dtype)


def _moe_cpu(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    y = x.new_zeros(x.shape, dtype=torch.float32)
    for e in index.unique().tolist():
        if 0 <= e < len(down):
            token, k = (index == e).nonzero(as_tuple=True)
            gate, up = _linear_cpu(x[token], gate_up[e], gate_up_scale[e]).chunk(2, 1)
            rows = _linear_cpu(F.silu(gate) * up, down[e], down_scale[e])
            y.index_add_(0, token, rows * weight[token, k, None])
    return y.to(x.dtype)


_linear_op = custom_op("linear_8", _linear, _linear_cpu, plain=_linear_plain)
_moe_op = custom_op("moe_mlp_8", _moe, _moe_cpu, plain=_moe_plain)


@_linear_op.register_fake
def _(x, weight, scale):
    return x.new_empty(x.shape[0], weight.shape[0])


@_moe_op.register_fake
def _(x, index, weight, gate_up, gate_up_scale, down, down_scale):
    return x.new_empty(x.shape)


def linear_8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return (x · weightᵀ) · scale, [T, N] in x's dtype.

    x [T, K] in fp32, bf16 or fp16; weight [N, K] contiguous, int8 or, on a GPU, float8_e4m3fn; scale fp32 [N]. Raises
    ValueError for other shapes, dtypes or devices. There is no gradient.
    """
    expect_alike("linear_8", x=x, weight=weight, scale=scale)
    expect(x.ndim == 2, "linear_8", "x", tuple(x.shape), "[T, K]")
    _check("linear_8", "weight", weight, scale, weight.shape[0], x.shape[1])
    return _linear_op(x, weight, scale)


def moe_mlp_8(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """Return moe_mlp (gated, silu) with weights of 8 bits, [T, D] in x's dtype.

    x [T, D] in fp32, bf16 or fp16, index int [T, K], weight [T, K]. gate_up [E, 2F, D] with gate_up_scale fp32 [E, 2F]
    and down [E, D, F] with down_scale fp32 [E, D] are contiguous, int8 or, on a GPU, float8_e4m3fn. Raises ValueError
    for other shapes, dtypes or devices. There is no gradient.
    """
    op = "moe_mlp_8"
    expect_alike(op, x=x, index=index, weight=weight, gate_up=gate_up, gate_up_scale=gate_up_scale, down=down,
                 down_scale=down_scale)  # fmt: skip
    E, D, width = down.shape
    expect(x.ndim == 2 and x.shape[1] == D, op, "x", tuple(x.shape), f"[T, {D}]")
    expect(index.shape[:-1] == x.shape[:1], op, "index", tuple(index.shape), [x.shape[0], "K"])
    expect(weight.shape == index.shape, op, "weight", tuple(weight.shape), tuple(index.shape))
    _check(op, "gate_up", gate_up, gate_up_scale, E, 2 * width, D)
    _check(op, "down", down, down_scale, E, D, width)
    return _moe_op(x, index, weight.float().contiguous(), gate_up, gate_up_scale, down, down_scale)


def _check(op: str, name: str, weight: Tensor, scale: Tensor, *shape: int) -> None:
    dtypes = (torch.int8,) if weight.device.type == "cpu" and not INTERPRETED else (torch.int8, torch.float8_e4m3fn)
    expect(weight.shape == shape and weight.is_contiguous(), op, name, tuple(weight.shape), f"{shape}, contiguous")
    expect(weight.dtype in dtypes, op, f"dtype of {name}", weight.dtype, dtypes)
    expect_tensor(op, f"scale of {name}", scale, torch.float32, *shape[:-1])
