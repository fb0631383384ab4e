"""Convert published weights to models and checkpoints of mm1. Names are imported when they are first used."""

from importlib import import_module
from typing import Any

__all__ = ["from_hf", "upcycle"]

_MODULES = {"from_hf": "weights", "upcycle": "assemble"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the help of `mm1 convert` needs no torch."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
