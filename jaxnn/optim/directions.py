"""Where optimizers go: `direction(*numbers, gradient, moments, params, step)` on flat vectors.

Each returns the vector to step against, before the learning rate, and the moments after it. Steps
count from 1. The formulas and their sources stand with the optimizers made of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def no_moments(flat: jax.Array) -> tuple[()]:
    """Nothing to remember."""
    del flat
    return ()


def two_moments(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A mean and a variance, both 0."""
    return jnp.zeros_like(flat), jnp.zeros_like(flat)


def _running(decay: jax.Array, mean: jax.Array, new: jax.Array) -> jax.Array:
    return decay.astype(new.dtype) * mean + (1 - decay).astype(new.dtype) * new


def plain(gradient: jax.Array, moments: Any, params: jax.Array, step: jax.Array):
    """The gradient itself."""
    del params, step
    return gradient, moments


def heavy_ball(
    decay: jax.Array, gradient: jax.Array, velocity: jax.Array, params: jax.Array, step: jax.Array
):
    """The running sum of gradients."""
    del params, step
    velocity = decay.astype(gradient.dtype) * velocity + gradient
    return velocity, velocity


def nesterov(
    decay: jax.Array, gradient: jax.Array, velocity: jax.Array, params: jax.Array, step: jax.Array
):
    """The gradient, and the running sum as it will be."""
    velocity, _ = heavy_ball(decay, gradient, velocity, params, step)
    return gradient + decay.astype(gradient.dtype) * velocity, velocity


def by_size(
    decay: jax.Array,
    eps: jax.Array,
    gradient: jax.Array,
    square: jax.Array,
    params: jax.Array,
    step: jax.Array,
):
    """The gradient in units of its running size."""
    del params, step
    square = _running(decay, square, jnp.square(gradient))
    return gradient / (jnp.sqrt(square) + eps.astype(gradient.dtype)), square


def by_moments(
    b1: jax.Array,
    b2: jax.Array,
    eps: jax.Array,
    weight_decay: jax.Array,
    gradient: jax.Array,
    moments: tuple[jax.Array, jax.Array],
    params: jax.Array,
    step: jax.Array,
):
    """The running mean in units of the running size, and the weight decay."""
    dtype = gradient.dtype
    mean = _running(b1, moments[0], gradient)
    variance = _running(b2, moments[1], jnp.square(gradient))
    m_hat = mean / (1 - b1**step).astype(dtype)
    v_hat = variance / (1 - b2**step).astype(dtype)
    ahead = m_hat / (jnp.sqrt(v_hat) + eps.astype(dtype))
    return ahead + weight_decay.astype(dtype) * params, (mean, variance)
