"""What a random search reports: the best, the trail to it, and how the losses are spread.

Reference for the intervals: Clopper and Pearson, "The use of confidence or fiducial limits
illustrated in the case of the binomial", Biometrika 1934.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincinv

from jaxnn.run.checks import as_numpy
from jaxnn.run.loop import Improvement, improvements_of
from jaxnn.run.random import join_index
from jaxnn.run.show import Table, readable, summary
from jaxnn.search.engine import RunState
from jaxnn.search.statistics import CandidateTable, StatisticsConfig, bin_edges
from jaxnn.typing import PyTree, Status

CONFIDENCE = 0.95


@readable
class Candidates(NamedTuple):
    """Candidates and their losses.

    Attributes:
        candidate: their indices, `(candidates,)`, int64; `candidate_params` turns them into
            params.
        loss: their losses, `(candidates,)`.
    """

    candidate: np.ndarray
    loss: np.ndarray


@readable
class Histogram(NamedTuple):
    """How finite losses are spread.

    Attributes:
        edges: rising edges, `(bins + 1,)`; the outer ones are infinite where bins were chosen.
        counts: losses with `edges[b] <= loss < edges[b + 1]`, `(bins,)`, int64.
        highest: losses above this were not counted; inf if all were.
    """

    edges: np.ndarray
    counts: np.ndarray
    highest: float = np.inf


@readable
class ThresholdCounts(NamedTuple):
    """How many losses are at most each threshold, and how likely that makes one.

    `low` and `high` bound the probability that a candidate's loss is at most the threshold, with
    at least 95 % confidence (Clopper and Pearson, 1934). With `k` of `n` candidates they are
    quantiles of beta distributions: 2.5 % of `beta(k, n - k + 1)` and 97.5 % of
    `beta(k + 1, n - k)`. Where a stop rule at this very threshold ended the search, as
    `target_loss` and `collect.stop` do, the last candidate is a hit for certain, and the upper
    end is 97.5 % of `beta(k, n - k)`.

    Both are exact for a search that goes through all its candidates, and for the threshold of
    its only stop rule. They are approximate for other thresholds of a search that a stop rule
    ended, for a search with two stop rules, and for a merged one of which some parts ended so.

    Attributes:
        threshold: the thresholds, `(thresholds,)`.
        num_below: how many losses are at most the threshold, int64.
        share: `num_below` over the number of candidates evaluated.
        low: lower end of the interval; 0 for no hit.
        high: upper end; for no hit among n about 3.7 / n.
    """

    threshold: np.ndarray
    num_below: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray


@readable
class Improvements(NamedTuple):
    """The trail of improvements, in the order they were met; ready to plot.

    Attributes:
        evaluations: evaluations made up to and with each improvement, int64.
        candidate: index of the candidate, int64.
        loss: its loss.
        metric: `metric_fn` of it, float32; None if there was no `metric_fn`.
    """

    evaluations: np.ndarray
    candidate: np.ndarray
    loss: np.ndarray
    metric: np.ndarray | None = None


@readable
class RandomSearchResult(NamedTuple):
    """What a random search found; printed, it is a summary of a few lines.

    Attributes:
        params: the best candidate's; None if no loss was finite, or none was evaluated.
        loss: its loss; inf if none was finite.
        candidate: its index; None if none was finite. Ties go to the lowest index.
        num_evaluations: candidates evaluated.
        num_nonfinite: how many of them had a loss of NaN or +-inf; those never win. None for a
            search with `keep_below`.
        status: "completed", "interrupted", "reached", "stopped" or "nonfinite".
        history: the trail of improvements.
        top: the `top_k` best candidates, best first.
        histogram: how the finite losses are spread.
        counts: how many losses are at most each of the `thresholds`.
        collected: the candidates that `collect` asked for, by rising index.
    """

    params: PyTree
    loss: float
    candidate: int | None
    num_evaluations: int
    num_nonfinite: int | None
    status: Status
    history: Improvements
    top: Candidates
    histogram: Histogram
    counts: ThresholdCounts
    collected: Candidates

    def improvements(self) -> list[Improvement]:
        """Return the trail of improvements; `print` each for a line."""
        return improvements_of(self.history.evaluations, self.history.loss, self.history.metric)

    def _table(self) -> Table:
        """The summary."""
        details = {} if self.candidate is None else {"candidate": f"{self.candidate:,}"}
        if self.history.metric is not None and self.history.metric.size:
            details["metric"] = f"{self.history.metric[-1]:.6g}"
        if self.num_nonfinite:
            details["not finite"] = f"{self.num_nonfinite:,} losses"
        counts = zip(self.counts.threshold, self.counts.num_below, self.counts.share, strict=True)
        below = [f"{number:,} up to {level:g} ({share:.3g})" for level, number, share in counts]
        if below:
            details["counts"] = ", ".join(below)
        measured = self.status, self.loss, self.num_evaluations
        hint = "result.params, result.history, result.top, result.counts, result.histogram"
        return summary("random search", *measured, details=details, hint=hint)


def expected_best(histogram: Histogram, num_draws: ArrayLike) -> np.ndarray:
    """Return the expected lowest loss among `n` draws from a histogram, with replacement.

    With bins in rising order, middles `x_b` and `S_b` the share of losses in bin `b` or above,
    `E[min of n] = sum_b x_b (S_b^n - S_{b+1}^n)`. It is as exact as the bins are narrow: the
    automatic ones are 0.2 % wide.

    Args:
        histogram: of a search. A bin with an infinite edge counts as its finite one.
        num_draws: `n`, any shape, each at least 1.

    Returns:
        Expected losses, float64, the shape of `num_draws`.

    Raises:
        ValueError: if the histogram is empty or of a search with `keep_below`, or an `n` is
            below 1.

    Example:
        >>> histogram = Histogram(np.array([0.0, 1.0, 2.0]), np.array([1, 1]))
        >>> expected_best(histogram, [1, 2])
        array([1.  , 0.75])
    """
    if not isinstance(histogram, Histogram):
        raise TypeError(f"histogram must be that of a search; got a {type(histogram).__name__}")
    if histogram.highest < np.inf:
        raise ValueError(
            "histogram must count all losses; got one of a search with keep_below="
            f"{histogram.highest:g}"
        )
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


def make_result(
    params_of: Callable[[int], PyTree],
    spans: Sequence[tuple[int, int]],
    state: RunState,
    config: StatisticsConfig,
) -> RandomSearchResult:
    """Return the result of a search over these ranges, in order."""
    totals, num_evaluations = state.totals, sum(end - start for start, end in spans)
    thresholds, num_below = np.array(config.thresholds, config.loss_dtype), totals["num_below"]
    draws = max(num_evaluations, 1)
    ends = interval(num_below, draws, [each == state.stop_threshold for each in config.thresholds])
    candidate, loss = best_of(totals)
    trail = as_candidates(totals["improvements"])
    no_table = CandidateTable(*np.zeros((3, 0), config.loss_dtype))
    num_nonfinite = num_evaluations - int(totals["histogram"].sum())
    if config.keep_below is not None:  # What was dropped is not in the histogram either.
        num_nonfinite = None
    is_nonfinite = candidate is None and state.status == "completed"
    return RandomSearchResult(
        params=None if candidate is None else params_of(candidate),
        loss=loss,
        candidate=candidate,
        num_evaluations=num_evaluations,
        num_nonfinite=num_nonfinite,
        status="nonfinite" if is_nonfinite else state.status,
        history=Improvements(_evaluations(spans, trail.candidate), *trail),
        top=as_candidates(totals["best"]),
        histogram=_as_histogram(totals["histogram"], config),
        counts=ThresholdCounts(thresholds, num_below, num_below / draws, *ends),
        collected=as_candidates(totals.get("collected", no_table)),
    )


def best_of(totals: dict[str, PyTree]) -> tuple[int | None, float]:
    """Return the best candidate and its loss; None and inf if no loss was finite."""
    top = as_candidates(totals["best"])
    return (int(top.candidate[0]), float(top.loss[0])) if top.candidate.size else (None, np.inf)


def as_candidates(table: CandidateTable) -> Candidates:
    """Return indices and losses of a table, without its empty places."""
    here = np.isfinite(table.loss)
    high, low, loss = (column[here] for column in table)
    return Candidates(join_index(high, low).astype(np.int64), loss)


def _as_histogram(counts: np.ndarray, config: StatisticsConfig) -> Histogram:
    """The bins chosen with one below and one above, or the automatic ones that are in use."""
    highest = np.inf if config.keep_below is None else config.keep_below
    if config.bins is not None:
        return Histogram(np.array([-np.inf, *config.bins, np.inf]), counts, highest)
    used = np.flatnonzero(counts)
    if not used.size:
        return Histogram(np.zeros(1), np.zeros(0, np.int64), highest)
    first, last = int(used[0]), int(used[-1])
    edges = bin_edges(first, last).astype(np.float64)
    return Histogram(edges, counts[first : last + 1], highest)


def interval(
    num_below: np.ndarray, num_evaluations: ArrayLike, is_stop: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the intervals of `ThresholdCounts`; `is_stop` where a threshold ended the search."""
    tail, misses = (1 - CONFIDENCE) / 2, num_evaluations - num_below
    with np.errstate(invalid="ignore"):
        low = np.where(num_below == 0, 0.0, betaincinv(num_below, misses + 1, tail))
        high = betaincinv(num_below + ~np.asarray(is_stop, bool), misses, 1 - tail)
    return low, np.where(misses == 0, 1.0, high)


def _evaluations(spans: Sequence[tuple[int, int]], candidates: np.ndarray) -> np.ndarray:
    """How many candidates of the ranges have an index up to each of these."""
    starts, ends = np.array(spans, np.uint64).reshape(-1, 2).T
    before = np.append(np.uint64(0), np.cumsum(ends - starts))
    span = np.searchsorted(starts, candidates.astype(np.uint64), side="right") - 1
    offset = candidates.astype(np.uint64) - starts[span] + np.uint64(1)
    return (before[span] + offset).astype(np.int64)
