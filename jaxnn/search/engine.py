"""Candidates by index, reduced over a range of indices on every device.

Candidate `i` is `sample_fn(key_i)`, whose key depends on the search's key and on `i` alone. So a
search stores indices, and `candidate_params` returns the params. Values are always computed in
tiles of one width, so they are the same bits however a range is cut into chunks, devices,
processes or runs.

`evaluate` returns the losses of a range, and `reduce` what any `Statistic` learns about it.
`run_search` is the loop of random search: chunks, stop rules and checkpoints.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from jaxnn.run import checks
from jaxnn.run.checkpoint import Checkpoint, arrays_to_tree, tree_to_arrays
from jaxnn.run.fingerprint import run_metadata
from jaxnn.run.loop import Limits, Progress, Work, run
from jaxnn.run.programs import COMPILER_OPTIONS, num_threads, own_settings, program, run_at_once
from jaxnn.run.random import (
    draw_candidate,
    draw_candidates,
    join_index,
    shift_index,
    split_index,
)
from jaxnn.search import rejection as rejecting
from jaxnn.search.rejection import Rejection
from jaxnn.search.statistics import Rows, Statistic, Tile, append_rows, concatenate_rows
from jaxnn.typing import Device, Function, LossFn, PyTree, SampleFn, Status, traits_of

TAG = 0x52414E44
"""Folded into the key, so that no other trainer draws the same from it."""
DRAWS_TO_DIFFER = 64
"""A sampler of one fair bit draws the same from as many keys once in 2^63 searches."""
ON_CPUS, ELSEWHERE = (2**22, 2**14), (2**28, 2**20)
"""Bytes for a tile, and its largest size; on CPUs it stays in the caches of the cores.

Of 2-3-3 an H200 makes 709 million candidates a second in tiles of 2^20, 640 of 2^19, 446 of 2^18.
"""
LARGEST_CHUNK = 2**30
"""Candidates in one call of the compiled loop, whose counts are of 32 bits."""
TILES_PER_CHUNK, SHARDS_PER_CHUNK = 64, 8
"""For each device, in `reduce`: fixed numbers, so that sums of floats are the same on any cores."""

Statistics = Mapping[str, Statistic]
Totals = dict[str, PyTree]  # the state of each statistic, by its name


class SearchProblem(NamedTuple):
    """What a candidate is, and what is computed of it: an argument of the compiled loop."""

    value: Partial  # value(params, batch) -> what the statistics look at
    sample: Partial  # sample(key) -> params
    batch: PyTree
    stream: jax.Array  # the key that the candidates' keys are folded from


class Search(NamedTuple):
    """A range of candidates, what is computed of them, and where."""

    problem: SearchProblem
    params: PyTree  # shapes and dtypes of a candidate
    value: PyTree  # and of what is computed of it
    start: int
    stop: int
    tile: int  # candidates that are evaluated side by side
    devices: Sequence[Device]


class StopRule(NamedTuple):
    """A search ends with the candidate that is number `num_hits` in a table up to a threshold."""

    table: str
    threshold: float
    num_hits: int


class RunState(NamedTuple):
    """How far a run has come."""

    totals: Totals  # of all candidates below `end`
    end: int
    status: Status = "completed"
    stop_threshold: float | None = None  # that of the rule which candidate `end - 1` has met


def candidate_params(
    key: jax.Array, sample_fn: SampleFn, candidate: int | Sequence[int] | ArrayLike
) -> PyTree:
    """Return the params of a candidate of the random search with this key and sampler.

    Args:
        key: the search's key.
        sample_fn: the search's sampler.
        candidate: the candidate's index, below 2^63; or several, `(candidates,)`, such as
            `result.collected.candidate`.

    Returns:
        The candidate's params; of several, with a leading axis of candidates.

    Raises:
        TypeError: if an index is not an integer.
        ValueError: if an index is out of range.

    Example:
        >>> sample_fn = lambda key: jax.random.normal(key, (2,))
        >>> candidate_params(jax.random.key(0), sample_fn, 2**40).shape
        (2,)
    """
    key, sample = checks.as_key("key", key), checks.as_partial("sample_fn", sample_fn)
    with own_settings():
        return _draw(sample, jax.random.fold_in(key, TAG), *_words_of(candidate))


def evaluate(
    key: jax.Array,
    loss_fn: LossFn,
    sample_fn: SampleFn,
    batch: PyTree,
    *,
    start: int = 0,
    count: int,
    memory_budget: int | None = None,
) -> np.ndarray:
    """Return the losses of candidates `start` to `start + count - 1` of a random search.

    They are the bits that `random_search` sees with the same arguments: its best candidate is
    the first of the lowest finite one here.

    Args:
        key: as in `random_search`, and so are all arguments but `count`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar.
        sample_fn: `sample_fn(key)` -> params.
        batch: what the loss takes.
        start: index of the first candidate.
        count: how many, from 1 to 2^30.
        memory_budget: bytes for a tile of candidates.

    Returns:
        The losses, `(count,)`, in the dtype of `loss_fn`; NaN and inf are among them.

    Raises:
        TypeError: if the loss is not a float scalar.
        ValueError: if a number is out of range.

    Example:
        >>> loss_fn = lambda params, batch: jnp.sum((params - batch) ** 2)
        >>> sample_fn = lambda key: jax.random.normal(key, (2,))
        >>> given = jax.random.key(0), loss_fn, sample_fn, jnp.ones(2)
        >>> losses = evaluate(*given, count=1_000)
        >>> bool(losses[7] == evaluate(*given, start=7, count=1)[0])
        True
    """
    count = checks.as_count("count", count, 1, LARGEST_CHUNK)
    given = key, "loss_fn", loss_fn, sample_fn, batch
    search = as_search(*given, None, start, count, memory_budget, count_name="count")
    checks.check_scalar("loss_fn", search.value)
    # A power of two of tiles for each shard, so that few programs serve all counts.
    tiles = -(-count // (search.tile * _num_shards(search.devices)))
    room = search.tile << (tiles - 1).bit_length()
    rows = Rows(np.zeros(room, search.value.dtype), np.uint32(0))
    statistics = {"losses": Statistic(rows, Partial(append_rows), concatenate_rows)}
    with own_settings():
        totals = reduce_range(search, statistics, start_totals(statistics))
    return totals["losses"].values


def reduce(
    key: jax.Array,
    value_fn: Callable[[PyTree, PyTree], PyTree],
    sample_fn: SampleFn,
    batch: PyTree,
    statistics: Mapping[str, Statistic],
    *,
    num_candidates: int,
    start: int = 0,
    devices: Sequence[Device] | None = None,
    memory_budget: int | None = None,
) -> dict[str, PyTree]:
    """Return what statistics of your own learn about the candidates of a random search.

    Memory does not grow with the count. The same call returns the same bits. A state that adds
    up rounded floats may differ in its last bits on another number of devices.

    Args:
        key: as in `random_search`, and so are the arguments not described here.
        value_fn: `value_fn(params, batch)` -> what the statistics look at, any pytree.
        sample_fn: `sample_fn(key)` -> params.
        batch: what `value_fn` takes.
        statistics: a `Statistic` for each name.
        num_candidates: how many candidates, at least 1.
        start: index of the first.
        devices: where to work.
        memory_budget: bytes for a tile of candidates.

    Returns:
        The state of each statistic after all candidates, by its name.

    Raises:
        TypeError: if an `update` returns a state of another form than `start`.
        ValueError: if a number is out of range, or the sampler draws the same from 64 keys.

    Example:
        The mean of the losses, added up in float64 on the host:

        >>> def add(state, tile):
        ...     losses = jnp.where(tile.inside, tile.value, 0.0)
        ...     return state[0] + jnp.sum(tile.inside, dtype=jnp.uint32), state[1] + losses.sum()
        >>> def merge(first, second):
        ...     return np.int64(first[0]) + second[0], np.float64(first[1]) + second[1]
        >>> mean = Statistic((np.uint32(0), np.float32(0)), add, merge)
        >>> loss_fn = lambda params, batch: jnp.sum((params - batch) ** 2)
        >>> sample_fn = lambda key: jax.random.normal(key, (2,))
        >>> given = jax.random.key(0), loss_fn, sample_fn, jnp.ones(2)
        >>> count, total = reduce(*given, {"mean": mean}, num_candidates=10_000)["mean"]
        >>> int(count), f"{total / count:.0f}"
        (10000, '4')
    """
    given = key, "value_fn", value_fn, sample_fn, batch
    search = as_search(*given, devices, start, num_candidates, memory_budget)
    statistics = _as_statistics(statistics, search.value, search.tile)
    totals, num_devices = start_totals(statistics), len(search.devices)
    width = min(TILES_PER_CHUNK * search.tile * num_devices, LARGEST_CHUNK)
    with own_settings():
        check_draws(search.problem.sample, search.problem.stream, search.start)
        for first in range(search.start, search.stop, width):
            chunk = search._replace(start=first, stop=min(first + width, search.stop))
            num_shards = SHARDS_PER_CHUNK * num_devices
            totals = reduce_range(chunk, statistics, totals, None, num_shards)
    return totals


def _as_statistics(statistics: Statistics, value: PyTree, width: int) -> Statistics:
    """A user's own statistics, checked on a tile of values of these shapes."""
    if not isinstance(statistics, Mapping):
        raise TypeError(f"statistics must map names to Statistics; got {statistics!r}")
    lane = Tile(jnp.uint32(0), jnp.uint32(0), jnp.bool(0), value)
    tile = jax.tree.map(lambda x: jax.ShapeDtypeStruct((width, *x.shape), x.dtype), lane)
    checked = {}
    for key, each in statistics.items():
        name = f"statistics[{key!r}]"
        if not isinstance(each, Statistic):
            raise TypeError(f"{name} must be a Statistic; got a {type(each).__name__}")
        checks.as_partial(f"{name}.merge", each.merge)
        update = checks.as_partial(f"{name}.update", each.update)
        start = jax.tree.map(np.asarray, checks.as_arrays(f"{name}.start", each.start))
        state = checks.shapes_of(f"{name}.update", update, start, tile)
        checks.check_like(f"{name}.update", "a state", state, start, like="start")
        checked[key] = Statistic(start, update, each.merge)
    return checked


def as_search(
    key: jax.Array,
    name: str,
    value_fn: Function,
    sample_fn: SampleFn,
    batch: PyTree,
    devices: Sequence[Device] | None = None,
    start: int = 0,
    count: int = 1,
    memory_budget: int | None = None,
    *,
    count_name: str = "num_candidates",
) -> Search:
    """Return a search, checked; `name` is that of the argument `value_fn`."""
    devices = checks.as_devices(devices)
    start, count = checks.as_count("start", start), checks.as_count(count_name, count, minimum=1)
    if start + count > 2**63:
        raise ValueError(
            f"start and {count_name} must add up to at most 2**63; got {start} and {count}"
        )
    key = checks.as_key("key", key)
    value, sample = checks.as_partial(name, value_fn), checks.as_partial("sample_fn", sample_fn)
    params = checks.drawn_shapes(sample, key)
    batch = checks.as_batch(batch, params, value_fn)
    problem = SearchProblem(value, sample, batch, jax.random.fold_in(key, TAG))
    shapes = checks.shapes_of(name, value, params, batch)
    tile = tile_size(value_fn, params, batch, memory_budget, devices[0].platform)
    return Search(problem, params, shapes, start, start + count, tile, devices)


def tile_size(
    value_fn: Function, params: PyTree, batch: PyTree, memory_budget: int | None, platform: str
) -> int:
    """Candidates a tile: a power of two, a function of shapes, budget and platform alone."""
    budget, largest = ON_CPUS if platform == "cpu" else ELSEWHERE
    if memory_budget is not None:
        budget = checks.as_count("memory_budget", memory_budget, minimum=1)
    if (candidate_bytes := traits_of(value_fn).candidate_bytes) is not None:
        needed = candidate_bytes(params, batch)
    else:  # Rows times the widest axis of the params stands for the largest intermediate value.
        shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
        rows = max((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim), default=1)
        widest = max((max(shape, default=1) for shape in shapes), default=1)
        needed = 4 * max(rows * widest, sum(map(math.prod, shapes)))
    fitting = max(budget // max(needed, 1), 1)
    return min(1 << (fitting.bit_length() - 1), largest)


def problem_metadata(
    trainer: str, key: jax.Array, name: str, problem: SearchProblem
) -> dict[str, Any]:
    """Return what all searches of a problem share; `name` is the value function's."""
    given = jax.eval_shape(problem.sample, key), problem.batch
    value, sample = (problem.value, given, (0, None)), (problem.sample, (key,), (0,))
    functions = {"sample_fn": sample, name: value}
    return run_metadata(trainer, key, {"batch": problem.batch}, functions)


def search_metadata(trainer: str, key: jax.Array, name: str, search: Search) -> dict[str, Any]:
    """Return what a run shares with those that go on with it."""
    own = {"start": search.start, "tile width, which memory_budget sets": search.tile}
    return problem_metadata(trainer, key, name, search.problem) | own


def run_search(
    search: Search,
    statistics: Statistics,
    limits: Limits,
    checkpoint: Checkpoint | None,
    progress: Callable[[RunState], Progress],
    *,
    rules: Sequence[StopRule] = (),
    rejection: Rejection | None = None,
    largest_chunk: int | None = None,
) -> RunState:
    """Reduce the range, from its checkpoint if there is one, to its end or to a stop rule."""
    check_draws(search.problem.sample, search.problem.stream, search.start)
    totals = start_totals(statistics)
    start, stop, tile = search.start, search.stop, search.tile
    state, asked = RunState(totals, start), ("num_candidates", stop - start)
    saved = checkpoint and checkpoint.begin(tree_to_arrays(totals), asked, origin=start)
    if saved:
        end, threshold = saved.metadata["next"], saved.metadata["stop_threshold"]
        state = RunState(arrays_to_tree(totals, saved.arrays), end, stop_threshold=threshold)
    begin = state.end

    def take(state: RunState, end: int, threshold: float | None = None) -> RunState:
        chunk = search._replace(start=state.end, stop=end)
        totals = reduce_range(chunk, statistics, state.totals, rejection)
        return RunState(totals, end, stop_threshold=threshold)

    def advance(state: RunState, _: int, tiles: int) -> tuple[RunState, Status | None]:
        further = take(state, min(begin + tiles * tile, stop))
        if (hit := _stopping_hit(rules, further.totals)) is None:
            return further, None
        # The chunk went past the hit, so the totals up to it are made anew.
        return take(state, hit[0] + 1, hit[1]), "reached"

    work = Work(
        advance,
        progress=progress,
        content=run_content,
        total=-(-(stop - begin) // tile),
        largest=(largest_chunk or LARGEST_CHUNK) // tile,
        unit="candidates",
        shown=lambda tiles: min(tiles * tile, stop - begin),
    )
    status = "reached" if _stopping_hit(rules, state.totals) else None
    state, status = run(work, state, 0, status, limits, checkpoint)
    return state._replace(status=status)


def run_content(state: RunState) -> tuple[dict[str, np.ndarray], dict[str, Any], None]:
    """Return arrays and metadata of a run, as a checkpoint saves them."""
    metadata = {"next": state.end, "stop_threshold": state.stop_threshold}
    return tree_to_arrays(state.totals), metadata, None


def _stopping_hit(rules: Sequence[StopRule], totals: Totals) -> tuple[int, float] | None:
    """The candidate with which a search ends, if it was met, and the threshold of its rule."""
    hits = []
    for table, threshold, num_hits in rules:
        places = np.flatnonzero(totals[table].loss <= threshold)
        if len(places) >= num_hits:
            high, low, _ = (column[places[num_hits - 1]] for column in totals[table])
            hits.append((int(join_index(high, low)), threshold))
    return min(hits, default=None)


def start_totals(statistics: Statistics) -> Totals:
    """Return the states of no candidates, in the dtypes that they have on the host."""
    return {name: each.merge(each.start, each.start) for name, each in statistics.items()}


def merge_states(statistics: Statistics, first: Totals, *others: Totals) -> Totals:
    """Join the states of disjoint ranges, given in the order of their indices."""
    return {
        name: functools.reduce(each.merge, (part[name] for part in others), first[name])
        for name, each in statistics.items()
    }


def reduce_range(
    search: Search,
    statistics: Statistics,
    totals: Totals,
    rejection: Rejection | None = None,
    num_shards: int | None = None,
) -> Totals:
    """Take at most 2^30 candidates into the totals; each thread reduces a shard of the tiles."""
    problem, devices = search.problem, search.devices
    states = {name: each.start for name, each in statistics.items()}
    updates = {name: each.update for name, each in statistics.items()}
    if rejection is not None:
        kth_best = totals["best"].loss[-1]
        given = problem.sample, problem.stream, search.start, search.tile, kth_best
        rejection = rejecting.plan(rejection, *given)
    try:
        shared = [jax.device_put((problem, rejection, updates, states), each) for each in devices]
        calls = [
            (*shared[number % len(devices)], split_index(first), np.uint32(last - first))
            for number, (first, last) in enumerate(
                shards(search, num_shards or _num_shards(devices))
            )
        ]
        parts = run_at_once(_reduce_shard, calls, devices, tile=search.tile)
        parts = [jax.tree.map(np.asarray, part) for part in parts]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        # Memory depends on the tile alone: a shorter range would need no less.
        raise MemoryError(
            f"a tile of {search.tile} candidates does not fit: give a lower memory_budget"
        ) from error
    return merge_states(statistics, totals, *parts)


def _num_shards(devices: Sequence[Device]) -> int:
    return max(len(devices), num_threads(devices))


def shards(search: Search, workers: int) -> Iterator[tuple[int, int]]:
    """Cut a range into at most `workers` ranges of whole tiles, in order."""
    start, stop, tile = search.start, search.stop, search.tile
    width = -(-(stop - start) // (tile * workers)) * tile
    for first in range(start, stop, max(width, 1)):
        yield first, min(first + width, stop)


@program(static_argnames="tile", compiler_options=COMPILER_OPTIONS)
def _reduce_shard(
    problem: SearchProblem,
    rejection: Rejection | None,
    updates: Mapping[str, Partial],
    states: Totals,
    begin: tuple[jax.Array, jax.Array],
    size: jax.Array,
    *,
    tile: int,
) -> Totals:
    """Take `size` candidates from index `begin` on into the states, tile after tile."""
    lanes = jnp.arange(tile, dtype=jnp.uint32)

    def score(states: Totals, offset: jax.Array, inside: jax.Array) -> Totals:
        # The key, and so the candidate, is a function of the index alone.
        high, low = shift_index(*begin, offset)
        params = draw_candidates(problem.sample, problem.stream, high, low)
        values = Tile(high, low, inside, jax.vmap(problem.value, (0, None))(params, problem.batch))
        return {name: update(states[name], values) for name, update in updates.items()}

    if rejection is not None:

        def is_dropped(states: Totals, offset: jax.Array) -> jax.Array:
            params = draw_candidates(problem.sample, problem.stream, *shift_index(*begin, offset))
            return rejecting.is_dropped(rejection, params, states["best"].loss[-1])

        return rejecting.reduce_survivors(is_dropped, score, dict(states), size, tile)

    def take_tile(number: jax.Array, states: Totals) -> Totals:
        # Lanes past the end are evaluated as well, since all tiles have one width.
        offset = number * jnp.uint32(tile) + lanes
        return score(states, offset, offset < size)

    num_tiles = (size + jnp.uint32(tile - 1)) // jnp.uint32(tile)
    return jax.lax.fori_loop(jnp.uint32(0), num_tiles, take_tile, dict(states))


@program()
def _draw(sample: Partial, stream: jax.Array, high: jax.Array, low: jax.Array) -> PyTree:
    return (draw_candidates if high.ndim else draw_candidate)(sample, stream, high, low)


def check_draws(sample: Partial, stream: jax.Array, start: int) -> None:
    """Refuse a sampler that draws the same params from every key."""
    indices = ((start + i) % 2**63 for i in range(DRAWS_TO_DIFFER))
    draws = (jax.tree.leaves(_draw(sample, stream, *split_index(index))) for index in indices)
    first, equal = next(draws), functools.partial(np.array_equal, equal_nan=True)
    if all(all(map(equal, first, other)) for other in draws):
        raise ValueError(
            f"sample_fn must draw from its key; got the same params from {DRAWS_TO_DIFFER} keys: "
            "use jax.random with the key, not NumPy's random numbers"
        )


def _words_of(candidate: Any) -> tuple[Any, Any]:
    """The words of an index, or of each index of an array."""
    checks.check_concrete("candidate", candidate)
    if isinstance(candidate, (list, tuple)) or getattr(candidate, "ndim", 0):
        indices: Any = checks.as_numpy("candidate", candidate)
        indices = indices if indices.size else indices.astype(np.int64)
    else:
        indices = np.asarray(checks.as_count("candidate", candidate, maximum=2**63 - 1))
    if indices.ndim > 1 or indices.dtype.kind not in "iu":
        raise TypeError(
            "candidate must be an integer or an array of integers (candidates,); "
            f"got {indices.dtype} of shape {indices.shape}"
        )
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < 2**63:
        raise ValueError(f"candidate must be between 0 and 2**63 - 1; got {indices}")
    return split_index(indices.astype(np.uint64))
