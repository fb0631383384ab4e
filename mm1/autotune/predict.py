"""Predict rows without a GPU, from the cost model and the compiled code, and check them again later."""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mm1.autotune.search import ranked
from mm1.autotune.space import DTYPES, KERNELS, chosen
from mm1.autotune.static import Task, compilers, fault
from mm1.autotune.tables import TABLES, made_with, read_table, row, static_facts, versions, write_table
from mm1.kernels.device import DEVICES, Device
from mm1.kernels.language import triton
from mm1.kernels.tuning import Tunable, read

TRIED = 8  # candidates to compile
ADVANTAGE = 0.9  # a configuration is preferred to the default if it is predicted to take at most this share of its time


class Progress:
    """Print progress to standard error: on a terminal in one line that changes, elsewhere in a line every 5 seconds."""

    def __init__(self, title: str, total: int):
        self.title, self.total, self.done, self.printed = title, total, 0, time.monotonic()

    def step(self, name: str) -> None:
        """Count one more step as done."""
        self.done += 1
        last, terminal = self.done == self.total, sys.stderr.isatty()
        if last or time.monotonic() - self.printed > (0.1 if terminal else 5):
            self.printed = time.monotonic()
            text = f"{self.title} {self.done}/{self.total} {name}"
            print(f"\r{text:79.79}" if terminal else text, end="" if terminal and not last else "\n", file=sys.stderr,
                  flush=True)  # fmt: skip


def predict(
    names: Iterable[str], device: Device, folder: Path, processes: int = os.cpu_count() or 1, bits: int = 16
) -> dict[str, Any]:
    """Write predicted rows for every shape of the kernels' tables, and return counts by kernel.

    Each row gets the first configuration in the order of `_candidates` whose code is sound. Measured rows stay.
    """
    tunables, dtype, begin = chosen(names), DTYPES[bits], time.monotonic()
    shapes = [(t, s) for t in tunables for s in KERNELS[t.kernel].shapes()]
    rows: dict[str, list[Any]] = {t.kernel: [] for t in tunables}
    refused: set[tuple[Any, ...]] = set()  # (kernel, configuration, shape without its first size)
    progress, pending = Progress(f"ranking for {device.name}", len(shapes)), []
    for tunable, shape in shapes:
        pending.append((tunable.kernel, shape, iter(_candidates(tunable, shape, dtype, device))))
        progress.step(tunable.kernel)
    progress = Progress(f"compiling for {device.name}", len(shapes))
    with compilers(processes) as workers:
        while pending:
            tasks = {}
            for kernel, shape, candidates in pending:
                config = next((c for c in candidates if (kernel, c, *shape[1:]) not in refused), None)
                if config is None:
                    progress.step(f"{kernel}: no sound configuration for {shape}")
                else:
                    tasks[Task(kernel, tuple(shape), config, bits, device.name)] = kernel, shape, candidates
            pending = []
            for task, codes in workers.each(tasks):
                if fault(task, codes):
                    refused.add((task.kernel, task.config, *task.shape[1:]))
                    pending.append(tasks[task])
                    continue
                facts = static_facts(codes, device)
                rows[task.kernel].append(row(tasks[task][1], bits, task.config, "predicted", static=facts))
                progress.step(task.kernel)
    counts = {}
    for kernel, predicted in rows.items():
        measured = [r for r in read_table(folder, kernel, device) if r["origin"] == "measured"]
        new = [r for r in predicted if r["when"] not in [m["when"] for m in measured]]
        path = write_table(folder, kernel, device, measured + new, versions())
        total, bad = len(read_table(folder, kernel, device)), sum(key[0] == kernel for key in refused)
        counts[kernel] = {"shapes": len(predicted), "rows": total, "refused": bad}
        print(f"{kernel:20} {len(new):4} shapes  {total:3} rows  {bad:3} refused  {path}")
    return {"device": device.name, "seconds": round(time.monotonic() - begin, 1), "kernels": counts}


def _candidates(tunable: Tunable, shape: Any, dtype: torch.dtype, device: Device) -> list[Any]:
    """Return the configurations that the cost model clearly prefers to the default, then the default, then the rest.

    The default comes first for kernels that the model does not describe well: those without tiled products, and those
    with exponentials between products.
    """
    default = tunable.default(shape, dtype, device)
    limit = ADVANTAGE * tunable.seconds(default, shape, dtype, device)
    best = ranked(tunable, shape, dtype, device, TRIED)
    if not KERNELS[tunable.kernel].modelled:
        return [default, *best]
    better = [c for c in best if tunable.seconds(c, shape, dtype, device) < limit]
    return [*better, default, *best[len(better) :]]


GROWN = {"registers": 1.1, "shared": 1.0, "code": 1.25}  # limits, as multiples of the row's value


def worse(row: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return how machine code of the same compiler became worse since the row was written, or None."""
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
    """Return the faults of the tables' rows, each with its file and row.

    Rows must be readable and legal, and must compile to sound code. part (i, n): check every n-th row from the i-th on.
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
                    faults.append(f"{place}: is not a row of {tunable.kernel}")
                    continue
                shape = tunable.shape(*(w[1] if isinstance(w, tuple) else w for w in parsed.when))
                if not tunable.legal(parsed.config, shape, DTYPES[parsed.bits], device):
                    faults.append(f"{place}: {parsed.config} is not legal on {device.name}")
                    continue
                key = device.arch, tunable.kernel, parsed.config, shape[1:]
                task = Task(tunable.kernel, tuple(shape), parsed.config, parsed.bits, device.name)
                tasks.setdefault(key, (task, (place, source)))
    part_of_tasks = dict(sorted(tasks.values(), key=str)[part[0] :: part[1]])
    progress = Progress("checking", len(part_of_tasks))
    with compilers(processes) as workers:
        for task, codes in workers.each(part_of_tasks):
            place, source = part_of_tasks[task]
            why = fault(task, codes) or worse(source, static_facts(codes, DEVICES[task.device]))
            faults += [f"{place}: {why}"] if why else []
            progress.step(task.kernel)
    return faults
