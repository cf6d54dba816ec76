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
from jaxnn.gradient_faults import suggest
from jaxnn.gradient_report import GradientReport, LeafReport
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

__all__ = ["check_gradients"]

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
SAMPLES_TO_EXPLAIN = 16
"""Of the worst leaf's sample and those drawn first: what the suggestions are told from."""
COORDINATES_AT_ONCE = 64


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
        value_error, found = jax.tree.map(np.asarray, _measure(loss, by_hand, samples, batch))
        leaves = _leaves(first, found, tolerance, difference_tolerance)
        worst = max(leaves, key=lambda leaf: _excess(leaf, tolerance, difference_tolerance))
        suggestions = ()
        if not all(leaf.passed for leaf in leaves):
            chosen = np.unique([worst.sample, *range(SAMPLES_TO_EXPLAIN)])
            chosen = chosen[chosen < len(value_error)]
            few = jax.tree.map(lambda leaf: leaf[chosen], samples)
            wrong = [not leaf.passed for leaf in leaves]
            suggestions = suggest(loss, by_hand, few, batch, wrong)
    return GradientReport(
        leaves=leaves,
        value_error=_worst(value_error),
        num_samples=len(value_error),
        tolerance=tolerance,
        difference_tolerance=difference_tolerance,
        passed=_worst(value_error) <= tolerance and all(leaf.passed for leaf in leaves),
        suggestions=suggestions,
        worst=worst,
        worst_key=_key_of(key, worst.sample) if callable(sampler) else None,
    )


class _Off(NamedTuple):
    """A coordinate: how far off it is, where, what it is and what it should be."""

    error: Any
    place: Any
    gradient: Any
    expected: Any


class _Found(NamedTuple):
    """What was measured at a leaf in a sample; `(samples,)` in the end.

    Attributes:
        value: the loss.
        largest: largest magnitude of the gradient of `jax.grad`.
        step: of the differences.
        off: the most wrong coordinate against `jax.grad`.
        outside: that farthest outside the finite differences.
        product: of both gradients, summed.
        square: of that of `jax.grad`.
        has_any: whether the gradient under test is anywhere but 0.
        num_kinks: coordinates where the finite differences disagree.
    """

    value: Any
    largest: Any
    step: Any
    off: _Off
    outside: _Off
    product: Any
    square: Any
    has_any: Any
    num_kinks: Any


def _key_of(key: jax.Array, sample: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, TAG), sample)


def _samples(key: jax.Array, sampler: Any, num_samples: int) -> Any:
    """Parameter sets with a leading axis: drawn, or the one given."""
    if not callable(sampler):
        return jax.tree.map(lambda leaf: leaf[None], as_params(sampler))
    keys = jax.vmap(_key_of, (None, 0))(key, jnp.arange(num_samples, dtype=jnp.uint32))
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
def _measure(
    loss: Partial, by_hand: Partial, samples: Any, batch: Any
) -> tuple[jax.Array, tuple[_Found, ...]]:
    """Gradients and finite differences of every coordinate: the worst of every leaf and sample."""

    def measure(params: Any) -> tuple[jax.Array, tuple[_Found, ...]]:
        flat, unravel = ravel_pytree(params)
        steps = jax.tree.map(_step, params)
        step = ravel_pytree(steps)[0]
        value, reference = jax.value_and_grad(loss)(params, batch)
        value_by_hand, gradient = by_hand(params, batch)

        def differences(coordinate: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = step[coordinate]
            up = loss(unravel(flat.at[coordinate].add(h)), batch)
            down = loss(unravel(flat.at[coordinate].add(-h)), batch)
            return (up - value) / h, (value - down) / h

        coordinates = jnp.arange(flat.size)
        both = jax.lax.map(differences, coordinates, batch_size=COORDINATES_AT_ONCE)
        error = jnp.abs(value_by_hand - value) / jnp.maximum(jnp.abs(value), 1e-3)
        trees = (gradient, reference, *map(unravel, both), steps)
        largest = jnp.maximum(1e-3 * _largest(ravel_pytree(reference)[0]), TINY)
        floor = jnp.maximum(largest, ROUNDING * _largest(value))
        return error, tuple(
            _compare(value, floor, *map(jnp.ravel, leaves))
            for leaves in zip(*map(jax.tree.leaves, trees), strict=True)
        )

    return jax.lax.map(measure, samples, batch_size=SAMPLES_AT_ONCE)


def _step(leaf: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(leaf), initial=0)
    return jnp.full(leaf.shape, STEP * jnp.where(largest > 0, largest, 1))


def _compare(
    value: jax.Array,
    floor: jax.Array,
    gradient: jax.Array,
    reference: jax.Array,
    forward: jax.Array,
    backward: jax.Array,
    steps: jax.Array,
) -> _Found:
    """One leaf of one sample; `floor` is the least that kinks are measured against."""
    low, high = jnp.minimum(forward, backward), jnp.maximum(forward, backward)
    outside = jnp.maximum(jnp.maximum(low - gradient, gradient - high), 0)
    largest = jnp.max(jnp.abs(reference), initial=0)
    step = jnp.max(steps, initial=0)
    gap = (high - low - 2 * ROUNDING * jnp.abs(value) / step) / jnp.maximum(largest, floor)
    return _Found(
        value=value,
        largest=largest,
        step=step,
        off=_most(jnp.abs(gradient - reference), gradient, reference),
        outside=_most(outside, gradient, (forward + backward) / 2),
        product=jnp.vdot(gradient, reference),
        square=jnp.vdot(reference, reference),
        has_any=jnp.any(gradient != 0),
        num_kinks=jnp.sum(gap > KINK),
    )


def _most(errors: jax.Array, gradient: jax.Array, expected: jax.Array) -> _Off:
    """The coordinate with the largest error; one that is not a number is infinite."""
    if not errors.size:
        nothing = jnp.zeros(())
        return _Off(nothing, jnp.zeros((), int), nothing, nothing)
    errors = jnp.where(jnp.isnan(errors), jnp.inf, errors)
    place = jnp.argmax(errors)
    return _Off(errors[place], place, gradient[place], expected[place])


def _largest(numbers: Any) -> Any:
    """The largest magnitude among the finite ones."""
    return jnp.max(jnp.abs(numbers), where=jnp.isfinite(numbers), initial=0)


def _leaves(
    params: Any, found: tuple[_Found, ...], tolerance: float, difference_tolerance: float
) -> tuple[LeafReport, ...]:
    largest = max(float(_largest(leaf.largest)) for leaf in found)
    floor = max(1e-3 * largest, ROUNDING * float(_largest(found[0].value)), TINY)
    return tuple(
        _leaf("params" + keystr(path), leaf.shape, part, floor, tolerance, difference_tolerance)
        for (path, leaf), part in zip(tree_leaves_with_path(params), found, strict=True)
    )


def _leaf(
    name: str,
    shape: tuple[int, ...],
    found: _Found,
    floor: float,
    tolerance: float,
    difference_tolerance: float,
) -> LeafReport:
    size = np.maximum(found.largest, floor)
    rounding = ROUNDING * np.abs(found.value)
    with np.errstate(invalid="ignore"):
        errors, outside = found.off.error / size, found.outside.error / size
        is_right = _worst((found.off.error - rounding) / size) <= tolerance
        beyond = found.outside.error - rounding / np.where(found.step > 0, found.step, 1)
        is_between = _worst(beyond / size) <= difference_tolerance
    by_grad = _worst(errors) / tolerance >= _worst(outside) / difference_tolerance
    sample = int(np.argmax(_or_inf(errors if by_grad else outside)))
    at = _Off(*(part[sample] for part in (found.off if by_grad else found.outside)))
    return LeafReport(
        name=name,
        shape=shape,
        largest=_worst(found.largest),
        error=_worst(errors),
        difference_error=_worst(outside),
        ratio=_ratio(found),
        num_kinks=int(np.sum(found.num_kinks)),
        passed=is_right and is_between,
        sample=sample,
        coordinate=tuple(map(int, np.unravel_index(at.place, shape))) if 0 not in shape else (),
        gradient=float(at.gradient),
        expected=float(at.expected),
    )


def _excess(leaf: LeafReport, tolerance: float, difference_tolerance: float) -> tuple[bool, float]:
    """How wrong a leaf is, for comparison."""
    ratios = leaf.error / tolerance, leaf.difference_error / difference_tolerance
    return not leaf.passed, max(ratios)


def _or_inf(errors: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(errors), np.inf, errors)


def _worst(errors: np.ndarray) -> float:
    """The largest error; one that is not a number is infinite."""
    return float(np.max(_or_inf(errors), initial=0))


def _ratio(found: _Found) -> float:
    """`<gradient, reference> / <reference, reference>`; 1 where both are zero."""
    squares = float(np.sum(found.square))
    if squares == 0.0:
        return float("inf") if np.any(found.has_any) else 1.0
    return float(np.sum(found.product)) / squares
