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
    half = stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def of_share(hits: int, draws: int) -> tuple[float, float]:
    """Return the exact interval of Clopper and Pearson."""
    interval = stats.binomtest(hits, draws).proportion_ci(LEVEL, method="exact")
    return float(interval.low), float(interval.high)
