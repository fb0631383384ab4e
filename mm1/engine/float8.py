"""Float8 products of the decoder's wide linears, by torchao: inputs, weights and gradients are scaled and rounded on
their way into each product, the weights themselves stay as they are.

A GPU's float8 units have twice the rate of bf16's, but scaling costs passes over memory, so that narrow linears lose.
Experts, router, embedding and head stay as they are.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from mm1.engine.data.record import DataError
from mm1.engine.decoder import DecoderLM
from mm1.engine.quantize import importing_torchao

WIDE = 2048  # both sides of a weight; under it scaling costs what the products win, as torchao's tables for H100 show


def float8_linears(decoder: DecoderLM, recipe: str) -> None:
    """Put torchao's linears in the place of the wide ones of the decoder's blocks, with their parameters.

    recipe: "tensorwise", one scale a tensor, faster; or "rowwise", closer. Raises DataError without torchao, or where
    no linear is wide.
    """
    for parent, name, linear in converted(decoder, recipe):
        setattr(parent, name, linear)


def converted(decoder: DecoderLM, recipe: str) -> Sequence[tuple[nn.Module, str, nn.Module]]:
    """Parents, names and what belongs there."""
    with importing_torchao("setting train.float8"):
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear
    options = Float8LinearConfig.from_recipe_name(recipe)  # pyright: ignore[reportArgumentType]
    found = [(parent, name, Float8Linear.from_float(old, options)) for parent, name, old in _wide(decoder)]
    if not found:
        raise DataError(f"setting train.float8: no linear of the decoder is {WIDE} wide on both sides")
    return found


def _wide(decoder: DecoderLM) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in decoder.blocks.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and min(child.weight.shape) >= WIDE:
                yield parent, name, child
