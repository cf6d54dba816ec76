"""What three witnesses say of a gradient, at every coordinate of every parameter set.

The gradient under test, automatic differentiation and finite differences are computed on the
device, chunk after chunk of parameter sets; what is kept of them is the worst of every leaf and
set, so that ten thousand sets take no more memory than some hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxnn.training.callables import check_scalar, check_value_and_grad, shapes_of

__all__ = [
    "ROUNDING",
    "TINY",
    "Found",
    "Off",
    "check_functions",
    "largest_of",
    "measure",
    "or_inf",
    "widened",
]

STEP = 1e-6
"""Of the finite differences, relative to the leaf's largest coordinate."""

TINY = float(np.finfo(np.float64).tiny)

KINK = 1e-2
"""Where the two differences disagree by more, relative to the leaf, a kink lies between them."""

ROUNDING = 32 * float(np.finfo(np.float64).eps)
"""Of the loss: what its value, and sums as large as it, may be off by."""

SAMPLES_AT_ONCE = 16
COORDINATES_AT_ONCE = 64
NUMBERS_AT_ONCE = 2**20
"""Samples times coordinates that are held at once."""


class _Raw(NamedTuple):
    """What was measured: of each sample, and from `gradient` on also of each coordinate."""

    value: Any
    value_error: Any
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


class Found(NamedTuple):
    """What was found at a leaf; each field is `(samples,)`.

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
    off: Off
    outside: Off
    product: Any
    square: Any
    has_any: Any
    num_kinks: Any


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
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(widen, tree)


def measure(
    loss: Partial, by_hand: Partial, samples: Any, batch: Any
) -> tuple[np.ndarray, tuple[Found, ...]]:
    """Errors of the values, and what was found at every leaf: chunk after chunk of samples."""
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
        errors.append(raw.value_error)
        parts.append(_by_leaf(raw, [leaf[0].size for leaf in leaves]))
    found = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    return np.concatenate(errors), found


@jax.jit
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
        error = jnp.abs(value_by_hand - value) / jnp.maximum(jnp.abs(value), 1e-3)
        gradients = ravel_pytree(gradient)[0], ravel_pytree(reference)[0]
        return _Raw(value, error, *gradients, forward, backward, step)

    return jax.lax.map(hear, samples, batch_size=SAMPLES_AT_ONCE)


def _step(leaf: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(leaf), initial=0)
    return jnp.full(leaf.shape, STEP * jnp.where(largest > 0, largest, 1))


def _by_leaf(raw: _Raw, sizes: Sequence[int]) -> tuple[Found, ...]:
    """What there is to know of every leaf, in every sample."""
    largest = np.array([largest_of(row) for row in raw.reference])
    floor = np.maximum(np.maximum(1e-3 * largest, ROUNDING * np.abs(raw.value)), TINY)
    ends = np.cumsum(sizes)
    return tuple(
        _compare(raw.value, floor, *(field[:, end - size : end] for field in raw[2:]))
        for size, end in zip(sizes, ends, strict=True)
    )


def _compare(
    value: np.ndarray,
    floor: np.ndarray,
    gradient: np.ndarray,
    reference: np.ndarray,
    forward: np.ndarray,
    backward: np.ndarray,
    steps: np.ndarray,
) -> Found:
    """One leaf; `floor` is the least that kinks are measured against."""
    low, high = np.minimum(forward, backward), np.maximum(forward, backward)
    largest = np.max(np.abs(reference), axis=1, initial=0)
    step = np.max(steps, axis=1, initial=TINY)
    with np.errstate(invalid="ignore", over="ignore"):
        outside = np.maximum(np.maximum(low - gradient, gradient - high), 0)
        noise = 2 * ROUNDING * np.abs(value) / step
        gap = (high - low - noise[:, None]) / np.maximum(largest, floor)[:, None]
        return Found(
            value=value,
            largest=largest,
            step=step,
            off=_most(np.abs(gradient - reference), gradient, reference),
            outside=_most(outside, gradient, (forward + backward) / 2),
            product=np.sum(gradient * reference, axis=1),
            square=np.sum(reference * reference, axis=1),
            has_any=np.any(gradient != 0, axis=1),
            num_kinks=np.sum(gap > KINK, axis=1),
        )


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
