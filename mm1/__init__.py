"""Train and run MM1-type multimodal models. The public names are imported when they are first used."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["MM1", "generate", "load"]

_HOME = {"MM1": "mm1.engine.models.mm1", "load": "mm1.engine.train.checkpoint", "generate": "mm1.engine.infer.generate"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mm1' has no attribute {name!r}")
