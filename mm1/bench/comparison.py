"""Result files, and what their rows say of mm1 beside its peers."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm1.bench.record import RESULTS, Row, read
from mm1.errors import UserError

DENSE = "dense"  # the yardstick, products of as many operations: no other way to do the same
OWN = "mm1 "  # begins the names of mm1 itself under other conditions, and of its control


class Result(NamedTuple):
    path: Path
    header: dict[str, Any]
    rows: list[Row]

    @property
    def machine(self) -> str:
        return str(self.header.get("machine", "unknown machine"))

    @property
    def commit(self) -> str:
        commit, plus, changes = str(self.header.get("commit", "unknown")).partition("+")
        return commit[:10] + plus + changes

    @property
    def date(self) -> str:
        return str(self.header.get("date", "undated"))


def gather(paths: Sequence[Path] = ()) -> list[Result]:
    """The records there, oldest first; without paths, those of this package. In folders, files that are no records but
    JSON without a header are named and left out.

    Raises UserError, in one line, if a file is no record or there is no row at all.
    """
    results = []
    for path in dict.fromkeys(paths or [RESULTS]):
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            try:
                if path.is_dir() and '"header"' not in file.read_text()[:1000]:
                    print(f"{file} has no header, as records have: left out", file=sys.stderr)
                    continue
                found = read(file)
            except (ValueError, OSError) as error:
                raise UserError(str(error)) from None
            for number, row in enumerate(found["rows"], 1):
                if fault := _fault(row):
                    raise UserError(f"{file}: row {number}: {fault}")
            results.append(Result(file, found["header"], found["rows"]))
    if not any(result.rows for result in results):
        raise UserError(f"no results in {', '.join(map(str, paths or [RESULTS]))}")
    return sorted(results, key=lambda result: (result.date, str(result.header.get("time", "")), result.path.name))


def _fault(row: Row) -> str | None:
    variants = row.setdefault("variants", {})
    for name, found in variants.items() if isinstance(variants, dict) else [("variants", None)]:
        for part in (found, found.get("ratio", found)) if isinstance(found, dict) else (None,):
            values = [part.get(end) if isinstance(part, dict) else None for end in ("median", "low", "high")]
            if not all(isinstance(x, int | float) and 0 < x < float("inf") for x in values):
                return f"{name!r} has no median, low and high above 0"
    return None


def newest(results: Iterable[Result], bench: str) -> dict[str, tuple[Result, list[Row]]]:
    """By op or model, the newest result with rows of it, and these. results: of one machine, oldest first."""
    found: dict[str, tuple[Result, list[Row]]] = {}
    for result in results:
        rows = [row for row in result.rows if row["bench"] == bench]
        found |= {name: (result, [row for row in rows if subject(row) == name]) for name in map(subject, rows)}
    return found


def subject(row: Row) -> str:
    return str(row.get("op") or row.get("model"))


def label(row: Row, *names: str) -> str:
    """Fields in words (case, what and dtype if none are named); stream and host, the usual modes, go without saying."""
    words = [str(row.get(name) or "") for name in names or ("case", "what", "dtype")]
    hot = (row.get("gpu") or {}).get("throttled")
    return " · ".join(filter(None, [*words, "graph" if row.get("mode") == "graph" else "", "throttled" if hot else ""]))


def peers(row: Row) -> dict[str, float]:
    """What mm1 is compared with, and each one's time over mm1's."""
    ratios = {name: found["ratio"]["median"] for name, found in row["variants"].items() if "ratio" in found}
    return {name: ratio for name, ratio in ratios.items() if name != DENSE and not name.startswith(OWN)}


def fastest(row: Row) -> tuple[str, float] | None:
    return min(peers(row).items(), key=lambda item: item[1], default=None)


def verdict(ratio: float, noise: float | None) -> str:
    """faster, slower, or even: nearer to 1 than two runs of mm1 are to each other."""
    return "even" if abs(ratio - 1) <= (noise or 0) else "faster" if ratio > 1 else "slower"
