"""The smallest case in which a gradient is wrong: few numbers, to be followed by hand.

Params and batch shrink together while the same leaf stays wrong (delta debugging: Zeller and
Hildebrandt, IEEE Transactions on Software Engineering 28, 2002). Axes go first: rows, inputs and
units are whatever axes can change their length together, which is found by trying. Then numbers
become 0, 1, small integers, halves. What the data obey is kept: classes stay classes, rows that
sum to 1 do so again, positive numbers stay positive.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import combinations, count, islice
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnn.gradients.counterexample import Counterexample, is_key, script_of
from jaxnn.gradients.diagnose import aside
from jaxnn.gradients.functions import (
    STEP_OF_DIFFERENCES,
    Checked,
    NumpyFunction,
    Problem,
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


class _Case(NamedTuple):
    """The arrays of params and batch, but for random keys, and what is wrong with them."""

    leaves: Leaves
    found: _Found


Attempt = Callable[[Leaves], _Case | None]


def shrink(
    problem: Problem,
    samples: PyTree,
    worst: LeafReport,
    wrong: Collection[str],
    max_seconds: float = 10.0,
) -> Counterexample:
    """Return the smallest case found in which the worst leaf, or the "loss", is wrong as well.

    What is not among the names `wrong` stays right, and what holds for the numbers of all samples
    of params holds for these as well. The seconds are those of computing. The caller must have
    turned x64 on.
    """
    leaves, tree = jax.tree.flatten((take(samples, worst.sample), problem.batch))
    first = _Case(tuple(np.asarray(leaf) for leaf in leaves if not is_key(leaf)), _found(worst))
    every = jax.tree.leaves((samples, problem.batch))
    every = [np.asarray(leaf) for leaf in every if not is_key(leaf)]

    def arguments(numbers: Leaves) -> tuple[PyTree, PyTree]:
        rest = iter(numbers)
        return tree.unflatten(leaf if is_key(leaf) else next(rest) for leaf in leaves)

    began = time.process_time(), time.monotonic()
    known = worst.name, set(wrong), first.found, _habits(every)
    search = _Search(problem, arguments, *known, *began)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        is_told = search.attempt(_wrong_beside, math.inf, first.leaves)
        judge, case = _wrong_beside if is_told else _wrong, first
        for _ in range(ROUNDS):
            before, seconds = case, FOR_AXES * max_seconds
            fits = functools.partial(search.fits, seconds)
            case = _narrow(case, fits, functools.partial(search.attempt, judge, seconds))
            case = _simplify(case, functools.partial(search.attempt, judge, max_seconds))
            if case is before:
                break
        # The check has the last word.
        case = search.attempt(_wrong, math.inf, case.leaves) or first
    forget((problem.loss, problem.by_hand))  # Programs of many shapes.
    shown = Counterexample(*arguments(case.leaves), worst.name, *case.found[1:], script="")
    return shown._replace(script=script_of(shown, problem))


class _Search(NamedTuple):
    """What is looked for: other arrays with which a leaf is as wrong as with the first ones."""

    problem: Problem
    arguments: Callable[[Leaves], tuple[PyTree, PyTree]]
    name: str
    wrong: set[str]
    found: _Found
    habits: np.ndarray
    began_computing: float
    began: float

    def has_time(self, seconds: float) -> bool:
        """Return whether there is time left; a busy machine has more of it, so finds the same."""
        computing = time.process_time() - self.began_computing
        return max(computing, (time.monotonic() - self.began) / BUSY) < seconds

    def fits(self, seconds: float, leaves: Leaves) -> bool:
        """Return whether both functions run on arrays of these shapes."""
        params, batch = self.arguments(leaves)

        def results(function: Checked) -> PyTree:
            if isinstance(function, NumpyFunction):
                return function(params, batch)
            return jax.eval_shape(function, params, batch)

        try:
            check_scalar("loss_fn", results(self.problem.loss))
            check_loss_and_gradients(results(self.problem.by_hand), params)
        except Exception:
            return False
        return self.has_time(seconds)

    def attempt(self, judge: Callable[..., Any], seconds: float, leaves: Leaves) -> _Case | None:
        """Return another case if it is wrong in the same way, and nowhere else."""
        if not self.has_time(seconds) or not np.all(_habits(leaves) >= self.habits):
            return None
        try:
            params, batch = self.arguments(leaves)
            found = judge(self.problem._replace(batch=batch), params)
        except Exception:  # Other numbers than the user's may be none that the functions take.
            return None
        here = found.get(self.name)
        if here is None or not found.keys() <= self.wrong:
            return None
        is_plain = here.error >= min(self.found.error, PLAIN) / 2
        is_alike = np.isfinite(here.gradient) == np.isfinite(self.found.gradient)
        return _Case(leaves, here) if is_plain and is_alike else None


def _found(leaf: LeafReport) -> _Found:
    error = float(np.nanmax([leaf.error, leaf.difference_error, 0]))
    return _Found(error, leaf.coordinate, leaf.gradient, leaf.expected)


def _wrong(problem: Problem, params: PyTree) -> dict[str, _Found]:
    """Return what is wrong by the check's own judgement; nothing if it does not know."""
    samples = jax.tree.map(lambda leaf: leaf[None], params)
    values, by_hands, evidence, _ = measure(problem, samples)
    leaves, _ = leaf_reports(params, values, evidence, problem.tolerances)
    leaves = (*leaves, loss_report(values, by_hands, problem.tolerances))
    found = {leaf.name: _found(leaf) for leaf in leaves if not leaf.passed}
    is_known = np.isfinite([values[0], *(each.expected for each in found.values())])
    return found if np.all(is_known) else {}


def _wrong_beside(problem: Problem, params: PyTree) -> dict[str, _Found]:
    """Return what differs from `jax.grad` here and on both sides; nothing if a kink is near.

    It is compiled sooner than the witnesses. Of a loss in NumPy there are central differences.
    """
    loss, by_hand, batch, tolerances = problem
    leaves, tree = jax.tree.flatten(params)
    moved = [(leaf, aside(number, leaf)) for number, leaf in enumerate(leaves)]
    samples = tree.unflatten([np.stack([leaf, up, 2 * leaf - up]) for leaf, up in moved])
    values, gradients = at_samples(by_hand, samples, batch)
    right = [np.asarray(leaf) for leaf in jax.tree.leaves(slopes(loss, samples, batch))]
    largest = [float(np.max(np.abs(leaf), initial=0)) for leaf in right]
    rounding = float(ROUNDING / STEP_OF_DIFFERENCES * np.max(np.abs(values)))
    least = max(1e-3 * max(largest), rounding, TINY)
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


def _narrow(case: _Case, fits: Callable[[Leaves], bool], attempt: Attempt) -> _Case:
    """Shorten the axes, the longest first, each with those that have its length for a reason."""
    tried: set[Axis] = set()
    while axes := {axis: n for axis, n in _lengths(case.leaves).items() if axis not in tried}:
        seed = max(axes, key=lambda axis: axes[axis])
        group = _companions(case.leaves, seed, fits)
        tried |= group | {seed}
        while group and (shorter := _first(attempt, filter(fits, _parts(case.leaves, group)))):
            case = shorter
    return case


def _first(attempt: Attempt, cases: Iterable[Leaves]) -> _Case | None:
    return next(filter(None, map(attempt, cases)), None)


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


def _parts(leaves: Leaves, group: set[Axis]) -> Iterator[Leaves]:
    """Yield parts of the axes, the shortest first."""
    number, axis = min(group)
    length = leaves[number].shape[axis]
    for part in sorted({1, 2, length // 2} & set(range(1, length))):
        for begin in np.unique(np.linspace(0, length - part, WINDOWS).astype(int)):
            yield _taken(leaves, group, np.arange(begin, begin + part))


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


def _simplify(case: _Case, attempt: Attempt) -> _Case:
    """Make numbers simple: all at once, leaf by leaf, half by half, one by one."""
    case = _first(attempt, map(functools.partial(_rounded, case.leaves), (1, 2, 10))) or case
    for number, leaf in enumerate(case.leaves):
        if leaf.dtype == bool or not np.any(leaf):
            continue
        if plain := _first(attempt, _put(case.leaves, number, ..., (0, 1))):
            case = plain
            continue
        part = leaf.size
        while part > 1:
            part = -(-part // 2)
            for begin in range(0, leaf.size, part):
                places = np.unravel_index(np.arange(leaf.size)[begin : begin + part], leaf.shape)
                case = _first(attempt, _put(case.leaves, number, places, [0])) or case
        for place in np.ndindex(leaf.shape):
            simpler = _simpler(float(case.leaves[number][place]))
            case = _first(attempt, _put(case.leaves, number, place, simpler)) or case
    return case


def _rounded(leaves: Leaves, parts: int) -> Leaves:
    return tuple(
        np.asarray(np.round(parts * leaf) / parts + 0.0) if leaf.dtype.kind == "f" else leaf
        for leaf in leaves
    )


def _put(leaves: Leaves, number: int, place: Any, values: Iterable[float]) -> Iterator[Leaves]:
    """Yield the leaves with another value at some places of one of them, where it is another."""
    for value in values:
        leaf = leaves[number].copy()
        leaf[place] = value
        if not np.array_equal(leaf, leaves[number]):
            yield (*leaves[:number], leaf, *leaves[number + 1 :])


def _simpler(value: float) -> Iterator[float]:
    """Yield the numbers that are simpler than one and may stand for it, the simplest first."""
    near = (np.round(parts * value) / parts for parts in (1, 2, 10, 100))
    for other in (0.0, 1.0, -1.0, 2.0, -2.0, *near):
        if other == value:
            return
        yield float(other) + 0.0
