"""The host's side of a perturbation search: chunks, their depth, stop rules and checkpoints."""

from __future__ import annotations

import time
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
from jaxnn.run.loop import (
    Checkpoint,
    Limits,
    Progress,
    Status,
    Work,
    as_record_every,
    run,
)
from jaxnn.run.naming import numbered_leaves, with_leaves

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
    limits: Limits,
    checkpoint: Checkpoint | None,
    *,
    depth: int | None,
    record_every: int | None,
) -> Climbed:
    """Climbs from the start, or from the checkpoint, to the last step or to a stop rule.

    Args:
        problem: what to climb.
        keys: a key a chain.
        num_steps: steps of each chain.
        layout: of the compiled loop; its depth is chosen here.
        rules: when to end.
        limits: when to end whatever was found.
        checkpoint: where to save.
        depth: steps to look ahead; None to choose by how rare acceptance is.
        record_every: which steps to keep, every one or every second and so on; None to choose.

    Returns:
        A `Climbed`.
    """
    num_chains = len(keys)
    width = num_chains * layout.num_proposals
    depths = Depths(depth, width, layout.block)
    layout = layout._replace(capacity=_capacity(num_chains))
    state, pieces, done, every = _begin(problem, keys, layout, num_steps, record_every, checkpoint)
    if done > num_steps:
        raise ValueError(
            f"num_steps must be at least {done}, as many as the checkpoint holds; got {num_steps}"
        )
    parts = [pieces]

    def advance(climbed: Climbed, begin: int, end: int) -> tuple[Climbed, Status | None]:
        nonlocal depths
        ahead, size = best_depth(depths, num_steps - begin), end - begin
        climb_on = partial(
            _climb_on, problem, keys, layout._replace(depth=ahead), climbed.state, begin
        )
        began = time.perf_counter()
        after, records = climb_on(size)
        depths = learn(depths, ahead, np.mean(records.accepted), size, time.perf_counter() - began)
        cut, status = first_stop(rules, records, climbed.state)
        if cut < size:
            after, records = climb_on(cut)
        parts.append(pieces_of(records, climbed.state, begin, every))
        return Climbed(after, parts[0], begin + cut, "completed"), status

    def progress(climbed: Climbed) -> Progress:
        evaluations = num_chains + width * climbed.num_steps
        return Progress(evaluations, float(np.min(climbed.state.best_loss)))

    def content(climbed: Climbed):
        def history() -> dict[str, np.ndarray]:
            parts[:] = [join_pieces(parts)]
            return numbered_leaves(parts[0])

        facts = {"next": climbed.num_steps, "record_every": every}
        return numbered_leaves(climbed.state), facts, history

    work = Work(
        advance,
        progress,
        content,
        total=num_steps,
        largest=layout.capacity,
        unit="steps",
        shown=lambda steps: steps * num_chains,
    )
    climbed = Climbed(state, pieces, done, "completed")
    climbed, status = run(work, climbed, done, status_before(rules, state), limits, checkpoint)
    return climbed._replace(pieces=join_pieces(parts), status=status)


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
    checkpoint: Checkpoint | None,
) -> tuple[State, Pieces, int, int]:
    """State, records and steps done, at the start or as saved; and which steps to record."""
    state: State = jax.tree.map(
        np.asarray, start(problem, num_chains=len(keys), block=layout.block)
    )
    zero = np.uint32(0)
    _, seen = climb.eval_shape(problem, keys, state, zero, zero, layout=layout)
    nothing = jax.tree.map(lambda leaf: np.zeros((len(keys), 0), leaf.dtype), seen)
    pieces = pieces_of(nothing, state, 0, 1)
    saved = checkpoint and checkpoint.begin(numbered_leaves(state), has_history=True)
    saved_every = saved.facts["record_every"] if saved else None
    every = as_record_every(record_every, saved_every, bytes_per_step(pieces), num_steps)
    if not saved:
        return state, pieces, 0, every
    state, done = with_leaves(state, saved.arrays), saved.facts["next"]
    if saved.history is not None:
        pieces = thinned(with_leaves(pieces, saved.history), done, every)
    return state, pieces, done, every
