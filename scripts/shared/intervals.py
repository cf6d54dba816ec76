"""95 % intervals: of a share, and of a mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95


def of_mean(values: ArrayLike) -> tuple[float, float]:
    """By Student's t, which takes the mean for normal."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def of_share(hits: int, draws: int, *, until: bool = False) -> tuple[float, float]:
    """Clopper and Pearson's; exact also where draws went on `until` that number of hits.

    In the latter case the upper end is that below which more draws were to be expected: of
    `beta(hits, draws - hits)`, as the last draw is a hit for certain.
    """
    if until and not hits:
        raise ValueError(
            "hits must be at least 1 where draws go on until a number of hits is reached"
        )
    tail, misses = (1 - LEVEL) / 2, draws - hits
    low = stats.beta.ppf(tail, hits, misses + 1) if hits else 0.0
    high = stats.beta.ppf(1 - tail, hits if until else hits + 1, misses) if misses else 1.0
    return float(low), float(high)
