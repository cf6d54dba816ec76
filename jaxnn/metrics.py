"""How good predictions are: accuracy for classes, the share of explained variance for numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnn.batch import check_targets, check_values, valid_rows

__all__ = ["accuracy", "binary_accuracy", "r2"]


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Share of rows whose largest prediction is at the label; ties go to the lowest class.

    A row with a nan is never right, and neither is one whose label is out of range.

    Args:
        predictions: probabilities or logits, shape `(rows, classes)`.
        labels: integer classes `(rows,)`, or weights `(rows, classes)`, whose largest is the
            class.

    Returns:
        A float32 scalar between 0 and 1.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if a shape does not fit, a class is out of range or a weight negative.

    Example:
        >>> accuracy(jnp.array([[0.9, 0.1], [0.8, 0.2]]), jnp.array([0, 1]))
        Array(0.5, dtype=float32)
    """
    wanted = "numbers of shape (rows, classes)"
    scores = jnp.asarray(check_values("predictions", predictions, 2, wanted))
    loss, outputs = "categorical_crossentropy", scores.shape[1]
    targets = jnp.asarray(check_targets("labels", labels, loss, *scores.shape))
    classes = jnp.argmax(targets, axis=1) if targets.ndim == 2 else targets
    hits = jnp.argmax(scores, axis=1).astype(int) == classes.astype(int)
    broken = jnp.any(jnp.isnan(scores), axis=1) | ~valid_rows(targets, loss, outputs)
    return jnp.mean(hits & ~broken, dtype=jnp.float32)


def binary_accuracy(probabilities: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Share of entries where `probability > 1/2` says what `label > 1/2` says.

    A nan is never right, and neither is a row with a label outside of 0 to 1.

    Args:
        probabilities: shape `(rows, outputs)`.
        labels: numbers from 0 to 1, same shape.

    Returns:
        A float32 scalar between 0 and 1.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if the shapes differ or a label is not from 0 to 1.

    Example:
        >>> binary_accuracy(jnp.array([[0.9], [0.8]]), jnp.array([[1.0], [0.0]]))
        Array(0.5, dtype=float32)
    """
    wanted = "numbers of shape (rows, outputs)"
    scores = jnp.asarray(check_values("probabilities", probabilities, 2, wanted))
    targets = jnp.asarray(check_targets("labels", labels, "binary_crossentropy", *scores.shape))
    valid = valid_rows(targets, "binary_crossentropy", scores.shape[1])[:, None]
    hits = (scores > 0.5) == (targets.astype(float) > 0.5)
    return jnp.mean(hits & valid & ~jnp.isnan(scores), dtype=jnp.float32)


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
    t = jnp.asarray(check_targets("targets", targets, "mean_squared_error", *p.shape))
    t = t.astype(jnp.float32)
    spread = jnp.square(t - jnp.mean(t, axis=0)[None, :])
    return 1 - jnp.sum(jnp.square(t - p)) / jnp.sum(spread)
