"""Moves other than normal noise, and the temperature at which annealing starts."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from scipy.optimize import brentq

from jaxnn.run.checks import (
    as_batch,
    as_count,
    as_key,
    as_params,
    as_partial,
    as_real,
    check_scalar,
    shapes_of,
)
from jaxnn.run.programs import own_settings, program
from jaxnn.run.random import normals
from jaxnn.typing import LossFn

__all__ = [
    "calibrated_temperature",
    "one_coordinate",
]


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


TAG = 0x54454D50


def calibrated_temperature(
    key: jax.Array,
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    *,
    scale: float,
    acceptance: float = 0.5,
    num_proposals: int = 1_000,
) -> float:
    """The temperature at which Metropolis accepts this share of the worse proposals, on average.

    Of the rises `d > 0` that proposals from `params` mean, it solves `mean(exp(-d / T)) =
    acceptance` for `T`, as Kirkpatrick, Gelatt and Vecchi (1983) proposed.

    Args:
        key: a typed key.
        loss_fn: `loss_fn(params, batch)` -> a float scalar.
        params: where the search starts.
        batch: the data.
        scale: standard deviation of the proposals' noise, as the search will have it.
        acceptance: the share, above 0 and below 1.
        num_proposals: how many proposals to measure.

    Returns:
        The temperature, above 0.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a number is out of range, or no proposal is worse than the start.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss_fn(params, batch):
        ...     return jnp.sum(params**2) + batch
        >>> t = calibrated_temperature(jax.random.key(0), loss_fn, jnp.zeros(3), 0.0, scale=0.1)
        >>> 0.01 < t < 0.1
        True
    """
    key, start = as_key("key", key), as_params(params)
    share = float(as_real("acceptance", acceptance))
    if share >= 1:
        raise ValueError(f"acceptance must be below 1; got {acceptance}")
    count = as_count("num_proposals", num_proposals, 1, 2**20)
    batch, loss = as_batch(batch, params, loss_fn), as_partial("loss_fn", loss_fn)
    check_scalar("loss_fn", shapes_of("loss_fn", loss, start, batch))
    with own_settings():
        keys = jax.random.split(jax.random.fold_in(key, TAG), count)
        losses = np.asarray(_losses(loss, start, batch, as_real("scale", scale), keys), float)
    if not np.isfinite(losses[0]):
        raise ValueError(f"params must have a finite loss; got {losses[0]}")
    rises = losses[1:] - losses[0]
    worse = rises[np.isfinite(rises) & (rises > 0)]
    if not worse.size:
        raise ValueError(f"params must leave room to get worse; no proposal of {count} does")

    def excess(log_temperature: float) -> float:
        return float(np.mean(np.exp(-worse / np.exp(log_temperature)))) - share

    low, high = np.log(worse.min()) - 8, np.log(worse.max()) + 40
    root: Any = brentq(excess, low, high)
    return math.exp(root)


@program()
def _losses(loss: Partial, params: Any, batch: Any, scale: jax.Array, keys: jax.Array):
    """The loss at `params`, and those of the proposals: side by side, so that all round alike."""
    flat, unravel = ravel_pytree(params)
    noise = jax.vmap(lambda key: normals(key, flat.size))(keys).astype(flat.dtype)
    noise = jnp.concatenate([jnp.zeros_like(noise[:1]), noise])
    moved = flat[None] + scale.astype(flat.dtype) * noise
    return jax.vmap(lambda each: loss(unravel(each), batch))(moved)
