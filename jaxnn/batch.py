"""`Batch`: the rows that a loss looks at, and what is refused as rows.

Shapes and dtypes are checked always, also while JAX traces; values only where there are any yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnn.run.checks import as_values, is_traced

__all__ = ["Batch", "check_batch", "check_inputs", "check_targets", "check_values"]


class Batch(NamedTuple):
    """Inputs and targets, a row an example.

    Attributes:
        x: inputs, shape `(rows, features)`, float32.
        y: targets. Integer classes `(rows,)` or one-hot `(rows, classes)` for categorical
            cross-entropy, 0/1 `(rows, outputs)` for binary cross-entropy, floats
            `(rows, outputs)` for squared error.

    Example:
        >>> Batch(x=np.zeros((4, 2), np.float32), y=np.zeros(4, np.int32)).x.shape
        (4, 2)
    """

    x: jax.Array | np.ndarray
    y: jax.Array | np.ndarray


def check_batch(name: str, batch: Any, loss: str, features: int, outputs: int) -> None:
    """Refuses a batch that the network's sizes and loss cannot mean."""
    if not isinstance(batch, Batch):
        raise TypeError(f"{name} must be a jaxnn.Batch(x, y); got a {type(batch).__name__}")
    rows = check_inputs(f"{name}.x", batch.x, features)
    if not is_traced(batch.y):
        y = as_values(f"{name}.y", batch.y)
        if y.ndim and y.shape[0] != rows:
            raise ValueError(f"{name}.y must have {rows} rows, as {name}.x; got shape {y.shape}")
    check_targets(f"{name}.y", batch.y, loss, rows, outputs)


def check_values(name: str, values: Any, dimensions: int, wanted: str) -> Any:
    """A real array with the wanted number of dimensions and at least one row."""
    array = as_values(name, values)
    if array.ndim != dimensions or 0 in array.shape:
        raise ValueError(f"{name} must be {wanted}; got shape {array.shape}")
    return array


def check_inputs(name: str, x: Any, features: int) -> int:
    """Refuses inputs other than finite numbers of shape `(rows, features)`; returns the rows."""
    array = check_values(name, x, 2, f"numbers of shape (rows, {features})")
    if array.dtype == bool or array.shape[1] != features:
        raise ValueError(
            f"{name} must be numbers of shape (rows, {features}), as the network's sizes say; "
            f"got {array.dtype} of shape {array.shape}"
        )
    if isinstance(array, np.ndarray) and not np.all(finite := np.isfinite(array)):
        row, column = np.argwhere(~finite)[0]
        raise ValueError(
            f"{name} must be finite; got {array[row, column]} at row {row}, column {column}"
        )
    return array.shape[0]


def check_targets(name: str, targets: Any, loss: str, rows: int, outputs: int) -> None:
    """Refuses targets that the loss cannot mean.

    Args:
        name: the argument's name, for the message.
        targets: what came.
        loss: the loss's name.
        rows: number of rows of the predictions.
        outputs: number of columns of the predictions.

    Raises:
        TypeError: if the targets are not real numbers.
        ValueError: if their shape, dtype or values do not fit.
    """
    array = as_values(name, targets)
    if loss == "categorical_crossentropy":
        _check_classes(name, array, rows, outputs)
        return
    wanted = "0 or 1" if loss == "binary_crossentropy" else "numbers"
    if array.shape != (rows, outputs):
        raise ValueError(
            f"{name} must be {wanted} of shape {(rows, outputs)}, as the predictions; "
            f"got {array.dtype} of shape {array.shape}"
        )
    if loss == "binary_crossentropy":
        _refuse(name, array, lambda values: (values != 0) & (values != 1), "0 or 1")
    else:
        _refuse(name, array, lambda values: ~np.isfinite(values), "finite")


def _check_classes(name: str, array: Any, rows: int, classes: int) -> None:
    integers = array.ndim == 1 and array.dtype.kind in "iu"
    one_hot = array.ndim == 2 and array.dtype.kind in "iuf"
    if not ((integers and array.shape == (rows,)) or (one_hot and array.shape == (rows, classes))):
        hint = f"; use {name}[:, 0]" if array.shape == (rows, 1) else ""
        raise ValueError(
            f"{name} must be integer classes of shape {(rows,)} or one-hot rows of shape "
            f"{(rows, classes)}; got {array.dtype} of shape {array.shape}{hint}"
        )
    if integers:
        _refuse(name, array, lambda y: (y < 0) | (y >= classes), f"classes 0 to {classes - 1}")
    else:
        _refuse(name, array, lambda y: (y != 0) & (y != 1), "one-hot: 0 or 1")
        _refuse(name, array, lambda y: y.sum(axis=1) != 1, "one-hot: a single 1 in each row")


def _refuse(name: str, array: Any, is_bad: Callable[[Any], Any], wanted: str) -> None:
    if not isinstance(array, np.ndarray):
        return
    bad = np.argwhere(is_bad(array))
    if bad.size:
        where = tuple(int(index) for index in bad[0])
        raise ValueError(f"{name} must be {wanted}; got {array[where]} at {list(where)}")
