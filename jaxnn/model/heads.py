"""A head: the output activation and the loss, taken together as one function of the logits.

Taken together they are stable where each alone is not: softmax with categorical cross-entropy
and sigmoid with binary cross-entropy need no clipping, and their derivative is `output - target`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import entr

from jaxnn.model.activations import ACTIVATIONS, softmax, softmax_backward
from jaxnn.model.losses import mean_squared_error, sigmoid_crossentropy, softmax_crossentropy

MOST_WRITTEN_OUT = 16
"""Units over which a sum is written out, as XLA then fuses it with what stands around it."""


class Head(NamedTuple):
    """Output activation and loss as functions of the last layer's logits.

    Attributes:
        loss: `(logits, targets)`, rows first, to the mean loss: what `jax.grad` differentiates.
        rows: `(logits, targets)`, logits units first and rows last, to each row's loss `(rows,)`
            and its derivative by the row's logits `(outputs, rows)`, by hand.
    """

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    rows: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def _softmax_crossentropy(logits: jax.Array, targets: jax.Array):
    """`log sum_k e^(z_k) - z_y` and `softmax(z) - y` for classes.

    A class is chosen by `where`: a product with a one-hot row would take longer. For weights they
    are `sum_k w_k (log sum_j e^(z_j) - z_k)` and `(sum_k w_k) softmax(z) - w`.
    """
    largest = _over_units(jnp.maximum, logits)
    exponentials = jnp.exp(logits - largest)
    total = _over_units(operator.add, exponentials)
    if targets.ndim == 2:
        weights = targets.T.astype(logits.dtype)
        losses = weights * (jnp.log(total) + (largest - logits))
        slopes = _over_units(operator.add, weights) * (exponentials / total) - weights
        return _over_units(operator.add, losses)[0], slopes
    is_answer = jnp.arange(len(logits))[:, None] == targets.astype(int)[None, :]
    answer = _over_units(operator.add, jnp.where(is_answer, logits, 0))
    slopes = exponentials / total - is_answer.astype(logits.dtype)
    return (jnp.log(total) + (largest - answer))[0], slopes


def _sigmoid_crossentropy(logits: jax.Array, targets: jax.Array):
    """The mean of `y log(1 + e^-z) + (1 - y) log(1 + e^z)`, and of `sigmoid(z) - y`.

    The latter as `(1 - y) sigmoid(z) - y sigmoid(-z)`, whose small values keep their digits.
    """
    y, share = targets.T.astype(logits.dtype), 1 / len(logits)
    losses = y * jax.nn.softplus(-logits) + (1 - y) * jax.nn.softplus(logits)
    slopes = (1 - y) * jax.nn.sigmoid(logits) - y * jax.nn.sigmoid(-logits)
    return _over_units(operator.add, losses)[0] * share, slopes * share


def _squared_error(output: str) -> Head:
    forward, backward = ACTIVATIONS[output]
    if output == "softmax":  # over the units, which come last there
        forward, backward = lambda z: softmax(z.T).T, lambda a, g: softmax_backward(a.T, g.T).T

    def rows(logits: jax.Array, targets: jax.Array):
        outputs, share = forward(logits), 1 / len(logits)
        off = outputs - targets.T.astype(logits.dtype)
        errors = _over_units(operator.add, off * off)[0]
        return errors * share, backward(outputs, 2 * off * share)

    def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return mean_squared_error(ACTIVATIONS[output].forward(logits), targets)

    return Head(loss, rows)


def _over_units(
    operation: Callable[[jax.Array, jax.Array], jax.Array], values: jax.Array
) -> jax.Array:
    """Sum, or maximum, over the units of `(units, rows)`: `(1, rows)`."""
    if len(values) <= MOST_WRITTEN_OUT:
        return reduce(operation, jnp.split(values, len(values)))
    return (jnp.max if operation is jnp.maximum else jnp.sum)(values, axis=0, keepdims=True)


OUTPUT_LOSSES: dict[tuple[str, str], Head] = {
    ("softmax", "categorical_crossentropy"): Head(softmax_crossentropy, _softmax_crossentropy),
    ("sigmoid", "binary_crossentropy"): Head(sigmoid_crossentropy, _sigmoid_crossentropy),
    **{(output, "mean_squared_error"): _squared_error(output) for output in ACTIVATIONS},
}
"""Every sensible pair of output activation and loss."""


RANGES = {"relu": (0.0, np.inf), "sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}
"""The bounds of an output, for activations that bound each output by itself."""


def constant_loss(output: str, loss: str, targets: np.ndarray, outputs: int) -> float | None:
    """Return the lowest loss of an answer that is the same for every row, in float64.

    For categorical cross-entropy this is the entropy of the mean distribution, for binary
    cross-entropy the mean entropy of the outputs, and for squared error their mean variance, more
    where the output activation cannot reach the mean.

    Args:
        output: name of the output activation.
        loss: name of the loss.
        targets: classes `(rows,)`, or numbers `(rows, outputs)`.
        outputs: number of outputs.

    Returns:
        The loss, or None for the squared error of softmax outputs that cannot reach the mean.

    Example:
        >>> constant_loss("softmax", "categorical_crossentropy", np.array([0, 1]), 2)
        0.6931471805599453
    """
    rows = np.eye(outputs)[targets] if targets.ndim == 1 else targets.astype(np.float64)
    mean = rows.mean(axis=0)
    if loss == "categorical_crossentropy":
        return float(mean.sum() * entr(mean / mean.sum()).sum())
    if loss == "binary_crossentropy":
        return float(np.mean(entr(mean) + entr(1 - mean)))
    if output == "softmax" and not (np.all(mean >= 0) and np.isclose(mean.sum(), 1)):
        return None
    beyond = mean - np.clip(mean, *RANGES.get(output, (-np.inf, np.inf)))
    return float(np.mean(rows.var(axis=0) + np.square(beyond)))
