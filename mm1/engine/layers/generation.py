"""Compute a decoder's hidden states for generation: without the losses, counts and capacity of training.

A decoding step is bound by reading weights, beside which every kernel costs a microsecond or two. Losses and counts
would add sixteen kernels for each mixture layer, and three for each other layer.

A block is two functions, before and after its attention, because compiled code must not write into the cache: whether
Inductor then copies the whole cache or not depends on the rest of the code, and in a mixture it did.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mm1.engine.layers.decoder import Rope, rope
from mm1.engine.layers.experts import Experts
from mm1.engine.layers.layer import product_dtype
from mm1.kernels.moe.experts import moe_mlp
from mm1.kernels.moe.routing import choose


def project(block: Any, x: Tensor, angles: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [T, H, Dh], k and v [T, G, Dh] of a decoder's block for its input x [T, D]."""
    return block.attention.project(block.norm1(x), angles)


def output(block: Any, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """Return the output [T, D] of a decoder's block for its input x [T, D] and the result y [T, H, Dh] of attention.

    mask: as in hidden_states.
    """
    x = x + block.attention.out(y.flatten(1))
    h = block.norm2(x)
    return x + (_experts(block.mlp, h, mask) if isinstance(block.mlp, Experts) else block.mlp(h, mask)[0])


def _experts(mlp: Experts, x: Tensor, mask: Tensor | None) -> Tensor:
    index, weight = choose(mlp.router(x), mlp.k, mask=mask)
    dtype = product_dtype(x)
    return moe_mlp(x.to(dtype), index, weight, mlp.gate_up.to(dtype), mlp.down.to(dtype))


PARTS = project, output
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, k, v) -> y


def hidden_states(
    decoder: Any, x: Tensor, positions: Tensor, attends: Sequence[AttentionFunction], *, mask: Tensor | None = None,
    parts: Sequence[Callable[..., Any]] = PARTS,
) -> Tensor:  # fmt: skip
    """Return hidden states [T, D] after the final norm, of embedded tokens x [T, D] of packed documents.

    positions int [T]; attends: the attention function of each layer, as of a Cache; mask bool [T]: False for rows
    without a token, which are given to no expert. parts: PARTS, or their compiled forms.
    """
    c, (before, after) = decoder.config, parts
    angles = rope(positions, c.head_width, c.rope_theta)
    for block, attend in zip(decoder.blocks, attends, strict=True):
        x = after(block, x, attend(*before(block, x, angles)), mask)
    return decoder.norm(x)
