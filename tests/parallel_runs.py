"""Runs of the small model on the processes of torchrun, one after another: parallel_runs.py JOBS.json.

A job trains and leaves lines.json in its folder or, with "gradients", adds those of eight batches in gradients.pt.
"""

import dataclasses
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from small import document, documents, packed, small_model, small_run
from torch.distributed.tensor import DTensor

from mm1.engine.data.config import Source
from mm1.engine.data.document import Budget
from mm1.engine.layers import float8
from mm1.engine.layers.experts import Router
from mm1.engine.models.mm1 import MM1
from mm1.engine.run_config import Run
from mm1.engine.train.config import Parallel
from mm1.engine.train.parallel import World
from mm1.engine.train.recompute import recompute_blocks
from mm1.engine.train.trainer import Trainer


class Quiet:
    def run(self, step):
        import contextlib

        return contextlib.nullcontext()

    def warn(self, message):
        self.warnings.append(message)
        print(message, file=sys.stderr)

    def step(self, step, metrics):
        self.lines.append({"step": step, **metrics})

    def left_out(self, step, why):
        self.lines.append({"step": step, "left_out": why})

    def __init__(self):
        self.lines, self.warnings = [], []


def run_of(job):
    run = small_run(**{"accumulate": 4} | job.get("train", {}))
    data = dataclasses.replace(run.data, **{"streams": 4} | job.get("data", {}))
    if "sources" in job:
        data = dataclasses.replace(data, sources=tuple(Source(*s) for s in job["sources"]))
    model = small_model(**job.get("model", {}))
    return Run(model, data, run.train, Parallel(**job.get("parallel", {})))


def bias_router(model, bias):
    """Add to the logits of every router a bias [E], so that some experts get most tokens and others none."""
    for module in model.modules():
        if isinstance(module, Router) and bias:
            module.register_forward_hook(lambda _module, _x, logits: logits + logits.new_tensor(bias))


def batches():
    """Eight batches: the second has no images, the third no target, the fourth no document."""
    torch.manual_seed(0)
    budget = Budget(tokens=96, media=8, patches=64, documents=8, max_patches=9)
    odd = {1: [document(7), document(30, 5)], 2: [document((2, 3)), document((1, 1))], 3: []}
    return [packed(odd[i] if i in odd else documents(), budget) for i in range(8)]


def gradients(job, run, world):
    """Leave in gradients.pt the summed losses and the whole gradients of all batches, which the processes share."""
    with torch.device("meta"):
        model = MM1(run.model)
    if run.train.float8 != "none":
        with patch.object(float8, "WIDE", 32):
            float8.float8_linears(model.decoder.blocks, run.train.float8)
    dtype = torch.bfloat16 if run.train.dtype == "bf16" else torch.float32
    world.shard_model(model, dtype)
    model.to_empty(device="cpu").init_weights(0)
    bias_router(model, job.get("bias"))
    if run.train.recompute != "none":
        recompute_blocks(model, run.train.recompute)
    nll, slots = torch.zeros(()), 0
    for batch in batches()[world.data_rank :: world.data_size]:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            losses = model(batch)
        losses.objective.backward()
        nll += losses.loss.detach()
        slots = losses.counts + slots
    whole = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()
    }
    sums = {"loss": nll, "square": world.square_norm(p.grad for p in model.parameters()), "slots": slots.float()}
    sums = {name: world.sum(value) for name, value in sums.items()}
    if world.first:
        torch.save(whole | sums, Path(job["folder"], "gradients.pt"))


def main(path):
    torch.set_num_threads(1)
    for job in json.loads(Path(path).read_text()):
        shown, run = Quiet(), run_of(job)
        Path(job["folder"]).mkdir(exist_ok=True)
        world = World(run.parallel)
        if job.get("gradients"):
            gradients(job, run, world)
            continue
        trainer = Trainer(run, Path(job["folder"]), shown, job.get("resume", False), world)
        bias_router(trainer.model, job.get("bias"))
        trainer.fit()
        if world.first:
            Path(job["folder"], "lines.json").write_text(json.dumps(shown.lines))
    world.close()


if __name__ == "__main__":
    main(sys.argv[1])
