"""Keep the list of a run's bad records: a folder with one file of JSON lines for each process.

A record that is bad in every epoch is listed once by each process that draws it, also after a resume, because the list
is stored in these files and not in checkpoints. A line is {"shard", "key", "reason", "position"}, where the position is
the first one in the run's stream at which the record was drawn; damage of a whole file has key "" and position -1.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm1.engine.data.lines import Appended, read_lines, write_lines

KINDS = {"shard": str, "key": str, "reason": str, "position": int}


class Quarantine:
    """List the bad records of a run. folder: of the files, None for no list; rank: of this process."""

    def __init__(self, folder: Path | None, rank: int = 0):
        self.folder = folder
        self._file = None if folder is None else Appended(folder / f"rank-{rank:05d}.jsonl")
        self._listed: set[int] | None = None  # hashes of shard and key, 8 bytes instead of two strings

    def add(self, shard: str, key: str, reason: str, position: int) -> None:
        """Add a bad record, unless this process's file lists it already."""
        if self._file is None:
            return
        if self._listed is None:
            self._listed = {hash((line["shard"], line["key"])) for line in _lines_of(self._file.path)[0]}
        record = hash((shard, key))
        if record not in self._listed:
            self._file.add({"shard": shard, "key": key, "reason": reason, "position": position})
            self._listed.add(record)

    def trim(self, positions: Mapping[int, int]) -> list[str]:
        """Delete the lines that a run added after its checkpoint, in the files of all processes, and damaged lines.

        positions: next position of each stream at the checkpoint, empty for a new run. Records that are drawn again and
        still bad are listed again. Call it in one process, before any of them adds a record. Return a warning for each
        file with damaged lines.
        """
        warnings = []
        for path in self._files():
            lines, bad = _lines_of(path)
            lines_by_record: dict[tuple[str, str], dict[str, Any]] = {}
            for line in lines:
                if 0 <= line["position"] < positions.get(line["position"] % max(len(positions), 1), 0):
                    lines_by_record.setdefault((line["shard"], line["key"]), line)
            write_lines(path, lines_by_record.values())
            if bad:
                warnings.append(f"{path}: {bad} lines were not readable and are dropped")
        self._listed = None
        return warnings

    def records(self) -> list[dict[str, Any]]:
        """Return one line for each distinct bad record of all processes."""
        lines = [line for path in self._files() for line in _lines_of(path)[0] if line["position"] >= 0]
        return list({(line["shard"], line["key"]): line for line in lines}.values())

    def summary(self) -> dict[str, int]:
        """Return the number of distinct bad records for each reason, the most frequent first."""
        return dict(Counter(record["reason"] for record in self.records()).most_common())

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("rank-*.jsonl")) if self.folder is not None else []


def _lines_of(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the valid lines of a quarantine file, and the number of others."""
    objects, bad = read_lines(path)
    lines = [line for line in objects if all(type(line.get(name)) is kind for name, kind in KINDS.items())]
    return lines, bad + len(objects) - len(lines)
