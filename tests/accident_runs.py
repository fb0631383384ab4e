"""Runs under torchrun that accidents happen to: accident_runs.py WHAT FOLDER [replayed step].

train           4000 steps, saved every 30
full            16 steps, saved every 4; the disk of the first and the last process is full at step 8
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
from mm1.engine.train.trainer import Trainer, train

SETTINGS = {"train": {"steps": 4000, "save_every": 30}, "full": {"steps": 16, "save_every": 4},
            "one": {"steps": 12, "save_every": 4}}  # fmt: skip


def full_at_step_8(step):
    """Let the first and the last process write no file of more than 1000 bytes in the steps 8 to 9."""
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(trainer):
        if trainer.world.rank in (0, trainer.world.size - 1):
            limit = 1000 if trainer.step in (7, 8) else whole[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, whole[1]))
        return step(trainer)

    return limited


def main(what: str, folder: Path, *step: str) -> None:
    torch.set_num_threads(1)
    if what == "replay":
        report = replay(folder, int(step[0]))
        if os.environ.get("RANK", "0") == "0":
            path = folder.with_name(f"replay-{os.environ.get('WORLD_SIZE', 1)}.json")
            path.write_text(json.dumps(report))
        return
    run = small_run(accumulate=4, **SETTINGS[what])
    if what == "full":
        Trainer._step = full_at_step_8(Trainer._step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_name(f"pid-{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    train(dataclasses.replace(run, data=dataclasses.replace(run.data, streams=4)), folder, resume=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    except KeyboardInterrupt as stopped:
        sys.exit(stopped.status)
