"""Settings: fields of frozen dataclasses that declare their types and legal values, and one function that checks them.

    steps: Annotated[int, Range(least=1)] = 200_000
    dtype: Annotated[str, OneOf("auto", "bf16", "fp32")] = "auto"

`check` is called by each dataclass's __post_init__, so values from a TOML file, from the command line and from Python
are checked alike. `build` makes dataclasses of nested dicts.
"""

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from mm1.errors import UserError


@dataclass(frozen=True)
class Range:
    """The interval that a number lies in; None: no bound on that side. No setting may be NaN or infinite."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = (("≥", self.least), (">", self.above), ("≤", self.most), ("<", self.below))
        return " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


class OneOf:
    """The strings that a setting may be."""

    def __init__(self, *names: str):
        self.names = names

    def __contains__(self, value: str) -> bool:
        return value in self.names

    def __str__(self) -> str:
        return ", ".join(self.names)


Count = Annotated[int, Range(least=1)]
CountOrZero = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
PositiveOrZero = Annotated[float, Range(least=0)]
KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def expect(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raise UserError unless `condition` holds: "setting NAME is VALUE, expected EXPECTED"."""
    if not condition:
        raise UserError(f"setting {name} is {value!r}, expected {expected}")


def check(config: Any, name: str) -> None:
    """Check every field of a frozen dataclass, and give integers of float fields and lists of tuple fields their type.

    name: of the dataclass among the settings, such as "model.vision". Raises UserError naming the first field whose
    value is not of the declared type and range.
    """
    for field, hint in _hints(type(config)).items():
        object.__setattr__(config, field, _checked(hint, getattr(config, field), join(name, field)))


def build(cls: type, values: dict[str, Any], name: str = "", base: Any = None) -> Any:
    """Return the dataclass of nested dicts; fields that are not in `values` come from `base`, or from the defaults.

    name: of the dataclass among the settings. Raises UserError for unknown, missing and illegal values.
    """
    hints = _hints(cls)
    if unknown := set(values) - set(hints):
        raise UserError(f"unknown setting {join(name, min(unknown))}; known: {', '.join(hints)}")
    fields = {
        field: _checked(hints[field], value, join(name, field), getattr(base, field, None))
        for field, value in values.items()
    }
    if base is not None:
        return dataclasses.replace(base, **fields)
    defaults = (dataclasses.MISSING, dataclasses.MISSING)
    required = [f.name for f in dataclasses.fields(cls) if (f.default, f.default_factory) == defaults]
    if missing := [join(name, field) for field in required if field not in fields]:
        raise UserError(f"setting {missing[0]} is missing, expected {_described(hints[missing[0].rpartition('.')[2]])}")
    return cls(**fields)


def put(table: dict[str, Any], key: str, value: Any) -> None:
    """Set table["a"]["b"] for the key "a.b"."""
    *path, last = key.split(".")
    for name in path:
        if isinstance(table.get(name), str):
            table[name] = {"size": table[name]}  # model = "digits" with model.decoder.… on top
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"setting {key!r}: {name} has no fields")
    table[last] = value


def parsed(text: str) -> Any:
    """Return the TOML value that `text` is, or the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def join(name: str, field: str) -> str:
    return f"{name}.{field}" if name else field


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _checked(hint: Any, value: Any, name: str, base: Any = None) -> Any:
    """Return `value` as the type that `hint` declares. base: what a nested dict changes."""
    kind, legal = _parts(hint)
    items = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return None if value is None else _checked(items[0], value, name, base)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return build(typing.cast(type, kind), value, name, base)
        if isinstance(value, typing.cast(type, kind)):
            return value
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            hints = [items[0]] * len(value) if items[-1] is Ellipsis else items
            if len(hints) == len(value):
                return tuple(_checked(hint, item, f"{name}[{i}]") for i, (hint, item) in enumerate(zip(hints, value)))
    elif kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # The comparison is false of NaN, infinity, and integers that no float can hold.
        if number and abs(value) < 1e308 and (legal is None or value in legal):
            return float(value)
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool) and (legal is None or value in legal):
        return value
    raise UserError(f"setting {name} is {_short(value)}, expected {_described(hint)}")


def _parts(hint: Any) -> tuple[Any, Any]:
    """Return the type and the Range or OneOf, if there is one, of a field's hint."""
    if typing.get_origin(hint) is Annotated:
        return typing.get_args(hint)
    return hint, None


def _described(hint: Any) -> str:
    """Return what `hint` expects, in words."""
    kind, legal = _parts(hint)
    items = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return _described(items[0])
    if dataclasses.is_dataclass(kind):
        return "a table of settings"
    if typing.get_origin(kind) is tuple:
        count = "" if items[-1] is Ellipsis else f" of {len(items)}"
        return f"a list{count}, each {_described(items[0])}"
    if isinstance(legal, OneOf):
        return f"one of {legal}"
    return f"{KINDS[kind]} {legal}" if legal else KINDS[kind]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
