"""Gradient descent: follow the gradient down, on all rows or on shuffled batches of them.

Each epoch shuffles the rows and cuts them into batches. For each batch: the loss and its
gradient, a look at the stop rules, then one step of the optimizer. After it, if there is a
validation batch, the loss on that. The whole loop is compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxnn.descent.epochs import walk
from jaxnn.descent.kernel import Rules, begin, descend, settle
from jaxnn.descent.replicas import (
    begin_blocks,
    descend_blocks,
    in_blocks,
    placed,
    settle_blocks,
)
from jaxnn.descent.report import (
    EVALUATIONS_PER_GRADIENT,
    GradientDescentResult,
    constant_loss_of,
    notes_on,
    report,
)
from jaxnn.descent.setup import (
    as_cut,
    as_networks,
    as_optimizer,
    as_patience,
    as_tolerance,
    as_validation,
    check_update,
    facts_of,
    one_of,
)
from jaxnn.optim.optimizers import Each, Optimizer
from jaxnn.run.checkpoint import Checkpoint, check_saveable
from jaxnn.run.checks import (
    as_batch,
    as_choice,
    as_count,
    as_flag,
    as_key,
    as_params,
    as_partial,
    check_value_and_grad,
)
from jaxnn.run.loop import Progress, as_limits, as_target, told, watch_interrupts
from jaxnn.run.programs import own_settings
from jaxnn.typing import ValueAndGradFn

TAG = 0x47524144
"""Folded into the key, so that no other trainer draws the same from it."""


def gradient_descent(
    key: jax.Array,
    value_and_grad_fn: ValueAndGradFn,
    params: Any,
    batch: Any,
    *,
    num_epochs: int,
    learning_rate: Any = None,
    optimizer: Optimizer | Each | None = None,
    num_networks: int | None = None,
    batch_size: int | None = None,
    drop_remainder: bool = True,
    tolerance: float = 0.0,
    tolerance_unit: Literal["epoch", "step"] = "epoch",
    gradient_tolerance: float | None = None,
    target_loss: float | None = None,
    validation_batch: Any = None,
    patience: int | None = None,
    record_every: int | None = None,
    max_seconds: float | None = None,
    callback: Callable[[Progress], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    devices: Sequence[Any] | None = None,
    progress: bool = False,
) -> GradientDescentResult:
    """Descends from `params`, full batch or mini-batch, with one network or with many.

    Args:
        key: a typed key, `jax.random.key(seed)`; it shuffles the rows.
        value_and_grad_fn: `value_and_grad_fn(params, batch)` -> the loss, a float scalar, and
            its gradient, a tree like `params`; as `model.value_and_grad`. Where its traits tell the
            loss of the best constant answer, the result notes a loss that is no better.
        params: where to start, any pytree of floats.
        batch: any pytree that the function takes; for mini-batches, rows first in every leaf.
        num_epochs: passes over the rows; 0 returns the start.
        learning_rate: short for `optimizer=sgd(learning_rate)`; for several networks a number,
            or one for each.
        optimizer: as in `jaxnn.optimizers`, or an optax transformation; one for all networks, or
            with `jaxnn.optimizers.each(adam, rates)` one for each. Losses that it evaluates
            itself, as a line search does, are not counted.
        num_networks: how many networks descend side by side, each from its own params in a first
            axis of every leaf, and each stopping by itself. Network `i` comes to what it comes to
            alone with the key `jax.random.fold_in(key, i)`, up to rounding; to the same bits
            however many there are.
        batch_size: rows a step; None, or more than there are, means all rows.
        drop_remainder: whether the rows that are left after the last full batch of an epoch are
            dropped; otherwise they make a smaller batch.
        tolerance: stop when the loss changes by less than this an epoch, status "converged"; 0
            never stops. On all rows at once, two consecutive losses are compared. The losses of
            batches differ by chance, so with batches the mean loss over five epochs is compared
            with that over the five epochs before, and the difference with five tolerances.
        tolerance_unit: "epoch" for that rule; "step" compares the losses of two consecutive steps
            with batches too, whatever rows they are.
        gradient_tolerance: stop where the gradient, of all leaves together, is shorter than
            this: somewhere flat. Status "converged".
        target_loss: stop at the first step whose batch has a loss at or below, status "reached".
        validation_batch: like `batch`; its loss is taken after every epoch, and the params of
            the lowest one are returned.
        patience: stop after this many epochs without a lower loss on the validation batch, status
            "converged".
        record_every: which steps to keep in the history: every one, every second and so on. By
            default every one, or of long descents every second, fourth and so on, so that the
            history takes at most 768 MiB.
        max_seconds: stop when these are over, status "stopped".
        callback: called with a `Progress` some four times a second, or once a second with
            a thousand networks; a `StopIteration` that it raises ends the descent, "stopped".
        checkpoint: a file to save to every half minute and at the end; the history is saved
            beside it (`run.history.npz`). If it is there already,
            the descent goes on from it, to the same bits as one that was never interrupted; it
            refuses one whose functions, data or settings compute anything else.
        devices: where several networks descend; by default all local devices.
        progress: whether to show a progress bar.

    Returns:
        A `GradientDescentResult`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the gradients are not like `params`.
        ValueError: if a number is out of range, if not exactly one of `learning_rate` and
            `optimizer` is given, if the leaves of `batch` differ in rows, if those of `params`
            lack an axis of networks, or if the checkpoint is of another descent or damaged.
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
    key = as_key("key", key)
    num_epochs = as_count("num_epochs", num_epochs, maximum=2**32 - 1)
    limits = as_limits(max_seconds, callback, progress)
    keeps = not as_flag("drop_remainder", drop_remainder)
    tolerance = as_tolerance("tolerance", tolerance)
    as_choice("tolerance_unit", tolerance_unit, ("epoch", "step"))
    if gradient_tolerance is not None:
        gradient_tolerance = as_tolerance("gradient_tolerance", gradient_tolerance)
    if record_every is not None:
        record_every = as_count("record_every", record_every, 1, 2**32 - 1)
    params = as_params(params)
    networks = as_networks(num_networks, devices, params)
    one = one_of(params, networks)
    chosen = as_optimizer(learning_rate, optimizer, networks)
    batch = as_batch(batch, one, value_and_grad_fn)
    function = as_partial("value_and_grad_fn", value_and_grad_fn)
    loss_dtype = check_value_and_grad(function, one, batch)
    check_update(one_of(chosen, networks), function, one, batch, loss_dtype)
    constant_loss = constant_loss_of(value_and_grad_fn, batch)
    cut, seen = as_cut(batch, batch_size, keeps)
    by_step = tolerance_unit == "step" or cut.rows_a_step is None
    rules = Rules(
        tolerance=tolerance if by_step else None,
        epoch_tolerance=None if by_step else tolerance,
        gradient_tolerance=gradient_tolerance,
        target_loss=None if target_loss is None else np.asarray(as_target(target_loss, loss_dtype)),
        validation=as_validation(validation_batch, one, value_and_grad_fn, function),
        patience=as_patience(patience, validation_batch),
    )
    with own_settings(), watch_interrupts() as is_interrupted:
        shared = (function, batch, rules)
        start = partial(
            begin,
            loss_dtype=loss_dtype,
            validates=rules.validation is not None,
            compares_epochs=rules.epoch_tolerance is not None,
        )
        if networks is None:
            state = start(chosen, params)
            run = partial(descend, *shared, chosen, jax.random.fold_in(key, TAG), cut=cut)
        else:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(networks.count))
            streams = jax.vmap(jax.random.fold_in, (0, None))(keys, TAG)
            state = begin_blocks(start, chosen, params, networks)
            blocks = placed(shared, in_blocks((chosen, streams), networks), networks)
            run = partial(descend_blocks, blocks, networks, cut=cut)
        saved = None
        if checkpoint is not None:
            check_saveable(state)
            facts = facts_of(key, function, chosen, params, batch, rules, cut, networks)
            saved = Checkpoint(Path(checkpoint), facts)
        work = EVALUATIONS_PER_GRADIENT * sum(seen.rows_of_steps) / seen.rows / cut.steps
        limits = limits._replace(is_interrupted=is_interrupted)
        walked, status = walk(run, state, num_epochs, cut.steps, work, limits, saved, record_every)
        end = settle if networks is None else partial(settle_blocks, networks)
        settled = end(function, batch, walked.state)
        result = report(walked, status, settled, seen, rules.validation is not None)
        result = result._replace(notes=notes_on(result, params, constant_loss))
        return told(result, is_interrupted)
