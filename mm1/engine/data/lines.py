"""Files of JSON lines that survive killed processes, full disks and edits by users."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Appended:
    """Appends objects to a file of JSON lines. Objects that cannot be written are written with the next one."""

    def __init__(self, path: Path):
        self.path, self.pending, self.failing = path, list[str](), False

    def add(self, value: dict[str, Any]) -> str | None:
        """Append an object. Return an error message where this write is the first that fails, else None."""
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
    """Return the objects of a JSON-lines file, and the number of other lines; of a missing file none."""
    if not path.exists():
        return [], 0
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    objects = [value for line in lines if isinstance(value := _parsed(line), dict)]
    return objects, len(lines) - len(objects)


def write_lines(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file atomically: a killed process leaves the old file or the new one."""
    fresh = path.with_name(f".{path.name}.kept")
    fresh.write_text("".join(f"{json.dumps(value)}\n" for value in objects))
    fresh.replace(path)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
