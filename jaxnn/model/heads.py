"""A head: the output activation and the loss, taken together as one function of the logits.

Taken together they are stable where each alone is not: softmax with categorical cross-entropy
and sigmoid with binary cross-entropy need no clipping, and their gradient is `output - target`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxnn.model.activations import ACTIVATIONS
from jaxnn.model.losses import (
    mean_squared_error,
    mean_squared_error_gradient,
    sigmoid_crossentropy,
    sigmoid_crossentropy_gradient,
    softmax_crossentropy,
    softmax_crossentropy_gradient,
)

__all__ = ["HEADS", "Head"]


class Head(NamedTuple):
    """Output activation and loss as a function of the last layer's logits.

    Attributes:
        loss: `(logits, targets)` to the mean loss, a scalar.
        gradient: `(logits, targets)` to the loss's derivative by the logits, `(rows, outputs)`.
    """

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    gradient: Callable[[jax.Array, jax.Array], jax.Array]


def _squared(output: str) -> Head:
    forward, backward = ACTIVATIONS[output]

    def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return mean_squared_error(forward(logits), targets)

    def gradient(logits: jax.Array, targets: jax.Array) -> jax.Array:
        outputs = forward(logits)
        return backward(outputs, mean_squared_error_gradient(outputs, targets))

    return Head(loss, gradient)


HEADS: dict[tuple[str, str], Head] = {
    ("softmax", "categorical_crossentropy"): Head(
        softmax_crossentropy, softmax_crossentropy_gradient
    ),
    ("sigmoid", "binary_crossentropy"): Head(sigmoid_crossentropy, sigmoid_crossentropy_gradient),
    **{(output, "mean_squared_error"): _squared(output) for output in ACTIVATIONS},
}
"""Every sensible pair of output activation and loss."""
