"""The walk of a random search over its range: chunk after chunk, stop rules and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from jaxnn.run.checkpoint import Checkpoint
from jaxnn.run.fingerprint import fingerprint, function_metadata, key_metadata
from jaxnn.run.loop import Limits, Progress, Work, run
from jaxnn.run.random import join
from jaxnn.search.engine import SearchProblem, Statistic, merge_all, reduce_range
from jaxnn.typing import Status

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
    fold = partial(_fold, engine, statistics, span.tile, devices)
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


def _fold(
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
