"""Keeps predictions in a file as they come, and shows how far it is."""

import json
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mm1.engine.evaluation.samples import Key
from mm1.errors import UserError


class Log:
    """Keeps rows by key, in a file that grows as they come."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.rows = path, dict[Key, dict[str, Any]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        try:
            first, *rows = [json.loads(line) for line in whole.splitlines()] or [{"settings": settings}]
            earlier = first["settings"]
            self.rows = {row["key"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a file of predictions: {error}") from None
        other = [f"{k} {earlier.get(k)!r} instead of {v!r}" for k, v in settings.items() if earlier.get(k) != v]
        if other:
            raise UserError(f"{path} holds predictions by other settings, {', '.join(other)}: choose another folder")
        with path.open("r+b" if data else "wb") as file:
            file.truncate(len(whole))
            if not whole:
                file.write(_line({"settings": settings}))

    def __enter__(self):
        self.file = self.path.open("ab")
        return self

    def __exit__(self, *_):
        self.file.close()

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["key"]] = row
        self.file.write(_line(row))
        self.file.flush()


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


class Counter:
    """Shows a live bar on a terminal, a line every five seconds elsewhere."""

    def __init__(self, what: str, total: int, done: int, out: TextIO):
        self.what, self.total, self.done, self.begun_with = what, total, done, done
        self.console = Console(file=out)
        self.start = self.printed = time.monotonic()
        bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.live = Progress(*bar, console=self.console) if self.console.is_terminal else None

    def __enter__(self):
        if self.live:
            self.task = self.live.add_task(self.what, total=self.total, completed=self.done)
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def add(self) -> None:
        self.done += 1
        if self.live:
            self.live.advance(self.task)
        elif time.monotonic() - self.printed > 5 or self.done == self.total:
            self.printed = time.monotonic()
            rate = (self.done - self.begun_with) / max(self.printed - self.start, 1e-9)
            seconds = (self.total - self.done) / rate
            line = f"{self.what} {self.done}/{self.total} {rate:.1f}/s left {seconds:.0f}s"
            print(line, file=self.console.file, flush=True)
