"""Check the arguments of moe_mlp."""

from torch import Tensor

from mm1.kernels.dispatch import autocast_dtype, expect, expect_float, expect_integers, expect_read
from mm1.kernels.moe.activation import ACTIVATIONS


def check(x, index, weight, gate_up, up, down, gate_up_bias, down_bias, activation, order) -> None:
    """Raise ValueError, naming the argument, unless the arguments of moe_mlp fit each other."""

    def shaped(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
        if tensor is not None:
            shape = tuple(tensor.shape)
            expect(shape in shapes, "moe_mlp", name, shape, shapes if len(shapes) > 1 else shapes[0])

    weights = {"gate_up": gate_up, "up": up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    for name, tensor in {"x": x, **weights}.items():  # first, as packed weights have other shapes too
        expect_float("moe_mlp", name, tensor)
    expect_read("moe_mlp", "weight", weight)
    expect_integers("moe_mlp", "index", index, 2)
    expect(x.ndim == 2, "moe_mlp", "x", tuple(x.shape), "[T, D]")
    expect(gate_up.ndim == 3, "moe_mlp", "gate_up", tuple(gate_up.shape), "[E, 2F, D]")
    expect(down.ndim == 3 and down.shape[0] > 0, "moe_mlp", "down", tuple(down.shape), "[E, D, F]")
    # Where sizes disagree, name the tensor that differs from two others.
    T = x.shape[0] if x.shape[:1] == weight.shape[:1] else index.shape[0]
    D = x.shape[1] if x.shape[1:] == gate_up.shape[2:] else down.shape[1]
    E, _, F = down.shape
    shaped("index", index, (T, index.shape[1]))
    shaped("down", down, (E, D, F))
    shaped("x", x, (T, D))
    shaped("weight", weight, tuple(index.shape))
    # Without up, a gate_up of F rows means that there is no gate.
    shaped("gate_up", gate_up, (E, F, D), *([(E, 2 * F, D)] if up is None else []))
    shaped("up", up, (E, F, D))
    shaped("gate_up_bias", gate_up_bias, (E, gate_up.shape[1]))
    shaped("down_bias", down_bias, (E, D))
    if order is not None:
        shaped("slots", order.slots, (index.numel(),))
        shaped("position", order.position, tuple(index.shape))
        shaped("offsets", order.offsets, (E,))
    expect(
        up is None or gate_up_bias is None,
        "moe_mlp",
        "gate_up_bias",
        "a tensor",
        "None where up is a tensor of its own",
    )
    expect(activation in ACTIVATIONS, "moe_mlp", "activation", activation, tuple(ACTIVATIONS))
    if autocast_dtype(x) is None:
        for name, w in weights.items():
            expect(w is None or w.dtype == x.dtype, "moe_mlp", f"dtype of {name}", w is not None and w.dtype, x.dtype)
