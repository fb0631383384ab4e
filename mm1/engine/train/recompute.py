"""Recompute blocks in backward (activation checkpointing) instead of storing their activations.

"blocks" stores only a block's input and runs the whole block again. "selective" also stores the results of matrix
products and of this project's own operations (attention, experts), which are expensive to compute and small; only
norms, rotations, activations and casts run again, which adds few floating-point operations.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mm1.engine.layers.layer import blocks_to_shard
from mm1.engine.models.spec import Model

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default}


def recomputed(forward: Callable, mode: str) -> Callable:
    """Return `forward` with recomputation in backward. mode: "blocks" or "selective"."""
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, selective_policy)
    return lambda *args: checkpoint(forward, *args, **options)


def recompute_blocks(model: Model, mode: str) -> None:
    """Recompute the model's blocks in backward. Call it before the blocks are compiled."""
    for block in blocks_to_shard(model):
        block.replace_forward(recomputed(block.forward, mode))


def selective_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return whether the result of a torch op is stored or recomputed in "selective" recomputation."""
    # Other attention backends are ops of aten, torch_attn, flash-attn or xformers.
    stored = op in PRODUCTS or op.namespace == "mm1" or any(part in op.name() for part in ("attn", "attention"))
    return CheckpointPolicy.MUST_SAVE if stored else CheckpointPolicy.PREFER_RECOMPUTE
