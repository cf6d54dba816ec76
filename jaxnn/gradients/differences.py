"""How far a gradient is from finite differences, step by step: the V that tells right from wrong.

A central difference misses the slope by a truncation error that falls with the square of the step
and by a rounding error that grows as the step shrinks. On a log-log plot against the step, the
distance from a right gradient is a V; that from a wrong one stays as large as the gradient is
wrong. At a kink the central difference is the mean of the slopes on both sides.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from jaxnn.gradients.functions import (
    NumpyFunction,
    as_checked,
    at_samples,
    flat,
    losses_beside,
    values_and_slopes,
)
from jaxnn.gradients.witnesses import widened
from jaxnn.run.checks import as_batch, as_params
from jaxnn.run.show import readable
from jaxnn.typing import LossFn, PyTree, ValueAndGradFn

STEPS = tuple(float(step) for step in np.logspace(-11, -1, 31))


@readable
class DifferenceErrors(NamedTuple):
    """Distances from central differences, relative to the largest finite part of `jax.grad`.

    Attributes:
        step: of the differences, relative to the largest parameter, `(steps,)`.
        gradient: the gradient under test, its most distant coordinate, `(steps,)`.
        by_jax: the same of `jax.grad`; None for a loss in NumPy, of which the distances are
            relative to the largest difference, the median of all steps.
    """

    step: np.ndarray
    gradient: np.ndarray
    by_jax: np.ndarray | None


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
        >>> import jax.numpy as jnp
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
    with jax.enable_x64(True):
        params, batch = jax.tree.map(np.asarray, widened(params)), widened(batch)
        loss, by_hand = as_checked(loss_fn, value_and_grad_fn, params, batch)
        sample = jax.tree.map(lambda leaf: leaf[None], params)
        gradient = flat(at_samples(by_hand, sample, batch)[1])
        largest = max(np.max(np.abs(leaf), initial=0) for leaf in jax.tree.leaves(params))
        moves = [np.full_like(gradient, step * (largest or 1)) for step in steps]
        sides = [losses_beside(loss, sample, batch, move) for move in moves]
        pairs = zip(sides, moves, strict=True)
        slopes = np.concatenate([(up - down) / (2 * move) for (up, down), move in pairs])
        if isinstance(loss, NumpyFunction):
            by_jax, size = None, np.median(np.max(np.abs(slopes), axis=1))
        else:
            by_jax = flat(values_and_slopes(loss, sample, batch)[1])
            size = np.max(np.abs(by_jax), where=np.isfinite(by_jax), initial=0)

    def distances(gradient: np.ndarray) -> np.ndarray:
        return np.max(np.abs(slopes - gradient), axis=1) / (size or 1)

    others = None if by_jax is None else distances(by_jax)
    return DifferenceErrors(steps, distances(gradient), others)
