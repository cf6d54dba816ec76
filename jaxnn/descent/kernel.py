"""Init and step of gradient descent, and the compiled loop that is their fast form.

`descent_kernel` is the specification: one step at a time, pure, without stop rules. `run_epochs`
takes the same steps. It shuffles once an epoch, checks the stop rules at every step, and the
validation batch after every epoch. It runs one network, or several side by side with a leading
axis on all that is their own: optimizer, key, state and records. The loop ends when the last of
them has stopped; a network that stopped earlier keeps its state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.optim.optimizers import Optimizer, call_update, check_optimizer
from jaxnn.run.checks import as_count, as_flag, as_key, check_floats, is_traced
from jaxnn.run.programs import COMPILER_OPTIONS, own_settings, program
from jaxnn.run.random import fold_in, permutation
from jaxnn.run.show import readable
from jaxnn.typing import Function, PyTree, ValueAndGradFn, traits_of

TAG = 0x47524144
"""Folded into the key, so that no other trainer draws the same from it."""

LOSS_TAG = 2**32 - 1
"""Folded into the key of a network, as the numbers of epochs are; there is no epoch of this one."""

RUNNING, CONVERGED, DIVERGED, REACHED = range(4)

EPOCHS_COMPARED = 5
"""Shuffled batches give two epochs other means by chance. By windows of 5 epochs, descents ended
where the mean over 40 keys came to a slope of the tolerance; by single epochs in half the time."""


@readable
class State(NamedTuple):
    """Where a descent stands: all that its next step needs, besides the key and the batch.

    Attributes:
        step: steps made, uint32.
        params: the params after them.
        optimizer_state: what the optimizer remembers.
    """

    step: jax.Array
    params: PyTree
    optimizer_state: PyTree


@readable
class Info(NamedTuple):
    """What a step measured.

    Attributes:
        loss: the loss on the rows of the step, at the params before the step.
    """

    loss: jax.Array


class Kernel(NamedTuple):
    """A descent as a pair of pure functions, for `jax.jit`, `jax.vmap` and `jax.lax.scan`.

    Attributes:
        init: `init(params, batch)` -> the `State` before the first step.
        step: `step(key, state, batch)` -> the next `State`, and an `Info`. The key is that of the
            network, the same at every step.
    """

    init: Callable[[PyTree, PyTree], State]
    step: Callable[[jax.Array, State, PyTree], tuple[State, Info]]


def descent_kernel(
    value_and_grad_fn: ValueAndGradFn,
    optimizer: Optimizer,
    batch_size: int | None = None,
    drop_remainder: bool = True,
    with_key: bool = False,
) -> Kernel:
    """Return init and step of `jaxnn.gradient_descent`, for loops of your own.

    Each step takes the loss and its gradient on its rows, then one step of the optimizer. With a
    batch size, each epoch permutes the rows by the key and the number of the epoch alone, and its
    steps take them from first to last. Every step draws the whole permutation anew.

    `jax.lax.scan` over `step` from `init`, with the key `network_key(key)`, equals
    `gradient_descent(key, ...)` without stop rules; from `result.state` it continues that run. The
    bits are equal too if it is compiled by `jax.jit` with the optimizer as an argument, whose
    numbers may round differently as constants, and with `jaxnn.chains.COMPILER_OPTIONS` as its
    `compiler_options`. Several networks under `jax.vmap` are equal to rounding.

    Args:
        value_and_grad_fn: as `jaxnn.gradient_descent` takes it, and so the others.
        optimizer: as in `jaxnn.optimizers`, or an optax transformation; no `each`.
        batch_size: rows a step; None, or at least as many as there are, means all rows.
        drop_remainder: whether to drop the rows that are left after the last full batch of an
            epoch; otherwise they make a smaller step.
        with_key: whether the function takes a key, another one at every step.

    Returns:
        A `Kernel`.

    Raises:
        TypeError: if the function is not callable, or the optimizer has no `init` and `update`;
            by `init`, if the params are not floats of one dtype; by `step`, if the key is not a
            typed key.
        ValueError: if the batch size is below 1, or missing with `drop_remainder=False`. Both
            functions raise it too if the leaves of the batch to be cut differ in rows.

    Example:
        >>> import jaxnn
        >>> value_and_grad_fn = jax.value_and_grad(lambda p, batch: jnp.sum((p - batch) ** 2))
        >>> kernel = descent_kernel(value_and_grad_fn, jaxnn.optimizers.sgd(0.25))
        >>> key, batch = network_key(jax.random.key(0)), jnp.ones(2)
        >>> state, infos = jax.lax.scan(
        ...     lambda state, _: kernel.step(key, state, batch),
        ...     kernel.init(jnp.zeros(2), batch), length=3,
        ... )
        >>> state.params, infos.loss
        (Array([0.875, 0.875], dtype=float32), Array([2.   , 0.5  , 0.125], dtype=float32))
    """
    check_optimizer(optimizer)
    if not callable(value_and_grad_fn):
        given = type(value_and_grad_fn).__name__
        raise TypeError(f"value_and_grad_fn must be callable; got a {given}")
    function = Partial(value_and_grad_fn)
    as_flag("with_key", with_key)
    if batch_size is not None:
        batch_size = as_count("batch_size", batch_size, 1)

    def init(params: PyTree, batch: PyTree) -> State:
        as_plan(batch, batch_size, drop_remainder)
        params = jax.tree.map(jnp.asarray, params)
        check_floats(params)
        traits_of(value_and_grad_fn).validate(params, batch)
        return State(jnp.uint32(0), params, jax.tree.map(jnp.asarray, optimizer.init(params)))

    def step(key: jax.Array, state: State, batch: PyTree) -> tuple[State, Info]:
        key, plan = as_key("key", key, traced=True), as_plan(batch, batch_size, drop_remainder)
        if plan.batch_size is None:
            return take_step(key, batch, state)
        epoch, number = jnp.divmod(state.step, jnp.uint32(plan.steps_per_epoch))
        first = number * jnp.uint32(plan.batch_size)
        with own_settings():
            order = _shuffled(plan, epoch, key)

        def on_rows(size: int) -> Callable[[State], tuple[State, Info]]:
            places = jax.lax.dynamic_slice_in_dim(order, first, size)
            return partial(take_step, key, _rows_of(batch, places))

        if not plan.remainder:
            return on_rows(plan.batch_size)(state)
        is_full = first + plan.batch_size <= plan.num_rows
        return jax.lax.cond(is_full, on_rows(plan.batch_size), on_rows(plan.remainder), state)

    # The count cannot wrap: no step follows the largest. The driver has a select there too, for its
    # stop rules, and XLA fuses multiplications and additions by what they are used for: without
    # this one the moments of Adam round differently.
    def take_step(key: jax.Array, rows: PyTree, state: State) -> tuple[State, Info]:
        after, info = _take_step(function, optimizer, state, rows, key if with_key else None)
        return _select(state.step < np.uint32(2**32 - 1), after, state), info

    return Kernel(init, step)


def network_key(key: jax.Array, network: int | jax.Array | None = None) -> jax.Array:
    """Return the key of a network's steps in `jaxnn.gradient_descent(key, ...)`.

    Args:
        key: a typed key, that of the whole descent.
        network: the network's index where `num_networks` is given; None for a single one.

    Returns:
        A typed key, for `Kernel.step`.

    Raises:
        TypeError: if the key is not a typed key.
        ValueError: if the index is negative.

    Example:
        >>> key = jax.random.key(0)
        >>> network_key(key, 3) == network_key(jax.random.fold_in(key, 3))
        Array(True, dtype=bool)
    """
    key = as_key("key", key, traced=True)
    if network is not None:
        number = network if is_traced(network) else as_count("network", network, 0, 2**31 - 1)
        key = jax.random.fold_in(key, number)
    return jax.random.fold_in(key, TAG)


class BatchPlan(NamedTuple):
    """How an epoch is cut into steps."""

    batch_size: int | None = None  # rows of a step; None if the batch is taken whole, unshuffled
    num_rows: int = 1  # rows of the batch; 1 if it is taken whole
    remainder: int = 0  # rows of a last, smaller step; 0 for none
    with_key: bool = False  # whether the loss of a step takes a key

    @property
    def rows_of_steps(self) -> np.ndarray:
        """Rows of each step of an epoch, `(steps_per_epoch,)`, int64."""
        num_full, has_rest = self.num_rows // (self.batch_size or 1), self.remainder > 0
        return np.repeat([self.batch_size or 1, self.remainder], [num_full, has_rest])

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the smaller one included."""
        return self.num_rows // (self.batch_size or 1) + (self.remainder > 0)


def as_plan(batch: PyTree, batch_size: int | None, drop_remainder: bool) -> BatchPlan:
    """How an epoch is cut; `batch` need have no rows if it is taken whole."""
    if batch_size is None:
        if not drop_remainder:
            raise ValueError("batch_size must be given with drop_remainder=False; got None")
        return BatchPlan()
    batch_size = as_count("batch_size", batch_size, 1)
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            "batch must have the same number of rows, at least 1, in every leaf to be cut by "
            f"batch_size; got shapes {shapes}"
        )
    rows = shapes[0][0]
    if batch_size >= rows:
        return BatchPlan()
    return BatchPlan(batch_size, rows, 0 if drop_remainder else rows % batch_size)


class Rules(NamedTuple):
    """When a descent ends before its last epoch, and its metric; None for what is not wanted."""

    # The losses of two consecutive steps differ by less.
    tolerance: np.float32 | jax.Array | None = None
    # The mean losses of `EPOCHS_COMPARED` epochs change by less an epoch.
    epoch_tolerance: np.float32 | jax.Array | None = None
    target_loss: np.ndarray | jax.Array | None = None  # a loss is at or below
    validation_batch: PyTree = None  # on this the loss is taken after every epoch
    patience: np.uint32 | jax.Array | None = None  # epochs without an improvement on it
    min_delta: np.float32 | jax.Array | None = None  # by more than this, at least 0
    metric: Partial | None = None  # recorded after every epoch


class Best(NamedTuple):
    """The params of the lowest loss on the validation batch, and epochs since an improvement."""

    params: PyTree
    loss: jax.Array
    loss_to_beat: jax.Array  # at the last improvement
    epochs_since_improvement: jax.Array


class RunState(NamedTuple):
    """Where the driver stands: the kernel's state, and what the stop rules need."""

    state: State
    last_finite_params: PyTree  # the last whose loss was measured and finite
    loss: jax.Array  # the last one measured; inf before the first
    lowest_loss: jax.Array  # the lowest finite one; inf if there was none
    status_code: jax.Array  # RUNNING, or why it ended
    best: Best | None  # None without a validation batch
    epoch_losses: jax.Array | None  # means, `(2 * EPOCHS_COMPARED,)`; None unless compared


class EpochRecords(NamedTuple):
    """What is recorded after every epoch; None where it is not wanted."""

    validation_loss: PyTree = None
    metric: PyTree = None
    validation_metric: PyTree = None


Chunk = tuple[RunState, jax.Array, EpochRecords]
"""The state, the losses before the steps, and the records of the epochs, of `run_epochs`."""


@program(static_argnames="loss_dtype")
def init(rules: Rules, optimizer: Optimizer, params: PyTree, *, loss_dtype: np.dtype) -> RunState:
    """The state of a network before its first step."""
    state = State(jnp.uint32(0), params, optimizer.init(params))
    unmet = jnp.asarray(jnp.inf, loss_dtype)
    best = None if rules.validation_batch is None else Best(params, unmet, unmet, jnp.uint32(0))
    wide = loss_dtype if loss_dtype.itemsize >= 4 else jnp.float32
    means = None if rules.epoch_tolerance is None else jnp.full(2 * EPOCHS_COMPARED, jnp.inf, wide)
    return RunState(state, params, unmet, unmet, jnp.int32(RUNNING), best, means)


@program(static_argnames=("plan", "capacity", "tile"), compiler_options=COMPILER_OPTIONS)
def run_epochs(
    function: Partial,
    batch: PyTree,
    rules: Rules,
    optimizer: Optimizer,
    key: jax.Array,
    start: RunState,
    first_epoch: jax.Array,
    num_epochs: jax.Array,
    *,
    plan: BatchPlan,
    capacity: int,
    tile: int | None,
) -> Chunk:
    """One chunk: `num_epochs` epochs, at most `capacity`, or fewer if a stop rule is met.

    Returns the state, the losses before the steps and the records of the epochs, with steps and
    epochs in the last axis. What stands there beyond those that were made means nothing.
    """
    shared = function, batch, rules, (first_epoch, num_epochs), plan, capacity
    return _in_tiles(partial(_run_tile, *shared), tile, optimizer, key, start)


def _in_tiles(function: Function, tile: int | None, *own: PyTree) -> PyTree:
    """Apply a function of one tile of networks to several tiles, one after the other."""
    if tile is None or jax.tree.leaves(own)[0].shape[0] == tile:
        return function(*own)
    tiles = jax.tree.map(lambda leaf: leaf.reshape(-1, tile, *leaf.shape[1:]), own)
    results = jax.lax.map(lambda one: function(*one), tiles)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)


def _run_tile(
    function: Partial,
    batch: PyTree,
    rules: Rules,
    epochs: tuple[jax.Array, jax.Array],
    plan: BatchPlan,
    capacity: int,
    optimizer: Optimizer,
    key: jax.Array,
    start: RunState,
) -> Chunk:
    """The chunk of one network, or of a tile of them; `epochs` are the first, and how many."""
    first_epoch, num_epochs = epochs

    # A step of every network, on all rows or on those at `places`, an array for each network.
    def take_step(number: jax.Array, places: jax.Array | None, run: RunState, losses: jax.Array):
        rows, axis = (batch, None) if places is None else (_rows_of(batch, places), 0)
        step = _each(run, partial(_step, function, rules), (0, axis, 0, 0))
        run, loss = step(optimizer, rows, run, key if plan.with_key else None)
        return run, _set(losses, loss, number)

    # The steps of one epoch, then the rules that look at whole epochs.
    def run_epoch(carry):
        epoch, before, losses, records = carry
        number = epoch - first_epoch
        first = number * jnp.uint32(plan.steps_per_epoch)
        if plan.batch_size is None:
            run, losses = take_step(first, None, before, losses)
        else:
            order = _each(before, partial(_shuffled, plan, epoch), (0,))(key)
            run, losses = _run_batches(take_step, plan, first, order, before, losses)
        if rules.epoch_tolerance is not None:
            run = _compare_epochs(rules.epoch_tolerance, plan, first, losses, run)
        run, seen = _measure(function, rules, batch, before, run)
        records = jax.tree.map(lambda kept, new: _set(kept, new, number), records, seen)
        return epoch + 1, run, losses, records

    def more_epochs(carry) -> jax.Array:
        return (carry[0] < first_epoch + num_epochs) & jnp.any(carry[1].status_code == RUNNING)

    def empty(length: int, leaf: jax.Array) -> jax.Array:
        return jnp.zeros((length, *leaf.shape), leaf.dtype)

    _, seen = jax.eval_shape(partial(_measure, function, rules, batch), start, start)
    records = jax.tree.map(partial(empty, capacity), seen)
    carry = first_epoch, start, empty(capacity * plan.steps_per_epoch, start.loss), records
    _, run, losses, records = jax.lax.while_loop(more_epochs, run_epoch, carry)
    return run, *jax.tree.map(jnp.transpose, (losses, records))


def _each(run: RunState, function: Function, axes: tuple[int | None, ...]):
    """The function of one network, or of each where the state has an axis of networks.

    An axis of length 1 in place of the fork took 17 % of the time on 2-3-3 (227,000 and 189,000
    steps a second), and `vmap` would turn a user's `lax.cond` into both branches.
    """
    return jax.vmap(function, axes) if run.status_code.ndim else function


def _run_batches(
    take_step: Callable[..., tuple[RunState, jax.Array]],
    plan: BatchPlan,
    first: jax.Array,
    order: jax.Array,
    run: RunState,
    losses: jax.Array,
) -> tuple[RunState, jax.Array]:
    """The steps of one epoch, on the rows in this order, `(rows,)` or `(networks, rows)`."""
    size = plan.batch_size or plan.num_rows

    def run_batch(carry):
        place, run, losses = carry
        places = jax.lax.dynamic_slice_in_dim(order, place * size, size, axis=-1)
        return place + 1, *take_step(first + place, places, run, losses)

    def more_batches(carry) -> jax.Array:
        return (carry[0] < plan.num_rows // size) & jnp.any(carry[1].status_code == RUNNING)

    carry = jnp.uint32(0), run, losses
    place, run, losses = jax.lax.while_loop(more_batches, run_batch, carry)
    if plan.remainder:
        run, losses = take_step(first + place, order[..., -plan.remainder :], run, losses)
    return run, losses


def _shuffled(plan: BatchPlan, epoch: jax.Array, key: jax.Array) -> jax.Array:
    """The rows of a network's epoch, in an order of its own."""
    return permutation(fold_in(key, epoch), plan.num_rows)


def _rows_of(batch: PyTree, places: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[places], batch)


def call_with_key(function: Partial, key: jax.Array, params: PyTree, batch: PyTree) -> PyTree:
    """Calls a function whose last argument is a key."""
    return function(params, batch, key)


def _take_step(
    function: Partial, optimizer: Optimizer, state: State, rows: PyTree, key: jax.Array | None
) -> tuple[State, Info]:
    """The loss and its gradient on the rows, then one step of the optimizer.

    A loss that takes a key gets one made of the network's key and the number of the step.
    """
    if key is not None:
        key = fold_in(fold_in(key, jnp.uint32(LOSS_TAG)), state.step)
        function = Partial(call_with_key, function, key)
    loss, gradients = function(state.params, rows)
    told = rows, loss, gradients, state.optimizer_state, state.params
    updates, optimizer_state = update_of(optimizer.update, function, *told)
    params = jax.tree.map(jnp.add, state.params, updates)
    return State(state.step + 1, params, optimizer_state), Info(loss)


def update_of(
    update: Function,
    function: Partial,
    rows: PyTree,
    loss: jax.Array,
    gradients: PyTree,
    optimizer_state: PyTree,
    params: PyTree,
) -> tuple[PyTree, PyTree]:
    """Updates and state of a step on these rows, with the extra arguments that it takes."""
    extra = {"value": loss, "grad": gradients, "value_fn": Partial(_loss_alone, function, rows)}
    return call_update(update, gradients, optimizer_state, params, **extra)


@jax.custom_jvp
def _loss_alone(function: Partial, rows: PyTree, params: PyTree) -> jax.Array:
    """The loss, which has the function's own gradient as its derivative by the params."""
    return function(params, rows)[0]


@_loss_alone.defjvp
def _loss_and_slope(primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]):
    function, rows, params = primals
    loss, gradients = function(params, rows)
    products = jax.tree.map(lambda g, t: jnp.sum(g * t), gradients, tangents[2])
    return loss, jax.tree.reduce(jnp.add, products).astype(loss.dtype)


def _step(
    function: Partial,
    rules: Rules,
    optimizer: Optimizer,
    rows: PyTree,
    run: RunState,
    key: jax.Array | None,
) -> tuple[RunState, jax.Array]:
    """A step of the kernel, and a look at the stop rules; nothing where one was met before.

    One network would do without that select, 4 % faster, but then XLA rounds unlike the kernel.
    """
    state, (loss,) = _take_step(function, optimizer, run.state, rows, key)
    is_finite = jnp.isfinite(loss)
    status_code = jnp.where(is_finite, jnp.int32(RUNNING), DIVERGED)
    if rules.tolerance is not None:
        is_flat = jnp.abs(loss - run.loss) < rules.tolerance.astype(loss.dtype)
        status_code = jnp.where(is_finite & is_flat, CONVERGED, status_code)
    if rules.target_loss is not None:
        is_reached = is_finite & (loss <= rules.target_loss.astype(loss.dtype))
        status_code = jnp.where(is_reached, REACHED, status_code)
    stepped = run._replace(
        state=state,
        last_finite_params=_select(is_finite, run.state.params, run.last_finite_params),
        loss=loss,
        lowest_loss=jnp.where(is_finite & (loss < run.lowest_loss), loss, run.lowest_loss),
        status_code=status_code,
    )
    return _select(run.status_code == RUNNING, stepped, run), loss


def _compare_epochs(
    tolerance: np.float32 | jax.Array,
    plan: BatchPlan,
    first: jax.Array,
    losses: jax.Array,
    run: RunState,
) -> RunState:
    """Looks at the mean loss of an epoch's rows; its steps begin at `first` of the losses."""
    shares = plan.rows_of_steps / plan.rows_of_steps.sum()

    def compare(losses: jax.Array, run: RunState) -> RunState:
        known: Any = run.epoch_losses
        mean = jnp.sum(losses.astype(known.dtype) * shares.astype(known.dtype), keepdims=True)
        known = jnp.concatenate([known[1:], mean])
        before, after = jnp.mean(known.reshape(2, EPOCHS_COMPARED), axis=1)
        limit = EPOCHS_COMPARED * tolerance.astype(known.dtype)
        status_code = jnp.where(jnp.abs(after - before) < limit, CONVERGED, run.status_code)
        compared = run._replace(status_code=status_code, epoch_losses=known)
        return _select(run.status_code == RUNNING, compared, run)

    def compare_each(run: RunState) -> RunState:
        own = jax.lax.dynamic_slice_in_dim(losses, first, plan.steps_per_epoch)
        return _each(run, compare, (1, 0))(own, run)

    # Without a tolerance the comparison would take a tenth of the time of short epochs.
    return jax.lax.cond(tolerance > 0, compare_each, lambda run: run, run)


def _measure(
    function: Partial, rules: Rules, batch: PyTree, before: RunState, run: RunState
) -> tuple[RunState, EpochRecords]:
    """Looks at the validation batch and at the metric after an epoch."""
    seen, held_out = EpochRecords(), rules.validation_batch
    if held_out is not None:
        validate = _each(run, partial(_validate, function, rules), (0, 0))
        run, loss = validate(run, before.status_code == RUNNING)
        seen = seen._replace(validation_loss=loss)
    if rules.metric is not None:
        metric = _each(run, partial(_metric, rules.metric), (None, 0))
        seen = seen._replace(metric=metric(batch, run))
        if held_out is not None:
            seen = seen._replace(validation_metric=metric(held_out, run))
    return run, seen


def _current(run: RunState) -> PyTree:
    """The params that would be returned if this were the end."""
    return _select(run.status_code == RUNNING, run.state.params, run.last_finite_params)


def _metric(metric: Partial, rows: PyTree, run: RunState) -> jax.Array:
    return metric(_current(run), rows)


def _validate(
    function: Partial, rules: Rules, run: RunState, ran: jax.Array
) -> tuple[RunState, jax.Array]:
    """Looks at the validation batch.

    A network that had stopped before the epoch did not run, and is left alone.
    """
    here = _current(run)
    loss, _ = function(here, rules.validation_batch)
    old: Any = run.best
    is_finite, limit = jnp.isfinite(loss), old.loss_to_beat
    if rules.min_delta is not None:
        limit = limit - rules.min_delta.astype(loss.dtype)
    is_improvement = is_finite & (loss < limit)
    since = jnp.where(is_improvement, jnp.uint32(0), old.epochs_since_improvement + 1)
    params, lowest = _select(is_finite & (loss < old.loss), (here, loss), (old.params, old.loss))
    best = Best(params, lowest, jnp.where(is_improvement, loss, old.loss_to_beat), since)
    status_code = run.status_code
    if rules.patience is not None:
        is_over = (status_code == RUNNING) & (since >= rules.patience)
        status_code = jnp.where(is_over, CONVERGED, status_code)
    return _select(ran, run._replace(best=best, status_code=status_code), run), loss


@program(static_argnames="tile")
def finalize(
    function: Partial, batch: PyTree, run: RunState, *, tile: int | None
) -> tuple[PyTree, jax.Array, jax.Array]:
    """The params to return, their loss and the status code; of each network if there are several.

    The params are the best on the validation batch, if there is one and a loss on it was finite;
    else those reached, unless a stop rule was met before or their loss is not finite.
    """

    def of_one(run: RunState) -> tuple[PyTree, jax.Array, jax.Array]:
        reached = _best(run, run.state.params)
        measured = _best(run, run.last_finite_params)
        loss_reached, loss_measured = function(reached, batch)[0], function(measured, batch)[0]
        take_reached = (run.status_code == RUNNING) & jnp.isfinite(loss_reached)
        loss = jnp.where(take_reached, loss_reached, loss_measured)
        has_stopped = (run.status_code == CONVERGED) | (run.status_code == REACHED)
        is_sound = take_reached | (has_stopped & jnp.isfinite(loss))
        status_code = jnp.where(is_sound, run.status_code, DIVERGED)
        return _select(take_reached, reached, measured), loss, status_code

    return _in_tiles(_each(run, of_one, (0,)), tile, run)


@program()
def best_params(run: RunState) -> PyTree:
    """The best params so far on the validation batch, else the last with a finite loss."""
    return _each(run, _best, (0, 0))(run, run.last_finite_params)


def _best(run: RunState, otherwise: PyTree) -> PyTree:
    if run.best is None:
        return otherwise
    return _select(jnp.isfinite(run.best.loss), run.best.params, otherwise)


def _set(records: jax.Array, losses: jax.Array, place: jax.Array) -> jax.Array:
    """A row of the records; `.at[place]` would check the place in four more kernels."""
    return jax.lax.dynamic_update_index_in_dim(records, losses, place, 0)


def _select(condition: jax.Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
