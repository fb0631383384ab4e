"""Compute bootstrap intervals of mean scores.

Sources: Efron 1979; the percentile interval of Efron and Tibshirani 1993, chapter 13.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
FEW = 64  # limit of distinct scores up to which counts of scores are drawn instead of questions
CHUNK = 1 << 22  # random numbers drawn at once


def interval(
    scores: Sequence[float] | np.ndarray, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the bounds of the confidence interval of the mean, over other questions of the same kind.

    scores [N]: one for each question; questions are resampled with replacement, while the scores stay as they are, so
    that CIDEr-D's document frequencies do not change. For the paired difference of two runs on the same questions, pass
    the differences of their scores. level: probability that the interval covers the mean; resamples: number of
    resampled means. The result depends only on scores and seed. Raises ValueError for no scores.
    """
    scores = np.asarray(scores, np.float64)
    if not scores.size:
        raise ValueError("interval: no scores")
    means = np.sort(_means(scores, resamples, np.random.default_rng(seed)))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _means(scores: np.ndarray, resamples: int, draw: np.random.Generator) -> np.ndarray:
    """Return the means of resampled scores, float64 [resamples]."""
    values, counts = np.unique(scores, return_counts=True)
    if len(values) <= FEW:  # the number of each value is multinomial
        return draw.multinomial(len(scores), counts / len(scores), size=resamples) @ values / len(scores)
    rows = max(CHUNK // len(scores), 1)
    parts = [
        scores[draw.integers(0, len(scores), size=(min(rows, resamples - start), len(scores)))].mean(1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(parts)
