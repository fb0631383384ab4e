"""Implementations are timed in alternating rounds; slow, flaky and drifting ones are recognised."""

import itertools

import pytest

from mm1.bench.timing import CONTROL, MAX_ROUNDS, MIN_ROUNDS, interleaved, noise, ratio, spread, summary


class Fake:
    """Tell a time that the calls themselves advance, and record the calls."""

    def __init__(self, drift: float = 0.0):
        self.now, self.pace, self.drift, self.called = 0.0, 1.0, drift, []

    def seconds(self, call):
        begin = self.now
        call()
        return self.now - begin

    def way(self, name: str, seconds):
        taken = iter(seconds) if hasattr(seconds, "__iter__") else itertools.repeat(seconds)

        def call():
            self.called.append(name)
            self.pace += self.drift
            step = next(taken)
            if isinstance(step, Exception):
                raise step
            self.now += step * self.pace

        return call


def test_a_way_three_times_as_slow_is_so_however_the_machine_drifts():
    fake = Fake(drift=0.05)  # five times as slow at the end
    samples = interleaved({"mm1": fake.way("mm1", 1.0), "slow": fake.way("slow", 3.0)}, rounds=40, by=fake)
    found = ratio(samples.seconds["slow"], samples.seconds["mm1"])
    assert found["median"] == pytest.approx(3.0, rel=0.03)
    assert found["high"] < 1.3 * found["low"], "samples of one round are compared"
    assert summary(samples.seconds["mm1"])["high"] > 1.5 * summary(samples.seconds["mm1"])["low"]


def test_each_round_takes_each_way_once_and_turns_round():
    fake = Fake()
    interleaved({name: fake.way(name, 1.0) for name in ("mm1", "b", "c")}, rounds=4, control=False, by=fake)
    called = fake.called[6:]  # after two calls of each unmeasured
    rounds = [called[i : i + 3] for i in range(0, 12, 3)]
    assert rounds[0] == rounds[1][::-1] == rounds[2] == rounds[3][::-1]
    assert sorted(rounds[0]) == ["b", "c", "mm1"]


def test_two_runs_of_the_same_tell_the_noise():
    steady, shaky = Fake(), Fake()
    wobble = [1.0, 1.0, *itertools.chain.from_iterable(([1.0, 1.3] * 10) for _ in range(4))]
    assert noise(interleaved({"mm1": steady.way("mm1", 1.0)}, rounds=20, by=steady)) == 0
    assert noise(interleaved({"mm1": shaky.way("mm1", wobble)}, rounds=20, by=shaky)) > 0.1
    assert noise(interleaved({"mm1": steady.way("mm1", 1.0)}, rounds=3, control=False, by=steady)) is None


def test_a_way_that_fails_at_once_or_later_is_left_out_with_its_reason():
    fake = Fake()
    broken = fake.way("broken", [ValueError("no such thing\nmore")])
    flaky = fake.way("flaky", [1.0] * 5 + [RuntimeError("lost")])
    samples = interleaved({"mm1": fake.way("mm1", 1.0), "broken": broken, "flaky": flaky}, rounds=10, by=fake)
    assert samples.failed == {"broken": "ValueError: no such thing", "flaky": "in round 4: RuntimeError: lost"}
    assert set(samples.seconds) == {"mm1", CONTROL}
    assert len(samples.seconds["mm1"]) == 10


@pytest.mark.parametrize("seconds, rounds", [(1.0, MIN_ROUNDS), (0.1, 50), (1e-6, MAX_ROUNDS)])
def test_a_budget_is_spent_in_whole_rounds(seconds, rounds):
    fake = Fake()
    samples = interleaved({"mm1": fake.way("mm1", seconds)}, budget=10.0, by=fake)
    assert len(samples.seconds["mm1"]) == rounds


def test_spread_is_where_the_middle_four_fifths_lie():
    assert spread(list(range(101))) == (10, 90)
    assert spread([3.0]) == (3.0, 3.0)
    assert summary([1.0, 2.0, 100.0])["median"] == 2.0
