"""Look up the configuration that a kernel runs with; nothing is measured here.

    pinned      the configuration that the caller sets in a block: `with pinned(grouped_gemm=Config(…))`
    user        a row that this user's `mm1 tune` wrote
    shipped     a row of mm1/autotune/tables whose intervals contain the shape
    neighbour   a row for this GPU with every size within one octave of the shape
    borrowed    the nearest row within one octave for another GPU of this architecture
    model       the configuration predicted to be the fastest of those in the tables for this architecture
    default     the kernel's own choice, which compiles everywhere

The first step that has a configuration decides. The result depends on kernel, shape, element size, device and files
alone, so processes that read the same files choose the same configuration. Only the standard library is imported.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.resources import files
from math import inf, log2
from pathlib import Path
from typing import Any, NamedTuple

from mm1.kernels.device import DEVICES, Device, nearest

SCHEMA = 1
CACHED_ANSWERS = 4096  # the largest number of cached answers, as a long-running server looks up ever new shapes


class TuneError(ValueError):
    """State in one line why something cannot be tuned or explained."""


class Tunable(NamedTuple):
    """Describe a kernel that has configurations.

    Shapes are named tuples. Their integers are sizes: rows have intervals for them, which a neighbour's size may miss
    by an octave. Bools, and sizes that are constants of the compiled code, must be equal.
    """

    kernel: str
    shape: Any  # class of shapes
    config: Any  # class of configurations
    space: Callable[[Any, Any, Device], Iterator[Any]]  # (shape, dtype, device): worth measuring, legal or not
    legal: Callable[[Any, Any, Any, Device], bool]  # (config, shape, dtype, device)
    default: Callable[[Any, Any, Device], Any]
    seconds: Callable[..., float]  # predicted, from config, shape, dtype, device and, if it was compiled, Code
    constants: tuple[str, ...] = ()  # names of sizes that are constants of the compiled code

    def choices(self, shape: Any, dtype: Any, device: Device) -> Iterator[Any]:
        """Yield the legal configurations of the space."""
        return (c for c in self.space(shape, dtype, device) if self.legal(c, shape, dtype, device))


class Row(NamedTuple):
    """Hold one row of a table: the shapes that it is for, and their configuration."""

    bits: int
    when: tuple[Any, ...]  # for each field of the shape: an interval (low, high), or the value
    config: Any
    source: dict[str, Any]  # the row as written in its file

    def alike(self, shape: tuple[Any, ...]) -> bool:
        """Tell whether all values are equal that must be equal."""
        return all(type(w) is tuple or w == s for w, s in zip(self.when, shape))

    def octaves(self, shape: tuple[Any, ...]) -> float:
        """Return the distance to the shape: the sum over sizes of log2 to the nearest end of the interval.

        inf where a size is more than one octave from its interval, or a value that must be equal is not.
        """
        total = 0.0 if self.alike(shape) else inf
        for w, s in zip(self.when, shape):
            if type(w) is tuple and not w[0] <= s <= w[1]:
                distance = abs(log2(s / (w[0] if s < w[0] else w[1]))) if s and w[1] else inf
                total += distance if distance <= 1 else inf
        return total


class Answer(NamedTuple):
    """Hold the answer of one step of the look-up, and the reason for it."""

    step: str
    config: Any  # None: the step has no configuration
    why: str
    row: Row | None = None


class LookUp(NamedTuple):
    """Hold one look-up, as `listening` records it."""

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
    """Run the named kernels with these configurations in the block, as in `pinned(grouped_gemm=Config(…))`."""
    before = dict(_pinned)
    _pinned.update(configs)
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


@contextmanager
def listening() -> Iterator[list[LookUp]]:
    """Record the look-ups in the block, in order."""
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
    """Return the value pinned under this name, or else `otherwise()`, for a choice that no table has rows for."""
    return _pinned[name] if name in _pinned else otherwise()


def is_pinned() -> bool:
    """Return whether the caller has pinned a configuration."""
    return bool(_pinned)


def clear_caches() -> None:
    """Forget cached answers, tables and rows, so that the next look-up reads the files again."""
    _answers.clear()
    shipped.cache_clear()
    cached.cache_clear()
    _vetted.cache_clear()


def chain(tunable: Tunable, shape: tuple[Any, ...], dtype: Any, device: Device) -> Iterator[Answer]:
    """Yield the answer of each step, in order; the last one always has a configuration."""
    kernel, bits = tunable.kernel, 8 * dtype.itemsize

    def usable(rows: tuple[Row, ...]) -> list[Row]:
        return [r for r in rows if r.bits == bits and tunable.legal(r.config, shape, dtype, device)]

    pin = _pinned.get(kernel)
    yield Answer("pinned", pin, "by the caller" if pin is not None else "no configuration is pinned")
    rows = usable(cached(tunable, device.name))
    yield _nearest("user", rows, shape, str(cache_folder() / kernel / device.name), 0)
    rows = usable(shipped(tunable, device.name))
    yield _nearest("shipped", rows, shape, f"{device.name}.json", 0)
    yield _nearest("neighbour", rows, shape, f"{device.name}.json", len(shape))
    others = (d.name for d in nearest(device.arch, device.units, device.bandwidth) if d.name != device.name)
    borrowed = (
        _nearest("borrowed", usable(shipped(tunable, name)), shape, f"{name}.json", len(shape)) for name in others
    )
    none = Answer("borrowed", None, f"no other {device.family} has a row for the shape")
    yield next((answer for answer in borrowed if answer.config is not None), none)
    yield _modelled(tunable, shape, dtype, device)
    yield Answer("default", tunable.default(shape, dtype, device), "the kernel's own")


def _nearest(step: str, rows: list[Row], shape: tuple[Any, ...], where: str, farthest: int) -> Answer:
    """Answer with the row nearest to the shape, if it is at most `farthest` octaves away; of equals the first."""
    row = min(rows, key=lambda r: r.octaves(shape), default=None)
    octaves = inf if row is None else row.octaves(shape)
    if row is None or octaves > farthest:
        condition = "is within an octave of" if farthest else "holds"
        return Answer(step, None, f"none of {len(rows)} usable rows in {where} {condition} the shape")
    why = f"{where}: {row.source['origin']}, {row.source['when']}"
    return Answer(step, row.config, f"{why}, {octaves:.2f} octaves away" if octaves else why, row)


def _modelled(tunable: Tunable, shape: tuple[Any, ...], dtype: Any, device: Device) -> Answer:
    """Choose by prediction among the configurations that were compiled and checked for the device's family.

    The step has no configuration unless one is predicted to be at least 5 % faster than the default.
    """
    rows = [r for r in _vetted(tunable, device.family) if r.bits == 8 * dtype.itemsize and r.alike(shape)]
    vetted = [c for c in dict.fromkeys(r.config for r in rows) if tunable.legal(c, shape, dtype, device)]
    if not vetted:
        return Answer("model", None, f"no configuration was checked for such shapes on {device.family}")
    seconds = {c: tunable.seconds(c, shape, dtype, device) for c in vetted}
    best, default = min(vetted, key=seconds.__getitem__), tunable.default(shape, dtype, device)
    share = seconds[best] / tunable.seconds(default, shape, dtype, device)
    why = (
        f"the best of {len(vetted)} checked for {device.family} is predicted to take {share:.2f} of the default's time"
    )
    return Answer("model", best if share <= 0.95 else None, why)


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
        cache_home = Path(os.devnull)  # no rows can be read from or written to such a path
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
    """Read the user's rows, one in each file, ordered by file name; files that cannot be read are skipped."""
    rows = []
    with suppress(OSError):  # of the folder
        for path in sorted((cache_folder() / tunable.kernel / name).glob("*.json")):
            with suppress(OSError, ValueError, TypeError, KeyError):
                source = json.loads(path.read_text())
                if source["schema"] == SCHEMA and (row := read(tunable, source)):
                    rows.append(row)
    return tuple(rows)


def read(tunable: Tunable, source: dict[str, Any]) -> Row | None:
    """Parse a row; return None unless it has exactly the fields of the kernel's shape and configuration."""
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
def _vetted(tunable: Tunable, family: str) -> tuple[Row, ...]:
    rows = [r for d in DEVICES.values() if d.family == family for r in shipped(tunable, d.name)]
    return tuple(sorted(rows, key=lambda r: tuple(vars(r.config).values())))


def digest(tunables: list[Tunable], device: Device) -> str:
    """Return a digest of all rows that look-ups on this device may use; ranks with equal digests choose alike."""
    seen = hashlib.sha256()
    for tunable in tunables:
        for rows in (cached(tunable, device.name), *(shipped(tunable, d.name) for d in DEVICES.values())):
            seen.update(json.dumps([r.source for r in rows], sort_keys=True).encode())
    return seen.hexdigest()
