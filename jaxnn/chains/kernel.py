"""What the chains of a perturbation search propose, and its losses: a window of steps at once.

Proposals are scored in blocks of one width, whatever the window's, because a loss may round
differently with the number of weight sets side by side. A loss that does not, from 16 on, says
so itself (`batch_invariant`), and its window is one block.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxnn.run.random import normals

MIN_LANES = 16
"""Fewer losses than this are not scored side by side, and more in multiples of it."""
COIN, FRESH = 0x434F494E, 0x46524553
"""Folded into a step's key for the coin of Metropolis, and for the draw of a restart."""
GROWTH, LIMIT = 4, 200
"""The one-fifth rule in fourth roots of 2: up by four on success, down by one on failure."""


class Problem(NamedTuple):
    """What the chains climb, and how; `None` where a piece is not wanted.

    Attributes:
        loss: `loss(params, batch)`.
        batch: the data.
        template: params of the right shapes.
        scale: a schedule of the step size.
        temperature: a schedule; then worse proposals may be accepted, by Metropolis' rule.
        propose: `propose(key, params, scale)` -> params; by default normal noise on every number.
        restart: `restart(key)` -> params, drawn after `patience` steps without a lower loss.
        patience: steps, a uint32.
        metric: `metric(params, batch)`, of every proposal.
        state_metric: the same, of every accepted one.
    """

    loss: Partial
    batch: Any
    template: Any
    scale: Partial
    temperature: Partial | None = None
    propose: Partial | None = None
    restart: Partial | None = None
    patience: Any = None
    metric: Partial | None = None
    state_metric: Partial | None = None


class StepContext(NamedTuple):
    """What a step is proposed and judged under, known before the steps ahead of it are judged.

    Attributes:
        key: all randomness of the step.
        scale: the step size.
        restarted: whether it starts anew; None if it never does.
        coin: the rise that Metropolis accepts; None without a temperature.
    """

    key: jax.Array
    scale: jax.Array
    restarted: jax.Array | None
    coin: jax.Array | None


class Anchor(NamedTuple):
    """What proposals depend on of a chain's state, as `chains.State` has it."""

    step: Any
    flat: Any
    vain: Any
    exponent: Any


def step_context(
    problem: Problem, adapts: bool, key: jax.Array, anchor: Anchor, lane: jax.Array
) -> StepContext:
    """Of the step `lane` steps ahead, if all before it fail."""
    step = anchor.step + lane
    time = step.astype(jnp.float32)
    scale = jnp.asarray(problem.scale(time))
    if adapts:
        shrunk = jnp.maximum(anchor.exponent - lane.astype(jnp.int32), -LIMIT)
        scale = scale * 2 ** (shrunk / GROWTH).astype(scale.dtype)
    step_key, coin = jax.random.fold_in(key, step), None
    if problem.temperature is not None:
        draw = jax.random.exponential(jax.random.fold_in(step_key, COIN), dtype=jnp.float32)
        coin = problem.temperature(time) * draw
    restarted = None if problem.restart is None else anchor.vain + lane >= problem.patience
    return StepContext(step_key, scale, restarted, coin)


def propose(
    problem: Problem,
    keys: jax.Array,
    anchors: Anchor,
    counts: tuple[int, int, int],
    block: int | None,
    adapts: bool,
) -> tuple[jax.Array, jax.Array]:
    """All proposals of a window, and their losses.

    Args:
        problem: what to climb.
        keys: a key a chain.
        anchors: where each chain is.
        counts: chains, steps ahead, proposals a step.
        block: how many to score side by side; None for all.
        adapts: whether the one-fifth rule changes the step size.

    Returns:
        Proposals `(chains, steps, proposals, size)` and losses `(chains, steps, proposals)`.
    """
    num_chains, depth, num_proposals = counts
    total = math.prod(counts)
    width = block or total + -total % MIN_LANES
    blocks = -(-total // width)

    def draw(data: jax.Array, anchor: Anchor, lane: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys))
        under = step_context(problem, adapts, key, anchor, lane)
        if num_proposals > 1:
            under = under._replace(key=jax.random.fold_in(under.key, number))
        return _move(problem, anchor.flat, under)

    def draw_and_score(places):
        flats = jax.lax.optimization_barrier(jax.vmap(draw)(*places))  # or they are drawn twice
        return flats, score(problem, flats)

    def in_blocks(leaf):
        padding = jnp.repeat(leaf[:1], blocks * width - total, axis=0)
        return jnp.concatenate([leaf, padding]).reshape(blocks, width, *leaf.shape[1:])

    of_chains = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, depth * num_proposals, axis=0),
        (jax.random.key_data(keys), anchors),
    )
    lane, number = jnp.indices(counts[1:], jnp.uint32)
    of_steps = (jnp.tile(leaf.reshape(-1), num_chains) for leaf in (lane, number))
    places = jax.tree.map(in_blocks, (*of_chains, *of_steps))
    flats, losses = jax.lax.map(draw_and_score, places)
    flats = flats.reshape(blocks * width, -1)[:total].reshape(*counts, -1)
    return flats, losses.reshape(-1)[:total].reshape(counts)


def _move(problem: Problem, flat: jax.Array, under: StepContext) -> jax.Array:
    unravel = ravel_pytree(problem.template)[1]
    if problem.propose is None:
        noise = normals(under.key, flat.size).astype(flat.dtype)
        moved = flat + under.scale.astype(flat.dtype) * noise
    else:
        moved = ravel_pytree(problem.propose(under.key, unravel(flat), under.scale))[0]
    if problem.restart is None or under.restarted is None:
        return moved
    fresh = ravel_pytree(problem.restart(jax.random.fold_in(under.key, FRESH)))[0]
    return jnp.where(under.restarted, fresh, moved)


def measured(problem: Problem, metric: Partial, flats: jax.Array, block: int | None) -> jax.Array:
    """Compute a metric of every row of `(count, size)`, in blocks of one width."""
    unravel, count, width = ravel_pytree(problem.template)[1], len(flats), block or MIN_LANES
    padded = jnp.pad(flats, ((0, -count % width), (0, 0))).reshape(-1, width, flats.shape[1])
    of_block = jax.vmap(lambda flat: metric(unravel(flat), problem.batch))
    return jax.lax.map(of_block, padded).reshape(-1)[:count]


def score(problem: Problem, flats: jax.Array) -> jax.Array:
    """Losses side by side; inf, which never wins, for what is not finite, of either sign."""
    unravel = ravel_pytree(problem.template)[1]
    losses = jax.vmap(lambda flat: problem.loss(unravel(flat), problem.batch))(flats)
    return jnp.where(jnp.isfinite(losses), losses, jnp.inf)


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
