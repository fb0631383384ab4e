"""Compute the decoder's wide linears in float8, by torchao.

Inputs, weights and gradients are scaled and rounded for each product; the stored weights are not. A GPU's float8 units
have twice the rate of bf16's, but scaling costs passes over memory, so that narrow linears become slower. Experts,
router, embedding and head do not use float8.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from mm1.engine.layers.layer import product_dtype
from mm1.engine.layers.quantize import importing_torchao
from mm1.errors import UserError

WIDE = 2048  # smallest side of a weight for which the faster product outweighs scaling, by torchao's tables for H100


def float8_linears(blocks: Iterable[nn.Module], recipe: str) -> None:
    """Replace the wide linears of these blocks by torchao's, which share their parameters.

    recipe: "tensorwise", one scale per tensor, is faster; "rowwise" is more accurate. Raises UserError without torchao,
    or if no linear is wide.
    """
    for parent, name, linear in converted(blocks, recipe):
        setattr(parent, name, linear)


def converted(blocks: Iterable[nn.Module], recipe: str) -> Sequence[tuple[nn.Module, str, nn.Module]]:
    """Return the parent, the name and the replacement of each wide linear; see float8_linears."""
    with importing_torchao("setting train.float8"):
        from torchao.float8 import Float8LinearConfig, float8_linear

    class Float8Linear(float8_linear.Float8Linear):
        """Round input and weight [out, in] to autocast's dtype first, in which sharded weights are gathered.

        Otherwise the losses of one process, which rounds fp32 weights, and of several differ by 0.2 %.
        """

        def forward(self, input: Tensor) -> Tensor:
            dtype = product_dtype(input)
            return float8_linear.matmul_with_hp_or_float8_args.apply(
                input.to(dtype), self.weight.to(dtype).t(), self.linear_mm_config, self.config
            )

    options = Float8LinearConfig.from_recipe_name(recipe)  # pyright: ignore[reportArgumentType]
    linears = [
        (parent, name, Float8Linear.from_float(child, options))
        for block in blocks for parent in block.modules() for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and min(child.weight.shape) >= WIDE
    ]  # fmt: skip
    if not linears:
        raise UserError(f"setting train.float8: no linear of the decoder is {WIDE} wide on both sides")
    return linears
