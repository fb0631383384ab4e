"""Samples of several ways to do one thing, taken in turns, and what may be said of them.

Whatever drifts (clocks, heat, neighbours) drifts for all ways alike, so what is compared are samples of one round.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mm1.autotune.clock import Call, Clock, clock

CONTROL = "mm1 again"  # the first way a second time: what differs between the two is noise
FEWEST, MOST = 7, 101  # rounds


class Samples(NamedTuple):
    seconds: dict[str, list[float]]  # by way, as many of each: one a round
    failed: dict[str, str]  # why a way has none


def interleaved(
    calls: dict[str, Call],
    *,
    rounds: int | None = None,
    budget: float | None = None,
    control: bool = True,
    by: Clock | None = None,
) -> Samples:
    """Times each call once a round, in an order that turns round every round (A B B A), after two calls unmeasured.

    Either `rounds`, or as many (FEWEST … MOST) as `budget` seconds allow. control: the first way is timed twice a
    round, the second time as CONTROL. A call that raises is left out from then on, with its reason.
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
        rounds = min(MOST, max(FEWEST, int((budget or 1.0) / max(sum(warm), 1e-6))))
    names = list(seconds)
    random.Random(0).shuffle(names)
    for r in range(rounds):
        for name in names if r % 2 else names[::-1]:
            if name not in failed:
                try:
                    seconds[name].append(by.seconds(calls[name]))
                except Exception as error:
                    failed[name] = f"in round {r + 1}: {reason(error)}"
    return Samples({name: taken for name, taken in seconds.items() if name not in failed}, failed)


def reason(error: Exception) -> str:
    """One line; and what an exhausted memory held is let go."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:300]


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, and the range that four fifths of them lie in."""
    low, high = spread(samples)
    return {"median": statistics.median(samples), "low": low, "high": high, "n": len(samples)}


def ratio(samples: Sequence[float], of: Sequence[float]) -> dict[str, Any]:
    """samples / of, round by round."""
    return summary([a / b for a, b in zip(samples, of, strict=True)])


def noise(samples: Samples) -> float | None:
    """By how much two runs of the same thing differ, as a share; None without a control."""
    if CONTROL not in samples.seconds:
        return None
    first = next(name for name in samples.seconds if name != CONTROL)
    return max(abs(r - 1) for r in spread([a / b for a, b in zip(samples.seconds[CONTROL], samples.seconds[first])]))


def spread(samples: Sequence[float]) -> tuple[float, float]:
    """The 10th and the 90th percentile: by the 20th and the 80th, two runs on a CPU agreed in 29 of 34 rows only."""
    if len(samples) < 2:
        return samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def hold(check: Callable[[], str | None]) -> str | None:
    """What a check finds wrong, or how it failed."""
    try:
        return check()
    except Exception as error:
        return reason(error)
