"""Losses: public functions of predictions and targets, and `OutputLoss`, which networks train with.

Each public loss takes predictions and targets, rows first, and returns their mean over the rows, a
scalar of the predictions' dtype; with weights, one a row, `sum(w l) / sum(w)`. The losses of
errors, and `binary_crossentropy` and `categorical_crossentropy`, take what the output layer
returns; the latter two clip probabilities to `[1e-7, 1 - 1e-7]`, as textbooks do.
`sigmoid_crossentropy` and `softmax_crossentropy` take the logits before the output activation, and
are exact and finite for logits of +-1e4.

A shape that does not fit, and targets without a meaning (a class out of range, a negative weight,
a row of weights that are all 0, a binary label outside of 0 to 1, a number that is not finite),
raise a `ValueError` that names the argument. Where the targets' values are not known, as under
`jit`, the loss and its derivative are nan instead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import entr

from jaxnn.batch import (
    CROSSENTROPIES,
    as_weights,
    check_targets,
    check_values,
    check_weights,
    mean_over_rows,
    valid_rows,
)
from jaxnn.model.activations import ACTIVATIONS, Activation, softmax, softmax_backward

__all__ = [
    "LOSSES",
    "binary_crossentropy",
    "categorical_crossentropy",
    "huber",
    "mean_absolute_error",
    "mean_squared_error",
    "sigmoid_crossentropy",
    "softmax_crossentropy",
]

CLIP = 1e-7
MAX_WRITTEN_OUT = 16
"""Units over which a sum is written out, as XLA then fuses it with what stands around it."""


def mean_squared_error(
    predictions: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None
) -> jax.Array:
    """Return the mean squared error `mean((predictions - targets)^2)`, without a factor 1/2.

    Args:
        predictions: shape `(rows, outputs)`, float.
        targets: numbers of the same shape.
        weights: how much each row counts, `(rows,)`, as in a `Batch`.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if the shapes differ, or a target is not finite.

    Example:
        >>> mean_squared_error(jnp.array([[9.0], [3.0]]), jnp.array([[3.0], [3.0]]))
        Array(18., dtype=float32)
    """
    return _mean_of_errors("mean_squared_error", predictions, targets, weights)


def mean_absolute_error(
    predictions: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None
) -> jax.Array:
    """Return the mean absolute error `mean(|predictions - targets|)`; its slope at 0 is 0.

    Arguments and errors are those of `mean_squared_error`.

    Example:
        >>> mean_absolute_error(jnp.array([[9.0], [3.0]]), jnp.array([[3.0], [3.0]]))
        Array(3., dtype=float32)
    """
    return _mean_of_errors("mean_absolute_error", predictions, targets, weights)


def huber(
    predictions: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None
) -> jax.Array:
    """Return the mean of `e^2 / 2` for errors `e` from -1 to 1, and of `|e| - 1/2` for others.

    It is the loss of Huber (1964) with a delta of 1.

    Arguments and errors are those of `mean_squared_error`.

    Example:
        >>> huber(jnp.array([[9.0], [4.0]]), jnp.array([[3.0], [3.0]]))
        Array(3., dtype=float32)
    """
    return _mean_of_errors("huber", predictions, targets, weights)


def binary_crossentropy(
    probabilities: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> jax.Array:
    """Return the binary cross-entropy `-mean(y log p + (1 - y) log(1 - p))`.

    Args:
        probabilities: `p`, shape `(rows, outputs)`, float; clipped.
        labels: `y`, from 0 to 1, same shape.
        weights: how much each row counts, `(rows,)`, as in a `Batch`.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if the shapes differ, or a label is not from 0 to 1.

    Example:
        >>> binary_crossentropy(jnp.array([[0.5], [0.5]]), jnp.array([[0.0], [1.0]]))
        Array(0.6931472, dtype=float32)
    """
    p, y, w = _border("probabilities", probabilities, labels, weights, "binary_crossentropy")
    p = jnp.clip(p, CLIP, 1 - CLIP)
    return -mean_over_rows(y * jnp.log(p) + (1 - y) * jnp.log1p(-p), w)


def categorical_crossentropy(
    probabilities: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> jax.Array:
    """Return the categorical cross-entropy `-mean over rows of log p_y`, or of `sum_k w_k log p_k`.

    Args:
        probabilities: `p`, shape `(rows, classes)`, float; clipped.
        labels: integer classes `(rows,)`, or non-negative weights `w` `(rows, classes)`, which
            are one-hot rows or soft labels.
        weights: how much each row counts, `(rows,)`, as in a `Batch`.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if a shape does not fit, a class is out of range, a weight is negative, or a row
            of weights is all 0.

    Example:
        >>> categorical_crossentropy(jnp.full((4, 3), 1 / 3), jnp.array([0, 1, 2, 0]))
        Array(1.0986123, dtype=float32)
    """
    p, y, w = _border("probabilities", probabilities, labels, weights, "categorical_crossentropy")
    return -mean_over_rows(jnp.sum(y * jnp.log(jnp.clip(p, CLIP, 1 - CLIP)), axis=1), w)


def sigmoid_crossentropy(
    logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> jax.Array:
    """Return the binary cross-entropy of `sigmoid(logits)`: `mean(log(1 + e^z) - y z)`.

    Args:
        logits: `z`, shape `(rows, outputs)`, float, any size.
        labels: `y`, from 0 to 1, same shape.
        weights: how much each row counts, `(rows,)`, as in a `Batch`.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if the shapes differ, or a label is not from 0 to 1.

    Example:
        >>> sigmoid_crossentropy(jnp.array([[-1e4], [1e4]]), jnp.array([[1.0], [1.0]]))
        Array(5000., dtype=float32)
    """
    z, y, w = _border("logits", logits, labels, weights, "binary_crossentropy")
    return mean_over_rows(_sigmoid_terms(z, y), w)


def softmax_crossentropy(
    logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> jax.Array:
    """Return the categorical cross-entropy of `softmax(logits)`: `mean of log sum e^z - z_y`.

    With weights in place of classes, return the mean of `sum_k w_k (log sum e^z - z_k)`.

    Args:
        logits: `z`, shape `(rows, classes)`, float, any size.
        labels: classes or weights, as for `categorical_crossentropy`.
        weights: how much each row counts, `(rows,)`, as in a `Batch`.

    Raises:
        TypeError: if an argument is not an array of real numbers.
        ValueError: if a shape does not fit, a class is out of range, a weight is negative, or a row
            of weights is all 0.

    Example:
        >>> softmax_crossentropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
        Array(20000., dtype=float32)
    """
    z, y, w = _border("logits", logits, labels, weights, "categorical_crossentropy")
    return -mean_over_rows(jnp.sum(y * jax.nn.log_softmax(z, axis=1), axis=1), w)


def _mean_of_errors(
    loss: str, predictions: ArrayLike, targets: ArrayLike, weights: ArrayLike | None
) -> jax.Array:
    p, y, w = _border("predictions", predictions, targets, weights, loss)
    return mean_over_rows(ERROR_LOSSES[loss].value(p - y), w)


def _border(
    name: str, predictions: ArrayLike, targets: ArrayLike, weights: ArrayLike | None, loss: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Refuse what does not fit; return predictions, `(rows, outputs)` targets and weights."""
    values = jnp.asarray(check_values(name, predictions, 2, "numbers of shape (rows, outputs)"))
    if values.dtype not in (jnp.float32, jnp.float64):
        values = values.astype(jnp.float32)  # half precision rounds 1 - 1e-7 to 1
    targets_name = "labels" if loss in CROSSENTROPIES else "targets"
    y = jnp.asarray(check_targets(targets_name, targets, loss, *values.shape))
    valid = valid_rows(y, loss, values.shape[1])[:, None]
    if y.ndim == 1:
        y = jax.nn.one_hot(y.astype(int), values.shape[1])
    w = as_weights(check_weights("weights", weights, len(values)), values.dtype)
    return values, jnp.where(valid, y.astype(values.dtype), jnp.nan), w


Units = Sequence[jax.Array]
"""The outputs for one row as scalars, or for many rows as vectors."""


class PerExample(NamedTuple):
    """A number for each example, written out unit by unit: a loss, or whether the answer is right.

    `score(logits, target)` returns `(factor, rest)`. The number is `log(factor) + rest`, so that
    one logarithm does for the product of many rows' factors; None stands for a factor of 1.
    """

    score: Callable[[Units, jax.Array], tuple[jax.Array | None, jax.Array]]
    per_output: bool = False  # whether the mean is over the outputs as well as over the rows
    factor_doubles: bool = False  # up to 2^outputs; other factors are up to the number of outputs

    def weighted(
        self, logits: Units, target: jax.Array, weight: jax.Array | None
    ) -> tuple[jax.Array | None, jax.Array]:
        """Return the score times the weight of its row; it needs a logarithm of its own."""
        factor, rest = self.score(logits, target)
        if weight is None:
            return factor, rest
        return None, weight * (rest if factor is None else rest + jnp.log(factor))


class ErrorLoss(NamedTuple):
    """A loss of each output by itself, by its error: the prediction minus the target.

    Attributes:
        value: errors to losses, element by element.
        slope: errors to the derivatives of the losses, by hand.
    """

    value: Callable[[jax.Array], jax.Array]
    slope: Callable[[jax.Array], jax.Array]


class OutputLoss(NamedTuple):
    """Output activation and loss as one function of the logits, which is stable for any size.

    Each cross-entropy has three forms, as no two give the same bits at the same pace: the plain
    one is the witness that the others are checked against; the derivative needs every exponential
    by itself; the form per example saves one exponential a row, and most logarithms.

    Attributes:
        mean_loss: `(logits, targets, weights)`, rows first, to the mean loss, for `jax.grad`.
        value_and_slope: `(logits, targets)`, logits `(outputs, rows)`, to each row's loss `(rows,)`
            and its derivative by the logits, `(outputs, rows)`, by hand.
        per_example_loss: the same loss for `jax.vmap` over many candidates.
    """

    mean_loss: Callable[..., jax.Array]
    value_and_slope: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    per_example_loss: PerExample


def _softmax_value_and_slope(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`log sum e^z - z_y` and `softmax(z) - y`; with weights, the sums of `w_k` times these."""
    largest = _over_units(jnp.maximum, logits)
    exponentials = jnp.exp(logits - largest)
    total = _over_units(operator.add, exponentials)
    if targets.ndim == 2:
        weights = targets.T.astype(logits.dtype)
        losses = weights * (jnp.log(total) + (largest - logits))
        slopes = _over_units(operator.add, weights) * (exponentials / total) - weights
        return _over_units(operator.add, losses)[0], slopes
    # `where` chooses the class: a product with a one-hot row takes longer.
    is_answer = jnp.arange(len(logits))[:, None] == targets.astype(int)[None, :]
    answer = _over_units(operator.add, jnp.where(is_answer, logits, 0))
    slopes = exponentials / total - is_answer.astype(logits.dtype)
    return (jnp.log(total) + (largest - answer))[0], slopes


def _softmax_per_example(logits: Units, target: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """`log sum e^z - z_y`, relative to the largest logit: factor `sum e^(z - max z)`.

    The maximum runs along the units. Of `e^(old max - new max)` and `e^(z - new max)` one is 1, so
    a unit takes one exponential, and the first takes none.
    """
    largest = answer = logits[0]
    factor = jnp.ones_like(largest)
    is_class = target.ndim == largest.ndim
    for number, z in enumerate(logits[1:], start=1):
        smaller = jnp.exp(-jnp.abs(z - largest))
        factor = jnp.where(z > largest, factor * smaller + 1, factor + smaller)
        largest = jnp.where(z > largest, z, largest)
        answer = jnp.where(target == number, z, answer) if is_class else answer
    if is_class:
        return factor, largest - answer
    total, pairs = jnp.log(factor), zip(list(target), logits, strict=True)
    return None, sum_of([weight * (total + (largest - z)) for weight, z in pairs])


def _sigmoid_terms(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`log(1 + e^z) - y z` of each output, written so that small values keep their digits."""
    return labels * jax.nn.softplus(-logits) + (1 - labels) * jax.nn.softplus(logits)


def _sigmoid_value_and_slope(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean of the outputs' terms, and of `sigmoid(z) - y`, which keeps its digits as well."""
    y, share = targets.T.astype(logits.dtype), 1 / len(logits)
    slopes = (1 - y) * jax.nn.sigmoid(logits) - y * jax.nn.sigmoid(-logits)
    return _over_units(operator.add, _sigmoid_terms(logits, y))[0] * share, slopes * share


def _sigmoid_per_example(logits: Units, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of the outputs' terms, with `log(1 + e^z) = max(z, 0) + log(1 + e^-|z|)`."""
    factor = reduce(operator.mul, [1 + jnp.exp(-jnp.abs(z)) for z in logits])
    pairs = zip(list(targets), logits, strict=True)
    return factor, sum_of([ACTIVATIONS["relu"].forward(z) - y * z for y, z in pairs])


def _of_errors(output: str, loss: str) -> OutputLoss:
    of_error, activation = ERROR_LOSSES[loss], ACTIVATIONS[output]
    plain = activation.forward
    if output == "softmax":  # over the units, which come last there
        activation = Activation(
            lambda z: softmax(z.T).T, lambda a, upstream: softmax_backward(a.T, upstream.T).T
        )

    def value_and_slope(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs, share = activation.forward(logits), 1 / len(logits)
        errors = outputs - targets.T.astype(logits.dtype)
        losses = _over_units(operator.add, of_error.value(errors))[0] * share
        return losses, activation.pull_back(logits, outputs, of_error.slope(errors) * share)

    def score(logits: Units, targets: jax.Array) -> tuple[None, jax.Array]:
        if output == "softmax":
            largest = reduce(jnp.maximum, logits)
            exponentials = [jnp.exp(z - largest) for z in logits]
            total = sum_of(exponentials)
            predictions = [e / total for e in exponentials]
        else:
            predictions = [plain(z) for z in logits]
        pairs = zip(predictions, list(targets), strict=True)
        return None, sum_of([of_error.value(p - y) for p, y in pairs])

    def mean_loss(
        logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None
    ) -> jax.Array:
        return _mean_of_errors(loss, plain(logits), targets, weights)

    return OutputLoss(mean_loss, value_and_slope, PerExample(score, per_output=True))


def _over_units(operation: Callable[..., jax.Array], values: jax.Array) -> jax.Array:
    """Return the sum, or the maximum, over the units of `(units, rows)`: `(1, rows)`."""
    if len(values) <= MAX_WRITTEN_OUT:
        return reduce(operation, jnp.split(values, len(values)))
    return (jnp.max if operation is jnp.maximum else jnp.sum)(values, axis=0, keepdims=True)


def sum_of(terms: Units) -> jax.Array:
    """Return the sum, term after term, which XLA fuses with what stands around it."""
    return reduce(operator.add, terms)


ERROR_LOSSES: dict[str, ErrorLoss] = {
    "mean_squared_error": ErrorLoss(jnp.square, lambda error: 2 * error),
    # Not `abs`, whose derivative by JAX is 1 at 0.
    "mean_absolute_error": ErrorLoss(lambda error: error * jnp.sign(error), jnp.sign),
    "huber": ErrorLoss(
        lambda error: (near := jnp.clip(error, -1, 1)) * (error - near / 2),
        lambda error: jnp.clip(error, -1, 1),
    ),
}
"""The losses that any output activation goes with."""

LOSSES = (*ERROR_LOSSES, *CROSSENTROPIES)
"""The losses that `jaxnn.mlp` takes."""

OUTPUT_LOSSES: dict[tuple[str, str], OutputLoss] = {
    ("softmax", "categorical_crossentropy"): OutputLoss(
        softmax_crossentropy, _softmax_value_and_slope, PerExample(_softmax_per_example)
    ),
    ("sigmoid", "binary_crossentropy"): OutputLoss(
        sigmoid_crossentropy, _sigmoid_value_and_slope, PerExample(_sigmoid_per_example, True, True)
    ),
    **{(output, loss): _of_errors(output, loss) for loss in ERROR_LOSSES for output in ACTIVATIONS},
}
"""Every sensible pair of output activation and loss."""


def constant_loss(
    output: str, loss: str, targets: np.ndarray, weights: np.ndarray | None, outputs: int
) -> float | None:
    """Return the lowest loss of an answer that is the same for every row, in float64.

    It is the entropy of the mean distribution, the mean entropy of the outputs, or their mean
    variance, and more where the output activation cannot reach the mean. Of other losses of errors
    it is looked for. None stands for softmax outputs of which it is not known.
    """
    rows = np.eye(outputs)[targets] if targets.ndim == 1 else targets.astype(np.float64)
    mean = np.average(rows, axis=0, weights=weights)
    if loss == "categorical_crossentropy":
        return float(mean.sum() * entr(mean / mean.sum()).sum())
    if loss == "binary_crossentropy":
        return float(np.mean(entr(mean) + entr(1 - mean)))
    is_squared, bounds = loss == "mean_squared_error", ACTIVATIONS[output].bounds
    is_reached = is_squared and np.all(mean >= 0) and np.isclose(mean.sum(), 1)
    if output == "softmax" and not is_reached:
        return None
    if is_squared:
        beyond = mean - np.clip(mean, *bounds)
        variance = np.average(np.square(rows - mean), axis=0, weights=weights)
        return float(np.mean(variance + np.square(beyond)))
    ends = np.clip([rows.min(axis=0), rows.max(axis=0)], *bounds).T
    columns = zip(rows.T, ends, strict=True)
    return float(np.mean([_lowest(ERROR_LOSSES[loss], *column, weights) for column in columns]))


def _lowest(
    of_error: ErrorLoss, numbers: np.ndarray, ends: np.ndarray, weights: np.ndarray | None
) -> float:
    """The lowest mean loss of one answer between these ends; the losses are convex."""

    def mean_loss(answer: float) -> np.floating:
        return np.average(of_error.value(jnp.asarray(answer - numbers)), weights=weights)

    options = {"xatol": 1e-9 * (1 + np.max(np.abs(ends)))}
    with jax.enable_x64(True):
        return minimize_scalar(mean_loss, bounds=ends, method="bounded", options=options).fun
