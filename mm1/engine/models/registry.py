"""Find the classes of a model and of its config by config.kind: one table."""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from mm1.errors import UserError

if TYPE_CHECKING:
    from mm1.engine.models.spec import Model


class Entry(NamedTuple):
    """Says where a model and its config are defined; they are imported when they are asked for."""

    model: str  # "module:class"
    config: str


KINDS: dict[str, Entry] = {"mm1": Entry("mm1.engine.models.mm1:MM1", "mm1.engine.models.mm1_config:Model")}


def model_class(kind: str) -> "type[Model]":
    """Return the class of a model. Raises UserError for a kind that is not in KINDS."""
    return _load(_entry(kind).model)


def config_class(kind: str) -> type:
    """Return the dataclass of a model's settings. Raises UserError for a kind that is not in KINDS."""
    return _load(_entry(kind).config)


class Registered:
    """Contains the configs of all registered models: the legal values of a setting."""

    def __contains__(self, value: Any) -> bool:
        kind = getattr(value, "kind", None)
        return kind in KINDS and type(value) is config_class(kind)


@cache
def on_meta(config: Any) -> "Model":
    """Return the model of a config without memory for its values, to read names and shapes. Do not change it."""
    import torch

    with torch.device("meta"):
        return model_class(config.kind)(config)


def _entry(kind: str) -> Entry:
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"setting model.kind is {kind!r}, expected one of {', '.join(KINDS)}")
    return KINDS[kind]


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
