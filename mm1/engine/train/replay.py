"""Compute a step of a run again, to tell whether data, hardware or a kernel made its result wrong.

The run is repeated with the same data from the newest checkpoint before the step. The step's loss and gradient are then
computed twice as the run did, and once in fp32 without torch.compile, recomputation and float8. The verdict is one of:

    data        the checksum of the batches is not the recorded one: files changed
    hardware    two computations of the same step differ; or both differ from the recorded result, although data and
                layout are the same
    layout      the result differs from the recorded one on another number of processes or another kind of device:
                only a replay in the run's own layout can tell why
    kernel      fp32 differs by more than rounding (TOLERANCE)
"""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from mm1.engine.data.batch import Batch
from mm1.engine.data.lines import read_lines
from mm1.engine.layers.sharding import local_part
from mm1.engine.run_config import from_dict
from mm1.engine.train import checkpoint
from mm1.engine.train.config import Parallel
from mm1.engine.train.display import Silent
from mm1.engine.train.parallel import World
from mm1.engine.train.trainer import Trainer
from mm1.errors import UserError

# Largest relative difference of loss and gradient norm, to fp32 and between layouts after some steps.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
SAME = 1e-9  # the same in the run's own layout
WORST = 5  # documents in the report


class Result(NamedTuple):
    """Hold the loss and the gradient norm of a step."""

    loss: float
    norm: float

    def differs(self, other: "Result") -> float:
        """Return the larger relative difference; all values that are not finite count as equal."""
        pairs = [(a, b) for a, b in zip(self, other) if math.isfinite(a) or math.isfinite(b)]
        return max(
            (abs(a - b) / max(abs(b), 1e-30) if math.isfinite(a + b) else math.inf for a, b in pairs), default=0.0
        )


def replay(folder: Path, step: int) -> dict[str, Any]:
    """Repeat `step` of the run in `folder`, and return its results and a "verdict", without changing a file.

    In the run's own layout (under torchrun with the same number of processes) results are compared to 1e-9, otherwise
    within the rounding of the dtype. Raises UserError if the run has no such step, or no checkpoint to begin from.
    """
    records = _records(folder)
    if step not in records:
        raise UserError(
            f"{folder} has no metrics of step {step}, only of {len(records)} steps up to {max(records, default=0)}"
        )
    checkpoints = [path for path in checkpoint.numbered(folder) if (path / checkpoint.MARKER).is_file()]
    if not checkpoints:
        raise UserError(f"{folder} has no checkpoint, which holds the settings of the run")
    newest, earlier = checkpoints[-1], [path for path in checkpoints if int(path.name.removeprefix("step-")) < step]
    state = checkpoint.read_json(newest, "state.json")
    state = checkpoint.read_json(earlier[-1], "state.json") if earlier else {**state, "rewinds": 0}
    if records[step].get("rewinds", state["rewinds"]) != state["rewinds"]:
        raise UserError(
            f"step {step} came after the run was rewound to a checkpoint: no checkpoint has its data position"
        )
    run = from_dict(checkpoint.read_json(newest, "config.json"))
    run = replace(run, data=replace(run.data, tokenizer=str(newest / "tokenizer.json")))
    if earlier:  # it replaces the initial weights, which may be deleted
        run = replace(run, train=replace(run.train, init=""))
    with ExitStack() as stack:
        world, same_layout = _world(run.parallel, state)
        stack.callback(world.close)
        run = replace(run, parallel=world.config)
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        trainer = stack.enter_context(Trainer(run, scratch / "run", Silent(), False, world))
        if earlier:
            trainer.world.together(lambda: checkpoint.check(earlier[-1], world.rank, world.size))
            trainer.resume_from(earlier[-1])
        allowed = SAME if same_layout else TOLERANCE[trainer.dtype]
        other_result, other_data = _repeat(trainer, step, records, allowed)
        batches = [next(trainer.feed) for _ in range(run.train.accumulate // world.data_size)]
        recorded, digest = records[step], _total(trainer, sum(batch.digest for batch in batches))[0]
        results = [_compute(trainer, batches, trainer.dtype) for _ in range(2)]
        exact = _compute(stack.enter_context(_exact(trainer, scratch / "exact")), batches, torch.float32)
        before = Result(recorded.get("loss", math.nan), recorded.get("grad_norm", math.nan))
        if other_data is None and recorded.get("data") not in (None, digest):
            other_data = step
        if other_result is None and results[0].differs(before) > allowed:
            other_result = step
        run_layout = None if same_layout else f"{state['processes']} processes on {state['device']}"
        lines = verdict(other_data, other_result, results[0], results[1], exact, trainer.dtype, run_layout)
        return {
            "step": step, "from": earlier[-1].name if earlier else "the start", "layout": str(world),
            "same_layout": same_layout, "recorded": before._asdict(), "again": results[0]._asdict(),
            "fp32": exact._asdict(), "documents": _worst(trainer, batches), "verdict": lines,
        }  # fmt: skip


def verdict(
    other_data: int | None, other_result: int | None, first: Result, second: Result, exact: Result, dtype: torch.dtype,
    run_layout: str | None = None,
) -> list[str]:  # fmt: skip
    """Return one line for each difference, or the line that nothing differs.

    other_data, other_result: the first steps whose data and whose result differ from the run's, or None. first, second:
    two computations of the step in `dtype`; exact: one in fp32. run_layout: the run's processes, if the layout differs.
    """
    lines = []
    if other_data is not None:
        lines.append(f"data: those of step {other_data} have changed")
    elif (again := first.differs(second)) > 0:
        lines.append(f"hardware: two computations of the same step differ by {again:.1g}")
    elif other_result is not None and run_layout is None:
        lines.append(f"hardware or software: step {other_result} differs from the recorded result")
    elif other_result is not None:
        lines.append(
            f"layout: step {other_result} differs from the recorded result by more than {TOLERANCE[dtype]:g}; "
            f"the run had {run_layout}: replay it there to see why"
        )
    if (difference := first.differs(exact)) > TOLERANCE[dtype]:
        lines.append(f"kernel: {str(dtype).removeprefix('torch.')} and fp32 differ by {difference:.1g}")
    return lines or ["nothing differs"]


def _records(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of metrics.jsonl by step."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no metrics.jsonl")
    return {line["step"]: line for line in read_lines(path)[0] if isinstance(line.get("step"), int)}


def _world(parallel: Parallel, state: dict[str, Any]) -> tuple[World, bool]:
    """Return this replay's processes, and whether their number and kind of device are those of the run."""
    processes, recorded = int(os.environ.get("WORLD_SIZE", 1)), state["processes"]
    if processes not in (1, recorded):
        raise UserError(f"the replay has {processes} processes, expected {recorded} as in the run, or 1")
    world = World(parallel if processes == recorded else Parallel(capacity=parallel.capacity))
    return world, (world.size, world.device.type) == (recorded, state["device"])


def _repeat(trainer: Trainer, step: int, records: dict[int, Any], allowed: float) -> tuple[int | None, int | None]:
    """Train to just before `step`, and return the first steps whose result and whose data differ, or None."""
    first = data = None
    while trainer.steps_done < step - 1:
        done = trainer.step()
        trainer.settle()
        record, sums = records.get(done.step, {}), done.sums
        if "data" in record and record["data"] != int(sums["data"]):
            data = data or done.step
        result = Result(sums["loss"] / max(sums["targets"], 1), sums["norm"])
        if "loss" in record and result.differs(Result(record["loss"], record["grad_norm"])) > allowed:
            first = first or done.step
    return first, data


def _exact(trainer: Trainer, folder: Path) -> Trainer:
    """Return a trainer with the same weights that computes in fp32, without compilation, recomputation or float8."""
    plain = replace(trainer.run.train, dtype="fp32", compile=False, recompute="none", float8="none", init="")
    exact = Trainer(replace(trainer.run, train=plain), folder, Silent(), False, trainer.world)
    with torch.no_grad():
        for mine, theirs in zip(exact.model.parameters(), trainer.model.parameters(), strict=True):
            local_part(mine).copy_(local_part(theirs))
    return exact


def _total(trainer: Trainer, *values: float) -> list[float]:
    """Return the sums over all processes."""
    return trainer.world.sum(torch.tensor(values, dtype=torch.float64, device=trainer.device)).tolist()


def _compute(trainer: Trainer, batches: Sequence[Batch], dtype: torch.dtype) -> Result:
    model, nll = trainer.model, 0.0
    for batch in batches:
        with torch.autocast(trainer.device.type, dtype, enabled=dtype != torch.float32):
            losses = model(batch)
        losses.objective.backward()
        nll += losses.loss.double().item()
    square = trainer.world.square_norm(p.grad for p in model.parameters() if p.grad is not None).double().item()
    model.zero_grad(set_to_none=True)
    nll, square, targets = _total(trainer, nll, square, sum(batch.target_count for batch in batches))
    return Result(nll / max(targets, 1), math.sqrt(square) / max(targets, 1))


@torch.no_grad()
def _worst(trainer: Trainer, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Return the documents with the highest loss per token; losses that are not finite come first."""
    losses: list[tuple[float, str]] = []
    for batch in batches:
        losses += zip(trainer.model.document_losses(batch).tolist(), batch.keys)
    losses = [pair for part in trainer.world.gather(losses) for pair in part]
    losses.sort(key=lambda pair: (math.isfinite(pair[0]), -pair[0]))
    return [{"key": key, "loss": loss} for loss, key in dict.fromkeys(losses)][:WORST]


def show(report: dict[str, Any]) -> str:
    """Return the report as lines to print."""
    layout = report["layout"] + ("" if report["same_layout"] else ", which is not the run's layout")
    lines = [f"step {report['step']}, from {report['from']}, on {layout}"]
    for name in ("recorded", "again", "fp32"):
        lines.append("  {:9} loss {loss:.9g}  gradient norm {norm:.9g}".format(name, **report[name]))
    lines += ["documents with the highest loss per token"]
    lines += [f"  {document['loss']:8.4f}  {document['key']}" for document in report["documents"]]
    return "\n".join([*lines, *report["verdict"]])
