"""Runs under torchrun that accidents happen to: accident_runs.py WHAT FOLDER [replayed step].

train           4000 steps, saved every 30
full            16 steps, saved every 4; the disk of the first and the last process is full at step 8
error           an error ends the run as step 5 begins, just after the save at step 4
one             12 steps, saved every 4, metrics as a run writes them
replay          the step of the run in FOLDER; the first process writes the report to FOLDER/../replay-PROCESSES.json
"""

import dataclasses
import json
import os
import resource
import sys
from pathlib import Path

import torch
from small import small_run

from mm1.engine.train.replay import replay
from mm1.engine.train.step import Observer
from mm1.engine.train.trainer import train

SETTINGS = {
    "train": {"steps": 4000, "save_every": 30}, "full": {"steps": 16, "save_every": 4},
    "error": {"steps": 16, "save_every": 4}, "one": {"steps": 12, "save_every": 4},
}  # fmt: skip


class FullDisk(Observer):
    """Lets the first and the last process write no file of more than 1000 bytes in the steps 8 to 9."""

    def step_begins(self, step):
        whole, last = resource.getrlimit(resource.RLIMIT_FSIZE)[1], int(os.environ.get("WORLD_SIZE", 1)) - 1
        if int(os.environ.get("RANK", 0)) in (0, last):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if step in (8, 9) else whole, whole))


class Error(Observer):
    """End the run by an error as step 5 begins."""

    def step_begins(self, step):
        if step == 5:
            raise RuntimeError("the data ended")


OBSERVERS = {"full": [FullDisk()], "error": [Error()]}


def main(what: str, folder: Path, *step: str) -> None:
    torch.set_num_threads(1)
    if what == "replay":
        report = replay(folder, int(step[0]))
        if os.environ.get("RANK", "0") == "0":
            path = folder.with_name(f"replay-{os.environ.get('WORLD_SIZE', 1)}.json")
            path.write_text(json.dumps(report))
        return
    run = small_run(accumulate=4, **SETTINGS[what])
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_name(f"pid-{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, streams=4))
    train(run, folder, resume=True, observers=OBSERVERS.get(what, []))


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    except KeyboardInterrupt as stopped:
        sys.exit(stopped.status)
