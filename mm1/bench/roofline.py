"""Measure this machine's ceilings: the rate of operations in large products, and the bandwidth of its memory."""

from functools import cache
from typing import Any

import torch

from mm1.autotune.clock import clock
from mm1.kernels.dispatch import Cost

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Sides of square products, and bytes of the copied tensor, which is several times as large as the last-level cache.
PRODUCTS = {"cuda": (4096, 8192), "cpu": (1024, 2048)}
COPIED = {"cuda": 2 << 30, "cpu": 256 << 20}
SAMPLES = 7


@cache
def ceilings(device: str) -> dict[str, Any]:
    """Return {"copy": bytes/s that are read and written, "gemm": {dtype: flop/s}}, each the best of SAMPLES samples.

    "copy" is the faster of a copy and a reduction, which only reads. fp32 means IEEE arithmetic, not TF32.
    """
    by, rates = clock(), {}
    for name, dtype in DTYPES.items():
        if device == "cuda" or dtype == torch.float32:
            rates[name] = max(_product(side, dtype, device, by) for side in PRODUCTS[device])
    source = torch.randn(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    copy = min(by.seconds(lambda: target.copy_(source)) for _ in range(SAMPLES))
    total = min(by.seconds(lambda: torch.sum(source)) for _ in range(SAMPLES))
    return {"copy": COPIED[device] * max(2 / copy, 1 / total), "gemm": rates}


def _product(side: int, dtype: torch.dtype, device: str, by: Any) -> float:
    """Return the flop/s of a square product."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(by.seconds(lambda: a @ b) for _ in range(SAMPLES))


def floor(cost: Cost, dtype: str, limits: dict[str, Any]) -> float:
    """Return the minimum seconds at these ceilings: the time for all operations or for all bytes, if that is longer."""
    return max(cost.flops / limits["gemm"][dtype], cost.bytes / limits["copy"])


def impossible(seconds: float, cost: Cost, dtype: str, limits: dict[str, Any], l2: int) -> bool:
    """Return whether a time is below the ceilings' limit, so that the computation or the cost must be wrong.

    l2: bytes of the cache, which may still hold the last writes when the clock stops.
    """
    return seconds < floor(Cost(cost.flops, max(cost.bytes - l2, 0)), dtype, limits)
