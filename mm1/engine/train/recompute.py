"""Activation checkpointing: what backward needs of a block is computed again instead of kept.

"blocks" keeps a block's input alone and runs the whole block again. "selective" also keeps what is dear to compute and
small to hold, results of matrix products and of this project's own operations (attention, experts), so that norms,
rotations, activations and casts alone run again: about the floating-point operations of keeping everything.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mm1.engine.models.mm1 import MM1

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default}


def recomputed(forward: Callable, what: str) -> Callable:
    """`forward`, of which backward computes again what `what` says: "blocks" or "selective"."""
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps)
    return lambda *args: checkpoint(forward, *args, **options)


def recompute_blocks(model: MM1, what: str) -> None:
    """Those of encoder and decoder; before they are compiled, so that the choice is in their graphs."""
    for block in [*model.vision.blocks, *model.decoder.blocks]:
        block.replace_forward(recomputed(block.forward, what))  # pyright: ignore[reportCallIssue]


def _keeps(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Attention's other back-ends: aten's, torch_attn::_varlen_attn, those of flash-attn and xformers.
    kept = op in PRODUCTS or op.namespace == "mm1" or any(part in op.name() for part in ("attn", "attention"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
