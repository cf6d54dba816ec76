"""The chain rule by hand.

With layer inputs `h_0 = x, h_1, ...`, pre-activations `z_l = h_l W_l + b_l`, hidden activation
`f` and `delta_l` the gradient of the loss by `z_l` (Rumelhart, Hinton and Williams 1986):

    (1)  delta_L = d loss / d logits                   the head's gradient, 1/rows included
    (2)  delta_l = (delta_{l+1} W_{l+1}^T) * f'(z_l)
    (3)  d loss / d W_l = h_l^T delta_l
    (4)  d loss / d b_l = sum over rows of delta_l
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnn.batch import Batch
from jaxnn.model.activations import ACTIVATIONS
from jaxnn.model.heads import Head
from jaxnn.model.layers import Dense, Params, dot, propagate

__all__ = ["value_and_grad"]


def value_and_grad(
    params: Params, batch: Batch, hidden: str, head: Head
) -> tuple[jax.Array, Params]:
    """Loss and its gradient by every weight and bias, written by hand.

    Args:
        params: tuple of `Dense`.
        batch: inputs `(rows, features)` and targets as the head wants them.
        hidden: name of the hidden activation.
        head: output activation and loss.

    Returns:
        The loss, a scalar, and the gradient, a tree like `params`.
    """
    pull_back = ACTIVATIONS[hidden].backward
    inputs, logits = propagate(params, jnp.asarray(batch.x), hidden)
    delta = head.gradient(logits, jnp.asarray(batch.y))  # (1)
    gradients = [_layer_gradient(params[-1], inputs[-1], delta)]
    for layer in range(len(params) - 2, -1, -1):
        upstream = dot(delta, params[layer + 1].weights.T)
        delta = pull_back(inputs[layer + 1], upstream)  # (2)
        gradients.append(_layer_gradient(params[layer], inputs[layer], delta))
    return head.loss(logits, jnp.asarray(batch.y)), tuple(reversed(gradients))


def _layer_gradient(layer: Dense, inputs: jax.Array, delta: jax.Array) -> Dense:
    weights = dot(inputs.T, delta)  # (3)
    biases = None if layer.biases is None else jnp.sum(delta, axis=0)  # (4)
    return Dense(weights, biases)
