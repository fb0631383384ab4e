"""Search for the fastest configuration of one kernel at one shape.

The model ranks legal configurations; the first few, the default and the incumbent are compiled, checked and timed in
rounds, in turns within a round, and half of them are dropped after each round (successive halving, Jamieson and
Talwalkar 2016). The finalists are timed against the default pair by pair. A winner must be faster than the default by
more than two identical runs differ; else the default stays.
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

CANDIDATES = 16  # chosen by the model
STRAYS = 8  # chosen at random, which shows where the model is wrong
MARGIN = 0.015  # a winner must be faster by at least this share
FIRST = 3  # samples in the first round
FINALISTS = 2
LAST = 24  # pairs of samples in the final

Samples = list[float]  # seconds
Measure = Callable[[list[Any], int], "list[Samples | Failed]"]  # (configurations, samples each): in turns


def ranked(tunable: Tunable, shape: Any, dtype: torch.dtype, device: Device, count: int) -> list[Any]:
    """Return the `count` legal configurations that the model predicts to be fastest, without the default.

    Predictions within 3 % count as equal; then those that differ in fewer fields from the default come first.
    """
    default = tunable.default(shape, dtype, device)

    def key(config: Any) -> tuple[Any, ...]:
        values = tuple(vars(config).values())
        unlike = sum(a != b for a, b in zip(values, vars(default).values()))
        return round(log(tunable.seconds(config, shape, dtype, device)) / 0.03), unlike, values

    return sorted((c for c in tunable.choices(shape, dtype, device) if c != default), key=key)[:count]


def strays(tunable: Tunable, shape: Any, dtype: torch.dtype, device: Device, count: int) -> list[Any]:
    """Return `count` random legal configurations, the same ones for the same shape."""
    space = list(tunable.choices(shape, dtype, device))
    return random.Random(repr((tunable.kernel, tuple(shape)))).sample(space, min(count, len(space)))


class Log:
    """Appends events as lines of JSON to a file, after reading those of earlier runs."""

    def __init__(self, path: Path | None):
        self.path = path
        self.events: list[dict[str, Any]] = []
        if path and path.is_file():
            for line in path.read_text().splitlines():
                try:
                    self.events.append(json.loads(line))
                except ValueError:  # the last line of a run that was killed
                    continue

    def add(self, what: str, **fields: Any) -> None:
        """Append an event to the file at once."""
        event = {"event": what, **fields}
        self.events.append(event)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(max(file.tell() - 1, 0))
                torn = file.read(1) not in (b"", b"\n")  # by a run that was killed
                file.write(b"\n" * torn + json.dumps(event).encode() + b"\n")

    def of(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the events of this name that have these fields."""
        return [e for e in self.events if e["event"] == event and fields.items() <= e.items()]


class Result(NamedTuple):
    """Holds the outcome of a search."""

    config: Any  # the winner, or the default where nothing beats it
    won: bool
    seconds: tuple[float, float]  # median and half the interquartile range, of the winner
    default_seconds: tuple[float, float]
    gain: float  # default / winner, of pairs in the same round
    noise: float  # relative difference of identical runs
    tried: int
    timed: frozenset[Any]
    failed: dict[str, int]  # reasons
    ended: str  # "searched", "budget" or "stopped"


class _Race:
    """Keeps failures, and each configuration's samples of the last round that it was in."""

    def __init__(self, measure: Measure):
        self.measure = measure
        self.samples: dict[Any, Samples] = {}
        self.failures: dict[Any, str] = {}

    def run(self, configs: list[Any], count: int) -> list[Any]:
        """Take `count` samples of each, in turns; return the configurations that did not fail."""
        alive = []
        for config, result in zip(configs, self.measure(configs, count)):
            if isinstance(result, Failed):
                self.failures[config] = result.why
            else:
                self.samples[config] = result
                alive.append(config)
        return alive

    def order(self, config: Any) -> tuple[float, tuple[Any, ...]]:
        return statistics.median(self.samples[config]), tuple(vars(config).values())


def search(
    candidates: Iterable[Any], default: Any, measure: Measure, *, budget: float,
    clock: Callable[[], float] = time.monotonic, stopped: Callable[[], bool] = bool,
) -> Result | Failed:  # fmt: skip
    """Return the fastest of the candidates and the default, or Failed if the default fails.

    budget: seconds; stopped: returns True once the search should end at once.
    """
    end = clock() + budget
    race = _Race(measure)
    if not race.run([default], FIRST):
        return Failed(race.failures[default])
    noise = _noise(measure, default)
    alive = [c for c in dict.fromkeys(candidates) if c != default]
    count, ended, best, gain, number = FIRST, "searched", default, 1.0, len(alive)
    while alive:
        if stopped() or clock() >= end:
            ended = "stopped" if stopped() else "budget"
            break
        duel = len(alive) <= FINALISTS
        timed = race.run([default, *random.Random(len(alive)).sample(alive, len(alive))], LAST if duel else count)
        if default not in timed:
            return Failed(race.failures[default])
        alive = sorted((c for c in timed if c != default), key=race.order)
        best = alive[0] if alive else default
        gain = statistics.median(a / b for a, b in zip(race.samples[default], race.samples[best]))
        if duel:
            break
        alive, count = alive[: max(FINALISTS, len(alive) // 2)], 2 * count
    # The best of many with few samples each looks faster than it is.
    won = best != default and gain > 1 + max(MARGIN, noise) * (1 if ended == "searched" else 2)
    winner = best if won else default
    times = _spread(race.samples[winner]), _spread(race.samples[default])
    reasons = dict(Counter(race.failures.values()))
    return Result(
        winner,
        won,
        *times,
        gain if won else 1.0,
        noise,
        number,
        frozenset(race.samples.keys() - race.failures.keys()),
        reasons,
        ended,
    )


def _noise(measure: Measure, default: Any) -> float:
    """Return the relative difference between medians of identical runs: three sets of the default, in turns."""
    medians = [statistics.median(s) for s in measure([default] * 3, 2 * FIRST) if not isinstance(s, Failed)]
    return (max(medians) - min(medians)) / statistics.median(medians) if len(medians) > 1 else 0.0


def _spread(samples: Samples) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    return middle, (high - low) / 2


def regret(predicted: dict[Any, float], measured: dict[Any, float], count: int) -> float:
    """Return how much slower the best of the `count` best predicted configurations is than the best measured one."""
    first = sorted(measured, key=lambda config: predicted[config])[:count]
    return min(measured[c] for c in first) / min(measured.values()) - 1
