"""Compute a step of a run again: was it the data, the hardware or a kernel that made it what it was?

From the newest checkpoint before it the run is repeated, with the same data, up to the step. Its loss and gradient are
then computed twice as the run did, and in fp32 without torch.compile, recomputation and float8.

    data        the batches' checksum is not the one that the run wrote down: files changed
    hardware    two computations of the same step differ; or both differ from what the run wrote down, though data and
                layout are the same
    layout      the result is not the one written down, on another number of processes or another kind of device: run
                the replay in the run's own layout to know
    kernel      fp32 gives something else than rounding explains (TOLERANCE)
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

# Of loss and gradient norm: against fp32, and of one layout against another after the steps since a checkpoint.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
SAME = 1e-9  # in the run's own layout
WORST = 5  # documents that are named


class Result(NamedTuple):
    """Loss and gradient norm of a step."""

    loss: float
    norm: float

    def differs(self, other: "Result") -> float:
        """Return the larger relative difference; values that are not finite are equal to each other."""
        pairs = [(a, b) for a, b in zip(self, other) if math.isfinite(a) or math.isfinite(b)]
        return max(
            (abs(a - b) / max(abs(b), 1e-30) if math.isfinite(a + b) else math.inf for a, b in pairs), default=0.0
        )


def replay(folder: Path, step: int) -> dict[str, Any]:
    """Repeat `step` of the run in `folder`; returns its results, and a "verdict" on what differs. Changes no file.

    In the run's own layout (under torchrun with as many processes) results are compared to 1e-9, and otherwise within
    the rounding of the dtype. Raises UserError if the run has no such step, or no checkpoint to begin from.
    """
    records = _records(folder)
    if step not in records:
        raise UserError(
            f"{folder} has no metrics of step {step}, only of {len(records)} up to {max(records, default=0)}"
        )
    checkpoints = [path for path in checkpoint.numbered(folder) if (path / checkpoint.MARKER).is_file()]
    if not checkpoints:
        raise UserError(f"{folder} has no checkpoint, which holds the settings of the run")
    newest, earlier = checkpoints[-1], [path for path in checkpoints if _step(path) < step]
    state = checkpoint.read_json(newest, "state.json")
    if earlier:
        state = checkpoint.read_json(earlier[-1], "state.json")
    else:
        state["rewinds"] = 0
    if records[step].get("rewinds", state["rewinds"]) != state["rewinds"]:
        raise UserError(
            f"step {step} came after the run went back to a checkpoint: no checkpoint holds its data position"
        )
    run = from_dict(checkpoint.read_json(newest, "config.json"))
    run = replace(run, data=replace(run.data, tokenizer=str(newest / "tokenizer.json")))
    if earlier:  # which outweighs the weights that the run began with; they may be gone
        run = replace(run, train=replace(run.train, init=""))
    with ExitStack() as stack:
        world, same_layout = _world(run.parallel, state)
        stack.callback(world.close)
        run = replace(run, parallel=world.config)
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        trainer = Trainer(run, scratch / "run", Silent(), False, world)
        if earlier:
            trainer.world.together(lambda: checkpoint.check(earlier[-1], world.rank, world.size))
            trainer.resume_from(earlier[-1])
        allowed = SAME if same_layout else TOLERANCE[trainer.dtype]
        other_result, other_data = _repeat(trainer, step, records, allowed)
        batches = [next(trainer.feed) for _ in range(run.train.accumulate // world.data_size)]
        written, digest = records[step], _total(trainer, sum(batch.digest for batch in batches))[0]
        results = [_compute(trainer, batches, trainer.dtype) for _ in range(2)]
        exact = _compute(_exact(trainer, scratch / "exact"), batches, torch.float32)
        then = Result(written.get("loss", math.nan), written.get("grad_norm", math.nan))
        if other_data is None and written.get("data") not in (None, digest):
            other_data = step
        if other_result is None and results[0].differs(then) > allowed:
            other_result = step
        run_layout = None if same_layout else f"{state['processes']} processes on {state['device']}"
        lines = verdict(other_data, other_result, results[0], results[1], exact, trainer.dtype, run_layout)
        return {
            "step": step, "from": earlier[-1].name if earlier else "the start", "layout": str(world),
            "same_layout": same_layout, "recorded": then._asdict(), "again": results[0]._asdict(),
            "fp32": exact._asdict(), "documents": _worst(trainer, batches), "verdict": lines,
        }  # fmt: skip


def verdict(
    other_data: int | None, other_result: int | None, first: Result, second: Result, exact: Result, dtype: torch.dtype,
    run_layout: str | None = None,
) -> list[str]:  # fmt: skip
    """Return one line for each thing that made a step what it was, or that nothing differs.

    other_data, other_result: the first steps whose data and whose result are not those of the run. first, second: two
    computations of the step in `dtype`; exact: one in fp32. run_layout: the run's processes, if this is another layout.
    """
    lines = []
    if other_data is not None:
        lines.append(f"data: that of step {other_data} is not what it was")
    elif (again := first.differs(second)) > 0:
        lines.append(f"hardware: two computations of the same step differ by {again:.1g}")
    elif other_result is not None and run_layout is None:
        lines.append(f"hardware: step {other_result} gives another result than the run wrote down")
    elif other_result is not None:
        lines.append(
            f"layout: step {other_result} gives another result than the run wrote down, by more than "
            f"{TOLERANCE[dtype]:g}; the run had {run_layout}: replay it there to know why"
        )
    if (difference := first.differs(exact)) > TOLERANCE[dtype]:
        lines.append(f"kernel: {str(dtype).removeprefix('torch.')} and fp32 differ by {difference:.1g}")
    return lines or ["nothing differs"]


def _records(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of metrics.jsonl by step."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} is no folder of a run: it has no metrics.jsonl")
    return {line["step"]: line for line in read_lines(path)[0] if isinstance(line.get("step"), int)}


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _world(parallel: Parallel, state: dict[str, Any]) -> tuple[World, bool]:
    """Return the processes that are here, and whether they are as many, on the same kind of device, as the run's."""
    here, then = int(os.environ.get("WORLD_SIZE", 1)), state["processes"]
    if here not in (1, then):
        raise UserError(f"the run had {then} processes, not {here}: replay it on as many, or on one")
    world = World(parallel if here == then else Parallel(capacity=parallel.capacity))
    return world, (world.size, world.device.type) == (then, state["device"])


def _repeat(trainer: Trainer, step: int, records: dict[int, Any], allowed: float) -> tuple[int | None, int | None]:
    """Train to just before `step`; return the first steps on the way whose result, and whose data, are others."""
    first = data = None
    while trainer.steps_done < step - 1:
        done = trainer.step()
        trainer.settle()
        then, sums = records.get(done.step, {}), done.sums
        if "data" in then and then["data"] != int(sums["data"]):
            data = data or done.step
        result = Result(sums["loss"] / max(sums["targets"], 1), sums["norm"])
        if "loss" in then and result.differs(Result(then["loss"], then["grad_norm"])) > allowed:
            first = first or done.step
    return first, data


def _exact(trainer: Trainer, folder: Path) -> Trainer:
    """Return a trainer with the same weights that computes in fp32, with every operation as it is written."""
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
    """Return the documents of the highest loss a token, those first whose loss is not finite."""
    losses: list[tuple[float, str]] = []
    for batch in batches:
        losses += zip(trainer.model(batch, by_document=True).tolist(), batch.keys)
    losses = [pair for part in trainer.world.gather(losses) for pair in part]
    losses.sort(key=lambda pair: (math.isfinite(pair[0]), -pair[0]))
    return [{"key": key, "loss": loss} for loss, key in dict.fromkeys(losses)][:WORST]


def show(report: dict[str, Any]) -> str:
    """Return lines to print."""
    rows = [(name, report[name]) for name in ("recorded", "again", "fp32")]
    layout = report["layout"] + ("" if report["same_layout"] else ", another layout than the run's")
    lines = [f"step {report['step']}, from {report['from']}, on {layout}"]
    lines += [f"  {name:9} loss {of['loss']:.9g}  gradient norm {of['norm']:.9g}" for name, of in rows]
    lines += ["documents of the highest loss a token"]
    lines += [f"  {document['loss']:8.4f}  {document['key']}" for document in report["documents"]]
    return "\n".join([*lines, *report["verdict"]])
