"""Optimizers as pairs of pure functions, in the protocol that the field shares.

    state = optimizer.init(params)
    updates, state = optimizer.update(gradients, state, params)
    params = params + updates

Both functions are `jax.tree_util.Partial`s whose numbers are leaves: another learning rate
compiles nothing. A ready optax transformation fits the same protocol and works as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxnn.checks import as_real

__all__ = ["Optimizer", "adam", "sgd"]


class Optimizer(NamedTuple):
    """How gradients become steps.

    Attributes:
        init: `init(params)` -> state, any pytree of arrays.
        update: `update(gradients, state, params)` -> `(updates, state)`; the updates, a tree
            like `params`, are added to them.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


def sgd(learning_rate: float, *, momentum: float | None = None) -> Optimizer:
    """Stochastic gradient descent, plain or with heavy-ball momentum.

    With gradient `g`, learning rate `r` and momentum `m`:

        velocity <- m velocity + g,    update = -r velocity    (Polyak 1964)

    Args:
        learning_rate: `r`, above 0.
        momentum: `m`, at least 0; None keeps no velocity.

    Returns:
        An `Optimizer`.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range.

    Example:
        >>> optimizer = sgd(0.1)
        >>> optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)), jnp.zeros(1))[0]
        Array([-0.2], dtype=float32)
    """
    rate = as_real("learning_rate", learning_rate)
    if momentum is None:
        return Optimizer(Partial(_no_state), Partial(_sgd_update, rate))
    decay = as_real("momentum", momentum, inclusive=True)
    return Optimizer(Partial(_zeros), Partial(_momentum_update, rate, decay))


def adam(
    learning_rate: float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> Optimizer:
    """Adam: steps scaled by running moments of the gradient.

    With gradient `g` at step `t = 1, 2, ...`:

        mean     <- beta1 mean     + (1 - beta1) g
        variance <- beta2 variance + (1 - beta2) g^2
        update   =  -r (mean / (1 - beta1^t)) / (sqrt(variance / (1 - beta2^t)) + epsilon)

    Args:
        learning_rate: `r`, above 0.
        beta1: decay of the mean, at least 0 and below 1.
        beta2: decay of the variance, at least 0 and below 1.
        epsilon: above 0, outside the root.

    Returns:
        An `Optimizer`.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if it is out of range.

    References:
        Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.

    Example:
        >>> optimizer = adam(0.1)
        >>> optimizer.update(jnp.array([2.0]), optimizer.init(jnp.zeros(1)), jnp.zeros(1))[0]
        Array([-0.1], dtype=float32)
    """
    rate = as_real("learning_rate", learning_rate)
    betas = (_decay("beta1", beta1), _decay("beta2", beta2))
    return Optimizer(
        Partial(_adam_init), Partial(_adam_update, rate, *betas, as_real("epsilon", epsilon))
    )


class AdamState(NamedTuple):
    """Running moments.

    Attributes:
        count: steps made, int32.
        mean: running mean of the gradient, a tree like the params.
        variance: running mean of its square, a tree like the params.
    """

    count: jax.Array
    mean: Any
    variance: Any


def _decay(name: str, value: float) -> Any:
    number = as_real(name, value, inclusive=True)
    if not isinstance(number, jax.Array) and number >= 1:
        raise ValueError(f"{name} must be below 1; got {value!r}")
    return number


def _no_state(params: Any) -> tuple[()]:
    del params
    return ()


def _zeros(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


def _scaled(factor: jax.Array, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, tree)


def _sgd_update(rate: jax.Array, gradients: Any, state: tuple[()], params: Any):
    del params
    return _scaled(-rate, gradients), state


def _momentum_update(rate: jax.Array, decay: jax.Array, gradients: Any, velocity: Any, params: Any):
    del params
    velocity = jax.tree.map(jnp.add, _scaled(decay, velocity), gradients)
    return _scaled(-rate, velocity), velocity


def _adam_init(params: Any) -> AdamState:
    return AdamState(jnp.zeros((), jnp.int32), _zeros(params), _zeros(params))


def _adam_update(
    rate: jax.Array,
    beta1: jax.Array,
    beta2: jax.Array,
    epsilon: jax.Array,
    gradients: Any,
    state: AdamState,
    params: Any,
):
    del params
    count = jnp.minimum(state.count, jnp.iinfo(jnp.int32).max - 1) + 1
    squares = jax.tree.map(jnp.square, gradients)
    mean = jax.tree.map(jnp.add, _scaled(beta1, state.mean), _scaled(1 - beta1, gradients))
    variance = jax.tree.map(jnp.add, _scaled(beta2, state.variance), _scaled(1 - beta2, squares))
    steps = count.astype(jnp.float32)
    mean_unbiased, variance_unbiased = 1 - beta1**steps, 1 - beta2**steps

    def update(m: jax.Array, v: jax.Array) -> jax.Array:
        dtype = m.dtype
        m_hat = m / mean_unbiased.astype(dtype)
        v_hat = v / variance_unbiased.astype(dtype)
        return -rate.astype(dtype) * m_hat / (jnp.sqrt(v_hat) + epsilon.astype(dtype))

    return jax.tree.map(update, mean, variance), AdamState(count, mean, variance)
