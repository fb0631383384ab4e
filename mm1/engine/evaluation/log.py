"""Write predictions to a file, row by row, and show progress."""

import json
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mm1.engine.evaluation.samples import Key
from mm1.errors import UserError


class Log:
    """Hold rows by key, and append each to a file immediately.

    rows: of earlier runs and of this one. Raises UserError for a file that is not a log or has other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.rows = path, dict[Key, dict[str, Any]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        complete = data[: data.rfind(b"\n") + 1]  # without a line that a crash truncated
        try:
            first, *rows = [json.loads(line) for line in complete.splitlines()] or [{"settings": settings}]
            earlier = first["settings"]
            self.rows = {row["key"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a file of predictions: {error}") from None
        changes = [f"{k} {earlier.get(k)!r} instead of {v!r}" for k, v in settings.items() if earlier.get(k) != v]
        if changes:
            raise UserError(f"{path} has predictions of other settings, {', '.join(changes)}: choose another folder")
        with path.open("r+b" if data else "wb") as file:
            file.truncate(len(complete))
            if not complete:
                file.write(_line({"settings": settings}))

    def __enter__(self):
        self.file = self.path.open("ab")
        return self

    def __exit__(self, *_):
        self.file.close()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; its key is the field "key"."""
        self.rows[row["key"]] = row
        self.file.write(_line(row))
        self.file.flush()


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


class Counter:
    """Show progress: a live bar on a terminal, elsewhere a line every five seconds.

    done: rows of earlier runs; out: where to print, None for standard error.
    """

    def __init__(self, title: str, total: int, done: int, out: TextIO | None = None):
        self.title, self.total, self.done, self.initial = title, total, done, done
        self.console = Console(file=out, stderr=out is None)
        self.start = self.printed = time.monotonic()
        bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.live = Progress(*bar, console=self.console) if self.console.is_terminal else None

    def __enter__(self):
        if self.live:
            self.task = self.live.add_task(self.title, total=self.total, completed=self.done)
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def add(self) -> None:
        """Count one more row as done."""
        self.done += 1
        if self.live:
            self.live.advance(self.task)
        elif time.monotonic() - self.printed > 5 or self.done == self.total:
            self.printed = time.monotonic()
            rate = (self.done - self.initial) / max(self.printed - self.start, 1e-9)
            seconds = (self.total - self.done) / rate
            line = f"{self.title} {self.done}/{self.total} {rate:.1f}/s left {seconds:.0f}s"
            print(line, file=self.console.file, flush=True)
