"""`Batch`: the rows that a loss looks at, and the one place where they are checked and converted.

Shapes and dtypes are always checked, also while JAX traces, and values where they are known. Where
they are not, `valid_rows` finds the rows whose targets have no meaning: the loss is nan for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxnn.run.checks import array_record, as_values, is_traced
from jaxnn.run.show import readable
from jaxnn.typing import PyTree

CROSSENTROPIES = ("binary_crossentropy", "categorical_crossentropy")
"""The losses of labels; the targets of all others are numbers."""


@readable
@array_record
class Batch(NamedTuple):
    """Inputs and targets, one example a row: NumPy or JAX arrays, lists, pandas frames or series.

    Attributes:
        x: inputs, shape `(rows, features)`, float32.
        y: targets. For categorical cross-entropy, integer classes `(rows,)` or non-negative
            weights `(rows, classes)`, which are one-hot rows or soft labels. For binary
            cross-entropy, numbers from 0 to 1 `(rows, outputs)`. For other losses, numbers
            `(rows, outputs)`.
        weights: how much each row counts, `(rows,)`, numbers of at least 0, not all 0; or None.
            Loss, gradient and accuracy are then `sum(w l) / sum(w)` over the rows. A minibatch
            divides by the weights of its own rows; where they are all 0, its loss is nan.

    Example:
        >>> Batch(x=np.zeros((4, 2), np.float32), y=np.zeros(4, np.int32)).x.shape
        (4, 2)
    """

    x: Any
    y: Any
    weights: Any = None


def check_batch(name: str, batch: PyTree, loss: str, features: int, outputs: int) -> Batch:
    """Return the batch as arrays; refuse one that does not fit the network's sizes and loss."""
    if not isinstance(batch, Batch):
        raise TypeError(f"{name} must be a jaxnn.Batch(x, y); got a {type(batch).__name__}")
    x = check_inputs(f"{name}.x", batch.x, features)
    y, rows = as_values(f"{name}.y", batch.y), x.shape[0]
    if not is_traced(y) and y.ndim and y.shape[0] != rows:
        raise ValueError(f"{name}.y must have {rows} rows, as {name}.x; got shape {y.shape}")
    y = check_targets(f"{name}.y", y, loss, rows, outputs)
    return Batch(x, y, check_weights(f"{name}.weights", batch.weights, rows))


def check_values(name: str, values: object, dimensions: int, wanted: str) -> np.ndarray | jax.Array:
    """Return a real array with the wanted number of dimensions and at least one row."""
    array = as_values(name, values)
    if array.ndim != dimensions or 0 in array.shape:
        raise ValueError(f"{name} must be {wanted}; got shape {array.shape}")
    return array


def check_inputs(name: str, x: object, features: int) -> jax.Array | np.ndarray:
    """Return the inputs as an array; refuse all but finite numbers `(rows, features)`."""
    array = check_values(name, x, 2, f"numbers of shape (rows, {features})")
    if array.dtype == bool or array.shape[1] != features:
        wanted = f"numbers of shape (rows, {features}), as the network's sizes say"
        raise ValueError(f"{name} must be {wanted}; got {array.dtype} of shape {array.shape}")
    if not is_traced(array) and not np.all(finite := np.isfinite(np.asarray(array))):
        row, column = np.argwhere(~finite)[0]
        where = f"row {row}, column {column}"
        raise ValueError(f"{name} must be finite; got {array[row, column]} at {where}")
    return array


def check_targets(
    name: str, targets: object, loss: str, rows: int, outputs: int
) -> jax.Array | np.ndarray:
    """Return the targets as an array; refuse those without a meaning to the loss.

    One-hot rows become classes where their values are known, so that both give the same bits.
    """
    array = as_values(name, targets)
    if loss == "categorical_crossentropy":
        _check_classes(name, array, rows, outputs)
    elif array.shape != (rows, outputs):
        wanted = "numbers from 0 to 1" if loss == "binary_crossentropy" else "numbers"
        wanted = f"{wanted} of shape {(rows, outputs)}, as the predictions"
        hint = f"; use {name}[:, None]" if array.shape == (rows,) and outputs == 1 else ""
        raise ValueError(f"{name} must be {wanted}; got {array.dtype} of shape {array.shape}{hint}")
    if is_traced(array):
        return array
    values = np.asarray(array)
    _check_values(name, values, loss, outputs)
    is_weights = loss == "categorical_crossentropy" and values.ndim == 2
    if is_weights and np.all(np.isin(values, (0, 1))) and np.all(values.sum(axis=1) == 1):
        return np.argmax(values, axis=1).astype(np.int32)
    return array


def check_weights(name: str, weights: object, rows: int) -> jax.Array | np.ndarray | None:
    """Return the weights of the rows as an array, if there are any; refuse what weighs nothing."""
    if weights is None:
        return None
    if isinstance(weights, dict):
        hint = "an array of the weights of classes, indexed by y, gives each row its own"
        raise TypeError(f"{name} must be an array, a number a row; got a dict: {hint}")
    array = as_values(name, weights)
    if array.shape != (rows,):
        raise ValueError(f"{name} must be of shape {(rows,)}, one a row; got {array.shape}")
    if is_traced(array):
        return array
    values = np.asarray(array, np.float32)
    bad = np.flatnonzero(~_valid_weights(values))
    if bad.size:
        came = f"{values[bad[0]]} at [{bad[0]}]"
        raise ValueError(f"{name} must be finite numbers of at least 0; got {came}")
    if not 0 < np.sum(values) < np.inf:
        raise ValueError(f"{name} must have a finite sum above 0; got {np.sum(values)}")
    return array


def mean_over_rows(numbers: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Return the mean of numbers `(rows,)` or `(rows, outputs)`, weighted if there are weights."""
    if weights is None:
        return jnp.mean(numbers)
    by_row = numbers if numbers.ndim == 1 else jnp.mean(numbers, axis=1)
    return jnp.sum(weights * by_row) / jnp.sum(weights)


def as_weights(weights: jax.Array | np.ndarray | None, dtype: DTypeLike) -> jax.Array | None:
    """Return checked weights in this dtype; traced ones without a meaning become nan."""
    if weights is None:
        return None
    w = jnp.asarray(weights).astype(dtype)
    return jnp.where(_valid_weights(w), w, jnp.nan)


def _valid_weights(weights: Any) -> Any:
    return (weights >= 0) & (weights < np.inf)


def valid_rows(targets: np.ndarray | jax.Array, loss: str, outputs: int) -> Any:
    """Return whether the targets of each row have a meaning to the loss, as bools `(rows,)`.

    Classes out of range have none, nor do weights that are negative or all 0, binary labels
    outside of 0 to 1, and numbers that are not finite. Targets are NumPy's or JAX's, traced or not.
    """
    valid = _valid_entries(targets, loss, outputs)
    if loss == "categorical_crossentropy" and valid.ndim == 2:
        return valid.all(axis=1) & (targets > 0).any(axis=1)
    return valid.all(axis=1) if valid.ndim == 2 else valid


def _valid_entries(
    targets: np.ndarray | jax.Array, loss: str, outputs: int
) -> np.ndarray | jax.Array:
    """Check each entry by itself; a row of weights may still be all 0."""
    if targets.ndim == 1:
        classes = targets.astype(int)
        return (classes >= 0) & (classes < outputs)
    numbers = targets.astype(float)
    if loss not in CROSSENTROPIES:
        return abs(numbers) < np.inf
    return (numbers >= 0) & (numbers <= 1 if loss == "binary_crossentropy" else numbers < np.inf)


def _check_classes(name: str, array: np.ndarray | jax.Array, rows: int, classes: int) -> None:
    integers = array.shape == (rows,) and array.dtype.kind in "iu"
    if not integers and not (array.shape == (rows, classes) and array.dtype.kind in "iuf"):
        hint = f"; use {name}[:, 0]" if array.shape == (rows, 1) else ""
        if array.shape == (rows,):
            hint = "; classes that are whole numbers become integers by numpy.asarray(y, int)"
        raise ValueError(
            f"{name} must be integer classes of shape {(rows,)}, or one-hot or other weights of "
            f"shape {(rows, classes)}; got {array.dtype} of shape {array.shape}{hint}"
        )


def _check_values(name: str, array: np.ndarray, loss: str, outputs: int) -> None:
    """Refuse values without a meaning to the loss, and show the first."""
    wanted, highest = "finite", 1
    if loss in CROSSENTROPIES:
        is_binary = loss == "binary_crossentropy"
        wanted = "numbers from 0 to 1" if is_binary else "non-negative weights"
    if array.ndim == 1:
        wanted, highest = f"classes 0 to {outputs - 1}", outputs - 1
    bad = np.argwhere(~_valid_entries(array, loss, outputs))
    if not bad.size:
        bad, wanted = np.argwhere(~valid_rows(array, loss, outputs)), f"{wanted}, not all 0"
    if bad.size:
        where = tuple(int(index) for index in bad[0])
        from_1 = array.min() == 1 and array.max() == highest + 1
        hint = f"; labels that start at 1 need {name} - 1" if from_1 else ""
        raise ValueError(f"{name} must be {wanted}; got {array[where]} at {list(where)}{hint}")
