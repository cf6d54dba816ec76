"""What a search over many candidates learns: statistics that merge.

Each function below returns a `Statistic`: its state is a monoid over disjoint ranges of indices.
A loss that is NaN or infinite is no loss: it is counted apart and appears nowhere else.

`Kept` holds what a user asks of a search, and `statistics_of` the statistics that answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.run.checks import as_count, as_numpy, as_real
from jaxnn.search import statistics
from jaxnn.search.engine import Statistic, Tile

MAX_RECORDS = 256
"""Improvements kept of one call. Among n independent draws there are about ln n, at most 44."""

MANTISSA_BITS = 9
SHIFT = 23 - MANTISSA_BITS
NUM_BINS = 1 << (32 - SHIFT)
"""Automatic bins: 512 to each power of two, over all of float32; each is 0.2 % wide or less."""


class CandidateTable(NamedTuple):
    """Candidates with their losses, best or first ones in front; inf marks an empty place.

    Attributes:
        high: high words of their indices, `(size,)`, uint32.
        low: low words, `(size,)`, uint32.
        loss: their losses, `(size,)`.
    """

    high: Any
    low: Any
    loss: Any


def nonfinite() -> Statistic:
    """How many losses are NaN or infinite: an integer."""
    return Statistic(np.uint32(0), Partial(_count_nonfinite), _add_counts)


def best(count: int, dtype: Any) -> Statistic:
    """The `count` lowest losses, in order; ties go to the lowest index: a `CandidateTable`."""
    return Statistic(_nothing(count, dtype), Partial(_keep_best), partial(_merge_best, count))


def improvements(dtype: Any) -> Statistic:
    """Every candidate with a lower loss than all before it, in order: a `CandidateTable`."""
    return Statistic(_nothing(MAX_RECORDS, dtype), Partial(_add_records), _merge_records)


def first_below(threshold: np.ndarray, count: int, dtype: Any) -> Statistic:
    """The first `count` candidates with a loss of at most the threshold: a `CandidateTable`."""
    return Statistic(
        _nothing(count, dtype), Partial(_add_hits, threshold), partial(_merge_hits, count)
    )


def count_at_most(thresholds: np.ndarray) -> Statistic:
    """How many losses are at most each threshold, `(thresholds,)`: integers."""
    zeros = np.zeros(len(thresholds), np.uint32)
    return Statistic(zeros, Partial(_count_below, thresholds), _add_counts)


def loss_histogram(edges: np.ndarray | None) -> Statistic:
    """How many losses fall between edges, and below and above them: integers.

    Bin `b` of `len(edges) + 1` holds `edges[b - 1] <= loss < edges[b]`. Without edges the bins
    are those of `bin_edges`.
    """
    if edges is None:
        return Statistic(np.zeros(NUM_BINS, np.uint32), Partial(_count_bits), _add_counts)
    return Statistic(np.zeros(len(edges) + 1, np.uint32), Partial(_count_bins, edges), _add_counts)


def bin_edges(first: int, last: int) -> np.ndarray:
    """Edges of the automatic bins `first` to `last`, `(last - first + 2,)`, float32, rising."""
    ordered = (np.arange(first, last + 2, dtype=np.int64) - NUM_BINS // 2) << SHIFT
    ordered = ordered.astype(np.int32)
    return (ordered ^ (ordered >> 31 & np.int32(0x7FFFFFFF))).view(np.float32)


def _nothing(size: int, dtype: Any) -> CandidateTable:
    empty = np.zeros(size, np.uint32)
    return CandidateTable(empty, empty, np.full(size, np.inf, dtype))


def _add_counts(first: Any, second: Any) -> np.ndarray:
    return np.asarray(first, np.int64) + np.asarray(second, np.int64)


def _counted(tile: Tile) -> jax.Array:
    """Which candidates have a loss at all."""
    return tile.inside & jnp.isfinite(tile.value)


def _ranked(tile: Tile) -> jax.Array:
    """The losses, with inf, which never wins, for what is no loss; -0.0 ties with 0.0."""
    losses = jnp.where(tile.value == 0, jnp.zeros_like(tile.value), tile.value)
    return jnp.where(_counted(tile), losses, jnp.inf)


def _count_nonfinite(count: jax.Array, tile: Tile) -> jax.Array:
    return count + jnp.sum(tile.inside & ~jnp.isfinite(tile.value), dtype=count.dtype)


def _count_below(thresholds: jax.Array, counts: jax.Array, tile: Tile) -> jax.Array:
    below = _ranked(tile)[None, :] <= thresholds[:, None]
    return counts + jnp.sum(below, axis=1, dtype=counts.dtype)


def _count_bins(edges: jax.Array, counts: jax.Array, tile: Tile) -> jax.Array:
    bins = jnp.searchsorted(edges, tile.value, side="right")
    return counts.at[bins].add(_counted(tile).astype(counts.dtype))


def _count_bits(counts: jax.Array, tile: Tile) -> jax.Array:
    """Bins by the float's own bits, which order as integers once the negative ones are turned."""
    bits = jax.lax.bitcast_convert_type(_ranked(tile).astype(jnp.float32), jnp.int32)
    ordered = bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))
    bins = (ordered >> SHIFT) + jnp.int32(NUM_BINS // 2)
    return counts.at[bins].add(_counted(tile).astype(counts.dtype))


def _keep_best(kept: CandidateTable, tile: Tile) -> CandidateTable:
    losses = _ranked(tile)

    def merge(kept: CandidateTable) -> CandidateTable:
        # top_k puts the first of equal losses first, which is the one of the lowest index.
        lowest, place = jax.lax.top_k(-losses, min(kept.loss.shape[0], losses.shape[0]))
        pairs = zip(kept, (tile.high[place], tile.low[place], -lowest), strict=True)
        high, low, loss = (jnp.concatenate(pair) for pair in pairs)
        loss, high, low = jax.lax.sort((loss, high, low), num_keys=3)
        size = kept.loss.shape[0]
        return CandidateTable(high[:size], low[:size], loss[:size])

    return jax.lax.cond(jnp.min(losses) < kept.loss[-1], merge, lambda kept: kept, kept)


def _merge_best(count: int, first: CandidateTable, second: CandidateTable) -> CandidateTable:
    high, low, loss = (np.concatenate(pair) for pair in zip(first, second, strict=True))
    order = np.lexsort((low, high, loss))[:count]
    return CandidateTable(high[order], low[order], loss[order])


def _append(
    listed: CandidateTable, tile: Tile, losses: jax.Array, chosen: jax.Array
) -> CandidateTable:
    """Writes the chosen candidates behind those listed, as many as there is room for."""
    used = jnp.sum(jnp.isfinite(listed.loss), dtype=jnp.int32)
    place = used + jnp.cumsum(chosen, dtype=jnp.int32) - 1
    place = jnp.where(chosen, place, listed.loss.shape[0])
    return CandidateTable(
        listed.high.at[place].set(tile.high, mode="drop"),
        listed.low.at[place].set(tile.low, mode="drop"),
        listed.loss.at[place].set(losses, mode="drop"),
    )


def _add_records(listed: CandidateTable, tile: Tile) -> CandidateTable:
    losses = _ranked(tile)
    best_before = jnp.min(listed.loss)

    def add(listed: CandidateTable) -> CandidateTable:
        lowest = jnp.minimum(jax.lax.cummin(losses), best_before)
        before = jnp.concatenate([best_before[None], lowest[:-1]])
        return _append(listed, tile, losses, losses < before)

    return jax.lax.cond(jnp.min(losses) < best_before, add, lambda listed: listed, listed)


def _merge_records(first: CandidateTable, second: CandidateTable) -> CandidateTable:
    better = second.loss < np.min(first.loss, initial=np.inf)
    return _join(first, CandidateTable(*(leaf[better] for leaf in second)))


def _add_hits(threshold: jax.Array, listed: CandidateTable, tile: Tile) -> CandidateTable:
    losses = _ranked(tile)
    chosen = losses <= threshold

    def add(listed: CandidateTable) -> CandidateTable:
        return _append(listed, tile, losses, chosen)

    room = ~jnp.isfinite(listed.loss[-1])
    return jax.lax.cond(room & jnp.any(chosen), add, lambda listed: listed, listed)


def _merge_hits(count: int, first: CandidateTable, second: CandidateTable) -> CandidateTable:
    return CandidateTable(*(leaf[:count] for leaf in _join(first, second)))


def _join(first: CandidateTable, second: CandidateTable) -> CandidateTable:
    """One list behind the other, without empty places."""
    here, there = np.isfinite(first.loss), np.isfinite(second.loss)
    pairs = zip(first, second, strict=True)
    return CandidateTable(*(np.concatenate([a[here], b[there]]) for a, b in pairs))


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
        "below": statistics.count_at_most(kept.thresholds),
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
