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

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.checks import as_count, as_key, as_real
from jaxnn.gradient_faults import suggest
from jaxnn.gradient_report import GradientReport, LeafReport
from jaxnn.gradient_witnesses import (
    ROUNDING,
    TINY,
    Found,
    Off,
    check_functions,
    largest_of,
    measure,
    or_inf,
    widened,
)
from jaxnn.training.callables import (
    LossFn,
    SampleFn,
    ValueAndGradFn,
    as_batch,
    as_params,
    as_partial,
)

__all__ = ["check_gradients"]

TAG = 0x43484B47
"""Folded into the key, so that no trainer draws the same from it."""

SAMPLES_TO_EXPLAIN = 16
"""Parameter sets that the suggestions are told from, besides the worst one."""


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
        TypeError: if an argument is of the wrong kind, the params hold no number, a loss is not a
            float scalar of the params' dtype, or the gradients are not like the params.
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
        samples, batch = widened(samples), widened(batch)
        check_functions(loss, by_hand, jax.tree.map(lambda leaf: leaf[0], samples), batch)
        value_error, found = measure(loss, by_hand, samples, batch)
        leaves, excesses = _leaves(first, found, tolerance, difference_tolerance)
        worst = leaves[int(np.argmax(excesses))]
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


def _leaves(
    params: Any, found: tuple[Found, ...], tolerance: float, difference_tolerance: float
) -> tuple[tuple[LeafReport, ...], list[float]]:
    """The reports, and how many times its tolerance each leaf is off, less what is forgiven."""
    largest = max(largest_of(leaf.largest) for leaf in found)
    floor = max(1e-3 * largest, ROUNDING * largest_of(found[0].value), TINY)
    reports, excesses = [], []
    for (path, leaf), part in zip(tree_leaves_with_path(params), found, strict=True):
        off, outside = _beyond(part, floor, tolerance, difference_tolerance)
        by_grad = _worst(off) >= _worst(outside)
        sample = int(np.argmax(or_inf(off if by_grad else outside)))
        excesses.append(max(_worst(off), _worst(outside)))
        at = Off(*(field[sample] for field in (part.off if by_grad else part.outside)))
        report = _leaf("params" + keystr(path), leaf.shape, part, floor, sample, at)
        reports.append(report._replace(passed=excesses[-1] <= 1))
    return tuple(reports), excesses


def _beyond(
    found: Found, floor: float, tolerance: float, difference_tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Errors of each sample by both witnesses, less what rounding explains, in tolerances."""
    size, rounding = np.maximum(found.largest, floor), ROUNDING * np.abs(found.value)
    with np.errstate(invalid="ignore"):
        off = (found.off.error - rounding) / size / tolerance
        return off, (found.outside.error - rounding / found.step) / size / difference_tolerance


def _leaf(
    name: str, shape: tuple[int, ...], found: Found, floor: float, sample: int, at: Off
) -> LeafReport:
    size = np.maximum(found.largest, floor)
    with np.errstate(invalid="ignore"):
        errors, outside = found.off.error / size, found.outside.error / size
    return LeafReport(
        name=name,
        shape=shape,
        largest=_worst(found.largest),
        error=_worst(errors),
        difference_error=_worst(outside),
        ratio=_ratio(found),
        num_kinks=int(np.sum(found.num_kinks)),
        passed=False,
        sample=sample,
        coordinate=tuple(map(int, np.unravel_index(at.place, shape))) if 0 not in shape else (),
        gradient=float(at.gradient),
        expected=float(at.expected),
    )


def _worst(errors: np.ndarray) -> float:
    """The largest error; one that is not a number is infinite."""
    return float(np.max(or_inf(errors), initial=0))


def _ratio(found: Found) -> float:
    """`<gradient, reference> / <reference, reference>`; 1 where both are zero."""
    squares = float(np.sum(found.square))
    if squares == 0.0:
        return float("inf") if np.any(found.has_any) else 1.0
    return float(np.sum(found.product)) / squares
