"""Check the arguments of moe_mlp, and return views and gradients of its weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mm1.kernels.dispatch import autocast_dtype, expect, expect_float, expect_integers, expect_read
from mm1.kernels.moe.activation import ACTIVATIONS

OP = "moe_mlp"


def check(x, index, weight, gate_up, up, down, gate_up_bias, down_bias, activation, order) -> None:
    """Raise ValueError, naming the argument, unless the arguments of moe_mlp fit each other."""
    weights = {"gate_up": gate_up, "up": up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    for name, tensor in {"x": x, **weights}.items():  # before shapes, as packed weights have other shapes too
        expect_float(OP, name, tensor)
    expect_read(OP, "weight", weight)
    expect_integers(OP, "index", index, 2)
    expect(x.ndim == 2, OP, "x", tuple(x.shape), "[T, D]")
    expect(gate_up.ndim == 3, OP, "gate_up", tuple(gate_up.shape), "[E, 2F, D]")
    expect(down.ndim == 3 and down.shape[0] > 0, OP, "down", tuple(down.shape), "[E, D, F]")
    # Where sizes disagree, name the tensor that differs from two others.
    T = x.shape[0] if x.shape[:1] == weight.shape[:1] else index.shape[0]
    D = x.shape[1] if x.shape[1:] == gate_up.shape[2:] else down.shape[1]
    (E, _, F), rows = down.shape, gate_up.shape[1]
    expected = [
        ("index", index, T, index.shape[1]), ("down", down, E, D, F), ("x", x, T, D), ("weight", weight, *index.shape),
        # Without up, a gate_up of F rows means that there is no gate.
        ("gate_up", gate_up, E, F if up is not None or rows == F else 2 * F, D), ("up", up, E, F, D),
        ("gate_up_bias", gate_up_bias, E, rows), ("down_bias", down_bias, E, D),
    ]  # fmt: skip
    if order is not None:
        expected += [("slots", order.slots, index.numel()), ("position", order.position, *index.shape)]
        expected += [("offsets", order.offsets, E)]
    for name, tensor, *shape in expected:
        if tensor is not None:
            expect(tuple(tensor.shape) == tuple(shape), OP, name, tuple(tensor.shape), tuple(shape))
    expect(up is None or gate_up_bias is None, OP, "gate_up_bias", "a tensor", "None where up is a tensor of its own")
    expect(activation in ACTIVATIONS, OP, "activation", activation, tuple(ACTIVATIONS))
    if autocast_dtype(x) is None:
        for name, w in weights.items():
            expect(w is None or w.dtype == x.dtype, OP, f"dtype of {name}", w is not None and w.dtype, x.dtype)


def halves(whole: Tensor, up: Tensor | None, gated: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views [E, F, …] of gate and up, for each layout; without a gate the same tensor twice."""
    if not gated:
        return whole, whole
    if up is not None:
        return whole, up
    if interleaved:
        return whole[:, 0::2], whole[:, 1::2]
    gate, up = whole.tensor_split(2, 1)
    return gate, up


def projections(whole, up, bias, width: int, interleaved: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight [E, N, D] and bias [E, N] of each first product; h holds their results side by side."""
    if up is not None:
        return [(whole, None), (up, None)]
    if interleaved and whole.shape[1] > width:
        return [(whole[:, i::2], None if bias is None else bias[:, i::2]) for i in (0, 1)]
    return [(whole, bias)]


def empty_gradients(x: Tensor, parameters: Sequence[Tensor | None], needed: bool) -> list[Tensor]:
    """Allocate the gradient of each parameter, in the parameter's own layout where that is dense.

    Gradients of None, and all gradients that are not needed, are empty.
    """
    return [torch.empty_like(p) if needed and p is not None else x.new_empty(0) for p in parameters]
