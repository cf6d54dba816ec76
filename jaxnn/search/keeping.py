"""What a random search keeps of its losses: the user's questions, and the statistics they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxnn.run.checks import as_count, as_numpy, as_real
from jaxnn.search import statistics
from jaxnn.search.engine import Statistic

__all__ = ["Collect", "Kept", "as_facts", "as_kept", "from_facts", "statistics_of"]

MOST_LISTED = 2**24
"""Candidates that a list of the best, or of those collected, may hold."""
MOST_EDGES = 2**12


class Collect(NamedTuple):
    """Which candidates to collect: all with a loss of at most `threshold`, up to a limit.

    Attributes:
        threshold: the loss.
        limit: most candidates to keep, the first ones.
        stop: whether the search ends with the candidate that reaches the limit.
    """

    threshold: float
    limit: int = 1_000
    stop: bool = False


class Kept(NamedTuple):
    """What is kept; numbers are of the losses' dtype, and checked.

    Attributes:
        dtype: that of the losses.
        top_k: how many of the best.
        thresholds: losses to count at or below of, rising.
        bins: the histogram's edges, rising; None for those of the float's own bits.
        collect: threshold and limit of a collection, or None.
    """

    dtype: np.dtype
    top_k: int
    thresholds: np.ndarray
    bins: np.ndarray | None
    collect: tuple[np.ndarray, int] | None


def as_kept(
    dtype: Any,
    top_k: int,
    thresholds: Sequence[float],
    bins: Sequence[float] | None,
    collect: Collect | None,
) -> Kept:
    """The user's questions, checked."""
    edges = None if bins is None else _as_rising("bins", bins, dtype)
    if edges is not None and not edges.size:
        raise ValueError("bins must hold at least one edge; got none")
    collected = None
    if collect is not None:
        if not isinstance(collect, Collect):
            raise TypeError(f"collect must be a jaxnn.Collect; got a {type(collect).__name__}")
        threshold = as_real("collect.threshold", collect.threshold, minimum=-np.inf)
        limit = as_count("collect.limit", collect.limit, 1, MOST_LISTED)
        collected = np.asarray(threshold, dtype), limit
    top_k = as_count("top_k", top_k, 1, MOST_LISTED)
    limits = _as_rising("thresholds", thresholds, dtype)
    return Kept(np.dtype(dtype), top_k, limits, edges, collected)


def statistics_of(kept: Kept) -> dict[str, Statistic]:
    """The statistics that answer, by name."""
    chosen = {
        "nonfinite": statistics.nonfinite(),
        "best": statistics.best(kept.top_k, kept.dtype),
        "improvements": statistics.improvements(kept.dtype),
        "histogram": statistics.loss_histogram(kept.bins),
        "below": statistics.count_below(kept.thresholds),
    }
    if kept.collect is not None:
        chosen["collected"] = statistics.first_below(*kept.collect, kept.dtype)
    return chosen


def as_facts(kept: Kept) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "loss_dtype": str(kept.dtype),
        "top_k": kept.top_k,
        "thresholds": kept.thresholds.tolist(),
        "bins": None if kept.bins is None else kept.bins.tolist(),
        "collect": None if kept.collect is None else [kept.collect[0].item(), kept.collect[1]],
    }


def from_facts(facts: dict[str, Any]) -> Kept:
    """What `as_facts` wrote down."""
    collect = None if facts["collect"] is None else Collect(*facts["collect"])
    thresholds, bins = facts["thresholds"], facts["bins"]
    return as_kept(np.dtype(facts["loss_dtype"]), facts["top_k"], thresholds, bins, collect)


def _as_rising(name: str, values: Sequence[float], dtype: Any) -> np.ndarray:
    """Finite numbers in strictly rising order, of the loss's dtype."""
    with np.errstate(over="ignore"):
        numbers = as_numpy(name, values).astype(dtype)
    if numbers.ndim != 1 or not np.all(np.isfinite(numbers)) or np.any(np.diff(numbers) <= 0):
        raise ValueError(f"{name} must be finite numbers in rising order; got {values}")
    if numbers.size > MOST_EDGES:
        raise ValueError(f"{name} must be at most {MOST_EDGES} numbers; got {numbers.size}")
    return numbers
