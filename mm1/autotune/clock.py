"""Measure the time of one call: between two events on a GPU, by the host's clock elsewhere."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

FLUSH = 256 << 20  # bytes: more than twice the L2 of any GPU in the tables

Call = Callable[[], Any]


class Clock(Protocol):
    """Measure how long calls take."""

    def seconds(self, call: Call) -> float:
        """Run the call once and return its seconds."""
        ...


class HostClock:
    """Measure wall time of calls that return when their work is done. Caches are warm from earlier calls."""

    def seconds(self, call: Call) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin


class GpuClock:
    """Measure between two events around the call.

    A large write comes before the first event: it clears the L2 cache, and lets the host queue the call meanwhile.
    """

    def seconds(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flush().zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


@cache
def _flush() -> Tensor:
    return torch.empty(FLUSH, dtype=torch.uint8, device="cuda")


def capture(call: Call, pool: Any = None) -> torch.cuda.CUDAGraph:
    """Capture the call as a CUDA graph, which the host replays by one launch. pool: another graph's memory to share."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph


def clock() -> Clock:
    """Return the clock for this machine's device."""
    return GpuClock() if torch.cuda.is_available() else HostClock()
