"""Random search: draw whole weight sets, keep the best.

Candidate `i` is `sample_fn(key_i)` with a key that depends on the search's key and on `i` alone,
so an index stands for its weights: the search stores indices, and `reconstruct` gives any
candidate back. Losses are always evaluated in tiles of one width, which makes them the same bits
however the search is cut into chunks.

Reference: Brooks, "A discussion of random methods for seeking maxima", Operations Research 1958.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.checks import as_count, as_key
from jaxnn.training.callables import (
    LossFn,
    SampleFn,
    as_batch,
    as_partial,
    check_scalar,
    shapes_of,
)
from jaxnn.training.pacing import Status, chunks
from jaxnn.training.streams import add, fold_index, join, words

__all__ = ["Improvements", "RandomSearchResult", "random_search", "reconstruct"]

TAG = 0x52414E44
"""Folded into the key, so that no other trainer draws the same from it."""

LARGEST_TILE = 16_384
TILE_BYTES = 2**26
MAX_RECORDS = 256
"""Improvements kept of one chunk. Among n independent draws there are about ln n, at most 44."""


class Improvements(NamedTuple):
    """The trail of improvements, in the order they were met; ready to plot.

    Attributes:
        evaluations: evaluations made up to and with each improvement, int64.
        index: index of the candidate, int64.
        loss: its loss, float32.
    """

    evaluations: np.ndarray
    index: np.ndarray
    loss: np.ndarray


class RandomSearchResult(NamedTuple):
    """What a random search found.

    Attributes:
        params: the best candidate; None if no loss was finite.
        loss: its loss; inf if none was finite.
        index: its index; None if none was finite. Ties go to the lowest index.
        num_evaluations: candidates evaluated.
        num_nonfinite: how many of them had a loss of NaN or +-inf; those never win.
        status: "completed", "interrupted" or "nonfinite".
        history: the trail of improvements.
    """

    params: Any
    loss: float
    index: int | None
    num_evaluations: int
    num_nonfinite: int
    status: Status
    history: Improvements


def random_search(
    key: jax.Array,
    loss_fn: LossFn,
    sample_fn: SampleFn,
    batch: Any,
    *,
    num_candidates: int,
    start: int = 0,
    progress: bool = False,
) -> RandomSearchResult:
    """Draws `num_candidates` weight sets and returns the one with the lowest loss.

    Memory does not grow with the count, and the result depends on the arguments alone: not on
    how the work was cut, nor on the speed of the machine.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar.
        sample_fn: `sample_fn(key)` -> params, any pytree; as `model.sampler(scale=...)`.
        batch: any pytree that the loss takes.
        num_candidates: how many to draw, at least 1.
        start: index of the first; two searches that adjoin equal one.
        progress: whether to show a progress bar.

    Returns:
        A `RandomSearchResult`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the loss not a float scalar.
        ValueError: if a count is out of range, or `start + num_candidates` exceeds 2^63.

    Example:
        >>> def loss_fn(params, batch):
        ...     return jnp.sum((params - batch) ** 2)
        >>> def sample_fn(key):
        ...     return jax.random.normal(key, (2,))
        >>> found = random_search(
        ...     jax.random.key(0), loss_fn, sample_fn, jnp.ones(2), num_candidates=10_000
        ... )
        >>> found.loss < 0.01
        True
    """
    key = as_key("key", key)
    num_candidates = as_count("num_candidates", num_candidates, minimum=1)
    start = as_count("start", start)
    if start + num_candidates > 2**63:
        raise ValueError(
            f"start + num_candidates must be at most 2**63; got {start} + {num_candidates}"
        )
    loss, sample = as_partial("loss_fn", loss_fn), as_partial("sample_fn", sample_fn)
    shapes = shapes_of("sample_fn", sample, key)
    if not jax.tree.leaves(shapes):
        raise TypeError(f"sample_fn must return params, a tree of arrays; got {shapes}")
    batch = as_batch(batch, shapes, loss_fn)
    loss_shape = shapes_of("loss_fn", loss, shapes, batch)
    check_scalar("loss_fn", loss_shape)
    tile = _tile_size(shapes, batch)

    search = partial(_search, loss, sample, batch)
    with jax.threefry_partitionable(True):
        stream = jax.random.fold_in(key, TAG)
        done, num_nonfinite, trail = _walk(
            partial(search, stream, tile=tile),
            start=start,
            num_candidates=num_candidates,
            tile=tile,
            best=np.asarray(np.inf, loss_shape.dtype),
            progress=progress,
        )
    history = Improvements(trail.index - start + 1, trail.index, trail.loss)
    if not trail.index.size:
        return RandomSearchResult(None, np.inf, None, done, num_nonfinite, "nonfinite", history)
    return RandomSearchResult(
        params=reconstruct(key, sample_fn, int(trail.index[-1])),
        loss=float(trail.loss[-1]),
        index=int(trail.index[-1]),
        num_evaluations=done,
        num_nonfinite=num_nonfinite,
        status="completed" if done == num_candidates else "interrupted",
        history=history,
    )


def reconstruct(key: jax.Array, sample_fn: SampleFn, index: int) -> Any:
    """The weights of candidate `index` of the random search with this key and sampler.

    Args:
        key: the search's key.
        sample_fn: the search's sampler.
        index: the candidate's index, below 2^63.

    Returns:
        The candidate's params.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the index is out of range.

    Example:
        >>> sample_fn = lambda key: jax.random.normal(key, (2,))
        >>> reconstruct(jax.random.key(0), sample_fn, 2**40).shape
        (2,)
    """
    key = as_key("key", key)
    index = as_count("index", index, maximum=2**63 - 1)
    with jax.threefry_partitionable(True):
        stream = jax.random.fold_in(key, TAG)
        return _draw(as_partial("sample_fn", sample_fn), stream, *words(index))


def _tile_size(params: Any, batch: Any) -> int:
    """Candidates a tile: a power of two, a function of shapes alone.

    Rows times the widest axis of the params stands for the largest intermediate of one
    candidate, and a tile of those is kept within `TILE_BYTES`.
    """
    rows = max((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim), default=1)
    widest = max((max(leaf.shape, default=1) for leaf in jax.tree.leaves(params)), default=1)
    fitting = max(TILE_BYTES // (4 * rows * widest), 1)
    return min(1 << (fitting.bit_length() - 1), LARGEST_TILE)


class _Trail(NamedTuple):
    """Improvements on the host: index int64, loss float."""

    index: np.ndarray
    loss: np.ndarray


class _Records(NamedTuple):
    """Improvements of one chunk, on the device: words and losses in order, `count` of them."""

    high: jax.Array
    low: jax.Array
    loss: jax.Array
    count: jax.Array
    best: jax.Array


def _walk(
    search: Callable[..., tuple[_Records, jax.Array]],
    *,
    start: int,
    num_candidates: int,
    tile: int,
    best: np.ndarray,
    progress: bool,
) -> tuple[int, int, _Trail]:
    """Searches chunk after chunk; returns candidates done, how many not finite, and the trail."""
    done, num_nonfinite = 0, 0
    trail = [_Trail(np.zeros(0, np.int64), np.zeros(0, best.dtype))]
    num_tiles = -(-num_candidates // tile)
    largest = 2**30 // tile
    for chunk in chunks(num_tiles, largest=largest, unit="candidates", scale=tile, show=progress):
        begin, done = chunk.begin * tile, min(chunk.end * tile, num_candidates)
        records, count = search(words(start + begin), done - begin, best)
        found = int(records.count)
        index = join(np.asarray(records.high)[:found], np.asarray(records.low)[:found])
        trail.append(_Trail(index.astype(np.int64), np.asarray(records.loss)[:found]))
        best = np.asarray(records.best)
        num_nonfinite += int(count)
        chunk.report(float(best))
    return done, num_nonfinite, _Trail(*map(np.concatenate, zip(*trail, strict=True)))


@jax.jit
def _draw(sample: Partial, stream: jax.Array, high: jax.Array, low: jax.Array) -> Any:
    return sample(fold_index(stream, high, low))


@partial(jax.jit, static_argnames="tile")
def _search(
    loss: Partial,
    sample: Partial,
    batch: Any,
    stream: jax.Array,
    begin: tuple[jax.Array, jax.Array],
    size: jax.Array,
    best: jax.Array,
    *,
    tile: int,
) -> tuple[_Records, jax.Array]:
    """One chunk: `size` candidates from index `begin` on, tile after tile."""
    lanes = jnp.arange(tile, dtype=jnp.uint32)
    size = jnp.asarray(size, jnp.uint32)

    def evaluate(high: jax.Array, low: jax.Array) -> jax.Array:
        return loss(sample(fold_index(stream, high, low)), batch)

    def search_tile(number: jax.Array, state: tuple[_Records, jax.Array]):
        records, num_nonfinite = state
        offset = number.astype(jnp.uint32) * jnp.uint32(tile) + lanes
        high, low = add(*begin, offset)
        losses = jax.vmap(evaluate)(high, low)
        inside, finite = offset < size, jnp.isfinite(losses)
        num_nonfinite += jnp.sum(inside & ~finite, dtype=jnp.uint32)
        losses = jnp.where(inside & finite, losses, jnp.inf)
        improved = jnp.min(losses) < records.best
        records = jax.lax.cond(improved, _add_records, _keep, records, high, low, losses)
        return records, num_nonfinite

    num_tiles = (size + jnp.uint32(tile - 1)) // jnp.uint32(tile)
    empty = jnp.zeros(MAX_RECORDS, jnp.uint32)
    records = _Records(empty, empty, jnp.zeros(MAX_RECORDS, best.dtype), jnp.int32(0), best)
    return jax.lax.fori_loop(jnp.uint32(0), num_tiles, search_tile, (records, jnp.uint32(0)))


def _keep(records: _Records, high: jax.Array, low: jax.Array, losses: jax.Array) -> _Records:
    del high, low, losses
    return records


def _add_records(records: _Records, high: jax.Array, low: jax.Array, losses: jax.Array) -> _Records:
    """Appends every candidate of a tile that beats all candidates before it."""
    before = jnp.minimum(jax.lax.cummin(losses), records.best)
    before = jnp.concatenate([records.best[None], before[:-1]])
    is_record = losses < before
    slot = records.count + jnp.cumsum(is_record, dtype=jnp.int32) - 1
    slot = jnp.where(is_record, slot, MAX_RECORDS)
    return _Records(
        high=records.high.at[slot].set(high, mode="drop"),
        low=records.low.at[slot].set(low, mode="drop"),
        loss=records.loss.at[slot].set(losses, mode="drop"),
        count=records.count + jnp.sum(is_record, dtype=jnp.int32),
        best=jnp.min(losses),
    )
