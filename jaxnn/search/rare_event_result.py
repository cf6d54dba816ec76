"""What a rare-event search reports: how likely low losses are, and how far that may be off.

Each run has an estimate of ln P of its own, with the variance that its counts of particles
explain. `combined` makes one value and one interval of them all.

References: Walter, arXiv:1412.6368 (the count of moves is a Poisson number); Skilling, "Nested
sampling for general Bayesian computation", 2006 (the evidence).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, ndtri, stdtrit

from jaxnn.run.show import Table, readable, summary
from jaxnn.typing import PyTree, Status

CONFIDENCE, LESS = 0.95, 0.12
"""Of an interval. Of several runs the wider of two is quoted, and each of both is of `LESS / runs`
less. Where counting explains the spread of the runs, the wider one covers 96 to 97 %; where it
explains none of it, 92 % of four runs and 94 % of sixteen."""
LOW_ACCEPTANCE, WIDE_SPREAD = 0.01, 3.0
"""What is worth a note: few tries that change a particle; runs that differ by this many times
what counting explains."""
POINTS_ABOVE = 20
"""Points of the curve above the first level."""


@readable
class Curve(NamedTuple):
    """ln P(loss <= t), with 95 % intervals; ready to plot.

    Attributes:
        loss: the losses t, rising, `(points,)`.
        log_probability: ln P(loss <= t), float64.
        low: lower ends of the intervals.
        high: upper ends.
    """

    loss: np.ndarray
    log_probability: np.ndarray
    low: np.ndarray
    high: np.ndarray


@readable
class LevelParticles(NamedTuple):
    """Draws from the prior below the levels asked for: typical networks that reach them.

    Attributes:
        level: the level that a particle was drawn below, `(particles,)`, falling, in the dtype
            of the losses.
        run: its run, int32. Those of one run have particles in common behind them.
        loss: its loss.
        params: its params, with a leading axis of particles.
        metric: its `metric_fn`; None if there was none.
    """

    level: np.ndarray
    run: np.ndarray
    loss: np.ndarray
    params: PyTree
    metric: np.ndarray | None


@readable
class LevelHistory(NamedTuple):
    """The levels of each run, in the order that they were met, `(runs, levels)`.

    Attributes:
        level: the losses, falling.
        num_reaching: how many particles reached it, of the `num_particles` below the one before.
            A run that has ended repeats its last level, with all of them or with none.
        acceptance: share of the tries that changed a particle there, float32; nan if none moved.
    """

    level: np.ndarray
    num_reaching: np.ndarray
    acceptance: np.ndarray


@readable
class Samples(NamedTuple):
    """Losses with the share of the prior that each stands for, by run and level.

    Within a run the shares at or below a loss add up to the probability of that loss.

    Attributes:
        run: the run, int32, `(samples,)`.
        level: how many levels are above the sample, int32.
        loss: the losses.
        log_weight: logarithms of the shares, float64.
    """

    run: np.ndarray
    level: np.ndarray
    loss: np.ndarray
    log_weight: np.ndarray


@readable
class RareEventSearchResult(NamedTuple):
    """What a rare-event search found; printed, it is a summary of a few lines.

    Attributes:
        params: the best particle's; None if no loss was finite.
        loss: its loss; inf if none was finite.
        num_evaluations: losses that the particles needed, over all runs.
        status: "reached" if a run has come to the target; "converged" if no run could come any
            lower; "completed" if `max_levels` were not enough; "interrupted", "stopped" or
            "nonfinite".
        level: the lowest loss that all runs tell the probability of: the target if it is reached.
        log_probability: ln P(loss <= level).
        low: lower end of its 95 % interval.
        high: upper end.
        curve: the same for all losses above it.
        particles: particles at `levels` and at the target.
        history: the levels of each run.
        samples: losses and what they stand for, for `log_evidence`.
        notes: what to know before the numbers are believed, in words.
    """

    params: PyTree
    loss: float
    num_evaluations: int
    status: Status
    level: float
    log_probability: float
    low: float
    high: float
    curve: Curve
    particles: LevelParticles
    history: LevelHistory
    samples: Samples
    notes: tuple[str, ...]

    def _table(self) -> Table:
        """The summary."""
        exponents = [f"10^{each / math.log(10):.2f}" for each in self[5:8]]
        details = {
            "probability": f"{exponents[0]} of a loss <= {self.level:g}",
            "95 % interval": f"{exponents[1]} to {exponents[2]}",
        }
        given = self.status, self.loss, self.num_evaluations
        hint = "result.curve, result.particles, jaxnn.log_evidence(result, beta)"
        return summary("rare-event search", *given, details=details, notes=self.notes, hint=hint)


def samples_of(losses: np.ndarray, level: np.ndarray, reaching: np.ndarray) -> Samples:
    """Return the losses that do not reach the next level, and in the end those of all particles.

    `losses` are those at each level, `(levels + 1, runs, particles)`, the prior first; `level` is
    `(levels + 1, runs)`, and `reaching` says how many reach all but the first, `(levels, runs)`.
    """
    _, num_runs, count = losses.shape
    with np.errstate(divide="ignore"):
        log_shares = np.cumsum(np.log(reaching / count), axis=0)
    log_shares = np.concatenate([np.zeros((1, num_runs)), log_shares])
    is_sample = np.ones(losses.shape, bool)
    is_sample[:-1] = losses[:-1] > level[1:, :, None]
    is_sample[:-1] &= np.isfinite(log_shares[:-1, :, None])  # once, where no particle was lower
    place, run, _ = np.nonzero(is_sample)
    log_weight = log_shares[place, run] - math.log(count)
    return Samples(run.astype(np.int32), place.astype(np.int32), losses[is_sample], log_weight)


def by_run(
    estimate: Callable[..., tuple[np.ndarray, np.ndarray]],
    history: LevelHistory,
    samples: Samples,
    at: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a logarithm that each run estimates and its variance by counting, `(runs, at)`."""
    count = np.sum(samples.level == history.level.shape[1]) // len(history.level)
    found = []
    for run, (levels, reaching) in enumerate(zip(*history[:2], strict=True)):
        mine = Samples(*(column[samples.run == run] for column in samples))
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(estimate(mine, levels, reaching, count, at))
    logs, variances = (np.array(column) for column in zip(*found, strict=True))
    return logs, np.maximum(variances, 0.0)


def log_probability(
    samples: Samples, levels: np.ndarray, reaching: np.ndarray, count: int, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return ln P(loss <= point) in a run, for `by_run`."""
    order = np.argsort(samples.loss)
    total = np.append(-np.inf, np.logaddexp.accumulate(samples.log_weight[order]))
    log = total[np.searchsorted(samples.loss, points, side="right", sorter=order)]
    passed = np.searchsorted(-levels, -points)  # levels above the point
    left = np.append(0.0, np.cumsum(np.log(reaching / count)))[passed]
    explained = np.append(0.0, np.cumsum(1 / reaching - 1 / count))[passed]
    return log, explained + (1 / np.exp(log - left) - 1) / count


def log_mean(
    samples: Samples, levels: np.ndarray, reaching: np.ndarray, count: int, betas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return ln of the mean of `exp(-beta loss)` in a run, for `by_run`."""
    logs, variances = [], []
    for beta in betas:
        each = samples.log_weight - (beta * samples.loss.astype(float) if beta else 0.0)
        logs.append(logsumexp(each))
        shares = np.exp(each - logs[-1])
        # Of what is below a level, those that do not reach the next one count for themselves, and
        # the others for all that is below it.
        own, squares = (
            np.bincount(samples.level, each, len(levels) + 1) for each in (shares, shares**2)
        )
        below = np.cumsum(own[::-1])[::-1]
        others = np.append(below[1:] ** 2 / np.maximum(reaching, 1), 0.0)
        variances.append(np.sum(squares - below**2 / count + others))
    return np.array(logs), np.array(variances)


def combined(
    logs: np.ndarray, variance: np.ndarray, highest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ln of the mean over runs, with an interval, of `(runs, points)`."""
    # Each P is right on average, so its logarithm is low by half its variance. The mean over runs
    # mends that while runs differ little; where they differ by many times, it is their largest.
    runs = len(logs)
    upper = 0.5 + 0.5 * (CONFIDENCE - (LESS / runs if runs > 1 else 0))
    value = np.asarray(logsumexp(logs, axis=0)) - math.log(runs)
    with np.errstate(invalid="ignore"):
        value = np.fmax(value, np.mean(logs, axis=0) + np.mean(variance, axis=0) / 2)
        value = np.minimum(value, highest)
        half = ndtri(upper) * np.sqrt(np.mean(variance, axis=0) / runs)
        if runs > 1:
            spread = np.std(logs, axis=0, ddof=1) / math.sqrt(runs)
            half = np.maximum(half, stdtrit(runs - 1, upper) * spread)
        high = np.minimum(value + half, highest)
    is_unknown = np.isnan(half)  # a run has no particle there
    return value, np.where(is_unknown, -np.inf, value - half), np.where(is_unknown, highest, high)


def curve_points(
    history: LevelHistory, samples: Samples, level: float, levels: Sequence[float]
) -> np.ndarray:
    """Return the losses of the curve: `level`, and those met or asked for above it, and others."""
    above = np.sort(samples.loss[(samples.level == 0) & np.isfinite(samples.loss)])
    above = above[:: max(len(above) // POINTS_ABOVE, 1)]
    met = history.level[history.num_reaching > 0]
    points = np.unique(np.concatenate([met, [level, *levels], above]))
    return points[points >= level]


def notes_on(
    history: LevelHistory, samples: Samples, short: int, logs: np.ndarray, variances: np.ndarray
) -> tuple[str, ...]:
    """Return what to know before the numbers are believed, in words.

    `short` runs have ended above the target, and `logs` are what the runs say at the lowest level.
    """
    notes, runs, expected = [], len(logs), math.sqrt(np.mean(variances))
    if num_first := int(np.sum(np.isinf(samples.loss[samples.level == 0]))):
        notes.append(f"{num_first:,} first losses were not finite: they count as the highest")
    if short:
        notes.append(f"{short} of {runs} runs ended above the target: nothing lower was found")
    is_low = np.any(history.acceptance < LOW_ACCEPTANCE, axis=0)
    if is_low.any():
        highest = np.nanmax(history.level[:, np.argmax(is_low)])
        notes.append(
            f"particles hardly move from loss {highest:.6g} on: do not believe what is below it"
        )
    if runs == 1:
        notes.append("the interval of one run does not know what its particles share: too narrow")
    elif np.isfinite(logs).all() and np.std(logs, ddof=1) > WIDE_SPREAD * expected:
        notes.append(
            f"runs disagree, more moves may help: ln P {logs.min():.4g} to {logs.max():.4g}, "
            f"counting explains +-{expected:.2g}"
        )
    return tuple(notes)
