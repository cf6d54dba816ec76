"""Moves of perturbation search other than normal noise on every number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

__all__ = ["one_coordinate"]


def one_coordinate(key: jax.Array, params: Any, scale: jax.Array) -> Any:
    """Moves one number, chosen at random, up or down by `scale`: the move of mlrose.

    Args:
        key: a typed key.
        params: any pytree of floats.
        scale: the step.

    Returns:
        Params like `params`, which differ in one number.

    Example:
        >>> moved = one_coordinate(jax.random.key(0), jnp.zeros(4), 0.5)
        >>> sorted(jnp.abs(moved).tolist())
        [0.0, 0.0, 0.0, 0.5]
    """
    flat, unravel = ravel_pytree(params)
    place_key, sign_key = jax.random.split(key)
    place = jax.random.randint(place_key, (), 0, flat.size)
    step = jax.random.rademacher(sign_key, (), flat.dtype) * jnp.asarray(scale, flat.dtype)
    return unravel(flat.at[place].add(step))
