"""The compiled loop of a gradient descent: epochs of steps, each with a look at the stop rules.

One network descends alone, or several side by side with a leading axis on all that is their own:
optimizer, stream, state and records. The loop runs until the last of them has stopped; those that
have stopped before stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.optim.optimizers import Optimizer, call_update, global_norm
from jaxnn.run.programs import COMPILER_OPTIONS, program

RUNNING, CONVERGED, DIVERGED, REACHED = range(4)

EPOCHS_COMPARED = 5
"""Shuffled batches give two epochs other means by chance. By windows of 5 epochs, descents ended
where the mean over 40 keys came to a slope of the tolerance; by single epochs in half the time."""


class Rules(NamedTuple):
    """When a descent ends before its last epoch; None where a rule is not wanted.

    Attributes:
        tolerance: with losses of two consecutive steps that differ by less.
        epoch_tolerance: with mean losses of epochs that change by less an epoch: between the last
            `EPOCHS_COMPARED` and as many before.
        gradient_tolerance: with a gradient shorter than this, of all leaves together.
        target_loss: with a loss at or below.
        validation: a batch on which the loss is taken after every epoch.
        patience: after this many epochs without a lower loss on it, a uint32.
    """

    tolerance: Any = None
    epoch_tolerance: Any = None
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

    @property
    def shares(self) -> np.ndarray:
        """The share of each step in the rows of an epoch, `(steps,)`."""
        rows = np.full(self.steps, float(self.rows_a_step or 1))
        rows[-1] = self.remainder or rows[-1]
        return rows / rows.sum()


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
        loss: the last loss measured; the largest number before.
        verdict: RUNNING, or why it ended.
        best: by validation; None without.
        epoch_losses: mean losses of the last epochs, `(2 * EPOCHS_COMPARED,)`, the largest number
            before; None unless a tolerance compares them.
    """

    params: Any
    optimizer: Any
    measured: Any
    loss: jax.Array
    verdict: jax.Array
    best: Best | None
    epoch_losses: jax.Array | None


class Records(NamedTuple):
    """What happened in a chunk; a number for each network where there are several.

    Attributes:
        loss: before every step, `(capacity * steps, ...)`; only as many mean something as steps
            were made.
        num_steps: steps made, int32.
        validation: after every epoch on the validation batch, `(capacity, ...)`, in the same way;
            None without one.
    """

    loss: Any
    num_steps: Any
    validation: Any


@program(static_argnames=("loss_dtype", "validates", "compares_epochs"))
def begin(
    optimizer: Optimizer, start: Any, *, loss_dtype: Any, validates: bool, compares_epochs: bool
) -> State:
    """The state of a network before its first step."""
    unmet = _largest(loss_dtype)
    best = Best(start, unmet, jnp.uint32(0)) if validates else None
    wide = loss_dtype if loss_dtype.itemsize >= 4 else jnp.float32
    many = 2 * EPOCHS_COMPARED
    epoch_losses = jnp.full(many, _largest(wide)) if compares_epochs else None
    memory, verdict = optimizer.init(start), jnp.int32(RUNNING)
    return State(start, memory, start, unmet, verdict, best, epoch_losses)


def _largest(dtype: Any) -> jax.Array:
    """The largest number: an infinity would end the work where JAX looks for them."""
    return jnp.asarray(jnp.finfo(dtype).max, dtype)


@program(static_argnames=("cut", "capacity"), compiler_options=COMPILER_OPTIONS)
def descend(
    function: Partial,
    batch: Any,
    rules: Rules,
    optimizer: Optimizer,
    stream: jax.Array,
    state: State,
    first_epoch: jax.Array,
    num_epochs: jax.Array,
    *,
    cut: Cut,
    capacity: int,
) -> tuple[State, Records]:
    """One chunk: `num_epochs` epochs, at most `capacity`, or fewer if a stop rule is met."""
    step = partial(_step, function, rules)

    def take_step(place: jax.Array, rows: Any, axis: int | None, state: State, records: Records):
        runs = state.verdict == RUNNING
        stepped, loss = _each(step, state, (0, axis, 0))(optimizer, rows, state)
        num_steps = records.num_steps + runs.astype(jnp.int32)
        return stepped, records._replace(loss=_set(records.loss, loss, place), num_steps=num_steps)

    def compare_epochs(place: jax.Array, state: State, records: Records) -> State:
        def compare(losses: jax.Array, state: State) -> State:
            losses = jax.lax.dynamic_slice_in_dim(losses, place * cut.steps, cut.steps)
            return _each(partial(_compare_epochs, rules, cut), state, (1, 0))(losses, state)

        # Without a tolerance the comparison would take a tenth of the time of short epochs.
        is_wanted, keep = rules.epoch_tolerance > 0, lambda losses, state: state
        return jax.lax.cond(is_wanted, compare, keep, records.loss, state)

    def run_epoch(carry: tuple[jax.Array, State, Records]):
        epoch, before, records = carry
        place = epoch - first_epoch
        if cut.rows_a_step is None:
            state, records = take_step(place, batch, None, before, records)
        else:
            order = _each(partial(_shuffled, batch, epoch), before, (0,))(stream)
            state, records = _run_batches(take_step, place, order, batch, cut, before, records)
        if rules.epoch_tolerance is not None:
            state = compare_epochs(place, state, records)
        if rules.validation is not None:
            validate = _each(partial(_validate, function, rules), state, (0, 0))
            state, loss = validate(state, before.verdict == RUNNING)
            records = records._replace(validation=_set(records.validation, loss, place))
        return epoch + 1, state, records

    def more_epochs(carry: tuple[jax.Array, State, Records]) -> jax.Array:
        return (carry[0] < first_epoch + num_epochs) & jnp.any(carry[1].verdict == RUNNING)

    def empty(length: int) -> jax.Array:
        return jnp.zeros((length, *state.verdict.shape), state.loss.dtype)

    validation = None if rules.validation is None else empty(capacity)
    records = Records(empty(capacity * cut.steps), jnp.zeros_like(state.verdict), validation)
    return jax.lax.while_loop(more_epochs, run_epoch, (first_epoch, state, records))[1:]


def _each(function: Callable[..., Any], state: State, axes: tuple[int | None, ...]):
    """The function of one network, or of each where the state has an axis of networks."""
    return jax.vmap(function, axes) if state.verdict.ndim else function


def _shuffled(batch: Any, epoch: jax.Array, stream: jax.Array) -> jax.Array:
    """The rows of a network's epoch, in an order of its own."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    key = jax.random.fold_in(stream, epoch)
    return jax.random.permutation(key, jnp.arange(rows, dtype=jnp.int32))


def _run_batches(
    take_step,
    epoch: jax.Array,
    order: jax.Array,
    batch: Any,
    cut: Cut,
    state: State,
    records: Records,
):
    """The steps of one epoch, on the rows in this order, `(rows,)` or `(networks, rows)`."""
    size = cut.rows_a_step or order.shape[-1]
    steps, rest = divmod(order.shape[-1], size)
    first = epoch * jnp.uint32(cut.steps)

    def step_on(place: jax.Array, places: jax.Array, state: State, records: Records):
        rows = jax.tree.map(lambda leaf: leaf[places], batch)
        return take_step(place, rows, 0, state, records)

    def run_batch(carry):
        number, state, records = carry
        places = jax.lax.dynamic_slice_in_dim(order, number * size, size, axis=-1)
        return number + 1, *step_on(first + number, places, state, records)

    def more_batches(carry) -> jax.Array:
        return (carry[0] < steps) & jnp.any(carry[1].verdict == RUNNING)

    start = (jnp.uint32(0), state, records)
    number, state, records = jax.lax.while_loop(more_batches, run_batch, start)
    if not cut.remainder:
        return state, records
    return step_on(first + number, order[..., -rest:], state, records)


def _step(
    function: Partial, rules: Rules, optimizer: Optimizer, rows: Any, state: State
) -> tuple[State, jax.Array]:
    """Loss and gradient of the rows, the stop rules, and one step of the optimizer."""
    loss, gradients = function(state.params, rows)
    is_flat = jnp.zeros((), bool)
    if rules.tolerance is not None:
        is_flat = jnp.abs(loss - state.loss) < rules.tolerance.astype(loss.dtype)
    if rules.gradient_tolerance is not None:
        norm = global_norm(gradients)
        is_flat |= norm < rules.gradient_tolerance.astype(norm.dtype)
    is_finite = jnp.isfinite(loss)
    verdict = jnp.where(is_flat, CONVERGED, RUNNING)
    verdict = jnp.where(is_finite, verdict, DIVERGED)
    if rules.target_loss is not None:
        is_reached = is_finite & (loss <= rules.target_loss.astype(loss.dtype))
        verdict = jnp.where(is_reached, REACHED, verdict)
    updates, optimizer_state = update_of(
        optimizer, function, rows, loss, gradients, state.optimizer, state.params
    )
    stepped = State(
        params=jax.tree.map(jnp.add, state.params, updates),
        optimizer=optimizer_state,
        measured=_select(is_finite, state.params, state.measured),
        loss=loss,
        verdict=verdict.astype(jnp.int32),
        best=state.best,
        epoch_losses=state.epoch_losses,
    )
    return _select(state.verdict == RUNNING, stepped, state), loss


def update_of(
    optimizer: Optimizer,
    function: Partial,
    rows: Any,
    loss: jax.Array,
    gradients: Any,
    state: Any,
    params: Any,
) -> Any:
    """Updates and state of a step on these rows, with the extra arguments that it takes."""
    loss_on_rows = Partial(_loss_alone, function, rows)
    extra = {"value": loss, "grad": gradients, "value_fn": loss_on_rows}
    return call_update(optimizer.update, gradients, state, params, **extra)


@jax.custom_jvp
def _loss_alone(function: Partial, rows: Any, params: Any) -> jax.Array:
    """The loss, which has the function's own gradient as its derivative by the params."""
    return function(params, rows)[0]


@_loss_alone.defjvp
def _loss_and_slope(primals: tuple[Partial, Any, Any], tangents: tuple[Any, Any, Any]):
    function, rows, params = primals
    loss, gradients = function(params, rows)
    products = jax.tree.map(lambda g, t: jnp.sum(g * t), gradients, tangents[2])
    return loss, jax.tree.reduce(jnp.add, products).astype(loss.dtype)


def _compare_epochs(rules: Rules, cut: Cut, losses: jax.Array, state: State) -> State:
    """Looks at the mean loss of an epoch's rows; `losses` are those of its steps."""
    known: Any = state.epoch_losses
    mean = jnp.sum(losses.astype(known.dtype) * cut.shares.astype(known.dtype), keepdims=True)
    known = jnp.concatenate([known[1:], mean])
    before, after = jnp.mean(known.reshape(2, EPOCHS_COMPARED), axis=1)
    is_flat = jnp.abs(after - before) < EPOCHS_COMPARED * rules.epoch_tolerance.astype(known.dtype)
    verdict = jnp.where(is_flat, jnp.int32(CONVERGED), state.verdict)
    compared = state._replace(verdict=verdict, epoch_losses=known)
    return _select(state.verdict == RUNNING, compared, state)


def _validate(
    function: Partial, rules: Rules, state: State, ran: jax.Array
) -> tuple[State, jax.Array]:
    """Looks at the validation batch, at the params that would be returned if this were the end.

    A network that had stopped before the epoch did not run, and is left alone.
    """
    best: Any = state.best
    here = _select(state.verdict == RUNNING, state.params, state.measured)
    loss, _ = function(here, rules.validation)
    is_better = jnp.isfinite(loss) & (loss < best.loss)
    vain = jnp.where(is_better, jnp.uint32(0), best.vain + 1)
    best = _select(is_better, Best(here, loss, vain), best._replace(vain=vain))
    verdict = state.verdict
    if rules.patience is not None:
        verdict = jnp.where((verdict == RUNNING) & (vain >= rules.patience), CONVERGED, verdict)
    return _select(ran, state._replace(best=best, verdict=verdict), state), loss


@program()
def settle(function: Partial, batch: Any, state: State) -> tuple[Any, jax.Array, jax.Array]:
    """The params to return, their loss and the verdict; of each network if there are several."""
    return _each(partial(_settle, function, batch), state, (0,))(state)


def _settle(function: Partial, batch: Any, state: State) -> tuple[Any, jax.Array, jax.Array]:
    """The best on the validation batch, if there is one and a loss on it was finite.

    Else those reached, unless a stop rule was met before or their loss is not finite.
    """
    if state.best is not None:
        is_best = state.best.loss < _largest(state.best.loss.dtype)
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


def _set(records: jax.Array, losses: jax.Array, place: jax.Array) -> jax.Array:
    """A row of the records; `.at[place]` would check the place in four more kernels."""
    return jax.lax.dynamic_update_index_in_dim(records, losses, place, 0)


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
