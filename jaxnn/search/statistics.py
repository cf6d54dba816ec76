"""What a search learns about its candidates: statistics that merge.

A `Statistic` is a monoid over disjoint ranges of candidates, so a range may be cut into chunks,
devices and processes in any way. The functions below return the statistics of random search,
whose states are the same bits for every cut (of improvements, up to 256 a shard). They leave out
losses that are NaN or infinite.

`StatisticsConfig` holds what a user asks of a search, and `statistics_of` returns the statistics
that answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.run.checks import as_count, as_numpy, as_real
from jaxnn.typing import PyTree

MAX_IMPROVEMENTS = 256
"""Improvements kept of one call; of more, the last place holds the lowest.

Among n independent draws there are about ln n, at most 44.
"""
MOST_LISTED = 2**24
"""Candidates that a table may hold."""
MOST_EDGES = 2**12

MANTISSA_BITS = 9
SHIFT = 23 - MANTISSA_BITS
NUM_BINS = 1 << (32 - SHIFT)
"""Automatic bins: 512 to each power of two, over all of float32; each is 0.2 % wide or less."""


class Tile(NamedTuple):
    """Candidates side by side, as a statistic gets them.

    Attributes:
        high: high words of their indices, `(width,)`, uint32; an index is `high * 2**32 + low`.
        low: low words, `(width,)`, uint32.
        inside: which of them belong to the range, `(width,)`, bool: the last tile is padded.
        value: what the value function returned for each, leaves `(width, ...)`.
    """

    high: jax.Array
    low: jax.Array
    inside: jax.Array
    value: PyTree


class Statistic(NamedTuple):
    """Something to learn about a range of candidates; `jaxnn.search.reduce` takes any.

    `merge` has to be associative, and `merge(start, state)` has to be `state`.

    Attributes:
        start: the state of no candidates, a pytree of NumPy arrays or numbers.
        update: `update(state, tile)` -> the state with the candidates of a `Tile` taken in, by
            JAX code, in the same shapes and dtypes.
        merge: `merge(first, second)` -> the state of two ranges, by NumPy code on the host.
            `first` has the lower indices. Shapes and dtypes may grow.

    Example:
        Count candidates with a positive value, in 64 bits on the host:

        >>> positive = Statistic(
        ...     start=np.uint32(0),
        ...     update=lambda count, tile: count
        ...     + jnp.sum(tile.inside & (tile.value > 0), dtype=jnp.uint32),
        ...     merge=lambda first, second: np.int64(first) + np.int64(second),
        ... )
        >>> positive.merge(positive.start, np.uint32(7))
        np.int64(7)
    """

    start: PyTree
    update: Callable[[PyTree, Tile], PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]


class Collect(NamedTuple):
    """Which candidates a search collects: those with a loss of at most `threshold`.

    Attributes:
        threshold: the highest loss.
        limit: how many candidates to keep, the first ones.
        stop: whether the search ends with the candidate that reaches the limit.

    Example:
        >>> Collect(threshold=0.5, limit=10)
        Collect(threshold=0.5, limit=10, stop=False)
    """

    threshold: float
    limit: int = 1_000
    stop: bool = False


class StatisticsConfig(NamedTuple):
    """What a search keeps, as JSON keeps it; numbers are rounded to the dtype of the losses."""

    loss_dtype: str
    top_k: int
    thresholds: list[float]
    bins: list[float] | None  # None for those of the float's own bits
    collect: list[Any] | None  # threshold and limit
    keep_below: float | None  # None where every loss is kept


class CandidateTable(NamedTuple):
    """Candidates with their losses, each field `(size,)`; a loss of inf marks an empty place."""

    high: PyTree
    low: PyTree
    loss: PyTree


class Rows(NamedTuple):
    """Values of candidates in order, `values[:used]`; the rest is room, in whole tiles."""

    values: PyTree
    used: PyTree


def as_config(
    dtype: np.dtype,
    top_k: int,
    thresholds: Sequence[float],
    bins: Sequence[float] | None,
    collect: Collect | None,
    keep_below: float | None,
) -> StatisticsConfig:
    """Return what a user asks of a search, checked."""
    edges = None if bins is None else _as_rising("bins", bins, dtype)
    if edges is not None and not edges:
        raise ValueError("bins must hold at least one edge; got none")
    collected = None
    if collect is not None:
        if not isinstance(collect, Collect):
            raise TypeError(f"collect must be a jaxnn.Collect; got a {type(collect).__name__}")
        as_real("collect.threshold", collect.threshold, minimum=-np.inf)
        threshold = _as_rising("collect.threshold", [collect.threshold], dtype)[0]
        collected = [threshold, as_count("collect.limit", collect.limit, 1, MOST_LISTED)]
    top_k = as_count("top_k", top_k, 1, MOST_LISTED)
    limits = _as_rising("thresholds", thresholds, dtype)
    if keep_below is not None:  # all that is asked for is kept as well
        as_real("keep_below", keep_below, minimum=-np.inf)
        lowest = _as_rising("keep_below", [keep_below], dtype)
        keep_below = max([*lowest, *limits, *(collected or [])[:1]])
    return StatisticsConfig(str(dtype), top_k, limits, edges, collected, keep_below)


def statistics_of(config: StatisticsConfig) -> dict[str, Statistic]:
    """Return the statistics that a search keeps, by name."""
    dtype, top_k = jnp.dtype(config.loss_dtype), config.top_k
    edges = None if config.bins is None else np.array(config.bins, dtype)
    counts = np.zeros(NUM_BINS if edges is None else len(edges) + 1, np.uint32)
    thresholds = np.array(config.thresholds, dtype)
    highest = None if config.keep_below is None else np.array(config.keep_below, dtype)
    chosen = {
        # The lowest losses, in order; ties go to the lowest index.
        "best": Statistic(_empty_table(top_k, dtype), Partial(_keep_best), _merge_best),
        # Every candidate with a lower loss than all before it, in order.
        "improvements": Statistic(
            _empty_table(MAX_IMPROVEMENTS, dtype),
            Partial(_append_improvements),
            _merge_improvements,
        ),
        # How many losses fall between edges, and below and above them.
        "histogram": Statistic(counts, Partial(_count_in_bins, edges, highest), _add_counts),
        # How many losses are at most each threshold.
        "num_below": Statistic(
            np.zeros(len(thresholds), np.uint32), Partial(_count_at_most, thresholds), _add_counts
        ),
    }
    if config.collect is not None:
        # The first candidates with a loss of at most the threshold.
        threshold, limit = config.collect
        update = Partial(_append_hits, np.array(threshold, dtype))
        table = _empty_table(limit, dtype)
        chosen["collected"] = Statistic(table, update, partial(_concatenate, limit))
    return chosen


def bin_edges(first: int, last: int) -> np.ndarray:
    """Edges of the automatic bins `first` to `last`, `(last - first + 2,)`, float32, rising."""
    ordered = (np.arange(first, last + 2, dtype=np.int64) - NUM_BINS // 2) << SHIFT
    ordered = ordered.astype(np.int32)
    return (ordered ^ (ordered >> 31 & np.int32(0x7FFFFFFF))).view(np.float32)


def append_rows(rows: Rows, tile: Tile) -> Rows:
    """Write a tile's values behind the others. Padding comes last, and does not count."""
    start = (rows.used, *(jnp.uint32(0) for _ in tile.value.shape[1:]))
    values = jax.lax.dynamic_update_slice(rows.values, tile.value, start)
    return Rows(values, rows.used + jnp.sum(tile.inside, dtype=jnp.uint32))


def concatenate_rows(first: Rows, second: Rows) -> Rows:
    """Both, without room, on the host."""
    values = np.concatenate([first.values[: first.used], second.values[: second.used]])
    return Rows(values, np.asarray(len(values)))


def _empty_table(size: int, dtype: np.dtype) -> CandidateTable:
    empty = np.zeros(size, np.uint32)
    return CandidateTable(empty, empty, np.full(size, np.inf, dtype))


def _add_counts(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.asarray(first, np.int64) + np.asarray(second, np.int64)


def _is_loss(tile: Tile) -> jax.Array:
    """Which candidates belong to the range and have a finite loss."""
    return tile.inside & jnp.isfinite(tile.value)


def _ranked(tile: Tile) -> jax.Array:
    """The losses; inf, which never wins, where there is none. -0.0 ties with 0.0."""
    losses = jnp.where(tile.value == 0, jnp.zeros_like(tile.value), tile.value)
    return jnp.where(_is_loss(tile), losses, jnp.inf)


def _count_at_most(thresholds: jax.Array, counts: jax.Array, tile: Tile) -> jax.Array:
    below = _ranked(tile)[None, :] <= thresholds[:, None]
    return counts + jnp.sum(below, axis=1, dtype=counts.dtype)


def _count_in_bins(
    edges: jax.Array | None, highest: jax.Array | None, counts: jax.Array, tile: Tile
) -> jax.Array:
    if edges is None:
        # The bits of floats order as integers, once those of the negative ones are turned.
        bits = jax.lax.bitcast_convert_type(_ranked(tile).astype(jnp.float32), jnp.int32)
        ordered = bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))
        bins = (ordered >> SHIFT) + jnp.int32(NUM_BINS // 2)
    else:
        bins = jnp.searchsorted(edges, tile.value, side="right")
    counted = _is_loss(tile) if highest is None else _is_loss(tile) & (tile.value <= highest)
    return counts.at[bins].add(counted.astype(counts.dtype))


def _keep_best(table: CandidateTable, tile: Tile) -> CandidateTable:
    losses, size = _ranked(tile), table.loss.shape[0]

    def merge(table: CandidateTable) -> CandidateTable:
        # top_k puts the first of equal losses first, which is the one of the lowest index.
        lowest, place = jax.lax.top_k(-losses, min(size, losses.shape[0]))
        pairs = zip(table, (tile.high[place], tile.low[place], -lowest), strict=True)
        high, low, loss = (jnp.concatenate(pair) for pair in pairs)
        loss, high, low = jax.lax.sort((loss, high, low), num_keys=3)
        return CandidateTable(high[:size], low[:size], loss[:size])

    return jax.lax.cond(jnp.min(losses) < table.loss[-1], merge, lambda table: table, table)


def _merge_best(first: CandidateTable, second: CandidateTable) -> CandidateTable:
    high, low, loss = (np.concatenate(pair) for pair in zip(first, second, strict=True))
    order = np.lexsort((low, high, loss))[: len(first.loss)]
    return CandidateTable(high[order], low[order], loss[order])


def _append_improvements(table: CandidateTable, tile: Tile) -> CandidateTable:
    losses = _ranked(tile)

    def append_next(table: CandidateTable) -> CandidateTable:
        # There are few, so a pass over the tile for each is faster to compile than running minima,
        # and as fast to run. Where there is no more room, the last is overwritten.
        place = jnp.argmax(losses < jnp.min(table.loss))
        used = jnp.minimum(jnp.sum(jnp.isfinite(table.loss)), table.loss.shape[0] - 1)
        entry = tile.high[place], tile.low[place], losses[place]
        pairs = zip(table, entry, strict=True)
        return CandidateTable(*(column.at[used].set(value) for column, value in pairs))

    return jax.lax.while_loop(
        lambda table: jnp.min(losses) < jnp.min(table.loss), append_next, table
    )


def _merge_improvements(first: CandidateTable, second: CandidateTable) -> CandidateTable:
    better = second.loss < np.min(first.loss, initial=np.inf)
    return _concatenate(None, first, CandidateTable(*(column[better] for column in second)))


def _append_hits(threshold: jax.Array, table: CandidateTable, tile: Tile) -> CandidateTable:
    losses = _ranked(tile)
    chosen = losses <= threshold
    append = partial(_append, tile=tile, losses=losses, chosen=chosen)
    has_room = ~jnp.isfinite(table.loss[-1])
    return jax.lax.cond(has_room & jnp.any(chosen), append, lambda table: table, table)


def _append(
    table: CandidateTable, tile: Tile, losses: jax.Array, chosen: jax.Array
) -> CandidateTable:
    """Write the chosen candidates behind the others, as far as there is room."""
    used = jnp.sum(jnp.isfinite(table.loss), dtype=jnp.int32)
    place = used + jnp.cumsum(chosen, dtype=jnp.int32) - 1
    place = jnp.where(chosen, place, table.loss.shape[0])
    columns = zip(table, (tile.high, tile.low, losses), strict=True)
    return CandidateTable(*(old.at[place].set(new, mode="drop") for old, new in columns))


def _concatenate(
    count: int | None, first: CandidateTable, second: CandidateTable
) -> CandidateTable:
    """The first `count` candidates of both, without empty places."""
    here, there = np.isfinite(first.loss), np.isfinite(second.loss)
    pairs = zip(first, second, strict=True)
    return CandidateTable(*(np.concatenate([a[here], b[there]])[:count] for a, b in pairs))


def _as_rising(name: str, values: Sequence[float], dtype: np.dtype) -> list[float]:
    """Finite numbers in strictly rising order, rounded to the dtype of the losses."""
    with np.errstate(over="ignore"):
        numbers = as_numpy(name, values).astype(dtype).astype(np.float64)
    if numbers.ndim != 1 or not np.all(np.isfinite(numbers)) or np.any(np.diff(numbers) <= 0):
        raise ValueError(f"{name} must be finite numbers in rising order; got {values}")
    if numbers.size > MOST_EDGES:
        raise ValueError(f"{name} must be at most {MOST_EDGES} numbers; got {numbers.size}")
    return numbers.tolist()
