"""How good predictions are: accuracy for classes, the share of explained variance for numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnn.batch import check_targets, check_values

__all__ = ["accuracy", "binary_accuracy", "r2"]


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Share of rows whose largest prediction is at the label; ties go to the lowest class.

    A row with a nan is never right.

    Args:
        predictions: probabilities or logits, shape `(rows, classes)`.
        labels: integer classes `(rows,)`, or one-hot rows `(rows, classes)`.

    Returns:
        A float32 scalar between 0 and 1.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if a shape does not fit, a class is out of range or a row is not one-hot.

    Example:
        >>> accuracy(jnp.array([[0.9, 0.1], [0.8, 0.2]]), jnp.array([0, 1]))
        Array(0.5, dtype=float32)
    """
    wanted = "numbers of shape (rows, classes)"
    scores = jnp.asarray(check_values("predictions", predictions, 2, wanted))
    check_targets("labels", labels, "categorical_crossentropy", *scores.shape)
    classes = jnp.asarray(labels)
    classes = jnp.argmax(classes, axis=1) if classes.ndim == 2 else classes
    hits = jnp.argmax(scores, axis=1).astype(jnp.int32) == classes.astype(jnp.int32)
    return jnp.mean(hits & ~jnp.any(jnp.isnan(scores), axis=1), dtype=jnp.float32)


def binary_accuracy(probabilities: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Share of entries where `probability > 1/2` says what the label says; nan is never right.

    Args:
        probabilities: shape `(rows, outputs)`.
        labels: 0 or 1, same shape.

    Returns:
        A float32 scalar between 0 and 1.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if the shapes differ or a label is neither 0 nor 1.

    Example:
        >>> binary_accuracy(jnp.array([[0.9], [0.8]]), jnp.array([[1.0], [0.0]]))
        Array(0.5, dtype=float32)
    """
    wanted = "numbers of shape (rows, outputs)"
    scores = jnp.asarray(check_values("probabilities", probabilities, 2, wanted))
    check_targets("labels", labels, "binary_crossentropy", *scores.shape)
    hits = (scores > 0.5) == jnp.asarray(labels).astype(bool)
    return jnp.mean(hits & ~jnp.isnan(scores), dtype=jnp.float32)


def r2(predictions: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Coefficient of determination `1 - sum (t - p)^2 / sum (t - mean t)^2`, over all outputs.

    1 is perfect, 0 is no better than predicting each output's mean; -inf or nan where the
    targets do not vary at all.

    Args:
        predictions: shape `(rows, outputs)`.
        targets: numbers of the same shape.

    Returns:
        A float32 scalar of at most 1.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if the shapes differ.

    Example:
        >>> r2(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1.0], [2.0], [3.0]]))
        Array(1., dtype=float32)
    """
    wanted = "numbers of shape (rows, outputs)"
    p = jnp.asarray(check_values("predictions", predictions, 2, wanted)).astype(jnp.float32)
    check_targets("targets", targets, "mean_squared_error", *p.shape)
    t = jnp.asarray(targets).astype(jnp.float32)
    spread = jnp.square(t - jnp.mean(t, axis=0)[None, :])
    return 1 - jnp.sum(jnp.square(t - p)) / jnp.sum(spread)
