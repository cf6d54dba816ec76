"""What a gradient check found, leaf by leaf, and the table that tells it."""

from __future__ import annotations

from typing import NamedTuple

import jax


class LeafReport(NamedTuple):
    """What was found for one leaf, over all samples.

    Errors are relative to the leaf's largest coordinate in the same sample, or to a thousandth of
    the largest coordinate of all leaves and samples where that is more, or to `ROUNDING` times
    the largest loss where all gradients vanish. What rounding explains is taken off them, so an
    error of rounding is 0: `ROUNDING` times the loss or the largest coordinate, whichever is more;
    for differences, `ROUNDING` times the loss over the step, and times the difference.

    Attributes:
        name: where the leaf is, such as `params[0].weights`.
        shape: its shape.
        largest: largest magnitude of its gradient.
        error: largest error against `jax.grad`; at a kink, against the slopes on both sides.
        difference_error: largest distance from the interval between the finite differences.
        ratio: factor that fits the gradient to the right one, in least squares; 1 if right.
        num_kinks: coordinates at a kink: the slopes on both sides differ.
        passed: whether both errors are within their tolerances.
        sample: number of the parameter set in which it is most wrong, by whichever witness.
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


class GradientReport(NamedTuple):
    """Outcome of a gradient check; prints as a table, a row a leaf.

    Attributes:
        leaves: a report for each leaf of the params.
        value_error: largest relative difference between the two losses.
        num_samples: parameter sets drawn.
        tolerance: for `jax.grad` and for the losses.
        difference_tolerance: for the finite differences.
        passed: whether everything is within its tolerance.
        suggestions: what the fault may be, a sentence each; none if all is right.
        worst: the leaf that is most wrong, relative to the tolerances.
        worst_key: `sampler(report.worst_key)` is the parameter set in which it is; None if the
            params were given.
        notes: where not all witnesses had a say, or several slopes are right, a sentence each.
    """

    leaves: tuple[LeafReport, ...]
    value_error: float
    num_samples: int
    tolerance: float
    difference_tolerance: float
    passed: bool
    suggestions: tuple[str, ...]
    worst: LeafReport
    worst_key: jax.Array | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """The table, and what follows from it if anything is wrong."""
        word = "passed" if self.passed else "FAILED"
        columns = ("largest", "vs jax.grad", "vs differences", "ratio", "kinks", "")
        width = max(len(leaf.name) for leaf in self.leaves)
        header = f"{'leaf':<{width}}  {'shape':<10}" + "".join(f"{c:>16}" for c in columns[:3])
        lines = [
            f"gradient check {word}: {self.num_samples} parameter sets in float64, "
            f"tolerance {self.tolerance:g}, differences {self.difference_tolerance:g}, "
            f"loss error {_short(self.value_error)}",
            header + "".join(f"{c:>10}" for c in columns[3:5]),
        ]
        for leaf in self.leaves:
            numbers = (leaf.largest, leaf.error, leaf.difference_error)
            lines.append(
                f"{leaf.name:<{width}}  {leaf.shape!s:<10}"
                + "".join(f"{_short(number):>16}" for number in numbers)
                + f"{leaf.ratio:>10.4f}{leaf.num_kinks:>10}"
                + ("  ok" if leaf.passed else "  WRONG")
            )
        after = [] if self.passed else self._faults()
        after += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "", *after] if after else lines)

    def _faults(self) -> list[str]:
        """Where it is worst, and what it may be."""
        if all(leaf.passed for leaf in self.leaves):
            return ["the gradients are right, but both functions return another loss"]
        place = f"[{', '.join(map(str, self.worst.coordinate))}]" if self.worst.coordinate else ""
        source = "" if self.worst_key is None else ", which is sampler(report.worst_key)"
        worst = (
            f"worst: {self.worst.name}{place} is {self.worst.gradient:.6g} and should be "
            f"{self.worst.expected:.6g}, in parameter set {self.worst.sample}{source}"
        )
        return [worst, *(f"perhaps: {suggestion}" for suggestion in self.suggestions)]


def _short(number: float) -> str:
    return f"{number:.1e}" if number else "0"
