"""What a random search reports: the best, the trail to it, and how the losses are spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincinv

from jaxnn.run.checks import as_numpy
from jaxnn.run.loop import summary
from jaxnn.run.random import join
from jaxnn.search.engine import Reached
from jaxnn.search.statistics import CandidateTable, Kept, bin_edges
from jaxnn.typing import Status

CONFIDENCE = 0.95


class Candidates(NamedTuple):
    """Candidates and their losses.

    Attributes:
        index: their indices, `(count,)`, int64; `candidate_params` turns one into weights.
        loss: their losses, `(count,)`.
    """

    index: np.ndarray
    loss: np.ndarray


class Histogram(NamedTuple):
    """How finite losses are spread.

    Attributes:
        edges: rising edges, `(bins + 1,)`; the outer ones are infinite where bins were chosen.
        counts: losses with `edges[b] <= loss < edges[b + 1]`, `(bins,)`, int64.
    """

    edges: np.ndarray
    counts: np.ndarray


class ThresholdCounts(NamedTuple):
    """How many losses are at most each threshold, and how likely that makes one.

    The intervals are those of a count fixed beforehand; of a search that a target or a full
    collection ended they are approximate.

    Attributes:
        threshold: the thresholds, `(thresholds,)`.
        count: losses at or below, int64.
        share: `count` of all candidates evaluated.
        low: lower end of the 95 % interval of Clopper and Pearson (1934) for the probability.
        high: upper end; for a count of 0 of n about 3.7 / n.
    """

    threshold: np.ndarray
    count: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Improvements(NamedTuple):
    """The trail of improvements, in the order they were met; ready to plot.

    Attributes:
        evaluations: evaluations made up to and with each improvement, int64.
        index: index of the candidate, int64.
        loss: its loss.
    """

    evaluations: np.ndarray
    index: np.ndarray
    loss: np.ndarray


class RandomSearchResult(NamedTuple):
    """What a random search found; printed, it is a summary of a few lines.

    Attributes:
        params: the best candidate; None if no loss was finite, or none was evaluated.
        loss: its loss; inf if none was finite.
        index: its index; None if none was finite. Ties go to the lowest index.
        num_evaluations: candidates evaluated.
        num_nonfinite: how many of them had a loss of NaN or +-inf; those never win.
        status: "completed", "interrupted", "reached", "stopped" or "nonfinite".
        history: the trail of improvements.
        top: the `top_k` best candidates, best first.
        histogram: how the finite losses are spread.
        counts: how many losses are at most each of the `thresholds`.
        collected: the candidates that `collect` asked for, by rising index.
    """

    params: Any
    loss: float
    index: int | None
    num_evaluations: int
    num_nonfinite: int
    status: Status
    history: Improvements
    top: Candidates
    histogram: Histogram
    counts: ThresholdCounts
    collected: Candidates

    def __str__(self) -> str:
        """The summary."""
        details = {} if self.index is None else {"candidate": f"{self.index:,}"}
        if self.num_nonfinite:
            details["not finite"] = f"{self.num_nonfinite:,} losses"
        for threshold, count in zip(self.counts.threshold[:3], self.counts.count, strict=False):
            details[f"<= {threshold:g}"] = f"{count:,} candidates"
        return summary(
            "random search", self.status, self.loss, self.num_evaluations, details=details
        )


def expected_best(histogram: Histogram, num_draws: ArrayLike) -> np.ndarray:
    """Expected lowest loss among `n` candidates drawn from the histogram, with replacement.

    With bins in rising order, middles `x_b` and `S_b` the share of losses in bin `b` or above,
    `E[min of n] = sum_b x_b (S_b^n - S_{b+1}^n)`.

    Args:
        histogram: of a search; bins with an infinite edge count as at their finite one.
        num_draws: `n`, any shape, each at least 1.

    Returns:
        Expected losses, float64, the shape of `num_draws`.

    Raises:
        ValueError: if the histogram is empty or an `n` is below 1.

    Example:
        >>> histogram = Histogram(np.array([0.0, 1.0, 2.0]), np.array([1, 1]))
        >>> expected_best(histogram, [1, 2])
        array([1.  , 0.75])
    """
    draws = as_numpy("num_draws", num_draws).astype(np.float64)
    if np.any(draws < 1):
        raise ValueError(f"num_draws must be at least 1; got {draws.min():g}")
    total = histogram.counts.sum()
    if not total:
        raise ValueError("histogram must hold at least one loss; got none")
    low, high = histogram.edges[:-1].astype(np.float64), histogram.edges[1:].astype(np.float64)
    low, high = np.where(np.isfinite(low), low, high), np.where(np.isfinite(high), high, low)
    above = np.append(np.cumsum(histogram.counts[::-1])[::-1], 0) / total
    chance = above[:-1] ** draws[..., None] - above[1:] ** draws[..., None]
    return np.sum((low + high) / 2 * chance, axis=-1)


def as_candidates(listed: CandidateTable) -> Candidates:
    """Indices and losses of a list, without its empty places."""
    here = np.isfinite(listed.loss)
    return Candidates(join(listed.high[here], listed.low[here]).astype(np.int64), listed.loss[here])


def as_histogram(counts: np.ndarray, chosen: np.ndarray | None) -> Histogram:
    """The bins chosen with one below and one above, or the automatic ones that are in use."""
    if chosen is not None:
        return Histogram(np.array([-np.inf, *chosen, np.inf]), counts)
    used = np.flatnonzero(counts)
    if not used.size:
        return Histogram(np.zeros(1), np.zeros(0, np.int64))
    first, last = int(used[0]), int(used[-1])
    return Histogram(bin_edges(first, last).astype(np.float64), counts[first : last + 1])


def as_threshold_counts(
    thresholds: np.ndarray, count: np.ndarray, num_candidates: int
) -> ThresholdCounts:
    """Shares and their intervals."""
    tail = (1 - CONFIDENCE) / 2
    num_candidates = max(num_candidates, 1)
    misses = num_candidates - count
    with np.errstate(invalid="ignore"):
        low = np.where(count == 0, 0.0, betaincinv(count, misses + 1, tail))
        high = np.where(misses == 0, 1.0, betaincinv(count + 1, misses, 1 - tail))
    return ThresholdCounts(thresholds, count, count / num_candidates, low, high)


def report(
    params_of: Callable[[int], Any],
    spans: Sequence[tuple[int, int]],
    reached: Reached,
    kept: Kept,
) -> RandomSearchResult:
    """The result of a search over these ranges, in order; `params_of(index)` gives a candidate."""
    totals, done = reached.totals, sum(end - start for start, end in spans)
    top, trail = as_candidates(totals["best"]), as_candidates(totals["improvements"])
    index = int(top.index[0]) if top.index.size else None
    nothing = Candidates(np.zeros(0, np.int64), np.zeros(0, kept.dtype))
    return RandomSearchResult(
        params=None if index is None else params_of(index),
        loss=np.inf if index is None else float(top.loss[0]),
        index=index,
        num_evaluations=done,
        num_nonfinite=int(totals["nonfinite"]),
        status="nonfinite" if index is None and reached.status == "completed" else reached.status,
        history=Improvements(_evaluations(spans, trail.index), *trail),
        top=top,
        histogram=as_histogram(totals["histogram"], kept.bins),
        counts=as_threshold_counts(kept.thresholds, totals["below"], done),
        collected=as_candidates(totals["collected"]) if kept.collect else nothing,
    )


def _evaluations(spans: Sequence[tuple[int, int]], index: np.ndarray) -> np.ndarray:
    """How many candidates of the ranges have an index up to each of these."""
    starts, ends = np.array(spans, np.uint64).reshape(-1, 2).T
    before = np.append(np.uint64(0), np.cumsum(ends - starts))
    span = np.searchsorted(starts, index.astype(np.uint64), side="right") - 1
    return (before[span] + index.astype(np.uint64) - starts[span] + np.uint64(1)).astype(np.int64)
