"""Profile the steps of a run: seconds and operations of each part, a trace, and on a GPU a snapshot of its memory.

Marks separate the parts in execution order; on a GPU they are events on its stream. They are set before and after each
part's forward, and when the gradient of its result is computed, which is the start of its backward.
"""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from mm1.engine.data.batch import Batch
from mm1.engine.models.spec import Model
from mm1.engine.run_config import Run
from mm1.engine.train.ledger import Ledger, ledger
from mm1.engine.train.parallel import World
from mm1.engine.train.safety import WARM
from mm1.engine.train.step import Observer, StepResult
from mm1.errors import UserError
from mm1.kernels.dispatch import device_of_index

STEPS = 3  # timed steps; the step after them is traced
OTHER = {  # marks outside the model's parts
    "data": "waiting for data", "between": "embedding, losses", "update": "gradients' sums, clipping, AdamW",
    "outside": "saving, showing",
}  # fmt: skip


class Profile(Observer):
    """Profile STEPS + 1 steps of a run after its warm-up.

    Writes to `folder` table.txt, trace-RANK.json.gz (for Perfetto), and on a GPU memory-RANK.pickle (for
    pytorch.org/memory_viz). begun: steps that are already done. The parts of the model are the keys of model.PROFILE:
    submodules, and last the work after all of them. Raises UserError if fewer steps remain.
    """

    def __init__(self, run: Run, model: Model, world: World, folder: Path, begun: int = 0):
        needed, remaining = WARM + STEPS + 1, run.train.steps - begun
        if remaining < needed:
            raise UserError(f"a profile needs {needed} steps, but only {remaining} of the run remain")
        folder.mkdir(exist_ok=True)
        self.run, self.model, self.world, self.folder = run, model, world, folder
        self.first, self.cuda = begun + WARM + 1, world.device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []  # the name and the time of each part's begin
        self.batches: list[Batch] = []  # without their pixels
        self.hooks: list[Any] = []  # only in timed steps
        self.trace: Trace | None = None
        self.is_done = False

    def step_begins(self, step: int) -> None:
        if self.is_done:
            return
        if step == self.first and not self.hooks:  # a rewound run may repeat this step
            self._register()
        elif step >= self.first + STEPS:
            self.mark("end")
            for hook in self.hooks:
                hook.remove()
            self.hooks = []
            self.trace = Trace(self.folder, self.world)

    def batch_awaited(self) -> None:
        self.mark("data")

    def batch_drawn(self, batch: Batch) -> None:
        if self.hooks:
            self.batches.append(replace(batch, media=replace(batch.media, values=batch.media.values[:0])))
        self.mark("between")

    def gradients_complete(self) -> None:
        self.mark("update")

    def step_ends(self, result: StepResult) -> None:
        self.mark("outside")
        if self.trace is not None:
            operations, self.trace, self.is_done = self.trace.stop(), None, True
            if self.world.first:
                (self.folder / "table.txt").write_text(f"{self.table()}\n\n{operations}\n")

    def mark(self, name: str) -> None:
        """Begin a part, in timed steps."""
        if self.hooks:
            clock: Any = perf_counter()
            if self.cuda:
                clock = torch.cuda.Event(enable_timing=True)
                clock.record(torch.cuda.current_stream(self.world.device))
            self.marks.append((name, clock))

    def _register(self) -> None:
        """Register hooks that mark when the model's parts begin, forward and backward."""
        *modules, last = self.model.PROFILE
        for part in modules:
            module = self.model.get_submodule(part)
            self.hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self.mark(part)))
        for part, then in [*((part, "between") for part in modules[:-1]), (modules[-1], last), ("", "between")]:
            hook = partial(self._after_forward, part or last, then)
            self.hooks.append(self.model.get_submodule(part).register_forward_hook(hook))

    def _after_forward(self, part: str, next_part: str, module: Any, inputs: Any, result: Any) -> None:
        self.mark(next_part)
        first = result if isinstance(result, torch.Tensor) else result[0]
        if first.requires_grad:
            first.register_hook(lambda _: self.mark(f"{part} backward"))

    def seconds(self) -> dict[str, float]:
        """Return the mean seconds of a step by part. Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.world.device)
        seconds: dict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in pairwise(self.marks):
            seconds[name] += (begin.elapsed_time(end) / 1e3 if self.cuda else end - begin) / STEPS
        return seconds

    def operations(self) -> list[Ledger]:
        """Return the operations of each micro-batch."""
        return [ledger(self.run.model, batch, recompute=self.run.train.recompute) for batch in self.batches]

    def table(self) -> str:
        """Return this process's seconds and rates as text.

        The rates count useful operations; on a GPU they are compared with the peak that device.py lists.
        """
        seconds, counted, whole = self.seconds(), self.operations(), sum(self.seconds().values())
        peak = device_of_index(self.world.device.index).tflops if self.cuda else None

        def rate(operations: float, taken: float) -> str:
            reached = operations / STEPS / taken / 1e12
            return f"{reached:9.3f}" + (f"{reached / peak:9.1%}" if peak else "")

        lines = [f"{'milliseconds of a step':34}{'forward':>9}{'backward':>9}{'share':>8}{'TFLOP/s':>9}"
                 + (f"{'of peak':>9}" if peak else "")]  # fmt: skip
        for part, names in self.model.PROFILE.items():
            ways = seconds[part], seconds[f"{part} backward"]
            useful = sum(c.forward[name] + c.backward[name] for c in counted for name in names)
            shown = "".join(f"{n * 1e3:9.2f}" for n in ways)
            lines.append(f"{part:34}{shown}{sum(ways) / whole:8.1%}{rate(useful, sum(ways))}")
        for name, text in OTHER.items():
            lines.append(f"{text:34}{seconds[name] * 1e3:9.2f}{'':9}{seconds[name] / whole:8.1%}")
        useful, executed = sum(c.useful for c in counted), sum(c.executed for c in counted)
        padding, recompute = (sum(getattr(c, name).total() for c in counted) for name in ("padding", "recompute"))
        lines.append(f"{'in all':34}{whole * 1e3:9.2f}{'':9}{1:8.1%}{rate(useful, whole)}")
        extra = f"{padding / executed:.1%} are padding and {recompute / executed:.1%} run a second time"
        return "\n".join([*lines, f"of executed operations {extra}"])


class Trace:
    """Record every operation of a step, from construction to `stop`."""

    def __init__(self, folder: Path, world: World):
        self.folder, self.rank, self.device = folder, world.rank, world.device
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self.profiler = torch.profiler.profile(record_shapes=True, profile_memory=not self.cuda)
        self.profiler.start()

    def stop(self) -> str:
        """Write the trace, and return a table of the operations that took the longest time."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.folder / f"trace-{self.rank}.json.gz"))
        if self.cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-{self.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        order = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        return self.profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50)
