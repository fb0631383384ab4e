"""Writing configurations: shipped tables, one row a line so that differences can be read, and the user's own rows."""

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
from mm1.kernels.tuning import SCHEMA, Tunable, cache_folder, forget, read

TABLES = Path(__file__).parent / "tables"


def versions() -> dict[str, str]:
    return {"mm1": mm1.__version__, "triton": triton.__version__, "torch": torch.__version__.split("+")[0],
            "python": platform.python_version()}  # fmt: skip


def row(shape: Any, bits: int, config: Any, origin: str, **more: Any) -> dict[str, Any]:
    """For the octave that holds the shape's first size."""
    when = {"bits": bits, **shape._asdict()}
    first = shape._fields[0]
    when[first] = interval(shape[0])
    return {"when": when, "config": dict(vars(config)), "origin": origin, **more}


def static_facts(found: list[Compiled], device: Device) -> dict[str, Any]:
    """Of all launches that a configuration is of: the most each takes."""
    facts = [code.facts(device) for code in found]
    matrix = sum((Counter(f["matrix"]) for f in facts), Counter())
    most = {name: max(f[name] for f in facts) for name in ("registers", "stack", "shared", "code")}
    return {**most, "programs": min(f["programs"] for f in facts), "matrix": dict(sorted(matrix.items()))}


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorted; neighbours that differ in their interval alone are one row."""

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
    """By what must be equal, then by the interval."""
    first = _first(r)
    return r["when"]["bits"], *(v for k, v in r["when"].items() if k not in ("bits", first)), r["when"][first]


def write_table(
    folder: Path, kernel: str, device: Device, rows: list[dict[str, Any]], predicted: dict[str, str] | None = None
) -> Path:
    """<folder>/<kernel>/<device>.json. predicted: the versions that its predicted rows were made with, where they are
    new; measured rows say theirs themselves."""
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
    forget()
    return path


def read_table(folder: Path, kernel: str, device: Device) -> list[dict[str, Any]]:
    """The rows as written; none if there is no such table."""
    path = folder / kernel / f"{device.name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def made_with(folder: Path, kernel: str, device: Device) -> dict[str, str]:
    """The versions of the table's predicted rows; those at hand if there is no such table."""
    path = folder / kernel / f"{device.name}.json"
    return json.loads(path.read_text())["versions"] if path.is_file() else versions()


def write_user_row(tunable: Tunable, device: Device, source: dict[str, Any]) -> Path:
    """A file of its own, named by what must be equal, so that two who write at once lose nothing; the later stays."""
    if read(tunable, source) is None:
        raise ValueError(f"{tunable.kernel}: {source} is no row of it")
    name = hashlib.sha256(json.dumps(source["when"], sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / tunable.kernel / device.name / f"{name}.json"
    write(path, json.dumps({"schema": SCHEMA, **source}) + "\n")
    forget()
    return path


def without(rows: list[dict[str, Any]], source: dict[str, Any]) -> list[dict[str, Any]]:
    """Predicted rows cut where they meet the interval of a measured one."""
    first = _first(source)
    low, high = source["when"][first]
    left = []
    for r in rows:
        when = r["when"]
        apart = any(when[name] != source["when"][name] for name in when if name != first)
        if apart or r["origin"] == "measured" or when[first][1] < low or when[first][0] > high:
            left.append(r)
            continue
        for begin, end in ((when[first][0], low - 1), (high + 1, when[first][1])):
            if begin <= end:
                left.append({**r, "when": {**when, first: [begin, end]}})
    return left
