"""The host's side of a perturbation search: how far to look ahead, stop rules and checkpoints.

A deep window is wasted where proposals are often accepted, a shallow one where they hardly ever
are; and a depth that was not used yet has to be compiled first, which takes seconds.
"""

from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jaxnn.chains.history import (
    Pieces,
    bytes_per_step,
    join_pieces,
    pieces_of,
    thinned,
)
from jaxnn.chains.lookahead import Layout, Records, State, climb, start
from jaxnn.chains.proposals import Problem
from jaxnn.run.checkpoint import Checkpoint, arrays_to_tree, tree_to_arrays
from jaxnn.run.loop import Limits, Progress, Work, record_interval, run
from jaxnn.typing import Status

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
            return tree_to_arrays(parts[0])

        facts = {"next": climbed.num_steps, "record_every": every}
        return tree_to_arrays(climbed.state), facts, history

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
    saved = checkpoint and checkpoint.begin(
        tree_to_arrays(state), ("num_steps", num_steps), has_history=True
    )
    saved_every = saved.metadata["record_every"] if saved else None
    every = record_every or record_interval(saved_every, bytes_per_step(pieces), num_steps)
    if not saved:
        return state, pieces, 0, every
    state, done = arrays_to_tree(state, saved.arrays), saved.metadata["next"]
    if saved.history is not None:
        pieces = thinned(arrays_to_tree(pieces, saved.history), done, every)
    return state, pieces, done, every


class ChainRules(NamedTuple):
    """When a search ends before its last step.

    Attributes:
        target_loss: with the first step, of any chain, at or below.
        patience: with the first step after which no chain has got better for this many steps.
    """

    target_loss: float | None = None
    patience: int | None = None


def status_before(rules: ChainRules, state: State) -> Status | None:
    """Why there is nothing left to do at all; None if there is."""
    if rules.target_loss is not None and np.min(state.best_loss) <= rules.target_loss:
        return "reached"
    if rules.patience is not None and np.all(state.vain >= rules.patience):
        return "converged"
    return None


def first_stop(rules: ChainRules, records: Records, before: State) -> tuple[int, Status | None]:
    """How many of the steps are to be taken, and why no more."""
    steps = np.arange(records.accepted.shape[1])
    cut, status = len(steps), None
    if rules.target_loss is not None:
        hits = np.any(records.accepted & (records.loss <= rules.target_loss), axis=0)
        if np.any(hits):
            cut, status = int(np.argmax(hits)) + 1, "reached"
    if rules.patience is not None:
        losses = np.where(records.accepted, records.loss, np.inf)
        best = np.minimum.accumulate(np.c_[before.best_loss, losses], axis=1)
        last = np.maximum.accumulate(np.where(best[:, 1:] < best[:, :-1], steps, -1), axis=1)
        earlier = before.vain[:, None].astype(np.int64) + steps + 1
        over = np.all(np.where(last < 0, earlier, steps - last) >= rules.patience, axis=0)
        if np.any(over[:cut]):
            cut, status = int(np.argmax(over)) + 1, "converged"
    return cut, status


DEPTHS = (1, 4, 16, 64, 128)
FREE_LANES = 16
"""This many losses take no longer than one: fewer are never scored, unless in smaller blocks."""
MOST_LANES = 2**12
PATIENT = 0.75
"""Look ahead this share of the expected number of steps to the next acceptance (tuned)."""


class Depths(NamedTuple):
    """What a search has learnt about its depths.

    Attributes:
        fixed: the depth asked for; None to choose.
        width: losses of a step, over all chains.
        block: losses scored side by side; None for all of a window.
        share: share of the steps that were accepted lately.
        paces: steps a second at each depth compiled, as last measured; inf if it was not yet.
        compile_seconds: what the last compilation took.
    """

    fixed: int | None
    width: int
    block: int | None
    share: float = 1.0
    paces: dict[int, float] = {}  # noqa: RUF012
    compile_seconds: float = 0.0


def best_depth(known: Depths, steps_left: int) -> int:
    """Somewhat fewer steps than it takes until one is accepted; compiled only if that pays.

    Args:
        known: what was learnt so far.
        steps_left: steps that are still to be taken.

    Returns:
        A depth of `DEPTHS`, or the one asked for.
    """
    if known.fixed is not None:
        return known.fixed
    least, most = (known.block or FREE_LANES) / known.width, MOST_LANES / known.width
    wanted = max(min(max(PATIENT / known.share, least), most), 1)
    depth = max(depth for depth in DEPTHS if depth <= wanted)
    if depth in known.paces or not known.paces:
        return depth
    nearest = min(known.paces, key=lambda used: abs(used - depth))
    return depth if steps_left / known.paces[nearest] > 2 * known.compile_seconds else nearest


def learn(known: Depths, depth: int, share: float, steps: int, seconds: float) -> Depths:
    """What is known after `steps` steps at a depth, of which that share was accepted."""
    pace = steps / seconds if depth in known.paces else float("inf")
    return known._replace(
        share=max(share, PATIENT / DEPTHS[-1]),
        paces={**known.paces, depth: pace},
        compile_seconds=known.compile_seconds if depth in known.paces else seconds,
    )
