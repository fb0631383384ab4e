"""Define the activations between an expert's two products, on tensors and inside kernels.

    s = act(gate)                              without a gate
    s = act(min(gate, limit)) · (clamp(up, ±limit) + shift)

limit None clamps nothing; GPT-OSS is quick_gelu with limit 7 and shift 1, DeepSeek-V4 silu with a limit. silu x·σ(x);
quick_gelu x·σ(1.702x); gelu x·Φ(x); gelu_tanh its tanh form (Hendrycks and Gimpel 2016); relu2 max(x, 0)² (So et al.
2021, Primer). The engine's decoders always use silu: neither a Backend (backends.py) nor moe_mlp_8 (quantized.py) nor
the MLP in mm1/engine/layers/decoder.py takes an activation.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.language import INTERPRETED, libdevice, tl, triton

QUICK = 1.702
LIBDEVICE = tl.constexpr(not INTERPRETED)


class Activation(NamedTuple):
    """Hold value(x) = act(x), and backward(dy, x, out), which stores dy · act'(x) in out."""

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], object]


def _silu_backward(dy: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(dy, x, grad_input=out)


def _gelu_backward(dy: Tensor, x: Tensor, out: Tensor, approximate: str = "none") -> None:
    torch.ops.aten.gelu_backward.grad_input(dy, x, approximate=approximate, grad_input=out)


ACTIVATIONS = {
    "silu": Activation(F.silu, _silu_backward),
    "quick_gelu": Activation(
        lambda x: F.silu(QUICK * x).div_(QUICK), lambda dy, x, out: _silu_backward(dy, QUICK * x, out)
    ),
    "gelu": Activation(F.gelu, _gelu_backward),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"), lambda dy, x, out: _gelu_backward(dy, x, out, "tanh")
    ),
    "relu": Activation(F.relu, lambda dy, x, out: torch.mul(dy, x > 0, out=out)),
    "relu2": Activation(lambda x: F.relu(x).square(), lambda dy, x, out: torch.mul(dy, 2 * F.relu(x), out=out)),
}


@triton.jit
def _sigmoid(x):
    """Return 1 / (1 + e^-x) of fp32; 0 below -87.3.

    tl.sigmoid takes 14 instructions on NVIDIA GPUs, and this takes 6: 8 of the 14 are a negation and the scaling of
    operands whose exponential or inverse is not a normal number, which are 0 here.
    """
    power = tl.exp2(x * -1.4426950408889634)
    if LIBDEVICE:
        return libdevice.fast_dividef(1.0, 1 + power)
    else:
        return 1 / (1 + power)


@triton.jit
def _value_and_slope(x, ACT: tl.constexpr):
    """Return act(x) and act'(x)."""
    if ACT == "silu":
        sigmoid = _sigmoid(x)
        value = x * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    elif ACT == "quick_gelu":
        sigmoid = _sigmoid(1.702 * x)
        value = x * sigmoid
        slope = sigmoid + 1.702 * value * (1 - sigmoid)
    elif ACT == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        cdf = _sigmoid(2 * inner)  # (1 + tanh(inner)) / 2
        value = x * cdf
        slope = cdf + value * (1 - cdf) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACT == "relu":
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        slope = 2 * tl.maximum(x, 0.0)
        value = slope * slope * 0.25
    return value, slope


@triton.jit
def slopes(gate, up, ACT: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """Return s, ∂s/∂gate and ∂s/∂up of fp32 tiles; not GATED: ignore the last."""
    if LIMIT is not None:
        value, slope = _value_and_slope(tl.minimum(gate, LIMIT), ACT)
        slope = tl.where(gate <= LIMIT, slope, 0.0)
    else:
        value, slope = _value_and_slope(gate, ACT)
    if GATED:
        factor = up
        within = value
        if LIMIT is not None:
            factor = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
            within = tl.where(tl.abs(up) <= LIMIT, value, 0.0)
        if SHIFT != 0:  # the compiler does not remove the addition of 0.0
            factor = factor + SHIFT
        return value * factor, slope * factor, within
    else:
        return value, slope, value


@triton.jit
def activate(gate, up, ACT: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """Return s of fp32 tiles."""
    s, _, _ = slopes(gate, up, ACT, GATED, LIMIT, SHIFT)
    return s
