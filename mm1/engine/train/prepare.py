"""Make a model ready for training: float8 → shard → initialise → recompute → compile, in this order.

Float8 replaces linears, whose parameters are then sharded; only then is memory allocated, for this process's part
alone; recomputation is compiled with the block that it is in.
"""

from typing import Any

import torch

from mm1.engine.layers.float8 import float8_linears
from mm1.engine.models.registry import model_class
from mm1.engine.models.spec import Model, ModelConfig
from mm1.engine.train.config import Train
from mm1.engine.train.parallel import World
from mm1.engine.train.recompute import recompute_blocks
from mm1.errors import UserError


def prepare(c: ModelConfig, t: Train, world: World, dtype: torch.dtype, backend: str = "inductor") -> Model:
    """Return the model of a config, its part that belongs to this process, ready for its first step.

    dtype: autocast's. backend: torch.compile's, where train.compile is set. Raises UserError for settings that do not
    go together, TypeError for a layer that does not say how it is initialised or sharded.
    """
    with torch.device("meta"):
        model = model_class(c.kind)(c)
    if t.float8 != "none":
        if world.config.tensor > 1:
            raise UserError(f"setting parallel.tensor is {world.config.tensor}, expected 1 beside train.float8")
        float8_linears([block for block in model.blocks() if block.float8], t.float8)
    world.shard_model(model, dtype)
    model.to_empty(device=world.device)
    model.init_weights(t.seed)
    model.init_buffers(world.device)
    if t.recompute != "none":
        recompute_blocks(model, t.recompute)
    if t.compile:
        # Experts that are sharded otherwise than their block are gathered inside of it, where its graph breaks.
        compile_blocks(model, fullgraph=t.recompile == "error" and world.config.expert == 1, backend=backend)
    return model


def compile_blocks(model: Model, fullgraph: bool = False, **options: Any) -> None:
    """Compile each kind of block once; shapes are the packed budgets, so they never change.

    fullgraph: a graph break is an error. options: of torch.compile. It compiles their forward, not their call: what
    gathers a block's parameters before it stays outside. Copies and pickles of the model are not compiled.
    """
    for block in model.blocks():
        block.replace_forward(torch.compile(block.forward, dynamic=False, fullgraph=fullgraph, **options))
