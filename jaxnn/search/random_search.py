"""Random search: draw whole candidates, keep the best, and learn how losses are spread.

It is a reduction of the losses that `jaxnn.search.evaluate` returns, bit for bit: `engine` draws
and evaluates candidates, `statistics` says what is kept of them, `result` what is reported, and
`merge` joins the parts of a search.

Reference: Brooks, "A discussion of random methods for seeking maxima", Operations Research 1958.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jaxnn.run import checks, loop
from jaxnn.run.checkpoint import Checkpoint
from jaxnn.run.programs import own_settings
from jaxnn.search.engine import (
    RunState,
    StopRule,
    as_search,
    candidate_params,
    run_search,
    search_metadata,
)
from jaxnn.search.merge import merge_processes, own_part, own_path
from jaxnn.search.rejection import as_rejection
from jaxnn.search.result import RandomSearchResult, best_of, make_result
from jaxnn.search.statistics import Collect, as_config, statistics_of
from jaxnn.typing import Device, LossFn, MetricFn, PyTree, SampleFn


def random_search(
    key: jax.Array,
    loss_fn: LossFn,
    sample_fn: SampleFn,
    batch: PyTree,
    *,
    num_candidates: int,
    start: int = 0,
    top_k: int = 1,
    thresholds: Sequence[float] = (),
    bins: Sequence[float] | None = None,
    collect: Collect | None = None,
    keep_below: float | None = None,
    metric_fn: MetricFn | None = None,
    target_loss: float | None = None,
    max_seconds: float | None = None,
    callback: loop.Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    devices: Sequence[Device] | None = None,
    memory_budget: int | None = None,
    progress: bool | Literal["lines"] = False,
) -> RandomSearchResult:
    """Draw `num_candidates` candidates; return the best, and statistics of all losses.

    Memory does not grow with the count. The result depends on the key, the functions, the batch
    and the range of indices alone: not on how the work was cut, on how many devices it ran, nor
    on whether it was interrupted and resumed. (`memory_budget` sets the width of the tiles that
    losses are evaluated in, and with it the rounding of losses that depend on that width.)

    Under `jax.distributed` every process makes the same call. Each searches its own part of the
    range, with its own stop rules and its own checkpoint (`search.0-of-2.npz`), and all return
    the result of the whole, from one gather at the end.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar.
        sample_fn: `sample_fn(key)` -> params, any pytree, such as `model.sampler(scale=4.0)`.
        batch: any pytree that the loss takes.
        num_candidates: how many to draw, at least 1.
        start: index of the first. Two searches of adjacent ranges equal one of both.
        top_k: how many of the best to list.
        thresholds: rising losses; the search counts the candidates at or below each.
        bins: rising edges of the histogram's bins; by default 512 to each power of two.
        collect: which candidates to collect; see `Collect`.
        keep_below: a loss above which you do not ask how losses are spread. Candidates above it,
            above all thresholds and above the best so far are dropped after a few rows, which
            makes the search several times faster where losses are spread widely. What is left
            out is the histogram above it and the number of losses that are not finite; the rest
            of the result is the same, bit for bit. For losses with a `lower_bound` among their
            `jaxnn.typing.Traits`, as `model.loss` has.
        metric_fn: `metric_fn(params, batch)` -> a float scalar, computed at every improvement;
            `model.accuracy` for instance.
        target_loss: the search ends with the first candidate at or below, status "reached".
        max_seconds: the search ends when these are over, status "stopped".
        callback: called with a `Progress` after every chunk, some four times a second, or as
            often as `Every` says. If it raises `StopIteration`, the search ends with status
            "stopped".
        checkpoint: a file to save to every half minute and at the end. If it exists, the search
            goes on from it, and refuses one whose functions, data or settings compute anything
            else.
        devices: where to work; by default all local devices.
        memory_budget: bytes for the largest intermediate value of a tile of candidates; by
            default 4 MiB on a CPU, so that it stays in the caches, and 256 MiB elsewhere.
        progress: whether to show a progress bar; "lines" prints a line when the loss has fallen,
            some four times a second at most.

    Returns:
        A `RandomSearchResult`.

    Raises:
        TypeError: if the loss, or its lower bound, is not a float scalar.
        ValueError: if a number is out of range, `start + num_candidates` exceeds 2^63, the sampler
            draws the same params from 64 keys, the loss has no lower bound for `keep_below`, or
            the checkpoint is of another search or damaged.
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
    given = key, "loss_fn", loss_fn, sample_fn, batch
    search = as_search(*given, devices, start, num_candidates, memory_budget)
    batch, params, loss = search.problem.batch, search.params, search.value
    checks.check_scalar("loss_fn", loss)
    config = as_config(loss.dtype, top_k, thresholds, bins, collect, keep_below)
    rejection = None
    if config.keep_below is not None:
        rejection = as_rejection(loss_fn, params, batch, config.keep_below, loss)
    target = loop.as_target(target_loss, loss.dtype)
    rules = [] if target is None else [StopRule("improvements", target, 1)]
    if collect and collect.stop and config.collect:
        rules.append(StopRule("collected", *config.collect))
    params_of = partial(candidate_params, key, sample_fn)
    if metric_fn is not None:
        function = checks.as_partial("metric_fn", metric_fn)
        checks.check_scalar("metric_fn", checks.shapes_of("metric_fn", function, params, batch))
    metric = loop.metric_of(metric_fn, batch)
    limits = loop.as_limits(max_seconds, callback, jax.process_index() == 0 and progress, metric)
    search, is_alone = own_part(search), jax.process_count() == 1

    def progress_of(state: RunState) -> loop.Progress:
        candidate, loss = best_of(state.totals)
        best_params = partial(params_of, candidate) if candidate is not None else lambda: None
        return loop.Progress(state.end - search.start, loss, best_params)

    with own_settings(), loop.watch_interrupts() as is_interrupted:
        saved, metadata = None, {}
        if checkpoint is not None or not is_alone:
            if np.dtype(loss.dtype).kind != "f":
                raise TypeError(f"loss_fn must return a NumPy float to be saved; got {loss.dtype}")
            metadata = search_metadata("random_search", key, "loss_fn", search)
            metadata |= config._asdict()
        if checkpoint is not None:
            saved = Checkpoint(own_path(Path(checkpoint)), metadata)
        limits, statistics = limits._replace(is_interrupted=is_interrupted), statistics_of(config)
        given = search, statistics, limits, saved, progress_of
        state = run_search(*given, rules=rules, rejection=rejection)
        if is_alone:
            result = make_result(params_of, [(search.start, state.end)], state, config)
        else:
            result = merge_processes(state, metadata, params_of)
        if metric is not None:
            values = [metric(params_of(int(each))) for each in result.history.candidate]
            history = result.history._replace(metric=np.array(values, np.float32))
            result = result._replace(history=history)
        return loop.told(result, is_interrupted)
