"""Proof that a gradient is right, or where it is wrong: leaf by leaf, in float64.

Three independent witnesses for every coordinate of every sample of params:

    the gradient under test             value_and_grad_fn(params, batch)[1]
    automatic differentiation           jax.grad(loss_fn)
    one-sided finite differences        (f(x + h) - f(x)) / h  and  (f(x) - f(x - h)) / h

Where the loss is smooth, `jax.grad` decides to 1e-9, and the differences confirm it. Where the two
differences disagree there is a kink, such as relu's at 0: they bracket every slope that one could
mean there, and a gradient between the slopes on both sides is right, whatever `jax.grad` chooses.
A kink that is only near the point changes nothing. Where `jax.grad` is not finite the differences
decide, and where they are not, `jax.grad` alone; the report says so.

The gradient, the loss or both may be written in NumPy. Of a loss in NumPy there is no `jax.grad`,
and the differences decide to 1e-5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.gradients.counterexample import Counterexample
from jaxnn.gradients.coverage import Coverage, cover
from jaxnn.gradients.diagnose import suggest
from jaxnn.gradients.functions import (
    Checked,
    NumpyFunction,
    Problem,
    as_checked,
    at_samples,
    joined,
    sample_count,
    take,
)
from jaxnn.gradients.invariants import Invariant, invariants
from jaxnn.gradients.leaves import NOTES, LeafReport, judge, leaf_reports, loss_report
from jaxnn.gradients.power import Power, power
from jaxnn.gradients.smallest import shrink
from jaxnn.gradients.witnesses import Evidence, Losses, measure, widened
from jaxnn.run.checks import as_batch, as_count, as_flag, as_key, as_params, as_partial, as_real
from jaxnn.run.programs import program
from jaxnn.run.show import Table, readable
from jaxnn.typing import LossFn, PyTree, SampleFn, ValueAndGradFn

TAG = 0x43484B47
"""Folded into the key, so that no trainer draws the same from it."""

SHOWN = 4  # Branches, and faults, that the report tells of by name.

SAMPLES_TO_EXPLAIN = 16
"""Samples that the suggestions are drawn from, besides the worst one."""

COLUMNS = ("vs differences", "ratio", "kinks", "")
LEGEND = (
    "largest: of the right gradient. vs: largest error, relative; 0: rounding, -: not computed.",
    "ratio: the factor on the right gradient that fits best. kinks: coordinates with two slopes.",
)
"""The last columns of the report, and what all of them mean."""


@readable
class GradientReport(NamedTuple):
    """Outcome of a gradient check; prints as a table, a row a leaf.

    Attributes:
        leaves: a report for each leaf of the params.
        value_error: largest relative difference between the two losses.
        num_samples: samples of params that were checked.
        tolerance: for `jax.grad` and for the losses.
        difference_tolerance: for the finite differences.
        passed: whether everything is within its tolerance.
        suggestions: what the fault may be, a sentence each; none if all is right.
        worst: the leaf that is most wrong, relative to the tolerances.
        worst_key: `sampler(report.worst_key)` returns the params for which it is; None if the
            params were given, or added for the coverage.
        notes: whether the losses differ, a function is NumPy's, not all witnesses had a say,
            several slopes are right, or the sampler ignores its key, a sentence each.
        coverage: which branches of the loss the samples visited; None if not asked for, or if JAX
            cannot trace the loss.
        power: which planted faults this check catches; None if not asked for, or if it failed.
        smallest: a case to follow by hand; None if not asked for, or if the check passed.
        invariants: symmetries of the loss, and whether the gradient has them; None if not asked
            for. They do not decide whether it passes.
        kind: what was checked, "gradient", "Jacobian" or "Hessian-vector product".
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
    coverage: Coverage | None = None
    power: Power | None = None
    smallest: Counterexample | None = None
    invariants: tuple[Invariant, ...] | None = None
    kind: str = "gradient"

    def _table(self) -> Table:
        """The table, and what follows from it."""
        by_jax = "vs jax.grad" if self.kind == "gradient" else "vs jax"
        rows: list[tuple[str, ...]] = [("leaf", "shape", "largest", by_jax, *COLUMNS)]
        for leaf in self.leaves:
            numbers = map(_short, (leaf.largest, leaf.error, leaf.difference_error))
            counts = f"{leaf.ratio:.4f}", f"{leaf.num_kinks}", "ok" if leaf.passed else "WRONG"
            rows.append((leaf.name, f"{leaf.shape}", *numbers, *counts))
        below = [*LEGEND]
        if not self.worst.passed:
            source = "" if self.worst_key is None else ", which is sampler(report.worst_key)"
            worst = f"worst: {self.worst.where()}, in sample {self.worst.sample}{source}"
            below += ["", worst, *(f"perhaps: {fault}" for fault in self.suggestions)]
        told = [*self._certificate(), *(f"note: {note}" for note in self.notes)]
        below += [""] * (self.worst.passed and bool(told))
        return Table(
            f"{self.kind} check {'passed' if self.passed else 'FAILED'}: "
            f"{self.num_samples} samples in float64, tolerance {self.tolerance:g}, "
            f"differences {self.difference_tolerance:g}, loss error {_short(self.value_error)}",
            rows,
            [*below, *told],
        )

    def _certificate(self) -> list[str]:
        """What was covered, what would have been caught, and the smallest case."""
        lines = []
        if self.coverage is not None:
            branches, missed = self.coverage.branches, self.coverage.missed
            places = []
            for branch in missed:
                pairs = zip(branch.sides, branch.counts, strict=True)
                never = " and ".join(side for side, count in pairs if not count)
                places.append(f"{branch.place}, {branch.kind}, {never} never")
            share = f"{100 * self.coverage.share:.3g} % of the sides of its branches were visited"
            told = f"{share}{_some(':', places)}" if branches else "the loss has no branches"
            others = self.coverage.uncounted
            lines.append(f"coverage: {told}{_some('; not counted:', others)}")
        if self.power is not None:
            faults, missed = self.power.faults, self.power.missed
            share = f"{len(faults) - len(missed)} of {len(faults)} planted faults caught"
            lines.append(f"power: {share}{_some('; missed:', missed)}")
        if self.invariants:
            broken = [each.name for each in self.invariants if not each.passed]
            kept = f"{len(self.invariants) - len(broken)} of the loss's {len(self.invariants)}"
            lines.append(f"symmetries: the gradient keeps {kept}{_some('; not:', broken)}")
        return lines + ([] if self.smallest is None else str(self.smallest).splitlines())


def check_gradients(
    key: jax.Array,
    loss_fn: LossFn,
    value_and_grad_fn: ValueAndGradFn,
    sampler: SampleFn | PyTree,
    batch: PyTree,
    *,
    num_samples: int = 20,
    tolerance: float = 1e-9,
    difference_tolerance: float = 1e-5,
    certify: bool = False,
) -> GradientReport:
    """Compare a gradient with `jax.grad` and with finite differences, in float64.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar, differentiable by JAX or written in
            NumPy; it computes in the dtype of the params. As `model.loss_reference`.
        value_and_grad_fn: the gradient under test, `(params, batch)` -> loss and gradient. As
            `model.value_and_grad`. One that JAX cannot trace is called with NumPy arrays.
        sampler: `sample_fn(key)` -> params, of JAX or NumPy, or params themselves, any pytree of
            floats; a registered class that holds arrays is params, even if it can be called.
        batch: any pytree that both functions take.
        num_samples: how often to draw params, at least 1; given params are checked once.
        tolerance: largest relative error against `jax.grad`, above 0.
        difference_tolerance: largest relative error against finite differences, above 0.
        certify: whether to report also which branches of the loss were visited, which of its
            symmetries the gradient has, which faults the check would have caught and, of a wrong
            gradient, the smallest case, which takes 10 seconds of CPU time at most. Samples are
            added to visit all branches: drawn, or aimed by scaling, negating and moving others.

    Returns:
        A `GradientReport`; `report.passed` says whether the gradient is right.

    Raises:
        TypeError: if the params are not floats of one dtype, the loss is not a float scalar of
            that dtype, or the gradient is not like the params.
        ValueError: if a number is out of range, the params hold none, the sampler or a function in
            NumPy returns something else when it is called again, or the batch holds nan or inf and
            the loss is not finite in any sample; NaN that a loss masks is let through.

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
    certify = as_flag("certify", certify)
    in_x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    as_real("tolerance", tolerance)
    as_real("difference_tolerance", difference_tolerance)
    tolerances = float(tolerance), float(difference_tolerance)
    draw = functools.partial(_drawn, key, sampler, in_x64) if is_sampler(sampler) else None
    if draw is None:
        samples = jax.tree.map(lambda leaf: leaf[None], as_params(sampler))
    else:
        samples = as_params(draw(0, num_samples))
    about_draws = []
    if num_samples > 1 and draw and _are_alike(samples):
        samples = take(samples, slice(1))
        about_draws = ["sampler returns the same params for every key: one sample was checked"]
    batch = as_batch(batch, take(samples, 0), loss_fn, value_and_grad_fn)
    with jax.enable_x64(True):
        samples, batch = jax.tree.map(np.asarray, widened(samples)), widened(batch)
        functions = as_checked(loss_fn, value_and_grad_fn, take(samples, 0), batch)
        _check_finite(functions[0], samples, batch)
        problem, num_drawn = Problem(*functions, batch, tolerances), sample_count(samples)
        coverage, about_coverage = None, []
        if certify:
            others = draw and (lambda number: widened(draw(num_drawn, number)))
            coverage, samples, about_coverage = _covered(problem, samples, others)
        values, by_hand, evidence, said = measure(problem, samples)
        leaves, worst = leaf_reports(take(samples, 0), values, evidence, tolerances)
        losses = loss_report(values, by_hand, tolerances)
        notes = [] if losses.passed else [_of_losses(values, by_hand, losses.sample)]
        notes += _notes(problem, leaves, evidence) + about_draws + about_coverage
        suggestions = ()
        if not worst.passed:
            chosen = np.unique([worst.sample, *range(min(SAMPLES_TO_EXPLAIN, len(values)))])
            suggestions = suggest(problem, take(samples, chosen), leaves)
        report = GradientReport(
            leaves,
            losses.error,
            len(values),
            *tolerances,
            worst.passed and losses.passed,
            suggestions,
            worst,
            _key_of(key, worst.sample) if draw and worst.sample < num_drawn else None,
            tuple(notes),
            coverage,
        )
        return _certified(report, problem, samples, losses, said) if certify else report


def _covered(
    problem: Problem, samples: PyTree, draw: Callable[[int], PyTree] | None
) -> tuple[Coverage | None, PyTree, list[str]]:
    """Return the coverage, the samples with those that were added for it, and notes on it."""
    if isinstance(problem.loss, NumpyFunction):
        return None, samples, ["coverage is not known of a loss that JAX cannot trace"]
    coverage, added = cover(problem.loss, samples, problem.batch, draw)
    number = sample_count(added)
    note = f"{number:,} sample{'s' * (number > 1)} added to those drawn, to visit more branches"
    return coverage, joined([samples, added]), [note] * (number > 0)


def _certified(
    report: GradientReport, problem: Problem, samples: PyTree, losses: LeafReport, said: Losses
) -> GradientReport:
    """Add which planted faults are caught, or the smallest case that is wrong, and symmetries."""
    if report.passed:
        some = take(samples, slice(len(said.value)))
        passes = judge(problem, said, some)
        report = report._replace(power=power(problem.by_hand, some, problem.batch, passes))
    else:
        wrong = [leaf.name for leaf in (*report.leaves, losses) if not leaf.passed]
        worst = losses if report.worst.passed else report.worst
        report = report._replace(smallest=shrink(problem, samples, worst, wrong))
    symmetries = invariants(problem.loss, problem.by_hand, samples, problem.batch)
    return report._replace(invariants=symmetries)


def _key_of(key: jax.Array, sample: int | jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, TAG), sample)


def is_sampler(sampler: object) -> bool:
    """Return whether it draws params; a model that can be called is params: a tree of arrays."""
    if isinstance(sampler, Partial) or not callable(sampler):
        return callable(sampler)
    return not any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(sampler))


def _drawn(key: jax.Array, sampler: Any, in_x64: bool, begin: int, number: int) -> PyTree:
    """Draw params of samples from number `begin` on, in the caller's mode."""
    with jax.enable_x64(in_x64), jax.threefry_partitionable(True):
        places = jnp.arange(begin, begin + number, dtype=jnp.uint32)
        keys = jax.vmap(_key_of, (None, 0))(key, places)
        first, again = (jax.tree.leaves(as_params(sampler(keys[0]))) for _ in range(2))
        if not all(map(_are_equal, first, again)):
            raise ValueError(
                "sampler must draw from its key; got other params from the same key: use "
                "jax.random with the key, not NumPy's random numbers"
            )
        try:
            return _draw(as_partial("sampler", sampler), keys)
        except jax.errors.JAXTypeError:  # It returns NumPy arrays, which JAX cannot trace.
            return jax.tree.map(lambda *leaves: np.stack(leaves), *map(sampler, keys))


_are_equal = functools.partial(np.array_equal, equal_nan=True)


def _are_alike(samples: PyTree) -> bool:
    """Return whether all samples are the same."""
    leaves = map(np.asarray, jax.tree.leaves(samples))
    return all(_are_equal(leaf, np.broadcast_to(leaf[0], leaf.shape)) for leaf in leaves)


def _check_finite(loss: Checked, samples: PyTree, batch: PyTree) -> None:
    """Refuse numbers in the batch that are not finite if they reach the loss in all samples."""
    found = []
    for path, leaf in tree_leaves_with_path(batch):
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        if is_float and not np.all(is_finite := np.isfinite(leaf)):
            at = tuple(map(int, np.argwhere(~is_finite)[0]))
            found.append(f"{leaf[at]} in batch{keystr(path)}" + f" at {list(at)}" * bool(at))
    if found and not np.any(np.isfinite(at_samples(loss, samples, batch))):
        raise ValueError(
            "batch must hold finite numbers, or the function must mask the others: it is finite "
            f"in no sample; got {', '.join(found)}"
        )


@program()
def _draw(sampler: Partial, keys: jax.Array) -> PyTree:
    return jax.vmap(sampler)(keys)


def _notes(problem: Problem, leaves: tuple[LeafReport, ...], evidence: list[Evidence]) -> list[str]:
    """Return what NumPy computes, and the leaves of every kind of coordinate of no plain case."""
    notes, is_numpy = [], isinstance(problem.loss, NumpyFunction)
    for function in problem[:2]:
        if isinstance(function, NumpyFunction):
            alone = ": there is no jax.grad, the finite differences decide"
            alone = alone * (function is problem.loss)
            notes.append(f"JAX cannot trace {function.name}, which is called in NumPy{alone}")
    for kind, note in NOTES.items():
        counts = [int(np.sum(found.counts[kind])) for found in evidence]
        if sum(counts) and not (is_numpy and kind == "by differences"):
            names = [leaf.name for leaf, count in zip(leaves, counts, strict=True) if count]
            places = f"{sum(counts):,} coordinate{'s' * (sum(counts) > 1)}"
            notes.append(f"{', '.join(names)}, {places}: {note}")
    return notes


def _of_losses(values: np.ndarray, by_hand: np.ndarray, sample: int) -> str:
    """Return by how much the losses differ, and whether by the same factor or number in all."""
    with np.errstate(all="ignore"):
        factors, offsets = by_hand / values, by_hand - values
    text = (
        f"the losses differ: value_and_grad_fn returns {by_hand[sample]:.6g} where loss_fn returns "
        f"{values[sample]:.6g}, in sample {sample}"
    )
    for name, numbers in (("factor", factors), ("difference", offsets)):
        if len(values) > 1 and np.allclose(numbers, numbers[0], rtol=1e-6, atol=0):
            return f"{text}; a {name} of {numbers[0]:.6g} in every sample"
    return text


def _some(said: str, things: Sequence[str]) -> str:
    """The first things of a list, and how many there are besides."""
    more = [f"{len(things) - SHOWN} more"] * (len(things) > SHOWN)
    return f"{said} {'; '.join([*things[:SHOWN], *more])}" if things else ""


def _short(number: float) -> str:
    return "-" if np.isnan(number) else f"{number:.1e}" if number else "0"
