"""Recompute blocks in backward (activation checkpointing) instead of keeping what backward needs of them.

"blocks" keeps a block's input alone and runs the whole block again. "selective" also keeps what is dear to compute and
small to hold, results of matrix products and of this project's own operations (attention, experts), so that norms,
rotations, activations and casts alone run again: about the floating-point operations of keeping everything.
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


def recomputed(forward: Callable, what: str) -> Callable:
    """Return `forward`, of which backward computes again what `what` says: "blocks" or "selective"."""
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps)
    return lambda *args: checkpoint(forward, *args, **options)


def recompute_blocks(model: Model, what: str) -> None:
    """Recompute the model's blocks in backward; call it before they are compiled, so that their graphs do it."""
    for block in blocks_to_shard(model):
        block.replace_forward(recomputed(block.forward, what))


def _keeps(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Attention's other back-ends: aten's, torch_attn::_varlen_attn, those of flash-attn and xformers.
    kept = op in PRODUCTS or op.namespace == "mm1" or any(part in op.name() for part in ("attn", "attention"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
