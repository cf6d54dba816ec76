"""95 % intervals: of a share, of a mean, of a median."""

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


def of_median(values: ArrayLike) -> tuple[float, float]:
    """By order statistics, which takes nothing for granted; all there are, if they are few."""
    ordered = np.sort(np.asarray(values, float))
    below = int(stats.binom.ppf((1 - LEVEL) / 2, len(ordered), 0.5))
    low = max(below - 1, 0)
    return float(ordered[low]), float(ordered[len(ordered) - 1 - low])


def of_share(hits: int, draws: int, *, until: bool = False) -> tuple[float, float]:
    """Clopper and Pearson's; exact also where draws went on `until` there were so many hits."""
    tail = (1 - LEVEL) / 2
    low = stats.beta.ppf(tail, hits, draws - hits + 1) if hits else 0.0
    more = hits if until else hits + 1
    high = stats.beta.ppf(1 - tail, more, max(draws - more + 1, 1)) if hits < draws else 1.0
    return float(low), float(high)
