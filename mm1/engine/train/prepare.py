"""Prepare a model for training: float8 → shard → initialise → recompute → compile, in this order.

Float8 replaces linears, whose parameters are sharded afterwards. Memory is allocated only then, for this process's
shard alone. Recomputation comes before compilation, so that the graph of a block includes it.
"""

from collections.abc import Callable
from typing import Any

import torch

from mm1.engine.layers.float8 import float8_linears
from mm1.engine.layers.segments import Segments
from mm1.engine.models.registry import model_class
from mm1.engine.models.spec import Model, ModelConfig
from mm1.engine.train.config import Train
from mm1.engine.train.parallel import World
from mm1.engine.train.recompute import recompute_blocks
from mm1.errors import UserError


def prepare(c: ModelConfig, t: Train, world: World, dtype: torch.dtype, backend: str = "inductor") -> Model:
    """Build this process's shard of the model, ready for the first step.

    dtype: autocast's. backend: torch.compile's, used if train.compile is set. Raises UserError for incompatible
    settings, TypeError for a layer that does not declare its initial values or its sharding.
    """
    with torch.device("meta"):
        model = model_class(c.kind)(c)
    if t.float8 != "none":
        if world.config.tensor > 1:
            raise UserError(f"setting parallel.tensor is {world.config.tensor}, expected 1 when train.float8 is set")
        float8_linears([block for block in model.blocks() if block.float8], t.float8)
    world.shard_model(model, dtype)
    model.to_empty(device=world.device)
    model.init_weights(t.seed)
    model.init_buffers(world.device)
    if t.recompute != "none":
        recompute_blocks(model, t.recompute)
    if t.compile:
        # With expert parallelism, experts are gathered inside their block, which breaks the block's graph.
        compile_blocks(model, fullgraph=t.recompile == "error" and world.config.expert == 1, backend=backend)
    return model


def compile_blocks(model: Model, fullgraph: bool = False, **options: Any) -> None:
    """Compile each kind of block once; its shapes are the packed budgets, except those of Segments.

    fullgraph: a graph break is an error. options: of torch.compile. Only `forward` is compiled, not the call with its
    hooks, which gather a block's parameters. Copies and pickles of the model are not compiled.
    """
    for block in model.blocks():
        code = compiled(block.forward, dynamic=False, fullgraph=fullgraph, **options)
        block.replace_forward(code)


def compiled(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return a block's forward compiled for any segments. options: of torch.compile."""
    code = torch.compile(forward, **options)

    def run(*arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, Segments):
                argument.mark_dynamic()
        return code(*arguments)

    return run
