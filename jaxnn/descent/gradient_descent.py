"""Gradient descent: follow the gradient down, on all rows or on shuffled batches of them.

Each epoch shuffles the rows and cuts them into batches. For each batch: the loss and its
gradient, a look at the stop rules, then one step of the optimizer. After it, if there is a
validation batch, the loss on that. The whole loop is compiled. Here are the entry point, the
checks of what it is given, and the result.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.descent import kernel, replicas
from jaxnn.descent.history import (
    EVALUATIONS_PER_GRADIENT,
    Blocks,
    History,
    num_steps,
    run_descent,
)
from jaxnn.descent.kernel import BatchPlan, EpochRecords, Rules, State
from jaxnn.descent.replicas import Networks
from jaxnn.optim.optimizers import Each, Optimizer, check_optimizer, check_update, each, sgd
from jaxnn.optim.schedules import Schedule
from jaxnn.run import checks, loop
from jaxnn.run.checkpoint import Checkpoint, check_saveable
from jaxnn.run.fingerprint import as_metadata, fingerprint, run_metadata
from jaxnn.run.programs import own_settings, run_at_once
from jaxnn.run.show import Table, readable, summary
from jaxnn.typing import Device, MetricFn, PyTree, Status, ValueAndGradFn, traits_of

CONSTANT_MARGIN = 1e-3
"""Losses that are lower than that of the best constant answer by a smaller share are no better."""


@readable
class DescentHistory(NamedTuple):
    """The loss at every step, ready to plot; of long descents at every second, fourth and so on.

    Of several networks the losses and metrics have a first axis of networks, with nan from where
    a network had stopped. What is not recorded is None.

    Attributes:
        evaluations: evaluations made by a network up to and with each step, in units of one loss
            on the whole batch, `(records,)`, float64.
        loss: loss of the step's batch *before* the step, `(records,)`.
        validation_loss: loss on the validation batch after every epoch, `(epochs,)`.
        metric: `metric_fn` on the whole batch after every epoch, `(epochs,)`.
        validation_metric: the same on the validation batch.
        epoch_evaluations: evaluations made up to and with each of these epochs, float64.
    """

    evaluations: np.ndarray
    loss: np.ndarray
    validation_loss: np.ndarray | None = None
    metric: np.ndarray | None = None
    validation_metric: np.ndarray | None = None
    epoch_evaluations: np.ndarray | None = None


@readable
class GradientDescentResult(NamedTuple):
    """Where a gradient descent ended; of several networks, arrays with a first axis of networks.

    Printed, it is a summary of a few lines.

    Attributes:
        params: the params reached; if it diverged, the last whose loss was finite; with a
            validation batch, those at the end of the epoch with the lowest loss on it.
        loss: their loss on the whole batch; inf if it is not finite.
        num_evaluations: losses on the whole batch that the work amounts to: a gradient step
            counts 3 times its share of the rows, the loss reported counts 1; rounded up. Losses
            on a validation batch, and those that an optimizer evaluates itself, are not counted.
        num_steps: gradients evaluated; the last is that at which it converged or diverged.
        status: "completed", "converged", "diverged", "interrupted", "reached", "stopped", or
            "nonfinite" if no loss was ever finite; a `Status`.
        history: the loss at every step.
        state: the `State` after the last step, from which `descent_kernel(...).step` goes on.
        notes: what else the summary says: that nothing changed the params, or that the loss is
            that of the best constant answer.
    """

    params: PyTree
    loss: Any
    num_evaluations: Any
    num_steps: Any
    status: Any
    history: DescentHistory
    state: State
    notes: tuple[str, ...] = ()

    def improvements(self) -> list[loop.Improvement]:
        """Return the steps before which the loss was lower than ever; `print` each for a line.

        The metric is that after the last whole epoch before, nan in the first one. Of several
        networks, these are the steps of the one that ended with the lowest loss.
        """
        best, history, metrics = np.argmin(self.loss), self.history, None
        if history.metric is not None and history.epoch_evaluations is not None:
            over = np.searchsorted(history.epoch_evaluations, history.evaluations)  # before a step
            metrics = np.append(np.nan, np.atleast_2d(history.metric)[best])[over]
        evaluations = np.ceil(history.evaluations).astype(np.int64)
        return loop.improvements_of(evaluations, np.atleast_2d(history.loss)[best], metrics)

    def _table(self) -> Table:
        """The summary."""
        networks = f" of {len(self.loss):,} networks" if np.ndim(self.loss) else ""
        steps = {"steps": f"{np.sum(self.num_steps):,}"}
        metric, held_out = self.history.metric, self.history.validation_metric
        seen, ends = self.history.validation_loss, self.history.epoch_evaluations
        if seen is not None and ends is not None and np.any(np.isfinite(seen)) and not networks:
            best = np.nanargmin(seen)
            after = f"after {ends[best]:,.0f} evaluations"
            steps["steps"] += f"; lowest validation loss {seen[best]:.6g}, {after}"
        if metric is not None and metric.size and not networks:
            steps["metric"] = f"{metric[-1]:.6g} after the last epoch"
            if held_out is not None:
                steps["metric"] += f", {held_out[-1]:.6g} on the validation batch"
        measured = self.status, self.loss, self.num_evaluations
        hint = "result.params, result.history.loss"
        return summary(
            f"gradient descent{networks}", *measured, details=steps, notes=self.notes, hint=hint
        )


def gradient_descent(
    key: jax.Array,
    value_and_grad_fn: ValueAndGradFn,
    params: PyTree,
    batch: PyTree,
    *,
    num_epochs: int,
    learning_rate: float | Schedule | Sequence[float] | np.ndarray | jax.Array | None = None,
    optimizer: Optimizer | Each | None = None,
    num_networks: int | None = None,
    batch_size: int | None = None,
    drop_remainder: bool = True,
    with_key: bool = False,
    tolerance: float = 0.0,
    tolerance_unit: Literal["epoch", "step"] = "epoch",
    target_loss: float | None = None,
    validation_batch: PyTree = None,
    metric_fn: MetricFn | None = None,
    patience: int | None = None,
    min_delta: float = 0.0,
    max_seconds: float | None = None,
    callback: loop.Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    devices: Sequence[Device] | None = None,
    progress: bool | Literal["lines"] = False,
) -> GradientDescentResult:
    """Descend from `params`, full batch or mini-batch, with one network or with many.

    It is the fast form of `jax.lax.scan` over the step of `jaxnn.descent.descent_kernel`.

    Args:
        key: a typed key, `jax.random.key(seed)`; it shuffles the rows, and `with_key` draws noise.
        value_and_grad_fn: `value_and_grad_fn(params, batch)` -> the loss, a float scalar, and
            its gradient, a tree like `params`; as `model.value_and_grad`. Where its traits tell
            the loss of the best constant answer, the result notes a loss that is no better.
        params: where to start, any pytree of floats.
        batch: any pytree that the function takes; for mini-batches, rows first in every leaf.
        num_epochs: passes over the rows; 0 returns the start. At most 2^32 - 1 steps in all.

        learning_rate: short for `optimizer=sgd(learning_rate)`; for several networks a number,
            or one for each.
        optimizer: as in `jaxnn.optimizers`, or an optax transformation; one for all networks, or
            with `jaxnn.optimizers.each(adam, rates)` one for each.
        num_networks: how many networks descend side by side, each from its own params in a first
            axis of every leaf, and each stopping by itself. Network `i` gets the result that it
            would get alone with the key `jax.random.fold_in(key, i)`, up to rounding. Its bits do
            not depend on how many networks there are.
        batch_size: rows a step; None, or more than there are, means all rows.
        drop_remainder: whether to drop the rows that are left after the last full batch of an
            epoch; otherwise they make a smaller batch.
        with_key: whether the loss is noisy, as of dropout: each step then calls
            `value_and_grad_fn(params, batch, key)` with a key made of its number and of `key`. The
            loss on the validation batch and that at the end are `value_and_grad_fn(params, batch)`,
            without a key; `tolerance` and `target_loss` compare the noisy losses of the steps.

        tolerance: stop when the loss changes by less than this an epoch, status "converged"; 0
            never stops. On all rows at once, two consecutive losses are compared. With batches or
            noise losses differ by chance, so the mean loss over five epochs is then compared with
            that over the five epochs before, and the difference with five tolerances.
        tolerance_unit: "epoch" for that rule; "step" always compares the losses of two consecutive
            steps, whatever rows and noise they have.
        target_loss: stop at the first step whose batch has a loss at or below, status "reached".
        metric_fn: `metric_fn(params, batch)` -> a float scalar, recorded after every epoch on the
            batch, and on the validation batch; `model.accuracy` for instance.
        validation_batch: like `batch`; its loss is taken after every epoch, and the params of
            the lowest one are returned.
        patience: stop after this many epochs without an improvement on the validation batch, status
            "converged".
        min_delta: an improvement is a loss that is lower by more than this than that of the last
            improvement; the params returned are still those of the lowest loss.

        max_seconds: stop when these are over, status "stopped".
        callback: called with a `Progress` about four times a second, or once a second with
            a thousand networks; or `jaxnn.Every(epochs, callback)`. A `StopIteration` that it
            raises ends the descent, "stopped".
        checkpoint: a file to save to every half minute and at the end; the history is saved
            beside it (`run.history.npz`). If it is there already, the descent continues from it,
            to the same bits as one that was never interrupted. A checkpoint of other functions,
            data or settings is refused.
        devices: where several networks descend; by default all local devices.
        progress: whether to show a progress bar; "lines" prints a line when the loss has fallen,
            some four times a second at most.

    Returns:
        A `GradientDescentResult`.

    Raises:
        TypeError: if the function or the optimizer return something else than is wanted of them.
        ValueError: if not exactly one of `learning_rate` and `optimizer` is given, if the leaves
            of `batch` differ in rows, if those of `params` lack an axis of networks, or if the
            checkpoint is of another descent or damaged.
        OSError: if the checkpoint cannot be written.

    Example:
        >>> import jax.numpy as jnp
        >>> value_and_grad_fn = jax.value_and_grad(lambda p, batch: jnp.sum((p - batch) ** 2))
        >>> start, batch = jnp.zeros(2), jnp.ones(2)
        >>> trained = gradient_descent(
        ...     jax.random.key(0), value_and_grad_fn, start, batch,
        ...     learning_rate=0.1, num_epochs=100,
        ... )
        >>> trained.params.round(4)
        Array([1., 1.], dtype=float32)
    """
    key = checks.as_key("key", key)
    shown = metric_fn if num_networks is None else None  # of many there is no single best
    limits = loop.as_limits(max_seconds, callback, progress, loop.metric_of(shown, batch))
    params = checks.as_params(params)
    networks = _as_networks(num_networks, devices, params)
    one = networks.first(params)
    chosen = _as_optimizer(learning_rate, optimizer, networks)
    batch = checks.as_batch(batch, one, value_and_grad_fn)
    plan = kernel.as_plan(batch, batch_size, checks.as_flag("drop_remainder", drop_remainder))
    plan = plan._replace(with_key=checks.as_flag("with_key", with_key))
    num_epochs = checks.as_count("num_epochs", num_epochs, 0, (2**32 - 1) // plan.steps_per_epoch)
    checks.check_concrete("tolerance", tolerance)
    least_change = checks.as_real("tolerance", tolerance, inclusive=True)
    unit = checks.as_choice("tolerance_unit", tolerance_unit, ("epoch", "step"))
    function = checks.as_partial("value_and_grad_fn", value_and_grad_fn)
    noisy = Partial(kernel.call_with_key, function, key) if with_key else None
    loss_dtype = _loss_dtype(function, noisy, one, batch)
    update = Partial(kernel.update_of, networks.first(chosen).update, function)
    loss = jax.ShapeDtypeStruct((), loss_dtype)
    check_update(networks.first(chosen), update, one, (batch, loss))
    constant_loss = traits_of(value_and_grad_fn).constant_loss(batch)
    constant_loss = None if constant_loss is None else float(constant_loss)
    by_step = unit == "step" or (plan.batch_size is None and noisy is None)
    target_loss = loop.as_target(target_loss, loss_dtype)
    rules = Rules(
        tolerance=least_change if by_step else None,
        epoch_tolerance=None if by_step else least_change,
        target_loss=None if target_loss is None else np.asarray(target_loss),
        validation_batch=_as_validation_batch(validation_batch, one, value_and_grad_fn),
        metric=checks.as_optional("metric_fn", metric_fn),
        patience=_as_patience(patience, validation_batch),
        min_delta=_as_min_delta(min_delta, patience),
    )
    if rules.metric is not None:
        checks.check_scalar("metric_fn", checks.shapes_of("metric_fn", rules.metric, one, batch))
    with own_settings(), loop.watch_interrupts() as is_interrupted:
        start = partial(kernel.init, rules, loss_dtype=loss_dtype)
        keys = kernel.network_key(key)
        if networks.count is not None:
            start = jax.vmap(start)
            keys = jax.vmap(kernel.network_key, (None, 0))(key, jnp.arange(networks.count))
        fixed = replicas.place((function, batch, rules), (chosen, keys), networks)
        # On their devices from the start: elsewhere the first chunk would compile by itself.
        blocks = tuple(run for (run,) in replicas.place((), (start(chosen, params),), networks))

        def advance(blocks: Blocks, *epochs: np.uint32, capacity: int) -> list[kernel.Chunk]:
            arguments = [(*own, run, *epochs) for own, run in zip(fixed, blocks, strict=True)]
            options = {"plan": plan, "capacity": capacity, "tile": networks.tile}
            return run_at_once(kernel.run_epochs, arguments, networks.devices, **options)

        saved = None
        if checkpoint is not None:
            check_saveable(blocks)
            metadata = _metadata(key, function, noisy, chosen, params, batch, rules, plan, networks)
            saved = Checkpoint(Path(checkpoint), metadata)
        limits = limits._replace(is_interrupted=is_interrupted)
        blocks, history, status = run_descent(
            advance, blocks, num_epochs, plan, networks, limits, saved, rules.metric is not None
        )
        ends = [(*own[:2], run) for own, run in zip(fixed, blocks, strict=True)]
        ends = run_at_once(kernel.finalize, ends, networks.devices, tile=networks.tile)
        result = _result(ends, blocks, history, status, plan, networks, rules)
        notes = _notes(result, params, constant_loss)
        return loop.told(result._replace(notes=notes), is_interrupted)


def _loss_dtype(
    function: Partial, noisy: Partial | None, params: PyTree, batch: PyTree
) -> np.dtype:
    """The loss's dtype, once the function is what it should be, with and without a key."""
    try:
        if noisy is not None:
            checks.check_value_and_grad(noisy, params, batch)
        return checks.check_value_and_grad(function, params, batch)
    except TypeError as error:
        if noisy is not None:
            error.add_note(
                "with_key=True wants value_and_grad_fn(params, batch, key=None): steps give it a "
                "key, the losses that are reported none, for a loss without noise."
            )
        raise


def _as_networks(
    num_networks: int | None, devices: Sequence[Device] | None, params: PyTree
) -> Networks:
    """How many networks, once all leaves of the params have that axis."""
    if num_networks is None:
        if devices is not None:
            raise ValueError("num_networks must be given with devices; got None")
        return Networks()
    count = checks.as_count("num_networks", num_networks, 1, 2**31 - 1)
    for path, leaf in tree_leaves_with_path(params):
        if leaf.shape[:1] != (count,):
            raise ValueError(
                f"params must have a first axis of num_networks = {count} in every leaf; "
                f"got shape {leaf.shape} at params{keystr(path)}"
            )
    return Networks(count, tuple(checks.as_devices(devices)))


def _as_validation_batch(
    validation_batch: PyTree, params: PyTree, value_and_grad_fn: ValueAndGradFn
) -> PyTree:
    """The validation batch as arrays, if there is one, once the function has taken it."""
    if validation_batch is None:
        return None
    try:
        arrays = checks.as_batch(validation_batch, params, value_and_grad_fn)
        function = checks.as_partial("value_and_grad_fn", value_and_grad_fn)
        checks.check_value_and_grad(function, params, arrays)
    except Exception as error:
        if type(error) in (TypeError, ValueError):
            raise type(error)(f"validation_batch is refused: {error}") from error
        error.add_note("This came from validation_batch.")
        raise
    return arrays


def _as_patience(patience: int | None, validation_batch: PyTree) -> np.uint32 | None:
    """Epochs to wait for an improvement on the validation batch."""
    if patience is None:
        return None
    if validation_batch is None:
        raise ValueError("validation_batch must be given with patience; got None")
    return np.uint32(checks.as_count("patience", patience, 1, 2**32 - 1))


def _as_min_delta(min_delta: float, patience: int | None) -> np.float32 | jax.Array | None:
    """What an improvement has to exceed, where there is patience."""
    checks.check_concrete("min_delta", min_delta)
    least = checks.as_real("min_delta", min_delta, inclusive=True)
    if patience is None and least > 0:
        raise ValueError("patience must be given with min_delta; got None")
    return None if patience is None else least


def _as_optimizer(
    learning_rate: PyTree, optimizer: Optimizer | Each | None, networks: Networks
) -> Optimizer:
    """The optimizer, of `Partial`s; with a first axis of networks where there are several."""
    if (learning_rate is None) == (optimizer is None):
        given = "neither" if optimizer is None else "both"
        raise ValueError(f"give either learning_rate or optimizer; got {given}")
    if optimizer is None:
        checks.check_concrete("learning_rate", learning_rate)
        if networks.count is not None and np.ndim(learning_rate):
            if np.shape(learning_rate) != (networks.count,):
                raise ValueError(
                    f"learning_rate must be a number, or one for each of the {networks.count} "
                    f"networks; got shape {np.shape(learning_rate)}"
                )
            optimizer = each(sgd, np.asarray(learning_rate))
        else:
            optimizer = sgd(learning_rate)
    if not isinstance(optimizer, Each):
        check_optimizer(optimizer)
        functions = checks.as_partial("optimizer.init", optimizer.init), optimizer.update
        optimizer = Optimizer(functions[0], checks.as_partial("optimizer.update", functions[1]))
        return replicas.per_network(optimizer, networks)
    length = jax.tree.leaves(optimizer.values)[0].shape[0]
    if networks.count is None:
        raise ValueError(
            f"num_networks must be given with optimizer=each(...), as num_networks={length}, with "
            "params that have a first axis of networks; got None"
        )
    if length != networks.count:
        raise ValueError(
            f"optimizer must have values for each of the {networks.count} networks; "
            f"got each(...) of {length}"
        )
    return replicas.per_network(optimizer, networks)


def _metadata(
    key: jax.Array,
    function: Partial,
    noisy: Partial | None,
    optimizer: Optimizer,
    params: PyTree,
    batch: PyTree,
    rules: Rules,
    plan: BatchPlan,
    networks: Networks,
) -> dict[str, object]:
    """What a descent that continues this one has to share."""
    one, first = networks.first(params), networks.first(optimizer)
    init = Partial(first.init)
    loss, _ = checks.shapes_of("value_and_grad_fn", function, one, batch)
    state = checks.shapes_of("optimizer.init", init, one)
    update = Partial(kernel.update_of, first.update, function)
    axes = None if networks.count is None else (0, None)
    return {
        "trainer": "gradient_descent",
        "num_networks": networks.count,
        "networks a block": networks.width,
        "batch_size": plan.batch_size,
        "drop_remainder": plan.remainder == 0,
        "with_key": plan.with_key,
        **{
            name: as_metadata(rule)
            for name, rule in rules._asdict().items()
            if name not in ("validation_batch", "metric")
        },
        **run_metadata(
            "gradient_descent",
            key,
            {"params": params, "batch": batch, "validation_batch": rules.validation_batch},
            {
                "value_and_grad_fn": (function, (one, batch), axes),
                "value_and_grad_fn with a key": (noisy, (one, batch), axes),
                "metric_fn": (rules.metric, (one, batch), axes),
                "start of the optimizer": (init, (one,), None),
                "optimizer": (update, (batch, loss, one, state, one), None),
            },
        ),
        "numbers of the optimizer": fingerprint(optimizer),
    }


def _result(
    ends: Sequence[tuple[PyTree, jax.Array, jax.Array]],
    blocks: Blocks,
    history: History,
    unstopped: Status,
    plan: BatchPlan,
    networks: Networks,
    rules: Rules,
) -> GradientDescentResult:
    """What to return; `unstopped` is the status of a network that no rule has stopped."""
    params, losses, codes = zip(*ends, strict=True)
    loss, code = replicas.numbers(losses, networks), replicas.numbers(codes, networks)
    steps = num_steps(blocks, networks)
    lowest = replicas.numbers([block.lowest_loss for block in blocks], networks)
    has_finite = np.isfinite(loss) | np.isfinite(lowest)
    endings = {
        kernel.DIVERGED: "diverged",
        kernel.CONVERGED: "converged",
        kernel.REACHED: "reached",
    }
    validates, measures = rules.validation_batch is not None, rules.metric is not None
    epochs = (history.epoch + 1) * plan.steps_per_epoch

    def rows(column: np.ndarray, is_wanted: bool) -> np.ndarray | None:
        return np.ascontiguousarray(column.T) if is_wanted else None

    result = GradientDescentResult(
        params=jax.tree.map(jnp.asarray, replicas.join(params, networks)),
        loss=np.where(np.isfinite(loss), loss, np.inf).astype(np.float64),
        num_evaluations=1 - (-_work(plan, steps) // plan.num_rows),
        num_steps=steps,
        status=np.select(
            [(code == kernel.DIVERGED) & ~has_finite, *(code == ending for ending in endings)],
            ["nonfinite", *endings.values()],
            unstopped,
        ),
        history=DescentHistory(
            evaluations=_work(plan, history.step + 1) / plan.num_rows,
            loss=np.ascontiguousarray(history.loss.T),
            validation_loss=rows(history.validation_loss, validates),
            metric=rows(history.metric, measures),
            validation_metric=rows(history.validation_metric, validates and measures),
            epoch_evaluations=rows(_work(plan, epochs) / plan.num_rows, validates or measures),
        ),
        state=jax.tree.map(jnp.asarray, replicas.join([block.state for block in blocks], networks)),
    )
    return _of_one(result) if networks.count is None else result


def _work(plan: BatchPlan, num_steps: np.ndarray) -> np.ndarray:
    """The work of a number of steps in losses of one row, int64."""
    rows = np.append(0, np.cumsum(plan.rows_of_steps))
    epochs, steps = np.divmod(num_steps, plan.steps_per_epoch)
    return EVALUATIONS_PER_GRADIENT * (epochs * rows[-1] + rows[steps])


def _of_one(result: GradientDescentResult) -> GradientDescentResult:
    """The numbers of a single network, without an axis."""
    history = result.history
    columns = {name: getattr(history, name) for name in EpochRecords._fields}
    return result._replace(
        loss=float(result.loss[0]),
        num_evaluations=int(result.num_evaluations[0]),
        num_steps=int(result.num_steps[0]),
        status=str(result.status[0]),
        history=history._replace(
            loss=history.loss[0],
            **{name: None if rows is None else rows[0] for name, rows in columns.items()},
        ),
    )


def _notes(
    result: GradientDescentResult, start: PyTree, constant_loss: float | None
) -> tuple[str, ...]:
    """What a status leaves out: that a descent did not move, or learnt no more than a constant."""
    loss, has_stepped = np.asarray(result.loss), np.asarray(result.num_steps) > 0
    is_still = has_stepped & ~np.isin(result.status, ["diverged", "nonfinite", "reached"])
    for leaf, first in zip(jax.tree.leaves(result.params), jax.tree.leaves(start), strict=True):
        axes = tuple(range(loss.ndim, np.ndim(leaf)))
        is_still &= np.all(np.asarray(leaf) == np.asarray(first), axis=axes)
    notes = _note(is_still, "no step changed the params (is the gradient 0, as of a dead network?)")
    if constant_loss:
        limit = constant_loss - CONSTANT_MARGIN * abs(constant_loss)
        is_constant = has_stepped & np.isfinite(loss) & (loss >= limit)
        notes += _note(
            is_constant, f"no better than the best constant answer, of loss {constant_loss:.6g}"
        )
    return notes


def _note(concerns: np.ndarray, text: str) -> tuple[str, ...]:
    """The note, with the number of networks that it concerns where there are several."""
    if not np.any(concerns):
        return ()
    return (f"{np.sum(concerns):,} networks: {text}" if np.ndim(concerns) else text,)
