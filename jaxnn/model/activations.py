"""Activations and their derivatives, side by side.

Each activation `f` comes as a pair. `f(z)` maps pre-activations to outputs of the same shape.
`f_backward(outputs, upstream)` pulls a gradient at the outputs back to the pre-activations:

    upstream * f'(z)        for those that act element by element, and
    J(z)^T upstream         for softmax, whose outputs depend on the whole row.

Most derivatives can be written in the *outputs* `f(z)`, so the backward pass stores nothing else.
The argument is called `outputs` and must be just that: passing `z` is the classic bug.

    >>> outputs = relu(jnp.array([-1.0, 0.0, 2.0]))
    >>> relu_backward(outputs, jnp.array([3.0, 3.0, 3.0]))
    Array([0., 0., 3.], dtype=float32)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "ACTIVATIONS",
    "HIDDEN_ACTIVATIONS",
    "Activation",
    "elu",
    "elu_backward",
    "gelu",
    "gelu_backward",
    "identity",
    "identity_backward",
    "leaky_relu",
    "leaky_relu_backward",
    "relu",
    "relu_backward",
    "sigmoid",
    "sigmoid_backward",
    "softmax",
    "softmax_backward",
    "tanh",
    "tanh_backward",
]


LEAK = 0.01
GELU_CUBIC = 0.044715
GELU_REACH = 30.0
"""Beyond it the gate of gelu is 0 or 1 in float64 as well, and the cube may overflow."""


class Activation(NamedTuple):
    """An activation and its derivative.

    Attributes:
        forward: pre-activations to outputs, same shape.
        backward: `(outputs, upstream)` to the gradient at the pre-activations, same shape.
        takes_z: whether `backward` takes `z` in place of the outputs.
        bounds: the outputs lie between these.
    """

    forward: Callable[[jax.Array], jax.Array]
    backward: Callable[[jax.Array, jax.Array], jax.Array]
    takes_z: bool = False
    bounds: tuple[float, float] = (-math.inf, math.inf)

    def pull_back(self, z: jax.Array, outputs: jax.Array, upstream: jax.Array) -> jax.Array:
        """Return the gradient at the pre-activations, by `backward`."""
        return self.backward(z if self.takes_z else outputs, upstream)


def identity(z: jax.Array) -> jax.Array:
    """Return `z` itself, any shape.

    Example:
        >>> identity(jnp.array([-1.0, 2.0]))
        Array([-1.,  2.], dtype=float32)
    """
    return z


def identity_backward(outputs: jax.Array, upstream: jax.Array) -> jax.Array:
    """Return `upstream * 1`.

    Example:
        >>> identity_backward(jnp.array([-1.0, 2.0]), jnp.array([3.0, 3.0]))
        Array([3., 3.], dtype=float32)
    """
    del outputs
    return upstream


def relu(z: jax.Array) -> jax.Array:
    """Return the rectifier `max(z, 0)`, element by element, any shape; nan stays nan.

    Example:
        >>> relu(jnp.array([-1.0, 2.0]))
        Array([0., 2.], dtype=float32)
    """
    return jnp.where(z <= 0, jnp.zeros_like(z), z)


def relu_backward(outputs: jax.Array, upstream: jax.Array) -> jax.Array:
    """Return `upstream` where the output is above 0; the slope at 0 is 0, as in `jax.nn.relu`.

    Example:
        >>> relu_backward(relu(jnp.array([-1.0, 0.0, 2.0])), jnp.array([3.0, 3.0, 3.0]))
        Array([0., 0., 3.], dtype=float32)
    """
    return jnp.where(outputs <= 0, jnp.zeros_like(upstream), upstream)


def leaky_relu(z: jax.Array) -> jax.Array:
    """Return `z` where it is at least 0, else `0.01 z`, element by element, any shape.

    Example:
        >>> leaky_relu(jnp.array([-1.0, 2.0]))
        Array([-0.01,  2.  ], dtype=float32)
    """
    return jax.nn.leaky_relu(z, LEAK)


def leaky_relu_backward(outputs: jax.Array, upstream: jax.Array) -> jax.Array:
    """Return `upstream`, times 0.01 below 0; the slope at 0 is 1, as in `jax.nn.leaky_relu`.

    Example:
        >>> leaky_relu_backward(leaky_relu(jnp.array([-1.0, 0.0])), jnp.array([3.0, 3.0]))
        Array([0.03, 3.  ], dtype=float32)
    """
    return jnp.where(outputs >= 0, upstream, LEAK * upstream)


def elu(z: jax.Array) -> jax.Array:
    """Return `z` where it is above 0, else `exp(z) - 1`, element by element, any shape.

    Example:
        >>> elu(jnp.array([-1e4, 0.0, 2.0]))
        Array([-1.,  0.,  2.], dtype=float32)
    """
    return jax.nn.elu(z)


def elu_backward(outputs: jax.Array, upstream: jax.Array) -> jax.Array:
    """Return `upstream`, times `a + 1`, which is `exp(z)`, where the output `a` is at most 0.

    Example:
        >>> elu_backward(elu(jnp.array([-1e4, 0.0, 2.0])), jnp.array([3.0, 3.0, 3.0]))
        Array([0., 3., 3.], dtype=float32)
    """
    return jnp.where(outputs > 0, upstream, upstream * (outputs + 1))


def gelu(z: jax.Array) -> jax.Array:
    """Return `z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))`, element by element, any shape.

    It is the default of `jax.nn.gelu`, and close to `z` times the normal distribution function
    (Hendrycks and Gimpel 2016).

    Example:
        >>> gelu(jnp.array([-1e4, 0.0, 2.0])).round(4)
        Array([-0.    ,  0.    ,  1.9546], dtype=float32)
    """
    return jnp.maximum(z, -GELU_REACH) * _gelu_gate(z)[1]


def gelu_backward(z: jax.Array, upstream: jax.Array) -> jax.Array:
    """Return `upstream * (s + z s')` at the pre-activations `z`, with the gate `s = gelu(z) / z`.

    It takes `z`, as no function of the outputs can be the slope: on both sides of -0.75 outputs
    are the same.

    Example:
        >>> gelu_backward(jnp.array([-1e4, 0.0, 1e4]), jnp.array([4.0, 4.0, 4.0]))
        Array([0., 2., 4.], dtype=float32)
    """
    z, gate = _gelu_gate(z)
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * GELU_CUBIC * z * z) * gate * (1 - gate)
    return upstream * (gate + z * slope)


def _gelu_gate(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`z` without what is out of reach, and `1/2 (1 + tanh u) = sigmoid(2 u)` with all digits."""
    z = jnp.clip(z, -GELU_REACH, GELU_REACH)
    return z, jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (z + GELU_CUBIC * z * z * z))


def sigmoid(z: jax.Array) -> jax.Array:
    """Return the logistic function `1 / (1 + exp(-z))`, element by element, any shape.

    Example:
        >>> sigmoid(jnp.array([0.0, 1e4]))
        Array([0.5, 1. ], dtype=float32)
    """
    return jax.nn.sigmoid(z)


def sigmoid_backward(outputs: jax.Array, upstream: jax.Array) -> jax.Array:
    """Return `upstream * a (1 - a)` at outputs `a`.

    Example:
        >>> sigmoid_backward(sigmoid(jnp.array([0.0])), jnp.array([4.0]))
        Array([1.], dtype=float32)
    """
    return upstream * outputs * (1 - outputs)


def tanh(z: jax.Array) -> jax.Array:
    """Return the hyperbolic tangent, element by element, any shape.

    Example:
        >>> tanh(jnp.array([0.0, 1e4]))
        Array([0., 1.], dtype=float32)
    """
    return jnp.tanh(z)


def tanh_backward(outputs: jax.Array, upstream: jax.Array) -> jax.Array:
    """Return `upstream * (1 - a^2)` at outputs `a`.

    Example:
        >>> tanh_backward(tanh(jnp.array([0.0])), jnp.array([4.0]))
        Array([4.], dtype=float32)
    """
    return upstream * (1 - outputs) * (1 + outputs)


def softmax(z: jax.Array) -> jax.Array:
    """Return `exp(z_j) / sum_k exp(z_k)` over the last axis, shape `(..., classes)`.

    Example:
        >>> softmax(jnp.array([[0.0, 0.0], [1e4, -1e4]]))
        Array([[0.5, 0.5],
               [1. , 0. ]], dtype=float32)
    """
    return jax.nn.softmax(z, axis=-1)


def softmax_backward(outputs: jax.Array, upstream: jax.Array) -> jax.Array:
    """Return `J^T upstream` over the last axis, with `J = diag(a) - a a^T` at outputs `a`.

    With the upstream gradient `g` it is `a_j (g_j - sum_k g_k a_k)`, without the matrix. The `g`
    are taken relative to that of the largest output: where its `a` is nearly 1, the difference
    would cancel.

    Example:
        >>> softmax_backward(softmax(jnp.array([[0.0, 0.0]])), jnp.array([[4.0, 0.0]]))
        Array([[ 1., -1.]], dtype=float32)
    """
    largest = jnp.argmax(outputs, axis=-1, keepdims=True)
    relative = upstream - jnp.take_along_axis(upstream, largest, axis=-1)
    mean = jnp.sum(relative * outputs, axis=-1, keepdims=True)
    return outputs * (relative - mean)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(identity, identity_backward),
    "relu": Activation(relu, relu_backward, bounds=(0, math.inf)),
    "leaky_relu": Activation(leaky_relu, leaky_relu_backward),
    "elu": Activation(elu, elu_backward, bounds=(-1, math.inf)),
    "gelu": Activation(gelu, gelu_backward, takes_z=True, bounds=(-0.17004075, math.inf)),
    "sigmoid": Activation(sigmoid, sigmoid_backward, bounds=(0, 1)),
    "tanh": Activation(tanh, tanh_backward, bounds=(-1, 1)),
    "softmax": Activation(softmax, softmax_backward, bounds=(0, 1)),
}
"""Every activation by its name."""

HIDDEN_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "softmax")
"""Those that a hidden layer may use, which act element by element."""
