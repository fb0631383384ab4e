"""The search for the fastest configuration of one kernel at one shape: what is tried, how long, and what counts.

Legal configurations are ranked by the model; the first few, the default and the incumbent are compiled, checked and
timed in rounds, all alive in each round and in turns, half of them dropped between rounds (successive halving,
Jamieson and Talwalkar 2016). The last are timed against the default pair by pair. A winner must beat the default by
more than two identical runs differ; else the default stays, and so it does on a tie with an earlier configuration.
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

CANDIDATES = 16  # by the model
STRAYS = 8  # by chance, so that the model is seen to be wrong where it is
MARGIN = 0.015  # the least by which a winner must be faster
FIRST = 3  # samples in the first round
FINALISTS = 2
LAST = 24  # pairs of the duel

Samples = list[float]  # seconds
Measure = Callable[[list[Any], int], "list[Samples | Failed]"]  # (configurations, samples each): in turns


def ranked(tunable: Tunable, shape: Any, dtype: torch.dtype, device: Device, count: int) -> list[Any]:
    """The legal configurations that the model predicts to be the fastest, without the default. Of those within 3 %,
    which a prediction does not tell apart, the more alike to the default come first."""
    default = tunable.default(shape, dtype, device)

    def key(config: Any) -> tuple[Any, ...]:
        values = tuple(vars(config).values())
        unlike = sum(a != b for a, b in zip(values, vars(default).values()))
        return round(log(tunable.seconds(config, shape, dtype, device)) / 0.03), unlike, values

    return sorted((c for c in tunable.choices(shape, dtype, device) if c != default), key=key)[:count]


def strays(tunable: Tunable, shape: Any, dtype: torch.dtype, device: Device, count: int) -> list[Any]:
    """Legal configurations by chance, the same for the same shape."""
    space = list(tunable.choices(shape, dtype, device))
    return random.Random(repr((tunable.kernel, tuple(shape)))).sample(space, min(count, len(space)))


class Log:
    """Lines of JSON, appended as things happen; what an earlier run wrote is read first."""

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
        event = {"event": what, **fields}
        self.events.append(event)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(max(file.tell() - 1, 0))
                torn = file.read(1) not in (b"", b"\n")  # of a run that was killed
                file.write(b"\n" * torn + json.dumps(event).encode() + b"\n")

    def of(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event and fields.items() <= e.items()]


class Result(NamedTuple):
    config: Any  # the winner, or the default where nothing beats it
    won: bool
    seconds: tuple[float, float]  # median and half the interquartile range, of the winner
    default_seconds: tuple[float, float]
    gain: float  # default / winner, of pairs in the same round
    noise: float  # that identical runs differ by
    tried: int
    timed: frozenset[Any]
    failed: dict[str, int]  # reasons
    ended: str  # "searched", "budget" or "stopped"


class _Race:
    """Who failed, and the samples of the last round that each was in."""

    def __init__(self, measure: Measure):
        self.measure = measure
        self.samples: dict[Any, Samples] = {}
        self.failures: dict[Any, str] = {}

    def run(self, configs: list[Any], count: int) -> list[Any]:
        """So many samples of each, in turns; who survived."""
        alive = []
        for config, found in zip(configs, self.measure(configs, count)):
            if isinstance(found, Failed):
                self.failures[config] = found.why
            else:
                self.samples[config] = found
                alive.append(config)
        return alive

    def order(self, config: Any) -> tuple[float, tuple[Any, ...]]:
        return statistics.median(self.samples[config]), tuple(vars(config).values())


def search(
    candidates: Iterable[Any], default: Any, measure: Measure, *, budget: float,
    clock: Callable[[], float] = time.monotonic, stopped: Callable[[], bool] = bool,
) -> Result | Failed:  # fmt: skip
    """budget: seconds; stopped: true once the search should end at once.

    Failed, with its reason, if the default itself fails: then there is nothing to compare with.
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
        found = race.run([default, *random.Random(len(alive)).sample(alive, len(alive))], LAST if duel else count)
        if default not in found:
            return Failed(race.failures[default])
        alive = sorted((c for c in found if c != default), key=race.order)
        best = alive[0] if alive else default
        gain = statistics.median(a / b for a, b in zip(race.samples[default], race.samples[best]))
        if duel:
            break
        alive, count = alive[: max(FINALISTS, len(alive) // 2)], 2 * count
    # The best of many by few samples looks faster than it is.
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
    """By what the medians of identical runs differ: three sets of the default, in turns."""
    found = [statistics.median(s) for s in measure([default] * 3, 2 * FIRST) if not isinstance(s, Failed)]
    return (max(found) - min(found)) / statistics.median(found) if len(found) > 1 else 0.0


def _spread(samples: Samples) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    return middle, (high - low) / 2


def regret(predicted: dict[Any, float], measured: dict[Any, float], count: int) -> float:
    """How much slower the best of the first `count` by prediction is than the best measured."""
    first = sorted(measured, key=lambda config: predicted[config])[:count]
    return min(measured[c] for c in first) / min(measured.values()) - 1
