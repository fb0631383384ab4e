"""Define settings: fields of frozen dataclasses that declare type, legal values and meaning, and their checks.

    steps: Annotated[int, Range(minimum=1)] = 200_000
    "Optimizer steps of the run."

Each dataclass's __post_init__ calls `check`, so that values from a TOML file, the command line and Python are checked
alike. `build` makes dataclasses of nested dicts. The string below a field is its help text, on the command line and on
the page of settings. tyro shows these settings but does not check them, because it sees neither TOML files nor Python
callers; pydantic would need as much code to translate its errors into these.
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
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from operator import ge, gt, le, lt
from typing import Annotated, Any

from mm1.errors import UserError, require


@dataclass(frozen=True)
class Range:
    """Mark the interval of a number; None: no bound on that side. No setting may be NaN or infinite."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None

    @property
    def bounds(self) -> list[tuple[str, Callable[[float, float], bool], float]]:
        """Return the sign, the comparison and the number of each bound."""
        all_bounds = [("≥", ge, self.minimum), (">", gt, self.above), ("≤", le, self.maximum), ("<", lt, self.below)]
        return [(sign, compare, bound) for sign, compare, bound in all_bounds if bound is not None]

    def __contains__(self, value: float) -> bool:
        return all(compare(value, bound) for _, compare, bound in self.bounds)

    def __str__(self) -> str:
        return " and ".join(f"{sign} {bound}" for sign, _, bound in self.bounds)


class OneOf:
    """Mark the strings that a setting may be."""

    def __init__(self, *names: str):
        self.names = names

    def __contains__(self, value: str) -> bool:
        return value in self.names

    def __str__(self) -> str:
        return ", ".join(self.names)


class Tables:
    """Mark a setting whose value is a dataclass of one of several classes."""

    def classes(self) -> tuple[type, ...]:
        """Return the classes, each a dataclass of settings."""
        raise NotImplementedError

    def __contains__(self, value: object) -> bool:
        return type(value) in self.classes()


class MayChange:
    """Mark a setting of the model that may change when a run continues from its own checkpoint."""


Count = Annotated[int, Range(minimum=1)]
CountOrZero = Annotated[int, Range(minimum=0)]
Positive = Annotated[float, Range(above=0)]
PositiveOrZero = Annotated[float, Range(minimum=0)]
TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
NONE = "none"  # None in TOML, which has no null


def check(config: Any, name: str) -> None:
    """Check every field of a frozen dataclass, and convert ints of float fields to float and lists to tuples.

    name: the dataclass's full name among the settings, such as "model.vision". Raises UserError that names the first
    field whose value is not of the declared type and range.
    """
    for field, hint in hints(type(config)).items():
        object.__setattr__(config, field, _checked(hint, getattr(config, field), dotted(name, field)))


def build(cls: type, values: dict[str, Any], name: str = "", base: Any = None) -> Any:
    """Return an instance of the dataclass `cls` from nested dicts.

    values: by field; a missing field has the value of `base`, or else its default. name: the dataclass's full name
    among the settings. Raises UserError for an unknown field, a missing one and an illegal value.
    """
    require_names(values, hints(cls), name)
    fields = {
        field: _checked(hints(cls)[field], value, dotted(name, field), getattr(base, field, None))
        for field, value in values.items()
    }
    if base is not None:
        return dataclasses.replace(base, **fields)
    for field in required(cls):
        if field not in fields:
            raise UserError(f"setting {dotted(name, field)} is missing, expected {described(hints(cls)[field])}")
    return cls(**fields)


def required(cls: type) -> list[str]:
    """Return the fields of a dataclass that have no default."""
    return [field for field in hints(cls) if default(cls, field) is dataclasses.MISSING]


def require_names(fields: Iterable[str], names: Collection[str], name: str = "") -> None:
    """Raise UserError for the first of `fields` that is not in `names`, with the names of similar spelling, or all.

    name: the full name of the table that has the fields, such as "model.vision".
    """
    for field in fields:
        if field not in names:
            similar = [dotted(name, other) for other in difflib.get_close_matches(field, names)]
            hint = f"did you mean {' or '.join(similar)}?" if similar else f"expected one of {', '.join(names)}"
            raise UserError(f"unknown setting {dotted(name, field)}, {hint}")


def assign(table: dict[str, Any], key: str, value: Any) -> None:
    """Set table["a"]["b"] to `value` for the key "a.b". Raises UserError if table["a"] exists and is not a table."""
    *path, last = key.split(".")
    for name in path:
        if isinstance(table.get(name), str):
            table[name] = {"size": table[name]}  # model = "digits" with model.decoder.… on top
        table = table.setdefault(name, {})
        require(isinstance(table, dict), f"setting {name}", table, f"a table with the setting {key}")
    table[last] = value


def parse_value(text: str) -> Any:
    """Return the TOML value in `text`, or the text itself if it is not TOML."""
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
    # TOML's strings have the escapes of JSON, and also escape DEL.
    return json.dumps(NONE if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_toml(table: dict[str, Any], name: str = "") -> str:
    """Return a nested dict of settings as TOML: the values of a table, then its tables under their full names."""
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
    """Return the help text of each field of a dataclass, which is the string below it in the source."""
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
    """Return whether a field with this hint is marked MayChange."""
    return any(isinstance(mark, MayChange) for mark in getattr(hint, "__metadata__", ()))


def tables_of(hint: Any) -> tuple[type, ...]:
    """Return the dataclasses of which a field's value may be one; empty for other fields."""
    kind, legal = _parts(hint)
    if isinstance(legal, Tables):
        return legal.classes()
    return (typing.cast(type, kind),) if dataclasses.is_dataclass(kind) else ()


def item_table(hint: Any) -> type | None:
    """Return the dataclass of the items of a field that is a list of tables; None for other fields."""
    items = typing.get_args(_parts(hint)[0])
    return typing.cast(type, items[0]) if items and dataclasses.is_dataclass(items[0]) else None


def described(hint: Any) -> str:
    """Return the values that a hint allows in words, such as "an integer ≥ 1"."""
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
    return f"{TYPE_NAMES[kind]} {legal}" if legal else TYPE_NAMES[kind]


def allows_none(hint: Any) -> bool:
    """Return whether a field with this hint may be None."""
    return _is_union(_parts(hint)[0])


def _checked(hint: Any, value: Any, name: str, base: Any = None) -> Any:
    """Return `value` converted to the type of `hint`. base: the dataclass that a nested dict changes."""
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
        # The comparison is false for NaN, infinity, and integers beyond the range of floats.
        if number and abs(value) < 1e308 and (legal is None or value in legal):
            return float(value)
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool) and (legal is None or value in legal):
        return value
    raise UserError(f"setting {name} is {_short(value)}, expected {described(hint)}")


def _parts(hint: Any) -> tuple[Any, Any]:
    """Return a hint's type and its mark of legal values, or None."""
    if typing.get_origin(hint) is not Annotated:
        return hint, None
    kind, *marks = typing.get_args(hint)
    return kind, next((mark for mark in marks if not isinstance(mark, MayChange)), None)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
