"""What three witnesses say of a gradient, at every coordinate of every parameter set.

The gradient under test, automatic differentiation and finite differences are computed on the
device, chunk after chunk of parameter sets; what is kept of them is the worst of every leaf and
set, so that ten thousand sets take no more memory than some hundred.

A gradient that lies between the two differences and yet is not that of `jax.grad` may be another
right slope at a kink. `jax.grad` very close to the point, on both sides, tells: at a kink these
slopes jump, and as far at each distance. On a smooth stretch the jump shrinks with the distance,
and a kink that is only nearby makes none close to the point.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxnn.run.checks import check_scalar, check_value_and_grad, shapes_of
from jaxnn.run.programs import program

STEP = 1e-6
"""Of the finite differences, relative to the leaf's largest coordinate."""

TINY = float(np.finfo(np.float64).tiny)

KINK = 1e-2
"""Where the slopes on both sides differ by more, relative to the leaf, a kink is counted."""

ROUNDING = 32 * float(np.finfo(np.float64).eps)
"""Of the loss: what its value, and sums as large as it, may be off by."""

NEAR, NEARER = 1e-4, 1e-6
"""How close to a point the slopes beside it are taken, relative to the step of the differences:
close enough to leave out the kinks nearby, and far above the rounding of parameters."""

SAMPLES_AT_ONCE = 16
COORDINATES_AT_ONCE = 64
NUMBERS_AT_ONCE = 2**20
"""Samples times coordinates that are held at once."""


class _Raw(NamedTuple):
    """What was measured: of each sample, and from `gradient` on also of each coordinate."""

    value: Any
    value_by_hand: Any
    gradient: Any
    reference: Any
    forward: Any
    backward: Any
    step: Any


class Off(NamedTuple):
    """A coordinate: how far off it is, where, what it is and what it should be."""

    error: Any
    place: Any
    gradient: Any
    expected: Any


class Counts(NamedTuple):
    """Coordinates of a leaf that need a word, `(samples,)` each.

    Attributes:
        kinks: the slopes on both sides differ.
        other_slopes: right, though another slope than that of `jax.grad`.
        contradicted: `jax.grad` itself lies outside the finite differences.
        by_differences: `jax.grad` is not finite, the differences are.
        by_grad: the differences are not finite, `jax.grad` is.
        by_nothing: neither is finite.
    """

    kinks: Any
    other_slopes: Any
    contradicted: Any
    by_differences: Any
    by_grad: Any
    by_nothing: Any


class Found(NamedTuple):
    """What was found at a leaf; each field is `(samples,)`. Errors are less what rounding explains.

    Attributes:
        value: the loss.
        largest: largest magnitude of a right slope.
        off: the most wrong coordinate against `jax.grad`.
        outside: that farthest outside the finite differences.
        product: of the gradient and the right slopes nearest to it, summed.
        square: of those slopes.
        has_any: whether the gradient under test is anywhere but 0.
        counts: coordinates that need a word.
    """

    value: Any
    largest: Any
    off: Off
    outside: Off
    product: Any
    square: Any
    has_any: Any
    counts: Counts


def check_functions(loss: Partial, by_hand: Partial, params: Any, batch: Any) -> None:
    """Refuses params without numbers, and functions whose results no witness can speak of."""
    if not sum(leaf.size for leaf in jax.tree.leaves(params)):
        raise ValueError("params must hold at least one number; got empty arrays")
    value = shapes_of("loss_fn", loss, params, batch)
    check_scalar("loss_fn", value)
    if value.dtype != jnp.float64:
        raise TypeError(
            f"loss_fn must compute in the dtype of the params; got {value.dtype} for float64"
        )
    check_value_and_grad(by_hand, params, batch)


def widened(tree: Any) -> Any:
    """Every float leaf as float64, where JAX has it."""

    def widen(leaf: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(np.asarray(leaf, np.float64)) if is_float else leaf

    return jax.tree.map(widen, tree)


def measure(
    loss: Partial, by_hand: Partial, samples: Any, batch: Any, tolerances: tuple[float, float]
) -> tuple[np.ndarray, tuple[Found, ...]]:
    """Errors of the values, and what was found at every leaf: chunk after chunk of samples.

    What is within both tolerances, against `jax.grad` and the differences, and at no kink, is not
    looked at a second time.
    """
    leaves = jax.tree.leaves(samples)
    count, size = len(leaves[0]), sum(leaf[0].size for leaf in leaves)
    wanted = min(NUMBERS_AT_ONCE // max(size, 1), count)
    chunk = -(-max(wanted, 1) // SAMPLES_AT_ONCE) * SAMPLES_AT_ONCE if count > 1 else 1
    errors, parts = [], []
    for begin in range(0, count, chunk):
        places = np.minimum(np.arange(begin, begin + chunk), count - 1)
        here = jax.tree.map(lambda leaf, at=places: leaf[at], samples)
        raw = jax.tree.map(np.asarray, _witnesses(loss, by_hand, here, batch))
        raw = jax.tree.map(lambda array, left=count - begin: array[:left], raw)
        with np.errstate(invalid="ignore", over="ignore"):
            errors.append(_value_error(raw.value, raw.value_by_hand))
            parts.append(_by_leaf(loss, here, batch, raw, tolerances))
    found = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    return np.concatenate(errors), found


@program()
def _witnesses(loss: Partial, by_hand: Partial, samples: Any, batch: Any) -> _Raw:
    """Gradients and finite differences of every coordinate of every sample."""

    def hear(params: Any) -> _Raw:
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
        gradients = ravel_pytree(gradient)[0], ravel_pytree(reference)[0]
        return _Raw(value, value_by_hand, *gradients, forward, backward, step)

    return jax.lax.map(hear, samples, batch_size=SAMPLES_AT_ONCE)


def _step(leaf: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(leaf), initial=0)
    return jnp.full(leaf.shape, STEP * jnp.where(largest > 0, largest, 1))


def _value_error(value: np.ndarray, by_hand: np.ndarray) -> np.ndarray:
    """Relative; 0 where rounding explains it, and where both are the same and not finite."""
    error = np.abs(by_hand - value) / np.maximum(np.abs(value), 1e-3)
    is_same = (by_hand == value) | (np.isnan(by_hand) & np.isnan(value)) | (error <= ROUNDING)
    return np.where(is_same, 0, error)


def _by_leaf(
    loss: Partial, samples: Any, batch: Any, raw: _Raw, tolerances: tuple[float, float]
) -> tuple[Found, ...]:
    """What there is to know of every leaf, in every sample."""
    floor = np.maximum(1e-3 * _largest(raw.reference), ROUNDING * _finite(raw.value)[:, None])
    floor, found, end = np.maximum(floor, TINY), [], 0
    for leaf in jax.tree.leaves(samples):
        begin, end = end, end + leaf[0].size
        part = _Raw(*raw[:2], *(field[:, begin:end] for field in raw[2:]))
        rows, columns = _undecided(part, floor, *tolerances)
        steps = part.step[rows, columns]
        slopes = _slopes_beside(loss, samples, batch, rows, columns + begin, steps)
        found.append(_compare(part, floor, _right_slopes(part, rows, columns, slopes)))
    return tuple(found)


def _undecided(
    raw: _Raw, floor: np.ndarray, tolerance: float, difference_tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where a leaf may have a kink, or one witness alone objects to the gradient."""
    low, high, noise = _low(raw), _high(raw), _noise(raw)
    size = np.maximum(_largest(raw.reference), floor)
    off, outside = np.abs(raw.gradient - raw.reference), _outside(raw) - noise
    objections = (off > tolerance * size) | (outside > difference_tolerance * size)
    slack = KINK * np.maximum(size, np.maximum(np.abs(low), np.abs(high)))
    has_gap = high - low - 2 * noise > KINK * size
    rows, columns = np.nonzero(has_gap | (objections & (outside <= slack)))
    return rows, columns


def _slopes_beside(
    loss: Partial,
    samples: Any,
    batch: Any,
    rows: np.ndarray,
    columns: np.ndarray,
    steps: np.ndarray,
) -> np.ndarray:
    """Slopes along coordinates, `(places, 2, 2)`: near and nearer, each below and above."""
    found = [np.zeros((0, 2, 2))]
    for begin in range(0, len(rows), COORDINATES_AT_ONCE):
        here = slice(begin, begin + COORDINATES_AT_ONCE)
        padded = (np.resize(each[here], COORDINATES_AT_ONCE) for each in (rows, columns, steps))
        slopes = np.asarray(_beside(loss, samples, batch, *padded))
        found.append(slopes[: len(rows) - begin].reshape(-1, 2, 2))
    return np.concatenate(found)


@program()
def _beside(
    loss: Partial, samples: Any, batch: Any, rows: Any, columns: Any, steps: Any
) -> jax.Array:
    def beside(place: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        row, column, step = place
        flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[row], samples))

        def slope(distance: jax.Array) -> jax.Array:
            moved = unravel(flat.at[column].add(distance * step))
            return ravel_pytree(jax.grad(loss)(moved, batch))[0][column]

        return jax.vmap(slope)(jnp.array([-NEAR, NEAR, -NEARER, NEARER]))

    return jax.lax.map(beside, (rows, columns, steps), batch_size=SAMPLES_AT_ONCE)


class _Right(NamedTuple):
    """The least and the largest right slope, and what curvature adds to the differences."""

    least: np.ndarray
    most: np.ndarray
    bend: np.ndarray


def _right_slopes(raw: _Raw, rows: np.ndarray, columns: np.ndarray, slopes: np.ndarray) -> _Right:
    """Of a leaf: both slopes are that of `jax.grad`, but at a kink those of the sides."""
    near, nearer = slopes[:, 0], slopes[:, 1]
    jump_near, jump = np.abs(np.diff(near)), np.abs(np.diff(nearer))
    noise = ROUNDING * np.max(np.abs(slopes), axis=(1, 2), initial=0)[:, None]
    at_kink = (np.abs(jump_near - jump) <= jump / 2 + noise)[:, 0]
    places = rows[at_kink], columns[at_kink]
    curved = (near - nearer)[at_kink] / (NEAR - NEARER)  # curvature times step
    sides = nearer[at_kink] - NEARER * curved
    least, most, bend = raw.reference.copy(), raw.reference.copy(), np.zeros_like(raw.step)
    least[places], most[places] = np.min(sides, axis=1), np.max(sides, axis=1)
    bend[places] = np.max(np.abs(curved), axis=1) / 2
    return _Right(least, most, bend)


def _compare(raw: _Raw, floor: np.ndarray, slopes: _Right) -> Found:
    """One leaf, judged by `jax.grad` and the differences, or by the one of them that is finite."""
    gradient, reference, low, high = raw.gradient, raw.reference, _low(raw), _high(raw)
    least, most, bend = slopes
    has_grad, has_differences = np.isfinite(reference), np.isfinite(high - low)
    by_differences, by_nothing = has_differences & ~has_grad, ~(has_grad | has_differences)
    largest = np.maximum(_largest(least), _largest(most))
    of_differences = _largest(np.where(by_differences, np.maximum(np.abs(low), np.abs(high)), 0))
    largest = np.where(largest > 0, largest, of_differences)
    size, noise = np.maximum(largest, floor), _noise(raw)
    rounding = ROUNDING * np.maximum(_finite(raw.value)[:, None], largest)

    right = np.where(has_grad, np.clip(gradient, least, most), np.clip(gradient, low, high))
    right[by_nothing] = np.nan
    off = np.maximum(np.abs(gradient - right) - rounding, 0)
    off[by_differences] = 0
    off[by_nothing] = np.where(np.isfinite(gradient), np.inf, 0)[by_nothing]
    outside = np.maximum(_outside(raw) - noise - bend, 0)
    outside[~has_differences] = 0
    contradiction = _outside(raw._replace(gradient=reference)) - noise
    counts = Counts(
        kinks=most - least > KINK * size,
        other_slopes=has_grad & (off == 0) & (np.abs(gradient - reference) > rounding),
        contradicted=has_differences & (contradiction > KINK * size),
        by_differences=by_differences,
        by_grad=has_grad & ~has_differences,
        by_nothing=by_nothing,
    )
    return Found(
        value=raw.value,
        largest=largest[:, 0],
        off=_most(off, gradient, right),
        outside=_most(outside, gradient, (raw.forward + raw.backward) / 2),
        product=np.sum(gradient * right, axis=1, where=~by_nothing),
        square=np.sum(right * right, axis=1, where=~by_nothing),
        has_any=np.any(np.abs(gradient) > rounding, axis=1),
        counts=Counts(*(np.sum(places, axis=1) for places in counts)),
    )


def _outside(raw: _Raw) -> np.ndarray:
    """How far the gradient is outside the differences; negative between them."""
    return np.maximum(_low(raw) - raw.gradient, raw.gradient - _high(raw))


def _low(raw: _Raw) -> np.ndarray:
    return np.minimum(raw.forward, raw.backward)


def _high(raw: _Raw) -> np.ndarray:
    return np.maximum(raw.forward, raw.backward)


def _noise(raw: _Raw) -> np.ndarray:
    """Of the differences: the rounding of the loss over the step, and that of the slope."""
    steepest = np.maximum(np.abs(raw.forward), np.abs(raw.backward))
    return ROUNDING * (_finite(raw.value)[:, None] / raw.step + steepest)


def _finite(numbers: np.ndarray) -> np.ndarray:
    """Magnitudes, 0 where they are not finite."""
    return np.where(np.isfinite(numbers), np.abs(numbers), 0)


def _largest(numbers: np.ndarray) -> np.ndarray:
    """The largest finite magnitude of each row, `(rows, 1)`."""
    return np.max(_finite(numbers), axis=1, keepdims=True, initial=0)


def _most(errors: np.ndarray, gradient: np.ndarray, expected: np.ndarray) -> Off:
    """The coordinate of each sample with the largest error; what is no number is infinite."""
    if not errors.size:
        nothing = np.zeros(len(errors))
        return Off(nothing, nothing.astype(int), nothing, nothing)
    errors = or_inf(errors)
    place = np.argmax(errors, axis=1)
    picked = (np.take_along_axis(a, place[:, None], 1)[:, 0] for a in (errors, gradient, expected))
    error, here, wanted = picked
    return Off(error, place, here, wanted)


def largest_of(numbers: np.ndarray) -> float:
    """The largest magnitude among the finite ones."""
    return float(np.max(np.abs(numbers), where=np.isfinite(numbers), initial=0))


def or_inf(errors: np.ndarray) -> np.ndarray:
    """Errors, infinite where they are no numbers."""
    return np.where(np.isnan(errors), np.inf, errors)
