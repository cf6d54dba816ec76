"""How far a gradient is from finite differences, step by step: the V that tells right from wrong.

A central difference misses the slope by a truncation error that falls with the square of the step
and by a rounding error that grows as the step shrinks. On a log-log plot against the step, the
distance from a right gradient is a V; that from a wrong one stays as large as the gradient is
wrong. At a kink the central difference is the mean of the slopes on both sides.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from numpy.typing import ArrayLike

from jaxnn.gradients.witnesses import check_functions, widened
from jaxnn.run.checks import as_batch, as_params, as_partial
from jaxnn.run.programs import program
from jaxnn.typing import LossFn, PyTree, ValueAndGradFn

STEPS = tuple(float(step) for step in np.logspace(-11, -1, 31))


class DifferenceErrors(NamedTuple):
    """Distances from central differences, relative to the largest finite part of `jax.grad`.

    Attributes:
        step: of the differences, relative to the largest parameter, `(steps,)`.
        gradient: the gradient under test, its most distant coordinate, `(steps,)`.
        by_jax: the same of `jax.grad`.
    """

    step: np.ndarray
    gradient: np.ndarray
    by_jax: np.ndarray


def difference_errors(
    loss_fn: LossFn,
    value_and_grad_fn: ValueAndGradFn,
    params: PyTree,
    batch: PyTree,
    *,
    steps: ArrayLike = STEPS,
) -> DifferenceErrors:
    """Compare a gradient, and that of `jax.grad`, with central differences at many steps.

    Args:
        loss_fn: `loss_fn(params, batch)` -> a float scalar, as for `check_gradients`.
        value_and_grad_fn: the gradient under test, `(params, batch)` -> loss and gradient.
        params: where to compare, any pytree of floats.
        batch: any pytree that both functions take.
        steps: relative steps, each above 0, in float64.

    Returns:
        A `DifferenceErrors`.

    Raises:
        ValueError: if a step is not above 0.

    Example:
        >>> loss_fn = lambda params, batch: jnp.sum(jnp.exp(params))
        >>> errors = difference_errors(
        ...     loss_fn, jax.value_and_grad(loss_fn), jnp.ones(3), None, steps=[1e-5, 1e-1]
        ... )
        >>> bool(errors.gradient[0] < 1e-9), round(float(errors.gradient[1]), 4)
        (True, 0.0017)
    """
    steps = np.asarray(steps, np.float64)
    if steps.ndim != 1 or not np.all((steps > 0) & (steps < np.inf)):
        raise ValueError(f"steps must be numbers above 0, in one axis; got {steps}")
    params = as_params(params)
    batch = as_batch(batch, params, loss_fn, value_and_grad_fn)
    loss = as_partial("loss_fn", loss_fn)
    by_hand = as_partial("value_and_grad_fn", value_and_grad_fn)
    with jax.enable_x64(True):
        params, batch = widened((params, batch))
        check_functions(loss, by_hand, params, batch)
        errors = _errors(loss, by_hand, params, batch, jnp.asarray(steps))
        return DifferenceErrors(steps, *map(np.asarray, errors))


@program()
def _errors(
    loss: Partial, by_hand: Partial, params: PyTree, batch: PyTree, steps: jax.Array
) -> list[jax.Array]:
    flat, unravel = ravel_pytree(params)
    gradients = by_hand(params, batch)[1], jax.grad(loss)(params, batch)
    gradient, by_jax = (ravel_pytree(tree)[0] for tree in gradients)
    largest = jnp.max(jnp.abs(flat))
    size = jnp.max(jnp.abs(by_jax), where=jnp.isfinite(by_jax), initial=0)

    def distances(step: jax.Array) -> list[jax.Array]:
        h = step * jnp.where(largest > 0, largest, 1)

        def slope(coordinate: jax.Array) -> jax.Array:
            move = jnp.zeros_like(flat).at[coordinate].set(h)
            up, down = loss(unravel(flat + move), batch), loss(unravel(flat - move), batch)
            return (up - down) / (2 * h)

        slopes = jax.lax.map(slope, jnp.arange(flat.size))
        largest_distances = (jnp.max(jnp.abs(slopes - each)) for each in (gradient, by_jax))
        return [distance / jnp.where(size > 0, size, 1) for distance in largest_distances]

    return jax.lax.map(distances, steps)
