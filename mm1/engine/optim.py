"""AdamW with MM1's recipe: peak learning rate by law, weight decay a tenth of it, warm-up, cosine to a tenth."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from mm1.engine.config import Train


def learning_rate(step: int, t: Train, peak: float) -> float:
    """Rate of step 0, 1, …: linear over `warmup` steps to the peak, cosine to final_lr · peak at the last step."""
    if step < t.warmup:
        return peak * (step + 1) / t.warmup
    progress = (step - t.warmup) / max(1, t.steps - t.warmup)
    return peak * (t.final_lr + (1 - t.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def adamw(parameters: Iterable[nn.Parameter], t: Train, peak: float) -> torch.optim.AdamW:
    """Decay on matrices only; norms, biases and single vectors are left alone. Fused: one pass over all state."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": t.weight_decay * peak},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=t.betas, eps=t.eps, fused=True)
