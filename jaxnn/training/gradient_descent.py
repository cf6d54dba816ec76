"""Gradient descent: follow the gradient down, on all rows or on shuffled batches of them.

Each epoch shuffles the rows and cuts them into batches. For each batch: the loss and its
gradient, a look at the stop rules, then one step of the optimizer. After it, if there is a
validation batch, the loss on that. The whole loop is compiled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.tree_util import Partial

from jaxnn.checks import as_count, as_flag, as_key, as_real
from jaxnn.training.callables import (
    ValueAndGradFn,
    as_batch,
    as_params,
    as_partial,
    check_concrete,
    check_value_and_grad,
)
from jaxnn.training.descending import (
    CONVERGED,
    DIVERGED,
    REACHED,
    Cut,
    Rules,
    begin,
    descend,
    settle,
)
from jaxnn.training.epochs import Walked, walk
from jaxnn.training.identities import fingerprint, identity
from jaxnn.training.naming import check_saveable
from jaxnn.training.optimizers import Optimizer, check_optimizer, sgd
from jaxnn.training.pacing import Status
from jaxnn.training.stopping import Saver, SearchProgress, as_limits, as_target

__all__ = ["DescentHistory", "GradientDescentResult", "gradient_descent"]

TAG = 0x47524144
"""Folded into the key, so that no other trainer draws the same from it."""

EVALUATIONS_PER_GRADIENT = 3
"""A forward pass, and a backward pass that costs twice as much."""


class DescentHistory(NamedTuple):
    """The loss at every step; ready to plot.

    Attributes:
        evaluations: evaluations made up to and with each step, in units of one loss on the whole
            batch, `(num_steps,)`, float64.
        loss: loss of the step's batch *before* the step, `(num_steps,)`.
        validation_loss: loss on the validation batch after every epoch, `(num_epochs,)`; None
            without one.
    """

    evaluations: np.ndarray
    loss: np.ndarray
    validation_loss: np.ndarray | None


class GradientDescentResult(NamedTuple):
    """Where a gradient descent ended.

    Attributes:
        params: the params reached; if it diverged, the last whose loss was finite; with a
            validation batch, those at the end of the epoch with the lowest loss on it.
        loss: their loss on the whole batch; inf if it is not finite.
        num_evaluations: losses on the whole batch that the work amounts to: a gradient step
            counts 3 times its share of the rows, the loss reported counts 1; rounded up. Losses
            on a validation batch are not counted.
        num_steps: gradients evaluated; the last is that at which it converged or diverged.
        status: "completed", "converged", "diverged", "interrupted", "reached", "stopped", or
            "nonfinite" if no loss was ever finite.
        history: the loss at every step.
    """

    params: Any
    loss: float
    num_evaluations: int
    num_steps: int
    status: Status
    history: DescentHistory


def gradient_descent(
    key: jax.Array,
    value_and_grad_fn: ValueAndGradFn,
    params: Any,
    batch: Any,
    *,
    num_epochs: int,
    learning_rate: float | None = None,
    optimizer: Optimizer | None = None,
    batch_size: int | None = None,
    keep_remainder: bool = False,
    tolerance: float = 0.0,
    gradient_tolerance: float | None = None,
    target_loss: float | None = None,
    validation_batch: Any = None,
    patience: int | None = None,
    max_seconds: float | None = None,
    callback: Callable[[SearchProgress], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> GradientDescentResult:
    """Descends from `params`, full batch or mini-batch.

    Args:
        key: a typed key, `jax.random.key(seed)`; it shuffles the rows.
        value_and_grad_fn: `value_and_grad_fn(params, batch)` -> the loss, a float scalar, and
            its gradient, a tree like `params`; as `model.value_and_grad`.
        params: where to start, any pytree of floats.
        batch: any pytree that the function takes; for mini-batches, rows first in every leaf.
        num_epochs: passes over the rows; 0 returns the start.
        learning_rate: short for `optimizer=sgd(learning_rate)`.
        optimizer: as in `jaxnn.optimizers`, or an optax transformation.
        batch_size: rows a step; None, or more than there are, means all rows.
        keep_remainder: whether what is left of an epoch after the last full batch makes a
            smaller one; otherwise it is dropped.
        tolerance: stop when two consecutive losses differ by less, status "converged"; 0 never
            stops.
        gradient_tolerance: stop where the gradient, of all leaves together, is shorter than
            this: somewhere flat. Status "converged".
        target_loss: stop at the first step whose batch has a loss at or below, status "reached".
        validation_batch: like `batch`; its loss is taken after every epoch, and the params of
            the lowest one are returned.
        patience: stop after so many epochs without a lower loss on the validation batch, status
            "converged".
        max_seconds: stop when these are over, status "stopped".
        callback: called with a `SearchProgress` some four times a second; a `StopIteration` that
            it raises ends the descent, status "stopped".
        checkpoint: a file to save to every half minute and at the end. If it is there already,
            the descent goes on from it, to the same bits as one that was never interrupted; it
            refuses one made with other settings, as far as they are numbers, arrays or
            functions that the callables hold.
        progress: whether to show a progress bar.

    Returns:
        A `GradientDescentResult`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the gradients are not like `params`.
        ValueError: if a number is out of range, if not exactly one of `learning_rate` and
            `optimizer` is given, if the leaves of `batch` differ in rows, or if the checkpoint
            is of another descent or damaged.
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
    limits = as_limits(max_seconds, callback)
    keeps = as_flag("keep_remainder", keep_remainder)
    tolerances = (
        _as_tolerance("tolerance", tolerance),
        (
            None
            if gradient_tolerance is None
            else _as_tolerance("gradient_tolerance", gradient_tolerance)
        ),
    )
    chosen = _as_optimizer(learning_rate, optimizer)
    start = as_params(params)
    batch = as_batch(batch, params, value_and_grad_fn)
    function = as_partial("value_and_grad_fn", value_and_grad_fn)
    loss_dtype = check_value_and_grad(function, start, batch)
    cut, seen = _cut(batch, batch_size, keeps)
    rules = Rules(
        *tolerances,
        target_loss=None if target_loss is None else np.asarray(as_target(target_loss, loss_dtype)),
        validation=_as_validation(validation_batch, params, value_and_grad_fn, function, start),
        patience=_as_patience(patience, validation_batch),
    )
    saver = None
    if checkpoint is not None:
        saver = Saver(Path(checkpoint), _facts(key, function, chosen, start, batch, rules, cut))
    with jax.threefry_partitionable(True):
        stream = jax.random.fold_in(key, TAG)
        state = begin(chosen, start, loss_dtype=loss_dtype, validates=rules.validation is not None)
        if saver is not None:
            check_saveable(state)
        walked = walk(
            partial(descend, function, chosen, batch, stream, rules, cut=cut),
            state,
            num_epochs,
            cut.steps,
            EVALUATIONS_PER_GRADIENT * sum(seen.rows_of_steps) / seen.rows,
            limits,
            saver,
            progress,
        )
        final, loss, verdict = settle(function, walked.state, batch)
    loss = float(loss) if np.isfinite(loss) else math.inf
    steps = len(walked.losses)
    work = EVALUATIONS_PER_GRADIENT * np.cumsum(np.resize(seen.rows_of_steps, steps))
    return GradientDescentResult(
        params=final,
        loss=loss,
        num_evaluations=1 - (-int(work[-1] if steps else 0) // seen.rows),
        num_steps=steps,
        status=_status(
            walked,
            verdict,
            has_finite=math.isfinite(loss) or bool(np.any(np.isfinite(walked.losses))),
            is_complete=walked.num_epochs == num_epochs,
        ),
        history=DescentHistory(
            work / seen.rows,
            walked.losses,
            None if validation_batch is None else walked.validation,
        ),
    )


def _as_optimizer(learning_rate: float | None, optimizer: Optimizer | None) -> Optimizer:
    if (learning_rate is None) == (optimizer is None):
        given = "neither" if optimizer is None else "both"
        raise ValueError(f"give either learning_rate or optimizer; got {given}")
    if optimizer is None:
        check_concrete("learning_rate", learning_rate)
        return sgd(learning_rate)  # type: ignore[arg-type]
    check_optimizer(optimizer)
    init = as_partial("optimizer.init", optimizer.init)
    return Optimizer(init, as_partial("optimizer.update", optimizer.update))


def _as_tolerance(name: str, value: float) -> Any:
    check_concrete(name, value)
    return as_real(name, value, inclusive=True)


def _as_validation(
    validation_batch: Any, params: Any, value_and_grad_fn: Any, function: Partial, start: Any
) -> Any:
    """The validation batch as arrays, once the function has taken it."""
    if validation_batch is None:
        return None
    try:
        arrays = as_batch(validation_batch, params, value_and_grad_fn)
        check_value_and_grad(function, start, arrays)
    except Exception as error:
        error.add_note("This came from validation_batch.")
        raise
    return arrays


def _as_patience(patience: int | None, validation_batch: Any) -> np.uint32 | None:
    if patience is None:
        return None
    if validation_batch is None:
        raise ValueError("validation_batch must be given with patience; got None")
    return np.uint32(as_count("patience", patience, 1, 2**32 - 1))


class _Seen(NamedTuple):
    """Rows that each step of an epoch sees, of how many."""

    rows_of_steps: list[int]
    rows: int


def _cut(batch: Any, batch_size: int | None, keeps: bool) -> tuple[Cut, _Seen]:
    """How an epoch is cut; `batch` need have no rows if it is taken whole."""
    if batch_size is None:
        if keeps:
            raise ValueError("batch_size must be given with keep_remainder; got None")
        return Cut(None, 0, 1), _Seen([1], 1)
    batch_size = as_count("batch_size", batch_size, minimum=1)
    shapes = [leaf.shape for leaf in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            "batch must have the same number of rows, at least 1, in every leaf to be cut by "
            f"batch_size; got shapes {shapes}"
        )
    rows = shapes[0][0]
    if batch_size >= rows:
        return Cut(None, 0, 1), _Seen([1], 1)
    steps, rest = divmod(rows, batch_size)
    remainder = rest if keeps else 0
    sizes = [batch_size] * steps + [remainder] * (remainder > 0)
    return Cut(batch_size, remainder, len(sizes)), _Seen(sizes, rows)


def _facts(
    key: jax.Array,
    function: Partial,
    optimizer: Optimizer,
    params: Any,
    batch: Any,
    rules: Rules,
    cut: Cut,
) -> dict[str, Any]:
    """What whoever goes on with this descent has to share."""
    return {
        "trainer": "gradient_descent",
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "key_implementation": str(jax.random.key_impl(key)),
        "value_and_grad_fn": identity(function),
        "optimizer": identity(cast(Partial, optimizer.update)),
        "params": fingerprint(params),
        "batch": fingerprint(batch),
        "batch_size": cut.rows_a_step,
        "keep_remainder": cut.remainder > 0,
        "rules": fingerprint(rules),
    }


def _status(walked: Walked, verdict: jax.Array, *, has_finite: bool, is_complete: bool) -> Status:
    if int(verdict) == DIVERGED:
        return "diverged" if has_finite else "nonfinite"
    words: dict[int, Status] = {CONVERGED: "converged", REACHED: "reached"}
    if int(verdict) in words:
        return words[int(verdict)]
    if is_complete:
        return "completed"
    return "stopped" if walked.stopped else "interrupted"
