"""Check and time configurations of one kernel, alternating between them, in a worker process.

On a GPU a CUDA graph of the call is timed. On a CPU kernels are interpreted, and times mean nothing. Before a
configuration is timed, its results are compared with those in fp32, which are computed by another configuration without
matrix instructions, and bit by bit with a second run. Outputs are filled with NaN before each run.
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

PART = 1 << 26  # elements to compare at once, in fp64
# Maximum error relative to rms. Interpreted kernels truncate to bf16, which doubles the error, and are within 7e-3.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


class Trial(NamedTuple):
    """Hold configurations at a shape, and the number of samples to take of each; 0: only check them."""

    kernel: str
    shape: tuple[Any, ...]
    bits: int
    configs: tuple[Any, ...]
    samples: int


def run_trial(trial: Trial, on: str | None = None) -> list[Any]:
    """Return for each configuration the seconds of its samples, or Failed.

    on: the expected result of where(). Raises RuntimeError for another one, so that nothing is timed on a CPU after the
    GPU was lost. The device finishes each configuration before the next one starts, so that its errors are its own.
    """
    if where() != (on or where()):
        raise RuntimeError(f"CUDA error: the trial is for {on}, but this process has only {where()}")
    try:
        bench = _bench(trial.kernel, trial.shape, trial.bits)
        results: list[Any] = [bench.fault(config) or [] for config in trial.configs]
        good = [i for i, result in enumerate(results) if not isinstance(result, Failed)]
        for number in range(trial.samples):
            for i in good if number % 2 == 0 else reversed(good):  # A B B A
                results[i].append(bench.seconds(trial.configs[i]))
        return results
    finally:  # also after an exception, which may be the first sign of an error of the device
        synchronize()


def synchronize() -> None:
    """Wait for the device; raises the errors of earlier kernels."""
    if where() == "cuda":
        torch.cuda.synchronize()


def where() -> str:
    """Return the type of device that kernels are timed on: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_named(name: str | None) -> Device:
    """Return the GPU with this name, or this machine's for None. Raises TuneError if there is no such GPU."""
    if name is None:
        if where() == "cpu":
            raise TuneError(f"no GPU here: say which with --device; known: {', '.join(DEVICES)}")
        return device_of_index(None)
    if name not in DEVICES:
        raise TuneError(f"unknown device {name!r}; known: {', '.join(DEVICES)}")
    return DEVICES[name]


current: list["Bench"] = []


def _bench(*key: Any) -> "Bench":
    """Return the bench for this key. Only one is kept, because its inputs may need most of the memory."""
    if not current or current[0].key != key:
        current.clear()
        current.append(Bench(*key))
    return current[0]


class Bench:
    """Run a kernel's example at one shape with any configuration."""

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
        """Run the example with this configuration and return its results."""
        with pinned(**{self.kernel: config}):
            return self.run()

    def fault(self, config: Any) -> Failed | None:
        """Return Failed if the results with this configuration are wrong or change from run to run, else None."""
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
        """Return the time of one run with this configuration."""
        seconds = self.clock.seconds(self._timed(config))
        synchronize()
        return seconds

    def _timed(self, config: Any) -> Callable[[], Any]:
        if where() == "cpu":
            return lambda: self.call(config)
        if config not in self.graphs:
            # All graphs share one pool of memory. They overwrite each other's results, which are not read.
            pool = next((graph.pool() for graph in self.graphs.values()), None)
            self.graphs[config] = capture(lambda: self.call(config), pool)
        return self.graphs[config].replay


def results_of(call: Callable[[], Any]) -> list[Tensor]:
    """Return copies of the tensors that the call returns. Memory that it did not write is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        return [t.clone().contiguous() for t in _pytree.tree_leaves(call()) if isinstance(t, Tensor)]
    finally:
        torch.use_deterministic_algorithms(False)


def wrong(result: Tensor, truth: Tensor, limit: float) -> str | None:
    """Return how a result is wrong, or None.

    rms(result - truth) must be at most limit · rms(truth). As this would miss a single bad element among many, each
    element's error must be at most 5 · limit · max |truth|.
    """
    if result.shape != truth.shape:
        return f"shape is {tuple(result.shape)}, expected {tuple(truth.shape)}"
    if not truth.numel():
        return None
    error = scale = 0.0
    worst, largest = [], []
    for r, t in zip(result.flatten().split(PART), truth.flatten().split(PART)):
        difference = (r.double() - t.double()).abs()
        error, scale = error + float(difference.square().sum()), scale + float(t.double().square().sum())
        worst, largest = [*worst, float(difference.max())], [*largest, float(t.abs().max())]
    rms, worst_share = (error / max(scale, 1e-30)) ** 0.5, max(worst) / max(*largest, 1e-30)
    if not rms <= limit:  # true for NaN too
        return f"wrong by {rms:.1g} of rms"
    return None if worst_share <= 5 * limit else f"an element is wrong by {worst_share:.1g} of the largest"
