"""Language-model head and cross-entropy in one op.

    loss = Σ_t logsumexp(W x_t) - (W x_t)[target_t],  over t with target ≠ -100

x [T, D], weight [V, D], targets int [T] -> scalar fp32. 2·T·D·V operations.
"""

import torch.nn.functional as F
from torch import Tensor

from mm1.kernels.dispatch import Cost, expect

IGNORED = -100


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """x [T, D], weight [V, D], targets [T] with -100 for no loss -> fp32 []. reduction: "mean" over targets, or "sum".

    Without any target the loss is 0, and so are its gradients.
    """
    expect(x.ndim == 2 and x.shape[1] == weight.shape[1], "linear_cross_entropy", "weight", tuple(weight.shape),
           f"[V, {x.shape[-1]}]")  # fmt: skip
    expect(targets.shape == x.shape[:1], "linear_cross_entropy", "targets", tuple(targets.shape), tuple(x.shape[:1]))
    expect(reduction in ("mean", "sum"), "linear_cross_entropy", "reduction", reduction, ("mean", "sum"))
    total = F.cross_entropy(F.linear(x, weight).float(), targets.long(), ignore_index=IGNORED, reduction="sum")
    return total if reduction == "sum" else total / (targets != IGNORED).sum().clamp(min=1)


def cost(tokens: int, width: int, vocabulary: int, *, itemsize: int = 2, backward: bool = False) -> Cost:
    """tokens: those with a target. backward: of the gradients alone, with the logits kept."""
    once = (tokens + vocabulary) * width * itemsize
    if backward:
        return Cost(4 * tokens * width * vocabulary, 2 * once)
    return Cost(2 * tokens * width * vocabulary, once + 4 * tokens)
