"""Conversion of other projects' weights into checkpoints."""

from typing import Any

__all__ = ["from_hf"]


def __getattr__(name: str) -> Any:
    """Import from_hf when it is first used, so that the help of `mm1 convert` needs no torch."""
    if name == "from_hf":
        from mm1.engine.convert.weights import from_hf

        return from_hf
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
