"""The clock measures how long the device works, not how long the host does."""

import time

import pytest
import torch
import triton
import triton.language as tl
from conftest import needs_gpu

from mm1.autotune.clock import GpuClock, HostClock, capture


@triton.jit
def _spin_kernel(out_ptr, nanoseconds):
    begin = tl.extra.cuda.globaltimer()
    now = begin
    while now - begin < nanoseconds:
        now = tl.extra.cuda.globaltimer()
    tl.store(out_ptr, now - begin)


def test_the_hosts_clock_tells_wall_time():
    assert 0.01 <= HostClock().seconds(lambda: time.sleep(0.01)) < 1


@needs_gpu
@pytest.mark.parametrize("microseconds", [50, 500, 5000])
@pytest.mark.parametrize("graph", [False, True])
def test_a_kernel_of_known_duration_takes_that_long(microseconds, graph):
    out = torch.zeros(1, dtype=torch.int64, device="cuda")
    call = lambda: _spin_kernel[(1,)](out, 1000 * microseconds)  # noqa: E731
    call()
    found = min(GpuClock().seconds(capture(call).replay if graph else call) for _ in range(10))
    assert microseconds <= 1e6 * found + 2 <= microseconds * 1.02 + 15
