"""What this machine can do at most, measured now: large products, and reading and writing memory."""

from functools import cache
from typing import Any

import torch

from mm1.autotune.clock import clock
from mm1.kernels.dispatch import Cost

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Sides of square products, and bytes of what is copied: several times the last cache.
PRODUCTS = {"cuda": (4096, 8192), "cpu": (1024, 2048)}
COPIED = {"cuda": 2 << 30, "cpu": 256 << 20}
SAMPLES = 7


@cache
def ceilings(device: str) -> dict[str, Any]:
    """{"copy": bytes/s read and written, "gemm": {dtype: flop/s}}, each the best of several.

    "copy" is the faster of a copy and of a reduction, which only reads. fp32 is IEEE, not TF32.
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
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(by.seconds(lambda: a @ b) for _ in range(SAMPLES))


def floor(cost: Cost, dtype: str, limits: dict[str, Any]) -> float:
    """Seconds that the operations alone, or the bytes alone, take at these ceilings: the longer of both."""
    return max(cost.flops / limits["gemm"][dtype], cost.bytes / limits["copy"])


def impossible(seconds: float, cost: Cost, dtype: str, limits: dict[str, Any], l2: int) -> bool:
    """Whether nothing can be as fast: then something was not computed, or was not counted right.

    What was written last, up to l2 bytes, may still lie in the cache when the clock stops.
    """
    return seconds < floor(Cost(cost.flops, max(cost.bytes - l2, 0)), dtype, limits)
