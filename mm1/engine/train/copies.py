"""Cast the matrices of a model's blocks to bf16 once a step.

Autocast would cast them in every forward and every recomputation, and every gradient to fp32 before it is added: 24
or 30 bytes of each weight and micro-batch are read or written. With copies these are 10, and 6 once a step. Values are
the same to the bit. Sharded weights need no copies, because FSDP casts this process's share.
"""

from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from mm1.engine.layers.layer import blocks_to_shard
from mm1.engine.models.spec import Model


class WeightCopies:
    """Let blocks compute with copies of their matrices in autocast's dtype, inside a `with` statement.

    A copy is a plain attribute of its module, which Python finds before the parameter of this name. Optimizer,
    checkpoints and `parameters()` see the fp32 parameters alone, and their gradients, which are summed in fp32. Code
    that was compiled outside of the statement computes with the parameters inside too, unless its guards fail, as they
    do after evaluation without gradients: they do not see the new attribute.
    """

    def __init__(self, model: Model, dtype: torch.dtype):
        self.places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.weights: list[Tensor] = []
        for block in blocks_to_shard(model):
            for path, weight in block.autocast_weights().items():
                owner, _, name = path.rpartition(".")
                copy = nn.Parameter(torch.empty_like(weight, dtype=dtype), weight.requires_grad)
                if weight.requires_grad:
                    copy.register_post_accumulate_grad_hook(partial(_move_gradient, weight))
                self.places.append((block.get_submodule(owner), name, copy))
                self.weights.append(weight)

    def __enter__(self) -> Self:
        if self.weights:
            with torch.no_grad():
                torch._foreach_copy_([copy for *_, copy in self.places], self.weights)
        for module, name, copy in self.places:
            vars(module)[name] = copy
        return self

    def __exit__(self, *error: object) -> None:
        for module, name, _ in self.places:
            del vars(module)[name]


def _move_gradient(weight: nn.Parameter, copy: nn.Parameter) -> None:
    """Add the copy's gradient to that of the fp32 weight, and free it."""
    assert copy.grad is not None
    if weight.grad is None:
        weight.grad = copy.grad.to(weight.dtype)
    else:
        weight.grad.add_(copy.grad)
    copy.grad = None
