"""The parts of random search, for programs of your own.

`evaluate` returns the losses of a range of candidates, and `reduce` what a `Statistic` learns
about one; `jaxnn.random_search` is made of the same parts.
"""

from jaxnn.search.engine import evaluate, reduce
from jaxnn.search.result import Candidates, Histogram, Improvements, ThresholdCounts
from jaxnn.search.statistics import Statistic, Tile

__all__ = [
    "Candidates",
    "Histogram",
    "Improvements",
    "Statistic",
    "ThresholdCounts",
    "Tile",
    "evaluate",
    "reduce",
]
