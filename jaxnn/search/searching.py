"""The walk of a random search over its range: chunk after chunk, stop rules and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from jaxnn.run.fingerprint import fingerprint, function_metadata, key_metadata
from jaxnn.run.pacing import Status, chunks
from jaxnn.run.random import join
from jaxnn.run.stopping import (
    SECONDS_BETWEEN_SAVES,
    Limits,
    Saver,
    SearchProgress,
    ask_to_stop,
)
from jaxnn.search.engine import Engine, Statistic, fold_range, merge_all

__all__ = [
    "Reached",
    "Span",
    "StopRules",
    "as_saved",
    "facts_of",
    "restored",
    "walk",
]

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
        limits: after the chunk in which they say so.
    """

    target_loss: float | None = None
    num_collected: int | None = None
    limits: Limits = Limits()


class Reached(NamedTuple):
    """How far a walk came: the statistics of all candidates below `end`, and why it ended."""

    totals: dict[str, Any]
    end: int
    status: Status


def walk(
    engine: Engine,
    statistics: Mapping[str, Statistic],
    span: Span,
    rules: StopRules,
    devices: Sequence[Any],
    saver: Saver | None,
    *,
    is_interrupted: Callable[[], bool],
    progress: bool,
) -> Reached:
    """Folds the span, from its checkpoint if there is one, to its end or to a stop rule."""
    fold = partial(_fold, engine, statistics, span.tile, devices)
    reached = _restore(saver, statistics, span, rules)
    begin, width = reached.end, span.tile
    num_tiles = -(-(span.stop - begin) // width) if reached.status == "completed" else 0
    largest = LARGEST_CHUNK // width
    started = saved = time.monotonic()
    try:
        for chunk in chunks(
            num_tiles,
            largest=largest,
            unit="candidates",
            scale=width,
            shown=span.stop - begin,
            is_interrupted=is_interrupted,
            show=progress,
        ):
            end = min(begin + chunk.end * width, span.stop)
            reached = _advance(fold, statistics, rules, reached, end)
            chunk.report(_best(reached))
            reached = _ask(rules, reached, span, started)
            if reached.status != "completed":
                break
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                _save(saver, reached, span)
                saved = time.monotonic()
    finally:
        _save(saver, reached, span)
    is_cut = reached.end < span.stop and reached.status == "completed"
    return reached._replace(status="interrupted") if is_cut else reached


def _advance(
    fold: Callable[[int, int], dict[str, Any]],
    statistics: Mapping[str, Statistic],
    rules: StopRules,
    reached: Reached,
    end: int,
) -> Reached:
    """Takes the candidates up to `end` in, or up to the one that a stop rule names."""
    totals = merge_all(statistics, reached.totals, fold(reached.end, end))
    last = _last_candidate(rules, totals)
    if last is None:
        return Reached(totals, end, "completed")
    totals = merge_all(statistics, reached.totals, fold(reached.end, last + 1))
    return Reached(totals, last + 1, "reached")


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


def _ask(rules: StopRules, reached: Reached, span: Span, started: float) -> Reached:
    """Ends the walk if its limits say so."""
    progress = SearchProgress(reached.end - span.start, _best(reached))
    stop = ask_to_stop(rules.limits, started, progress)
    is_early = stop and reached.end < span.stop and reached.status == "completed"
    return reached._replace(status="stopped") if is_early else reached


def _best(reached: Reached) -> float:
    return float(np.min(reached.totals["best"].loss, initial=np.inf))


def _fold(
    engine: Engine,
    statistics: Mapping[str, Statistic],
    tile: int,
    devices: Sequence[Any],
    begin: int,
    end: int,
) -> dict[str, Any]:
    """Folds a range. Memory depends on the tile alone: a shorter range would need no less."""
    try:
        return fold_range(engine, statistics, begin, end, tile=tile, devices=devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"a tile of {tile} candidates does not fit: give a lower memory_budget"
        ) from error


def _restore(
    saver: Saver | None, statistics: Mapping[str, Statistic], span: Span, rules: StopRules
) -> Reached:
    """Where to go on: at the start, or where the checkpoint ends."""
    fresh = Reached(merge_all(statistics, _starts(statistics)), span.start, "completed")
    saved = saver and saver.begin(dict(_named(fresh.totals)))
    if not (saver and saved):
        return fresh
    facts, totals = saved.facts, restored(saved.arrays, statistics)
    if facts["next"] > span.stop:
        raise ValueError(
            f"num_candidates must be at least {facts['next'] - span.start}, as many as "
            f"checkpoint {saver.path} holds; got {span.stop - span.start}"
        )
    done = _last_candidate(rules, totals) is not None
    return Reached(totals, facts["next"], "reached" if done else "completed")


def _save(saver: Saver | None, reached: Reached, span: Span) -> None:
    if saver is not None:
        saver.save(*as_saved({}, reached, span))


def as_saved(
    facts: Mapping[str, Any], reached: Reached, span: Span
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A search as arrays and facts; `restored` takes the arrays."""
    is_cut = reached.end < span.stop and reached.status == "completed"
    status = "interrupted" if is_cut else reached.status
    return dict(_named(reached.totals)), {**facts, "next": reached.end, "status": status}


def restored(
    arrays: Mapping[str, np.ndarray], statistics: Mapping[str, Statistic]
) -> dict[str, Any]:
    """The totals of a saved search."""
    starts = _starts(statistics)
    leaves = [arrays[name] for name, _ in _named(starts)]
    return jax.tree.unflatten(jax.tree.structure(starts), leaves)


def facts_of(
    trainer: str, key: jax.Array, engine: Engine, span: Span, function: str
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
