"""One step of a perturbation chain, written out: the specification of perturbation search.

A step draws its proposals from the parent, scores them, lets the best stand for the step, and
accepts or rejects it. All randomness comes from the chain's key and the number of the step alone.
`perturbation_search` computes the same chains faster, see `jaxnn.chains.lookahead`.

Losses are scored in blocks of one width, because a loss may round differently with the number of
candidates side by side. A loss that does not, from 16 on, says so in its traits
(`batch_invariant`), and then all that there is to score is one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial, register_dataclass

from jaxnn.optim.schedules import Schedule, as_rate
from jaxnn.run.checks import (
    as_count,
    as_key,
    as_optional,
    as_partial,
    check_floats,
    check_like,
    check_scalar,
    is_traced,
    shapes_of,
)
from jaxnn.run.programs import own_settings
from jaxnn.run.random import fold_in, normals
from jaxnn.run.show import readable
from jaxnn.typing import Function, LossFn, MetricFn, ProposeFn, PyTree, traits_of

TAG = 0x50455254
"""Folded into a search's key, so that no other trainer draws the same from it."""
METROPOLIS, FRESH = 0x434F494E, 0x46524553
"""Folded into a step's key for Metropolis' draw, and for the params of a restart."""
GROWTH, LIMIT = 4, 200
"""The one-fifth rule in fourth roots of 2: up by four on success, down by one on failure."""
MIN_LANES = 16
"""Fewer losses than this are not scored side by side, and more in multiples of it."""
BLOCK_BYTES, MOST_IN_A_BLOCK, MOST_PROPOSALS = 2**22, 32, 2**12


@readable
class State(NamedTuple):
    """Where a chain stands; the result of a search holds all chains, `(num_chains, ...)`.

    Attributes:
        step: steps taken, uint32.
        params: where the chain is.
        loss: the loss of `params`; inf if it is not finite.
        best_params: the best params that the chain has been at.
        best_loss: their loss.
        best_since_restart: lowest loss since the last restart.
        steps_since_improvement: steps since `best_since_restart` fell, uint32.
        exponent: the one-fifth rule multiplies the scale by `2 ** (exponent / 4)`; int32.
        num_accepted: steps accepted so far, uint32.
    """

    step: jax.Array
    params: PyTree
    loss: jax.Array
    best_params: PyTree
    best_loss: jax.Array
    best_since_restart: jax.Array
    steps_since_improvement: jax.Array
    exponent: jax.Array
    num_accepted: jax.Array


@readable
class Info(NamedTuple):
    """What happened at one step.

    Attributes:
        proposed_params: the proposal, the best one if there were several.
        proposed_loss: its loss; inf if it is not finite.
        accepted: whether the chain went there, bool.
        scale: the step size of the proposal, float32.
    """

    proposed_params: PyTree
    proposed_loss: jax.Array
    accepted: jax.Array
    scale: jax.Array


class Kernel(NamedTuple):
    """A chain as two pure functions, to `jit`, `vmap` and `scan` as you like.

    Attributes:
        init: `init(params, batch)` -> the `State` of a chain that starts at `params`.
        step: `step(key, state, batch)` -> the next `State`, and an `Info`.
    """

    init: Callable[[PyTree, PyTree], State]
    step: Callable[[jax.Array, State, PyTree], tuple[State, Info]]


class OneFifth(NamedTuple):
    """A scale that follows the success of the steps; `jaxnn.moves.one_fifth` makes it."""

    initial: Partial


class Restart(NamedTuple):
    """When and where a chain starts anew; `jaxnn.moves.restart` makes it."""

    sample: Partial
    patience: Any


def perturbation_kernel(
    loss_fn: LossFn,
    *,
    scale: float | Schedule | OneFifth,
    num_proposals: int = 1,
    propose_fn: ProposeFn | None = None,
    temperature: float | Schedule | None = None,
    restart: Restart | None = None,
) -> Kernel:
    """Build the two functions of a perturbation chain, `init` and `step`.

    The scan of `step` is chain `c` of `perturbation_search(key, ...)` with the same options, when
    its key is `chain_key(key, c)`. Give `step` the same key every time: `state.step` says which
    step is drawn. The two agree bit for bit if the scan is compiled as the search is, by
    `jax.jit(..., compiler_options=jaxnn.chains.COMPILER_OPTIONS)`; else losses of wide networks
    may differ in their last bit.

    Args:
        loss_fn: `loss_fn(params, batch)` -> a float scalar.
        scale: as of `perturbation_search`; a number may be traced.
        num_proposals: as of `perturbation_search`.
        propose_fn: as of `perturbation_search`.
        temperature: as of `perturbation_search`; a number above 0 may be traced.
        restart: `jaxnn.moves.restart(sample_fn, patience)`, or None.

    Returns:
        A `Kernel`.

    Raises:
        TypeError: by `init`, if a function does not return what it should, or the params are not
            floats of one dtype; by `step`, if the key is not a typed key.
        ValueError: by `init`, if a number is out of range.

    Example:
        >>> def loss_fn(params, batch):
        ...     return jnp.sum((params - batch) ** 2)
        >>> kernel = perturbation_kernel(loss_fn, scale=0.1)
        >>> key, batch = chain_key(jax.random.key(0), 0), jnp.ones(2)
        >>> @jax.jit
        ... def run(state):
        ...     return jax.lax.scan(lambda s, _: kernel.step(key, s, batch), state, length=500)
        >>> state, info = run(kernel.init(jnp.zeros(2), batch))
        >>> bool(state.loss < 0.01), int(state.num_accepted) == int(info.accepted.sum())
        (True, True)
    """

    def problem_of(params: PyTree, batch: PyTree) -> Problem:
        options = scale, num_proposals, propose_fn, temperature, restart
        problem = as_problem(loss_fn, params, batch, *options)
        # Numbers that the compiler knows are folded in and round otherwise than arguments do.
        return jax.lax.optimization_barrier(problem)

    def init(params: PyTree, batch: PyTree) -> State:
        with own_settings():
            params = jax.tree.map(jnp.asarray, params)
            check_floats(params)
            traits_of(loss_fn).validate(params, batch)
            return unravel_state(params, start(problem_of(params, batch)))

    def step(key: jax.Array, state: State, batch: PyTree) -> tuple[State, Info]:
        key = as_key("key", key, traced=True)
        with own_settings():
            flat, unravel = ravel_pytree(state.params)
            best = ravel_pytree(state.best_params)[0]
            state = state._replace(params=flat, best_params=best)
            after, info = take_step(problem_of(unravel(flat), batch), key, state)
            info = info._replace(proposed_params=unravel(info.proposed_params))
            return unravel_state(unravel(flat), after), info

    return Kernel(init, step)


def chain_key(key: jax.Array, chain: int | jax.Array) -> jax.Array:
    """Return the key of one chain of `perturbation_search(key, ...)`.

    Args:
        key: the search's key.
        chain: the number of the chain, from 0 on; it may be traced.

    Raises:
        TypeError: if the key is not a typed key.
        ValueError: if the number is negative.

    Example:
        >>> chain_key(jax.random.key(0), 3).shape
        ()
    """
    key = as_key("key", key, traced=True)
    number = chain if is_traced(chain) else as_count("chain", chain, maximum=2**31 - 1)
    with own_settings():
        return jax.random.fold_in(jax.random.fold_in(key, TAG), number)


def take_step(problem: Problem, key: jax.Array, state: State) -> tuple[State, Info]:
    """Take one step of a chain whose params are one flat vector: propose, accept, update."""
    keys, states = jax.tree.map(lambda leaf: leaf[None], (key, state))
    contexts = step_contexts(problem, keys, states)
    proposals, losses = best_proposals(problem, contexts, states.params)
    context, proposal, loss = jax.tree.map(lambda leaf: leaf[0], (contexts, proposals, losses))
    accepted = accept(problem, state, loss, context)
    after = jax.tree.map(
        partial(jnp.where, accepted),
        moved_to(state, proposal, loss, context.restarted),
        after_rejections(state, jnp.uint32(1)),
    )
    return after, Info(proposal, loss, accepted, context.scale)


class StepContext(NamedTuple):
    """What a step depends on besides the parent, known before the steps ahead of it are taken."""

    key: jax.Array  # all randomness of the step
    scale: jax.Array  # the step size
    restarted: jax.Array | None  # whether the chain starts anew; None if it never does
    metropolis_threshold: jax.Array | None  # the rise accepted; None without a temperature


def step_contexts(problem: Problem, keys: jax.Array, states: State) -> StepContext:
    """Return the context of the next step from each state, `(count,)`, of these chains' keys."""

    def context_of(words: jax.Array, step: jax.Array, since: jax.Array, exponent: jax.Array):
        key, time = wrap(words), step.astype(jnp.float32)
        scale = jnp.asarray(initial_scale(problem)(time))
        if isinstance(problem.scale, OneFifth):
            scale = scale * 2 ** (exponent / GROWTH).astype(scale.dtype)
        step_key, threshold, restarted = fold_in(key, step), None, None
        if problem.temperature is not None:
            # A draw of at least `rise / temperature` has probability exp(-rise / temperature).
            draw_key = fold_in(step_key, jnp.uint32(METROPOLIS))
            draw = jax.random.exponential(draw_key, dtype=jnp.float32)
            threshold = jnp.asarray(problem.temperature(time)) * draw
        if problem.restart is not None:
            restarted = since >= problem.restart.patience
        return StepContext(jax.random.key_data(step_key), scale, restarted, threshold)

    wrap = partial(jax.random.wrap_key_data, impl=jax.random.key_impl(keys))
    counters = states.step, states.steps_since_improvement, states.exponent
    rows = jax.random.key_data(keys), *counters
    contexts = in_blocks(jax.vmap(context_of), rows, None)
    return contexts._replace(key=wrap(contexts.key))


def best_proposals(
    problem: Problem, contexts: StepContext, parents: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the best proposal of every step, `(count, size)`, and its loss; of ties the first."""
    num_steps, num_proposals = len(parents), problem.num_proposals
    repeat = partial(jnp.repeat, repeats=num_proposals, axis=0)
    contexts, flats = jax.tree.map(repeat, (contexts, parents))
    if num_proposals > 1:
        numbers = jnp.tile(jnp.arange(num_proposals, dtype=jnp.uint32), num_steps)
        contexts = contexts._replace(key=jax.vmap(fold_in)(contexts.key, numbers))

    # The normals have the same bits at any width; what a function of the user's draws may not. All
    # at once they take a tenth of the time: in a loop over blocks XLA does not vectorize them.
    own_draws = problem.propose is not None or problem.restart is not None
    impl = jax.random.key_impl(contexts.key)
    contexts = contexts._replace(key=jax.random.key_data(contexts.key))

    def propose_block(contexts: StepContext, flats: jax.Array) -> jax.Array:
        contexts = contexts._replace(key=jax.random.wrap_key_data(contexts.key, impl=impl))
        return jax.vmap(partial(propose, problem))(contexts, flats)

    proposals = in_blocks(propose_block, (contexts, flats), problem.block if own_draws else None)
    losses = in_blocks(partial(score, problem), (proposals,), problem.block)
    if num_proposals == 1:  # A gather of what is there already would take time.
        return proposals, losses
    losses = losses.reshape(num_steps, num_proposals)
    best = jnp.argmin(losses, axis=1, keepdims=True)
    chosen = jnp.take_along_axis(proposals.reshape(*losses.shape, -1), best[..., None], axis=1)
    return chosen[:, 0], jnp.take_along_axis(losses, best, axis=1)[:, 0]


def propose(problem: Problem, context: StepContext, flat: jax.Array) -> jax.Array:
    """Draw one proposal from its parent."""
    unravel = ravel_pytree(problem.params)[1]
    if problem.propose is None:
        noise = normals(context.key, flat.size).astype(flat.dtype)
        moved = flat + context.scale.astype(flat.dtype) * noise
    else:
        moved = ravel_pytree(problem.propose(context.key, unravel(flat), context.scale))[0]
    if problem.restart is None or context.restarted is None:
        return moved
    fresh = ravel_pytree(problem.restart.sample(fold_in(context.key, jnp.uint32(FRESH))))[0]
    return jnp.where(context.restarted, fresh, moved)


def score(problem: Problem, flats: jax.Array) -> jax.Array:
    """Return losses side by side; inf, which never wins, for nan and for either infinity."""
    unravel = ravel_pytree(problem.params)[1]
    losses = jax.vmap(lambda flat: problem.loss(unravel(flat), problem.batch))(flats)
    return jnp.where(jnp.isfinite(losses), losses, jnp.inf)


def accept(problem: Problem, state: State, loss: jax.Array, context: StepContext) -> jax.Array:
    """Return whether a proposal is accepted: Metropolis' rule, if there is a temperature."""
    accepted = loss <= state.loss if problem.accepts_ties else loss < state.loss
    if context.metropolis_threshold is not None:
        accepted |= loss - state.loss <= context.metropolis_threshold
    if context.restarted is not None:
        accepted |= context.restarted
    return accepted & (loss < jnp.inf)


def moved_to(state: State, flat: jax.Array, loss: jax.Array, restarted: jax.Array | None) -> State:
    """Return the state after a step that was accepted."""
    renewed = jnp.array(False) if restarted is None else restarted
    is_best = loss < state.best_loss
    improved = renewed | (loss < state.best_since_restart)
    exponent = state.exponent + jnp.where(loss < state.loss, GROWTH, -1)
    since = state.steps_since_improvement + jnp.uint32(1)
    return State(
        step=state.step + jnp.uint32(1),
        params=flat,
        loss=loss,
        best_params=jnp.where(is_best, flat, state.best_params),
        best_loss=jnp.where(is_best, loss, state.best_loss),
        best_since_restart=jnp.where(improved, loss, state.best_since_restart),
        steps_since_improvement=jnp.where(improved, jnp.uint32(0), since),
        exponent=jnp.where(renewed, 0, jnp.clip(exponent, -LIMIT, LIMIT)),
        num_accepted=state.num_accepted + jnp.uint32(1),
    )


def after_rejections(state: State, count: jax.Array) -> State:
    """Return the state after some steps that were all rejected: only counters have changed."""
    return state._replace(
        step=state.step + count,
        steps_since_improvement=state.steps_since_improvement + count,
        exponent=jnp.maximum(state.exponent - count.astype(jnp.int32), -LIMIT),
    )


def in_blocks(function: Function, rows: tuple[PyTree, ...], width: int | None) -> PyTree:
    """Apply a function of `width` rows to any number of rows; the first one fills up the last.

    Without a width all are one block, of a multiple of 16, since numbers round otherwise alone.
    Keys come as their words: JAX's check of their reuse would take the filling for one.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    width = width or count + -count % MIN_LANES
    blocks = -(-count // width)

    def cut(leaf: jax.Array) -> jax.Array:
        filling = jnp.broadcast_to(leaf[:1], (blocks * width - count, *leaf.shape[1:]))
        return jnp.concatenate([leaf, filling]).reshape(blocks, width, *leaf.shape[1:])

    def whole_block(block: tuple[PyTree, ...]) -> PyTree:
        # The barrier keeps XLA from computing less than the block, which would round otherwise.
        return jax.lax.optimization_barrier(function(*block))

    if blocks == 1:  # A loop of one turn would take up to a third of the time.
        one = whole_block(jax.tree.map(lambda leaf: cut(leaf)[0], rows))
        return jax.tree.map(lambda leaf: leaf[:count], one)
    results = jax.lax.map(whole_block, jax.tree.map(cut, rows))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], results)


@register_dataclass
@dataclass(frozen=True)
class Problem:
    """What a chain minimizes, and by which rules; the static fields are compiled in."""

    loss: Partial
    scale: Partial | OneFifth
    propose: Partial | None
    temperature: Partial | None  # None for 0 too, which `accepts_ties` says
    restart: Restart | None
    metric: Partial | None
    params: PyTree  # the start; a flat vector stands for a tree of these shapes
    batch: PyTree
    num_proposals: int = field(metadata={"static": True})
    accepts_ties: bool = field(metadata={"static": True})
    block: int | None = field(metadata={"static": True})  # losses side by side; None for any


def initial_scale(problem: Problem) -> Partial:
    """Return the schedule of the scale, before the one-fifth rule."""
    return problem.scale.initial if isinstance(problem.scale, OneFifth) else problem.scale


def as_problem(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    scale: float | Schedule | OneFifth,
    num_proposals: int,
    propose_fn: ProposeFn | None,
    temperature: float | Schedule | None,
    restart: Restart | None,
    metric_fn: MetricFn | None = None,
) -> Problem:
    """Return the options, checked, for these params and batch."""
    if restart is not None and not isinstance(restart, Restart):
        raise TypeError(f"restart must be jaxnn.moves.restart(...); got a {type(restart).__name__}")
    is_number = isinstance(temperature, (int, float, np.number))
    accepts_ties = is_number and not isinstance(temperature, bool) and temperature == 0
    has_temperature = temperature is not None and not accepts_ties
    problem = Problem(
        loss=as_partial("loss_fn", loss_fn),
        scale=scale if isinstance(scale, OneFifth) else as_rate("scale", scale),
        propose=as_optional("propose_fn", propose_fn),
        temperature=as_rate("temperature", temperature) if has_temperature else None,
        restart=restart,
        metric=as_optional("metric_fn", metric_fn),
        params=params,
        batch=batch,
        num_proposals=as_count("num_proposals", num_proposals, 1, MOST_PROPOSALS),
        accepts_ties=accepts_ties,
        block=block_of(loss_fn, params, batch, draws=bool(propose_fn or restart)),
    )
    for name, function in (("loss_fn", problem.loss), ("metric_fn", problem.metric)):
        if function is not None:
            check_scalar(name, shapes_of(name, function, params, batch))
    key, step_size = jax.random.key(0), jax.ShapeDtypeStruct((), jnp.float32)
    if problem.propose is not None:
        moved = shapes_of("propose_fn", problem.propose, key, params, step_size)
        check_like("propose_fn", "params", moved, params)
    if restart is not None:
        fresh = shapes_of("sample_fn", restart.sample, key)
        check_like("sample_fn", "params", fresh, params)
    return problem


def block_of(loss_fn: LossFn, params: PyTree, batch: PyTree, *, draws: bool) -> int | None:
    """Return how many losses to score side by side: as many as fit the caches, or None for any.

    Where functions of the user's own draw what is scored, they too must meet one width only.
    """
    traits = traits_of(loss_fn)
    if not draws and traits.batch_invariant(params, batch):
        return None
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    told = traits.candidate_bytes
    needed = 16 * size if told is None else told(params, batch)
    fitting = min(max(BLOCK_BYTES // max(needed, 1), 1), MOST_IN_A_BLOCK)
    return 2 ** (fitting.bit_length() - 1)


def start(problem: Problem) -> State:
    """Put a chain at the params; their loss is computed in a block, as those of proposals are."""
    flat = ravel_pytree(problem.params)[0]
    loss = score(problem, jnp.tile(flat, (problem.block or MIN_LANES, 1)))[0]
    zero = jnp.uint32(0)
    return State(zero, flat, loss, flat, loss, loss, zero, jnp.int32(0), zero)


def unravel_state(params: PyTree, state: State) -> State:
    """Return the state with trees like `params` in place of flat vectors."""
    unravel = ravel_pytree(params)[1]
    return state._replace(params=unravel(state.params), best_params=unravel(state.best_params))
