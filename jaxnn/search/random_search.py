"""Random search: draw whole weight sets, keep the best, and learn how losses are spread.

Candidate `i` is `sample_fn(key_i)` with a key that depends on the search's key and on `i` alone,
so an index stands for its weights: the search stores indices, and `candidate_params` gives any
candidate back. Losses are always evaluated in tiles of one width, which makes them the same bits
however the search is cut into chunks, devices, processes or runs.

Reference: Brooks, "A discussion of random methods for seeking maxima", Operations Research 1958.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxnn.run import checkpoint as checkpoints
from jaxnn.run.checkpoint import Checkpoint
from jaxnn.run.checks import (
    as_batch,
    as_devices,
    as_key,
    as_partial,
    check_scalar,
    drawn_shapes,
    shapes_of,
)
from jaxnn.run.loop import Progress, as_limits, as_target, told, watch_interrupts
from jaxnn.run.programs import own_settings
from jaxnn.search.engine import (
    SearchProblem,
    Span,
    StopRules,
    as_range,
    as_saved,
    candidate_params,
    candidates_stream,
    check_draws,
    facts_of,
    shares,
    tile_size,
    walk,
)
from jaxnn.search.merge import Saved, gather, merge_saved, own_path
from jaxnn.search.result import RandomSearchResult, report
from jaxnn.search.statistics import Collect, Kept, as_facts, as_kept, statistics_of
from jaxnn.typing import LossFn, SampleFn


def random_search(
    key: jax.Array,
    loss_fn: LossFn,
    sample_fn: SampleFn,
    batch: Any,
    *,
    num_candidates: int,
    start: int = 0,
    top_k: int = 1,
    thresholds: Sequence[float] = (),
    bins: Sequence[float] | None = None,
    collect: Collect | None = None,
    target_loss: float | None = None,
    max_seconds: float | None = None,
    callback: Callable[[Progress], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    devices: Sequence[Any] | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
) -> RandomSearchResult:
    """Draws `num_candidates` weight sets; returns the best, and statistics of all losses.

    Memory does not grow with the count. The result depends on the key, the functions, the batch
    and the range of indices alone: not on how the work was cut, on how many devices it ran, nor
    on whether it was interrupted and resumed. (`memory_budget` sets the width of the tiles that
    losses are evaluated in, and with it the rounding of losses that depend on that width.)

    Under `jax.distributed` every process makes the same call. Each walks its own share of the
    range, with its own stop rules and its own checkpoint (`search.0-of-2.npz`), and all return
    the result of the whole, from one gather at the end.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar.
        sample_fn: `sample_fn(key)` -> params, any pytree; as `model.sampler(scale=...)`.
        batch: any pytree that the loss takes.
        num_candidates: how many to draw, at least 1.
        start: index of the first; two searches that adjoin equal one.
        top_k: how many of the best to list.
        thresholds: losses to count the candidates at or below of.
        bins: rising edges of the histogram's bins; by default 512 to each power of two.
        collect: which candidates to collect; see `Collect`.
        target_loss: the search ends with the first candidate at or below, status "reached".
        max_seconds: the search ends when these are over, status "stopped".
        callback: called with a `Progress` after every chunk, some four times a second; a
            `StopIteration` that it raises ends the search, status "stopped".
        checkpoint: a file to save to every half minute and at the end. If it is there already,
            the search goes on from it, and refuses one whose functions, data or settings compute
            anything else.
        devices: where to work; by default all local devices.
        memory_budget: bytes for the largest intermediate value of a tile of candidates; by
            default 4 MiB on a CPU, so that it stays in the caches, and 256 MiB elsewhere.
        progress: whether to show a progress bar.

    Returns:
        A `RandomSearchResult`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the loss not a float scalar.
        ValueError: if a number is out of range, `start + num_candidates` exceeds 2^63, the sampler
            draws the same params from 64 keys, or the checkpoint is of another search or damaged.
        OSError: if the checkpoint cannot be written.
        MemoryError: if a tile does not fit into memory.

    Example:
        >>> import jax.numpy as jnp
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
    start, stop = as_range(start, num_candidates)
    loss, sample = as_partial("loss_fn", loss_fn), as_partial("sample_fn", sample_fn)
    shapes = drawn_shapes(sample, key)
    batch = as_batch(batch, shapes, loss_fn)
    loss_shape = shapes_of("loss_fn", loss, shapes, batch)
    check_scalar("loss_fn", loss_shape)
    kept = as_kept(loss_shape.dtype, top_k, thresholds, bins, collect)
    rules = StopRules(
        as_target(target_loss, loss_shape.dtype),
        collect.limit if collect and collect.stop else None,
    )
    limits = as_limits(max_seconds, callback, progress and jax.process_index() == 0)
    workers = as_devices(devices)
    tile = tile_size(loss_fn, shapes, batch, memory_budget, workers[0].platform)
    span = _own_share(Span(start, stop, tile))
    alone = jax.process_count() == 1
    with own_settings(), watch_interrupts() as is_interrupted:
        engine = SearchProblem(loss, sample, batch, candidates_stream(key))
        check_draws(key, sample, start)
        facts = {} if alone and checkpoint is None else _facts(key, span, engine, kept)
        saved = None if checkpoint is None else Checkpoint(own_path(Path(checkpoint)), facts)
        limits = limits._replace(is_interrupted=is_interrupted)
        reached = walk(engine, statistics_of(kept), span, rules, workers, limits, saved)
        params_of = partial(candidate_params, key, sample_fn)
        if alone:
            result = report(params_of, [(start, reached.end)], reached, kept)
            return told(result, is_interrupted)
        arrays, end, _ = as_saved(reached)
        own = {**facts, **end, "status": reached.status}
        messages = gather(checkpoints.dumps(arrays, own))
        parts = [Saved(f"process {i}", *checkpoints.loads(part)) for i, part in enumerate(messages)]
        return told(merge_saved(parts, params_of), is_interrupted)


def _own_share(span: Span) -> Span:
    """What of the range is this process's to walk: whole tiles, and perhaps none."""
    pieces = dict(enumerate(shares(*span, jax.process_count())))
    return Span(*pieces.get(jax.process_index(), (span.stop, span.stop)), span.tile)


def _facts(key: jax.Array, span: Span, engine: SearchProblem, kept: Kept) -> dict[str, Any]:
    """What whoever goes on with this search, or merges it, has to share."""
    if kept.dtype.kind != "f":
        raise TypeError(f"loss_fn must return a NumPy float to be saved; got {kept.dtype}: cast it")
    return {**facts_of("random_search", key, engine, span, "loss_fn"), **as_facts(kept)}
