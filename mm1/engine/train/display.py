"""Show a training run: a live line on a terminal, plain lines elsewhere, metrics.jsonl always."""

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


class _Shown(logging.Handler):
    """Prints log records on a console, between the updates of its live line."""

    def __init__(self, console: Console):
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(record.getMessage(), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def logged(console: Console):
    """Print what the package logs, such as the number of records that were indexed, on `console`."""
    log, handler = logging.getLogger("mm1"), _Shown(console)
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
    """Shows nothing: the display of all processes but the first."""

    @contextmanager
    def run(self, step: int):
        yield

    def warn(self, message: str) -> None:
        pass

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        pass

    def left_out(self, step: int, why: str) -> None:
        pass


class Display:
    """Shows the steps of a run in `folder` and appends their metrics to its metrics.jsonl, whatever their names."""

    def __init__(self, folder: Path, t: Train, *, out: TextIO = sys.stderr):
        self.folder, self.train = folder, t
        self.metrics = Appended(folder / "metrics.jsonl")
        self.console = Console(file=out)
        self.recent: deque[dict[str, Any]] = deque(maxlen=20)
        self.printed = 0.0

    @contextmanager
    def run(self, step: int):
        """Show the run from `step` on."""
        self.board = self._board(step + 1) if self.train.tensorboard else None
        self.last = step
        self.progress = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
        self.task = self.progress.add_task("train", total=self.train.steps, completed=step)
        self.live = (
            Live(console=self.console, refresh_per_second=4, transient=False) if self.console.is_terminal else None
        )
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
        self.console.print(f"warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Record the metrics of a step that is complete."""
        self.recent.append(metrics)
        if self.board and step <= self.last:  # the run went back
            self.board.close()
            self.board = self._board(step)
        self.last = step
        if step % self.train.log_every == 0 or step == self.train.steps:
            self._write({"step": step, **metrics})
            if self.board:
                for name, value in metrics.items():
                    layers = (
                        {f"{name}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {name: value}
                    )
                    for tag, scalar in layers.items():
                        self.board.add_scalar(tag, scalar, step)
        self.progress.update(self.task, completed=step)
        rates = self._rates()
        if self.live:
            self.live.update(self._panel(metrics, rates))
        elif time.monotonic() - self.printed > 5 or step == self.train.steps:
            self.printed = time.monotonic()
            remaining = self.progress.tasks[0].time_remaining or rates["step"] * (self.train.steps - step)
            line = (
                f"step {step}/{self.train.steps} loss {metrics['loss']:.4f} lr {metrics['lr']:.2e} "
                f"tokens/s {rates['tokens']:.0f} images/s {rates['images']:.0f} "
                f"fill {metrics['fill']:.1%}, images {metrics['image_fill']:.1%} "
                f"data {rates['data']:.1%} left {remaining:.0f}s"
            )
            line += f" skipped {metrics['skipped']}" if metrics["skipped"] else ""
            line += f" dropped {metrics['dropped']:.1%}" if metrics.get("dropped") else ""
            print(line, file=self.console.file, flush=True)

    def left_out(self, step: int, why: str) -> None:
        """Record a step that changed nothing, and why."""
        self._write({"step": step, "left_out": why})
        self.warn(f"step {step}: {why}")

    def _write(self, line: dict[str, Any]) -> None:
        if refused := self.metrics.add(line):
            self.warn(refused)

    def _board(self, first: int) -> Any:
        """Return a TensorBoard writer that hides what an earlier one wrote of step `first` and later ones."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=first)

    def _rates(self) -> dict[str, float]:
        seconds = sum(m["seconds"] for m in self.recent)
        return {
            "tokens": sum(m["tokens"] for m in self.recent) / seconds,
            "images": sum(m["images"] for m in self.recent) / seconds,
            "data": sum(m["data_seconds"] for m in self.recent) / seconds,
            "step": seconds / len(self.recent),
        }

    def _panel(self, metrics: dict[str, Any], rates: dict[str, float]) -> Group:
        figures = {
            "loss": f"{metrics['loss']:.4f}",
            "tokens/s": f"{rates['tokens']:,.0f}",
            "images/s": f"{rates['images']:,.0f}",
            "fill": f"{metrics['fill']:.1%}",
            "of images": f"{metrics['image_fill']:.1%}",
            "data wait": f"{rates['data']:.1%}",
            "skipped": str(metrics["skipped"]),
        }
        if metrics.get("dropped"):
            figures["dropped"] = f"{metrics['dropped']:.1%}"
        line = "  ".join(f"[dim]{name}[/dim] [bold]{value}[/bold]" for name, value in figures.items())
        return Group(Text.from_markup(line), self.progress)
