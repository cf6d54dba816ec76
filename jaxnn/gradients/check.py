"""Proof that a gradient is right, or where it is wrong: leaf by leaf, in float64.

Three independent witnesses for every coordinate of every parameter set drawn:

    the gradient under test             value_and_grad_fn(params, batch)[1]
    automatic differentiation           jax.grad(loss_fn)
    one-sided finite differences        (f(x + h) - f(x)) / h  and  (f(x) - f(x - h)) / h

Where the loss is smooth, `jax.grad` decides to 1e-9, and the differences confirm it. Where the two
differences disagree there is a kink, such as relu's at 0: they bracket every slope that one could
mean there, and a gradient between the slopes on both sides is right, whatever `jax.grad` chooses.
A kink that is only near the point changes nothing. Where `jax.grad` is not finite the differences
decide, and where they are not, `jax.grad` alone; the report says so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.gradients.diagnose import suggest
from jaxnn.gradients.witnesses import (
    ROUNDING,
    TINY,
    Counts,
    Found,
    Off,
    check_functions,
    largest_of,
    measure,
    or_inf,
    widened,
)
from jaxnn.run.checks import as_batch, as_count, as_key, as_params, as_partial, as_real
from jaxnn.run.programs import program
from jaxnn.typing import LossFn, SampleFn, ValueAndGradFn

TAG = 0x43484B47
"""Folded into the key, so that no trainer draws the same from it."""

SAMPLES_TO_EXPLAIN = 16
"""Parameter sets that the suggestions are told from, besides the worst one."""

NOTES = Counts(
    kinks="",
    other_slopes="at a kink the gradient is not that of jax.grad, and as right: it lies between "
    "the slopes on both sides",
    contradicted="jax.grad itself lies outside the finite differences, as where kinks meet or a "
    "custom derivative is wrong",
    by_differences="jax.grad is not finite: the finite differences decide",
    by_grad="the finite differences are not finite: jax.grad decides alone",
    by_nothing="neither jax.grad nor the finite differences are finite: nothing tells what is "
    "right, and a finite gradient counts as wrong",
)
"""What the report says of coordinates that are no plain case."""


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
        sampler: `sample_fn(key)` -> params, or one set of params, any pytree of floats; a
            registered class that holds arrays is params, even if it can be called.
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
    tolerance, difference_tolerance = float(tolerance), float(difference_tolerance)
    with jax.threefry_partitionable(True):
        samples = jax.tree.map(np.asarray, _samples(key, sampler, num_samples))
    first = jax.tree.map(lambda leaf: leaf[0], samples)
    batch = as_batch(batch, first, loss_fn, value_and_grad_fn)
    loss = as_partial("loss_fn", loss_fn)
    by_hand = as_partial("value_and_grad_fn", value_and_grad_fn)
    with jax.enable_x64(True):
        samples, batch = jax.tree.map(np.asarray, widened(samples)), widened(batch)
        check_functions(loss, by_hand, jax.tree.map(lambda leaf: leaf[0], samples), batch)
        value_error, found = measure(
            loss, by_hand, samples, batch, (tolerance, difference_tolerance)
        )
        leaves, excesses = _leaves(first, found, tolerance, difference_tolerance)
        worst = leaves[int(np.argmax(excesses))]
        suggestions = ()
        if not all(leaf.passed for leaf in leaves):
            chosen = np.unique([worst.sample, *range(SAMPLES_TO_EXPLAIN)])
            chosen = chosen[chosen < len(value_error)]
            few = jax.tree.map(lambda leaf: leaf[chosen], samples)
            wrong = [not leaf.passed for leaf in leaves]
            by_grad = [leaf.error > tolerance for leaf in leaves]
            suggestions = suggest(loss, by_hand, few, batch, wrong, by_grad)
    return GradientReport(
        leaves=leaves,
        value_error=_worst(value_error),
        num_samples=len(value_error),
        tolerance=tolerance,
        difference_tolerance=difference_tolerance,
        passed=_worst(value_error) <= tolerance and all(leaf.passed for leaf in leaves),
        suggestions=suggestions,
        worst=worst,
        worst_key=_key_of(key, worst.sample) if _is_sampler(sampler) else None,
        notes=_notes(leaves, found),
    )


def _key_of(key: jax.Array, sample: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, TAG), sample)


def _is_sampler(sampler: Any) -> bool:
    """Whether it draws params; a model that can be called is params: a tree of arrays."""
    if isinstance(sampler, Partial) or not callable(sampler):
        return callable(sampler)
    return not any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(sampler))


def _samples(key: jax.Array, sampler: Any, num_samples: int) -> Any:
    """Parameter sets with a leading axis: drawn, or the one given."""
    if not _is_sampler(sampler):
        return jax.tree.map(lambda leaf: leaf[None], as_params(sampler))
    keys = jax.vmap(_key_of, (None, 0))(key, jnp.arange(num_samples, dtype=jnp.uint32))
    return as_params(_draw(as_partial("sampler", sampler), keys))


@program()
def _draw(sampler: Partial, keys: jax.Array) -> Any:
    return jax.vmap(sampler)(keys)


def _leaves(
    params: Any, found: tuple[Found, ...], tolerance: float, difference_tolerance: float
) -> tuple[tuple[LeafReport, ...], list[float]]:
    """The reports, and how many times its tolerance each leaf is off."""
    largest = max(largest_of(leaf.largest) for leaf in found)
    floor = max(1e-3 * largest, ROUNDING * largest_of(found[0].value), TINY)
    reports, excesses = [], []
    for (path, leaf), part in zip(tree_leaves_with_path(params), found, strict=True):
        size = np.maximum(part.largest, floor)
        if 0 < leaf.size * len(size) == np.sum(part.counts.by_nothing):
            part.off.error[:] = np.inf  # nothing told what is right
        with np.errstate(over="ignore"):
            error, outside = part.off.error / size, part.outside.error / size
            by_both = np.stack([error / tolerance, outside / difference_tolerance])
        excess = np.max(by_both, axis=0)
        sample = int(np.argmax(excess))
        by_grad = by_both[0, sample] >= by_both[1, sample]
        at = Off(*(field[sample] for field in (part.off if by_grad else part.outside)))
        excesses.append(float(excess[sample]))
        reports.append(
            LeafReport(
                name="params" + keystr(path),
                shape=leaf.shape,
                largest=float(np.max(part.largest)),
                error=float(np.max(error)),
                difference_error=float(np.max(outside)),
                ratio=_ratio(part),
                num_kinks=int(np.sum(part.counts.kinks)),
                passed=excesses[-1] <= 1,
                sample=sample,
                coordinate=_place(at.place, leaf.shape),
                gradient=float(at.gradient),
                expected=float(at.expected),
            )
        )
    return tuple(reports), excesses


def _place(place: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(place, shape))) if 0 not in shape else ()


def _notes(leaves: tuple[LeafReport, ...], found: tuple[Found, ...]) -> tuple[str, ...]:
    """A sentence for each kind of coordinate that is no plain case, with the leaves it is in."""
    notes = []
    for kind, note in NOTES._asdict().items():
        counts = [int(np.sum(getattr(part.counts, kind))) for part in found]
        if note and sum(counts):
            names = [leaf.name for leaf, count in zip(leaves, counts, strict=True) if count]
            places = f"{sum(counts):,} coordinate{'s' * (sum(counts) > 1)}"
            notes.append(f"{', '.join(names)}, {places}: {note}")
    return tuple(notes)


def _worst(errors: np.ndarray) -> float:
    """The largest error; one that is not a number is infinite."""
    return float(np.max(or_inf(errors)))


def _ratio(found: Found) -> float:
    """`<gradient, reference> / <reference, reference>`; 1 where both are zero."""
    squares = float(np.sum(found.square))
    if squares == 0.0:
        return float("inf") if np.any(found.has_any) else 1.0
    return float(np.sum(found.product)) / squares


def _short(number: float) -> str:
    return f"{number:.1e}" if number else "0"
