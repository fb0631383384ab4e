"""Intervals of mean scores are scipy's, cover the truth as often as they say, and repeat."""

import numpy as np
import pytest

from mm1.engine.evaluation import bootstrap
from mm1.engine.evaluation.bootstrap import interval

DATA = {
    "right or wrong": lambda draw, n: (draw.random(n) < 0.3) * 100.0,
    "VQA accuracy": lambda draw, n: draw.choice([0, 30, 60, 90, 100], n, p=[0.4, 0.1, 0.1, 0.1, 0.3]).astype(float),
    "CIDEr": lambda draw, n: draw.gamma(1.2, 60, n),
}


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
@pytest.mark.parametrize("n", [2, 40, 700])
def test_intervals_are_scipys(make, n):
    stats = pytest.importorskip("scipy.stats")
    scores = make(np.random.default_rng(n), n)
    for level in (0.95, 0.8):
        truth = stats.bootstrap(
            (scores,), np.mean, n_resamples=9999, confidence_level=level, method="percentile",
            rng=np.random.default_rng(1),
        ).confidence_interval  # fmt: skip
        noise = 0.15 * scores.std() / np.sqrt(n)  # of 10,000 resamples each: four of its standard deviations
        assert interval(scores, level=level) == pytest.approx(tuple(truth), abs=noise)


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
def test_intervals_cover_the_truth_as_often_as_they_say(make):
    draw = np.random.default_rng(0)
    truth = make(np.random.default_rng(1), 2_000_000).mean()
    for n in (60, 200):
        bounds = np.array([interval(make(draw, n), resamples=600, seed=i) for i in range(300)])
        share = ((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])).mean()
        assert 0.90 < share < 0.985  # three standard errors of 300 trials about 0.943


def test_both_ways_to_draw_are_of_one_distribution(monkeypatch):
    scores = DATA["VQA accuracy"](np.random.default_rng(0), 200)
    by_counts = interval(scores)
    monkeypatch.setattr(bootstrap, "FEW", 0)
    assert interval([0.0, 100.0]) == (0, 100)  # each of two may be all that is drawn
    assert interval(scores) == pytest.approx(by_counts, abs=0.15 * scores.std() / np.sqrt(200))


def test_intervals_repeat_with_their_seed_in_whatever_pieces_they_are_drawn(monkeypatch):
    scores = DATA["CIDEr"](np.random.default_rng(0), 300)
    truth = interval(scores, seed=3)
    assert interval(scores, seed=3) == truth
    assert interval(scores, seed=4) != truth
    assert interval(list(scores), seed=3) == truth
    monkeypatch.setattr(bootstrap, "CHUNK", 900)
    assert interval(scores, seed=3) == truth


def test_differences_of_two_runs_on_the_same_questions_are_surer_than_either():
    draw = np.random.default_rng(0)
    a = DATA["CIDEr"](draw, 200)
    b = a + 5 + draw.normal(size=200)
    low, high = interval(b - a)
    assert 4.5 < low < 5 < high < 5.5
    assert high - low < 0.1 * np.subtract(*interval(a)[::-1])


def test_ends():
    assert interval([7.0]) == (7, 7)
    assert interval([100.0] * 50) == (100, 100)
    low, high = interval([0.0, 100.0])
    assert (low, high) == (0, 100)
    with pytest.raises(ValueError, match="no scores"):
        interval([])
