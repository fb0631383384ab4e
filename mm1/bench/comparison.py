"""Read result files, and compare mm1 with its peers by their rows."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm1.bench.record import OUT, Row, read
from mm1.errors import UserError

DENSE = "dense"  # name of the yardstick: dense products with as many operations, which compute something else
OWN = "mm1 "  # prefix of the names of mm1's own variants and of the control


class Result(NamedTuple):
    """Hold one result file."""

    path: Path
    header: dict[str, Any]
    rows: list[Row]

    @property
    def machine(self) -> str:
        """Return the machine's name."""
        return str(self.header.get("machine", "unknown machine"))

    @property
    def commit(self) -> str:
        """Return the first ten digits of the commit, and "+changes" if the tree differed from it."""
        commit, plus, changes = str(self.header.get("commit", "unknown")).partition("+")
        return commit[:10] + plus + changes

    @property
    def date(self) -> str:
        """Return the date of the measurement."""
        return str(self.header.get("date", "undated"))


def gather(paths: Sequence[Path] = ()) -> list[Result]:
    """Read the records in these files and folders (default: ./bench-results), oldest first.

    In folders, JSON files without a header are skipped and named on standard error. Raises UserError, in one line, if a
    file is not a record or there are no rows at all.
    """
    results = []
    for path in dict.fromkeys(paths or [OUT]):
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path] if path.exists() or paths else []:
            try:
                if path.is_dir() and '"header"' not in file.read_text()[:1000]:
                    print(f"{file} has no header, so it is not a record: skipped", file=sys.stderr)
                    continue
                record = read(file)
            except (ValueError, OSError) as error:
                raise UserError(str(error)) from None
            for number, row in enumerate(record["rows"], 1):
                if fault := _fault(row):
                    raise UserError(f"{file}: row {number}: {fault}")
            results.append(Result(file, record["header"], record["rows"]))
    if not any(result.rows for result in results):
        raise UserError(f"no results in {', '.join(map(str, paths or [OUT]))}")
    return sorted(results, key=lambda result: (result.date, str(result.header.get("time", "")), result.path.name))


def _fault(row: Row) -> str | None:
    """Return why a row is malformed, or None."""
    variants = row.setdefault("variants", {})
    for name, variant in variants.items() if isinstance(variants, dict) else [("variants", None)]:
        for part in (variant, variant.get("ratio", variant)) if isinstance(variant, dict) else (None,):
            values = [part.get(end) if isinstance(part, dict) else None for end in ("median", "low", "high")]
            if not all(isinstance(x, int | float) and 0 < x < float("inf") for x in values):
                return f"{name!r} has no median, low and high above 0"
    return None


def newest(results: Iterable[Result], bench: str) -> dict[str, tuple[Result, list[Row]]]:
    """Return for each op or model the newest result with rows of it, and these rows.

    results: results of one machine, oldest first.
    """
    latest: dict[str, tuple[Result, list[Row]]] = {}
    for result in results:
        rows = [row for row in result.rows if row["bench"] == bench]
        latest |= {name: (result, [row for row in rows if subject(row) == name]) for name in map(subject, rows)}
    return latest


def subject(row: Row) -> str:
    """Return the op or model that a row measures."""
    return str(row.get("op") or row.get("model"))


def label(row: Row, *names: str) -> str:
    """Return a row's case, "what" and dtype, or the named fields, as text; and "graph" and "throttled" if they hold."""
    words = [str(row.get(name) or "") for name in names or ("case", "what", "dtype")]
    hot = (row.get("gpu") or {}).get("throttled")
    return " · ".join(filter(None, [*words, "graph" if row.get("mode") == "graph" else "", "throttled" if hot else ""]))


def peers(row: Row) -> dict[str, float]:
    """Return the time of each peer divided by mm1's."""
    ratios = {name: variant["ratio"]["median"] for name, variant in row["variants"].items() if "ratio" in variant}
    return {name: ratio for name, ratio in ratios.items() if name != DENSE and not name.startswith(OWN)}


def fastest(row: Row) -> tuple[str, float] | None:
    """Return the fastest peer and its ratio, or None if the row has no peer."""
    return min(peers(row).items(), key=lambda item: item[1], default=None)


def verdict(ratio: float, noise: float | None) -> str:
    """Return "faster", "slower" or "even". Even means that the ratio is within the noise of two runs of mm1."""
    return "even" if abs(ratio - 1) <= (noise or 0) else "faster" if ratio > 1 else "slower"
