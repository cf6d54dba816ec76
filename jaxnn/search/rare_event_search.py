"""How likely is a good network? Probabilities of low losses, down to 1e-30 and far beyond.

Plain sampling meets nothing that is rarer than one in its number of draws. Multilevel splitting
goes there in steps of a half: of `num_particles` from the prior it keeps those with lower losses,
copies them over the others and moves all, so that they are particles from the prior below that
loss; and so on. The probability of each level is the product of the shares that were kept.
`jaxnn.search.splitting` writes one level out.

References: Au and Beck 2001 (subset simulation); Guyader, Hengartner and Matzner-Lober 2011 (the
last particle); Walter, arXiv:1412.6368 (the count of moves is a Poisson number) and 1507.00919
(ties); Skilling, "Nested sampling for general Bayesian computation", 2006 (the evidence).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from numpy.typing import ArrayLike
from scipy.special import logsumexp, ndtri, stdtrit

from jaxnn.run.checkpoint import Checkpoint, arrays_to_tree, tree_to_arrays
from jaxnn.run.checks import (
    as_count,
    as_devices,
    as_numpy,
    as_optional,
    check_floats,
    check_like,
    check_scalar,
    shapes_of,
)
from jaxnn.run.fingerprint import run_metadata
from jaxnn.run.loop import (
    Callback,
    Progress,
    Work,
    as_limits,
    as_target,
    run,
    told,
    watch_interrupts,
)
from jaxnn.run.programs import COMPILER_OPTIONS, bare_function, own_settings, program, run_at_once
from jaxnn.run.show import Table, readable, summary
from jaxnn.search.engine import as_problem, check_draws, tile_size
from jaxnn.search.splitting import (
    Form,
    Particles,
    Problem,
    draw_particles,
    move_to_level,
    next_level,
    params_at,
)
from jaxnn.typing import Device, LossFn, MetricFn, PyTree, SampleFn, Status, traits_of

TAG = 0x52415245
"""Folded into the key, so that no other trainer draws the same from it."""
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
        level: the level that a particle was drawn below, `(particles,)`, falling.
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


class State(NamedTuple):
    """How far the runs have come; what a checkpoint holds."""

    particles: Particles  # (runs, particles, ...)
    history: LevelHistory
    samples: Samples  # without those that are still among the particles
    kept: Samples  # particles at the levels asked for; their level is the place in the list
    coordinates: PyTree  # of those, (particles, size)
    is_over: PyTree  # (runs,)
    best: Particles
    num_evaluations: PyTree


def rare_event_search(
    key: jax.Array,
    loss_fn: LossFn,
    sample_fn: SampleFn,
    batch: PyTree,
    *,
    target_loss: float,
    levels: Sequence[float] = (),
    num_particles: int = 1_000,
    num_runs: int = 4,
    num_moves: int = 10,
    max_levels: int = 1_000,
    metric_fn: MetricFn | None = None,
    max_seconds: float | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    devices: Sequence[Device] | None = None,
    progress: bool | Literal["lines"] = False,
) -> RareEventSearchResult:
    """Return how likely losses down to `target_loss` are among params from `sample_fn`.

    How far it reaches depends on the sampler. Those of `model.sampler` name the independent normal
    or uniform draws behind their params, and so does any with `unit_draws` among its
    `jaxnn.typing.Traits`: there the search moves along slices, and reaches 1e-30 and far below.
    Of a plain function the search can but draw some of the numbers anew, each for itself. The
    numbers of its params have to be independent of each other, which the search cannot see, and
    it reaches no further than where nearly every redraw is too high: to about 1e-20 for the sum
    of 21 squares, but to 1e-9 for the square of a product of two numbers. A note says so.

    The interval is the wider of two: what the counts of particles explain, the variance of ln P
    being the sum over levels of `(1 - share) / (num_particles * share)`, and what the runs say by
    their spread (Student's t). Each of both is of `95 - 12 / num_runs` %, so that the wider one
    covers 92 to 97 % of the time with four runs: 13 known probabilities, of 1e-3 to 1e-30, in 94
    to 98 of 100 searches each. Where the good networks lie apart from each other, all runs may
    miss the same ones; more moves help, and more particles.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar. Losses may be tied, as 1 - accuracy.
            One that is not finite counts as above all levels.
        sample_fn: `sample_fn(key)` -> params, the prior: floats, independent of each other.
        batch: any pytree that the loss takes.
        target_loss: the search ends when all runs have particles at or below, status "reached".
        levels: other losses, above the target, to keep particles at.
        num_particles: how many each run has, at least 2. The error of ln P is about
            `sqrt(1.44 * -ln P / (num_particles * num_runs))`, and more by what copies share.
        num_runs: independent runs. From one alone no spread is known.
        num_moves: moves of each particle at a level; more make the copies less alike.
        max_levels: levels of a run; each halves the probability, so 1,000 lead to 1e-301.
        metric_fn: `metric_fn(params, batch)` -> a float scalar, such as the accuracy on other
            rows, recorded for the particles that are kept.
        max_seconds: the search ends when these are over, status "stopped".
        callback: called with a `Progress` some four times a second, or as `jaxnn.Every` says,
            counted in levels; a `StopIteration` that it raises ends the search.
        checkpoint: a file to save to every half minute and at the end. If it exists, the search
            goes on from it, and refuses one whose functions, data or settings compute anything
            else.
        devices: the devices that share the runs, all local ones by default. The result is the
            same, bit for bit, however many there are.
        progress: whether to show a progress bar; "lines" prints a line when the loss has fallen,
            some four times a second at most.

    Returns:
        A `RareEventSearchResult`.

    Raises:
        TypeError: if the loss is not a float scalar, or params are not floats of one dtype.
        ValueError: if a number is out of range, a level is not above the target, the sampler
            draws the same params from 64 keys, or the checkpoint is of another search or damaged.
        OSError: if the checkpoint cannot be written.

    Example:
        >>> def loss_fn(params, batch):
        ...     return jnp.sum((params - batch) ** 2)
        >>> def sample_fn(key):
        ...     return jax.random.normal(key, (2,))
        >>> given = jax.random.key(0), loss_fn, sample_fn, jnp.zeros(2)
        >>> settings = {"target_loss": 0.02, "num_particles": 300}
        >>> found = rare_event_search(*given, **settings)   # P = 1 - exp(-0.01)
        >>> abs(found.log_probability - math.log(0.00995)) < 0.3
        True
    """
    num_particles = as_count("num_particles", num_particles, 2, 2**24)
    num_runs, num_moves = as_count("num_runs", num_runs, 1), as_count("num_moves", num_moves, 1)
    max_levels, devices = as_count("max_levels", max_levels, 1), as_devices(devices)
    searched, params, loss = as_problem(key, "loss_fn", loss_fn, sample_fn, batch)
    check_scalar("loss_fn", loss)
    asked = _as_levels(target_loss, levels, loss.dtype)
    metric = as_optional("metric_fn", metric_fn)
    if metric is not None:
        traits_of(metric_fn).validate(params, batch)
        check_scalar("metric_fn", shapes_of("metric_fn", metric, params, searched.batch))
    tile = tile_size(loss_fn, params, searched.batch, None, devices[0].platform)
    tile = math.ceil(num_particles / math.ceil(num_particles / tile))  # equal ones
    problem, form = _as_problem(*searched[:3], params, tile)
    stream, limits = jax.random.fold_in(key, TAG), as_limits(max_seconds, callback, progress)
    keys = [jax.random.fold_in(stream, number) for number in range(num_runs)]

    def advance(state: State, begin: int, end: int) -> tuple[State, Status | None]:
        for number in range(begin, end):
            state = _advance(state, number, problem, form, keys, asked, num_moves, devices)
            if state.is_over.all():
                return state, _status_of(state, asked)
        return state, None

    def best_params(state: State) -> PyTree:
        return None if np.isinf(state.best.loss) else _params(problem, state.best.coordinates)

    def progress_of(state: State) -> Progress:
        count = int(state.num_evaluations)
        return Progress(count, float(state.best.loss), partial(best_params, state))

    with own_settings(), watch_interrupts() as is_interrupted:
        check_draws(searched._replace(stream=stream), 0)
        state, done, saved = _start(problem, form, keys, num_particles, devices), 0, None
        if checkpoint is not None:
            shown = {"levels": asked, "num_particles": num_particles, "num_runs": num_runs}
            shown |= {"num_moves": num_moves, "tile width": form.tile}
            metadata = _metadata(key, problem, form) | shown
            saved = Checkpoint(Path(checkpoint), metadata)
            if found := saved.begin(tree_to_arrays(state), ("max_levels", max_levels)):
                state, done = arrays_to_tree(state, found.arrays), found.metadata["next"]
        work = Work(
            advance,
            progress_of,
            content=lambda state: (
                tree_to_arrays(state),
                {"next": state.history.level.shape[1]},
                None,
            ),
            total=max_levels,
            largest=max_levels,
            unit="levels",
        )
        status = _status_of(state, asked) if state.is_over.all() else None
        limits = limits._replace(is_interrupted=is_interrupted)
        state, status = run(work, state, done, status, limits, saved)
        if np.isinf(state.best.loss):
            status = "nonfinite"
        result = _result(state, status, asked, best_params(state), problem, metric, form.tile)
        return told(result, is_interrupted)


def log_evidence(
    result: RareEventSearchResult, beta: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ln of the prior's mean of `exp(-beta loss)`, with 95 % intervals, for any `beta`.

    With a loss that is the mean over n rows of -ln p(y | x), `beta = n` gives the evidence of
    Bayes. It is a sum over the samples of a search (Skilling 2006), and leaves out what lies below
    the last level: a search should go down until the value changes no more.

    Args:
        result: of a search.
        beta: numbers of 0 or more, any shape.

    Returns:
        The values, lower and upper ends, float64, each the shape of `beta`.

    Raises:
        TypeError: if `result` is not that of a rare-event search.
        ValueError: if a number is below 0.

    Example:
        >>> def loss_fn(params, batch):
        ...     return 0.5 * jnp.sum(params**2)
        >>> given = jax.random.key(0), loss_fn, lambda key: jax.random.normal(key, (2,)), None
        >>> found = rare_event_search(*given, target_loss=1e-2, num_particles=300)
        >>> value, low, high = log_evidence(found, 9.0)
        >>> bool(low < math.log(0.1) < high)
        True
    """
    if not isinstance(result, RareEventSearchResult):
        given = type(result).__name__
        raise TypeError(f"result must be that of rare_event_search; got a {given}")
    betas = as_numpy("beta", beta).astype(np.float64)
    if np.any(~(betas >= 0)):
        raise ValueError(f"beta must be numbers of at least 0; got {betas}")
    history, samples = result.history, result.samples
    count = _num_particles(samples)
    runs = [
        [_evidence(samples, history, run, each, count) for each in betas.reshape(-1)]
        for run in range(len(history.level))
    ]
    values = np.array(runs).reshape(len(runs), betas.size, 2)
    found = _combined(values[..., 0], values[..., 1], np.inf)
    value, low, high = (each.reshape(betas.shape) for each in found)
    return value, low, high


def _as_levels(target: float, levels: Sequence[float], dtype: np.dtype) -> list[float]:
    """The losses to keep particles at, falling, the target last."""
    last = as_target(target, dtype)
    if last is None:
        raise TypeError("target_loss must be a number; got None")
    asked = as_numpy("levels", levels).reshape(-1).astype(np.float64)
    if np.any(~np.isfinite(asked)) or np.any(asked.astype(dtype) <= last):
        raise ValueError(f"levels must be finite and above target_loss, {last:g}; got {levels}")
    return [*sorted({float(each) for each in asked.astype(dtype)}, reverse=True), last]


def _as_problem(
    loss: Partial, sample: Partial, batch: PyTree, params: PyTree, tile: int
) -> tuple[Problem, Form]:
    """The problem in the coordinates that its sampler names, or in the params themselves."""
    unit = traits_of(bare_function(sample.func)).unit_draws
    if unit is None:
        check_floats(params)
        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        return Problem(loss, sample, None, batch), Form(None, size, tile)
    to_params = Partial(unit.to_params, *sample.args, **sample.keywords)
    draws = jax.ShapeDtypeStruct((unit.size,), jnp.float32)
    made = shapes_of("unit_draws.to_params", to_params, draws)
    check_like("unit_draws.to_params", "params", made, params)
    return Problem(loss, sample, to_params, batch), Form(unit.distribution, unit.size, tile)


def _metadata(key: jax.Array, problem: Problem, form: Form) -> dict[str, Any]:
    """What a search that goes on from a checkpoint has to share with the one that saved it."""
    draws = jax.ShapeDtypeStruct((form.size,), jnp.float32)
    rows = jax.eval_shape(problem.sample, key), problem.batch
    functions = {
        "sample_fn": (problem.sample, (key,), (0,)),
        "unit_draws": (problem.to_params, (draws,), (0,)),
        "loss_fn": (problem.loss, rows, (0, None)),
    }
    return run_metadata("rare_event_search", key, {"batch": problem.batch}, functions)


def _start(
    problem: Problem, form: Form, keys: list[jax.Array], count: int, devices: Sequence[Device]
) -> State:
    """The particles of all runs, before the first level."""
    calls = [
        jax.device_put((problem, jax.random.fold_in(key, 0)), devices[number % len(devices)])
        for number, key in enumerate(keys)
    ]
    drawn = run_at_once(draw_particles, calls, devices, form=form, num_particles=count)
    particles = jax.tree.map(lambda *each: np.stack(each), *drawn)
    coordinates, losses = particles
    none = _samples(0, 0, losses[0, :0], 0.0, 1)
    levels = np.zeros((len(keys), 0), losses.dtype)
    return State(
        particles,
        LevelHistory(levels, levels.astype(np.int64), levels.astype(np.float32)),
        none,
        none,
        coordinates[0, :0],
        np.zeros(len(keys), bool),
        _best(Particles(coordinates[0, 0], losses.dtype.type(np.inf)), particles),
        np.asarray(losses.size),
    )


def _advance(
    state: State,
    number: int,
    problem: Problem,
    form: Form,
    keys: list[jax.Array],
    asked: list[float],
    num_moves: int,
    devices: Sequence[Device],
) -> State:
    """Take every run that is not over to its next level."""
    losses, history = state.particles.loss, state.history
    num_runs, count = losses.shape
    before = history.level[:, -1] if number else np.full(num_runs, np.inf, losses.dtype)
    log_shares = _log_shares(history, count)[:, -1]
    level, reaching = before.copy(), np.where(np.isinf(log_shares), 0, count)
    samples, moving = [state.samples], []
    for each in map(int, np.flatnonzero(~state.is_over)):
        level[each] = next_level(losses[each], next(t for t in asked if t < before[each]))
        is_above = losses[each] > level[each]
        reaching[each] = count - is_above.sum()
        samples.append(_samples(each, number, losses[each][is_above], log_shares[each], count))
        moving += [each] if reaching[each] else []
    calls = [
        jax.device_put(
            (
                problem,
                jax.random.fold_in(keys[each], number + 1),
                jax.tree.map(lambda leaf, each=each: leaf[each], state.particles),
                level[each],
                np.int32(num_moves),
            ),
            devices[place % len(devices)],
        )
        for place, each in enumerate(moving)
    ]
    moved = run_at_once(move_to_level, calls, devices, form=form) if calls else []
    particles = jax.tree.map(np.array, state.particles)
    acceptance, num_evaluations = np.full(num_runs, np.nan, np.float32), state.num_evaluations
    kept, coordinates = [state.kept], [state.coordinates]
    for each, (there, moves) in zip(moving, moved, strict=True):
        particles.coordinates[each], particles.loss[each] = there
        acceptance[each] = moves.acceptance
        num_evaluations = num_evaluations + int(moves.num_evaluations)
        if (reached := float(level[each])) in asked:
            kept.append(_samples(each, asked.index(reached), there.loss, 0.0, 1))
            coordinates.append(np.asarray(there.coordinates))
    # A run ends at the target, where no particle is lower, and where none has moved.
    is_over = (level <= asked[-1]) | (reaching == 0) | (acceptance == 0)
    columns = level, reaching, acceptance
    return State(
        particles,
        LevelHistory(*(np.c_[a, b] for a, b in zip(history, columns, strict=True))),
        _joined(samples),
        _joined(kept),
        np.concatenate(coordinates),
        state.is_over | is_over,
        _best(state.best, particles),
        num_evaluations,
    )


def _samples(run: int, level: int, losses: np.ndarray, log_share: float, count: int) -> Samples:
    shape = np.shape(losses)
    places = np.full(shape, run, np.int32), np.full(shape, level, np.int32)
    return Samples(*places, np.asarray(losses), np.full(shape, log_share - math.log(count)))


def _joined(samples: Sequence[Samples]) -> Samples:
    return Samples(*(np.concatenate(column) for column in zip(*samples, strict=True)))


def _best(best: Particles, particles: Particles) -> Particles:
    run, place = np.unravel_index(np.argmin(particles.loss), particles.loss.shape)
    lower = Particles(particles.coordinates[run, place], particles.loss[run, place])
    return lower if lower.loss < best.loss else best


def _log_shares(history: LevelHistory, count: int) -> np.ndarray:
    """Logarithm of the share of the prior that is left at each level, and at first, by run."""
    with np.errstate(divide="ignore"):
        logs = np.cumsum(np.log(history.num_reaching / count), axis=1)
    return np.c_[np.zeros(len(logs)), logs]


def _status_of(state: State, asked: list[float]) -> Status:
    """Why runs that are all over have ended."""
    return "reached" if np.any(_is_reached(state, asked)) else "converged"


def _is_reached(state: State, asked: list[float]) -> np.ndarray:
    if not state.history.level.size:
        return np.zeros(len(state.is_over), bool)
    return (state.history.level[:, -1] <= asked[-1]) & (state.history.num_reaching[:, -1] > 0)


def _result(
    state: State,
    status: Status,
    asked: list[float],
    best_params: PyTree,
    problem: Problem,
    metric: Partial | None,
    tile: int,
) -> RareEventSearchResult:
    losses, history = state.particles.loss, state.history
    count, num_levels = losses.shape[1], history.level.shape[1]
    left = _log_shares(history, count)[:, -1]
    living = [_samples(run, num_levels, losses[run], left[run], count) for run in range(len(left))]
    samples = _joined([state.samples, *living])
    level = asked[-1] if np.any(_is_reached(state, asked)) else float(np.max(_lowest(state)))
    points = [history.level[history.num_reaching > 0], [level, *asked]]
    above = np.sort(samples.loss[(samples.level == 0) & np.isfinite(samples.loss)])
    points.append(above[:: max(len(above) // POINTS_ABOVE, 1)])
    losses_at = np.unique(np.concatenate(points))
    losses_at = losses_at[losses_at >= level]
    logs, variance = _log_probabilities(history, samples, losses_at, count)
    curve = Curve(losses_at, *_combined(logs, variance, 0.0))
    return RareEventSearchResult(
        params=best_params,
        loss=float(state.best.loss),
        num_evaluations=int(state.num_evaluations),
        status=status,
        level=level,
        log_probability=float(curve.log_probability[0]),
        low=float(curve.low[0]),
        high=float(curve.high[0]),
        curve=curve,
        particles=_level_particles(state, asked, problem, metric, tile),
        history=history,
        samples=samples,
        notes=tuple(_notes(state, asked, samples, logs[:, 0], variance[:, 0])),
    )


def _lowest(state: State) -> np.ndarray:
    """The lowest loss that each run tells the probability of."""
    if not state.history.level.size:
        return state.particles.loss.max(axis=1)
    last = state.history.level[:, -1]
    # Where no particle reached the last level, many are at the loss next to it.
    with np.errstate(over="ignore"):
        above = np.nextafter(last, last.dtype.type(np.inf))
    return np.where(state.history.num_reaching[:, -1] == 0, above, last)


def _log_probabilities(
    history: LevelHistory, samples: Samples, points: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ln P(loss <= point) of each run, and the variance that counting explains."""
    left = _log_shares(history, count)
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = np.cumsum(1 / history.num_reaching - 1 / count, axis=1)
        explained = np.c_[np.zeros(len(left)), explained]
        logs, variances = [], []
        for run, levels in enumerate(history.level):
            mine = samples.run == run
            order = np.argsort(samples.loss[mine])
            rising, weights = samples.loss[mine][order], samples.log_weight[mine][order]
            total = np.append(-np.inf, np.logaddexp.accumulate(weights))
            log = total[np.searchsorted(rising, points, side="right")]
            passed = np.searchsorted(-levels, -points)  # levels above the point
            share = np.exp(log - left[run, passed])
            logs.append(log)
            variances.append(np.maximum(explained[run, passed] + (1 / share - 1) / count, 0))
    return np.array(logs), np.array(variances)


def _evidence(
    samples: Samples, history: LevelHistory, run: int, beta: float, count: int
) -> tuple[float, float]:
    """Return ln of the mean of `exp(-beta loss)` in a run, and the variance counting explains."""
    mine = samples.run == run
    with np.errstate(invalid="ignore"):
        logs = samples.log_weight[mine] - (beta * samples.loss[mine].astype(float) if beta else 0.0)
    total = logsumexp(logs)
    shares, levels = np.exp(logs - total), samples.level[mine]
    num_levels = history.level.shape[1]
    # Of what is below a level, those that do not reach the next one count for themselves, and the
    # others for all that is below it.
    own, squares = (np.bincount(levels, each, num_levels + 1) for each in (shares, shares**2))
    below = np.cumsum(own[::-1])[::-1]
    reaching = np.maximum(history.num_reaching[run], 1)
    variance = squares - below**2 / count + np.append(below[1:] ** 2 / reaching, 0.0)
    return float(total), max(float(np.sum(variance)), 0.0)


def _combined(
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
    half = np.where(np.isnan(half), np.inf, half)  # a run has no particle there
    return value, value - half, np.minimum(value + half, highest)


def _notes(
    state: State, asked: list[float], samples: Samples, logs: np.ndarray, variance: np.ndarray
) -> list[str]:
    """What to know before the numbers are believed."""
    notes, history, runs = [], state.history, len(logs)
    expected = math.sqrt(np.mean(variance))
    num_first = int(np.sum(np.isinf(samples.loss[samples.level == 0])))
    if num_first:
        notes.append(f"{num_first:,} first losses were not finite: they count as the highest")
    if short := int(np.sum(state.is_over & ~_is_reached(state, asked))):
        notes.append(f"{short} of {runs} runs ended above the target: nothing lower was found")
    if np.any(history.acceptance < LOW_ACCEPTANCE):
        first = int(np.argmax(np.any(history.acceptance < LOW_ACCEPTANCE, axis=0)))
        notes.append(
            f"particles hardly move from loss {np.nanmax(history.level[:, first]):.6g} on: do not "
            "believe what is below it"
        )
    if runs == 1:
        notes.append("the interval of one run does not know what its particles share: too narrow")
    elif np.isfinite(logs).all() and np.std(logs, ddof=1) > WIDE_SPREAD * expected:
        notes.append(
            f"runs disagree: ln P from {logs.min():.4g} to {logs.max():.4g}, where counting "
            f"explains a deviation of {expected:.2g}: more moves may help"
        )
    return notes


def _level_particles(
    state: State, asked: list[float], problem: Problem, metric: Partial | None, tile: int
) -> LevelParticles:
    kept = state.kept
    order = np.lexsort((kept.run, kept.level))
    coordinates = state.coordinates[order]
    measured = None
    if metric is not None:
        measured = np.zeros(0, np.float32)
        if len(coordinates):
            measured = np.asarray(_measure(problem, metric, coordinates, tile=tile))
    params = _params(problem, coordinates)
    level = np.asarray(asked)[kept.level[order]]
    return LevelParticles(level, kept.run[order], kept.loss[order], params, measured)


@program()
def _params(problem: Problem, coordinates: jax.Array) -> PyTree:
    """The params of one particle, or of each of many."""
    params = partial(params_at, problem)
    return params(coordinates) if coordinates.ndim == 1 else jax.vmap(params)(coordinates)


@program(static_argnames="tile", compiler_options=COMPILER_OPTIONS)
def _measure(problem: Problem, metric: Partial, coordinates: jax.Array, *, tile: int) -> jax.Array:
    def measure(each: jax.Array) -> jax.Array:
        return metric(params_at(problem, each), problem.batch)

    return jax.lax.map(measure, coordinates, batch_size=tile)


def _num_particles(samples: Samples) -> int:
    """Particles of a run: those above the first level, or all, stand for one part in as many."""
    return round(math.exp(-np.max(samples.log_weight)))
