"""Compute a decoder's hidden states for generation: without the losses, counts and capacity of training.

A decoding step is bound by reading weights, beside which every kernel costs a microsecond or two. Losses and counts
would add fourteen kernels for each mixture layer, and three for each other layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mm1.engine.layers.decoder import AttentionFunction, rope
from mm1.engine.layers.experts import Experts
from mm1.engine.layers.layer import product_dtype
from mm1.kernels.moe.experts import moe_mlp
from mm1.kernels.moe.routing import choose


def block_output(
    block: Any, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, attend: AttentionFunction
) -> Tensor:  # fmt: skip
    """Return the output [T, D] of a decoder's block; the arguments are those of Block.forward."""
    x = x + block.attention(block.norm1(x), angles, None, attend)
    y = block.norm2(x)
    return x + (_experts(block.mlp, y, mask) if isinstance(block.mlp, Experts) else block.mlp(y, mask)[0])


def _experts(mlp: Experts, x: Tensor, mask: Tensor | None) -> Tensor:
    index, weight = choose(mlp.router(x), mlp.k, mask=mask)
    dtype = product_dtype(x)
    return moe_mlp(x.to(dtype), index, weight, mlp.gate_up.to(dtype), mlp.down.to(dtype))


def hidden_states(
    decoder: Any, x: Tensor, positions: Tensor, attends: Sequence[AttentionFunction], *, mask: Tensor | None = None,
    block_output: Callable[..., Tensor] = block_output,
) -> Tensor:  # fmt: skip
    """Return hidden states [T, D] after the final norm, of embedded tokens x [T, D] of packed documents.

    positions int [T]; attends: the attention function of each layer, as of a Cache; mask bool [T]: False for rows
    without a token, which are given to no expert. block_output: the function of this name, or its compiled form.
    """
    c = decoder.config
    angles = rope(positions, c.head_width, c.rope_theta)
    for block, attend in zip(decoder.blocks, attends, strict=True):
        x = block_output(block, x, angles, mask, attend)
    return decoder.norm(x)
