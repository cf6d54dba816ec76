"""The chains of `jaxnn.chains.kernel`, many steps scored ahead: the loop of perturbation search.

Each step of a chain needs to know whether the step before was accepted. But acceptance is rare,
and until a proposal is accepted all proposals have the same parent. So a *window* of steps is
scored at once, and the chain moves to the first proposal that is accepted, as it would one step
at a time. What follows in the window is thrown away, and proposed again from the new parent.

This is exact. Step `t` draws from the chain's key and `t` alone, a rejection changes nothing but
counters, and a loss has the same bits in every window; so the chain is the same however far the
windows look ahead. A window is as wide as losses are scored together; that depends on the problem
and on how often steps were accepted, never on a clock. Cores and devices share the chains.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxnn.chains.history import (
    Piece,
    Records,
    bytes_per_step,
    join,
    latest,
    record,
    thinned,
)
from jaxnn.chains.kernel import (
    MIN_LANES,
    OneFifth,
    Problem,
    State,
    accept,
    after_rejections,
    best_proposals,
    in_blocks,
    moved_to,
    start,
    step_contexts,
)
from jaxnn.run.checkpoint import Checkpoint, arrays_to_tree, tree_to_arrays
from jaxnn.run.loop import Limits, Progress, Work, record_interval, run
from jaxnn.run.programs import COMPILER_OPTIONS, num_threads, program, run_at_once
from jaxnn.typing import Device, PyTree, Status

RECORDS_PER_CHUNK, STEPS_PER_CHUNK = 2**20, 2**18
WIDE, NARROW, OFTEN = 64, MIN_LANES, 0.1
"""Losses of a window that is not one block: wide, unless steps are accepted this often."""
STEPS_TO_JUDGE = 2**12
"""A shorter chunk does not tell how often steps are accepted."""
MIN_CHAINS_IN_A_THREAD = 64
"""Fewer chains run in one thread, where XLA shares out their losses."""


@program(static_argnames="lookahead", compiler_options=COMPILER_OPTIONS)
def advance_chains(
    problem: Problem,
    keys: jax.Array,
    state: State,
    first: jax.Array,
    size: jax.Array,
    *,
    lookahead: int,
) -> tuple[State, Records]:
    """Take every chain from step `first` to `first + size`; records from there on mean nothing."""
    end, num_chains = first + size, len(keys)
    lanes = jnp.arange(lookahead, dtype=jnp.uint32)
    every_lane = jax.vmap(jax.vmap(after_rejections, (None, 0)), (0, None))

    def window(state: State) -> tuple[State, Records]:
        # Lane `l` is the step that follows if the `l` lanes before it are rejected. Until one is
        # accepted that holds, and so all contexts are known, and all parents are the same.
        ahead: State = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), every_lane(state, lanes)
        )
        contexts = step_contexts(problem, jnp.repeat(keys, lookahead, axis=0), ahead)
        proposals, losses = best_proposals(problem, contexts, ahead.params)
        accepted = jax.vmap(partial(accept, problem))(ahead, losses, contexts)
        scales = contexts.scale if isinstance(problem.scale, OneFifth) else None
        seen = Records(losses, accepted, scales, metrics_of(problem, proposals))
        records, proposals, restarted = jax.tree.map(
            lambda leaf: leaf.reshape(num_chains, lookahead, *leaf.shape[1:]),
            (seen, proposals, contexts.restarted),
        )
        # The first lane accepted is the step that the chain takes, since its parent is the true
        # one. Acceptance in later lanes means nothing: those steps are proposed again.
        lanes_left = jnp.minimum(end - state.step, jnp.uint32(lookahead))
        records = records._replace(accepted=records.accepted & (lanes[None] < lanes_left[:, None]))
        after = jax.vmap(to_first_accepted)(state, proposals, records, restarted, lanes_left)
        return after, records

    def is_behind(carry: tuple[State, Records]) -> jax.Array:
        return jnp.any(carry[0].step < end)

    def look_ahead(carry: tuple[State, Records]) -> tuple[State, Records]:
        state, records = carry
        after, seen = window(state)
        offset = (state.step - first).astype(jnp.int32)
        return after, jax.tree.map(partial(_write, offset), records, seen)

    _, seen = jax.eval_shape(window, state)
    capacity = most_steps(num_chains) + lookahead
    empty = jax.tree.map(lambda leaf: jnp.zeros((num_chains, capacity), leaf.dtype), seen)
    return jax.lax.while_loop(is_behind, look_ahead, (state, empty))


def to_first_accepted(
    state: State,
    proposals: jax.Array,
    records: Records,
    restarted: jax.Array | None,
    lanes_left: jax.Array,
) -> State:
    """Return one chain after its window: at the first proposal accepted, or past them all."""
    taken, lane = jnp.any(records.accepted), jnp.argmax(records.accepted)
    rejected = after_rejections(state, jnp.where(taken, lane.astype(jnp.uint32), lanes_left))
    renewed = None if restarted is None else restarted[lane]
    moved = moved_to(rejected, proposals[lane], records.loss[lane], renewed)
    return jax.tree.map(partial(jnp.where, taken), moved, rejected)


def metrics_of(problem: Problem, flats: jax.Array) -> jax.Array | None:
    """Return the metric of every row of `(count, size)`; None if none is wanted."""
    unravel, metric = ravel_pytree(problem.params)[1], problem.metric
    if metric is None:
        return None
    of_block = jax.vmap(lambda flat: metric(unravel(flat), problem.batch))
    return in_blocks(of_block, (flats,), problem.block or MIN_LANES)


def _write(offset: jax.Array, kept: jax.Array, new: jax.Array) -> jax.Array:
    """Each chain's window at its own place; the next window overwrites what was thrown away."""
    if len(kept) == 1:  # A scatter, which the general case becomes, takes longer.
        return jax.lax.dynamic_update_slice(kept, new, (jnp.int32(0), offset[0]))
    place = offset[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    return kept.at[jnp.arange(len(kept))[:, None], place].set(new)


@program()
def start_chain(problem: Problem) -> tuple[State, jax.Array | None]:
    """Return a chain's first state, and the metric there."""
    state = start(problem)
    return state, jax.tree.map(lambda row: row[0], metrics_of(problem, state.params[None]))


class RunState(NamedTuple):
    """What a search goes on from, as NumPy arrays."""

    chains: State  # (num_chains, ...), params as flat vectors
    metric: Any  # of where each chain is; None without a metric

    @property
    def num_steps(self) -> int:
        """Steps that every chain has taken."""
        return int(self.chains.step[0])


Shard = tuple[np.ndarray, Problem, jax.Array]
"""Which chains, and the problem and their keys on the device that runs them."""


def deal(problem: Problem, keys: jax.Array, devices: Sequence[Device]) -> list[Shard]:
    """Return the shards of the chains, of one size: the last chain fills the last one up."""
    count = min(len(keys), max(len(devices), num_threads(devices)))
    if len(keys) < MIN_CHAINS_IN_A_THREAD * count:
        count = min(len(keys), len(devices))
    size = -(-len(keys) // count)
    places = np.minimum(np.arange(count * size), len(keys) - 1).reshape(count, size)
    return [
        (part, *jax.device_put((problem, keys[part]), devices[number % len(devices)]))
        for number, part in enumerate(places)
    ]


def run_chains(
    problem: Problem,
    keys: jax.Array,
    num_steps: int,
    devices: Sequence[Device],
    target_loss: float | None,
    patience: int | None,
    limits: Limits,
    checkpoint: Checkpoint | None,
) -> tuple[RunState, Status, Piece]:
    """Run from the start, or from the checkpoint, to the last step or to a stop rule."""
    num_chains, accepted, shards = len(keys), 0.0, deal(problem, keys, devices)
    first, piece, every = _begin(shards[0][1], keys, num_steps, checkpoint)
    pieces = [piece]

    def advance(before: RunState, begin: int, end: int) -> tuple[RunState, Status | None]:
        nonlocal accepted
        lookahead, size = choose_lookahead(problem, len(shards[0][2]), accepted), end - begin
        chains, records = _advance_shards(shards, devices, before.chains, begin, size, lookahead)
        if size >= STEPS_TO_JUDGE:
            accepted = float(np.mean(records.accepted))
        cut, status = first_stop(records, before.chains, target_loss, patience)
        if cut < size:
            chains, records = _advance_shards(shards, devices, before.chains, begin, cut, lookahead)
        pieces.append(record(records, before.chains, before.metric, begin, every))
        metric = before.metric
        if metric is not None:
            metric = latest(records.accepted, records.metric, metric, np.array([cut - 1]))[:, 0]
        return RunState(chains, metric), status

    def progress(now: RunState) -> Progress:
        evaluations = num_chains * (1 + problem.num_proposals * now.num_steps)
        best = partial(best_params, problem.params, now.chains)
        return Progress(evaluations, float(np.min(now.chains.best_loss)), best)

    def content(now: RunState):
        def history() -> dict[str, np.ndarray]:
            pieces[:] = [join(pieces)]
            return tree_to_arrays(pieces[0])

        metadata = {"next": now.num_steps, "record_every": every}
        return tree_to_arrays(now), metadata, history

    work = Work(
        advance, progress, content, num_steps, most_steps(num_chains), "steps",
        lambda steps: steps * num_chains,
    )  # fmt: skip
    status = stop_before(first.chains, target_loss, patience)
    last, status = run(work, first, first.num_steps, status, limits, checkpoint)
    return last, status, join(pieces)


def _begin(
    problem: Problem, keys: jax.Array, num_steps: int, checkpoint: Checkpoint | None
) -> tuple[RunState, Piece, int]:
    """Return the state and the history at the start, or as saved, and which steps to record."""
    num_chains, zero = len(keys), np.uint32(0)
    first = RunState(*start_chain(problem))
    first = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], num_chains, axis=0), first)
    _, seen = advance_chains.eval_shape(problem, keys, first.chains, zero, zero, lookahead=1)
    nothing = jax.tree.map(lambda leaf: np.zeros((num_chains, 0), leaf.dtype), seen)
    piece = record(nothing, first.chains, first.metric, 0, 1)
    saved = checkpoint and checkpoint.begin(
        tree_to_arrays(first), ("num_steps", num_steps), has_history=True
    )
    saved_every = saved.metadata["record_every"] if saved else None
    every = record_interval(saved_every, bytes_per_step(piece), num_steps)
    if saved:
        first = arrays_to_tree(first, saved.arrays)
        if saved.history is not None:
            piece = thinned(arrays_to_tree(piece, saved.history), first.num_steps, every)
    return first, piece, every


def _advance_shards(
    shards: Sequence[Shard],
    devices: Sequence[Device],
    state: State,
    first: int,
    size: int,
    lookahead: int,
) -> tuple[State, Records]:
    """Run every shard on its device, all at once, and put the results together."""
    span = np.uint32(first), np.uint32(size)
    calls = [
        (problem, keys, jax.tree.map(operator.itemgetter(part), state), *span)
        for part, problem, keys in shards
    ]
    results = run_at_once(advance_chains, calls, devices, lookahead=lookahead)
    num_chains = len(state.loss)

    def joined(*leaves: jax.Array | np.ndarray) -> np.ndarray:
        return np.concatenate(leaves)[:num_chains]

    states, records = zip(*results, strict=True)
    return jax.tree.map(joined, *states), jax.tree.map(
        lambda *leaves: joined(*(np.asarray(leaf)[:, :size] for leaf in leaves)), *records
    )


def best_params(template: PyTree, chains: State) -> PyTree:
    """Return the best params of all chains; None if no loss was finite."""
    best = int(np.argmin(chains.best_loss))
    if not np.isfinite(chains.best_loss[best]):
        return None
    return ravel_pytree(template)[1](jnp.asarray(chains.best_params[best]))


def most_steps(num_chains: int) -> int:
    """Return how many steps a chunk may have."""
    return max(min(RECORDS_PER_CHUNK // num_chains, STEPS_PER_CHUNK), 1)


def stop_before(state: State, target_loss: float | None, patience: int | None) -> Status | None:
    """Return why there is nothing left to do, if there is not."""
    if target_loss is not None and np.min(state.best_loss) <= target_loss:
        return "reached"
    if patience is not None and np.all(state.steps_since_improvement >= patience):
        return "converged"
    return None


def first_stop(
    records: Records, before: State, target_loss: float | None, patience: int | None
) -> tuple[int, Status | None]:
    """Return how many of the steps to take, and why no more."""
    steps = np.arange(records.accepted.shape[1])
    cut, status = len(steps), None
    if target_loss is not None:
        hits = np.any(records.accepted & (records.loss <= target_loss), axis=0)
        if np.any(hits):
            cut, status = int(np.argmax(hits)) + 1, "reached"
    if patience is not None:
        losses = np.where(records.accepted, records.loss, np.inf)
        best = np.minimum.accumulate(np.c_[before.best_loss, losses], axis=1)
        last = np.maximum.accumulate(np.where(best[:, 1:] < best[:, :-1], steps, -1), axis=1)
        earlier = before.steps_since_improvement[:, None].astype(np.int64) + steps + 1
        over = np.all(np.where(last < 0, earlier, steps - last) >= patience, axis=0)
        if np.any(over[:cut]):
            cut, status = int(np.argmax(over)) + 1, "converged"
    return cut, status


def choose_lookahead(problem: Problem, num_chains: int, accepted: float) -> int:
    """Return how far to look ahead, given the share of the last steps that was accepted.

    A window is one block of losses, since a part of a block takes as long. Where any width will
    do, a wide window pays until about a step in ten is accepted.
    """
    lanes = problem.block or (NARROW if accepted > OFTEN else WIDE)
    return max(lanes // (num_chains * problem.num_proposals), 1)
