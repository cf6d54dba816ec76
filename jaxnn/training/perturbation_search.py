"""Perturbation search: nudge the weights at random, keep what lowers the loss, else revert.

Step `t` of chain `c` proposes `params + scale * noise`, the noise standard normal on every
number, drawn from a key that depends on the search's key, `c` and `t` alone. A proposal is
accepted if its loss is strictly lower.

Known as hill climbing with Gaussian steps, and as the (1+1) evolution strategy with a constant
step (Rechenberg 1973).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxnn.checks import as_count, as_key, as_real
from jaxnn.training.callables import (
    LossFn,
    MetricFn,
    as_batch,
    as_params,
    as_partial,
    check_concrete,
    check_scalar,
    shapes_of,
)
from jaxnn.training.pacing import Status, chunks

__all__ = ["ChainHistory", "PerturbationSearchResult", "perturbation_search"]

TAG = 0x50455254
"""Folded into the key, so that no other trainer draws the same from it."""

RECORDS_PER_CHUNK = 2**18


class ChainHistory(NamedTuple):
    """What happened at every step; ready to plot.

    Shapes are `(num_steps,)`, or `(num_chains, num_steps)` if `num_chains` was given. A loss that
    is not finite stands as inf.

    Attributes:
        evaluations: evaluations of the chain up to and with each step, `(num_steps,)`, int64.
        proposed_loss: loss of the proposal.
        current_loss: loss of the chain after the step.
        best_loss: lowest loss of the chain up to and with the step.
        accepted: whether the proposal was taken, bool.
        proposed_metric: `metric_fn` of the proposal; None if there was no `metric_fn`.
    """

    evaluations: np.ndarray
    proposed_loss: np.ndarray
    current_loss: np.ndarray
    best_loss: np.ndarray
    accepted: np.ndarray
    proposed_metric: np.ndarray | None


class PerturbationSearchResult(NamedTuple):
    """What a perturbation search found.

    Attributes:
        params: the best params of the best chain; the start, if no loss was finite.
        loss: their loss; inf if none was finite.
        num_evaluations: losses evaluated, the start's included: `num_chains * (num_steps + 1)`.
        num_accepted: steps taken, over all chains.
        status: "completed", "interrupted" or "nonfinite".
        history: every step of every chain.
        chain_params: every chain's params, with a leading axis of `num_chains`, or of 1.
        chain_loss: every chain's loss, `(num_chains,)`, or `(1,)`.
    """

    params: Any
    loss: float
    num_evaluations: int
    num_accepted: int
    status: Status
    history: ChainHistory
    chain_params: Any
    chain_loss: np.ndarray


def perturbation_search(
    key: jax.Array,
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    *,
    num_steps: int,
    scale: float,
    num_chains: int | None = None,
    metric_fn: MetricFn | None = None,
    progress: bool = False,
) -> PerturbationSearchResult:
    """Climbs down from `params` by random steps, one chain or several side by side.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar.
        params: where every chain starts, any pytree of floats.
        batch: any pytree that the loss takes.
        num_steps: proposals of each chain; 0 returns the start.
        scale: standard deviation of the noise on every number, above 0.
        num_chains: how many independent chains. The draws of each are the same however many
            there are; its path too, until a loss that rounds differently decides a near-tie. By
            default one, without a leading axis in the history.
        metric_fn: `metric_fn(params, batch)` -> a scalar, recorded for every proposal, as the
            chapter records the accuracy; `model.accuracy` for instance.
        progress: whether to show a progress bar.

    Returns:
        A `PerturbationSearchResult`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the loss not a float scalar.
        ValueError: if a count or the scale is out of range.

    Example:
        >>> def loss_fn(params, batch):
        ...     return jnp.sum((params - batch) ** 2)
        >>> start, batch = jnp.zeros(2), jnp.ones(2)
        >>> key = jax.random.key(0)
        >>> climbed = perturbation_search(key, loss_fn, start, batch, num_steps=2_000, scale=0.05)
        >>> climbed.loss < 0.001
        True
    """
    key = as_key("key", key)
    num_steps = as_count("num_steps", num_steps, maximum=2**32 - 1)
    check_concrete("scale", scale)
    scale_ = as_real("scale", scale)
    width = 1 if num_chains is None else as_count("num_chains", num_chains, 1, 2**31 - 1)
    functions = [loss_fn] if metric_fn is None else [loss_fn, metric_fn]
    start = as_params(params)
    batch = as_batch(batch, params, *functions)
    loss = as_partial("loss_fn", loss_fn)
    metric = None if metric_fn is None else as_partial("metric_fn", metric_fn)
    check_scalar("loss_fn", shapes_of("loss_fn", loss, start, batch))
    if metric is not None:
        check_scalar("metric_fn", shapes_of("metric_fn", metric, start, batch))
    with jax.threefry_partitionable(True):
        stream = jax.random.fold_in(key, TAG)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(stream, jnp.arange(width, dtype=jnp.uint32))
        begin = _start(loss, start, batch, width=width)
        climb = partial(_climb, loss, metric, start, batch, scale_, keys)
        end, records = _walk(climb, begin, num_steps, width, progress)
    history = _history(records, np.asarray(begin.loss), one_chain=num_chains is None)
    best, done = int(np.argmin(end.loss)), len(records.accepted)
    chain_params = jax.vmap(ravel_pytree(start)[1])(end.flat)
    status = "completed" if done == num_steps else "interrupted"
    return PerturbationSearchResult(
        params=jax.tree.map(lambda leaf: leaf[best], chain_params),
        loss=float(end.loss[best]),
        num_evaluations=width * (done + 1),
        num_accepted=int(np.sum(records.accepted)),
        status=status if np.isfinite(end.loss[best]) else "nonfinite",
        history=history,
        chain_params=chain_params,
        chain_loss=np.asarray(end.loss),
    )


class _State(NamedTuple):
    """Where the chains stand: params as one vector `(chains, size)`, losses `(chains,)`."""

    flat: jax.Array
    loss: jax.Array


class _Records(NamedTuple):
    """What is kept of each step, `(steps, chains)`."""

    proposed_loss: Any
    accepted: Any
    proposed_metric: Any


def _walk(
    climb: Callable[..., tuple[_State, _Records]],
    state: _State,
    num_steps: int,
    width: int,
    progress: bool,
) -> tuple[_State, _Records]:
    """Climbs chunk after chunk; returns where the chains end and the records of all steps."""
    capacity = max(RECORDS_PER_CHUNK // width, 1)
    climb = partial(climb, capacity=capacity)
    zero = np.uint32(0)
    _, kept = jax.eval_shape(climb, state, zero, zero)
    pieces = [jax.tree.map(lambda leaf: np.zeros((0, width), leaf.dtype), kept)]
    for chunk in chunks(num_steps, largest=capacity, unit="steps", scale=width, show=progress):
        size = chunk.end - chunk.begin
        state, records = climb(state, np.uint32(chunk.begin), np.uint32(size))
        pieces.append(jax.tree.map(lambda a, size=size: np.asarray(a)[:size].copy(), records))
        chunk.report(float(jnp.min(state.loss)))
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


@partial(jax.jit, static_argnames="width")
def _start(loss: Partial, start: Any, batch: Any, *, width: int) -> _State:
    flat, value = ravel_pytree(start)[0], _finite_or_inf(loss(start, batch))
    return _State(jnp.tile(flat, (width, 1)), jnp.tile(value, width))


@partial(jax.jit, static_argnames="capacity")
def _climb(
    loss: Partial,
    metric: Partial | None,
    template: Any,
    batch: Any,
    scale: jax.Array,
    keys: jax.Array,
    state: _State,
    first: jax.Array,
    size: jax.Array,
    *,
    capacity: int,
) -> tuple[_State, _Records]:
    """One chunk of every chain: `size` steps from step `first` on."""
    unravel = ravel_pytree(template)[1]

    def propose(key: jax.Array, flat: jax.Array, step: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, step), flat.shape, flat.dtype)
        return flat + scale.astype(flat.dtype) * noise

    def score(flat: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        params = unravel(flat)
        return _finite_or_inf(loss(params, batch)), metric and metric(params, batch)

    def advance(number: jax.Array, carry: tuple[_State, _Records]):
        state, records = carry
        proposals = jax.vmap(propose, (0, 0, None))(keys, state.flat, first + number)
        losses, metrics = jax.vmap(score)(proposals)
        accepted = losses < state.loss
        state = _State(
            jnp.where(accepted[:, None], proposals, state.flat),
            jnp.where(accepted, losses, state.loss),
        )
        row = _Records(losses, accepted, metrics)
        return state, jax.tree.map(lambda kept, new: kept.at[number].set(new), records, row)

    losses, metrics = jax.eval_shape(jax.vmap(score), state.flat)
    kept = _Records(losses, state.loss < 0, metrics)
    records = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), kept)
    return jax.lax.fori_loop(jnp.uint32(0), size, advance, (state, records))


def _finite_or_inf(loss: jax.Array) -> jax.Array:
    """A loss that never wins if it is NaN or infinite, of either sign."""
    return jnp.where(jnp.isfinite(loss), loss, jnp.inf)


def _history(records: _Records, start_loss: np.ndarray, *, one_chain: bool) -> ChainHistory:
    """The records as `(chains, steps)`, with the losses that follow from them."""
    steps = np.arange(len(records.accepted))
    last_taken = np.maximum.accumulate(np.where(records.accepted, steps[:, None], -1), axis=0)
    taken_loss = np.take_along_axis(records.proposed_loss, np.maximum(last_taken, 0), axis=0)
    current = np.where(last_taken < 0, start_loss, taken_loss)
    metric = records.proposed_metric

    def by_chain(kept: np.ndarray) -> np.ndarray:
        return kept[:, 0] if one_chain else kept.T

    return ChainHistory(
        evaluations=steps + 2,
        proposed_loss=by_chain(records.proposed_loss),
        current_loss=by_chain(current),
        best_loss=by_chain(np.minimum.accumulate(current, axis=0)),
        accepted=by_chain(records.accepted),
        proposed_metric=None if metric is None else by_chain(metric),
    )
