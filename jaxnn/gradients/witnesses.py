"""What the witnesses say of a gradient, at every coordinate of every sample of params.

The device computes the gradient under test, automatic differentiation and finite differences for
a chunk of samples at a time. The host keeps the worst coordinate of every leaf and sample, so ten
thousand samples take no more memory than some hundred. Functions in NumPy are called on the host;
a loss in NumPy has no automatic differentiation, so its differences decide.

A gradient that lies between the two differences and yet is not that of `jax.grad` may be another
right slope at a kink. `jax.grad` very close to the point, on both sides, decides: at a kink these
slopes jump, by the same amount at each distance. On a smooth stretch the jump shrinks with the
distance, and a kink that is only nearby causes none close to the point.

The rounding in a loss can be far above that of its own size: a loss of 1e-9 may be what is left of
numbers that cancel. Two bounds of it are taken, and the smaller counts. Where signs of the params
are flipped nothing cancels any more, so the loss is as large as those numbers. And rounding drives
apart the differences on both sides of a point, at the worst coordinate about as far as it can.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxnn.gradients.functions import (
    COORDINATES_AT_ONCE,
    SAMPLES_AT_ONCE,
    Checked,
    NumpyFunction,
    Problem,
    at_samples,
    flat,
    from_flat,
    joined,
    losses_beside,
    steps,
    take,
    values_and_slopes,
)
from jaxnn.typing import PyTree

STEP = 1e-6  # Of the finite differences, relative to the leaf's largest coordinate.
TINY = float(np.finfo(np.float64).tiny)
KINK = 1e-2  # Where the slopes on both sides differ by more, relative to the leaf, is a kink.

ROUNDING = 32 * float(np.finfo(np.float64).eps)
"""Relative error that rounding may cause in a loss, and in sums as large as it."""

NEAR, NEARER = 1e-4, 1e-6
"""Distances at which the slopes beside a point are taken, relative to the step of the differences:
close enough to leave out the kinks nearby, and far above the rounding of the params."""

FLIPS = 4  # Patterns of signs with which the size of the numbers in a loss is found.
NUMBERS_AT_ONCE, NUMBERS_TO_KEEP = 2**20, 2**23


class Evidence(NamedTuple):
    """What was found at a leaf, `(samples,)` each; errors are less what rounding explains."""

    largest: np.ndarray  # Magnitude of a right slope.
    error: np.ndarray  # Largest error against jax.grad, at a kink against both sides' slopes.
    difference_error: np.ndarray  # Largest distance from between the finite differences.
    place: np.ndarray  # The worst coordinate by either of them, relative to the tolerances,
    gradient: np.ndarray  # what the gradient is there
    expected: np.ndarray  # and what it should be.
    product: np.ndarray  # Sum of the gradient times the right slope nearest to it.
    square: np.ndarray  # Sum of the squares of those slopes.
    is_nonzero: np.ndarray  # Whether the gradient under test is anywhere but 0.
    counts: dict[str, np.ndarray]  # Coordinates of each kind that the report speaks of.


class Losses(NamedTuple):
    """What the loss says of each sample, and from `reference` on of each coordinate."""

    value: np.ndarray
    flipped: np.ndarray  # The loss where signs are flipped, `(samples, FLIPS)`.
    reference: np.ndarray  # By jax.grad; nan for a loss in NumPy.
    forward: np.ndarray  # One-sided differences.
    backward: np.ndarray


class _Slopes(NamedTuple):
    """The slopes of each coordinate, by all witnesses, `(samples, coordinates)` each."""

    gradient: np.ndarray  # Under test.
    reference: np.ndarray  # By jax.grad.
    low: np.ndarray  # The lower of both one-sided differences,
    high: np.ndarray  # the higher,
    noise: np.ndarray  # and what rounding may have added to either.
    least: np.ndarray  # The least right slope: that of jax.grad, or of one side of a kink,
    most: np.ndarray  # the largest,
    bend: np.ndarray  # and what curvature adds to the differences.


def widened(tree: PyTree) -> PyTree:
    """Return the tree with its float leaves in float64; other leaves as they are."""

    def widen(leaf: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(np.asarray(leaf, np.float64)) if is_float else leaf

    return jax.tree.map(widen, tree)


def measure(
    problem: Problem, samples: PyTree
) -> tuple[np.ndarray, np.ndarray, list[Evidence], Losses]:
    """Return both losses at every sample, the evidence on every leaf, and what the loss says.

    The last is of the first samples, as many as fit into some memory. Only coordinates that may
    be at a kink, or off by more than one of the tolerances, against `jax.grad` and against the
    differences, are looked at a second time.
    """
    count, size = flat(samples).shape
    chunk = SAMPLES_AT_ONCE * max(NUMBERS_AT_ONCE // size // SAMPLES_AT_ONCE, 1)
    chunks, said = [], []
    for begin in range(0, count, chunk):
        here = take(samples, slice(begin, begin + chunk))
        losses = _losses(problem.loss, here, problem.batch)
        results = at_samples(problem.by_hand, here, problem.batch)
        evidence = compare(problem, losses, here, results)
        chunks.append((losses.value, results[0], evidence))
        said += [losses] if begin * size < NUMBERS_TO_KEEP else []
    return *joined(chunks), joined(said)


def _losses(loss: Checked, samples: PyTree, batch: PyTree) -> Losses:
    """Return what the loss, its gradient and finite differences of every coordinate are."""
    step, points, first = steps(samples, STEP), flat(samples), take(samples, 0)
    if isinstance(loss, NumpyFunction):
        value, reference = at_samples(loss, samples, batch), np.full_like(step, np.nan)
    else:
        value, gradient = values_and_slopes(loss, samples, batch)
        reference = flat(gradient)
    up, down = losses_beside(loss, samples, batch, step)
    flipped = np.full((len(step), FLIPS), np.nan)
    # Patterns of signs; the first is -1 everywhere. A loss may refuse params of another sign.
    phases = np.outer(np.arange(FLIPS), np.arange(1, step.shape[1] + 1))
    for number, signs in enumerate(np.where(np.sin(phases) > 0, 1, -1)):
        with contextlib.suppress(Exception), np.errstate(all="ignore"):
            flipped[:, number] = at_samples(loss, from_flat(first, signs * points), batch)
    with np.errstate(invalid="ignore", over="ignore"):
        middle = value[:, None]
        return Losses(value, flipped, reference, (up - middle) / step, (middle - down) / step)


def compare(
    problem: Problem, losses: Losses, samples: PyTree, results: tuple[np.ndarray, PyTree]
) -> list[Evidence]:
    """Return the evidence on losses `(samples,)` and gradients, a tree or `(samples, size)`."""
    step, ends = steps(samples, STEP), np.cumsum([x[0].size for x in jax.tree.leaves(samples)])
    by_leaf = functools.partial(np.split, indices_or_sections=ends[:-1], axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = (each(losses.forward, losses.backward) for each in (np.minimum, np.maximum))
        rounding = ROUNDING * _finite(losses.value)[:, None]
        gradient, right, noise = flat(results[1]), losses.reference, _noise(losses, step, rounding)
        slopes = _Slopes(gradient, right, low, high, noise, right, right, np.zeros_like(step))
        if isinstance(problem.loss, NumpyFunction):
            right = (low + high) / 2
        floor = np.maximum(np.maximum(1e-3 * _largest(right), rounding), TINY)
        if isinstance(problem.loss, Partial):
            largest = [np.broadcast_to(_largest(leaf), leaf.shape) for leaf in by_leaf(right)]
            size = np.maximum(np.concatenate(largest, axis=1), floor)
            slopes = _look_closer(problem, samples, slopes, step, size)
        leaves = zip(*map(by_leaf, slopes), strict=True)
        return [_compare(_Slopes(*leaf), floor, rounding, problem.tolerances) for leaf in leaves]


def _noise(losses: Losses, step: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Return what rounding, in the loss at least so much, may have added to the differences."""
    forward, backward = losses.forward, losses.backward
    steepest = np.maximum(np.abs(forward), np.abs(backward))
    most = np.maximum(least, ROUNDING * _largest(losses.flipped))
    apart = np.nan_to_num(step * np.abs(forward - backward), nan=np.inf)
    apart = 2 * np.max(apart, axis=1, keepdims=True)
    # Where the loss stays as it is on both sides, all that happens may be below its rounding.
    rounding = np.where(step * steepest > least, np.clip(apart, least, most), most)
    return rounding / step + ROUNDING * steepest


def value_errors(value: np.ndarray, by_hand: np.ndarray) -> np.ndarray:
    """Relative; 0 where rounding explains it or both losses are the same, even if not finite."""
    with np.errstate(invalid="ignore"):
        error = np.abs(by_hand - value) / np.maximum(np.abs(value), 1e-3)
    is_same = (by_hand == value) | (np.isnan(by_hand) & np.isnan(value)) | (error <= ROUNDING)
    return np.where(is_same, 0, np.where(np.isnan(error), np.inf, error))


def _look_closer(
    problem: Problem, samples: PyTree, slopes: _Slopes, step: np.ndarray, size: np.ndarray
) -> _Slopes:
    """Find the right slopes where there may be a kink, or where one witness alone objects."""
    gradient, reference, low, high, noise, *right = slopes
    least, most, bend = (each.copy() for each in right)
    off, outside = np.abs(gradient - reference), _outside(slopes, gradient)
    objections = (off > problem.tolerances[0] * size) | (outside > problem.tolerances[1] * size)
    slack = KINK * np.maximum(size, np.maximum(np.abs(low), np.abs(high)))
    has_gap = high - low - 2 * noise > KINK * size
    rows, columns = np.nonzero(has_gap | (objections & (outside <= slack)))
    sides_at = Partial(_sides, problem.loss)
    for begin in range(0, len(rows), COORDINATES_AT_ONCE):
        here = slice(begin, begin + COORDINATES_AT_ONCE)
        row, column = (np.resize(each[here], COORDINATES_AT_ONCE) for each in (rows, columns))
        places = take(samples, row), column, step[row, column]
        at_kink, sides, bends = at_samples(sides_at, places, problem.batch)
        place, sides = (row[at_kink], column[at_kink]), sides[at_kink]
        least[place], most[place] = np.min(sides, axis=1), np.max(sides, axis=1)
        bend[place] = bends[at_kink]
    return slopes._replace(least=least, most=most, bend=bend)


def _sides(loss: Partial, place: tuple[PyTree, Any, Any], batch: PyTree) -> tuple[jax.Array, ...]:
    """Return whether a coordinate is at a kink, the slopes of both sides, and their bend."""
    params, coordinate, step = place
    point, unravel = ravel_pytree(params)

    def slope(distance: jax.Array) -> jax.Array:
        moved = unravel(point.at[coordinate].add(distance * step))
        return ravel_pytree(jax.grad(loss)(moved, batch))[0][coordinate]

    # At a kink the slopes jump as far close to the point as a little farther off.
    slopes = jax.vmap(slope)(jnp.array([-NEAR, NEAR, -NEARER, NEARER]))
    near, nearer = slopes[:2], slopes[2:]
    jump_near, jump = jnp.abs(near[1] - near[0]), jnp.abs(nearer[1] - nearer[0])
    noise = ROUNDING * jnp.max(jnp.abs(slopes))
    curved = (near - nearer) / (NEAR - NEARER)  # curvature times step
    is_kink = jnp.abs(jump_near - jump) <= jump / 2 + noise
    return is_kink, nearer - NEARER * curved, jnp.max(jnp.abs(curved)) / 2


def _compare(
    slopes: _Slopes, floor: np.ndarray, rounding: np.ndarray, tolerances: tuple[float, float]
) -> Evidence:
    """Compare a leaf with `jax.grad` and the differences, or with the one that is finite."""
    gradient, reference, low, high, noise, least, most, bend = slopes
    has_grad, has_differences = np.isfinite(reference), np.isfinite(high - low)
    by_differences, by_nothing = has_differences & ~has_grad, ~(has_grad | has_differences)
    largest = np.maximum(_largest(least), _largest(most))
    of_differences = _largest(np.where(by_differences, np.maximum(np.abs(low), np.abs(high)), 0))
    largest = np.where(largest > 0, largest, of_differences)
    size = np.maximum(largest, floor)
    rounding = np.maximum(rounding, ROUNDING * largest)

    right = np.where(has_grad, _nearest(gradient, least, most), _nearest(gradient, low, high))
    right[by_nothing] = np.nan
    off = np.maximum(np.abs(gradient - right) - rounding, 0)
    off[by_differences] = 0
    off[by_nothing] = np.where(np.isfinite(gradient), np.inf, 0)[by_nothing]
    outside = np.maximum(_outside(slopes, gradient) - bend, 0)
    outside[~has_differences] = 0
    off, outside = (np.where(np.isnan(error), np.inf, error) for error in (off, outside))
    jump = np.where(np.isfinite(most - least), most - least, high - low - 2 * noise)
    kinds = {
        "kinks": jump > KINK * size,
        "other slopes": has_grad & (off == 0) & (np.abs(gradient - reference) > rounding),
        "contradicted": has_differences & (_outside(slopes, reference) > KINK * size),
        "by differences": by_differences,
        "by grad": has_grad & ~has_differences,
        "by nothing": by_nothing,
    }
    excess, other_excess = off / tolerances[0], outside / tolerances[1]
    expected = np.where(excess >= other_excess, right, (low + high) / 2)
    if not off.size:  # A leaf without numbers is as one number that is 0.
        excess = other_excess = gradient = expected = np.zeros((len(off), 1))
    rows, place = np.arange(len(off)), np.argmax(np.maximum(excess, other_excess), axis=1)
    return Evidence(
        largest=largest[:, 0],
        error=np.max(off, axis=1, initial=0),
        difference_error=np.max(outside, axis=1, initial=0),
        place=place,
        gradient=gradient[rows, place],
        expected=expected[rows, place],
        product=np.sum(gradient * right, axis=1, where=~by_nothing),
        square=np.sum(right * right, axis=1, where=~by_nothing),
        is_nonzero=np.any(np.abs(gradient) > rounding, axis=1),
        counts={kind: np.sum(places, axis=1) for kind, places in kinds.items()},
    )


def _nearest(gradient: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The number between two that is nearest to the gradient; the higher where that is nan."""
    return np.fmax(low, np.fmin(gradient, high))


def _outside(slopes: _Slopes, gradient: np.ndarray) -> np.ndarray:
    """How far a gradient is outside the differences and their noise; negative inside."""
    return np.maximum(slopes.low - gradient, gradient - slopes.high) - slopes.noise


def _finite(numbers: np.ndarray) -> np.ndarray:
    """Magnitudes, 0 where they are not finite."""
    return np.where(np.isfinite(numbers), np.abs(numbers), 0)


def _largest(numbers: np.ndarray) -> np.ndarray:
    """The largest finite magnitude of each row, `(rows, 1)`."""
    return np.max(_finite(numbers), axis=1, keepdims=True, initial=0)
