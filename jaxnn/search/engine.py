"""Folding candidates by index: the engine under random search.

A *statistic* is a monoid over candidates: `start()` is the state of no candidates, `update`
takes a tile of them in, on the device, and `merge` joins the states of two disjoint ranges of
indices, on the host. Because candidate `i` is a function of the stream and of `i` alone and
because tiles have one fixed width, the merged state of a range is the same bits however the
range is cut into chunks, devices, processes or runs.

An index stands for its weights: `candidate_params` gives any candidate back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr, tree_leaves_with_path
from jax.typing import ArrayLike

from jaxnn.run.checkpoint import Checkpoint
from jaxnn.run.checks import as_count, as_key, as_partial, check_concrete
from jaxnn.run.fingerprint import fingerprint, function_metadata, key_metadata
from jaxnn.run.loop import Limits, Progress, Work, run
from jaxnn.run.programs import COMPILER_OPTIONS, own_settings, program
from jaxnn.run.random import add, fold_index, join, words
from jaxnn.typing import SampleFn, Status, traits_of


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


class SearchProblem(NamedTuple):
    """What turns a range of indices into states; see `reduce_range`.

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


def reduce_range(
    engine: SearchProblem,
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
    engine: SearchProblem,
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


MEMORY_BUDGETS, LARGEST_TILES = {"cpu": 2**22}, {"cpu": 2**14}
"""By platform: on CPUs a tile stays in the caches of the cores. Others get the following."""
MEMORY_BUDGET, LARGEST_TILE = 2**28, 2**20


def as_range(start: int, num_candidates: int) -> tuple[int, int]:
    """The first index and one past the last, checked."""
    num_candidates = as_count("num_candidates", num_candidates, minimum=1)
    start = as_count("start", start)
    if start + num_candidates > 2**63:
        raise ValueError(
            f"start + num_candidates must be at most 2**63; got {start} + {num_candidates}"
        )
    return start, start + num_candidates


def tile_size(
    loss_fn: Callable[..., Any], params: Any, batch: Any, memory_budget: int | None, platform: str
) -> int:
    """Candidates a tile: a power of two, a function of shapes, budget and platform alone.

    A function that knows better says so in its traits. Of others, rows
    times the widest axis of the params stands for the largest intermediate value of one
    candidate, if its params are not larger yet.
    """
    if memory_budget is None:
        memory_budget = MEMORY_BUDGETS.get(platform, MEMORY_BUDGET)
    budget = as_count("memory_budget", memory_budget, minimum=1)
    rows = max((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim), default=1)
    widest = max((max(leaf.shape, default=1) for leaf in jax.tree.leaves(params)), default=1)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    told = traits_of(loss_fn).candidate_bytes
    needed = 4 * max(rows * widest, size) if told is None else told(params, batch)
    fitting = max(budget // max(needed, 1), 1)
    return min(1 << (fitting.bit_length() - 1), LARGEST_TILES.get(platform, LARGEST_TILE))


TAG = 0x52414E44
"""Folded into the key, so that no other trainer draws the same from it."""

DRAWS_TO_DIFFER = 64
"""A sampler of one fair bit draws the same from as many keys once in 2^63 searches."""


def candidates_stream(key: jax.Array) -> jax.Array:
    """The key that the candidates' own keys are folded from."""
    return jax.random.fold_in(key, TAG)


def candidate_params(
    key: jax.Array, sample_fn: SampleFn, index: int | Sequence[int] | ArrayLike
) -> Any:
    """The weights of candidate `index` of the random search with this key and sampler.

    Args:
        key: the search's key.
        sample_fn: the search's sampler.
        index: the candidate's index, below 2^63; or several, `(candidates,)`, as
            `found.collected.index`.

    Returns:
        The candidate's params; of several, with a leading axis of candidates.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the index is out of range.

    Example:
        >>> sample_fn = lambda key: jax.random.normal(key, (2,))
        >>> candidate_params(jax.random.key(0), sample_fn, 2**40).shape
        (2,)
    """
    key, sample = as_key("key", key), as_partial("sample_fn", sample_fn)
    with own_settings():
        return _draw(sample, candidates_stream(key), *_words_of(index))


def check_draws(key: jax.Array, sample: Partial, start: int) -> None:
    """Refuses a sampler that draws the same params from every key."""
    stream = candidates_stream(key)
    first = _draw(sample, stream, *words(start))
    for index in range(1, DRAWS_TO_DIFFER):
        other = _draw(sample, stream, *words((start + index) % 2**63))
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
            return
    raise ValueError(
        f"sample_fn must draw from its key; got the same params from {DRAWS_TO_DIFFER} keys: "
        "use jax.random with the key, not NumPy's random numbers"
    )


def _words_of(index: Any) -> tuple[Any, Any]:
    """The words of an index, or of each index of an array."""
    check_concrete("index", index)
    if isinstance(index, (list, tuple, jax.Array)):
        index = np.asarray(index, None if np.size(index) else np.int64)
    if not (isinstance(index, np.ndarray) and index.ndim):
        return words(as_count("index", index, maximum=2**63 - 1))
    if index.ndim > 1 or index.dtype.kind not in "iu":
        raise TypeError(
            "index must be an integer or an array of integers (candidates,); "
            f"got {index.dtype} of shape {index.shape}"
        )
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < 2**63:
        raise ValueError(f"index must be between 0 and 2**63 - 1; got {index}")
    wide = index.astype(np.uint64)
    return (wide >> np.uint64(32)).astype(np.uint32), wide.astype(np.uint32)


@program()
def _draw(sample: Partial, stream: jax.Array, high: jax.Array, low: jax.Array) -> Any:
    if high.ndim:
        return jax.vmap(lambda *index: sample(fold_index(stream, *index)))(high, low)
    return sample(fold_index(stream, high, low))


LARGEST_CHUNK = 2**30


class Span(NamedTuple):
    """A range of candidates, and the width of the tiles they are evaluated in."""

    start: int
    stop: int
    tile: int


class StopRules(NamedTuple):
    """When a search ends before its range does.

    Attributes:
        target_loss: with the first candidate at or below.
        num_collected: with the candidate that makes the collection this large.
    """

    target_loss: float | None = None
    num_collected: int | None = None


class Reached(NamedTuple):
    """How far a walk came: the statistics of all candidates below `end`, and why it ended."""

    totals: dict[str, Any]
    end: int
    status: Status


def walk(
    engine: SearchProblem,
    statistics: Mapping[str, Statistic],
    span: Span,
    rules: StopRules,
    devices: Sequence[Any],
    limits: Limits,
    checkpoint: Checkpoint | None,
) -> Reached:
    """Folds the span, from its checkpoint if there is one, to its end or to a stop rule."""
    fold = partial(_fold_or_refuse, engine, statistics, span.tile, devices)
    begin, totals = _restore(checkpoint, statistics, span)

    def advance(reached: Reached, _: int, end: int) -> tuple[Reached, Status | None]:
        after = min(begin + end * span.tile, span.stop)
        return _advance(fold, statistics, rules, reached, after)

    work = Work(
        advance,
        progress=lambda reached: Progress(reached.end - span.start, _best(reached)),
        content=as_saved,
        total=-(-(span.stop - begin) // span.tile),
        largest=LARGEST_CHUNK // span.tile,
        unit="candidates",
        shown=lambda tiles: min(tiles * span.tile, span.stop - begin),
    )
    is_over = _last_candidate(rules, totals) is not None
    reached = Reached(totals, begin, "completed")
    reached, status = run(work, reached, 0, "reached" if is_over else None, limits, checkpoint)
    return reached._replace(status=status)


def _advance(
    fold: Callable[[int, int], dict[str, Any]],
    statistics: Mapping[str, Statistic],
    rules: StopRules,
    reached: Reached,
    end: int,
) -> tuple[Reached, Status | None]:
    """Takes the candidates up to `end` in, or up to the one that a stop rule names."""
    totals = merge_all(statistics, reached.totals, fold(reached.end, end))
    last = _last_candidate(rules, totals)
    if last is None:
        return Reached(totals, end, "completed"), None
    totals = merge_all(statistics, reached.totals, fold(reached.end, last + 1))
    return Reached(totals, last + 1, "reached"), "reached"


def _last_candidate(rules: StopRules, totals: Mapping[str, Any]) -> int | None:
    """The candidate with which a search ends, if it is among those taken in."""
    lasts, trail = [], totals["improvements"]
    if rules.target_loss is not None and np.any(below := trail.loss <= rules.target_loss):
        lasts.append(int(join(trail.high[below][0], trail.low[below][0])))
    if rules.num_collected is not None:
        collected = totals["collected"]
        if len(collected.loss) == rules.num_collected:
            lasts.append(int(join(collected.high[-1], collected.low[-1])))
    return min(lasts, default=None)


def _best(reached: Reached) -> float:
    return float(np.min(reached.totals["best"].loss, initial=np.inf))


def _fold_or_refuse(
    engine: SearchProblem,
    statistics: Mapping[str, Statistic],
    tile: int,
    devices: Sequence[Any],
    begin: int,
    end: int,
) -> dict[str, Any]:
    """Folds a range. Memory depends on the tile alone: a shorter range would need no less."""
    try:
        return reduce_range(engine, statistics, begin, end, tile=tile, devices=devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"a tile of {tile} candidates does not fit: give a lower memory_budget"
        ) from error


def _restore(
    checkpoint: Checkpoint | None, statistics: Mapping[str, Statistic], span: Span
) -> tuple[int, dict[str, Any]]:
    """Where to go on, at the start or where the checkpoint ends, and what was learnt until then."""
    fresh = merge_all(statistics, _starts(statistics))
    asked = "num_candidates", span.stop - span.start
    saved = checkpoint and checkpoint.begin(dict(_named(fresh)), asked, origin=span.start)
    if not (checkpoint and saved):
        return span.start, fresh
    return saved.metadata["next"], restored(saved.arrays, statistics)


def as_saved(reached: Reached) -> tuple[dict[str, np.ndarray], dict[str, Any], None]:
    """A search as arrays and facts; `restored` takes the arrays."""
    return dict(_named(reached.totals)), {"next": reached.end}, None


def restored(
    arrays: Mapping[str, np.ndarray], statistics: Mapping[str, Statistic]
) -> dict[str, Any]:
    """The totals of a saved search."""
    starts = _starts(statistics)
    leaves = [arrays[name] for name, _ in _named(starts)]
    return jax.tree.unflatten(jax.tree.structure(starts), leaves)


def facts_of(
    trainer: str, key: jax.Array, engine: SearchProblem, span: Span, function: str
) -> dict[str, Any]:
    """What whoever goes on with a walk has to share; `function` is the value function's name."""
    params = jax.eval_shape(engine.sample, key)
    return {
        "trainer": trainer,
        **key_metadata(key),
        "start": span.start,
        "tile width, which memory_budget sets": span.tile,
        "sample_fn": function_metadata("sample_fn", engine.sample, key, axes=(0,)),
        "batch": fingerprint(engine.batch),
        function: function_metadata(function, engine.value, params, engine.batch, axes=(0, None)),
    }


def _starts(statistics: Mapping[str, Statistic]) -> dict[str, Any]:
    return {name: statistic.start for name, statistic in statistics.items()}


def _named(totals: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    """The arrays of the totals, named as `best.loss`."""
    return [
        (keystr(path, simple=True, separator="."), np.asarray(leaf))
        for path, leaf in tree_leaves_with_path(totals)
    ]
