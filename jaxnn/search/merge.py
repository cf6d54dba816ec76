"""Searches of disjoint ranges put together: saved by separate runs, or gathered from processes.

Processes that search together under `jax.distributed` work apart and meet once, at the end, so
JAX's runtime is all that is needed: one gather.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnn.run.checkpoint import Saved, arrays_to_tree, dumps, load, loads
from jaxnn.run.checks import as_partial
from jaxnn.run.fingerprint import check_same_run, function_metadata
from jaxnn.run.programs import own_settings
from jaxnn.search.engine import (
    RunState,
    Search,
    candidate_params,
    merge_states,
    run_content,
    shards,
    start_totals,
)
from jaxnn.search.result import RandomSearchResult, make_result
from jaxnn.search.statistics import StatisticsConfig, statistics_of
from jaxnn.typing import PyTree, SampleFn, Status

BY_URGENCY: tuple[Status, ...] = ("running", "interrupted", "stopped", "reached", "completed")
OF_ONE_PART = {"start", "next", "status", "stop_threshold"}
"""Metadata in which the parts of a search may differ."""


def merge_searches(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], sample_fn: SampleFn
) -> RandomSearchResult:
    """Return one result from the checkpoints of searches that differ in nothing but their range.

    It is the result of one search over all the ranges, whichever machines made them. Ranges may
    be unfinished, and there may be gaps between them.

    Args:
        paths: the checkpoints, in any order; a path alone is one.
        sample_fn: the sampler of the searches, which the best candidate is drawn from.

    Returns:
        A `RandomSearchResult`.

    Raises:
        ValueError: if there is no path, or a file is damaged, of another search, or overlaps
            another.
        FileNotFoundError: if a file is missing.

    Example:
        >>> merge_searches([], lambda key: jax.random.normal(key))
        Traceback (most recent call last):
        ValueError: paths must name at least one checkpoint; got none
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not paths:
        raise ValueError("paths must name at least one checkpoint; got none")
    sample = as_partial("sample_fn", sample_fn)
    parts = [(os.fspath(path), Saved(*load(path))) for path in paths]
    name, (_, metadata, _) = parts[0]
    check_same_run(name, metadata, {"trainer": "random_search", "jax": jax.__version__})
    words = jnp.array(metadata["key"], jnp.uint32)
    key = jax.random.wrap_key_data(words, impl=metadata["key_implementation"])
    with own_settings():
        same = function_metadata("sample_fn", sample, key, axes=(0,))
        check_same_run(name, metadata, {"sample_fn": same})
    return _merge(parts, partial(candidate_params, key, sample_fn))


def merge_processes(
    state: RunState, metadata: dict[str, Any], params_of: Callable[[int], PyTree]
) -> RandomSearchResult:
    """Return the result of all processes together; each has to call this."""
    arrays, own, _ = run_content(state)
    messages = _gather(dumps(arrays, {**metadata, **own, "status": state.status}))
    parts = [(f"process {i}", Saved(*loads(message))) for i, message in enumerate(messages)]
    return _merge(parts, params_of)


def own_part(search: Search) -> Search:
    """Return the search of this process's part of the range: whole tiles, and perhaps none."""
    ranges = dict(enumerate(shards(search, jax.process_count())))
    start, stop = ranges.get(jax.process_index(), (search.stop, search.stop))
    return search._replace(start=start, stop=stop)


def own_path(path: Path) -> Path:
    """Return this process's file beside those of the others; `path` itself if it is alone."""
    if jax.process_count() == 1:
        return path
    part = f"{jax.process_index()}-of-{jax.process_count()}"
    return path.with_name(f"{path.stem}.{part}{path.suffix}")


def _merge(
    parts: Sequence[tuple[str, Saved]], params_of: Callable[[int], PyTree]
) -> RandomSearchResult:
    """The result of all the parts, which have names for messages."""
    shared = {k: v for k, v in parts[0][1].metadata.items() if k not in OF_ONE_PART}
    for name, part in parts:
        check_same_run(name, part.metadata, shared)
    config = StatisticsConfig(*(shared[field] for field in StatisticsConfig._fields))
    statistics = statistics_of(config)
    begun = [each for each in parts if each[1].metadata["start"] < each[1].metadata["next"]]
    begun.sort(key=lambda each: each[1].metadata["start"])
    spans = [(part.metadata["start"], part.metadata["next"]) for _, part in begun]
    for (first, second), (one, other) in zip(pairwise(spans), pairwise(begun), strict=True):
        if first[1] > second[0]:
            raise ValueError(
                f"searches must not overlap; got {one[0]} up to index {first[1] - 1} and "
                f"{other[0]} from {second[0]}"
            )
    fresh = start_totals(statistics)
    totals = (arrays_to_tree(fresh, part.arrays) for _, part in begun)
    totals = merge_states(statistics, fresh, *totals)
    status = min((part.metadata["status"] for _, part in parts), key=BY_URGENCY.index)
    thresholds = {part.metadata["stop_threshold"] for _, part in begun}
    stop_threshold = thresholds.pop() if len(thresholds) == 1 else None
    state = RunState(totals, spans[-1][1] if spans else 0, status, stop_threshold)
    return make_result(params_of, spans, state, config)


def _gather(message: bytes) -> list[bytes]:
    """Every process's message, in the order of the processes."""
    sizes = _exchange(np.array([len(message)], np.int32))[:, 0]
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = _exchange(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def _exchange(row: np.ndarray) -> np.ndarray:
    """A row from each process, `(processes, length)`; all of one length and dtype."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh([first[process] for process in sorted(first)], "process")
    split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("process", None))
    rows = jax.make_array_from_process_local_data(split, row[None])
    return np.asarray(jax.jit(lambda rows: rows, out_shardings=whole)(rows))
