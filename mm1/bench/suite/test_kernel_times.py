"""Report the times of each op and its peers to pytest-benchmark, as mm1's own timer measures them."""

from collections.abc import Iterator, Sequence
from functools import cache

import pytest
import torch

from mm1.bench.kernels import BUDGET, Bench
from mm1.bench.ops import OPS
from mm1.bench.peers import COMPILED, PEERS
from mm1.bench.record import Row
from mm1.bench.roofline import ceilings

DEVICE, DTYPE, MODES = (
    ("cuda", "bf16", ("stream", "graph")) if torch.cuda.is_available() else ("cpu", "fp32", ("host",))
)
CHOSEN = [peer for peer in PEERS if DEVICE == "cuda" or peer.name not in COMPILED]


class Replay:
    """Be a clock for pytest-benchmark, on which each round takes as long as the next of `samples`."""

    def __init__(self):
        self.samples: Iterator[float] = iter(())
        self.now, self.running = 0.0, False

    def __call__(self) -> float:
        self.now += next(self.samples) if self.running else 0.0
        self.running = not self.running
        return self.now

    def __repr__(self) -> str:
        return "samples of mm1.autotune.clock"


replay = Replay()


@cache
def rows(op: str, case: str) -> dict[tuple[str, str], Row]:
    bench = Bench(op, case, DEVICE, DTYPE, CHOSEN, ceilings(DEVICE))
    return {(row["what"], row["mode"]): row for row in bench.rows(BUDGET[DEVICE])}


def ways(op: str) -> Sequence[str]:
    return ["mm1", *(peer.name for peer in CHOSEN if op in peer.ways)]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(
    "op,case,what,mode,way",
    [
        pytest.param(op, case, what, mode, way, id=f"{op}-{case}-{what}-{mode}-{way}")
        for op in OPS
        for case in OPS[op].cases[DEVICE]
        for what in ("forward", "forward+backward")
        for mode in MODES
        for way in ways(op)
    ],
)
def test_kernel(benchmark, op, case, what, mode, way):
    row = rows(op, case).get((what, mode))
    if row is None:
        pytest.skip("too long for its launches to show")
    if why := row["failed"].get(way):
        (pytest.fail if way == "mm1" else pytest.skip)(why)
    samples = row["variants"][way]["samples"]
    benchmark.group = f"{op} {case} {what} {mode}"
    benchmark.extra_info |= {name: value for name, value in row["variants"][way].items() if name != "samples"}
    replay.samples = iter(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples))
