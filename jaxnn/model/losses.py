"""Losses and their derivatives, side by side.

Each loss takes predictions and targets, rows first, and returns one number: the mean over the
rows. Its partner `*_gradient` returns the derivative of that number by every prediction, so the
1/rows is in there already.

Targets that make no sense (a class out of range, a negative weight, a binary label outside of 0
to 1, a number that is not finite) are refused where their values are known. Elsewhere, as under
`jit`, they make the loss and its derivative nan.

Three take what the output layer returns; two, named after the output activation, take the
logits before it. The logit forms are exact and finite for logits of +-1e4, and they are what a
`Model` trains with. The clipped probability form belongs to readers of the book.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnn.batch import check_targets, check_values, valid_rows

__all__ = [
    "LOSSES",
    "binary_crossentropy",
    "binary_crossentropy_gradient",
    "categorical_crossentropy",
    "categorical_crossentropy_gradient",
    "encode",
    "mean_squared_error",
    "mean_squared_error_gradient",
    "sigmoid_crossentropy",
    "sigmoid_crossentropy_gradient",
    "softmax_crossentropy",
    "softmax_crossentropy_gradient",
]

LOSSES: tuple[str, ...] = (
    "mean_squared_error",
    "binary_crossentropy",
    "categorical_crossentropy",
)
"""The losses by name."""

CLIP = 1e-7


def encode(targets: jax.Array, outputs: int, dtype: jnp.dtype) -> jax.Array:
    """Targets as a float matrix `(rows, outputs)`; integer classes `(rows,)` become one-hot.

    Example:
        >>> encode(jnp.array([2, 0]), 3, jnp.dtype("float32"))
        Array([[0., 0., 1.],
               [1., 0., 0.]], dtype=float32)
    """
    if targets.ndim == 1:
        return jax.nn.one_hot(targets.astype(int), outputs, dtype=dtype)
    return targets.astype(dtype)


def mean_squared_error(predictions: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Mean squared error `mean((predictions - targets)^2)`, with no factor 1/2.

    Args:
        predictions: shape `(rows, outputs)`, float.
        targets: numbers of the same shape.

    Returns:
        A scalar of the predictions' dtype.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if the shapes differ.

    Example:
        >>> mean_squared_error(jnp.array([[9.0], [3.0]]), jnp.array([[3.0], [3.0]]))
        Array(18., dtype=float32)
    """
    predictions, targets = _border("predictions", predictions, targets, "mean_squared_error")
    return jnp.mean(jnp.square(predictions - targets))


def mean_squared_error_gradient(predictions: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Derivative by the predictions: `2 (predictions - targets) / (rows outputs)`.

    Args and errors as for `mean_squared_error`; returns an array of shape `(rows, outputs)`.

    Example:
        >>> mean_squared_error_gradient(jnp.array([[9.0]]), jnp.array([[3.0]]))
        Array([[12.]], dtype=float32)
    """
    predictions, targets = _border("predictions", predictions, targets, "mean_squared_error")
    return 2 * (predictions - targets) / predictions.size


def binary_crossentropy(probabilities: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Binary cross-entropy `-mean(y log p + (1 - y) log(1 - p))`.

    Args:
        probabilities: `p`, shape `(rows, outputs)`, float; clipped to `[1e-7, 1 - 1e-7]`.
        labels: `y`, from 0 to 1, same shape.

    Returns:
        A scalar of the probabilities' dtype.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if the shapes differ or a label is not from 0 to 1.

    Example:
        >>> binary_crossentropy(jnp.array([[0.5], [0.5]]), jnp.array([[0.0], [1.0]]))
        Array(0.6931472, dtype=float32)
    """
    p, y = _border("probabilities", probabilities, labels, "binary_crossentropy")
    p = _clip(p)
    return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log1p(-p))


def binary_crossentropy_gradient(probabilities: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Derivative by the probabilities: `(p - y) / (p (1 - p)) / (rows outputs)`.

    It is 0 where the clip holds the loss constant. Args and errors as for `binary_crossentropy`;
    returns an array of shape `(rows, outputs)`.

    Example:
        >>> binary_crossentropy_gradient(jnp.array([[0.5]]), jnp.array([[1.0]]))
        Array([[-2.]], dtype=float32)
    """
    p, y = _border("probabilities", probabilities, labels, "binary_crossentropy")
    clipped = _clip(p)
    slope = (clipped - y) / (clipped * (1 - clipped)) / p.size
    return jnp.where((clipped == p) | jnp.isnan(y), slope, jnp.zeros_like(slope))


def categorical_crossentropy(probabilities: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Categorical cross-entropy `-mean over rows of log p_y`, or of `sum_k w_k log p_k`.

    Args:
        probabilities: `p`, shape `(rows, classes)`, float; clipped to `[1e-7, 1 - 1e-7]`.
        labels: integer classes `(rows,)`, or non-negative weights `w` `(rows, classes)`, which
            are one-hot rows or soft labels.

    Returns:
        A scalar of the probabilities' dtype.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if a shape does not fit, a class is out of range, a weight is negative or a
            row of weights is all 0.

    Example:
        >>> categorical_crossentropy(jnp.full((4, 3), 1 / 3), jnp.array([0, 1, 2, 0]))
        Array(1.0986123, dtype=float32)
    """
    p, y = _border("probabilities", probabilities, labels, "categorical_crossentropy")
    return -jnp.mean(jnp.sum(y * jnp.log(_clip(p)), axis=1))


def categorical_crossentropy_gradient(probabilities: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Derivative by the probabilities: `-w / p / rows`, 0 where the clip holds.

    Args and errors as for `categorical_crossentropy`; returns shape `(rows, classes)`.

    Example:
        >>> categorical_crossentropy_gradient(jnp.array([[0.5, 0.5]]), jnp.array([1]))
        Array([[ 0., -2.]], dtype=float32)
    """
    p, y = _border("probabilities", probabilities, labels, "categorical_crossentropy")
    clipped = _clip(p)
    slope = jnp.where(y == 0, jnp.zeros_like(p), -y / clipped / p.shape[0])
    return jnp.where((clipped == p) | jnp.isnan(y), slope, jnp.zeros_like(slope))


def sigmoid_crossentropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Binary cross-entropy of `sigmoid(logits)`, from the logits: `mean(log(1 + e^z) - y z)`.

    Written as `y log(1 + e^-z) + (1 - y) log(1 + e^z)`, whose small values keep their digits.

    Args:
        logits: `z`, shape `(rows, outputs)`, float, any size.
        labels: `y`, from 0 to 1, same shape.

    Returns:
        A scalar of the logits' dtype.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if the shapes differ or a label is not from 0 to 1.

    Example:
        >>> sigmoid_crossentropy(jnp.array([[-1e4], [1e4]]), jnp.array([[1.0], [1.0]]))
        Array(5000., dtype=float32)
    """
    z, y = _border("logits", logits, labels, "binary_crossentropy")
    return jnp.mean(y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z))


def sigmoid_crossentropy_gradient(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Derivative by the logits: `(sigmoid(z) - y) / (rows outputs)`.

    Written as `(1 - y) sigmoid(z) - y sigmoid(-z)`, whose small values keep their digits.
    Args and errors as for `sigmoid_crossentropy`; returns shape `(rows, outputs)`.

    Example:
        >>> sigmoid_crossentropy_gradient(jnp.array([[0.0]]), jnp.array([[1.0]]))
        Array([[-0.5]], dtype=float32)
    """
    z, y = _border("logits", logits, labels, "binary_crossentropy")
    return ((1 - y) * jax.nn.sigmoid(z) - y * jax.nn.sigmoid(-z)) / z.size


def softmax_crossentropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Categorical cross-entropy of `softmax(logits)`: `mean over rows of log sum e^z - z_y`.

    With weights in place of classes, the mean of `sum_k w_k (log sum e^z - z_k)`.

    Args:
        logits: `z`, shape `(rows, classes)`, float, any size.
        labels: integer classes `(rows,)`, or non-negative weights `w` `(rows, classes)`, which
            are one-hot rows or soft labels.

    Returns:
        A scalar of the logits' dtype.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if a shape does not fit, a class is out of range, a weight is negative or a
            row of weights is all 0.

    Example:
        >>> softmax_crossentropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
        Array(20000., dtype=float32)
    """
    z, y = _border("logits", logits, labels, "categorical_crossentropy")
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(z, axis=1), axis=1))


def softmax_crossentropy_gradient(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Derivative by the logits: `((sum_k w_k) softmax(z) - w) / rows`, `w` one-hot for classes.

    Args and errors as for `softmax_crossentropy`; returns shape `(rows, classes)`.

    Example:
        >>> softmax_crossentropy_gradient(jnp.array([[0.0, 0.0]]), jnp.array([1]))
        Array([[ 0.5, -0.5]], dtype=float32)
    """
    z, y = _border("logits", logits, labels, "categorical_crossentropy")
    return (jnp.sum(y, axis=1, keepdims=True) * jax.nn.softmax(z, axis=1) - y) / z.shape[0]


def _clip(probabilities: jax.Array) -> jax.Array:
    return jnp.clip(probabilities, CLIP, 1 - CLIP)


def _border(
    name: str, predictions: ArrayLike, targets: ArrayLike, loss: str
) -> tuple[jax.Array, jax.Array]:
    """Refuses what does not fit; returns predictions and encoded targets of one float dtype."""
    values = jnp.asarray(check_values(name, predictions, 2, "numbers of shape (rows, outputs)"))
    if values.dtype not in (jnp.float32, jnp.float64):
        values = values.astype(jnp.float32)  # half precision rounds 1 - 1e-7 to 1
    outputs, targets_name = values.shape[1], "targets" if loss == "mean_squared_error" else "labels"
    targets = jnp.asarray(check_targets(targets_name, targets, loss, *values.shape))
    valid = valid_rows(targets, loss, outputs)[:, None]
    return values, jnp.where(valid, encode(targets, outputs, values.dtype), jnp.nan)
