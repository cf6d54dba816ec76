"""The compiled loop of a gradient descent: epochs of steps, each with a look at the stop rules."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxnn.training.optimizers import Optimizer, length

__all__ = [
    "CONVERGED",
    "DIVERGED",
    "REACHED",
    "RUNNING",
    "Cut",
    "Records",
    "Rules",
    "State",
    "begin",
    "descend",
    "settle",
]

RUNNING, CONVERGED, DIVERGED, REACHED = range(4)


class Rules(NamedTuple):
    """When a descent ends before its last epoch; None where a rule is not wanted.

    Attributes:
        tolerance: with two consecutive losses that differ by less.
        gradient_tolerance: with a gradient shorter than this, of all leaves together.
        target_loss: with a loss at or below.
        validation: a batch on which the loss is taken after every epoch.
        patience: with so many epochs without a lower loss on it, a uint32.
    """

    tolerance: Any
    gradient_tolerance: Any = None
    target_loss: Any = None
    validation: Any = None
    patience: Any = None


class Cut(NamedTuple):
    """How an epoch is cut into steps.

    Attributes:
        rows_a_step: rows of each; None where the batch is taken whole, unshuffled.
        remainder: rows of a last, smaller step; 0 for none.
        steps: steps of an epoch, the smaller one included.
    """

    rows_a_step: int | None
    remainder: int
    steps: int


class Best(NamedTuple):
    """The params of the lowest loss on the validation batch, and epochs since."""

    params: Any
    loss: jax.Array
    vain: jax.Array


class State(NamedTuple):
    """Where the descent stands.

    Attributes:
        params: where it is.
        optimizer: what the optimizer remembers.
        measured: the last params whose loss was measured and finite: one step before `params`.
        loss: the last loss measured.
        verdict: RUNNING, or why it ended.
        best: by validation; None without.
    """

    params: Any
    optimizer: Any
    measured: Any
    loss: jax.Array
    verdict: jax.Array
    best: Best | None


class Records(NamedTuple):
    """Losses of a chunk: before every step, and after every epoch on the validation batch."""

    loss: Any
    num_steps: Any
    validation: Any
    num_epochs: Any


@partial(jax.jit, static_argnames=("loss_dtype", "validates"))
def begin(optimizer: Optimizer, start: Any, *, loss_dtype: Any, validates: bool) -> State:
    """The state before the first step."""
    unmet = jnp.asarray(jnp.inf, loss_dtype)
    best = Best(start, unmet, jnp.uint32(0)) if validates else None
    return State(start, optimizer.init(start), start, unmet, jnp.int32(RUNNING), best)


@partial(jax.jit, static_argnames=("cut", "capacity"))
def descend(
    function: Partial,
    optimizer: Optimizer,
    batch: Any,
    stream: jax.Array,
    rules: Rules,
    state: State,
    first_epoch: jax.Array,
    num_epochs: jax.Array,
    *,
    cut: Cut,
    capacity: int,
) -> tuple[State, Records]:
    """One chunk: `num_epochs` epochs, at most `capacity`, or fewer if a stop rule is met."""
    take_step = partial(_step, function, optimizer, rules)

    def run_epoch(carry: tuple[jax.Array, State, Records]):
        epoch, state, records = carry
        if cut.rows_a_step is None:
            state, records = take_step(batch, state, records)
        else:
            key = jax.random.fold_in(stream, epoch)
            state, records = _run_batches(take_step, key, batch, cut, state, records)
        if state.best is not None:
            state, loss = _validate(function, rules, state, state.best)
            here = records.num_epochs
            records = records._replace(validation=records.validation.at[here].set(loss))
        return epoch + 1, state, records._replace(num_epochs=records.num_epochs + 1)

    def more_epochs(carry: tuple[jax.Array, State, Records]) -> jax.Array:
        return (carry[0] < first_epoch + num_epochs) & (carry[1].verdict == RUNNING)

    losses = jnp.zeros(capacity * cut.steps, state.loss.dtype)
    validation = None if rules.validation is None else jnp.zeros(capacity, state.loss.dtype)
    records = Records(losses, jnp.int32(0), validation, jnp.int32(0))
    return jax.lax.while_loop(more_epochs, run_epoch, (first_epoch, state, records))[1:]


def _run_batches(take_step, key: jax.Array, batch: Any, cut: Cut, state: State, records: Records):
    """The steps of one epoch, on its rows in an order of its own."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    order = jax.random.permutation(key, jnp.arange(rows, dtype=jnp.int32))
    steps = rows // cut.rows_a_step
    chosen = order[: steps * cut.rows_a_step].reshape(steps, cut.rows_a_step)

    def rows_at(places: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[places], batch)

    def run_batch(carry):
        number, state, records = carry
        return number + 1, *take_step(rows_at(chosen[number]), state, records)

    def more_batches(carry) -> jax.Array:
        return (carry[0] < steps) & (carry[1].verdict == RUNNING)

    _, state, records = jax.lax.while_loop(more_batches, run_batch, (jnp.int32(0), state, records))
    if not cut.remainder:
        return state, records
    last, seen = take_step(rows_at(order[steps * cut.rows_a_step :]), state, records)
    runs = state.verdict == RUNNING
    count = jnp.where(runs, seen.num_steps, records.num_steps)
    return _select(runs, last, state), seen._replace(num_steps=count)


def _step(
    function: Partial, optimizer: Optimizer, rules: Rules, rows: Any, state: State, records: Records
) -> tuple[State, Records]:
    """Loss and gradient of the rows, the stop rules, and one step of the optimizer."""
    loss, gradients = function(state.params, rows)
    is_flat = jnp.abs(loss - state.loss) < rules.tolerance.astype(loss.dtype)
    if rules.gradient_tolerance is not None:
        norm = length(gradients)
        is_flat |= norm < rules.gradient_tolerance.astype(norm.dtype)
    is_finite = jnp.isfinite(loss)
    verdict = jnp.where(is_flat, CONVERGED, RUNNING)
    verdict = jnp.where(is_finite, verdict, DIVERGED)
    if rules.target_loss is not None:
        is_reached = is_finite & (loss <= rules.target_loss.astype(loss.dtype))
        verdict = jnp.where(is_reached, REACHED, verdict)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    stepped = State(
        params=jax.tree.map(jnp.add, state.params, updates),
        optimizer=optimizer_state,
        measured=_select(is_finite, state.params, state.measured),
        loss=loss,
        verdict=verdict.astype(jnp.int32),
        best=state.best,
    )
    losses = records.loss.at[records.num_steps].set(loss)
    return stepped, records._replace(loss=losses, num_steps=records.num_steps + 1)


def _validate(function: Partial, rules: Rules, state: State, best: Best) -> tuple[State, jax.Array]:
    """Looks at the validation batch, at the params that would be returned if this were the end."""
    here = _select(state.verdict == RUNNING, state.params, state.measured)
    loss, _ = function(here, rules.validation)
    is_better = jnp.isfinite(loss) & (loss < best.loss)
    vain = jnp.where(is_better, jnp.uint32(0), best.vain + 1)
    best = _select(is_better, Best(here, loss, vain), best._replace(vain=vain))
    verdict = state.verdict
    if rules.patience is not None:
        verdict = jnp.where((verdict == RUNNING) & (vain >= rules.patience), CONVERGED, verdict)
    return state._replace(best=best, verdict=verdict), loss


@jax.jit
def settle(function: Partial, state: State, batch: Any) -> tuple[Any, jax.Array, jax.Array]:
    """The params to return, their loss and the verdict.

    They are the best on the validation batch, if there is one and a loss on it was finite; else
    those reached, unless a stop rule was met before or their loss is not finite.
    """
    if state.best is not None:
        is_best = state.best.loss < jnp.inf
        state = state._replace(
            params=_select(is_best, state.best.params, state.params),
            measured=_select(is_best, state.best.params, state.measured),
        )
    reached, _ = function(state.params, batch)
    take_reached = (state.verdict == RUNNING) & jnp.isfinite(reached)
    measured, _ = function(state.measured, batch)
    loss = jnp.where(take_reached, reached, measured)
    has_stopped = (state.verdict == CONVERGED) | (state.verdict == REACHED)
    is_sound = take_reached | (has_stopped & jnp.isfinite(loss))
    params = _select(take_reached, state.params, state.measured)
    return params, loss, jnp.where(is_sound, state.verdict, DIVERGED)


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
