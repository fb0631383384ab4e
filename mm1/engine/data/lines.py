"""Files of JSON lines, which a kill may tear, a full disk may refuse and users may edit."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Appended:
    """Appends objects to a file of JSON lines. Those that the disk refuses are kept and written with the next one."""

    def __init__(self, path: Path):
        self.path, self.pending, self.refused = path, list[str](), False

    def add(self, value: dict[str, Any]) -> str | None:
        """Append an object. Returns why the disk refused it, when it began to refuse."""
        self.pending.append(json.dumps(value))
        # What was refused may have been written in part: an empty line ends it, and readers pass over both.
        text = "\n" * self.refused + "".join(f"{line}\n" for line in self.pending)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:  # opened anew: a run that goes back replaces the file
                file.write(text)
        except OSError as error:
            first, self.refused = not self.refused, True
            return f"{self.path}: {error.strerror or error}; its lines are kept and written later" if first else None
        self.pending, self.refused = [], False
        return None


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a JSON-lines file, and how many lines are none; no file is an empty one."""
    if not path.exists():
        return [], 0
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    objects = [value for line in lines if isinstance(value := _parsed(line), dict)]
    return objects, len(lines) - len(objects)


def write_lines(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file at once: a kill leaves the old one or the new one."""
    fresh = path.with_name(f".{path.name}.kept")
    fresh.write_text("".join(f"{json.dumps(value)}\n" for value in objects))
    fresh.replace(path)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
