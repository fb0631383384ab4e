"""Runs of the small model on the processes of torchrun, one after another: parallel_runs.py JOBS.json."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from small import small_model, small_run

from mm1.engine import config
from mm1.engine.parallel import World
from mm1.engine.train import Trainer


class Quiet:
    def run(self, step):
        import contextlib

        return contextlib.nullcontext()

    def warn(self, message):
        print(message, file=sys.stderr)

    def step(self, step, metrics):
        self.lines.append({"step": step, **metrics})

    def left_out(self, step, why):
        self.lines.append({"step": step, "left_out": why})

    def __init__(self):
        self.lines = []


def run_of(job):
    run = small_run(accumulate=4, **job.get("train", {}))
    data = dataclasses.replace(run.data, streams=4, **job.get("data", {}))
    if "sources" in job:
        data = dataclasses.replace(data, sources=tuple(config.Source(*s) for s in job["sources"]))
    model = small_model(experts=job["experts"]) if "experts" in job else run.model
    return config.Run(model, data, run.train, config.Parallel(**job.get("parallel", {})))


def main(path):
    torch.set_num_threads(1)
    for job in json.loads(Path(path).read_text()):
        shown, run = Quiet(), run_of(job)
        world = World(run.parallel)
        trainer = Trainer(run, Path(job["folder"]), shown, job.get("resume", False), world)
        trainer.fit()
        if world.first:
            Path(job["folder"], "lines.json").write_text(json.dumps(shown.lines))
    world.close()


if __name__ == "__main__":
    main(sys.argv[1])
