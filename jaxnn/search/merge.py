"""Searches of disjoint ranges put together: saved by separate runs, or gathered from processes.

Processes that search together under `jax.distributed` work apart and meet once, at the end, so
JAX's runtime is all that is needed: one gather.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnn.run import checkpoint as checkpoints
from jaxnn.run.checks import as_partial
from jaxnn.run.fingerprint import check_same_run, function_metadata
from jaxnn.run.programs import own_settings
from jaxnn.search.engine import Reached, candidate_params, merge_all, restored
from jaxnn.search.result import RandomSearchResult, report
from jaxnn.search.statistics import from_facts, statistics_of
from jaxnn.typing import SampleFn, Status

BY_URGENCY: tuple[Status, ...] = ("running", "interrupted", "stopped", "reached", "completed")
OWN_FACTS = {"start", "next", "status"}


class Saved(NamedTuple):
    """A search as a checkpoint holds it, with a name for messages."""

    name: str
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]


def merge_searches(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], sample_fn: SampleFn
) -> RandomSearchResult:
    """One result from the checkpoints of searches that differ in nothing but their range.

    The result is that of one search over all the ranges, whichever machine walked each. Ranges
    may be unfinished and there may be gaps between them.

    Args:
        paths: the checkpoints, in any order; a path alone is one.
        sample_fn: the sampler of the searches; it gives the best candidate's weights back.

    Returns:
        A `RandomSearchResult`.

    Raises:
        TypeError: if the sampler is not callable.
        ValueError: if there is no file, one is damaged, of another search, or overlaps another.
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
    saves = [Saved(os.fspath(path), *checkpoints.load(path)) for path in paths]
    name, _, metadata = saves[0]
    check_same_run(name, metadata, {"trainer": "random_search", "jax": jax.__version__})
    words = jnp.array(metadata["key"], jnp.uint32)
    key = jax.random.wrap_key_data(words, impl=metadata["key_implementation"])
    with own_settings():
        same = function_metadata("sample_fn", sample, key, axes=(0,))
        check_same_run(name, metadata, {"sample_fn": same})
    return merge_saved(saves, partial(candidate_params, key, sample_fn))


def merge_saved(saves: Sequence[Saved], params_of: Callable[[int], Any]) -> RandomSearchResult:
    """The result of all the saved searches together; `params_of(index)` gives a candidate."""
    shared = {name: fact for name, fact in saves[0].facts.items() if name not in OWN_FACTS}
    for saved in saves[1:]:
        check_same_run(saved.name, saved.facts, shared)
    statistics = statistics_of(kept := from_facts(shared))
    walked = [saved for saved in saves if saved.facts["start"] < saved.facts["next"]]
    walked.sort(key=lambda saved: saved.facts["start"])
    spans = [(saved.facts["start"], saved.facts["next"]) for saved in walked]
    for (first, second), (one, other) in zip(pairwise(spans), pairwise(walked), strict=True):
        if first[1] > second[0]:
            raise ValueError(
                f"searches must not overlap; got {one.name} up to index {first[1] - 1} and "
                f"{other.name} from {second[0]}"
            )
    parts = [restored(saved.arrays, statistics) for saved in walked]
    status = min((saved.facts["status"] for saved in saves), key=BY_URGENCY.index)
    reached = Reached(merge_all(statistics, *parts), spans[-1][1] if spans else 0, status)
    return report(params_of, spans, reached, kept)


def own_path(path: Path) -> Path:
    """This process's own file beside those of the others; `path` itself if it is alone."""
    if jax.process_count() == 1:
        return path
    part = f"{jax.process_index()}-of-{jax.process_count()}"
    return path.with_name(f"{path.stem}.{part}{path.suffix}")


def gather(message: bytes) -> list[bytes]:
    """Every process's message, in the order of the processes; all have to call this."""
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
