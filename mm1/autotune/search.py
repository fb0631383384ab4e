"""Search for the fastest configuration of one kernel at one shape.

The cost model ranks legal configurations. The first few are timed in rounds, alternating within a round, and half of
them are dropped after each round (successive halving, Jamieson and Talwalkar 2016). The finalists are timed against the
default in pairs. A winner must be faster than the default by more than identical runs differ; otherwise the default
stays.
"""

import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mm1.autotune.workers import Failed
from mm1.kernels.device import Device
from mm1.kernels.tuning import Tunable

CANDIDATES = 16  # number chosen by the cost model
STRAYS = 8  # number chosen at random, to show where the cost model is wrong
MARGIN = 0.015  # minimum share of the default's time by which a winner must be faster
FIRST = 3  # samples of each configuration in the first round
FINALISTS = 2
LAST = 24  # samples of each configuration in the final round

Samples = list[float]  # seconds
Measure = Callable[[list[Any], int], "list[Samples | Failed]"]  # (configurations, samples of each), alternating


def ranked(tunable: Tunable, shape: Any, dtype: torch.dtype, device: Device, count: int) -> list[Any]:
    """Return the `count` legal configurations that the cost model predicts to be fastest, without the default.

    Predictions within 3 % count as equal, and are ordered by the number of fields that differ from the default.
    """
    default = tunable.default(shape, dtype, device)

    def key(config: Any) -> tuple[Any, ...]:
        values = tuple(vars(config).values())
        unlike = sum(a != b for a, b in zip(values, vars(default).values()))
        return round(log(tunable.seconds(config, shape, dtype, device)) / 0.03), unlike, values

    return sorted((c for c in tunable.choices(shape, dtype, device) if c != default), key=key)[:count]


def strays(tunable: Tunable, shape: Any, dtype: torch.dtype, device: Device, count: int) -> list[Any]:
    """Return `count` random legal configurations, always the same ones for the same shape."""
    space = list(tunable.choices(shape, dtype, device))
    return random.Random(repr((tunable.kernel, tuple(shape)))).sample(space, min(count, len(space)))


class Log:
    """Read the events of earlier runs from a file of JSON lines, and append new ones to it."""

    def __init__(self, path: Path | None):
        self.path = path
        self.events: list[dict[str, Any]] = []
        if path and path.is_file():
            for line in path.read_text().splitlines():
                try:
                    self.events.append(json.loads(line))
                except ValueError:  # the last line of a run that was killed
                    continue

    def add(self, event: str, **fields: Any) -> None:
        """Append an event with this name and these fields to the file at once."""
        line = {"event": event, **fields}
        self.events.append(line)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(max(file.tell() - 1, 0))
                torn = file.read(1) not in (b"", b"\n")  # a run was killed while it wrote the last line
                file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")

    def of(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the events with this name and these fields."""
        return [e for e in self.events if e["event"] == event and fields.items() <= e.items()]


class Result(NamedTuple):
    """Hold the outcome of a search."""

    config: Any  # the winner, or the default if nothing beats it
    won: bool  # whether config beats the default
    seconds: tuple[float, float]  # median and half the interquartile range of config
    default_seconds: tuple[float, float]
    gain: float  # median over pairs of samples of default / config
    noise: float  # relative difference of identical runs
    tried: int  # number of candidates
    timed: frozenset[Any]  # configurations with samples
    failed: dict[str, int]  # number of failures by reason
    ended: str  # "searched", "budget" or "stopped"


def search(
    candidates: Iterable[Any], default: Any, measure: Measure, *, budget: float,
    clock: Callable[[], float] = time.monotonic, stopped: Callable[[], bool] = bool,
) -> Result | Failed:  # fmt: skip
    """Return the fastest of the candidates and the default, or Failed if the default fails.

    budget: seconds; stopped: returns True once the search should end at once.
    """
    end = clock() + budget
    samples: dict[Any, Samples] = {}  # of the last round of each configuration
    failures: dict[Any, str] = {}

    def run(configs: list[Any], count: int) -> list[Any]:
        """Measure one round, and return the configurations that did not fail."""
        results = list(zip(configs, measure(configs, count)))
        failures.update((config, result.why) for config, result in results if isinstance(result, Failed))
        alive = {config: result for config, result in results if not isinstance(result, Failed)}
        samples.update(alive)
        return list(alive)

    if not run([default], FIRST):
        return Failed(failures[default])
    noise = _noise(measure, default)
    alive = [c for c in dict.fromkeys(candidates) if c != default]
    count, ended, best, gain, number = FIRST, "searched", default, 1.0, len(alive)
    while alive:
        if stopped() or clock() >= end:
            ended = "stopped" if stopped() else "budget"
            break
        final = len(alive) <= FINALISTS
        timed = run([default, *random.Random(len(alive)).sample(alive, len(alive))], LAST if final else count)
        if default not in timed:
            return Failed(failures[default])
        timed.remove(default)
        alive = sorted(timed, key=lambda c: (statistics.median(samples[c]), tuple(vars(c).values())))
        best = alive[0] if alive else default
        gain = statistics.median(a / b for a, b in zip(samples[default], samples[best]))
        if final:
            break
        alive, count = alive[: max(FINALISTS, len(alive) // 2)], 2 * count
    # The best of many configurations with few samples each looks faster than it is.
    won = best != default and gain > 1 + max(MARGIN, noise) * (1 if ended == "searched" else 2)
    winner = best if won else default
    return Result(
        winner, won, _spread(samples[winner]), _spread(samples[default]), gain if won else 1.0, noise, number,
        frozenset(samples.keys() - failures.keys()), dict(Counter(failures.values())), ended,
    )  # fmt: skip


def _noise(measure: Measure, default: Any) -> float:
    """Return the relative difference between the medians of three sets of samples of the default, alternating."""
    medians = [statistics.median(s) for s in measure([default] * 3, 2 * FIRST) if not isinstance(s, Failed)]
    return (max(medians) - min(medians)) / statistics.median(medians) if len(medians) > 1 else 0.0


def _spread(samples: Samples) -> tuple[float, float]:
    """Return the median and half the interquartile range."""
    if len(samples) < 2:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    return middle, (high - low) / 2
