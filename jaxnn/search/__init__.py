"""Random search over any params pytree and any loss, and its parts.

`random_search` draws whole candidates and keeps the best. `evaluate` and `reduce` are its parts
for programs of your own: the losses of a range of candidates, and what a `Statistic` learns
about one.
"""

from jaxnn.search.engine import candidate_params, evaluate, reduce
from jaxnn.search.merge import merge_searches
from jaxnn.search.outcomes import OutcomeCounts, count_outcomes
from jaxnn.search.random_search import random_search
from jaxnn.search.result import (
    Candidates,
    Histogram,
    Improvements,
    RandomSearchResult,
    ThresholdCounts,
    expected_best,
)
from jaxnn.search.statistics import Collect, Statistic, Tile

__all__ = [
    "Candidates",
    "Collect",
    "Histogram",
    "Improvements",
    "OutcomeCounts",
    "RandomSearchResult",
    "Statistic",
    "ThresholdCounts",
    "Tile",
    "candidate_params",
    "count_outcomes",
    "evaluate",
    "expected_best",
    "merge_searches",
    "random_search",
    "reduce",
]
