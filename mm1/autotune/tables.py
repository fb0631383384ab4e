"""Write configurations: shipped tables, with one line per row so that diffs are readable, and the user's own rows."""

import hashlib
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import mm1
from mm1.autotune.space import interval
from mm1.autotune.static import Compiled, write
from mm1.kernels.device import Device
from mm1.kernels.language import triton
from mm1.kernels.tuning import SCHEMA, Tunable, cache_folder, clear_caches, read

TABLES = Path(__file__).parent / "tables"
Row = dict[str, Any]


def versions() -> dict[str, str]:
    """Return the versions that a row depends on."""
    return {"mm1": mm1.__version__, "triton": triton.__version__, "torch": torch.__version__.split("+")[0],
            "python": platform.python_version()}  # fmt: skip


def row(shape: Any, bits: int, config: Any, origin: str, **facts: Any) -> Row:
    """Return a row for the octave that contains the shape's first size. origin: "predicted" or "measured"."""
    when = {"bits": bits, **shape._asdict(), shape._fields[0]: interval(shape[0])}
    return {"when": when, "config": dict(vars(config)), "origin": origin, **facts}


def static_facts(codes: list[Compiled], device: Device) -> dict[str, Any]:
    """Return the facts of a configuration's machine code: the worst over its launches."""
    facts = [code.facts(device) for code in codes]
    matrix = sum((Counter(f["matrix"]) for f in facts), Counter())
    maxima = {name: max(f[name] for f in facts) for name in ("registers", "stack", "shared", "code")}
    return {**maxima, "programs": min(f["programs"] for f in facts), "matrix": dict(sorted(matrix.items()))}


def merged(rows: list[Row]) -> list[Row]:
    """Sort rows, and join predicted neighbours that differ only in their interval."""
    joined: list[Row] = []
    for r in sorted(rows, key=lambda r: (*_others(r), _range(r))):
        last = joined[-1] if joined else r
        same = all(last[name] == r[name] for name in ("config", "origin")) and _others(last) == _others(r)
        if same and r["origin"] == "predicted" and _range(last)[1] + 1 == _range(r)[0]:
            joined[-1] = _with_range(r, _range(last)[0], _range(r)[1])
        else:
            joined.append(r)
    return joined


def without(rows: list[Row], source: Row) -> list[Row]:
    """Return the rows without the interval of a new measured row, which is cut out of predicted rows."""
    low, high = _range(source)
    result = []
    for r in rows:
        begin, end = _range(r)
        if r["origin"] == "measured" or _others(r) != _others(source) or end < low or begin > high:
            result.append(r)
        else:
            result += [_with_range(r, *rest) for rest in ((begin, low - 1), (high + 1, end)) if rest[0] <= rest[1]]
    return result


def _size(r: Row) -> str:
    """Return the name of the shape's first size, which has an interval."""
    return next(name for name in r["when"] if name != "bits")


def _range(r: Row) -> list[int]:
    return r["when"][_size(r)]


def _others(r: Row) -> tuple[Any, ...]:
    """Return the fields that a shape must equal."""
    return tuple(value for name, value in r["when"].items() if name != _size(r))


def _with_range(r: Row, low: int, high: int) -> Row:
    return {**r, "when": {**r["when"], _size(r): [low, high]}}


def write_table(
    folder: Path, kernel: str, device: Device, rows: list[Row], predicted: dict[str, str] | None = None
) -> Path:
    """Write <folder>/<kernel>/<device>.json and return its path.

    predicted: the versions with which new predicted rows were made. Measured rows hold their own.
    """
    head = {
        "schema": SCHEMA, "kernel": kernel, "device": {
            "name": device.name, "vendor": device.vendor, "arch": device.arch, "pci": [f"{i:04x}" for i in device.pci],
            "units": device.units, "bandwidth": device.bandwidth,
        }, "versions": predicted or made_with(folder, kernel, device),
    }  # fmt: skip
    path = folder / kernel / f"{device.name}.json"
    lines = ",\n".join("  " + json.dumps(r) for r in merged(rows))
    write(path, json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n')
    clear_caches()
    return path


def _read(folder: Path, kernel: str, device: Device) -> dict[str, Any]:
    path = folder / kernel / f"{device.name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"rows": [], "versions": versions()}


def read_table(folder: Path, kernel: str, device: Device) -> list[Row]:
    """Return the rows of a table as written, or no rows if there is no such table."""
    return _read(folder, kernel, device)["rows"]


def made_with(folder: Path, kernel: str, device: Device) -> dict[str, str]:
    """Return the versions of the table's predicted rows, or the installed ones if there is no such table."""
    return _read(folder, kernel, device)["versions"]


def write_user_row(tunable: Tunable, device: Device, source: Row) -> Path:
    """Write a row to a file named by its shape and return its path.

    Processes may write at once; for one shape the last one wins. Raises ValueError for a row of another kernel.
    """
    if read(tunable, source) is None:
        raise ValueError(f"{source} is not a row of {tunable.kernel}")
    name = hashlib.sha256(json.dumps(source["when"], sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / tunable.kernel / device.name / f"{name}.json"
    write(path, json.dumps({"schema": SCHEMA, **source}) + "\n")
    clear_caches()
    return path
