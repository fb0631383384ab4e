"""Where the steps of a run go: seconds of each part beside its operations, a trace, and on a GPU what memory holds.

Parts are told apart by marks in the order of the work, on a GPU events on its stream: before and behind each part's
forward, and where the gradient of its result is there, which is when its backward begins.
"""

from collections import Counter, defaultdict
from dataclasses import replace
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

STEPS = 3  # that are timed; the one behind them is traced
OTHER = {  # marks that are no part of the model
    "data": "waiting for data", "between": "embedding, losses", "update": "gradients' sums, clipping, AdamW",
    "outside": "saving, showing",
}  # fmt: skip


class Profile(Observer):
    """Watches STEPS + 1 steps of a run behind its warm-up, and leaves in `folder`: table.txt, trace-RANK.json.gz (for
    Perfetto), and on a GPU memory-RANK.pickle (for pytorch.org/memory_viz).

    begun: steps that are done already. Raises UserError where the run has fewer steps left.
    """

    def __init__(self, run: Run, model: Model, world: World, folder: Path, begun: int = 0):
        needed, remaining = WARM + STEPS + 1, run.train.steps - begun
        if remaining < needed:
            raise UserError(f"a profile needs {needed} steps, and {remaining} are left of the run")
        folder.mkdir(exist_ok=True)
        self.folder, self.world, self.first = folder, world, begun + WARM + 1
        self.marks = Marks(run, model, world.device)
        self.trace: Trace | None = None
        self.is_done = False

    def step_begins(self, step: int) -> None:
        if self.is_done:
            return
        if step == self.first and not self.marks.is_set:  # a run that goes back may come here again
            self.marks.set()
        elif step >= self.first + STEPS:
            self.marks.remove()
            self.trace = Trace(self.folder, self.world)

    def batch_awaited(self) -> None:
        self.marks("data")

    def batch_drawn(self, batch: Batch) -> None:
        self.marks.draw(batch)

    def gradients_complete(self) -> None:
        self.marks("update")

    def step_ends(self, result: StepResult) -> None:
        self.marks("outside")
        if self.trace is not None:
            operations, self.trace, self.is_done = self.trace.stop(), None, True
            if self.world.first:
                (self.folder / "table.txt").write_text(f"{self.marks.table()}\n\n{operations}\n")


class Marks:
    """When each part of some steps began, and what they computed. A call begins a part.

    A part of the model is a submodule that model.PROFILE names; what it names last has no module and comes behind them.
    """

    def __init__(self, run: Run, model: Model, device: torch.device):
        self.run, self.model, self.device, self.cuda = run, model, device, device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.batches: list[Batch] = []  # without their pixels
        self.hooks: list[Any] = []

    @property
    def is_set(self) -> bool:
        return bool(self.hooks)

    def __call__(self, name: str) -> None:
        if not self.is_set:
            return
        clock: Any = perf_counter()
        if self.cuda:
            clock = torch.cuda.Event(enable_timing=True)
            clock.record()
        self.marks.append((name, clock))

    def draw(self, batch: Batch) -> None:
        if self.is_set:
            self.batches.append(replace(batch, media=replace(batch.media, values=batch.media.values[:0])))
            self("between")

    def set(self) -> None:
        """Mark from now on when the model's parts begin, forward and backward."""
        *modules, last = self.model.PROFILE
        for part in modules:
            module = self.model.get_submodule(part)
            self.hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self(part)))
        for part, then in [*((part, "between") for part in modules[:-1]), (modules[-1], last), ("", "between")]:
            behind = lambda _, __, result, part=part or last, then=then: self._behind(part, result, then)  # noqa: E731
            self.hooks.append(self.model.get_submodule(part).register_forward_hook(behind))

    def remove(self) -> None:
        if self.is_set:
            self("end")
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _behind(self, part: str, result: Any, then: str) -> None:
        self(then)
        first = result if isinstance(result, torch.Tensor) else result[0]
        if first.requires_grad:
            first.register_hook(lambda _: self(f"{part} backward"))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of a step by part; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in pairwise(self.marks):
            seconds[name] += (begin.elapsed_time(end) / 1e3 if self.cuda else end - begin) / STEPS
        return seconds

    def operations(self) -> list[Ledger]:
        """Return the operations of each micro-batch."""
        return [ledger(self.run.model, batch, recompute=self.run.train.recompute) for batch in self.batches]

    def table(self) -> str:
        """Return this process's seconds and rates. The rate counts useful operations; it is compared with the peak of
        a GPU that device.py lists."""
        seconds, counted = self.seconds(), self.operations()
        whole, peak = sum(seconds.values()), device_of_index(self.device.index).tflops if self.cuda else None
        mean = lambda of, parts: sum(of(c)[part] for c in counted for part in parts) / STEPS  # noqa: E731

        def rate(operations: float, taken: float) -> str:
            reached = operations / taken / 1e12
            return f"{reached:9.3f}" + (f"{reached / peak:9.1%}" if peak else "")

        lines = [f"{'milliseconds of a step':34}{'forward':>9}{'backward':>9}{'share':>8}{'TFLOP/s':>9}"
                 + (f"{'of peak':>9}" if peak else "")]  # fmt: skip
        for part, names in self.model.PROFILE.items():
            ways = seconds[part], seconds[f"{part} backward"]
            useful = mean(lambda c: c.forward, names) + mean(lambda c: c.backward, names)
            shown = "".join(f"{n * 1e3:9.2f}" for n in ways)
            lines.append(f"{part:34}{shown}{sum(ways) / whole:8.1%}{rate(useful, sum(ways))}")
        for name, text in OTHER.items():
            lines.append(f"{text:34}{seconds[name] * 1e3:9.2f}{'':9}{seconds[name] / whole:8.1%}")
        total = Counter[str]()
        for c in counted:
            total.update(useful=c.useful, padding=sum(c.padding.values()), recompute=sum(c.recompute.values()))
        useful, executed = total["useful"] / STEPS, sum(total.values()) / STEPS
        lines.append(f"{'in all':34}{whole * 1e3:9.2f}{'':9}{1:8.1%}{rate(useful, whole)}")
        extra = f"of executed operations {total['padding'] / STEPS / executed:.1%} are padding and "
        return "\n".join([*lines, f"{extra}{total['recompute'] / STEPS / executed:.1%} run a second time"])


class Trace:
    """Records every operation of a step from now on; `stop` writes the trace."""

    def __init__(self, folder: Path, world: World):
        self.folder, self.rank, self.device = folder, world.rank, world.device.type
        if self.device == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self.profiler = torch.profiler.profile(record_shapes=True, profile_memory=self.device != "cuda")
        self.profiler.start()

    def stop(self) -> str:
        """Write the trace, and return a table of the operations that took longest."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.folder / f"trace-{self.rank}.json.gz"))
        if self.device == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-{self.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        order = "self_device_time_total" if self.device == "cuda" else f"self_{self.device}_time_total"
        return self.profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50)
