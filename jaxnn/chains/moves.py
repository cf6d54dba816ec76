"""How chains move other than by normal noise of a given scale, and where annealing starts."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from scipy.optimize import brentq

from jaxnn.chains.kernel import OneFifth, Restart
from jaxnn.optim.schedules import Schedule, as_rate
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
from jaxnn.typing import LossFn, PyTree, SampleFn

__all__ = [
    "calibrated_temperature",
    "one_coordinate",
    "one_fifth",
    "restart",
]


def one_fifth(initial: float | Schedule) -> OneFifth:
    """Return a scale that follows the success of the steps: the one-fifth rule.

    Each step that lowers the loss multiplies the scale by 2, each other step divides it by
    2^(1/4), which holds one step in five successful. The scale stays within a factor of 2^50 of
    `initial`. Reference: Rechenberg, "Evolutionsstrategie", 1973.

    Args:
        initial: the first scale, above 0, or a schedule that the rule multiplies.

    Raises:
        TypeError: if it is neither a number nor a function of the step.
        ValueError: if the number is not above 0.

    Example:
        >>> float(one_fifth(0.5).initial(0))
        0.5
    """
    return OneFifth(as_rate("initial", initial))


def restart(sample_fn: SampleFn, patience: int) -> Restart:
    """Return a rule by which a chain starts anew: the `patience` of a search.

    Args:
        sample_fn: `sample_fn(key)` -> params, such as `model.sampler(scale=1.0)`.
        patience: steps without a lower loss, since the last restart, after which a chain does.

    Raises:
        TypeError: if the sampler is not callable.
        ValueError: if the patience is below 1.

    Example:
        >>> int(restart(lambda key: jax.random.normal(key, (2,)), 100).patience)
        100
    """
    count = as_count("patience", patience, 1, 2**32 - 1)
    return Restart(as_partial("sample_fn", sample_fn), np.uint32(count))


def one_coordinate(key: jax.Array, params: PyTree, scale: jax.Array) -> PyTree:
    """Move one number, chosen at random, up or down by `scale`: a `propose_fn`, mlrose's move.

    Args:
        key: a typed key.
        params: any pytree of floats.
        scale: the length of the step.

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
    params: PyTree,
    batch: PyTree,
    *,
    scale: float,
    acceptance: float = 0.5,
    num_proposals: int = 1_000,
) -> float:
    """Return the temperature at which this share of the worse proposals is accepted, on average.

    Solves `mean(exp(-rise / T)) = acceptance` for `T`, over the proposals from `params` whose
    loss is higher, as Kirkpatrick, Gelatt and Vecchi (1983) proposed.

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
        ValueError: if a number is out of range, or no proposal is worse than the start.

    Example:
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
def _losses(loss: Partial, params: PyTree, batch: PyTree, scale: jax.Array, keys: jax.Array):
    """The loss at `params`, and those of the proposals: side by side, so that all round alike."""
    flat, unravel = ravel_pytree(params)
    noise = jax.vmap(lambda key: normals(key, flat.size))(keys).astype(flat.dtype)
    noise = jnp.concatenate([jnp.zeros_like(noise[:1]), noise])
    moved = flat[None] + scale.astype(flat.dtype) * noise
    return jax.vmap(lambda each: loss(unravel(each), batch))(moved)
