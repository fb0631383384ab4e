"""Measure this machine's ceilings: operations of large products, and bytes read from and written to memory."""

from functools import cache
from typing import Any

import torch

from mm1.autotune.clock import clock
from mm1.kernels.dispatch import Cost

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Sides of square products, and bytes of the copied tensor: several times the last-level cache.
PRODUCTS = {"cuda": (4096, 8192), "cpu": (1024, 2048)}
COPIED = {"cuda": 2 << 30, "cpu": 256 << 20}
SAMPLES = 7


@cache
def ceilings(device: str) -> dict[str, Any]:
    """Return {"copy": bytes/s read and written, "gemm": {dtype: flop/s}}, each the best of several samples.

    "copy" is the faster one of a copy and a reduction, which only reads. fp32 is IEEE, not TF32.
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
    """Return the least seconds at these ceilings: the longer of the time for all operations and for all bytes."""
    return max(cost.flops / limits["gemm"][dtype], cost.bytes / limits["copy"])


def impossible(seconds: float, cost: Cost, dtype: str, limits: dict[str, Any], l2: int) -> bool:
    """Say whether a time is below the ceilings' limit, so that the computation or the cost must be wrong.

    l2: bytes of the cache, where the last writes may still be when the clock stops.
    """
    return seconds < floor(Cost(cost.flops, max(cost.bytes - l2, 0)), dtype, limits)
