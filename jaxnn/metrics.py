"""How good predictions are: accuracy for classes, the share of explained variance for numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnn.batch import check_targets, check_values

__all__ = ["accuracy", "binary_accuracy", "r2"]


def accuracy(predictions: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of rows whose largest prediction is at the label; ties go to the lowest class.

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
    predictions = jnp.asarray(check_values("predictions", predictions, 2, wanted))
    check_targets("labels", labels, "categorical_crossentropy", *predictions.shape)
    labels = jnp.asarray(labels)
    if labels.ndim == 2:
        labels = jnp.argmax(labels, axis=1)
    hits = jnp.argmax(predictions, axis=1) == labels.astype(jnp.int32)
    return jnp.mean(hits, dtype=jnp.float32)


def binary_accuracy(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of entries where `probability > 1/2` says what the label says.

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
    probabilities = jnp.asarray(check_values("probabilities", probabilities, 2, wanted))
    check_targets("labels", labels, "binary_crossentropy", *probabilities.shape)
    hits = (probabilities > 0.5) == (jnp.asarray(labels) == 1)
    return jnp.mean(hits, dtype=jnp.float32)


def r2(predictions: jax.Array, targets: jax.Array) -> jax.Array:
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
    predictions = jnp.asarray(check_values("predictions", predictions, 2, wanted))
    check_targets("targets", targets, "mean_squared_error", *predictions.shape)
    predictions = predictions.astype(jnp.float32)
    targets = jnp.asarray(targets).astype(jnp.float32)
    residual = jnp.sum(jnp.square(targets - predictions))
    return 1 - residual / jnp.sum(jnp.square(targets - jnp.mean(targets, axis=0)[None, :]))
