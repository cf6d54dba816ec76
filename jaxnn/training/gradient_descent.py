"""Gradient descent: follow the gradient down, on all rows or on shuffled batches of them.

Each epoch shuffles the rows and cuts them into batches. For each batch: the loss and its
gradient, a look at the stop rules, then one step of the optimizer. The whole loop is compiled.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnn.checks import as_count, as_key, as_real
from jaxnn.training.callables import (
    ValueAndGradFn,
    as_batch,
    as_params,
    as_partial,
    check_concrete,
    check_value_and_grad,
)
from jaxnn.training.descending import CONVERGED, DIVERGED, begin, descend, settle, walk
from jaxnn.training.optimizers import Optimizer, sgd
from jaxnn.training.pacing import Status

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
    """

    evaluations: np.ndarray
    loss: np.ndarray


class GradientDescentResult(NamedTuple):
    """Where a gradient descent ended.

    Attributes:
        params: the params reached; if it diverged, the last whose loss was finite.
        loss: their loss on the whole batch; inf if it is not finite.
        num_evaluations: losses on the whole batch that the work amounts to: a gradient step
            counts 3 times its share of the rows, the loss reported counts 1; rounded up.
        num_steps: gradients evaluated.
        status: "completed", "converged", "diverged", "interrupted", or "nonfinite" if no loss
            was ever finite.
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
    tolerance: float = 0.0,
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
        batch_size: rows a step; None, or more than there are, means all rows. What is left of an
            epoch after the last full batch is dropped.
        tolerance: stop when two consecutive losses differ by less; 0 never stops.
        progress: whether to show a progress bar.

    Returns:
        A `GradientDescentResult`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the gradients are not like `params`.
        ValueError: if a number is out of range, if not exactly one of `learning_rate` and
            `optimizer` is given, or if the leaves of `batch` differ in rows.

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
    check_concrete("tolerance", tolerance)
    tolerance_ = as_real("tolerance", tolerance, inclusive=True)
    chosen = _as_optimizer(learning_rate, optimizer)
    start = as_params(params)
    batch = as_batch(batch, params, value_and_grad_fn)
    function = as_partial("value_and_grad_fn", value_and_grad_fn)
    loss_dtype = check_value_and_grad(function, start, batch)
    rows, rows_a_step = _cut(batch, batch_size)

    with jax.threefry_partitionable(True):
        stream = jax.random.fold_in(key, TAG)
        in_batches = {"rows_a_step": rows_a_step if rows_a_step < rows else None}
        state, losses = walk(
            partial(descend, function, chosen, batch, stream, tolerance_, **in_batches),
            begin(chosen, start, loss_dtype),
            num_epochs,
            rows // rows_a_step,
            progress,
        )
        final, loss, verdict = settle(function, state, batch)
    loss = float(loss) if np.isfinite(loss) else math.inf
    work = EVALUATIONS_PER_GRADIENT * rows_a_step * np.arange(1, len(losses) + 1)
    return GradientDescentResult(
        params=final,
        loss=loss,
        num_evaluations=1 - (-EVALUATIONS_PER_GRADIENT * rows_a_step * len(losses) // rows),
        num_steps=len(losses),
        status=_status(
            verdict,
            has_finite=math.isfinite(loss) or bool(np.any(np.isfinite(losses))),
            is_complete=len(losses) == num_epochs * (rows // rows_a_step),
        ),
        history=DescentHistory(work / rows, losses),
    )


def _as_optimizer(learning_rate: float | None, optimizer: Optimizer | None) -> Optimizer:
    if (learning_rate is None) == (optimizer is None):
        given = "neither" if optimizer is None else "both"
        raise ValueError(f"give either learning_rate or optimizer; got {given}")
    if optimizer is None:
        check_concrete("learning_rate", learning_rate)
        return sgd(learning_rate)  # type: ignore[arg-type]
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer must have init and update, as jaxnn.optimizers.adam(0.05) has; "
            f"got a {type(optimizer).__name__}"
        )
    init = as_partial("optimizer.init", optimizer.init)
    return Optimizer(init, as_partial("optimizer.update", optimizer.update))


def _cut(batch: Any, batch_size: int | None) -> tuple[int, int]:
    """Rows of the batch, and rows a step; `(1, 1)` where the batch is never cut."""
    if batch_size is None:
        return 1, 1
    batch_size = as_count("batch_size", batch_size, minimum=1)
    shapes = [leaf.shape for leaf in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            "batch must have the same number of rows, at least 1, in every leaf to be cut by "
            f"batch_size; got shapes {shapes}"
        )
    rows = shapes[0][0]
    return rows, min(batch_size, rows)


def _status(verdict: jax.Array, *, has_finite: bool, is_complete: bool) -> Status:
    if int(verdict) == CONVERGED:
        return "converged"
    if int(verdict) == DIVERGED:
        return "diverged" if has_finite else "nonfinite"
    return "completed" if is_complete else "interrupted"
