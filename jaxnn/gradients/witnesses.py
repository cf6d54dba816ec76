"""What the witnesses say of a gradient, at every coordinate of every sample of params.

The device computes the gradient under test, automatic differentiation and finite differences for
a chunk of samples at a time. The host keeps the worst coordinate of every leaf and sample, so ten
thousand samples take no more memory than some hundred.

A gradient that lies between the two differences and yet is not that of `jax.grad` may be another
right slope at a kink. `jax.grad` very close to the point, on both sides, decides: at a kink these
slopes jump, by the same amount at each distance. On a smooth stretch the jump shrinks with the
distance, and a kink that is only nearby causes none close to the point.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxnn.run.checks import check_scalar, check_value_and_grad, shapes_of
from jaxnn.run.programs import program
from jaxnn.typing import PyTree

STEP = 1e-6  # Of the finite differences, relative to the leaf's largest coordinate.
TINY = float(np.finfo(np.float64).tiny)
KINK = 1e-2  # Where the slopes on both sides differ by more, relative to the leaf, is a kink.

ROUNDING = 32 * float(np.finfo(np.float64).eps)
"""Relative error that rounding may cause in a loss, and in sums as large as it."""

NEAR, NEARER = 1e-4, 1e-6
"""Distances at which the slopes beside a point are taken, relative to the step of the differences:
close enough to leave out the kinks nearby, and far above the rounding of the params."""

SAMPLES_AT_ONCE, COORDINATES_AT_ONCE, NUMBERS_AT_ONCE = 16, 64, 2**20
Array = TypeVar("Array", np.ndarray, jax.Array)
SidesAt = Callable[[PyTree], tuple[jax.Array, ...]]


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


class _Measured(NamedTuple, Generic[Array]):
    """What the device measured of each sample, and from `gradient` on of each coordinate."""

    value: Array
    value_error: Array
    gradient: Array  # Under test.
    reference: Array  # By jax.grad.
    low: Array  # The lower of both one-sided differences,
    high: Array  # the higher,
    noise: Array  # and what rounding may have added to either.
    step: Array


def check_functions(loss: Partial, by_hand: Partial, params: PyTree, batch: PyTree) -> None:
    """Refuse params without numbers, and functions whose results no witness can judge."""
    if not sum(leaf.size for leaf in jax.tree.leaves(params)):
        raise ValueError("params must hold at least one number; got empty arrays")
    value = shapes_of("loss_fn", loss, params, batch)
    check_scalar("loss_fn", value)
    if value.dtype != jnp.float64:
        raise TypeError(
            f"loss_fn must compute in the dtype of the params; got {value.dtype} for float64"
        )
    check_value_and_grad(by_hand, params, batch)


def widened(tree: PyTree) -> PyTree:
    """Return the tree with its float leaves in float64; other leaves as they are."""

    def widen(leaf: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(np.asarray(leaf, np.float64)) if is_float else leaf

    return jax.tree.map(widen, tree)


def measure(
    loss: Partial, by_hand: Partial, samples: PyTree, batch: PyTree, tolerances: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, list[Evidence]]:
    """Return the loss and its error at every sample, and the evidence on every leaf.

    Only coordinates that may be at a kink, or off by more than one of the tolerances, against
    `jax.grad` and against the differences, are looked at a second time.
    """
    leaves, chunks = jax.tree.leaves(samples), []
    count, sizes = len(leaves[0]), [leaf[0].size for leaf in leaves]
    blocks = -(-min(NUMBERS_AT_ONCE // sum(sizes), count) // SAMPLES_AT_ONCE)
    chunk = SAMPLES_AT_ONCE * max(blocks, 1) if count > 1 else 1
    for begin in range(0, count, chunk):
        places = np.minimum(np.arange(begin, begin + chunk), count - 1)
        here = jax.tree.map(lambda leaf, at=places: leaf[at], samples)
        measured = jax.tree.map(np.asarray, _measure(loss, by_hand, here, batch))
        measured = jax.tree.map(lambda array, left=count - begin: array[:left], measured)
        sides_at = functools.partial(_sides, loss, here, batch)
        with np.errstate(invalid="ignore", over="ignore"):
            evidence = _evidence(measured, sizes, tolerances, sides_at)
            chunks.append((measured.value, measured.value_error, evidence))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *chunks)


@program()
def _measure(
    loss: Partial, by_hand: Partial, samples: PyTree, batch: PyTree
) -> _Measured[jax.Array]:
    """Compute gradients and finite differences of every coordinate of every sample."""

    def at(params: PyTree) -> _Measured[jax.Array]:
        flat, unravel = ravel_pytree(params)
        step = ravel_pytree(jax.tree.map(_step, params))[0]
        value, reference = jax.value_and_grad(loss)(params, batch)
        value_by_hand, gradient = by_hand(params, batch)

        # One-sided differences along one coordinate; between them lies every slope at a kink.
        def differences(coordinate: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = step[coordinate]
            up = loss(unravel(flat.at[coordinate].add(h)), batch)
            down = loss(unravel(flat.at[coordinate].add(-h)), batch)
            return (up - value) / h, (value - down) / h

        coordinates = jnp.arange(flat.size)
        forward, backward = jax.lax.map(differences, coordinates, batch_size=COORDINATES_AT_ONCE)
        loss_size = jnp.where(jnp.isfinite(value), jnp.abs(value), 0)
        steepest = jnp.maximum(jnp.abs(forward), jnp.abs(backward))
        return _Measured(
            value,
            _value_error(value, value_by_hand),
            ravel_pytree(gradient)[0],
            ravel_pytree(reference)[0],
            jnp.minimum(forward, backward),
            jnp.maximum(forward, backward),
            ROUNDING * (loss_size / step + steepest),
            step,
        )

    return jax.lax.map(at, samples, batch_size=SAMPLES_AT_ONCE)


def _step(leaf: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(leaf), initial=0)
    return jnp.full(leaf.shape, STEP * jnp.where(largest > 0, largest, 1))


def _value_error(value: jax.Array, by_hand: jax.Array) -> jax.Array:
    """Relative; 0 where rounding explains it or both losses are the same, even if not finite."""
    error = jnp.abs(by_hand - value) / jnp.maximum(jnp.abs(value), 1e-3)
    is_same = (by_hand == value) | (jnp.isnan(by_hand) & jnp.isnan(value)) | (error <= ROUNDING)
    return jnp.where(is_same, 0, jnp.where(jnp.isnan(error), jnp.inf, error))


def _evidence(
    measured: _Measured[np.ndarray],
    sizes: list[int],
    tolerances: tuple[float, float],
    sides_at: SidesAt,
) -> list[Evidence]:
    def by_leaf(numbers: np.ndarray) -> list[np.ndarray]:
        return np.split(numbers, np.cumsum(sizes)[:-1], axis=1)

    loss_size = ROUNDING * _finite(measured.value)[:, None]
    floor = np.maximum(np.maximum(1e-3 * _largest(measured.reference), loss_size), TINY)
    largest = [np.broadcast_to(_largest(leaf), leaf.shape) for leaf in by_leaf(measured.reference)]
    size = np.maximum(np.concatenate(largest, axis=1), floor)
    slopes = _right_slopes(measured, size, tolerances, sides_at)
    leaves = zip(*map(by_leaf, (*measured[2:], *slopes)), strict=True)
    return [
        _compare(_Measured(*measured[:2], *leaf[:6]), floor, leaf[6:], tolerances)
        for leaf in leaves
    ]


def _right_slopes(
    measured: _Measured[np.ndarray],
    size: np.ndarray,
    tolerances: tuple[float, float],
    sides_at: SidesAt,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the least and the largest right slope, and what curvature adds to the differences.

    Both slopes are that of `jax.grad`, except at a kink, where they are those of the two sides.
    """
    gradient, reference, low, high, noise, step = measured[2:]
    # Look closer where there may be a kink, or where one witness alone objects to the gradient.
    off, outside = np.abs(gradient - reference), _outside(measured, gradient)
    objections = (off > tolerances[0] * size) | (outside > tolerances[1] * size)
    slack = KINK * np.maximum(size, np.maximum(np.abs(low), np.abs(high)))
    has_gap = high - low - 2 * noise > KINK * size
    rows, columns = np.nonzero(has_gap | (objections & (outside <= slack)))
    least, most, bend = reference.copy(), reference.copy(), np.zeros_like(step)
    for begin in range(0, len(rows), COORDINATES_AT_ONCE):
        here = slice(begin, begin + COORDINATES_AT_ONCE)
        row, column = (np.resize(each[here], COORDINATES_AT_ONCE) for each in (rows, columns))
        at_kink, sides, bends = map(np.asarray, sides_at((row, column, step[row, column])))
        place, sides = (row[at_kink], column[at_kink]), sides[at_kink]
        least[place], most[place] = np.min(sides, axis=1), np.max(sides, axis=1)
        bend[place] = bends[at_kink]
    return least, most, bend


@program()
def _sides(loss: Partial, samples: PyTree, batch: PyTree, places: PyTree) -> tuple[jax.Array, ...]:
    """Return whether each coordinate is at a kink, the slopes of both sides, and their bend."""

    def at(place: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        row, column, step = place
        flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[row], samples))

        def slope(distance: jax.Array) -> jax.Array:
            moved = unravel(flat.at[column].add(distance * step))
            return ravel_pytree(jax.grad(loss)(moved, batch))[0][column]

        # At a kink the slopes jump as far close to the point as a little farther off.
        slopes = jax.vmap(slope)(jnp.array([-NEAR, NEAR, -NEARER, NEARER]))
        near, nearer = slopes[:2], slopes[2:]
        jump_near, jump = jnp.abs(near[1] - near[0]), jnp.abs(nearer[1] - nearer[0])
        noise = ROUNDING * jnp.max(jnp.abs(slopes))
        curved = (near - nearer) / (NEAR - NEARER)  # curvature times step
        is_kink = jnp.abs(jump_near - jump) <= jump / 2 + noise
        return is_kink, nearer - NEARER * curved, jnp.max(jnp.abs(curved)) / 2

    return jax.lax.map(at, places, batch_size=SAMPLES_AT_ONCE)


def _compare(
    part: _Measured[np.ndarray],
    floor: np.ndarray,
    slopes: Sequence[np.ndarray],
    tolerances: Sequence[float],
) -> Evidence:
    """Compare a leaf with `jax.grad` and the differences, or with the one that is finite."""
    gradient, reference, low, high = part[2:6]
    least, most, bend = slopes
    has_grad, has_differences = np.isfinite(reference), np.isfinite(high - low)
    by_differences, by_nothing = has_differences & ~has_grad, ~(has_grad | has_differences)
    largest = np.maximum(_largest(least), _largest(most))
    of_differences = _largest(np.where(by_differences, np.maximum(np.abs(low), np.abs(high)), 0))
    largest = np.where(largest > 0, largest, of_differences)
    size = np.maximum(largest, floor)
    rounding = ROUNDING * np.maximum(_finite(part.value)[:, None], largest)

    right = np.where(has_grad, np.clip(gradient, least, most), np.clip(gradient, low, high))
    right[by_nothing] = np.nan
    off = np.maximum(np.abs(gradient - right) - rounding, 0)
    off[by_differences] = 0
    off[by_nothing] = np.where(np.isfinite(gradient), np.inf, 0)[by_nothing]
    outside = np.maximum(_outside(part, gradient) - bend, 0)
    outside[~has_differences] = 0
    off, outside = (np.where(np.isnan(error), np.inf, error) for error in (off, outside))
    kinds = {
        "kinks": most - least > KINK * size,
        "other slopes": has_grad & (off == 0) & (np.abs(gradient - reference) > rounding),
        "contradicted": has_differences & (_outside(part, reference) > KINK * size),
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


def _outside(part: _Measured[np.ndarray], gradient: np.ndarray) -> np.ndarray:
    """How far a gradient is outside the differences and their noise; negative inside."""
    return np.maximum(part.low - gradient, gradient - part.high) - part.noise


def _finite(numbers: np.ndarray) -> np.ndarray:
    """Magnitudes, 0 where they are not finite."""
    return np.where(np.isfinite(numbers), np.abs(numbers), 0)


def _largest(numbers: np.ndarray) -> np.ndarray:
    """The largest finite magnitude of each row, `(rows, 1)`."""
    return np.max(_finite(numbers), axis=1, keepdims=True, initial=0)
