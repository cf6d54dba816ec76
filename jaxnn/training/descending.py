"""The compiled loop of a gradient descent, and the host's walk over it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.training.optimizers import Optimizer
from jaxnn.training.pacing import chunks

__all__ = ["CONVERGED", "DIVERGED", "RUNNING", "State", "begin", "descend", "settle", "walk"]

RECORDS_PER_CHUNK = 2**17

RUNNING, CONVERGED, DIVERGED = range(3)


class State(NamedTuple):
    """Where the descent stands."""

    params: Any
    optimizer: Any
    measured: Any
    """The last params whose loss was measured and finite: one step before `params`."""
    loss: jax.Array
    verdict: jax.Array


def begin(optimizer: Optimizer, start: Any, loss_dtype: Any) -> State:
    """The state before the first step."""
    state = _start_optimizer(optimizer, start)
    return State(start, state, start, jnp.asarray(jnp.inf, loss_dtype), jnp.int32(RUNNING))


@jax.jit
def _start_optimizer(optimizer: Optimizer, start: Any) -> Any:
    return optimizer.init(start)


def walk(
    descend: Callable[..., tuple[State, jax.Array, jax.Array]],
    state: State,
    num_epochs: int,
    steps_per_epoch: int,
    progress: bool,
) -> tuple[State, np.ndarray]:
    """Descends chunk after chunk; returns where it ends and the loss before every step."""
    epochs = max(RECORDS_PER_CHUNK // steps_per_epoch, 1)
    descend = partial(descend, capacity=epochs * steps_per_epoch)
    pieces = [np.zeros(0, state.loss.dtype)]
    for chunk in chunks(num_epochs, largest=epochs, unit="epochs", show=progress):
        size = chunk.end - chunk.begin
        state, losses, count = descend(state, np.uint32(chunk.begin), np.uint32(size))
        pieces.append(np.asarray(losses)[: int(count)].copy())
        chunk.report(float(state.loss))
        if int(state.verdict) != RUNNING:
            break
    return state, np.concatenate(pieces)


@partial(jax.jit, static_argnames=("rows_a_step", "capacity"))
def descend(
    function: Partial,
    optimizer: Optimizer,
    batch: Any,
    stream: jax.Array,
    tolerance: jax.Array,
    state: State,
    first_epoch: jax.Array,
    num_epochs: jax.Array,
    *,
    rows_a_step: int | None,
    capacity: int,
) -> tuple[State, jax.Array, jax.Array]:
    """One chunk: `num_epochs` epochs, or fewer if a stop rule is met."""

    def step(state: State, rows: Any, losses: jax.Array, count: jax.Array):
        stepped = _step(function, optimizer, tolerance, state, rows)
        return stepped, losses.at[count].set(stepped.loss), count + 1

    def run_epoch(carry):
        epoch, state, losses, count = carry
        if rows_a_step is None:
            return epoch + 1, *step(state, batch, losses, count)
        order = _shuffled(jax.random.fold_in(stream, epoch), batch, rows_a_step)

        def run_batch(carry):
            number, state, losses, count = carry
            rows = jax.tree.map(lambda leaf: leaf[order[number]], batch)
            return number + 1, *step(state, rows, losses, count)

        def more_batches(carry):
            return (carry[0] < len(order)) & (carry[1].verdict == RUNNING)

        carry = (jnp.int32(0), state, losses, count)
        return epoch + 1, *jax.lax.while_loop(more_batches, run_batch, carry)[1:]

    def more_epochs(carry):
        return (carry[0] < first_epoch + num_epochs) & (carry[1].verdict == RUNNING)

    carry = (first_epoch, state, jnp.zeros(capacity, state.loss.dtype), jnp.int32(0))
    return jax.lax.while_loop(more_epochs, run_epoch, carry)[1:]


def _shuffled(key: jax.Array, batch: Any, rows_a_step: int) -> jax.Array:
    """Row numbers of an epoch, `(steps, rows_a_step)`; the remainder is dropped."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    steps = rows // rows_a_step
    order = jax.random.permutation(key, jnp.arange(rows, dtype=jnp.int32))
    return order[: steps * rows_a_step].reshape(steps, rows_a_step)


def _step(
    function: Partial, optimizer: Optimizer, tolerance: jax.Array, state: State, rows: Any
) -> State:
    """Loss and gradient of the rows, the stop rules, and one step of the optimizer."""
    loss, gradients = function(state.params, rows)
    is_finite = jnp.isfinite(loss)
    is_flat = jnp.abs(loss - state.loss) < tolerance.astype(loss.dtype)
    verdict = jnp.where(is_flat, CONVERGED, jnp.where(is_finite, RUNNING, DIVERGED))
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    return State(
        params=jax.tree.map(jnp.add, state.params, updates),
        optimizer=optimizer_state,
        measured=_select(is_finite, state.params, state.measured),
        loss=loss,
        verdict=verdict.astype(jnp.int32),
    )


@jax.jit
def settle(function: Partial, state: State, batch: Any) -> tuple[Any, jax.Array, jax.Array]:
    """The params to return, their loss and the verdict.

    They are those reached, unless a stop rule was met before or their loss is not finite.
    """
    reached, _ = function(state.params, batch)
    take_reached = (state.verdict == RUNNING) & jnp.isfinite(reached)
    measured, _ = function(state.measured, batch)
    loss = jnp.where(take_reached, reached, measured)
    is_sound = take_reached | ((state.verdict == CONVERGED) & jnp.isfinite(loss))
    params = _select(take_reached, state.params, state.measured)
    return params, loss, jnp.where(is_sound, state.verdict, DIVERGED)


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
