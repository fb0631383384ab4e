"""Read and write files of JSON lines that survive killed processes, full disks and edits by users."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Appended:
    """Append objects to a file of JSON lines. Objects whose write fails are kept, and written with the next one."""

    def __init__(self, path: Path):
        self.path, self.pending, self.failing = path, list[str](), False

    def add(self, value: dict[str, Any]) -> str | None:
        """Append an object. Return an error message if this write is the first that fails, else None."""
        self.pending.append(json.dumps(value))
        # A write that failed may have left a part of a line: a newline ends it, and readers skip it.
        text = "\n" * self.failing + "".join(f"{line}\n" for line in self.pending)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:  # opened each time: a run that returns to a checkpoint replaces the file
                file.write(text)
        except OSError as error:
            first, self.failing = not self.failing, True
            return f"{self.path}: {error.strerror or error}; its lines are kept and written later" if first else None
        self.pending, self.failing = [], False
        return None


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a JSON-lines file, and the number of other lines; a missing file has none of either."""
    if not path.exists():
        return [], 0
    objects, others = [], 0
    for line in filter(bytes.strip, path.read_bytes().split(b"\n")):
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            others += 1
    return objects, others


def write_lines(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file atomically: after a kill the file is the old one or the new one."""
    fresh = path.with_name(f".{path.name}.kept")
    fresh.write_text("".join(f"{json.dumps(value)}\n" for value in objects))
    fresh.replace(path)
