"""95 % intervals of a share and of a mean."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95


def of_mean(values: ArrayLike) -> tuple[float, float]:
    """Return Student's interval; NaN for a single value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def of_share(hits: int, draws: int) -> tuple[float, float]:
    """Return the exact interval of Clopper and Pearson."""
    tail, misses = (1 - LEVEL) / 2, draws - hits
    low = stats.beta.ppf(tail, hits, misses + 1) if hits else 0.0
    high = stats.beta.ppf(1 - tail, hits + 1, misses) if misses else 1.0
    return float(low), float(high)
