"""Settings: fields of frozen dataclasses that declare type, legal values and meaning; `check` enforces the first two.

    steps: Annotated[int, Range(minimum=1)] = 200_000
    "Optimizer steps of the run."

`check` is called by each dataclass's __post_init__, so values from a TOML file, from the command line and from Python
are checked alike. `build` makes dataclasses of nested dicts. The string below a field is its help text: the command
line and the page of settings take it from there. tyro shows these settings but does not check them, as it sees neither
TOML files nor Python callers; pydantic would need as much code to translate its errors into these.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import tomllib
import types
import typing
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from mm1.errors import UserError, require


@dataclass(frozen=True)
class Range:
    """The interval that a number lies in; None: no bound on that side. No setting may be NaN or infinite."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = (("≥", self.minimum), (">", self.above), ("≤", self.maximum), ("<", self.below))
        return " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


class OneOf:
    """The strings that a setting may be."""

    def __init__(self, *names: str):
        self.names = names

    def __contains__(self, value: str) -> bool:
        return value in self.names

    def __str__(self) -> str:
        return ", ".join(self.names)


class MayChange:
    """Marks a setting of the model that may change when a run continues from its own checkpoint."""


Count = Annotated[int, Range(minimum=1)]
CountOrZero = Annotated[int, Range(minimum=0)]
Positive = Annotated[float, Range(above=0)]
PositiveOrZero = Annotated[float, Range(minimum=0)]
KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
NONE = "none"  # None in TOML, which has no null


def check(config: Any, name: str) -> None:
    """Check every field of a frozen dataclass, and convert ints of float fields to float and lists to tuples.

    name: the dataclass's place among the settings, such as "model.vision". Raises UserError naming the first field
    whose value is not of the declared type and range.
    """
    for field, hint in hints(type(config)).items():
        object.__setattr__(config, field, _checked(hint, getattr(config, field), dotted(name, field)))


def build(cls: type, values: dict[str, Any], name: str = "", base: Any = None) -> Any:
    """Return an instance of the dataclass `cls` from nested dicts.

    values: by field; a field that is missing comes from `base`, or else from the defaults. name: the dataclass's place
    among the settings. Raises UserError for an unknown field, a missing one and an illegal value.
    """
    types_of_fields = hints(cls)
    require_names(values, types_of_fields, name)
    fields = {
        field: _checked(types_of_fields[field], value, dotted(name, field), getattr(base, field, None))
        for field, value in values.items()
    }
    if base is not None:
        return dataclasses.replace(base, **fields)
    for field, hint in types_of_fields.items():
        if field not in fields and default(cls, field) is dataclasses.MISSING:
            raise UserError(f"setting {dotted(name, field)} is missing, expected {described(hint)}")
    return cls(**fields)


def require_names(fields: Iterable[str], names: Collection[str], name: str = "") -> None:
    """Raise UserError for the first of `fields` that is not in `names`, with those that are spelled alike, or all.

    name: the place of the fields among the settings, such as "model.vision".
    """
    for field in fields:
        if field not in names:
            similar = [dotted(name, other) for other in difflib.get_close_matches(field, names)]
            hint = f"did you mean {' or '.join(similar)}?" if similar else f"expected one of {', '.join(names)}"
            raise UserError(f"unknown setting {dotted(name, field)}, {hint}")


def assign(table: dict[str, Any], key: str, value: Any) -> None:
    """Set table["a"]["b"] to `value` for the key "a.b". Raises UserError if "a" is there and not a table."""
    *path, last = key.split(".")
    for name in path:
        if isinstance(table.get(name), str):
            table[name] = {"size": table[name]}  # model = "digits" with model.decoder.… on top
        table = table.setdefault(name, {})
        require(isinstance(table, dict), f"setting {name}", table, f"a table, for {key} is set in it")
    table[last] = value


def parse_value(text: str) -> Any:
    """Return the TOML value that `text` spells, or the text itself where it spells none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def toml_value(value: Any) -> str:
    """Return the TOML that `build` reads as `value`: a number, string, bool, None, or a list or dict of these."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # TOML's strings escape as JSON's do, and DEL too.
    return json.dumps(NONE if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_toml(table: dict[str, Any], name: str = "") -> str:
    """Return a nested dict of settings as TOML: the values of a table, then its tables, each by its full name."""
    blocks, values = [], []
    for key, value in table.items():
        if isinstance(value, dict):
            blocks.append(to_toml(value, dotted(name, key)))
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            blocks += (f"[[{dotted(name, key)}]]\n{to_toml(item)}" for item in value)
        else:
            values.append(f"{key} = {toml_value(value)}")
    head = [f"[{name}]"] if name and values else []
    return "\n\n".join(filter(None, ["\n".join(head + values), *blocks]))


def dotted(name: str, field: str) -> str:
    """Return the full name of a field: "a.b", or "b" where `name` is empty."""
    return f"{name}.{field}" if name else field


@cache
def hints(cls: type) -> dict[str, Any]:
    """Return the type hint of each field of a dataclass, in order, Range, OneOf and MayChange included."""
    annotations = typing.get_type_hints(cls, include_extras=True)
    return {field.name: annotations[field.name] for field in dataclasses.fields(cls)}


@cache
def help_texts(cls: type) -> dict[str, str]:
    """Return the help text of each field of a dataclass: the string that stands below it in the source."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }  # fmt: skip


def default(cls: type, field: str) -> Any:
    """Return the default of a dataclass's field, or dataclasses.MISSING."""
    (it,) = (it for it in dataclasses.fields(cls) if it.name == field)
    return it.default if it.default_factory is dataclasses.MISSING else it.default_factory()


def may_change(hint: Any) -> bool:
    """Say whether a field with this hint is marked MayChange."""
    return any(isinstance(mark, MayChange) for mark in getattr(hint, "__metadata__", ()))


def table_of(hint: Any) -> type | None:
    """Return the dataclass whose fields are the settings below a field with this hint, or None."""
    kind = _parts(hint)[0]
    return kind if dataclasses.is_dataclass(kind) and isinstance(kind, type) else None


def nested(hint: Any) -> type | None:
    """Return the dataclass that a hint names, alone or as the items of a tuple; None for other hints."""
    kind, _ = _parts(hint)
    items = typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)
    return typing.cast(type, items[0]) if dataclasses.is_dataclass(items[0]) else None


def described(hint: Any) -> str:
    """Return the values that a hint allows, in words: "an integer ≥ 1"."""
    kind, legal = _parts(hint)
    items = typing.get_args(kind)
    if _is_union(kind):
        return described(items[0])
    if dataclasses.is_dataclass(kind):
        return "a table of settings"
    if typing.get_origin(kind) is tuple:
        count = "" if items[-1] is Ellipsis else f" of {len(items)}"
        return f"a list{count}, each {described(items[0])}"
    if isinstance(legal, OneOf):
        return f"one of {legal}" if len(legal.names) > 1 else f'"{legal}"'
    return f"{KINDS[kind]} {legal}" if legal else KINDS[kind]


def allows_none(hint: Any) -> bool:
    """Say whether a field with this hint may be None."""
    return _is_union(_parts(hint)[0])


def _checked(hint: Any, value: Any, name: str, base: Any = None) -> Any:
    """Return `value` as the type that `hint` declares. base: the dataclass that a nested dict changes."""
    kind, legal = _parts(hint)
    items = typing.get_args(kind)
    if _is_union(kind):
        return None if value is None or value == NONE else _checked(items[0], value, name, base)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return build(typing.cast(type, kind), value, name, base)
        if isinstance(value, typing.cast(type, kind)) or (legal is not None and value in legal):
            return value
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            each = [items[0]] * len(value) if items[-1] is Ellipsis else items
            if len(each) == len(value):
                return tuple(_checked(hint, item, f"{name}[{i}]") for i, (hint, item) in enumerate(zip(each, value)))
    elif kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # The comparison is false of NaN, infinity, and integers that no float can hold.
        if number and abs(value) < 1e308 and (legal is None or value in legal):
            return float(value)
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool) and (legal is None or value in legal):
        return value
    raise UserError(f"setting {name} is {_short(value)}, expected {described(hint)}")


def _parts(hint: Any) -> tuple[Any, Any]:
    """Return the type and the legal values, if they are restricted, of a field's hint."""
    if typing.get_origin(hint) is not Annotated:
        return hint, None
    kind, *marks = typing.get_args(hint)
    return kind, next((mark for mark in marks if not isinstance(mark, MayChange)), None)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
