"""What the symmetries of a loss say of its gradient: a witness that differentiates nothing.

Whether a symmetry holds is read off values of the loss; what follows, off the gradient alone:

    params moved along u                the loss stays     <gradient, u> = 0: of a softmax, u = 1
    W e^r, b e^r, V e^-r of some units  the loss stays     <gradient, (r W, r b, -r V)> = 0: of relu
    hidden units permuted               the loss stays     the gradient is permuted
    a batch in single rows              it is their mean   so is the gradient
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxnn.gradients.functions import Checked, at_samples, flat, names_of, num_rows, take, with_rows
from jaxnn.gradients.witnesses import ROUNDING
from jaxnn.typing import PyTree

SAMPLES, ROWS = 4, 32  # Samples that are looked at, and rows of the batch that are taken singly.
SAME, TOLERANCE = 1e-12, 1e-9  # Relative, of the loss and of the gradient.
Leaves = list[np.ndarray]


class Invariant(NamedTuple):
    """A symmetry that a loss has.

    Attributes:
        name: what it is, such as `"units of params[0].weights can be permuted"`.
        error: largest error of the gradient, relative to its largest slope, less what rounding
            explains: `ROUNDING` times the loss, or the loss of the negated params if that is more.
        passed: whether the gradient has the symmetry too, to 1e-9.
    """

    name: str
    error: float
    passed: bool


class _Symmetry(NamedTuple):
    """Params that are changed, and the direction of the change or the axes that are permuted."""

    name: str
    changed: Leaves
    direction: Leaves | None
    axes: Mapping[int, int]


def invariants(
    loss: Checked, by_hand: Checked, samples: PyTree, batch: PyTree
) -> tuple[Invariant, ...]:
    """Return the symmetries that the loss has in the first samples, and whether the gradient has.

    The functions are those of `as_checked`. Samples have a leading axis. All is in float64.
    """
    samples = take(samples, slice(SAMPLES))
    (leaves, tree), names = jax.tree.flatten(samples), names_of(samples)
    values, gradient = at_samples(loss, samples, batch), _slopes(by_hand, samples, batch)
    found, rounding = [], _rounding(loss, values, samples, batch)
    for name, changed, direction, axes in (*_shifts(names, leaves), *_of_units(names, leaves)):
        changed = tree.unflatten(changed)
        if not _are_same(at_samples(loss, changed, batch), values):
            continue
        if direction is None:
            permuted = jax.tree.leaves(at_samples(by_hand, changed, batch)[1])
            expected = flat(_rolled(permuted, axes, -1))
            found.append(_invariant(name, gradient, expected, rounding))
        else:
            products = gradient * flat(direction)
            sums, size = np.sum(products, axis=1), np.max(np.abs(products))
            found.append(_invariant(name, sums, np.zeros_like(sums), rounding, size))
    return (*found, *_of_rows(loss, by_hand, samples, batch, rounding))


def _rounding(loss: Checked, values: np.ndarray, samples: PyTree, batch: PyTree) -> float:
    """Rounding of numbers that may cancel in the loss; where the params are negated, none do."""
    with contextlib.suppress(Exception), np.errstate(all="ignore"):  # It may refuse such params.
        negated = at_samples(loss, jax.tree.map(np.negative, samples), batch)
        values = np.concatenate([values, negated])
    return ROUNDING * float(np.max(np.abs(values), where=np.isfinite(values), initial=0))


def _invariant(
    name: str, some: np.ndarray, others: np.ndarray, rounding: float, size: float = 0
) -> Invariant:
    """Compare gradients, relative to the largest slope or to a size."""
    off, largest = np.max(np.abs(some - others)), np.max(np.abs(some), initial=size)
    error = float(max(off - rounding, 0) / largest) if largest else 0.0
    return Invariant(name, error, error <= TOLERANCE)


def _are_same(values: np.ndarray, others: np.ndarray) -> bool:
    return bool(np.all(np.abs(values - others) <= SAME * np.abs(others)))


def _rolled(leaves: Leaves, axes: Mapping[int, int], step: int) -> Leaves:
    pairs = enumerate(leaves)
    return [np.roll(leaf, step, axes[n]) if n in axes else leaf for n, leaf in pairs]


def _shifts(names: Sequence[str], leaves: Leaves) -> Iterator[_Symmetry]:
    """Yield moves of a leaf by numbers that are the same all along one of its axes."""
    for number, leaf in enumerate(leaves):
        for axis in range(1, leaf.ndim):
            shape = [1 if at in (0, axis) else size for at, size in enumerate(leaf.shape)]
            shift = np.sin(1 + np.arange(np.prod(shape))).reshape(shape)
            moves = [np.zeros_like(x) for x in leaves]
            moves[number] += shift
            changed = [x + move for x, move in zip(leaves, moves, strict=True)]
            name = f"slopes of {names[number]} sum to 0 along axis {axis - 1}"
            yield _Symmetry(name, changed, moves, {})


def _of_units(names: Sequence[str], leaves: Leaves) -> Iterator[_Symmetry]:
    """Yield rescalings and permutations of the units between weights, with biases or without."""
    numbers, permuted = range(len(leaves)), []
    for into, out in [(i, o) for i in numbers for o in numbers if i != o and leaves[i].ndim == 3]:
        units = leaves[into].shape[2]
        if units < 2 or leaves[out].shape[1:2] != (units,):
            continue
        between = f"units between {names[into]} and {names[out]}"
        biases = [n for n in numbers if n != out and leaves[n].shape[1:] == (units,)]
        for axes in [{into: 2, out: 1}, *({into: 2, bias: 1, out: 1} for bias in biases)]:
            rates = [np.zeros(1)] * len(leaves)
            for n, axis in axes.items():
                shape = [-1 if at == axis else 1 for at in range(leaves[n].ndim)]
                rates[n] = np.sin(1 + np.arange(units)).reshape(shape) * (-1 if n == out else 1)
            pairs = list(zip(leaves, rates, strict=True))
            scaled, grown = [x * np.exp(rate) for x, rate in pairs], [x * r for x, r in pairs]
            yield _Symmetry(f"{between} can be rescaled", scaled, grown, {})
            if axes not in permuted:
                name = f"units of {names[into]} can be permuted"
                yield _Symmetry(name, _rolled(leaves, axes, 1), None, axes)
                permuted.append(axes)


def _of_rows(
    loss: Checked, by_hand: Checked, samples: PyTree, batch: PyTree, rounding: float
) -> list[Invariant]:
    """Return whether the gradient is the mean of those of single rows, if the loss is."""

    def part(start: int, stop: int) -> PyTree:
        return with_rows(batch, lambda rows: rows[start:stop])

    whole = part(0, ROWS)
    singles = [part(row, row + 1) for row in range(min(num_rows(batch), ROWS))]
    try:
        values = [at_samples(loss, samples, single) for single in singles]
        if len(singles) < 2 or not _are_same(
            np.mean(values, axis=0), at_samples(loss, samples, whole)
        ):
            return []
        of_rows = [_slopes(by_hand, samples, single) for single in singles]
    except Exception:  # One of them takes no other number of rows.
        return []
    name, mean = "the gradient of rows is the mean of each row's", np.mean(of_rows, axis=0)
    return [_invariant(name, _slopes(by_hand, samples, whole), mean, rounding)]


def _slopes(by_hand: Checked, samples: PyTree, batch: PyTree) -> np.ndarray:
    return flat(at_samples(by_hand, samples, batch)[1])
