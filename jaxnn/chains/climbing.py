"""The host's side of a perturbation search: chunks, their depth, stop rules and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jaxnn.chains.depths import Depths, best_depth, learn
from jaxnn.chains.history import (
    Pieces,
    bytes_per_step,
    join_pieces,
    pieces_of,
    thinned,
)
from jaxnn.chains.lookahead import Layout, Records, State, climb, start
from jaxnn.chains.proposals import Problem
from jaxnn.chains.rules import ChainRules, first_stop, status_before
from jaxnn.run.naming import numbered_leaves, with_leaves
from jaxnn.run.pacing import Status, chunks
from jaxnn.run.recording import as_record_every
from jaxnn.run.stopping import (
    SECONDS_BETWEEN_SAVES,
    Saver,
    SearchProgress,
    ask_to_stop,
)

__all__ = ["Climbed", "walk_chains"]

RECORDS_PER_CHUNK, STEPS_PER_CHUNK = 2**20, 2**18


class Climbed(NamedTuple):
    """How far the chains came, what is kept of it, and why it ended."""

    state: State
    pieces: Pieces
    num_steps: int
    status: Status


def walk_chains(
    problem: Problem,
    keys: jax.Array,
    num_steps: int,
    layout: Layout,
    rules: ChainRules,
    saver: Saver | None,
    *,
    depth: int | None,
    record_every: int | None,
    is_interrupted: Callable[[], bool],
    progress: bool,
) -> Climbed:
    """Climbs from the start, or from the checkpoint, to the last step or to a stop rule.

    Args:
        problem: what to climb.
        keys: a key a chain.
        num_steps: steps of each chain.
        layout: of the compiled loop; its depth is chosen here.
        rules: when to end.
        saver: where to save.
        depth: steps to look ahead; None to go by how rare acceptance is.
        record_every: which steps to keep, every one or every second and so on; None to choose.
        is_interrupted: whether to end with the chunk at hand.
        progress: whether to show a progress bar.

    Returns:
        A `Climbed`.
    """
    num_chains = len(keys)
    width = num_chains * layout.num_proposals
    depths = Depths(depth, width, layout.block)
    layout = layout._replace(capacity=_capacity(num_chains))
    begun, every = _begin(problem, keys, layout, num_steps, record_every, saver)
    if begun.num_steps > num_steps:
        raise ValueError(
            f"num_steps must be at least {begun.num_steps}, as many as the checkpoint holds; "
            f"got {num_steps}"
        )
    parts, state, done = [begun.pieces], begun.state, begun.num_steps
    status = status_before(rules, state)
    left = num_steps - done if status == "completed" else 0
    started = saved = time.monotonic()
    pieces = chunks(
        left,
        largest=layout.capacity,
        unit="steps",
        scale=num_chains,
        is_interrupted=is_interrupted,
        show=progress,
    )
    try:
        for chunk in pieces:
            ahead, size = best_depth(depths, num_steps - done), chunk.end - chunk.begin
            climb_on = partial(_climb_on, problem, keys, layout._replace(depth=ahead), state, done)
            began = time.perf_counter()
            after, records = climb_on(size)
            depths = learn(
                depths, ahead, np.mean(records.accepted), size, time.perf_counter() - began
            )
            cut, status = first_stop(rules, records, state)
            if cut < size:
                after, records = climb_on(cut)
            parts.append(pieces_of(records, state, done, every))
            state, done = after, done + cut
            best = float(np.min(state.best_loss))
            chunk.report(best)
            so_far = SearchProgress(num_chains + width * done, best)
            asked = ask_to_stop(rules.limits, started, so_far)
            if asked and status == "completed" and done < num_steps:
                status = "stopped"
            if status != "completed":
                break
            if saver and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                parts = [join_pieces(parts)]
                _save(saver, Climbed(state, parts[0], done, "interrupted"), every)
                saved = time.monotonic()
    finally:
        is_cut = done < num_steps and status == "completed"
        climbed = Climbed(state, join_pieces(parts), done, "interrupted" if is_cut else status)
        if saver:
            _save(saver, climbed, every)
    return climbed


def _climb_on(
    problem: Problem, keys: jax.Array, layout: Layout, state: State, first: int, size: int
) -> tuple[State, Records]:
    """The chains and the records of `size` steps, as NumPy arrays."""
    after, records = climb(problem, keys, state, np.uint32(first), np.uint32(size), layout=layout)
    return jax.tree.map(np.asarray, after), jax.tree.map(
        lambda leaf: np.asarray(leaf)[:, :size].copy(), records
    )


def _capacity(num_chains: int) -> int:
    """Most steps of a chunk."""
    return max(min(RECORDS_PER_CHUNK // num_chains, STEPS_PER_CHUNK), 1)


def _begin(
    problem: Problem,
    keys: jax.Array,
    layout: Layout,
    num_steps: int,
    record_every: int | None,
    saver: Saver | None,
) -> tuple[Climbed, int]:
    """Where to go on, at the start or where the checkpoint ends; and which steps to record."""
    state: State = jax.tree.map(
        np.asarray, start(problem, num_chains=len(keys), block=layout.block)
    )
    zero = np.uint32(0)
    _, seen = climb.eval_shape(problem, keys, state, zero, zero, layout=layout)
    nothing = jax.tree.map(lambda leaf: np.zeros((len(keys), 0), leaf.dtype), seen)
    pieces = pieces_of(nothing, state, 0, 1)
    saved = saver and saver.begin(numbered_leaves(state), has_history=True)
    saved_every = saved.facts["record_every"] if saved else None
    every = as_record_every(record_every, saved_every, bytes_per_step(pieces), num_steps)
    if not saved:
        return Climbed(state, pieces, 0, "completed"), every
    state, done = with_leaves(state, saved.arrays), saved.facts["next"]
    if saved.history is not None:
        pieces = thinned(with_leaves(pieces, saved.history), done, every)
    return Climbed(state, pieces, done, "completed"), every


def _save(saver: Saver, climbed: Climbed, every: int) -> None:
    facts = {"next": climbed.num_steps, "status": climbed.status, "record_every": every}
    saver.save(numbered_leaves(climbed.state), facts, numbered_leaves(climbed.pieces))
