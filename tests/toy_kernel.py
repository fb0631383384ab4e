"""Make up a toy kernel, a GPU, and rows of tables, for tests of `mm1 tune`."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mm1.autotune import timing, tune
from mm1.autotune.space import KERNELS, Kernel
from mm1.autotune.workers import Failed
from mm1.kernels import tuning
from mm1.kernels.device import DEVICES
from mm1.kernels.tuning import Tunable, chain, config_for

BF16 = torch.bfloat16
HERE = replace(DEVICES["h200"], name="made-up")  # compiled when tried, as any GPU that is not in the tables


@dataclass(frozen=True)
class Config:
    block: int = 8


class Shape(NamedTuple):
    rows: int
    width: int
    gated: bool = False


BLOCKS = [16, 32, 64]
TOY = Tunable(
    "toy", Shape, Config, lambda *_: map(Config, BLOCKS), lambda config, *_: config.block <= 64, lambda *_: Config(8),
    lambda config, *_: 1.0 / config.block,
)  # fmt: skip
SHAPES = [Shape(128, 64), Shape(256, 64), Shape(512, 64)]
FAST = {8: 1.0, 16: 0.9, 32: 0.5, 64: 0.8}
calls: list[int] = []


def example(shape, new):
    """Return a call that computes y = 2x: wrongly with block 16, never alike with 32, incompletely with 64."""
    x = new.floats(shape.rows, shape.width)

    def run():
        block = config_for(TOY, shape, new.dtype, HERE).block
        calls.append(block)
        y = torch.empty_like(x)
        y[1:] = 2.2 * x[1:] if block == 16 else 2 * x[1:]
        if block != 64:
            y[0] = 2 * x[0]
        return y + (len(calls) / 1000 if block == 32 else 0)

    return run


KERNEL = Kernel(TOY, ("_toy_kernel",), False, False, lambda: iter(SHAPES), example)


class Gpu:
    """Return the seconds of each block, or Failed. A trial that times a block of `crashes` dies.

    then: called before each trial.
    """

    def __init__(self, times=FAST, crashes=(), then=lambda trial: None):
        self.times, self.crashes, self.then, self.trials = times, crashes, then, []

    def one(self, trial):
        self.trials.append(trial)
        self.then(trial)
        if trial.samples and {config.block for config in trial.configs} & set(self.crashes):
            return Failed("the process died with status -11", "process")
        times = [self.times[config.block] for config in trial.configs]
        return [Failed(t) if isinstance(t, str) else [t] * trial.samples for t in times]

    def start(self):
        pass

    def close(self):
        pass

    def tried(self):
        """Return how often each (rows of the shape, block) was tried."""
        return Counter((trial.shape[0], config.block) for trial in self.trials for config in trial.configs)


def isolated(tmp_path, monkeypatch):
    """Give each test its own cache and tables, the toy kernel, and a GPU of a kind of its own."""
    monkeypatch.setenv("MM1_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "tables", lambda: tmp_path / "tables")
    monkeypatch.setitem(KERNELS, "toy", KERNEL)
    monkeypatch.setattr(tune, "this_device", lambda: HERE)
    monkeypatch.setattr(timing, "current", [])
    tuning.clear_caches()
    yield
    tuning.clear_caches()


def source(rows, block, origin="predicted", width=64, **more):
    return {"when": {"bits": 16, "rows": rows, "width": width, "gated": False}, "config": {"block": block},
            "origin": origin, **more}  # fmt: skip


def answer(rows=100):
    found = next(a for a in chain(TOY, Shape(rows, 64), BF16, HERE) if a.config is not None)
    return found.step, found.config.block
