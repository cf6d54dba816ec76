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

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxnn.chains.proposals import (
    GROWTH,
    LIMIT,
    MIN_LANES,
    Anchor,
    Problem,
    StepContext,
    measured,
    propose,
    score,
    step_context,
)
from jaxnn.run.programs import COMPILER_OPTIONS, program


class Layout(NamedTuple):
    """What the compiled loop is compiled for.

    Attributes:
        depth: steps that a window looks ahead.
        num_proposals: proposals of a step, of which the best stands.
        ties: whether an equal loss is accepted.
        adapts: whether the one-fifth rule changes the step size.
        block: losses to score side by side; None for all of a window.
        capacity: most steps of a call.
    """

    depth: int
    num_proposals: int
    ties: bool
    adapts: bool
    block: int | None
    capacity: int


class State(NamedTuple):
    """Where the chains stand, leading axis `(chains,)`; params as flat vectors.

    Attributes:
        step: steps taken, uint32.
        flat, loss: where the chain is.
        best_flat, best_loss: the best it has been.
        best_since_restart: lowest loss since the last restart.
        vain: steps since that fell, or since the restart, uint32.
        exponent: fourth roots of 2 that the one-fifth rule multiplies the scale by, int32.
        num_accepted: steps accepted so far, uint32.
        metric: the state metric of where the chain is; None if there is none.
    """

    step: Any
    flat: Any
    loss: Any
    best_flat: Any
    best_loss: Any
    best_since_restart: Any
    vain: Any
    exponent: Any
    num_accepted: Any
    metric: Any


class Records(NamedTuple):
    """What is kept of each step, `(chains, steps)`; a state metric counts where accepted."""

    loss: Any
    accepted: Any
    scale: Any
    metric: Any
    state_metric: Any


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
