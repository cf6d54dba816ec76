"""Counting what random candidates compute: how many of them give the same outputs.

An outcome is a row of bits, such as the answers of a network to all its inputs; candidates with
the same bits compute the same function there. The candidates are those of random search, so
`candidate_params` returns their params.

Memory is bounded. When there are more outcomes than may be kept, the count of the first that is
one too many is taken off all counts, and outcomes that have nothing left are dropped: a count is
then at most `error` too low, and `error` at most the number of candidates over the number kept
plus 1 (Misra and Gries, "Finding repeated elements", 1982; Agarwal et al., "Mergeable summaries",
2012).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.run.checkpoint import MAX_BYTES, Checkpoint
from jaxnn.run.checks import as_count
from jaxnn.run.loop import Callback, Progress, as_limits, told, watch_interrupts
from jaxnn.run.programs import own_settings
from jaxnn.run.show import readable
from jaxnn.search.engine import RunState, as_search, run_search, search_metadata
from jaxnn.search.statistics import Rows, Statistic, Tile, append_rows, concatenate_rows
from jaxnn.typing import Device, PyTree, SampleFn, Status

WORD = 64
"""Bits that are compared at once; outcomes are padded to whole words."""
LARGEST_CHUNK = 2**24
"""Bytes drawn in one go at most."""
SMALLEST_MERGE = 2**22
"""Bytes that are taken into the counts in one go at least."""


@readable
class OutcomeCounts(NamedTuple):
    """Outcomes and how many candidates had them, the most frequent first.

    `error <= num_evaluations / (max_outcomes + 1)`, and 0 while there is room.

    Attributes:
        packed: `(outcomes, bytes)`, uint8; `np.unpackbits(packed, axis=1, count=num_bits)`
            returns the bits.
        counts: candidates with that outcome, `(outcomes,)`, int64; too low by at most `error`.
        error: 0 if all counts are exact and no outcome is missing; else the most candidates that
            an outcome which is not listed can have.
        num_bits: bits of an outcome.
        num_evaluations: candidates drawn.
        status: "completed", "interrupted" or "stopped".
    """

    packed: np.ndarray
    counts: np.ndarray
    error: int
    num_bits: int
    num_evaluations: int
    status: Status


class HeavyHitters(NamedTuple):
    """Counts so far, outcomes in the order of their bits."""

    packed: PyTree  # (outcomes, bytes), uint8, whole words
    counts: PyTree  # (outcomes,), int64, too low by at most `error`
    error: PyTree
    waiting: Rows  # packed outcomes that are not counted yet, in the order of their candidates


def count_outcomes(
    key: jax.Array,
    outcome_fn: Callable[[PyTree, PyTree], jax.Array],
    sample_fn: SampleFn,
    batch: PyTree,
    *,
    num_candidates: int,
    start: int = 0,
    max_outcomes: int = 2**22,
    max_seconds: float | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    devices: Sequence[Device] | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
) -> OutcomeCounts:
    """Draw `num_candidates` candidates and count how many have each outcome.

    The counts depend on the key, the functions, the batch, the range of indices and
    `max_outcomes` alone: not on how the work was cut, nor on whether it was resumed.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        outcome_fn: `outcome_fn(params, batch)` -> bools of any shape, as
            `lambda params, x: model.apply(params, x) > 0`.
        sample_fn: `sample_fn(key)` -> params, any pytree, such as `model.sampler(scale=4.0)`.
        batch: any pytree that the outcome takes.
        num_candidates: how many to draw, at least 1.
        start: index of the first.
        max_outcomes: how many different outcomes to keep, 24 bytes each for up to 128 bits; the
            work takes some seven times that memory. A checkpoint holds at most 1 GiB of them.
        max_seconds: the counting ends when these are over, status "stopped".
        callback: as in `random_search`; the loss of its `Progress` is nan.
        checkpoint: a file to save to every half minute and at the end; the same call goes on
            from it, also for more candidates.
        devices: where to work; by default all local devices.
        memory_budget: as in `random_search`. A checkpoint goes on with the same alone, since
            outcomes may depend on rounding.
        progress: whether to show a progress bar.

    Returns:
        An `OutcomeCounts`.

    Raises:
        TypeError: if the outcome is not an array of bools.
        ValueError: if a number is out of range, the outcomes would not fit into a checkpoint, or
            the checkpoint is of another count or damaged.
        OSError: if the checkpoint cannot be written.

    Example:
        >>> counted = count_outcomes(
        ...     jax.random.key(0), lambda params, batch: params > batch,
        ...     lambda key: jax.random.normal(key, (2,)), jnp.zeros(2), num_candidates=1_000,
        ... )
        >>> len(counted.counts), int(counted.counts.sum())
        (4, 1000)
    """
    max_outcomes = as_count("max_outcomes", max_outcomes, 1, 2**31)
    given = key, "outcome_fn", outcome_fn, sample_fn, batch
    search = as_search(*given, devices, start, num_candidates, memory_budget)
    outcome = search.value
    if getattr(outcome, "dtype", None) != np.dtype(bool) or not outcome.size:
        raise TypeError(f"outcome_fn must return an array of bools; got {outcome}")
    width = -(-outcome.size // WORD) * WORD // 8
    limits = as_limits(max_seconds, callback, progress)
    tiles = max(LARGEST_CHUNK // (search.tile * width), 1)
    statistics = {"outcomes": _heavy_hitters(max_outcomes, tiles * search.tile, width)}

    def progress_of(state: RunState) -> Progress:
        return Progress(state.end - search.start, np.nan)

    with own_settings(), watch_interrupts() as is_interrupted:
        saved = None
        if checkpoint is not None:
            most = (MAX_BYTES - 2 * LARGEST_CHUNK) // (2 * width + 8)
            if max_outcomes > most:  # with those that wait to be counted
                raise ValueError(
                    f"max_outcomes must be at most {most} with a checkpoint, for {outcome.size} "
                    f"bits; got {max_outcomes}"
                )
            metadata = search_metadata("count_outcomes", key, "outcome_fn", search)
            metadata |= {"num_bits": outcome.size, "max_outcomes": max_outcomes}
            saved = Checkpoint(Path(checkpoint), metadata)
        limits = limits._replace(is_interrupted=is_interrupted)
        given = search, statistics, limits, saved, progress_of
        state = run_search(*given, largest_chunk=tiles * search.tile)
        hitters = state.totals["outcomes"]
        hitters = _count(hitters, len(hitters.waiting.values), max_outcomes)
        order = np.argsort(-hitters.counts, kind="stable")
        listed = hitters.packed[order], hitters.counts[order], int(hitters.error)
        done = state.end - search.start
        return told(OutcomeCounts(*listed, outcome.size, done, state.status), is_interrupted)


def _heavy_hitters(max_outcomes: int, room: int, width: int) -> Statistic:
    """Counts of packed outcomes. The device lists them in order, and the host counts them."""
    rows = Rows(np.zeros((room, width), np.uint8), np.uint32(0))
    start = HeavyHitters(np.zeros((0, width), np.uint8), np.zeros(0, np.int64), np.int64(0), rows)
    return Statistic(start, Partial(_append_packed), partial(_take, max_outcomes))


def _append_packed(hitters: HeavyHitters, tile: Tile) -> HeavyHitters:
    bits = tile.value.reshape(tile.value.shape[0], -1)
    packed = jnp.packbits(jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % WORD))), axis=1)
    return hitters._replace(waiting=append_rows(hitters.waiting, tile._replace(value=packed)))


def _take(max_outcomes: int, first: HeavyHitters, second: HeavyHitters) -> HeavyHitters:
    """Let the second's outcomes wait with the first's; count where their number alone says so."""
    hitters = first._replace(waiting=concatenate_rows(first.waiting, second.waiting))
    least = max(SMALLEST_MERGE // first.packed.shape[1], 1)
    while len(hitters.waiting.values) >= (size := max(least, len(hitters.counts) // 2)):
        hitters = _count(hitters, size, max_outcomes)
    return hitters


def _count(hitters: HeavyHitters, size: int, max_outcomes: int) -> HeavyHitters:
    """Count the first `size` outcomes of those that wait."""
    packed, counts, error, (waiting, _) = hitters
    waiting, rest = waiting[:size], waiting[size:]
    packed = np.concatenate([packed, waiting])
    counts = np.concatenate([counts, np.ones(len(waiting), np.int64)])
    by_word = packed.view(">u8")
    order = np.lexsort(by_word.T[::-1])
    packed, counts, by_word = packed[order], counts[order], by_word[order]
    is_new = np.append(True, np.any(by_word[1:] != by_word[:-1], axis=1))[: len(counts)]
    begins = np.flatnonzero(is_new)
    packed, counts = packed[begins], np.add.reduceat(counts, begins) if len(begins) else counts
    excess = len(counts) - max_outcomes
    if excess > 0:
        cut = np.partition(counts, excess - 1)[excess - 1]
        kept = counts > cut
        packed, counts, error = packed[kept], counts[kept] - cut, error + cut
    return HeavyHitters(packed, counts, np.asarray(error), Rows(rest, np.asarray(len(rest))))
