"""What is wrong in each leaf of a gradient, told from the evidence of all samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxnn.gradients.functions import Problem, names_of, take
from jaxnn.gradients.witnesses import ROUNDING, TINY, Evidence, Losses, compare, value_errors
from jaxnn.typing import PyTree

MOST_OFF = 64
"""Coordinates that are judged first, as one that is wrong is enough."""

NOTES = {
    "other slopes": "at a kink the gradient is not that of jax.grad, and as right: it lies between "
    "the slopes on both sides",
    "contradicted": "jax.grad itself lies outside the finite differences, as where kinks meet or a "
    "custom derivative is wrong",
    "by differences": "jax.grad is not finite: the finite differences decide",
    "by grad": "the finite differences are not finite: jax.grad decides alone",
    "by nothing": "neither jax.grad nor the finite differences are finite: nothing tells what is "
    "right, and a finite gradient counts as wrong",
}
"""What the report says of coordinates that are no plain case, by the kinds that are counted."""


class LeafReport(NamedTuple):
    """What was found for one leaf, over all samples.

    Errors are relative to the leaf's largest coordinate in the same sample, or to a thousandth of
    the largest coordinate of all leaves and samples where that is more, or to `ROUNDING` times
    the largest loss where all gradients vanish. What rounding explains is taken off them, so an
    error of rounding is 0: `ROUNDING` times the loss or the largest coordinate, whichever is more;
    for differences, the rounding in the loss over the step, and `ROUNDING` times the difference.

    Attributes:
        name: where the leaf is, such as `params[0].weights`.
        shape: its shape.
        largest: largest magnitude of its gradient.
        error: largest error against `jax.grad`; at a kink, against the slopes on both sides; nan
            where there is no `jax.grad` of finite numbers.
        difference_error: largest distance from the interval between the finite differences; nan
            where none is finite.
        ratio: factor that fits the gradient to the right one, in least squares; 1 if right.
        num_kinks: coordinates at a kink: the slopes on both sides differ.
        passed: whether both errors are within their tolerances.
        sample: number of the sample in which it is most wrong, by whichever witness.
        coordinate: place of the most wrong coordinate in the leaf; `()` for a scalar.
        gradient: the gradient under test there.
        expected: what that witness says it is; of several right slopes, the nearest.
    """

    name: str
    shape: tuple[int, ...]
    largest: float
    error: float
    difference_error: float
    ratio: float
    num_kinks: int
    passed: bool
    sample: int
    coordinate: tuple[int, ...]
    gradient: float
    expected: float

    def where(self) -> str:
        """Return the place of the most wrong coordinate, what is there and what should be."""
        return at_worst(self.name, self.coordinate, self.gradient, self.expected)


def at_worst(name: str, coordinate: tuple[int, ...], gradient: float, expected: float) -> str:
    """Return the place of a wrong number, what it is and what it should be."""
    at = f"[{', '.join(map(str, coordinate))}]" * bool(coordinate)
    return f"{name}{at} is {gradient:.6g} and should be {expected:.6g}"


def _floor(slopes: np.ndarray, values: np.ndarray) -> float:
    """What errors are relative to, at least."""
    least = [TINY]
    for factor, numbers in ((1e-3, np.abs(slopes)), (ROUNDING, np.abs(values))):
        least.append(factor * float(np.max(numbers, where=np.isfinite(numbers), initial=0)))
    return max(least)


def leaf_reports(
    params: PyTree,
    values: np.ndarray,
    evidence: list[Evidence],
    tolerances: tuple[float, float],
    floor: float = 0,
) -> tuple[tuple[LeafReport, ...], LeafReport]:
    """Return a report for each leaf, and the worst of them relative to the tolerances.

    Errors are relative to `floor` at least, which other samples may set.
    """
    floor = max(floor, _floor(np.stack([found.largest for found in evidence]), values))
    leaves, reports, excesses = jax.tree.leaves(params), [], []
    for name, leaf, found in zip(names_of(params), leaves, evidence, strict=True):
        size = np.maximum(found.largest, floor)
        unknown = {kind: np.sum(found.counts[kind]) >= leaf.size * len(size) for kind in NOTES}
        is_judged = not unknown["by nothing"] or not leaf.size
        with np.errstate(over="ignore"):
            error = found.error / size if is_judged else np.full(len(size), np.inf)
            outside = found.difference_error / size
            excess = np.maximum(error / tolerances[0], outside / tolerances[1])
        excesses.append(np.max(excess))
        sample = int(np.argmax(excess))
        place = np.unravel_index(found.place[sample], leaf.shape) if leaf.size else ()
        squares = float(np.sum(found.square))
        without = float("inf") if np.any(found.is_nonzero) else 1.0
        report = LeafReport(
            name=name,
            shape=leaf.shape,
            largest=float(np.max(found.largest)),
            error=float("nan") if unknown["by differences"] else float(np.max(error)),
            difference_error=float("nan") if unknown["by grad"] else float(np.max(outside)),
            ratio=float(np.sum(found.product)) / squares if squares else without,
            num_kinks=int(np.sum(found.counts["kinks"])),
            passed=bool(np.max(excess) <= 1),
            sample=sample,
            coordinate=tuple(map(int, place)),
            gradient=float(found.gradient[sample]),
            expected=float(found.expected[sample]),
        )
        reports.append(report)
    return tuple(reports), reports[int(np.argmax(excesses))]


def loss_report(
    values: np.ndarray, by_hand: np.ndarray, tolerances: tuple[float, float]
) -> LeafReport:
    """Return a report on the losses, as if they were a leaf."""
    errors = value_errors(values, by_hand)
    sample, error = int(np.argmax(errors)), float(np.max(errors))
    return LeafReport(
        name="loss",
        shape=(),
        largest=float(np.max(np.abs(values))),
        error=error,
        difference_error=float("nan"),
        ratio=float("nan"),
        num_kinks=0,
        passed=error <= tolerances[0],
        sample=sample,
        coordinate=(),
        gradient=float(by_hand[sample]),
        expected=float(values[sample]),
    )


def judge(
    problem: Problem, losses: Losses, samples: PyTree
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], bool]:
    """Return `passes(rows, values, gradients)`, which tells whether a check passes others.

    `rows` are numbers of samples; `values` and `gradients` are what was found there. `losses` holds
    what the loss says of all samples.
    """
    of_differences = np.maximum(np.abs(losses.forward), np.abs(losses.backward))
    is_known = np.isfinite(losses.reference)
    floor = _floor(np.where(is_known, losses.reference, of_differences), losses.value)
    first, tolerances = take(samples, 0), problem.tolerances

    def passes(rows: np.ndarray, values: np.ndarray, gradients: np.ndarray) -> bool:
        said, here = take((losses, samples), rows)
        if np.any(value_errors(said.value, values) > tolerances[0]):
            return False
        # Closer looks at possible kinks take long, so the coordinates that are most off go first.
        right = np.where(np.isnan(said.reference), gradients, said.reference)
        off = np.abs(gradients - right)
        least = -np.partition(-off, min(MOST_OFF, off.size - 1), axis=None)[:MOST_OFF][-1]
        for trial in (np.where(off >= least, gradients, right), gradients):
            evidence = compare(problem, said, here, (values, trial))
            with np.errstate(invalid="ignore", over="ignore"):
                _, worst = leaf_reports(first, said.value, evidence, tolerances, floor)
            if not worst.passed:
                return False
        return True

    return passes
