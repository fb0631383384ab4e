"""Where the steps of a run go: seconds of each part beside its operations, a trace, and on a GPU what memory holds.

Parts are told apart by marks in the order of the work, on a GPU events on its stream: before and behind each part's
forward, and where the gradient of its result is there, which is when its backward begins.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from mm1.engine.data.batch import Batch
from mm1.engine.train.ledger import Ledger, ledger
from mm1.engine.train.safety import WARM
from mm1.errors import UserError
from mm1.kernels.dispatch import device_of_index

if TYPE_CHECKING:
    from mm1.engine.train.trainer import Pending, Trainer

STEPS = 3  # that are timed; the one behind them is traced
PARTS = {  # of the ledger
    "vision": ("patch embedding", "vision linear", "vision attention"),
    "connector": ("connector",),
    "decoder": ("decoder linear", "decoder attention", "router", "experts"),
    "head": ("head",),
}
OTHER = {  # marks that are no part of the model
    "data": "waiting for data", "between": "embedding, losses", "update": "gradients' sums, clipping, AdamW",
    "outside": "saving, showing",
}  # fmt: skip


def profile(trainer: "Trainer", folder: Path) -> None:
    """Watch STEPS + 1 steps of the trainer's next `fit` behind its warm-up, and leave in `folder`: table.txt,
    trace-RANK.json.gz (for Perfetto), and on a GPU memory-RANK.pickle (for pytorch.org/memory_viz).

    Raises UserError where the run has fewer steps left.
    """
    needed, left = WARM + STEPS + 1, trainer.run.train.steps - trainer.step
    if left < needed:
        raise UserError(f"a profile needs {needed} steps, and {left} are left of the run")
    folder.mkdir(exist_ok=True)
    step, begun, marks = trainer._step, trainer.step, Marks(trainer)

    def watched() -> "Pending":
        count = trainer.step - begun
        if count == WARM and not marks.undo:  # a run that goes back may come here again
            marks.set()
        if count < WARM + STEPS:
            pending = step()
            marks("outside")
            return pending
        marks.remove()
        trainer._step = step
        pending, operations = _traced(step, folder, trainer)
        if trainer.world.first:
            (folder / "table.txt").write_text(f"{marks.table()}\n\n{operations}\n")
        return pending

    trainer._step = watched


class Marks:
    """When each part of some steps began, and what they computed. A call begins a part."""

    def __init__(self, trainer: "Trainer"):
        self.trainer, self.cuda = trainer, trainer.device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.batches: list[Batch] = []
        self.undo: list[Callable[[], object]] = []

    def __call__(self, name: str) -> None:
        if not self.undo:
            return
        clock: Any = perf_counter()
        if self.cuda:
            clock = torch.cuda.Event(enable_timing=True)
            clock.record()
        self.marks.append((name, clock))

    def set(self) -> None:
        trainer, model, feed, gradients = (
            self.trainer,
            self.trainer.model,
            self.trainer.feed,
            self.trainer._local_gradients,
        )

        def update() -> list[torch.Tensor]:
            self("update")
            return gradients()

        vars(trainer).update(feed=MarkedFeed(feed, self), _local_gradients=update)
        self.undo = [lambda: vars(trainer).update(feed=feed), lambda: vars(trainer).pop("_local_gradients")]
        for part in ("vision", "connector", "decoder"):
            hook = getattr(model, part).register_forward_pre_hook(lambda *_, part=part: self(part))
            self.undo.append(hook.remove)
        for part, then in {"vision": "between", "connector": "between", "decoder": "head", "": "between"}.items():
            behind = lambda _, __, result, part=part or "head", then=then: self._behind(part, result, then)  # noqa: E731
            self.undo.append(model.get_submodule(part).register_forward_hook(behind).remove)

    def remove(self) -> None:
        self("end")
        for undo in self.undo:
            undo()
        self.undo = []

    def _behind(self, part: str, result: Any, then: str) -> None:
        self(then)
        first = result if isinstance(result, torch.Tensor) else result[0]
        if first.requires_grad:
            first.register_hook(lambda _: self(f"{part} backward"))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of a step by part; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in pairwise(self.marks):
            found[name] += (begin.elapsed_time(end) / 1e3 if self.cuda else end - begin) / STEPS
        return found

    def operations(self) -> list[Ledger]:
        """Of each micro-batch."""
        run = self.trainer.run
        return [ledger(run.model, batch, recompute=run.train.recompute) for batch in self.batches]

    def table(self) -> str:
        """Of this process. The rate counts useful operations; of a GPU that is not known there is no peak."""
        seconds, counted = self.seconds(), self.operations()
        whole, peak = sum(seconds.values()), device_of_index(self.trainer.device.index).tflops if self.cuda else None
        mean = lambda of, parts: sum(of(c)[part] for c in counted for part in parts) / STEPS  # noqa: E731

        def rate(operations: float, taken: float) -> str:
            found = operations / taken / 1e12
            return f"{found:9.3f}" + (f"{found / peak:9.1%}" if peak else "")

        lines = [f"{'milliseconds of a step':34}{'forward':>9}{'backward':>9}{'share':>8}{'TFLOP/s':>9}"
                 + (f"{'of peak':>9}" if peak else "")]  # fmt: skip
        for part, names in PARTS.items():
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


class MarkedFeed:
    """A feed whose batches are marked and remembered, without their pixels."""

    def __init__(self, feed: Any, marks: Marks):
        self.feed, self.marks = feed, marks

    def __next__(self) -> Batch:
        self.marks("data")
        batch = next(self.feed)
        self.marks.batches.append(replace(batch, media=replace(batch.media, values=batch.media.values[:0])))
        self.marks("between")
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.feed, name)


def _traced(step: Callable[[], "Pending"], folder: Path, trainer: "Trainer") -> tuple["Pending", str]:
    """A step, and what took longest in it, operation by operation; writes its trace."""
    cuda, rank = trainer.device.type == "cuda", trainer.world.rank
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    with torch.profiler.profile(record_shapes=True, profile_memory=not cuda) as watched:
        pending = step()
        if cuda:
            torch.cuda.synchronize()
    watched.export_chrome_trace(str(folder / f"trace-{rank}.json.gz"))
    if cuda:
        torch.cuda.memory._dump_snapshot(str(folder / f"memory-{rank}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    order = f"self_{trainer.device.type}_time_total" if not cuda else "self_device_time_total"
    return pending, watched.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50)
