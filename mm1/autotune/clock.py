"""How long one call takes: between two events on a GPU, by the host's clock elsewhere."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

FLUSH = 256 << 20  # bytes: more than twice the L2 of any GPU in the tables

Call = Callable[[], Any]


class Clock(Protocol):
    def seconds(self, call: Call) -> float: ...


class HostClock:
    """Wall time, of work that is done when the call returns; caches are as the calls before left them."""

    def seconds(self, call: Call) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin


class GpuClock:
    """Time between two events around the call, behind a write over the L2 cache that lets the host get ahead."""

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
    """The call as a CUDA graph, whose replay launches it without the host. `pool`: memory of another graph to share."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph


def clock() -> Clock:
    return GpuClock() if torch.cuda.is_available() else HostClock()
