"""Configurations of one kernel, checked and timed in turns, in the process that a worker runs.

On a GPU a CUDA graph of the call is timed; on a CPU, where kernels are interpreted, the machinery runs, no more. Before
a configuration is timed its results are compared with those of fp32, which are of another configuration and without
matrix instructions, and with a second run bit by bit, in memory that was filled with NaN.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from mm1.autotune.clock import capture, clock
from mm1.autotune.space import DTYPES, KERNELS, Inputs
from mm1.autotune.workers import Failed
from mm1.kernels.device import DEVICES, Device
from mm1.kernels.dispatch import device_of_index
from mm1.kernels.tuning import TuneError, pinned

PART = 1 << 26  # elements compared at once: in fp64 they take 8 times the memory of bf16
# Of rms. Interpreted, which cuts bf16 off and so errs twice as much, the kernels are within 7e-3.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


class Trial(NamedTuple):
    """Configurations at a shape, and samples of each; none: they are only checked."""

    kernel: str
    shape: tuple[Any, ...]
    bits: int
    configs: tuple[Any, ...]
    samples: int


def run_trial(trial: Trial, on: str | None = None) -> list[Any]:
    """By configuration: seconds of each sample, or Failed.

    on: what where() must be, so that nothing is timed on a CPU because the GPU is lost. The device is done with each
    configuration before the next one begins, so that an error is of the one at hand.
    """
    if where() != (on or where()):
        raise RuntimeError(f"CUDA error: the trial is for {on}, and this process has {where()} alone")
    try:
        bench = _bench(trial.kernel, trial.shape, trial.bits)
        results: list[Any] = [bench.fault(config) or [] for config in trial.configs]
        good = [i for i, result in enumerate(results) if not isinstance(result, Failed)]
        for number in range(trial.samples):
            for i in good if number % 2 == 0 else reversed(good):  # A B B A
                results[i].append(bench.seconds(trial.configs[i]))
        return results
    finally:  # also behind an exception, which may be the first sign of an error of the device
        synchronize()


def synchronize() -> None:
    """Wait for the device; raises what any kernel before did wrong."""
    if where() == "cuda":
        torch.cuda.synchronize()


def where() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_named(name: str | None) -> Device:
    """A known GPU, or the one at hand."""
    if name is None:
        if where() == "cpu":
            raise TuneError(f"no GPU here: say which with --device; known: {', '.join(DEVICES)}")
        return device_of_index(None)
    if name not in DEVICES:
        raise TuneError(f"unknown device {name!r}; known: {', '.join(DEVICES)}")
    return DEVICES[name]


_now: list["Bench"] = []


def _bench(*key: Any) -> "Bench":
    """One at a time: its inputs may take much of the memory."""
    if not _now or _now[0].key != key:
        _now.clear()
        _now.append(Bench(*key))
    return _now[0]


class Bench:
    """A kernel's example at one shape."""

    def __init__(self, kernel: str, shape: tuple[Any, ...], bits: int):
        self.key = kernel, shape, bits
        self.clock = clock()
        self.kernel, self.dtype = kernel, DTYPES[bits]
        self.run, wide = (self._example(KERNELS[kernel].tunable.shape(*shape), widen) for widen in (False, True))
        self.truth = results_of(wide)
        synchronize()
        self.faults: dict[Any, Failed | None] = {}
        self.graphs: dict[Any, Any] = {}

    def _example(self, shape: Any, widen: bool) -> Callable[[], Any]:
        torch.manual_seed(0)
        return KERNELS[self.kernel].example(shape, Inputs(where(), self.dtype, widen))

    def call(self, config: Any) -> Any:
        with pinned(**{self.kernel: config}):
            return self.run()

    def fault(self, config: Any) -> Failed | None:
        if config not in self.faults:
            self.faults[config] = self._fault(config)
        return self.faults[config]

    def _fault(self, config: Any) -> Failed | None:
        first, second = (results_of(lambda: self.call(config)) for _ in range(2))
        if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second)):
            return Failed("two runs differ")
        pairs = zip(first, self.truth, strict=True)
        why = next((why for a, b in pairs if (why := wrong(a, b, TOLERANCE[self.dtype]))), None)
        synchronize()
        return None if why is None else Failed(why)

    def seconds(self, config: Any) -> float:
        seconds = self.clock.seconds(self._timed(config))
        synchronize()
        return seconds

    def _timed(self, config: Any) -> Callable[[], Any]:
        if where() == "cpu":
            return lambda: self.call(config)
        if config not in self.graphs:
            # All write over one pool of memory: only the last replayed has its results, which nobody reads.
            pool = next((graph.pool() for graph in self.graphs.values()), None)
            self.graphs[config] = capture(lambda: self.call(config), pool)
        return self.graphs[config].replay


def results_of(call: Callable[[], Any]) -> list[Tensor]:
    """What the call returns, where memory that it did not write is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory
    try:
        return [t.clone().contiguous() for t in _pytree.tree_leaves(call()) if isinstance(t, Tensor)]
    finally:
        torch.use_deterministic_algorithms(False)


def wrong(found: Tensor, truth: Tensor, limit: float) -> str | None:
    """What is wrong, if rms(found - truth) is over limit · rms(truth), which one bad column of a hundred thousand
    elements would pass, or one element is off by over five times that share of the largest."""
    if found.shape != truth.shape:
        return f"{tuple(found.shape)} where {tuple(truth.shape)} is meant"
    if not truth.numel():
        return None
    error = scale = 0.0
    worst, largest = [], []
    for f, t in zip(found.flatten().split(PART), truth.flatten().split(PART)):
        off = (f.double() - t.double()).abs()
        error, scale = error + float(off.square().sum()), scale + float(t.double().square().sum())
        worst, largest = [*worst, float(off.max())], [*largest, float(t.abs().max())]
    rms, most = (error / max(scale, 1e-30)) ** 0.5, max(worst) / max(*largest, 1e-30)
    if not rms <= limit:  # nor NaN
        return f"wrong by {rms:.1g} of rms"
    return None if most <= 5 * limit else f"an element is wrong by {most:.1g} of the largest"
