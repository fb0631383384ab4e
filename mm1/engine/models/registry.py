"""Find a model's class, settings and named sizes by its kind, config.kind, in one table."""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from mm1.engine.settings import Tables
from mm1.errors import UserError, require

if TYPE_CHECKING:
    from mm1.engine.models.spec import Model


class Entry(NamedTuple):
    """Name what defines a kind of model, each as "module:name"; modules are imported on first use."""

    model: str  # class of the model
    config: str  # dataclass of its settings
    sizes: str = ""  # dict of settings by the names of sizes; empty: the kind has no named sizes
    recipe: str = "pretrain"  # of its runs if they name none, a key of RECIPES in mm1/engine/run_config.py


REGISTRY: dict[str, Entry] = {
    "mm1": Entry(
        "mm1.engine.models.mm1:MM1", "mm1.engine.models.mm1_config:MM1Config", "mm1.engine.models.mm1_config:MODELS"
    ),
    "aim": Entry(
        "mm1.engine.models.aim:AIM",
        "mm1.engine.models.aim_config:AIMConfig",
        "mm1.engine.models.aim_config:MODELS",
        recipe="aim",
    ),
}


def model_class(kind: str) -> "type[Model]":
    """Return the class of a model. Raises UserError for a kind that is not registered."""
    return _load(_entry(kind).model)


def config_class(kind: str) -> type:
    """Return the dataclass of a model's settings. Raises UserError for a kind that is not registered."""
    return _load(_entry(kind).config)


def default_recipe(kind: str) -> str:
    """Return the recipe of a kind's runs that name none. Raises UserError for a kind that is not registered."""
    return _entry(kind).recipe


class RegisteredConfigs(Tables):
    """Mark a setting whose value is the settings of a registered model."""

    def classes(self) -> tuple[type, ...]:
        return tuple(config_class(kind) for kind in REGISTRY)


def sizes() -> dict[str, Any]:
    """Return the settings of the named sizes of all kinds, by name."""
    return {name: size for entry in REGISTRY.values() if entry.sizes for name, size in _load(entry.sizes).items()}


def named(name: str) -> Any:
    """Return the settings of a named size. Raises UserError for an unknown name."""
    if name not in sizes():
        raise UserError(f"unknown size {name!r}, and no such file or folder; expected one of {', '.join(sizes())}")
    return sizes()[name]


@cache
def on_meta(config: Any) -> "Model":
    """Return the model of a config on the meta device, for its names and shapes. Do not change it: it is cached."""
    import torch

    with torch.device("meta"):
        return model_class(config.kind)(config)


def _entry(kind: str) -> Entry:
    require(isinstance(kind, str) and kind in REGISTRY, "setting model.kind", kind, f"one of {', '.join(REGISTRY)}")
    return REGISTRY[kind]


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
