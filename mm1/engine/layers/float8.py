"""Float8 products of the decoder's wide linears, by torchao: inputs, weights and gradients are scaled and rounded on
their way into each product, the weights themselves stay as they are.

A GPU's float8 units have twice the rate of bf16's, but scaling costs passes over memory, so that narrow linears lose.
Experts, router, embedding and head stay as they are.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from mm1.engine.layers.layer import product_dtype
from mm1.engine.layers.quantize import importing_torchao
from mm1.errors import UserError

WIDE = 2048  # both sides of a weight; under it scaling costs what the products win, as torchao's tables for H100 show


def float8_linears(blocks: Iterable[nn.Module], recipe: str) -> None:
    """Put torchao's linears in the place of the wide ones of these blocks, with their parameters.

    recipe: "tensorwise", one scale a tensor, faster; or "rowwise", closer. Raises UserError without torchao, or where
    no linear is wide.
    """
    for parent, name, linear in converted(blocks, recipe):
        setattr(parent, name, linear)


def converted(blocks: Iterable[nn.Module], recipe: str) -> Sequence[tuple[nn.Module, str, nn.Module]]:
    """Return the parent, the name and the replacement of each wide linear."""
    with importing_torchao("setting train.float8"):
        from torchao.float8 import Float8LinearConfig, float8_linear

    class Float8Linear(float8_linear.Float8Linear):
        """Round input and weight [out, in] to autocast's dtype first, in which sharded weights are gathered.

        Where one process rounded fp32 weights instead, its losses and those of several differed by 0.2 %.
        """

        def forward(self, input: Tensor) -> Tensor:
            dtype = product_dtype(input)
            return float8_linear.matmul_with_hp_or_float8_args.apply(
                input.to(dtype), self.weight.to(dtype).t(), self.linear_mm_config, self.config
            )

    options = Float8LinearConfig.from_recipe_name(recipe)  # pyright: ignore[reportArgumentType]
    linears = [(parent, name, Float8Linear.from_float(old, options)) for parent, name, old in _wide(blocks)]
    if not linears:
        raise UserError(f"setting train.float8: no linear of the decoder is {WIDE} wide on both sides")
    return linears


def _wide(blocks: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in (module for block in blocks for module in block.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and min(child.weight.shape) >= WIDE:
                yield parent, name, child
