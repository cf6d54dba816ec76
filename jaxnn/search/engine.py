"""Folding candidates by index: the engine under random search.

A *statistic* is a monoid over candidates: `start()` is the state of no candidates, `update`
takes a tile of them in, on the device, and `merge` joins the states of two disjoint ranges of
indices, on the host. Because candidate `i` is a function of the stream and of `i` alone and
because tiles have one fixed width, the merged state of a range is the same bits however the
range is cut into chunks, devices, processes or runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.run.programs import COMPILER_OPTIONS, program
from jaxnn.run.random import add, fold_index, words

__all__ = ["Engine", "Statistic", "Tile", "fold_range", "merge_all", "shares"]


class Tile(NamedTuple):
    """Candidates side by side.

    Attributes:
        high: high words of their indices, `(width,)`, uint32.
        low: low words, `(width,)`, uint32.
        inside: which of them belong to the range; the last tile of a range is padded.
        value: what the value function returned for each, leaves `(width, ...)`.
    """

    high: jax.Array
    low: jax.Array
    inside: jax.Array
    value: Any


class Statistic(NamedTuple):
    """Something to learn about a range of candidates.

    Attributes:
        start: the state of no candidates, a pytree of NumPy arrays.
        update: `update(state, tile)` -> state, a `Partial` of JAX code.
        merge: `merge(first, second)` -> the state of both ranges, on the host; `first` has the
            lower indices where the order matters.
    """

    start: Any
    update: Partial
    merge: Callable[[Any, Any], Any]


class Engine(NamedTuple):
    """What turns a range of indices into states; see `fold_range`.

    Attributes:
        value: `value(params, batch)` -> what the statistics look at.
        sample: `sample(key)` -> params.
        batch: the data.
        stream: the key that the candidates' keys are folded from.
    """

    value: Partial
    sample: Partial
    batch: Any
    stream: jax.Array


def fold_range(
    engine: Engine,
    statistics: Mapping[str, Statistic],
    begin: int,
    end: int,
    *,
    tile: int,
    devices: Sequence[Any],
) -> dict[str, Any]:
    """The states of candidates `begin` to `end`; each device folds its share of the tiles.

    Args:
        engine: what to evaluate.
        statistics: what to learn, by name.
        begin: first index; at most 2^30 below `end`.
        end: one past the last index.
        tile: candidates a tile.
        devices: where to work, all at once.

    Returns:
        A state for each statistic, as NumPy arrays.
    """
    states = {name: statistic.start for name, statistic in statistics.items()}
    updates = {name: statistic.update for name, statistic in statistics.items()}
    pieces = shares(begin, end, tile, len(devices))
    running = []
    for (first, last), device in zip(pieces, devices, strict=False):
        inputs = jax.device_put((engine, updates, states), device)
        running.append(_fold(*inputs, words(first), np.uint32(last - first), tile=tile))
    return merge_all(statistics, *(jax.tree.map(np.asarray, folded) for folded in running))


def merge_all(statistics: Mapping[str, Statistic], *parts: Mapping[str, Any]) -> dict[str, Any]:
    """Joins the states of disjoint ranges, given in the order of their indices."""
    return {
        name: reduce(statistic.merge, (part[name] for part in parts), statistic.start)
        for name, statistic in statistics.items()
    }


def shares(begin: int, end: int, tile: int, workers: int) -> Iterator[tuple[int, int]]:
    """Cuts a range into at most `workers` pieces of whole tiles, in order."""
    num_tiles = -(-(end - begin) // tile)
    width = -(-num_tiles // workers) * tile
    for first in range(begin, end, width):
        yield first, min(first + width, end)


@program(static_argnames="tile", compiler_options=COMPILER_OPTIONS)
def _fold(
    engine: Engine,
    updates: Mapping[str, Partial],
    states: Mapping[str, Any],
    begin: tuple[jax.Array, jax.Array],
    size: jax.Array,
    *,
    tile: int,
) -> dict[str, Any]:
    """Takes `size` candidates from index `begin` on into the states, tile after tile."""
    lanes = jnp.arange(tile, dtype=jnp.uint32)

    def evaluate(high: jax.Array, low: jax.Array) -> Any:
        return engine.value(engine.sample(fold_index(engine.stream, high, low)), engine.batch)

    def fold_tile(number: jax.Array, states: Mapping[str, Any]) -> dict[str, Any]:
        offset = number * jnp.uint32(tile) + lanes
        high, low = add(*begin, offset)
        folded = Tile(high, low, offset < size, jax.vmap(evaluate)(high, low))
        return {name: update(states[name], folded) for name, update in updates.items()}

    num_tiles = (size + jnp.uint32(tile - 1)) // jnp.uint32(tile)
    return jax.lax.fori_loop(jnp.uint32(0), num_tiles, fold_tile, dict(states))
