"""Mixture-of-experts MLP over routed tokens.

    h = x[t] · gate_up[e]ᵀ;  s = act(h[:F]) · h[F:];  y[t] = Σ_k weight[t, k] · s · down[e]ᵀ,   e = index[t, k]

x [T, D], index [T, K], weight [T, K], gate_up [E, 2F, D], down [E, D, F] -> [T, D]. 6·T·K·D·F operations.
Source: Jiang et al. 2024 (Mixtral), section 2.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import Cost, expect
from mm1.kernels.grouped_gemm import grouped_gemm
from mm1.kernels.route import sort_by_expert

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}


def moe_mlp(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    interleaved: bool = False,
) -> Tensor:
    """x [T, D], index int [T, K], weight [T, K], gate_up [E, 2F, D] (not gated: [E, F, D]), down [E, D, F] -> [T, D].

    interleaved: gate and up alternate row by row instead of standing in halves. An index ≥ E contributes nothing.
    """
    T, K = index.shape
    E, D, width = down.shape
    expect(x.shape == (T, D), "moe_mlp", "x", tuple(x.shape), (T, D))
    expect(weight.shape == index.shape, "moe_mlp", "weight", tuple(weight.shape), (T, K))
    expect(tuple(gate_up.shape) in {(E, 2 * width, D), (E, width, D)}, "moe_mlp", "gate_up", tuple(gate_up.shape),
           f"{(E, 2 * width, D)}, or {(E, width, D)} without a gate")  # fmt: skip
    expect(activation in ACTIVATIONS, "moe_mlp", "activation", activation, tuple(ACTIVATIONS))

    order, offsets = sort_by_expert(index, E)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=order.device))
    rows = permute(x[:, None].expand(T, K, D).reshape(T * K, D), order, inverse)
    h = grouped_gemm(rows, gate_up.transpose(1, 2), offsets)
    if gate_up.shape[1] == width:
        s = ACTIVATIONS[activation](h)
    else:
        # Not chunk: Inductor's CPU code for its gradient is scalar.
        gate, up = h.unflatten(1, (width, 2)).unbind(2) if interleaved else h.unflatten(1, (2, width)).unbind(1)
        s = ACTIVATIONS[activation](gate) * up
    y = permute(grouped_gemm(s, down.transpose(1, 2), offsets), inverse, order)
    return (y.view(T, K, D).float() * weight.float()[..., None]).sum(1).to(x.dtype)


@torch.library.custom_op("mm1::permute_rows", mutates_args=())
def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order]; an op of its own because its gradient is a gather too (by `inverse`), where autograd would scatter."""
    return x.index_select(0, order)


@permute.register_fake
def _(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, dy: Tensor):
    order, inverse = ctx.saved_tensors
    return permute(dy, inverse, order), None, None


permute.register_autograd(_backward, setup_context=_save)


def cost(tokens: int, k: int, experts: int, width: int, ffn: int, *, itemsize: int = 2) -> Cost:
    """Gated; experts: those with at least one token."""
    return Cost(6 * tokens * k * width * ffn, (2 * tokens * width + experts * 3 * width * ffn) * itemsize)
