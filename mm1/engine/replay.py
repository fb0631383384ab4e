"""A step of a run once more: was it the data, the hardware or a kernel that made it what it was?

From the newest checkpoint before it the run goes on as it did, by the same data, to the step. Its loss and gradient
are then computed as the run did, twice, and in fp32 without torch.compile and autocast.

    data        the batches' checksum is another than the run wrote down: files changed
    hardware    two computations of the same differ, or both from what the run wrote down, though the data is the same
    kernel      fp32 gives something else than roundings explain (TOLERANCE)
"""

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from mm1.engine import checkpoint
from mm1.engine.config import Parallel, from_dict
from mm1.engine.data.batch import Batch
from mm1.engine.data.record import DataError
from mm1.engine.display import Silent
from mm1.engine.train import Trainer
from mm1.kernels.linear_cross_entropy import linear_cross_entropy

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of loss and gradient norm against fp32
SAME = 1e-9  # as the run's own lines are compared
WORST = 5  # documents that are named


class Found(NamedTuple):
    loss: float
    norm: float

    def differs(self, other: "Found") -> float:
        """The larger relative difference; values that are not finite are equal to each other."""
        pairs = [(a, b) for a, b in zip(self, other) if math.isfinite(a) or math.isfinite(b)]
        return max(
            (abs(a - b) / max(abs(b), 1e-30) if math.isfinite(a + b) else math.inf for a, b in pairs), default=0.0
        )


def replay(folder: Path, step: int) -> dict[str, Any]:
    """What the run in `folder` did at `step`, and what it does again; "verdict" says what differs. Nothing is changed.

    Raises DataError if the run has no such step, or nothing to begin from.
    """
    lines = [json.loads(line) for line in _text(folder / "metrics.jsonl").splitlines() if line.endswith("}")]
    records = {line["step"]: line for line in lines}
    if step not in records:
        raise DataError(
            f"{folder} wrote nothing down of step {step}, only of {len(records)} up to {max(records, default=0)}"
        )
    known = sorted(path for path in folder.glob("step-*") if (path / checkpoint.MARKER).is_file())
    if not known:
        raise DataError(f"{folder} has no checkpoint, which would say what the run was")
    before = [path for path in known if int(path.name.partition("-")[2]) < step]
    run = replace(from_dict(checkpoint.read_json(known[-1], "config.json")), parallel=Parallel())
    with TemporaryDirectory() as scratch:
        trainer = Trainer(run, Path(scratch) / "run", Silent(), False)
        if before:
            trainer.take_up(before[-1])
        first, other_data = _walk(trainer, step, records)
        batches = [next(trainer.feed) for _ in range(run.train.accumulate)]
        wrote = records[step]
        digest, recorded = sum(batch.digest for batch in batches), wrote.get("data")
        found = [_compute(trainer, batches, trainer.dtype) for _ in range(2)]
        trainer.model.plain_blocks()
        exact = _compute(trainer, batches, torch.float32)
        then = Found(wrote.get("loss", math.nan), wrote.get("grad_norm", math.nan))
        verdict = []
        if other_data is not None or recorded not in (None, digest):
            verdict.append(f"data: that of step {other_data or step} is not what it was")
        elif (again := found[0].differs(found[1])) > 0:
            verdict.append(f"hardware: two computations of the same differ by {again:.1g}")
        elif (at := first or (step if found[0].differs(then) > SAME else None)) is not None:
            verdict.append(f"hardware: step {at} gives another result than the run wrote down")
        if (off := found[0].differs(exact)) > TOLERANCE[trainer.dtype]:
            verdict.append(f"kernel: {str(trainer.dtype).removeprefix('torch.')} and fp32 differ by {off:.1g}")
        return {
            "step": step, "from": before[-1].name if before else "the start", "recorded": then._asdict(),
            "again": found[0]._asdict(), "fp32": exact._asdict(), "documents": _worst(trainer, batches),
            "verdict": verdict or ["nothing differs"],
        }  # fmt: skip


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise DataError(f"{path.parent} is no folder of a run: {error.strerror}") from None


def _walk(trainer: Trainer, step: int, records: dict[int, Any]) -> tuple[int | None, int | None]:
    """To just before `step`; the first steps on the way whose result, and whose data, are not those written down."""
    first = data = None
    while trainer.step < step - 1:
        done = trainer._step()
        trainer.step += 1
        trainer._settle(done, deque())
        then, sums = records.get(trainer.step, {}), done.named()
        if "data" in then and then["data"] != int(sums["data"]):
            data = data or trainer.step
        found = Found(sums["loss"] / max(sums["targets"], 1), sums["norm"])
        if "loss" in then and found.differs(Found(then["loss"], then["grad_norm"])) > SAME:
            first = first or trainer.step
    return first, data


def _compute(trainer: Trainer, batches: Sequence[Batch], dtype: torch.dtype) -> Found:
    model, nll, targets = trainer.model, 0.0, max(sum(batch.target_count for batch in batches), 1)
    for batch in batches:
        with torch.autocast(trainer.device.type, dtype, enabled=dtype != torch.float32):
            losses = model(batch)
            objective = model.objective(losses, batch.target_count)
        objective.backward()
        nll += losses.nll.double().item()
    norm = trainer.world.square_norm(p.grad for p in model.parameters() if p.grad is not None).double().sqrt().item()
    model.zero_grad(set_to_none=True)
    return Found(nll / targets, norm / targets)


@torch.no_grad()
def _worst(trainer: Trainer, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Documents of the highest loss a token, those first whose loss is not finite."""
    found = []
    for batch in batches:
        hidden, weight = trainer.model.hidden(batch)[0], trainer.model.decoder.head_weight
        for i, key in enumerate(batch.keys):
            rows = slice(int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1]))
            found.append((linear_cross_entropy(hidden[rows], weight, batch.targets[rows]).item(), key))
    found.sort(key=lambda pair: (math.isfinite(pair[0]), -pair[0]))
    return [{"key": key, "loss": loss} for loss, key in found[:WORST]]


def show(found: dict[str, Any]) -> str:
    """Lines to print."""
    rows = [(name, found[name]) for name in ("recorded", "again", "fp32")]
    lines = [f"step {found['step']}, from {found['from']}"]
    lines += [f"  {name:9} loss {of['loss']:.9g}  gradient norm {of['norm']:.9g}" for name, of in rows]
    lines += ["documents of the highest loss a token"]
    lines += [f"  {document['loss']:8.4f}  {document['key']}" for document in found["documents"]]
    return "\n".join([*lines, *found["verdict"]])
