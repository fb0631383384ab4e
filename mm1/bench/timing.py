"""Time several implementations of the same computation in alternating rounds, and compare them round by round.

Only samples of one round are compared, because drift (of clocks, temperature, other processes) affects all of them.
"""

import random
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mm1.autotune.clock import Call, Clock, clock

CONTROL = "mm1 again"  # the first implementation a second time: the difference between the two is noise
MIN_ROUNDS, MAX_ROUNDS = 7, 101


class Samples(NamedTuple):
    """Hold the times of each implementation."""

    seconds: dict[str, list[float]]  # one for each round
    failed: dict[str, str]  # reasons of the implementations that failed


def interleaved(
    calls: dict[str, Call], *, rounds: int | None = None, budget: float = 1.0, control: bool = True,
    by: Clock | None = None,
) -> Samples:  # fmt: skip
    """Time each call once in each round, in an order that is reversed every round (A B B A), after two warm-up calls.

    rounds: their number (None: as many, between MIN_ROUNDS and MAX_ROUNDS, as fit into `budget` seconds). control: time
    the first call a second time in each round, under the name CONTROL. by: the clock. A call that raises is removed
    from all rounds, and the reason recorded.
    """
    by = by or clock()
    failed: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}
    warm: list[float] = []
    for name, call in calls.items():
        try:
            by.seconds(call)
            warm.append(by.seconds(call))
            seconds[name] = []
        except Exception as error:
            failed[name] = reason(error)
    first = next(iter(calls), None)
    calls = dict(calls)
    if control and first in seconds:
        seconds[CONTROL], calls[CONTROL] = [], calls[first]
        warm.append(warm[0])
    if rounds is None:
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / max(sum(warm), 1e-6))))
    names = list(seconds)
    random.Random(0).shuffle(names)
    for r in range(rounds):
        for name in names if r % 2 else names[::-1]:
            if name not in failed:
                try:
                    seconds[name].append(by.seconds(calls[name]))
                except Exception as error:
                    failed[name] = f"in round {r + 1}: {reason(error)}"
    return Samples({name: samples for name, samples in seconds.items() if name not in failed}, failed)


def reason(error: Exception) -> str:
    """Return an error in one line. After an out-of-memory error also free the GPU's cached memory."""
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:300]


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Return the median, the 10th ("low") and 90th percentile ("high"), and the number of samples ("n")."""
    low, high = spread(samples)
    return {"median": statistics.median(samples), "low": low, "high": high, "n": len(samples)}


def ratio(samples: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Return the summary of samples / base, round by round."""
    return summary([a / b for a, b in zip(samples, base, strict=True)])


def noise(samples: Samples) -> float | None:
    """Return the relative difference of two runs of the first implementation, or None without a control."""
    if CONTROL not in samples.seconds:
        return None
    first = next(name for name in samples.seconds if name != CONTROL)
    return max(abs(r - 1) for r in spread([a / b for a, b in zip(samples.seconds[CONTROL], samples.seconds[first])]))


def spread(samples: Sequence[float]) -> tuple[float, float]:
    """Return the 10th and the 90th percentile.

    With the 20th and the 80th, two runs on a CPU agreed in only 29 of 34 rows.
    """
    if len(samples) < 2:
        return samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[0], tenths[-1]
