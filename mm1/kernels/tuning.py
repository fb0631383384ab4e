"""Look up the configuration that a kernel runs with in tables; nothing is measured here.

    pinned      the caller's, within a block: `with pinned(grouped_gemm=Config(…))`
    user        a row this user's `mm1 tune` wrote
    shipped     a row of mm1/autotune/tables whose intervals contain the shape
    neighbour   a row for this GPU with every size within one octave of the shape
    borrowed    the same two, for another GPU of this architecture
    model       the one predicted to be fastest among those in the tables for this architecture
    default     the kernel's own choice, which compiles everywhere

The first step with an answer decides. The answer depends on kernel, shape, element size, device and files alone, so
every process that sees the same files gets the same one. Only the standard library is imported.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from math import inf, log2
from pathlib import Path
from typing import Any, NamedTuple

from mm1.kernels.device import DEVICES, Device, nearest

SCHEMA = 1
CACHED_ANSWERS = 4096  # at most; a long-running server asks for ever new shapes


class TuneError(ValueError):
    """Says in one line why something cannot be tuned or explained."""


class Tunable(NamedTuple):
    """Describes a kernel that has configurations.

    Shapes are named tuples. Integers are sizes, for which rows have intervals, and which neighbours may miss by an
    octave; bools, and sizes that are constants of the code, must be equal.
    """

    kernel: str
    shape: Any  # its class
    config: Any  # its class
    space: Callable[[Any, Any, Device], Iterator[Any]]  # (shape, dtype, device): worth measuring, legal or not
    legal: Callable[[Any, Any, Any, Device], bool]  # (config, shape, dtype, device)
    default: Callable[[Any, Any, Device], Any]
    seconds: Callable[[Any, Any, Any, Device], float]  # predicted
    constants: tuple[str, ...] = ()  # names of sizes that are constants of the compiled code

    def choices(self, shape: Any, dtype: Any, device: Device) -> Iterator[Any]:
        """Yield every legal configuration of the space."""
        return (c for c in self.space(shape, dtype, device) if self.legal(c, shape, dtype, device))


class Row(NamedTuple):
    """Holds one row of a table: the shapes that it is for, and their configuration."""

    bits: int
    when: tuple[Any, ...]  # by field of the shape: (low, high), or the value
    config: Any
    source: dict[str, Any]  # as written

    def holds(self, shape: tuple[Any, ...]) -> bool:
        """Tell whether the row's intervals contain the shape."""
        return all(w[0] <= s <= w[1] if type(w) is tuple else w == s for w, s in zip(self.when, shape))

    def alike(self, shape: tuple[Any, ...]) -> bool:
        """Tell whether everything is equal that must be equal."""
        return all(type(w) is tuple or w == s for w, s in zip(self.when, shape))

    def octaves(self, shape: tuple[Any, ...]) -> float | None:
        """Return the sum over sizes of log2 to the nearest end of the interval; None if one is more than 1."""
        total = 0.0
        for w, s in zip(self.when, shape):
            if type(w) is tuple and not w[0] <= s <= w[1]:
                miss = abs(log2(s / (w[0] if s < w[0] else w[1]))) if s and w[1] else inf
                if miss > 1:
                    return None
                total += miss
        return total if self.alike(shape) else None


class Answer(NamedTuple):
    """Holds one step's answer, and why."""

    step: str
    config: Any  # None: this step has none
    why: str
    row: Row | None = None


class LookUp(NamedTuple):
    """Holds one look-up, as `listening` records it."""

    kernel: str
    shape: Any
    bits: int
    device: str
    config: Any


_pinned: dict[str, object] = {}
_answers: dict[tuple[Any, ...], Any] = {}
_listeners: list[list[LookUp]] = []


@contextmanager
def pinned(**configs: object) -> Iterator[None]:
    """Run the named kernels with these configurations in the block: `pinned(grouped_gemm=Config(…))`."""
    before = dict(_pinned)
    _pinned.update(configs)
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


@contextmanager
def listening() -> Iterator[list[LookUp]]:
    """Record the look-ups in the block, in their order."""
    look_ups: list[LookUp] = []
    _listeners.append(look_ups)
    try:
        yield look_ups
    finally:
        _listeners.remove(look_ups)


def config_for(tunable: Tunable, shape: tuple[Any, ...], dtype: Any, device: Device) -> Any:
    """Return the configuration of `tunable` for a shape, a torch dtype and a device, in about a microsecond."""
    key = tunable[0], shape, dtype, device
    config = _pinned[tunable[0]] if tunable[0] in _pinned else _answers.get(key)
    if config is None:
        config = next(a.config for a in chain(tunable, shape, dtype, device) if a.config is not None)
        if len(_answers) >= CACHED_ANSWERS:
            _answers.clear()
        _answers[key] = config
    for look_ups in _listeners:
        look_ups.append(LookUp(tunable[0], shape, 8 * dtype.itemsize, device.name, config))
    return config


def pinned_or(name: str, otherwise: Callable[[], Any]) -> Any:
    """Return what is pinned under this name, or `otherwise()`, for a choice that no table has rows for."""
    return _pinned[name] if name in _pinned else otherwise()


def clear_caches() -> None:
    """Read tables and the user's rows again at the next look-up."""
    _answers.clear()
    shipped.cache_clear()
    cached.cache_clear()
    _vetted.cache_clear()


def chain(tunable: Tunable, shape: tuple[Any, ...], dtype: Any, device: Device) -> Iterator[Answer]:
    """Yield each step's answer, in order; the last step always has a configuration."""
    kernel, bits = tunable.kernel, 8 * dtype.itemsize

    def usable(rows: tuple[Row, ...]) -> list[Row]:
        return [r for r in rows if r.bits == bits and tunable.legal(r.config, shape, dtype, device)]

    pin = _pinned.get(kernel)
    yield Answer("pinned", pin, "by the caller" if pin is not None else "no configuration is pinned")
    rows = usable(cached(tunable, device.name))
    yield _holding("user", rows, shape, str(cache_folder() / kernel / device.name))
    rows = usable(shipped(tunable, device.name))
    yield _holding("shipped", rows, shape, f"{device.name}.json")
    yield _near("neighbour", rows, shape, f"{device.name}.json")
    borrowed = Answer("borrowed", None, f"no other {device.arch} has a row")
    for other in nearest(device.arch, device.units, device.bandwidth):
        if other.name != device.name:
            rows = usable(shipped(tunable, other.name))
            for answer in (_holding, _near):
                result = answer("borrowed", rows, shape, f"{other.name}.json")
                borrowed = result if borrowed.config is None and result.config is not None else borrowed
    yield borrowed
    yield _modelled(tunable, shape, dtype, device)
    yield Answer("default", tunable.default(shape, dtype, device), "the kernel's own")


def _holding(step: str, rows: list[Row], shape: tuple[Any, ...], where: str) -> Answer:
    row = next((r for r in rows if r.holds(shape)), None)
    if row is None:
        return Answer(step, None, f"none of {len(rows)} usable rows in {where} holds the shape")
    return Answer(step, row.config, f"{where}: {row.source['origin']}, {row.source['when']}", row)


def _near(step: str, rows: list[Row], shape: tuple[Any, ...], where: str) -> Answer:
    near = [(octaves, i) for i, row in enumerate(rows) if (octaves := row.octaves(shape)) is not None]
    if not near:
        return Answer(step, None, f"none of {len(rows)} usable rows in {where} is within an octave")
    octaves, i = min(near)
    why = f"{where}: {rows[i].source['origin']}, {rows[i].source['when']}, {octaves:.2f} octaves away"
    return Answer(step, rows[i].config, why, rows[i])


def _modelled(tunable: Tunable, shape: tuple[Any, ...], dtype: Any, device: Device) -> Answer:
    """Choose by prediction among the configurations that were compiled and checked for this architecture.

    The default stays unless another is predicted to be at least 5 % faster.
    """
    rows = [r for r in _vetted(tunable, device.arch) if r.bits == 8 * dtype.itemsize and r.alike(shape)]
    vetted = [c for c in dict.fromkeys(r.config for r in rows) if tunable.legal(c, shape, dtype, device)]
    if not vetted:
        return Answer("model", None, f"no configuration was checked for such shapes on {device.arch}")
    default = tunable.default(shape, dtype, device)
    by_default = tunable.seconds(default, shape, dtype, device)
    best = min(vetted, key=lambda config: tunable.seconds(config, shape, dtype, device))
    seconds = tunable.seconds(best, shape, dtype, device)
    if seconds > 0.95 * by_default:
        return Answer(
            "model", None, f"the best of {len(vetted)} is predicted to take {seconds / by_default:.2f} of default"
        )
    return Answer(
        "model", best, f"best of {len(vetted)} checked for {device.arch}, {seconds / by_default:.2f} of default"
    )


def tables() -> Any:
    """Return the folder of shipped tables."""
    return files("mm1") / "autotune" / "tables"


def cache_folder() -> Path:
    """Return the folder of the user's own rows: $MM1_CACHE/configs, or ~/.cache/mm1/configs."""
    if home := os.environ.get("MM1_CACHE"):
        return Path(home) / "configs"
    try:
        cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as some containers have
        cache_home = Path(os.devnull)  # a path where no rows can be read or written
    return cache_home / "mm1" / "configs"


@cache
def shipped(tunable: Tunable, name: str) -> tuple[Row, ...]:
    """Read the rows of mm1/autotune/tables/<kernel>/<name>.json."""
    path = tables() / tunable.kernel / f"{name}.json"
    if not path.is_file():
        return ()
    table = json.loads(path.read_text())
    return () if table.get("schema") != SCHEMA else tuple(row for r in table["rows"] if (row := read(tunable, r)))


@cache
def cached(tunable: Tunable, name: str) -> tuple[Row, ...]:
    """Read the user's rows, one a file, ordered by file name; files that cannot be read are skipped."""
    rows = []
    try:
        paths = sorted((cache_folder() / tunable.kernel / name).glob("*.json"))
    except OSError:
        return ()
    for path in paths:
        try:
            source = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        row = read(tunable, source) if isinstance(source, dict) and source.get("schema") == SCHEMA else None
        rows += [] if row is None else [row]
    return tuple(rows)


def read(tunable: Tunable, source: dict[str, Any]) -> Row | None:
    """Parse a row; None unless it has exactly the fields of the kernel's shape and configuration."""
    try:
        when, config = dict(source["when"]), source["config"]
        bits = when.pop("bits")
        fields = tunable.shape._fields
        if set(when) != set(fields) or set(config) != set(tunable.config.__dataclass_fields__):
            return None
        ranges = tuple(int(when[n]) if n in tunable.constants else _interval(when[n]) for n in fields)
        return Row(bits, ranges, tunable.config(**config), {"origin": "", **source})
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _interval(value: Any) -> Any:
    if isinstance(value, list):
        low, high = value
        return int(low), int(high)
    return value if isinstance(value, bool | str) else (int(value), int(value))


@cache
def _vetted(tunable: Tunable, arch: str) -> tuple[Row, ...]:
    rows = [r for d in DEVICES.values() if d.arch == arch for r in shipped(tunable, d.name)]
    return tuple(sorted(rows, key=lambda r: tuple(vars(r.config).values())))


def digest(tunables: list[Tunable], device: Device) -> str:
    """Return a digest of every row that look-ups on this device may use; ranks with equal digests choose alike."""
    seen = hashlib.sha256()
    for tunable in tunables:
        for rows in (cached(tunable, device.name), *(shipped(tunable, d.name) for d in DEVICES.values())):
            seen.update(json.dumps([r.source for r in rows], sort_keys=True).encode())
    return seen.hexdigest()
