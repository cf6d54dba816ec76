"""Counting what random weight sets do: how many of them give the same outputs.

An outcome is a row of bits, such as the answers of a network to all its inputs; candidates with
the same bits compute the same function there. Candidates are those of random search: candidate
`i` is a function of the key and of `i` alone, so `candidate_params` gives its weights back.

Memory is bounded. When there are more outcomes than may be kept, the count of the first that is
one too many is taken off all counts, and outcomes that have nothing left are dropped: a count is
then at most `error` too low, and `error` at most the number of candidates over the number kept
plus 1 (Misra and Gries, "Finding repeated elements", 1982; Agarwal et al., "Mergeable summaries",
2012).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnn.run import checkpoint as checkpoints
from jaxnn.run.checkpoint import Checkpoint
from jaxnn.run.checks import as_batch, as_count, as_key, as_partial, drawn_shapes, shapes_of
from jaxnn.run.loop import Limits, Progress, Work, as_limits, run, told, watch_interrupts
from jaxnn.run.programs import COMPILER_OPTIONS, own_settings, program
from jaxnn.run.random import add, fold_index, words
from jaxnn.search.engine import (
    SearchProblem,
    Span,
    as_range,
    candidates_stream,
    check_draws,
    facts_of,
    tile_size,
)
from jaxnn.typing import SampleFn, Status

WORD = 64
"""Bits that are compared at once; outcomes are padded to whole words."""
LARGEST_CHUNK = 2**24
"""Bytes drawn in one go at most."""


class OutcomeCounts(NamedTuple):
    """Outcomes and how many candidates had them, the most frequent first.

    `error <= num_evaluations / (max_outcomes + 1)`, and 0 while there is room (Misra and Gries,
    "Finding repeated elements", 1982; Agarwal et al., "Mergeable summaries", 2012).

    Attributes:
        packed: `(outcomes, bytes)`, uint8; `np.unpackbits(packed, axis=1, count=num_bits)` are
            the bits.
        count: candidates with that outcome, `(outcomes,)`, int64; too low by at most `error`.
        error: 0 if all counts are exact and no outcome is missing; else an outcome that is not
            listed was seen at most so often.
        num_bits: bits of an outcome.
        num_evaluations: candidates drawn.
        status: "completed", "interrupted" or "stopped".
    """

    packed: np.ndarray
    count: np.ndarray
    error: int
    num_bits: int
    num_evaluations: int
    status: Status


def count_outcomes(
    key: jax.Array,
    outcome_fn: Callable[[Any, Any], jax.Array],
    sample_fn: SampleFn,
    batch: Any,
    *,
    num_candidates: int,
    start: int = 0,
    max_outcomes: int = 2**22,
    max_seconds: float | None = None,
    callback: Callable[[Progress], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
) -> OutcomeCounts:
    """Draws `num_candidates` weight sets and counts how many have each outcome.

    The counts depend on the key, the functions, the batch, the range of indices and
    `max_outcomes` alone: not on how the work was cut, nor on whether it was resumed.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        outcome_fn: `outcome_fn(params, batch)` -> bools of any shape, as
            `lambda params, x: model.apply(params, x) > 0`.
        sample_fn: `sample_fn(key)` -> params, any pytree; as `model.sampler(scale=...)`.
        batch: any pytree that the outcome takes.
        num_candidates: how many to draw, at least 1.
        start: index of the first.
        max_outcomes: how many different outcomes to keep, 24 bytes each for up to 128 bits; the
            work takes some seven times that memory. A checkpoint holds at most 1 GiB of them.
        max_seconds: the counting ends when these are over, status "stopped".
        callback: called with a `Progress` some four times a second, whose loss is nan; a
            `StopIteration` that it raises ends the counting, status "stopped".
        checkpoint: a file to save to every half minute and at the end; the same call goes on
            from it, also for more candidates.
        memory_budget: as in `random_search`; a checkpoint goes on with the same alone, since
            outcomes may hang on rounding.
        progress: whether to show a progress bar.

    Returns:
        An `OutcomeCounts`.

    Raises:
        TypeError: if an argument is of the wrong kind, the sampler draws no array, or the outcome
            is not an array of bools.
        ValueError: if a number is out of range, the outcomes would not fit into a checkpoint, or
            the checkpoint is of another count or damaged.
        OSError: if the checkpoint cannot be written.

    Example:
        >>> counted = count_outcomes(
        ...     jax.random.key(0), lambda params, batch: params > batch,
        ...     lambda key: jax.random.normal(key, (2,)), jnp.zeros(2), num_candidates=1_000,
        ... )
        >>> len(counted.count), int(counted.count.sum())
        (4, 1000)
    """
    key = as_key("key", key)
    start, stop = as_range(start, num_candidates)
    max_outcomes = as_count("max_outcomes", max_outcomes, 1, 2**31)
    outcome, sample = as_partial("outcome_fn", outcome_fn), as_partial("sample_fn", sample_fn)
    shapes = drawn_shapes(sample, key)
    batch = as_batch(batch, shapes, outcome_fn)
    num_bits = _num_bits(shapes_of("outcome_fn", outcome, shapes, batch))
    limits = as_limits(max_seconds, callback, progress)
    tile = tile_size(outcome_fn, shapes, batch, memory_budget, jax.default_backend())
    span = Span(start, stop, tile)
    with own_settings(), watch_interrupts() as is_interrupted:
        engine = SearchProblem(outcome, sample, batch, candidates_stream(key))
        check_draws(key, sample, start)
        saved = None
        if checkpoint is not None:
            _check_fits(max_outcomes, num_bits)
            facts = facts_of("count_outcomes", key, engine, span, "outcome_fn")
            facts |= {"num_bits": num_bits, "max_outcomes": max_outcomes}
            saved = Checkpoint(Path(checkpoint), facts)
        counted = _resumed(saved, span, num_bits)
        limits = limits._replace(is_interrupted=is_interrupted)
        counted, status = _walk(engine, span, counted, max_outcomes, limits, saved)
        packed, count, error, _, end = merge(counted, len(counted.waiting), max_outcomes)
        order = np.argsort(-count, kind="stable")
        result = OutcomeCounts(packed[order], count[order], error, num_bits, end - start, status)
        return told(result, is_interrupted)


def _width(num_bits: int) -> int:
    """Bytes of a packed outcome."""
    return -(-num_bits // WORD) * WORD // 8


def _check_fits(max_outcomes: int, num_bits: int) -> None:
    """Refuses more outcomes than a checkpoint can hold, with those that wait to be counted."""
    width = _width(num_bits)
    most = (checkpoints.MAX_BYTES - 2 * LARGEST_CHUNK) // (2 * width + 8)
    if max_outcomes > most:
        raise ValueError(
            f"max_outcomes must be at most {most} with a checkpoint, for {num_bits} bits; "
            f"got {max_outcomes}"
        )


def _num_bits(outcome: Any) -> int:
    if not isinstance(outcome, jax.ShapeDtypeStruct) or outcome.dtype != bool or not outcome.size:
        raise TypeError(f"outcome_fn must return an array of bools; got {outcome}")
    return outcome.size


def _walk(
    engine: SearchProblem,
    span: Span,
    tally: Tally,
    max_outcomes: int,
    limits: Limits,
    checkpoint: Checkpoint | None,
) -> tuple[Tally, Status]:
    """Draws and counts on, to the end of the span or until stopped."""
    begin, tile = tally.end, span.tile
    left, width = span.stop - begin, tally.packed.shape[1]
    largest = max(LARGEST_CHUNK // (tile * width), 1)

    def advance(tally: Tally, first: int, end: int) -> tuple[Tally, None]:
        wanted = min(begin + end * tile, span.stop) - tally.end
        number = np.uint32(end - first)
        drawn = _draw(engine, words(tally.end), number, tile=tile, most=largest)
        return take(tally, np.asarray(drawn)[:wanted], max_outcomes), None

    work = Work(
        advance,
        progress=lambda tally: Progress(tally.end - span.start, np.nan),
        content=_content,
        total=-(-left // tile),
        largest=largest,
        unit="candidates",
        shown=lambda tiles: min(tiles * tile, left),
    )
    return run(work, tally, 0, None, limits, checkpoint)


@program(static_argnames=("tile", "most"), compiler_options=COMPILER_OPTIONS)
def _draw(
    engine: SearchProblem,
    begin: tuple[jax.Array, jax.Array],
    num_tiles: jax.Array,
    *,
    tile: int,
    most: int,
) -> jax.Array:
    """The packed outcomes of `num_tiles` tiles, in the first rows of `(most * tile, bytes)`."""

    def outcome(high: jax.Array, low: jax.Array) -> jax.Array:
        params = engine.sample(fold_index(engine.stream, high, low))
        bits = jnp.ravel(engine.value(params, engine.batch))
        return jnp.packbits(jnp.pad(bits, (0, -bits.size % WORD)))

    def draw_tile(number: jax.Array, rows: jax.Array) -> jax.Array:
        offset = number * jnp.uint32(tile) + jnp.arange(tile, dtype=jnp.uint32)
        drawn = jax.vmap(outcome)(*add(*begin, offset))
        return jax.lax.dynamic_update_slice(rows, drawn, (number * jnp.uint32(tile), jnp.uint32(0)))

    row = jax.eval_shape(outcome, *begin)
    rows = jnp.zeros((most * tile, *row.shape), row.dtype)
    return jax.lax.fori_loop(jnp.uint32(0), num_tiles, draw_tile, rows)


def _resumed(checkpoint: Checkpoint | None, span: Span, num_bits: int) -> Tally:
    """Where to go on: at the start, or where the checkpoint ends."""
    none = np.zeros((0, _width(num_bits)), np.uint8)
    fresh = Tally(none, np.zeros(0, np.int64), 0, none, span.start)
    asked = "num_candidates", span.stop - span.start
    saved = checkpoint and checkpoint.begin(_content(fresh)[0], asked, origin=span.start)
    if not saved:
        return fresh
    arrays, facts, _ = saved
    parts = arrays["packed"], arrays["count"], facts["error"], arrays["waiting"]
    return Tally(*parts, facts["next"])


def _content(tally: Tally) -> tuple[dict[str, np.ndarray], dict[str, Any], None]:
    """A tally as arrays and facts."""
    arrays = {"packed": tally.packed, "count": tally.count, "waiting": tally.waiting}
    return arrays, {"error": tally.error, "next": tally.end}, None


SMALLEST_MERGE = 2**22
"""Bytes that are taken into the counts in one go at least."""


class Tally(NamedTuple):
    """Counts so far, outcomes in the order of their bits.

    Attributes:
        packed: `(outcomes, bytes)`, uint8, whole words of 8 bytes.
        count: how often each came up, `(outcomes,)`, int64; too low by at most `error`.
        error: what was taken off all counts.
        waiting: packed outcomes that are not counted yet, in the order of their indices.
        end: one past the last index taken in.
    """

    packed: np.ndarray
    count: np.ndarray
    error: int
    waiting: np.ndarray
    end: int


def take(tally: Tally, drawn: np.ndarray, max_outcomes: int) -> Tally:
    """Adds outcomes in the order of their indices; merges where their number alone says so."""
    waiting = np.concatenate([tally.waiting, drawn])
    tally = tally._replace(waiting=waiting, end=tally.end + len(drawn))
    least = max(SMALLEST_MERGE // tally.packed.shape[1], 1)
    while len(tally.waiting) >= (size := max(least, len(tally.count) // 2)):
        tally = merge(tally, size, max_outcomes)
    return tally


def merge(tally: Tally, size: int, max_outcomes: int) -> Tally:
    """Counts the first `size` of those that wait."""
    first, waiting = tally.waiting[:size], tally.waiting[size:]
    packed = np.concatenate([tally.packed, first])
    count = np.concatenate([tally.count, np.ones(len(first), np.int64)])
    by_word = packed.view(">u8")
    order = np.lexsort(by_word.T[::-1])
    packed, count, by_word = packed[order], count[order], by_word[order]
    is_new = np.append(True, np.any(by_word[1:] != by_word[:-1], axis=1))[: len(count)]
    begins = np.flatnonzero(is_new)
    packed, count = packed[begins], np.add.reduceat(count, begins) if len(begins) else count
    excess = len(count) - max_outcomes
    if excess <= 0:
        return Tally(packed, count, tally.error, waiting, tally.end)
    cut = np.partition(count, excess - 1)[excess - 1]
    kept = count > cut
    return Tally(packed[kept], count[kept] - cut, tally.error + int(cut), waiting, tally.end)
