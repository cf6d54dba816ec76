"""How good predictions are, as float32 scalars: accuracy, and the share of explained variance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnn.batch import (
    as_weights,
    check_targets,
    check_values,
    check_weights,
    mean_over_rows,
    valid_rows,
)

__all__ = ["accuracy", "binary_accuracy", "r2"]


def accuracy(
    predictions: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> jax.Array:
    """Return the share of rows whose largest prediction is at the label.

    Ties go to the lowest class. A row with a nan is never right, nor is one whose label is out of
    range where its value is not known, as under `jit`.

    Args:
        predictions: probabilities or logits, shape `(rows, classes)`.
        labels: integer classes `(rows,)`, or weights `(rows, classes)`; the largest is the class.
        weights: how much each row counts, `(rows,)`, as in a `Batch`.

    Raises:
        ValueError: if a shape does not fit, a class is out of range or a weight negative.

    Example:
        >>> accuracy(jnp.array([[0.9, 0.1], [0.8, 0.2]]), jnp.array([0, 1]))
        Array(0.5, dtype=float32)
    """
    scores = _as_scores("predictions", predictions)
    loss, outputs = "categorical_crossentropy", scores.shape[1]
    targets = jnp.asarray(check_targets("labels", labels, loss, *scores.shape))
    classes = jnp.argmax(targets, axis=1) if targets.ndim == 2 else targets
    hits = jnp.argmax(scores, axis=1).astype(int) == classes.astype(int)
    broken = jnp.any(jnp.isnan(scores), axis=1) | ~valid_rows(targets, loss, outputs)
    return _share(hits & ~broken, weights)


def binary_accuracy(
    probabilities: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> jax.Array:
    """Return the share of entries where `probability > 1/2` says what `label > 1/2` says.

    A nan is never right, nor is a row with a label outside of 0 to 1 under `jit`.

    Args:
        probabilities: shape `(rows, outputs)`.
        labels: numbers from 0 to 1, same shape.
        weights: how much each row counts, `(rows,)`, as in a `Batch`.

    Raises:
        ValueError: if the shapes differ or a label is not from 0 to 1.

    Example:
        >>> binary_accuracy(jnp.array([[0.9], [0.8]]), jnp.array([[1.0], [0.0]]))
        Array(0.5, dtype=float32)
    """
    scores = _as_scores("probabilities", probabilities)
    loss, outputs = "binary_crossentropy", scores.shape[1]
    targets = jnp.asarray(check_targets("labels", labels, loss, *scores.shape))
    valid = valid_rows(targets, loss, outputs)[:, None]
    hits = (scores > 0.5) == (targets.astype(float) > 0.5)
    return _share(hits & valid & ~jnp.isnan(scores), weights)


def r2(predictions: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None) -> jax.Array:
    """Return the coefficient of determination, `1 - sum (t - p)^2 / sum (t - mean t)^2`.

    1 is perfect, and 0 is no better than each output's mean.
    Constant targets give -inf or nan.

    Args:
        predictions: shape `(rows, outputs)`.
        targets: numbers of the same shape.
        weights: how much each row counts in the sums and in the mean, `(rows,)`, as in a `Batch`.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> r2(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1.0], [2.0], [3.0]]))
        Array(1., dtype=float32)
    """
    p = _as_scores("predictions", predictions).astype(jnp.float32)
    t = jnp.asarray(check_targets("targets", targets, "mean_squared_error", *p.shape))
    t = t.astype(jnp.float32)
    w = as_weights(check_weights("weights", weights, len(p)), p.dtype)
    by_row = 1 if w is None else w[:, None]
    mean = jnp.mean(t, axis=0) if w is None else jnp.sum(by_row * t, axis=0) / jnp.sum(w)
    spread = by_row * jnp.square(t - mean[None, :])
    return 1 - jnp.sum(by_row * jnp.square(t - p)) / jnp.sum(spread)


def _share(hits: jax.Array, weights: ArrayLike | None) -> jax.Array:
    w = as_weights(check_weights("weights", weights, len(hits)), jnp.float32)
    return mean_over_rows(hits.astype(jnp.float32), w)


def _as_scores(name: str, scores: ArrayLike) -> jax.Array:
    return jnp.asarray(check_values(name, scores, 2, "numbers of shape (rows, outputs)"))
