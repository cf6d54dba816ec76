"""Exact perturbation chains, evaluated ahead: the compiled loop under perturbation search.

Each step of a chain needs the verdict on the step before. But acceptance is rare, and until one
is accepted all proposals have the same parent: so a *window* of them is scored at once and the
first success taken, which is what the one-at-a-time loop takes. What follows it in the window is
thrown away, and proposed again from the new parent. All randomness of step `t` comes from the
chain's key and `t` alone, and a loss has the same bits in every window, so the chain is the same
however far the windows look ahead.

Rejections change nothing but counters (how far the step size has shrunk, how long nothing got
better), so the state before each proposal of a window is known beforehand.
"""

from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxnn.chains.history import Pieces, bytes_per_step, join_pieces, pieces_of, thinned
from jaxnn.chains.kernel import (
    GROWTH,
    LIMIT,
    MIN_LANES,
    Anchor,
    Layout,
    Problem,
    Records,
    State,
    StepContext,
    measured,
    propose,
    score,
    step_context,
)
from jaxnn.run.checkpoint import Checkpoint, arrays_to_tree, tree_to_arrays
from jaxnn.run.loop import Limits, Progress, Work, record_interval, run
from jaxnn.run.programs import COMPILER_OPTIONS, program
from jaxnn.typing import Status


@program(static_argnames=("num_chains", "block"))
def start(problem: Problem, *, num_chains: int, block: int | None) -> State:
    """Put all chains at the template; its loss is computed in a block, as those of proposals."""
    flat = ravel_pytree(problem.template)[0]
    loss = score(problem, jnp.tile(flat, (block or MIN_LANES, 1)))[0]
    zero, metric = jnp.uint32(0), None
    if problem.state_metric is not None:
        metric = measured(problem, problem.state_metric, flat[None], block)[0]
    state = State(zero, flat, loss, flat, loss, loss, zero, jnp.int32(0), zero, metric)
    return jax.tree.map(lambda leaf: jnp.tile(leaf, (num_chains, *[1] * leaf.ndim)), state)


@program(static_argnames="layout", compiler_options=COMPILER_OPTIONS)
def climb(
    problem: Problem,
    keys: jax.Array,
    state: State,
    first: jax.Array,
    size: jax.Array,
    *,
    layout: Layout,
) -> tuple[State, Records]:
    """Takes every chain from step `first` to step `first + size`.

    Args:
        problem: what to climb.
        keys: a key a chain.
        state: the chains, all at step `first`.
        first: uint32.
        size: uint32, at most the layout's capacity.
        layout: static.

    Returns:
        The chains, and a record of each step; those from `size` on mean nothing.
    """
    end, num_chains = first + size, len(keys)
    counts = num_chains, layout.depth, layout.num_proposals
    lanes = jnp.arange(layout.depth, dtype=jnp.uint32)
    at_lanes = jax.vmap(partial(step_context, problem, layout.adapts), (None, None, 0))

    def window(state: State) -> tuple[State, Records]:
        anchors = Anchor(state.step, state.flat, state.vain, state.exponent)
        proposals, losses = _best_of_each_step(
            *propose(problem, keys, anchors, counts, layout.block, layout.adapts)
        )
        under = jax.vmap(at_lanes, (0, 0, None))(keys, anchors, lanes)
        ahead = jnp.minimum(end - state.step, jnp.uint32(layout.depth))
        accepted = _judge(layout, state, losses, under)
        accepted &= lanes[None] < ahead[:, None]
        after = jax.vmap(partial(_advance, layout))(
            state, proposals, losses, accepted, under.restarted, ahead
        )
        if problem.state_metric is not None:
            reached = measured(problem, problem.state_metric, after.flat, layout.block)
            after = after._replace(metric=reached)
        return after, Records(
            losses,
            accepted,
            under.scale if layout.adapts else None,
            proposed_metrics(proposals),
            after.metric if after.metric is None else jnp.tile(after.metric[:, None], layout.depth),
        )

    def proposed_metrics(proposals: jax.Array) -> jax.Array | None:
        if problem.metric is None:
            return None
        flats = proposals.reshape(-1, proposals.shape[-1])
        return measured(problem, problem.metric, flats, layout.block).reshape(proposals.shape[:2])

    def look_ahead(carry: tuple[State, Records]) -> tuple[State, Records]:
        state, records = carry
        after, seen = window(state)
        offset = (state.step - first).astype(jnp.int32)
        return after, jax.tree.map(partial(_write, offset), records, seen)

    def is_behind(carry: tuple[State, Records]) -> jax.Array:
        return jnp.any(carry[0].step < end)

    _, seen = jax.eval_shape(window, state)
    capacity = layout.capacity + layout.depth
    empty = jax.tree.map(lambda leaf: jnp.zeros((num_chains, capacity), leaf.dtype), seen)
    return jax.lax.while_loop(is_behind, look_ahead, (state, empty))


def _best_of_each_step(proposals: jax.Array, losses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of `(chains, width, num_proposals)` the best along the last axis; ties to the first."""
    if losses.shape[2] == 1:  # no gather of what is there already
        return proposals[:, :, 0], losses[..., 0]
    best = jnp.argmin(losses, axis=2, keepdims=True)
    chosen = jnp.take_along_axis(proposals, best[..., None], axis=2)
    return chosen[:, :, 0], jnp.take_along_axis(losses, best, axis=2)[..., 0]


def _judge(layout: Layout, state: State, losses: jax.Array, under: StepContext) -> jax.Array:
    """Which proposals of a window would be taken, `(chains, depth)`.

    Metropolis accepts with probability `exp(-rise / temperature)`: if the rise is at most the
    coin, `temperature` times a draw from the exponential distribution.
    """
    current = state.loss[:, None]
    accepted = losses <= current if layout.ties else losses < current
    if under.coin is not None:
        accepted |= losses - current <= under.coin
    if under.restarted is not None:
        accepted |= under.restarted
    return accepted & (losses < jnp.inf)


def _advance(
    layout: Layout,
    state: State,
    proposals: jax.Array,
    losses: jax.Array,
    accepted: jax.Array,
    restarted: jax.Array | None,
    ahead: jax.Array,
) -> State:
    """One chain after its window: at the first proposal accepted, or past them all."""
    taken, place = jnp.any(accepted), jnp.argmax(accepted)
    failures = jnp.where(taken, place.astype(jnp.uint32), ahead)
    flat = jnp.where(taken, proposals[place], state.flat)
    loss = jnp.where(taken, losses[place], state.loss)
    renewed = jnp.array(False) if restarted is None else taken & restarted[place]
    is_best = loss < state.best_loss
    is_lower = renewed | (loss < state.best_since_restart)
    count = failures + taken.astype(jnp.uint32)
    exponent = state.exponent
    if layout.adapts:
        shrunk = jnp.maximum(exponent - failures.astype(jnp.int32), -LIMIT)
        success = jnp.where(loss < state.loss, GROWTH, -1)
        moved = jnp.clip(shrunk + success, -LIMIT, LIMIT)
        exponent = jnp.where(renewed, 0, jnp.where(taken, moved, shrunk))
    return State(
        step=state.step + count,
        flat=flat,
        loss=loss,
        best_flat=jnp.where(is_best, flat, state.best_flat),
        best_loss=jnp.where(is_best, loss, state.best_loss),
        best_since_restart=jnp.where(is_lower, loss, state.best_since_restart),
        vain=jnp.where(is_lower, jnp.uint32(0), state.vain + count),
        exponent=exponent,
        num_accepted=state.num_accepted + taken.astype(jnp.uint32),
        metric=state.metric,
    )


def _write(offset: jax.Array, kept: jax.Array, new: jax.Array) -> jax.Array:
    """Each chain's window at its own place; what lies behind is overwritten by the next one."""
    if len(kept) == 1:  # A scatter, which the general case becomes, takes longer.
        return jax.lax.dynamic_update_slice(kept, new, (jnp.int32(0), offset[0]))
    place = offset[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    return kept.at[jnp.arange(len(kept))[:, None], place].set(new)


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
