"""Predict rows without a GPU, from the model and the compiled code, and check them again later."""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mm1.autotune.search import ranked
from mm1.autotune.space import DTYPES, KERNELS, chosen
from mm1.autotune.static import Task, compilers, fault
from mm1.autotune.tables import TABLES, made_with, read_table, row, static_facts, versions, write_table
from mm1.autotune.workers import Failed
from mm1.kernels.device import DEVICES, Device
from mm1.kernels.language import triton
from mm1.kernels.tuning import Tunable, read

TRIED = 8  # candidates to compile before the default is taken
ADVANTAGE = 0.9  # a configuration comes before the default if it is predicted to take at most this share of its time


class Progress:
    """Shows progress: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.said = what, total, 0, time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich import progress as rich_progress
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

            self.bar = rich_progress.Progress(
                TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            )
        self.task = self.bar.add_task(what, total=total) if self.bar else None

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, what: str) -> None:
        """Count one more as done."""
        self.done += 1
        if self.bar:
            self.bar.update(self.task, advance=1, description=what)
        elif time.monotonic() - self.said > 5 or self.done == self.total:
            self.said = time.monotonic()
            print(f"{self.what} {self.done}/{self.total} {what}", file=sys.stderr, flush=True)


class _Open(NamedTuple):
    """Holds a shape without a configuration yet, and the configurations to try next."""

    tunable: Tunable
    shape: Any
    rest: Iterator[Any]


def predict(
    names: Iterable[str], device: Device, folder: Path, processes: int = os.cpu_count() or 1, bits: int = 16
) -> dict[str, Any]:
    """Write predicted rows for every shipped shape of the kernels; return counts by kernel.

    A row gets the first configuration in the model's order whose code is sound. Measured rows stay as they are.
    """
    tunables, dtype = chosen(names), DTYPES[bits]
    shapes = [(t, s) for t in tunables for s in KERNELS[t.kernel].shapes()]
    rows: dict[str, list[Any]] = {t.kernel: [] for t in tunables}
    bad: dict[tuple[Any, ...], str] = {}
    begin = time.monotonic()
    with Progress(f"ranking for {device.name}", len(shapes)) as progress:
        pending = []
        for tunable, shape in shapes:
            pending.append(_Open(tunable, shape, iter(_worth_trying(tunable, shape, dtype, device))))
            progress.step(tunable.kernel)
    with Progress(f"compiling for {device.name}", len(shapes)) as progress, compilers(processes) as workers:
        while pending:
            tasks, missing = {}, []
            for work in pending:
                kernel = work.tunable.kernel
                untried = (c for c in work.rest if (kernel, c, *work.shape[1:]) not in bad)
                if (config := next(untried, None)) is None:
                    missing.append(work)
                else:
                    tasks[Task(kernel, tuple(work.shape), config, bits, device.name)] = work
            for work in missing:
                progress.step(f"{work.tunable.kernel}: no sound configuration for {work.shape}")
            pending = []
            for task, found in workers.each(tasks):
                if (why := fault(task, found)) or isinstance(found, Failed):
                    bad[task.kernel, task.config, *task.shape[1:]] = str(why)
                    pending.append(tasks[task])
                    continue
                facts = static_facts(found, device)
                rows[task.kernel].append(row(tasks[task].shape, bits, task.config, "predicted", static=facts))
                progress.step(task.kernel)
    done = {}
    for tunable in tunables:
        measured = [r for r in read_table(folder, tunable.kernel, device) if r["origin"] == "measured"]
        present = [r["when"] for r in measured]
        new = [r for r in rows[tunable.kernel] if r["when"] not in present]
        path = write_table(folder, tunable.kernel, device, measured + new, versions())
        mine = [why for key, why in bad.items() if key[0] == tunable.kernel]
        total = len(read_table(folder, tunable.kernel, device))
        done[tunable.kernel] = {"shapes": len(rows[tunable.kernel]), "rows": total, "refused": len(mine)}
        print(f"{tunable.kernel:20} {len(new):4} shapes  {total:3} rows  {len(mine):3} refused  {path}")
    return {"device": device.name, "seconds": round(time.monotonic() - begin, 1), "kernels": done}


def _worth_trying(tunable: Tunable, shape: Any, dtype: torch.dtype, device: Device) -> list[Any]:
    """Return the configurations that the model clearly prefers to the default, then the default, then the rest.

    For kernels that the model does not describe well, without tiled products or with exponentials between them, the
    default comes first.
    """
    default = tunable.default(shape, dtype, device)
    limit = ADVANTAGE * tunable.seconds(default, shape, dtype, device)
    best = ranked(tunable, shape, dtype, device, TRIED)
    if not KERNELS[tunable.kernel].modelled:
        return [default, *best]
    better = [c for c in best if tunable.seconds(c, shape, dtype, device) < limit]
    return [*better, default, *best[len(better) :]]


GROWN = {"registers": 1.1, "shared": 1.0, "code": 1.25}  # limits, times the row's value


def worse(row: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return how the machine code is worse than when the row was written with the same compiler, or None."""
    then = row.get("static")
    if not then or row["versions"]["triton"] != triton.__version__:
        return None
    for name, limit in GROWN.items():
        if now[name] > limit * then[name]:
            return f"{name} {now[name]}, {then[name]} when the row was written"
    lost = [op for op in then["matrix"] if op not in now["matrix"]]
    return f"no {lost[0]}, {then['matrix'][lost[0]]} when the row was written" if lost else None


def check(
    names: Iterable[str], devices: list[Device], folder: Path = TABLES, processes: int = os.cpu_count() or 1,
    part: tuple[int, int] = (0, 1),
) -> list[str]:  # fmt: skip
    """Return the faults of shipped rows, each with its place: rows must be readable, legal, and compile to sound code.

    part (i, n): check every n-th row from the i-th on.
    """
    faults, tasks = [], {}
    for tunable in chosen(names):
        for device in devices:
            try:
                made = {"versions": made_with(folder, tunable.kernel, device)}
                sources = [made | source for source in read_table(folder, tunable.kernel, device)]
            except (ValueError, KeyError, TypeError) as error:
                faults.append(f"{tunable.kernel}/{device.name}.json: cannot be read: {error}")
                continue
            for source in sources:
                place = f"{tunable.kernel}/{device.name}.json {json.dumps(source.get('when'))}"
                parsed = read(tunable, source)
                if parsed is None:
                    faults.append(f"{place}: is no row of {tunable.kernel}")
                    continue
                shape = tunable.shape(*(w[1] if isinstance(w, tuple) else w for w in parsed.when))
                if not tunable.legal(parsed.config, shape, DTYPES[parsed.bits], device):
                    faults.append(f"{place}: {parsed.config} is not legal on {device.name}")
                    continue
                key = device.arch, tunable.kernel, parsed.config, shape[1:]
                task = Task(tunable.kernel, tuple(shape), parsed.config, parsed.bits, device.name)
                tasks.setdefault(key, (task, (place, source)))
    mine = dict(sorted(tasks.values(), key=str)[part[0] :: part[1]])
    with Progress("checking", len(mine)) as progress, compilers(processes) as workers:
        for task, found in workers.each(mine):
            place, source = mine[task]
            why = fault(task, found) or worse(source, static_facts(found, DEVICES[task.device]))
            faults += [f"{place}: {why}"] if why else []
            progress.step(task.kernel)
    return faults
