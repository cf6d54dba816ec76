"""The smallest case in which a gradient is wrong: few numbers, to be followed by hand.

Params and batch shrink together while the same leaf stays wrong (delta debugging: Zeller and
Hildebrandt, IEEE Transactions on Software Engineering 28, 2002). Axes go first: rows, inputs and
units are whatever axes can change their length together, which is found by trying. Then numbers
become 0, 1, small integers, halves. What the data obey is kept: classes stay classes, rows that
sum to 1 do so again, positive numbers stay positive.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import combinations, count, islice
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnn.gradients.counterexample import Counterexample, is_key, script_of
from jaxnn.gradients.diagnose import aside
from jaxnn.gradients.functions import (
    STEP,
    Checked,
    NumpyFunction,
    at_samples,
    names_of,
    slopes,
    take,
)
from jaxnn.gradients.leaves import LeafReport, leaf_reports, loss_report
from jaxnn.gradients.witnesses import KINK, ROUNDING, TINY, measure
from jaxnn.run.checks import check_loss_and_gradients, check_scalar
from jaxnn.run.programs import forget
from jaxnn.typing import PyTree

PLAIN = 0.05
"""Relative error that is plain to see; a case keeps it, or half of the error that it began with."""

WINDOWS = 24
"""How many parts of an axis are tried at each length; they cost no compilation."""

ROUNDS = 4  # Of axes and numbers: zeros may let an axis go.
FOR_AXES = 0.7  # Share of the time, at most; simple numbers are worth the rest.
BUSY = 6  # How many times longer than the time of computing it may take.
COMPANIONS, SETS = 4, 150  # Most axes of a set, and most sets, that are tried before all at once.

Leaves = tuple[np.ndarray, ...]
Axis = tuple[int, int]  # Number of the leaf, and of its axis.


class _Found(NamedTuple):
    """What is wrong with a leaf in one case."""

    error: float  # Relative, by whichever witness.
    coordinate: tuple[int, ...]
    gradient: float
    expected: float


def shrink(
    loss: Checked,
    by_hand: Checked,
    samples: PyTree,
    batch: PyTree,
    worst: LeafReport,
    wrong: Collection[str],
    tolerances: tuple[float, float],
    max_seconds: float = 10.0,
) -> Counterexample:
    """Return the smallest case found in which the worst leaf, or the "loss", is wrong as well.

    What is not among the names `wrong` stays right, and what holds for the numbers of all samples
    of params holds for these as well. The seconds are those of computing. The caller must have
    turned x64 on.
    """
    functions = loss, by_hand
    search = _Search(functions, samples, batch, worst, set(wrong), tolerances)
    first = search.kept, search.found
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if not search.is_wrong(search.kept):
            search.judge = _wrong
        for _ in range(ROUNDS):
            before = search.kept
            search.seconds = FOR_AXES * max_seconds
            _narrow(search)
            search.seconds = max_seconds
            _simplify(search)
            if search.kept is before:
                break
        # The check has the last word.
        search.judge, search.seconds = _wrong, math.inf
        if not search.is_wrong(search.kept):
            search.kept, search.found = first
    forget(functions)  # Programs of many shapes.
    case = Counterexample(*search.arguments(search.kept), worst.name, *search.found[1:], script="")
    return case._replace(script=script_of(case, loss, by_hand))


class _Search:
    """The smallest case so far, and whether another may take its place."""

    def __init__(
        self,
        functions: tuple[Checked, Checked],
        samples: PyTree,
        batch: PyTree,
        worst: LeafReport,
        wrong: set[str],
        tolerances: tuple[float, float],
    ) -> None:
        params = take(samples, worst.sample)
        leaves, self.tree = jax.tree.flatten((params, batch))
        self.keys = {n: leaf for n, leaf in enumerate(leaves) if is_key(leaf)}
        self.kept = tuple(np.asarray(leaf) for leaf in leaves if not is_key(leaf))
        self.found = _found(worst)
        all_leaves = jax.tree.leaves((samples, batch))
        self.habits = _habits([leaf for leaf in all_leaves if not is_key(leaf)])
        self.name, self.wrong, self.least = worst.name, wrong, min(self.found.error, PLAIN) / 2
        self.functions, self.tolerances = functions, tolerances
        self.judge, self.seconds = _wrong_beside, math.inf
        self.begin = time.process_time(), time.monotonic()

    def arguments(self, leaves: Leaves) -> tuple[PyTree, PyTree]:
        """Return params and batch."""
        every: list[Any] = list(leaves)
        for number, key in self.keys.items():
            every.insert(number, key)
        return jax.tree.unflatten(self.tree, every)

    def has_time(self) -> bool:
        """Return whether there is time left; a busy machine has more of it, so finds the same."""
        computing, passed = time.process_time() - self.begin[0], time.monotonic() - self.begin[1]
        return max(computing, passed / BUSY) < self.seconds

    def fits(self, leaves: Leaves) -> bool:
        """Return whether both functions run on arrays of these shapes."""
        params, batch = self.arguments(leaves)

        def results(function: Checked) -> PyTree:
            if isinstance(function, NumpyFunction):
                return function(params, batch)
            return jax.eval_shape(function, params, batch)

        try:
            check_scalar("loss_fn", results(self.functions[0]))
            check_loss_and_gradients(results(self.functions[1]), params)
        except Exception:
            return False
        return self.has_time()

    def is_wrong(self, leaves: Leaves) -> bool | None:
        """Return whether another case is wrong in the same way; if so, keep it.

        None if it is wrong elsewhere too: a number such as 1/rows may be written into a function.
        """
        if not self.has_time() or not np.all(_habits(leaves) >= self.habits):
            return False
        try:
            others = self.judge(*self.functions, *self.arguments(leaves), self.tolerances)
        except Exception:  # Other numbers than the user's may be none that the functions take.
            return False
        if not others.keys() <= self.wrong:
            return None
        other = others.get(self.name)
        if other is None or other.error < self.least:
            return False
        if np.isfinite(other.gradient) != np.isfinite(self.found.gradient):
            return False
        self.kept, self.found = leaves, other
        return True


def _found(leaf: LeafReport) -> _Found:
    error = float(np.nanmax([leaf.error, leaf.difference_error, 0]))
    return _Found(error, leaf.coordinate, leaf.gradient, leaf.expected)


def _wrong(
    loss: Checked, by_hand: Checked, params: PyTree, batch: PyTree, tolerances: tuple[float, float]
) -> dict[str, _Found]:
    """Return what is wrong by the check's own judgement; nothing if it does not know."""
    samples = jax.tree.map(lambda leaf: leaf[None], params)
    values, by_hands, evidence, _ = measure(loss, by_hand, samples, batch, tolerances)
    leaves, _ = leaf_reports(params, values, evidence, tolerances)
    leaves = (*leaves, loss_report(values, by_hands, tolerances))
    found = {leaf.name: _found(leaf) for leaf in leaves if not leaf.passed}
    is_known = np.isfinite([values[0], *(each.expected for each in found.values())])
    return found if np.all(is_known) else {}


def _wrong_beside(
    loss: Checked, by_hand: Checked, params: PyTree, batch: PyTree, tolerances: tuple[float, float]
) -> dict[str, _Found]:
    """Return what differs from `jax.grad` here and on both sides; nothing if a kink is near.

    It is compiled sooner than the witnesses. Of a loss in NumPy there are central differences.
    """
    leaves, tree = jax.tree.flatten(params)
    moved = [(leaf, aside(number, leaf)) for number, leaf in enumerate(leaves)]
    samples = tree.unflatten([np.stack([leaf, up, 2 * leaf - up]) for leaf, up in moved])
    values, gradients = at_samples(by_hand, samples, batch)
    right = [np.asarray(leaf) for leaf in jax.tree.leaves(slopes(loss, samples, batch))]
    largest = [float(np.max(np.abs(leaf), initial=0)) for leaf in right]
    least = max(1e-3 * max(largest), float(ROUNDING / STEP * np.max(np.abs(values))), TINY)
    found, is_known = {}, np.isfinite(values[0])
    leaves = zip(names_of(params), jax.tree.leaves(gradients), right, largest, strict=True)
    for name, gradient, slope, size in leaves:
        off = np.abs(gradient - slope).reshape(3, slope[0].size) / max(size, least)
        off[np.isnan(off)] = np.inf
        error = float(np.min(np.max(off, axis=1, initial=0)))
        is_known &= bool(np.max(np.ptp(slope, axis=0), initial=0) < KINK * max(size, least))
        if error > tolerances[isinstance(loss, NumpyFunction)]:
            place = tuple(map(int, np.unravel_index(np.argmax(off[0]), slope.shape[1:])))
            there = float(gradient[0][place]), float(slope[0][place])
            found[name] = _Found(error, place, *there)
    return found if is_known else {}


def _habits(leaves: Sequence[Any]) -> np.ndarray:
    """Return what holds for the numbers of each leaf, `(leaves, habits)`."""

    def of(leaf: Any) -> list[bool]:
        sums_to_1 = leaf.ndim > 1 and np.allclose(np.sum(leaf, axis=-1), 1)
        tests = leaf >= 0, leaf > 0, leaf <= 1, leaf == np.round(leaf)
        return [*(bool(np.all(test)) for test in tests), sums_to_1]

    return np.array([of(leaf) for leaf in leaves])


# --- axes


def _narrow(search: _Search) -> None:
    """Shorten the axes, the longest first, each with those that have its length for a reason."""
    tried: set[Axis] = set()
    while axes := {axis: n for axis, n in _lengths(search.kept).items() if axis not in tried}:
        seed = max(axes, key=lambda axis: axes[axis])
        group = _companions(search.kept, seed, search.fits)
        tried |= group | {seed}
        part, is_shorter = math.inf, bool(group)
        while is_shorter and part > 2:
            length = search.kept[seed[0]].shape[seed[1]]
            for part in sorted({1, 2, length // 2} - {0, length}):
                is_shorter = _shorten(search, group, part)
                if is_shorter is not False:
                    break


def _lengths(leaves: Leaves) -> dict[Axis, int]:
    """Return the lengths of the axes that can be shorter."""
    shapes = [enumerate(leaf.shape) for leaf in leaves]
    return {
        (n, axis): length for n, shape in enumerate(shapes) for axis, length in shape if length > 1
    }


def _companions(leaves: Leaves, seed: Axis, fits: Callable[[Leaves], bool]) -> set[Axis]:
    """Return the axes whose length has to change with that of one; none if it cannot change."""
    lengths = _lengths(leaves)
    others = [axis for axis, n in lengths.items() if n == lengths[seed] and axis != seed]
    # Another length than any: with one that exists, or 1, arrays might fit by chance.
    fresh = next(n for n in count(2) if n not in lengths.values())
    places = np.resize(np.arange(lengths[seed]), fresh)

    def changes(group: set[Axis]) -> bool:
        return fits(_taken(leaves, group, places))

    sets = ({seed, *extra} for n in range(COMPANIONS) for extra in combinations(others, n))
    for group in islice(sets, SETS):
        if changes(group):
            return group
    group = {seed, *others}
    if not changes(group):
        return set()
    for axis in others:
        group -= {axis} if changes(group - {axis}) else set()
    return group


def _shorten(search: _Search, group: set[Axis], part: int) -> bool | None:
    """Find a part of the axes, of this length, that is wrong as well; None if none ever will be."""
    number, axis = min(group)
    spare = search.kept[number].shape[axis] - part
    for begin in np.unique(np.linspace(0, spare, WINDOWS).astype(int)):
        shorter = _taken(search.kept, group, np.arange(begin, begin + part))
        found = search.fits(shorter) and search.is_wrong(shorter)
        if found is not False:
            return found
    return False


def _taken(leaves: Leaves, group: set[Axis], places: np.ndarray) -> Leaves:
    """Take these places along the axes; integers that may be places stay within them."""
    length = next(leaves[number].shape[axis] for number, axis in group)

    def of(number: int, leaf: np.ndarray) -> np.ndarray:
        axes = [axis for other, axis in group if other == number]
        for axis in axes:
            leaf = np.take(leaf, places, axis)
        if not axes and leaf.dtype.kind in "iu" and np.all((leaf >= 0) & (leaf < length)):
            leaf = leaf % leaf.dtype.type(len(places))
        return np.asarray(leaf)

    return tuple(of(number, leaf) for number, leaf in enumerate(leaves))


# --- numbers


def _simplify(search: _Search) -> None:
    """Make numbers simple: all at once, leaf by leaf, half by half, one by one."""

    def put(number: int, place: Any, value: float) -> bool | None:
        leaf = search.kept[number].copy()
        leaf[place] = value
        if np.array_equal(leaf, search.kept[number]):
            return False
        return search.is_wrong((*search.kept[:number], leaf, *search.kept[number + 1 :]))

    def rounded(parts: int) -> Leaves:
        return tuple(
            np.asarray(np.round(parts * leaf) / parts + 0.0) if leaf.dtype.kind == "f" else leaf
            for leaf in search.kept
        )

    any(search.is_wrong(rounded(parts)) for parts in (1, 2, 10))
    for number, leaf in enumerate(search.kept):
        if leaf.dtype == bool or not np.any(leaf) or put(number, ..., 0) or put(number, ..., 1):
            continue
        part = leaf.size
        while part > 1:
            part = -(-part // 2)
            for begin in range(0, leaf.size, part):
                places = np.arange(begin, min(begin + part, leaf.size))
                put(number, np.unravel_index(places, leaf.shape), 0)
        for place in np.ndindex(leaf.shape):
            value = float(search.kept[number][place])
            any(put(number, place, simpler) for simpler in _simpler(value))


def _simpler(value: float) -> Iterator[float]:
    """Yield the numbers that are simpler than one and may stand for it, the simplest first."""
    near = (np.round(parts * value) / parts for parts in (1, 2, 10, 100))
    for other in (0.0, 1.0, -1.0, 2.0, -2.0, *near):
        if other == value:
            return
        yield float(other) + 0.0
