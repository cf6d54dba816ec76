"""The score of one row from its logits, written out unit by unit.

A score is `log(factor) + rest`, with factors between 1 and a small number (softmax: the sum of
`e^(z - max z)`, at most the number of classes), so that one logarithm does for the product of
many factors; a score without a logarithm, or with one that cannot be shared, has no factor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from jaxnn.model.activations import ACTIVATIONS

OF_CLASSES = ("categorical_crossentropy", "categorical_accuracy")
"""Scores with one answer a row; others have one for every output."""

Values = list[jax.Array]
"""A number for each unit: a scalar, or a vector over the rows."""
RowScore = Callable[[Values, Any], tuple[jax.Array | None, jax.Array]]
"""`(logits, target)` to factor and rest."""


def row_score(output: str, score: str) -> RowScore:
    """A score by name.

    Args:
        output: name of the output activation, which a squared error needs.
        score: name of a loss, or "categorical_accuracy", or "binary_accuracy".
    """
    if score == "categorical_accuracy":
        return _right_class
    if score == "binary_accuracy":
        return _right_sides
    if score == "categorical_crossentropy":
        return _softmax_crossentropy
    if score == "binary_crossentropy":
        return _sigmoid_crossentropy
    return partial(_squared_error, output)


def _softmax_crossentropy(logits: Values, target: jax.Array):
    """`log sum e^z - z_y`, relative to the largest logit: factor `sum e^(z - max z)`.

    One exponential a logit after the first: `max z` is the larger of two, so one of the terms
    `e^(max z - new max)` and `e^(z - new max)` is 1. With weights, one for each logit, in place
    of a class, it is `sum_k w_k (log sum e^z - z_k)`, a logarithm a row.
    """
    largest = answer = logits[0]
    factor = jnp.ones_like(largest)
    of_class = target.ndim == largest.ndim
    for number, z in enumerate(logits[1:], start=1):
        smaller = jnp.exp(-jnp.abs(z - largest))
        factor = jnp.where(z > largest, factor * smaller + 1, factor + smaller)
        largest = jnp.where(z > largest, z, largest)
        answer = jnp.where(target == number, z, answer) if of_class else answer
    if of_class:
        return factor, largest - answer
    total, pairs = jnp.log(factor), zip(list(target), logits, strict=True)
    return None, sum_of([weight * (total + (largest - z)) for weight, z in pairs])


def _sigmoid_crossentropy(logits: Values, targets: jax.Array):
    """`sum log(1 + e^z) - y z`; as `log(1 + e^z) = max(z, 0) + log(1 + e^-|z|)`."""
    factor = product_of([1 + jnp.exp(-jnp.abs(z)) for z in logits])
    pairs = zip(list(targets), logits, strict=True)
    return factor, sum_of([ACTIVATIONS["relu"].forward(z) - y * z for y, z in pairs])


def _squared_error(output: str, logits: Values, targets: jax.Array):
    if output == "softmax":
        largest = reduce(jnp.maximum, logits)
        exponentials = [jnp.exp(z - largest) for z in logits]
        total = sum_of(exponentials)
        predictions = [e / total for e in exponentials]
    else:
        predictions = [ACTIVATIONS[output].forward(z) for z in logits]
    pairs = zip(predictions, list(targets), strict=True)
    return None, sum_of([jnp.square(p - y) for p, y in pairs])


def _right_class(logits: Values, label: jax.Array):
    """1 if the first of the largest logits is the label's and none is nan, else 0."""
    largest, is_right, has_nan = logits[0], label == 0, jnp.isnan(logits[0])
    for number, z in enumerate(logits[1:], start=1):
        is_right = jnp.where(z > largest, label == number, is_right)
        largest, has_nan = jnp.maximum(largest, z), has_nan | jnp.isnan(z)
    return None, (is_right & ~has_nan).astype(largest.dtype)


def _right_sides(logits: Values, targets: jax.Array):
    """How many outputs are on the target's side of 1/2; nan never is."""
    outputs = [ACTIVATIONS["sigmoid"].forward(z) for z in logits]
    pairs = zip(outputs, list(targets), strict=True)
    hits = [((p > 0.5) == (y > 0.5)) & ~jnp.isnan(p) for p, y in pairs]
    return None, sum_of([hit.astype(outputs[0].dtype) for hit in hits])


def sum_of(terms: Values) -> jax.Array:
    """The sum, term after term, which XLA fuses with what stands around it."""
    return reduce(operator.add, terms)


def product_of(factors: Values) -> jax.Array:
    """The product, factor after factor, which XLA fuses in the same way."""
    return reduce(operator.mul, factors)
