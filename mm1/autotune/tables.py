"""Write configurations: shipped tables, with a line for each row so that diffs are readable, and the user's rows."""

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


def versions() -> dict[str, str]:
    """Return the versions that a row depends on."""
    return {"mm1": mm1.__version__, "triton": triton.__version__, "torch": torch.__version__.split("+")[0],
            "python": platform.python_version()}  # fmt: skip


def row(shape: Any, bits: int, config: Any, origin: str, **more: Any) -> dict[str, Any]:
    """Return a row for the octave that contains the shape's first size."""
    when = {"bits": bits, **shape._asdict()}
    first = shape._fields[0]
    when[first] = interval(shape[0])
    return {"when": when, "config": dict(vars(config)), "origin": origin, **more}


def static_facts(codes: list[Compiled], device: Device) -> dict[str, Any]:
    """Return facts of a configuration's machine code: the maximum over its launches of each."""
    facts = [code.facts(device) for code in codes]
    matrix = sum((Counter(f["matrix"]) for f in facts), Counter())
    maxima = {name: max(f[name] for f in facts) for name in ("registers", "stack", "shared", "code")}
    return {**maxima, "programs": min(f["programs"] for f in facts), "matrix": dict(sorted(matrix.items()))}


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rows, and join neighbours that differ only in their interval."""

    def others(r: dict[str, Any], first: str) -> str:
        return json.dumps([{k: v for k, v in r["when"].items() if k != first}, r["config"], r["origin"]])

    done: list[dict[str, Any]] = []
    for r in sorted(rows, key=_order):
        first = _first(r)
        last = done[-1] if done else None
        joins = last is not None and r["origin"] == "predicted" and others(last, first) == others(r, first)
        if joins and last is not None and last["when"][first][1] + 1 == r["when"][first][0]:
            low = last["when"][first][0]
            done[-1] = {**r, "when": {**r["when"], first: [low, r["when"][first][1]]}}
        else:
            done.append(r)
    return done


def _first(r: dict[str, Any]) -> str:
    return next(name for name in r["when"] if name != "bits")


def _order(r: dict[str, Any]) -> tuple[Any, ...]:
    """Return the sort key: fields that must be equal, then the interval."""
    first = _first(r)
    return r["when"]["bits"], *(v for k, v in r["when"].items() if k not in ("bits", first)), r["when"][first]


def write_table(
    folder: Path, kernel: str, device: Device, rows: list[dict[str, Any]], predicted: dict[str, str] | None = None
) -> Path:
    """Write <folder>/<kernel>/<device>.json and return its path.

    predicted: the versions with which new predicted rows were made; measured rows hold their own.
    """
    path = folder / kernel / f"{device.name}.json"
    made = made_with(folder, kernel, device)
    head = {
        "schema": SCHEMA, "kernel": kernel, "device": {
            "name": device.name, "vendor": device.vendor, "arch": device.arch, "pci": [f"{i:04x}" for i in device.pci],
            "units": device.units, "bandwidth": device.bandwidth,
        }, "versions": predicted or made,
    }  # fmt: skip
    lines = ",\n".join("  " + json.dumps(r) for r in merged(rows))
    write(path, json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n')
    clear_caches()
    return path


def read_table(folder: Path, kernel: str, device: Device) -> list[dict[str, Any]]:
    """Return the rows of a table as written; none if there is no such table."""
    path = folder / kernel / f"{device.name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def made_with(folder: Path, kernel: str, device: Device) -> dict[str, str]:
    """Return the versions of the table's predicted rows; the installed ones if there is no such table."""
    path = folder / kernel / f"{device.name}.json"
    return json.loads(path.read_text())["versions"] if path.is_file() else versions()


def write_user_row(tunable: Tunable, device: Device, source: dict[str, Any]) -> Path:
    """Write a row to a file named by its shape, so that processes may write at once; for one shape the last one wins.

    Raises ValueError for a row of another kernel.
    """
    if read(tunable, source) is None:
        raise ValueError(f"{source} is no row of {tunable.kernel}")
    name = hashlib.sha256(json.dumps(source["when"], sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / tunable.kernel / device.name / f"{name}.json"
    write(path, json.dumps({"schema": SCHEMA, **source}) + "\n")
    clear_caches()
    return path


def without(rows: list[dict[str, Any]], source: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows without the interval of a new measured row, which is cut out of predicted rows."""
    first = _first(source)
    low, high = source["when"][first]
    result = []
    for r in rows:
        when = r["when"]
        apart = any(when[name] != source["when"][name] for name in when if name != first)
        if apart or r["origin"] == "measured" or when[first][1] < low or when[first][0] > high:
            result.append(r)
            continue
        for begin, end in ((when[first][0], low - 1), (high + 1, when[first][1])):
            if begin <= end:
                result.append({**r, "when": {**when, first: [begin, end]}})
    return result
