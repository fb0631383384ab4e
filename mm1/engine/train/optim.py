"""Define the learning-rate schedule and AdamW of MM1's recipe.

After a linear warm-up the rate falls along a cosine to a tenth. This file holds how the optimizer is created, how it
steps, which state a checkpoint stores, and the bytes that `mm1 plan` counts; other files only call these functions.

Sources: McKinzie et al. 2024 (MM1, arXiv 2403.09611), section 4; Loshchilov & Hutter 2019 (Decoupled Weight Decay
Regularization, arXiv 1711.05101), Algorithm 2.
"""

import math
from collections.abc import Iterable, Set

import torch
from torch import Tensor, nn

from mm1.engine.train.config import Train

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names; each is an fp32 tensor of the parameter's shape
STATE_BYTES = 4 * len(MOMENTS)  # per parameter
UPDATE_BYTES = 28  # per parameter and step: reads weight, gradient and moments, writes weight and moments


def learning_rate(step: int, t: Train, peak: float) -> float:
    """Return the rate of step 0, 1, …: linear over the warm-up to the peak, cosine to final_lr · peak at the end."""
    warmup = t.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, t.steps - warmup)
    return peak * (t.final_lr + (1 - t.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]], t: Train, peak: float, vectors: Set[str] = frozenset()
) -> torch.optim.AdamW:
    """Return fused AdamW with zeroed state over named parameters, whole or local shards.

    vectors: names of the learned vectors (layer.py, `learned_vectors`). Weight decay applies where `decays` is true: a
    step at rate r multiplies the weights by 1 - r · weight_decay. MM1's λ = 0.1 η is that of Algorithm 2, in which the
    schedule scales both η and λ but η does not scale λ: with torch's r = η · schedule this is weight_decay = 0.1.
    """
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if decays(name, p, vectors)], "weight_decay": t.weight_decay},
        {"params": [p for name, p in trained if not decays(name, p, vectors)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=t.betas, eps=t.eps, fused=True)
    for _, p in trained:
        moments = {key: torch.zeros_like(p) for key in MOMENTS}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def update(optimizer: torch.optim.AdamW, rate: float, bad: Tensor) -> None:
    """Apply one step and free the gradients.

    bad: bool [] on the device; True leaves weights and state unchanged, without a synchronization of the host.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue]  # read by torch's fused kernel
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def decays(name: str, parameter: nn.Parameter, vectors: Set[str]) -> bool:
    """Return whether weight decay applies: to matrices, experts, convolutions and embeddings.

    It does not apply to norms, biases, positions, class token and learned queries. Sharding keeps names and the number
    of axes, so every layout decides the same. The embedding is decayed, as in AXLearn's GPT recipe and in torchtitan:
    where it is tied, it is the head's matrix too.
    """
    return parameter.ndim >= 2 and name not in vectors
