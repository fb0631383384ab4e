"""Show a training run: a live line on a terminal, plain lines elsewhere, and always metrics.jsonl."""

import logging
import sys
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from mm1.engine.data.lines import Appended
from mm1.engine.train.config import Train

INTERVAL = 5.0  # seconds between two plain lines


@contextmanager
def logged(console: Console):
    """Print the package's log records on `console`, such as the number of records that were indexed."""
    log, handler = logging.getLogger("mm1"), logging.Handler()
    handler.emit = lambda record: console.print(record.getMessage(), highlight=False, markup=False, soft_wrap=True)
    level, propagates = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagates


class Silent:
    """Show nothing: the display of all processes but the first."""

    @contextmanager
    def run(self, step: int):
        """Surround the steps of a run."""
        yield

    def warn(self, message: str) -> None:
        """Ignore a warning."""

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Ignore the metrics of a step."""

    def left_out(self, step: int, why: str) -> None:
        """Ignore a bad step."""


def _json(value: Any) -> Any:
    """Return a metric or a list of them with null in the place of NaN, which JSON does not have."""
    if isinstance(value, list):
        return [_json(x) for x in value]
    return None if value != value else value


class Display:
    """Show the steps of a run in `folder`, and append their metrics to its metrics.jsonl.

    out: a text stream (default: standard error).
    """

    def __init__(self, folder: Path, t: Train, *, out: TextIO | None = None):
        self.folder, self.train = folder, t
        self.metrics = Appended(folder / "metrics.jsonl")
        self.console = Console(file=out or sys.stderr)
        self.recent: deque[dict[str, Any]] = deque(maxlen=20)
        self.printed = 0.0

    @contextmanager
    def run(self, step: int):
        """Show the run from `step` on."""
        self.board = self._board(step + 1) if self.train.tensorboard else None
        self.last = step
        self.progress = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
        self.task = self.progress.add_task("train", total=self.train.steps, completed=step)
        self.live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        if self.live:
            self.live.start()
        try:
            yield
        finally:
            if self.live:
                self.live.stop()
            if self.board:
                self.board.close()

    def warn(self, message: str) -> None:
        """Print a warning."""
        self.console.print(f"warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Record the metrics of a step."""
        self.recent.append(metrics)
        if self.board and step <= self.last:  # the run was rewound
            self.board.close()
            self.board = self._board(step)
        self.last = step
        if step % self.train.log_every == 0 or step == self.train.steps:
            self._write({"step": step, **{name: _json(value) for name, value in metrics.items()}})
            for name, value in metrics.items() if self.board else ():
                layers = {f"{name}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {name: value}
                for tag, scalar in layers.items():
                    self.board.add_scalar(tag, scalar, step)  # pyright: ignore[reportOptionalMemberAccess]
        self.progress.update(self.task, completed=step)
        if self.live:
            self.live.update(Group(Text(self._line(metrics)), self.progress))
        elif time.monotonic() - self.printed > INTERVAL or step == self.train.steps:
            self.printed = time.monotonic()
            average = sum(m["seconds"] for m in self.recent) / len(self.recent)
            remaining = self.progress.tasks[0].time_remaining or average * (self.train.steps - step)
            line = f"step {step}/{self.train.steps} {self._line(metrics)} left {remaining:.0f}s"
            print(line, file=self.console.file, flush=True)

    def left_out(self, step: int, why: str) -> None:
        """Record a step that changed nothing, and the reason."""
        self._write({"step": step, "left_out": why})
        self.warn(f"step {step}: {why}")

    def _write(self, line: dict[str, Any]) -> None:
        if refused := self.metrics.add(line):
            self.warn(refused)

    def _board(self, first: int) -> Any:
        """Return a TensorBoard writer that hides what an earlier one wrote of step `first` and later ones."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=first)

    def _line(self, metrics: dict[str, Any]) -> str:
        """Return the figures of a step; rates are means over the recent steps."""
        seconds = sum(m["seconds"] for m in self.recent)
        tokens, images, data = (sum(m[name] for m in self.recent) for name in ("tokens", "images", "data_seconds"))
        line = (
            f"loss {metrics['loss']:.4f} lr {metrics['lr']:.2e} tokens/s {tokens / seconds:.0f} "
            f"images/s {images / seconds:.0f} fill {metrics['fill']:.1%}, images {metrics['image_fill']:.1%} "
            f"data {data / seconds:.1%}"
        )
        line += f" skipped {metrics['skipped']}" if metrics["skipped"] else ""
        return line + (f" dropped {metrics['dropped']:.1%}" if metrics.get("dropped") else "")
