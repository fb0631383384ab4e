"""A module whose forward may be replaced for speed or memory."""

from collections.abc import Callable
from typing import Any

from torch import nn


class Replaceable(nn.Module):
    """Gives copies and pickles the class's own forward, as torch does it with what Module.compile made.

    A replaced one is a closure over this module: it cannot be pickled, and in a copy it would compute with the weights
    of the original.
    """

    _replaced: Callable[..., Any] | None = None

    def replace_forward(self, forward: Callable[..., Any]) -> None:
        self.forward = self._replaced = forward

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if (replaced := state.pop("_replaced", None)) and state.get("forward") is replaced:
            del state["forward"]
        return state
