"""Proof that a gradient is right, or where it is wrong: leaf by leaf, in float64.

Three independent witnesses for every coordinate of every parameter set drawn:

    the gradient under test             value_and_grad_fn(params, batch)[1]
    automatic differentiation           jax.grad(loss_fn)
    one-sided finite differences        (f(x + h) - f(x)) / h  and  (f(x) - f(x - h)) / h

Where a loss is smooth the two differences agree to a few h, and the gradient has to lie between
them. Where they differ there is a kink, such as relu's at 0: the differences then bracket every
slope that one could mean, so kinks are counted apart and are no failures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.checks import as_count, as_key, as_real
from jaxnn.training.callables import (
    LossFn,
    SampleFn,
    ValueAndGradFn,
    as_batch,
    as_params,
    as_partial,
    check_scalar,
    check_value_and_grad,
    shapes_of,
)

__all__ = ["GradientReport", "LeafReport", "check_gradients"]

TAG = 0x43484B47
"""Folded into the key, so that no trainer draws the same from it."""

STEP = 1e-6
"""Of the finite differences, relative to the leaf's largest coordinate."""

TINY = float(np.finfo(np.float64).tiny)

KINK = 1e-2
"""Where the two differences disagree by more, relative to the leaf, a kink lies between them."""

ROUNDING = 32 * float(np.finfo(np.float64).eps)
"""Of the loss: what its value, and sums as large as it, may be off by."""

SAMPLES_AT_ONCE = 16
COORDINATES_AT_ONCE = 64


class LeafReport(NamedTuple):
    """What was found for one leaf, over all samples.

    Errors are relative to the leaf's largest coordinate in the same sample, or to a thousandth of
    the largest coordinate of all leaves and samples where that is more, or to `ROUNDING` times
    the largest loss where all gradients vanish. What the loss's own rounding explains is
    forgiven: `ROUNDING` times the loss, over the step for differences.

    Attributes:
        name: where the leaf is, such as `params[0].weights`.
        shape: its shape.
        largest: largest magnitude of its gradient.
        error: largest error against `jax.grad`.
        difference_error: largest distance from the interval between the finite differences.
        ratio: factor that fits the gradient to that of `jax.grad`, in least squares; 1 if right.
        num_kinks: coordinates where the two finite differences disagree.
        passed: whether both errors, less what is forgiven, are within their tolerances.
    """

    name: str
    shape: tuple[int, ...]
    largest: float
    error: float
    difference_error: float
    ratio: float
    num_kinks: int
    passed: bool


class GradientReport(NamedTuple):
    """Outcome of a gradient check; prints as a table, a row a leaf.

    Attributes:
        leaves: a report for each leaf of the params.
        value_error: largest relative difference between the two losses.
        num_samples: parameter sets drawn.
        tolerance: for `jax.grad` and for the losses.
        difference_tolerance: for the finite differences.
        passed: whether everything is within its tolerance.
    """

    leaves: tuple[LeafReport, ...]
    value_error: float
    num_samples: int
    tolerance: float
    difference_tolerance: float
    passed: bool

    def __str__(self) -> str:
        """The table."""
        word = "passed" if self.passed else "FAILED"
        columns = ("largest", "vs jax.grad", "vs differences", "ratio", "kinks", "")
        width = max(len(leaf.name) for leaf in self.leaves)
        header = f"{'leaf':<{width}}  {'shape':<10}" + "".join(f"{c:>16}" for c in columns[:3])
        lines = [
            f"gradient check {word}: {self.num_samples} parameter sets in float64, "
            f"tolerance {self.tolerance:g}, differences {self.difference_tolerance:g}, "
            f"loss error {self.value_error:.1e}",
            header + "".join(f"{c:>10}" for c in columns[3:5]),
        ]
        for leaf in self.leaves:
            numbers = (leaf.largest, leaf.error, leaf.difference_error)
            lines.append(
                f"{leaf.name:<{width}}  {leaf.shape!s:<10}"
                + "".join(f"{number:>16.1e}" for number in numbers)
                + f"{leaf.ratio:>10.4f}{leaf.num_kinks:>10}"
                + ("  ok" if leaf.passed else "  WRONG")
            )
        return "\n".join(lines)


def check_gradients(
    key: jax.Array,
    loss_fn: LossFn,
    value_and_grad_fn: ValueAndGradFn,
    sampler: SampleFn | Any,
    batch: Any,
    *,
    num_samples: int = 20,
    tolerance: float = 1e-9,
    difference_tolerance: float = 1e-5,
) -> GradientReport:
    """Compares a gradient with `jax.grad` and with finite differences, in float64.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar, differentiable by JAX; it computes
            in the dtype of the params. As `model.loss_reference`.
        value_and_grad_fn: the gradient under test, `(params, batch)` -> loss and gradient. As
            `model.value_and_grad`.
        sampler: `sample_fn(key)` -> params, or one set of params, any pytree of floats.
        batch: any pytree that both functions take.
        num_samples: parameter sets to draw, at least 1; a given set is checked once.
        tolerance: largest relative error against `jax.grad`, above 0.
        difference_tolerance: largest relative error against finite differences, above 0.

    Returns:
        A `GradientReport`; `report.passed` says whether the gradient is right.

    Raises:
        TypeError: if an argument is of the wrong kind, a loss not a float scalar of the params'
            dtype, or the gradients not like the params.
        ValueError: if a number is out of range.

    Example:
        >>> loss_fn = lambda params, batch: jnp.sum((params - batch) ** 2)
        >>> by_hand = lambda params, batch: (loss_fn(params, batch), params - batch)
        >>> report = check_gradients(
        ...     jax.random.key(0), loss_fn, by_hand, jnp.zeros(3), jnp.ones(3)
        ... )
        >>> report.passed, round(report.leaves[0].ratio, 6)
        (False, 0.5)
    """
    key = as_key("key", key)
    num_samples = as_count("num_samples", num_samples, minimum=1)
    as_real("tolerance", tolerance)
    as_real("difference_tolerance", difference_tolerance)
    with jax.threefry_partitionable(True):
        samples = _samples(key, sampler, num_samples)
    first = jax.tree.map(lambda leaf: leaf[0], samples)
    batch = as_batch(batch, first, loss_fn, value_and_grad_fn)
    loss = as_partial("loss_fn", loss_fn)
    by_hand = as_partial("value_and_grad_fn", value_and_grad_fn)
    with jax.enable_x64(True):
        samples, batch = _widen(samples), _widen(batch)
        _check_results(loss, by_hand, jax.tree.map(lambda leaf: leaf[0], samples), batch)
        found = jax.tree.map(np.asarray, _measure(loss, by_hand, samples, batch))
    return _report(first, found, len(found.value_error), tolerance, difference_tolerance)


class _Found(NamedTuple):
    """What was measured: of each sample, and from `gradient` on also of each coordinate."""

    value: Any
    value_error: Any
    gradient: Any
    reference: Any
    forward: Any
    backward: Any
    step: Any


def _samples(key: jax.Array, sampler: Any, num_samples: int) -> Any:
    """Parameter sets with a leading axis: drawn, or the one given."""
    if not callable(sampler):
        return jax.tree.map(lambda leaf: leaf[None], as_params(sampler))
    keys = jax.random.split(jax.random.fold_in(key, TAG), num_samples)
    return as_params(_draw(as_partial("sampler", sampler), keys))


@jax.jit
def _draw(sampler: Partial, keys: jax.Array) -> Any:
    return jax.vmap(sampler)(keys)


def _widen(tree: Any) -> Any:
    """Every float leaf as float64."""

    def widen(leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(widen, tree)


def _check_results(loss: Partial, by_hand: Partial, params: Any, batch: Any) -> None:
    value = shapes_of("loss_fn", loss, params, batch)
    check_scalar("loss_fn", value)
    if value.dtype != jnp.float64:
        raise TypeError(
            f"loss_fn must compute in the dtype of the params; got {value.dtype} for float64"
        )
    check_value_and_grad(by_hand, params, batch)


@jax.jit
def _measure(loss: Partial, by_hand: Partial, samples: Any, batch: Any) -> _Found:
    """Gradients and finite differences of every coordinate of every sample."""

    def measure(params: Any) -> _Found:
        flat, unravel = ravel_pytree(params)
        step = ravel_pytree(jax.tree.map(_step, params))[0]
        value, reference = jax.value_and_grad(loss)(params, batch)
        value_by_hand, gradient = by_hand(params, batch)

        def differences(coordinate: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = step[coordinate]
            up = loss(unravel(flat.at[coordinate].add(h)), batch)
            down = loss(unravel(flat.at[coordinate].add(-h)), batch)
            return (up - value) / h, (value - down) / h

        coordinates = jnp.arange(flat.size)
        forward, backward = jax.lax.map(differences, coordinates, batch_size=COORDINATES_AT_ONCE)
        error = jnp.abs(value_by_hand - value) / jnp.maximum(jnp.abs(value), 1e-3)
        gradients = ravel_pytree(gradient)[0], ravel_pytree(reference)[0]
        return _Found(value, error, *gradients, forward, backward, step)

    return jax.lax.map(measure, samples, batch_size=SAMPLES_AT_ONCE)


def _step(leaf: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(leaf), initial=0)
    return jnp.full(leaf.shape, STEP * jnp.where(largest > 0, largest, 1))


def _report(
    params: Any, found: _Found, num_samples: int, tolerance: float, difference_tolerance: float
) -> GradientReport:
    leaves, begin = [], 0
    floor = max(1e-3 * _largest(found.reference), ROUNDING * _largest(found.value), TINY)
    for path, leaf in tree_leaves_with_path(params):
        here = slice(begin, begin + leaf.size)
        begin += leaf.size
        part = _Found(found.value, found.value_error, *(field[:, here] for field in found[2:]))
        name = "params" + keystr(path)
        leaves.append(_leaf(name, leaf.shape, part, floor, tolerance, difference_tolerance))
    value_error = _worst(found.value_error)
    return GradientReport(
        leaves=tuple(leaves),
        value_error=value_error,
        num_samples=num_samples,
        tolerance=tolerance,
        difference_tolerance=difference_tolerance,
        passed=value_error <= tolerance and all(leaf.passed for leaf in leaves),
    )


def _leaf(
    name: str,
    shape: tuple[int, ...],
    found: _Found,
    floor: float,
    tolerance: float,
    difference_tolerance: float,
) -> LeafReport:
    gradient, reference = found.gradient, found.reference
    size = np.maximum(np.max(np.abs(reference), axis=1, keepdims=True, initial=0), floor)
    rounding = ROUNDING * np.abs(found.value)[:, None]
    low = np.minimum(found.forward, found.backward)
    high = np.maximum(found.forward, found.backward)
    with np.errstate(invalid="ignore"):
        off = np.abs(gradient - reference)
        outside = np.maximum(np.maximum(low - gradient, gradient - high), 0)
        is_right = _worst((off - rounding) / size) <= tolerance
        is_between = _worst((outside - rounding / found.step) / size) <= difference_tolerance
    return LeafReport(
        name=name,
        shape=shape,
        largest=_worst(np.abs(reference)),
        error=_worst(off / size),
        difference_error=_worst(outside / size),
        ratio=_ratio(gradient, reference),
        num_kinks=int(np.sum((high - low - 2 * rounding / found.step) / size > KINK)),
        passed=is_right and is_between,
    )


def _worst(errors: np.ndarray) -> float:
    """The largest error; one that is not a number is infinite."""
    return float(np.max(np.where(np.isnan(errors), np.inf, errors), initial=0))


def _largest(numbers: np.ndarray) -> float:
    """The largest magnitude among the finite ones."""
    return float(np.max(np.abs(numbers), where=np.isfinite(numbers), initial=0))


def _ratio(gradient: np.ndarray, reference: np.ndarray) -> float:
    """`<gradient, reference> / <reference, reference>`; 1 where both are zero."""
    squares = float(np.vdot(reference, reference))
    if squares == 0.0:
        return 1.0 if not np.any(gradient) else float("inf")
    return float(np.vdot(gradient, reference)) / squares
