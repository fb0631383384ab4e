"""One step and its checkpoint on the processes of torchrun: saved_run.py FOLDER. Writes what each process staged."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from small import small_run
from torch.distributed.checkpoint import _state_dict_stager

from mm1.engine.train.display import Silent
from mm1.engine.train.parallel import World
from mm1.engine.train.trainer import Trainer


def main(folder):
    torch.set_num_threads(1)
    staged, stage = [], _state_dict_stager.StateDictStager._stage_untyped_storage

    def counted(*args, **kwargs):
        copy = stage(*args, **kwargs)
        staged.append(copy.nbytes())
        return copy

    _state_dict_stager.StateDictStager._stage_untyped_storage = counted
    run = small_run(accumulate=4, steps=1, save_every=1)
    world = World(run.parallel)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, streams=4))
    Trainer(run, folder, Silent(), False, world).fit()
    (folder / f"staged-{world.rank}.json").write_text(json.dumps(sum(staged)))
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
