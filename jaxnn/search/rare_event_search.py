"""How likely is a good network? Probabilities of low losses, down to 1e-30 and far beyond.

Plain sampling meets nothing that is rarer than one in its number of draws. Multilevel splitting
goes there in steps of a half: of `num_particles` from the prior it keeps those with lower losses,
copies them over the others and moves all, so that they are particles from the prior below that
loss; and so on. The probability of each level is the product of the shares that were kept.
`jaxnn.search.splitting` writes one level out, and `jaxnn.search.rare_event_result` makes
probabilities and intervals of the levels.

References: Au and Beck 2001 (subset simulation); Guyader, Hengartner and Matzner-Lober 2011 (the
last particle); Walter, arXiv:1412.6368 (the count of moves is a Poisson number) and 1507.00919
(ties); Skilling, "Nested sampling for general Bayesian computation", 2006 (the evidence).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from numpy.typing import ArrayLike

from jaxnn.run import checks, loop
from jaxnn.run.checkpoint import Checkpoint, arrays_to_tree, tree_to_arrays
from jaxnn.run.fingerprint import function_metadata
from jaxnn.run.programs import COMPILER_OPTIONS, bare_function, own_settings, program, run_at_once
from jaxnn.search import rare_event_result as report
from jaxnn.search import splitting
from jaxnn.search.engine import SearchProblem, as_search, check_draws, problem_metadata
from jaxnn.search.rare_event_result import LevelHistory, LevelParticles, RareEventSearchResult
from jaxnn.search.splitting import Form, Particles, Problem
from jaxnn.typing import Device, LossFn, MetricFn, PyTree, SampleFn, Status, traits_of

TAG = 0x52415245
"""Folded into the key, so that no other trainer draws the same from it."""


class Setup(NamedTuple):
    """What is searched, and how: the same at every level."""

    problem: Problem
    form: Form
    keys: list[jax.Array]  # one for each run
    levels: list[float]  # to keep particles at, falling; the target is the last
    num_particles: int
    num_moves: int
    devices: Sequence[Device]


class State(NamedTuple):
    """How far the runs have come; what a checkpoint holds.

    The first level is inf, which all particles reach. A run that has ended repeats its last.
    """

    coordinates: PyTree  # (runs, particles, size), at the last level
    losses: PyTree  # at each level, (levels, runs, particles)
    level: PyTree  # (levels, runs)
    acceptance: PyTree  # (levels, runs); nan where no particle has moved
    kept: PyTree  # coordinates at the levels asked for, (times reached, particles, size)
    best: Particles  # the lowest particle of all
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
    callback: loop.Callback | None = None,
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
    num_particles = checks.as_count("num_particles", num_particles, 2, 2**24)
    num_runs = checks.as_count("num_runs", num_runs, 1)
    num_moves = checks.as_count("num_moves", num_moves, 1)
    max_levels = checks.as_count("max_levels", max_levels, 1)
    limits = loop.as_limits(max_seconds, callback, progress)
    search = as_search(key, "loss_fn", loss_fn, sample_fn, batch, devices)
    checks.check_scalar("loss_fn", search.value)
    asked = _as_levels(target_loss, levels, search.value.dtype)
    metric = checks.as_optional("metric_fn", metric_fn)
    if metric is not None:
        traits_of(metric_fn).validate(search.params, batch)
        measured = checks.shapes_of("metric_fn", metric, search.params, search.problem.batch)
        checks.check_scalar("metric_fn", measured)
    tile = math.ceil(num_particles / math.ceil(num_particles / search.tile))  # equal ones
    problem, form = _as_problem(search.problem, search.params, tile)
    keys = [jax.random.fold_in(jax.random.fold_in(key, TAG), run) for run in range(num_runs)]
    setup = Setup(problem, form, keys, asked, num_particles, num_moves, search.devices)
    with own_settings(), loop.watch_interrupts() as is_interrupted:
        check_draws(search.problem.sample, search.problem.stream, 0)
        state, saved = _start(setup), None
        if checkpoint is not None:
            saved = Checkpoint(Path(checkpoint), _metadata(key, search.problem, setup))
            if found := saved.begin(tree_to_arrays(state), ("max_levels", max_levels)):
                state = arrays_to_tree(state, found.arrays)
        work = loop.Work(
            advance=partial(_advance, setup),
            progress=partial(_progress, setup),
            content=lambda state: (tree_to_arrays(state), {"next": len(state.level) - 1}, None),
            total=max_levels,
            largest=max_levels,
            unit="levels",
        )
        limits = limits._replace(is_interrupted=is_interrupted)
        done, status = len(state.level) - 1, _status_of(setup, state)
        state, status = loop.run(work, state, done, status, limits, saved)
        return loop.told(_result(setup, state, status, metric), is_interrupted)


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
    betas = checks.as_numpy("beta", beta).astype(np.float64)
    if np.any(~(betas >= 0)):
        raise ValueError(f"beta must be numbers of at least 0; got {betas}")
    given = result.history, result.samples, betas.reshape(-1)
    found = report.combined(*report.by_run(report.log_mean, *given), np.inf)
    value, low, high = (each.reshape(betas.shape) for each in found)
    return value, low, high


def _as_levels(target: float, levels: Sequence[float], dtype: np.dtype) -> list[float]:
    """The losses to keep particles at, falling, the target last."""
    last = loop.as_target(target, dtype)
    if last is None:
        raise TypeError("target_loss must be a number; got None")
    with np.errstate(over="ignore"):
        asked = checks.as_numpy("levels", levels).reshape(-1).astype(dtype).astype(np.float64)
    if np.any(~np.isfinite(asked)) or np.any(asked <= last):
        raise ValueError(f"levels must be finite and above target_loss, {last:g}; got {levels}")
    return [*np.unique(asked)[::-1].tolist(), last]


def _as_problem(problem: SearchProblem, params: PyTree, tile: int) -> tuple[Problem, Form]:
    """The problem in the coordinates that its sampler names, or in the params themselves."""
    loss, sample, batch, _ = problem
    unit = traits_of(bare_function(sample.func)).unit_draws
    if unit is None:
        checks.check_floats(params)
        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        return Problem(loss, sample, None, batch), Form(None, size, tile)
    to_params = Partial(unit.to_params, *sample.args, **sample.keywords)
    draws = jax.ShapeDtypeStruct((unit.size,), jnp.float32)
    made = checks.shapes_of("unit_draws.to_params", to_params, draws)
    checks.check_like("unit_draws.to_params", "params", made, params)
    return Problem(loss, sample, to_params, batch), Form(unit.distribution, unit.size, tile)


def _metadata(key: jax.Array, problem: SearchProblem, setup: Setup) -> dict[str, Any]:
    """What a search that goes on from a checkpoint has to share with the one that saved it."""
    draws = jax.ShapeDtypeStruct((setup.form.size,), jnp.float32)
    to_params = setup.problem.to_params
    unit = to_params and function_metadata("unit_draws", to_params, draws, axes=(0,))
    return {
        **problem_metadata("rare_event_search", key, "loss_fn", problem),
        "unit_draws": unit,
        "levels": setup.levels,
        "num_particles": setup.num_particles,
        "num_runs": len(setup.keys),
        "num_moves": setup.num_moves,
        "tile width": setup.form.tile,
    }


def _start(setup: Setup) -> State:
    """Draw the particles of all runs."""
    problem, form, keys, _, count, _, devices = setup
    calls = [
        jax.device_put((problem, jax.random.fold_in(key, 0)), device)
        for key, device in zip(keys, cycle(devices), strict=False)
    ]
    drawn = run_at_once(splitting.draw_particles, calls, devices, form=form, num_particles=count)
    coordinates, losses = map(np.stack, zip(*drawn, strict=True))
    return State(
        coordinates=coordinates,
        losses=losses[None],
        level=np.full((1, len(keys)), np.inf, losses.dtype),
        acceptance=np.ones((1, len(keys)), np.float32),
        kept=coordinates[:0],
        best=_lowest(coordinates, losses),
        num_evaluations=losses.size,
    )


def _advance(setup: Setup, state: State, begin: int, end: int) -> tuple[State, Status | None]:
    """Take the runs down a number of levels, or as far as they come."""
    for _ in range(begin, end):
        state = _next(setup, state)
        if (status := _status_of(setup, state)) is not None:
            return state, status
    return state, None


def _next(setup: Setup, state: State) -> State:
    """Take every run that is not over to its next level."""
    before, level = state.losses[-1], state.level[-1].copy()
    going = np.flatnonzero(_ends(setup, state) == "")
    for each in going:
        asked = next(loss for loss in setup.levels if loss < level[each])
        level[each] = splitting.next_level(before[each], asked)
    moving, calls = [each for each in going if np.any(before[each] <= level[each])], []
    for each, device in zip(moving, cycle(setup.devices), strict=False):
        key = jax.random.fold_in(setup.keys[each], len(state.level))
        particles = Particles(state.coordinates[each], before[each])
        call = setup.problem, key, particles, level[each], np.int32(setup.num_moves)
        calls.append(jax.device_put(call, device))
    moved = run_at_once(splitting.move_to_level, calls, setup.devices, form=setup.form)
    coordinates, losses = state.coordinates.copy(), before.copy()
    acceptance, kept = np.full(len(level), np.nan, np.float32), [state.kept]
    num_evaluations = state.num_evaluations
    for each, (there, moves) in zip(moving, moved, strict=True):
        coordinates[each], losses[each] = there
        acceptance[each] = moves.acceptance
        num_evaluations = num_evaluations + int(moves.num_evaluations)
        if float(level[each]) in setup.levels:
            kept.append(coordinates[each, None])
    return State(
        coordinates,
        np.append(state.losses, losses[None], axis=0),
        np.append(state.level, level[None], axis=0),
        np.append(state.acceptance, acceptance[None], axis=0),
        np.concatenate(kept),
        min(state.best, _lowest(coordinates, losses), key=lambda each: each.loss),
        num_evaluations,
    )


def _lowest(coordinates: np.ndarray, losses: np.ndarray) -> Particles:
    place = np.unravel_index(np.argmin(losses), losses.shape)
    return Particles(coordinates[place], losses[place])


def _ends(setup: Setup, state: State) -> np.ndarray:
    """How each run has ended: at the target, or with no particle lower or none that moves."""
    level, target = state.level[-1], setup.levels[-1]
    is_reached = (level <= target) & np.any(state.losses[-1] <= target, axis=1)
    is_over = (level <= target) | ~(state.acceptance[-1] > 0)
    return np.select([is_reached, is_over], ["reached", "converged"], "")


def _status_of(setup: Setup, state: State) -> Status | None:
    """Why the search has ended; None while a run goes on."""
    ends = _ends(setup, state)
    if "" in ends:
        return None
    return "reached" if "reached" in ends else "converged"


def _progress(setup: Setup, state: State) -> loop.Progress:
    best_params = partial(_best_params, setup, state)
    return loop.Progress(int(state.num_evaluations), float(state.best.loss), best_params)


def _best_params(setup: Setup, state: State) -> PyTree:
    if np.isinf(state.best.loss):
        return None
    params, _ = _measure(setup.problem, None, state.best.coordinates[None], tile=1)
    return jax.tree.map(lambda leaf: leaf[0], params)


def _result(
    setup: Setup, state: State, status: Status, metric: Partial | None
) -> RareEventSearchResult:
    losses, ends = state.losses[-1], _ends(setup, state)
    reaching = np.sum(state.losses[:-1] <= state.level[1:, :, None], axis=2)
    history = LevelHistory(state.level[1:].T, reaching.T, state.acceptance[1:].T)
    samples = report.samples_of(state.losses, state.level, reaching)
    if "reached" in ends:
        level = setup.levels[-1]
    elif len(state.level) == 1:
        level = float(losses.max())
    else:  # Where no particle reached the last level, many are at the loss next to it.
        level = float(max(state.level[-1].max(), losses.min(axis=1).max()))
    points = report.curve_points(history, samples, level, setup.levels)
    logs, variances = report.by_run(report.log_probability, history, samples, points)
    curve = report.Curve(points, *report.combined(logs, variances, 0.0))
    short = int(np.sum(ends == "converged"))
    return RareEventSearchResult(
        params=_best_params(setup, state),
        loss=float(state.best.loss),
        num_evaluations=int(state.num_evaluations),
        status="nonfinite" if np.isinf(state.best.loss) else status,
        level=level,
        log_probability=float(curve.log_probability[0]),
        low=float(curve.low[0]),
        high=float(curve.high[0]),
        curve=curve,
        particles=_level_particles(setup, state, metric),
        history=history,
        samples=samples,
        notes=report.notes_on(history, samples, short, logs[:, 0], variances[:, 0]),
    )


def _level_particles(setup: Setup, state: State, metric: Partial | None) -> LevelParticles:
    levels = state.level.astype(float)
    is_kept = np.isin(levels, setup.levels) & ~np.isnan(state.acceptance)
    level, run, losses = levels[is_kept], np.nonzero(is_kept)[1], state.losses[is_kept]
    order = np.lexsort((run, -level))
    coordinates = state.kept[order].reshape(-1, setup.form.size)
    params, measured = _measure(setup.problem, metric, coordinates, tile=setup.form.tile)
    measured = None if measured is None else np.asarray(measured)
    level, run = (np.repeat(each[order], losses.shape[1]) for each in (level, run.astype(np.int32)))
    level = level.astype(losses.dtype)  # so that it equals the number asked for
    return LevelParticles(level, run, losses[order].reshape(-1), params, measured)


@program(static_argnames="tile", compiler_options=COMPILER_OPTIONS)
def _measure(
    problem: Problem, metric: Partial | None, coordinates: jax.Array, *, tile: int
) -> tuple[PyTree, jax.Array | None]:
    """The params of particles, and the metric of each, if there is one."""

    def measure(each: jax.Array) -> tuple[PyTree, jax.Array | None]:
        params = splitting.params_at(problem, each)
        return params, None if metric is None else metric(params, problem.batch)

    return jax.lax.map(measure, coordinates, batch_size=tile)
