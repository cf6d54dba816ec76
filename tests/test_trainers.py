"""The contract that the three trainers share, on one small problem and one set of callables.

The problem is a linear layer under squared error with params in a tree. What a test needs to
vary is in the batch, so that nearly all tests run the same compiled code: where a bias is above
`limit`, the loss is `poison / 0`.
"""

import functools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from tolerances import FORWARD

import jaxnn
from jaxnn.chains import kernel as chain_kernel
from jaxnn.chains import moves as annealing
from jaxnn.descent import kernel as descent_kernel
from jaxnn.gradients import check as gradient_check
from jaxnn.run.random import normals
from jaxnn.search import engine as drawing
from jaxnn.typing import Traits

close = functools.partial(pytest.approx, rel=FORWARD["float32"])
ROWS = 6
KEY = jax.random.key(2024)
POISONS = {"nan": 0.0, "inf": 1.0, "-inf": -1.0}
every_poison = pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS.keys())


class Rows(NamedTuple):
    """A batch that is no `jaxnn.Batch`, rows first in every leaf, and not all of it arrays."""

    x: Any
    y: Any
    limit: Any
    poison: Any
    none: Any = None
    rest: Any = ()


def problem(limit=np.inf, poison=0.0, seed=5):
    """Params to start from and rows to fit, both of NumPy."""
    rng = np.random.default_rng(seed)
    params = {"w": [rng.normal(size=(2, 3)), None, {}], "b": rng.normal(size=3), "c": np.zeros(())}
    x = rng.normal(size=(ROWS, 2))
    y = x @ rng.normal(size=(2, 3)) + 0.5 + 0.3 * rng.normal(size=(ROWS, 3))
    rows = Rows(x, y, np.full(ROWS, limit), np.full(ROWS, poison))
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, rows))


SHAPES = {"w": [(2, 3), None, {}], "b": (3,), "c": ()}
LOOKS = []
"""An entry for each time that JAX runs through the loss."""


def squared_error(params, rows):
    LOOKS.append(None)
    error = rows.x @ params["w"][0] + params["b"][None, :] + params["c"] * rows.x[:, :1] - rows.y
    loss = jnp.mean(jnp.square(error))
    return jnp.where(jnp.max(params["b"]) > rows.limit[0], rows.poison[0] / 0, loss)


def first_bias(params, rows):
    del rows
    return params["b"][0]


compiled = jax.jit(squared_error)


def loss_of(params, rows):
    return float(compiled(params, rows))


def around(params, size, key):
    """Params plus `size` times a standard normal on every number."""
    flat, unravel = ravel_pytree(params)
    return unravel(flat + size * normals(key, flat.size))


def draw(key, loss_fn, params, batch, *, steps=300, size=0.5, **options):
    sample_fn = Partial(around, params, np.float32(size))
    return jaxnn.random_search(key, loss_fn, sample_fn, batch, num_candidates=steps, **options)


def climb(key, loss_fn, params, batch, *, steps=300, size=0.1, **options):
    return jaxnn.perturbation_search(
        key, loss_fn, params, batch, num_steps=steps, scale=size, **options
    )


gradient_of = functools.cache(jax.value_and_grad)


def follow(key, value_and_grad_fn, params, batch, *, steps=100, size=0.05, **options):
    options = {"batch_size": 4, "learning_rate": size} | options
    return jaxnn.gradient_descent(
        key, value_and_grad_fn, params, batch, num_epochs=steps, **options
    )


def descend(key, loss_fn, params, batch, **options):
    return follow(key, gradient_of(loss_fn), params, batch, **options)


every_trainer = pytest.mark.parametrize("train", [draw, climb, descend])
every_bare_trainer = pytest.mark.parametrize("train", [draw, climb, follow])
"""Those that hand their function over as it is."""
from_params = pytest.mark.parametrize("train", [climb, descend])
FUNCTIONS = {draw: "loss_fn", climb: "loss_fn", follow: "value_and_grad_fn"}
COUNTS = {draw: "num_candidates", climb: "num_steps", descend: "num_epochs"}


def as_bytes(tree):
    """Every number of a tree as it lies in memory, with shapes and dtypes."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [(leaf.dtype.str, leaf.shape, leaf.tobytes()) for leaf in leaves]


def series(result):
    """The arrays of a history, those that were recorded."""
    return {k: v for k, v in result.history._asdict().items() if v is not None}


# --- what comes out


@every_trainer
def test_a_key_says_what_is_found_and_it_is_better_and_ready_to_plot(train):
    params, rows = problem()
    before = as_bytes((params, rows))
    result, again = (train(KEY, squared_error, params, rows) for _ in range(2))
    assert as_bytes((params, rows)) == before, "the caller's arrays are left as they were"
    assert all(leaf.flags.writeable for leaf in jax.tree.leaves((params, rows)))
    assert as_bytes(result) == as_bytes(again)
    assert result.status == again.status == "completed"
    assert result.loss < 0.7 * loss_of(params, rows)
    assert loss_of(result.params, rows) == close(result.loss)
    assert train(jax.random.key(2025), squared_error, params, rows).loss != result.loss
    assert {"params", "loss", "num_evaluations", "status", "history"} <= set(result._fields)
    assert issubclass(type(result), tuple)
    assert (type(result.loss), type(result.num_evaluations)) == (float, int)
    assert jax.tree.map(np.shape, result.params) == SHAPES
    arrays = series(result)
    assert {type(array) for array in arrays.values()} == {np.ndarray}
    assert len({array.shape for array in arrays.values()}) == 1
    assert np.all(np.diff(arrays["evaluations"]) > 0)
    assert arrays["evaluations"][-1] <= result.num_evaluations


@from_params
def test_no_steps_return_the_start(train):
    params, rows = problem()
    result = train(KEY, squared_error, params, rows, steps=0)
    assert as_bytes(result.params) == as_bytes(params)
    assert result.loss == close(loss_of(params, rows))
    assert (result.num_evaluations, result.status) == (1, "completed")
    assert {array.shape for array in series(result).values()} == {(0,)}


@every_trainer
def test_read_only_float64_arrays_will_do(train):
    def lock(leaf):
        leaf = leaf.astype(np.float64)
        leaf.flags.writeable = False
        return leaf

    result = train(KEY, squared_error, *jax.tree.map(lock, problem()))
    assert as_bytes(result) == as_bytes(train(KEY, squared_error, *problem()))


# --- losses that are not finite


@every_poison
@pytest.mark.parametrize("train", [draw, climb])
def test_losses_that_are_not_finite_never_win(train, poison):
    params, rows = problem(limit=float(problem()[0]["b"].max()) + 0.1, poison=poison)
    result = train(KEY, squared_error, params, rows)
    assert result.status == "completed"
    assert np.max(result.params["b"]) <= rows.limit[0]
    assert result.loss < loss_of(params, rows)
    assert result.loss == close(loss_of(result.params, rows))
    proposed = result.history.loss if train is draw else result.history.proposed_loss
    assert not np.any(np.isnan(proposed) | np.isneginf(proposed))
    if train is draw:
        assert 0 < result.num_nonfinite < result.num_evaluations
    else:
        assert 0 < np.sum(np.isposinf(proposed)) < len(proposed)


@every_poison
def test_descent_into_losses_that_are_not_finite_ends_before_them(poison):
    params, rows = problem()
    free = descend(KEY, squared_error, params, rows)
    limit = (params["b"].max() + np.max(free.params["b"])) / 2
    assert limit > params["b"].max(), "the way of the descent must cross the limit"
    params, rows = problem(limit=limit, poison=poison)
    result = descend(KEY, squared_error, params, rows)
    assert result.status == "diverged"
    assert 1 < result.num_steps < free.num_steps
    assert np.max(result.params["b"]) <= limit
    assert result.loss == close(loss_of(result.params, rows))
    assert np.all(np.isfinite(result.history.loss[:-1]))
    last = {0.0: np.nan, 1.0: np.inf, -1.0: -np.inf}[poison]
    np.testing.assert_equal(result.history.loss[-1], np.float32(last))


@every_poison
@every_trainer
def test_a_run_that_meets_nothing_finite_says_so_and_invents_no_winner(train, poison):
    params, rows = problem(limit=-np.inf, poison=poison)
    result = train(KEY, squared_error, params, rows)
    assert (result.status, result.loss) == ("nonfinite", np.inf)
    if train is draw:
        assert (result.params, result.candidate) == (None, None)
        assert result.num_nonfinite == result.num_evaluations == 300
        assert {array.shape for array in series(result).values()} == {(0,)}
        return
    assert as_bytes(result.params) == as_bytes(params)
    if train is climb:
        assert result.num_accepted == 0


def test_a_climb_that_starts_at_nan_takes_the_first_finite_proposal():
    params, rows = problem(limit=float(problem()[0]["b"].max()) - 0.05, poison=0)
    result = climb(KEY, squared_error, params, rows)
    losses = result.history.proposed_loss
    first = int(np.argmax(np.isfinite(losses)))
    assert result.status == "completed"
    assert first > 0, "the first proposals must be poisoned as well"
    assert np.flatnonzero(result.history.accepted)[0] == first
    assert result.history.current_loss[first] == losses[first]
    assert np.all(np.isposinf(result.history.current_loss[:first]))


# --- streams of their own


def test_candidates_and_proposals_of_one_key_are_unrelated():
    """Without a tag of its own, step t would draw from the very key of candidate t.

    |r| of 300 independent pairs stays below 0.35, six of its standard deviations.
    """
    params, rows = problem(limit=-np.inf)
    sample_fn = Partial(around, params, np.float32(1))
    candidates = [jaxnn.candidate_params(KEY, sample_fn, i)["b"][0] for i in range(300)]
    climbed = climb(KEY, squared_error, params, rows, size=1, metric_fn=first_bias)
    assert climbed.num_accepted == 0
    r = np.corrcoef(candidates, climbed.history.proposed_metric)[0, 1]
    assert abs(r) < 0.35


def test_every_consumer_of_keys_has_a_tag_of_its_own():
    modules = (drawing, chain_kernel, annealing, descent_kernel, gradient_check)
    assert len({module.TAG for module in modules}) == 5


# --- compilation


@every_trainer
def test_other_numbers_and_data_of_the_same_shapes_compile_nothing(train, caplog):
    params, rows = problem()
    train(KEY, squared_error, params, rows)
    before = len(LOOKS)
    with jax.log_compiles():
        caplog.clear()
        train(KEY, squared_error, params, rows)
        train(KEY, squared_error, *problem(seed=6), size=0.07)
        train(jax.random.key(1), squared_error, params, rows, size=0.2, steps=217)
        train(KEY, squared_error, params, rows, size=np.float64(0.3))
        train(KEY, squared_error, params, rows, size=1)
        if train is descend:
            train(KEY, squared_error, params, rows, tolerance=1e-3)
        compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert compiled == []
    assert len(LOOKS) == before > 0


# --- progress


@every_trainer
def test_a_callback_comes_every_so_often_with_the_best_params_so_far(train):
    _, rows = problem()
    seen = []

    def look(progress):
        seen.append(progress.num_evaluations)
        best = progress.best_params()
        assert jax.tree.map(np.shape, best) == SHAPES
        if train is not descend:  # which sees the loss of a mini-batch
            assert loss_of(best, rows) == close(progress.loss)

    interval, steps = (2**14, 5 * 2**14) if train is draw else (20, 100)
    result = train(
        KEY, squared_error, *problem(), steps=steps, callback=jaxnn.Every(interval, look)
    )
    assert len(seen) == 5
    assert np.ptp(np.diff(seen)) == 0
    assert as_bytes(result) == as_bytes(train(KEY, squared_error, *problem(), steps=steps))


@every_trainer
def test_a_checkpoint_tells_how_far_its_run_came(train, tmp_path):
    def look(progress):
        raise StopIteration

    path = tmp_path / "run.npz"
    train(KEY, squared_error, *problem(), steps=10**6, checkpoint=path, callback=look)
    found = jaxnn.saved_progress(path)
    assert found.trainer in ("random_search", "perturbation_search", "gradient_descent")
    assert found.status == "stopped"
    assert 0 < found.done < 10**6


# --- interruptions, threads, output


@pytest.fixture
def ctrl_c():
    """The handler that Python starts with, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_returns_the_best_so_far_within_two_seconds(ctrl_c, capfd):
    """Of one trainer here; `test_faults` sends signals to all of them."""
    draw(KEY, squared_error, *problem())
    before, sent = signal.getsignal(signal.SIGINT), []

    def interrupt():
        while signal.getsignal(signal.SIGINT) is before:
            time.sleep(0.001)
        time.sleep(0.3)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = draw(KEY, squared_error, *problem(), steps=2**32 - 1)
    assert time.perf_counter() - sent[0] < 2
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert result.status == "interrupted"
    assert 1 < result.num_evaluations < 2**32
    assert result.loss == close(loss_of(result.params, problem()[1]))
    assert capfd.readouterr() == ("", "")
    whole = draw(KEY, squared_error, *problem(), steps=result.num_evaluations)
    assert whole.status == "completed"
    assert as_bytes(whole) == as_bytes(result._replace(status="completed"))


@every_trainer
def test_an_error_while_compiling_leaves_ctrl_c_as_it_was(train, ctrl_c):
    calls = []

    def loss_fn(params, rows):
        calls.append(None)
        if len(calls) > 1:
            raise ArithmeticError("second trace")
        return squared_error(params, rows)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ArithmeticError, match="second trace") as held:
        train(KEY, loss_fn, *problem())
    assert signal.getsignal(signal.SIGINT) is before
    assert held.tb is not None


@every_trainer
def test_two_threads_at_once_get_their_single_run_results(train):
    seeds = (31, 32)
    alone = [as_bytes(train(jax.random.key(s), squared_error, *problem())) for s in seeds]
    together: dict[int, list[Any]] = {seed: [] for seed in seeds}

    def work(seed):
        for _ in range(3):
            found = train(jax.random.key(seed), squared_error, *problem())
            together[seed].append(as_bytes(found))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(together.values()) == [[expected] * 3 for expected in alone]


@every_trainer
@pytest.mark.parametrize("measures", [False, True])
def test_improvements_are_losses_lower_than_all_before(train, measures):
    options = {"metric_fn": first_bias} if measures else {}
    result = train(KEY, squared_error, *problem(), **options)
    found = result.improvements()
    evaluations, losses, metrics = zip(*found, strict=True)
    assert len(found) > 3
    assert list(evaluations) == sorted(set(evaluations))
    assert list(losses) == sorted(set(losses), reverse=True)
    if train is descend:
        assert losses[-1] == close(np.min(result.history.loss))
    else:
        assert losses[-1] == close(result.loss)
    if train is climb:  # the history keeps every step
        lower = np.flatnonzero(np.diff(result.history.best_loss) < 0) + 1
        steps = np.array(evaluations) - 2
        assert set(lower) <= set(steps) <= {0, *lower}
    if measures:
        if train is not descend:  # whose metric is that of the epoch before
            assert metrics[-1] == close(float(result.params["b"][0]))
        assert len(set(metrics)) > 3
    else:
        assert set(metrics) == {None}


@every_trainer
def test_lines_of_improvements_come_as_they_are_found(train, capfd):
    seen: list[Any] = []
    options: dict[str, Any] = {"metric_fn": first_bias}

    def look(progress):
        seen.append(progress)

    steps = 100_000 if train is draw else 300
    callback = jaxnn.Every(2**14 if train is draw else 20, look)
    options |= {"callback": callback, "steps": steps, "progress": "lines"}
    train(KEY, squared_error, *problem(), **options)
    out, err = capfd.readouterr()
    assert err == ""
    before = [np.inf, *np.minimum.accumulate([each.loss for each in seen])[:-1]]
    falls = [each for each, lowest in zip(seen, before, strict=True) if each.loss < lowest]
    lines = out.splitlines()
    assert len(lines) == len(falls) > 1
    for line, each in zip(lines, falls, strict=True):
        assert line.startswith(f"{each.num_evaluations:>15,}  loss {each.loss:.6f}")
        assert line.endswith(f"metric {float(each.best_params()['b'][0]):.4g}")
    with pytest.raises(ValueError, match="progress must be True, False or 'lines'"):
        train(KEY, squared_error, *problem(), progress="words")


@every_trainer
def test_nothing_is_printed_unless_asked_and_then_on_standard_error(train, capfd):
    quiet = train(KEY, squared_error, *problem())
    assert capfd.readouterr() == ("", "")
    loud = train(KEY, squared_error, *problem(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert {draw: "candidates", climb: "steps", descend: "epochs"}[train] in err
    assert "loss" in err
    assert as_bytes(loud) == as_bytes(quiet)


# --- what is refused


def untouched(params, rows):
    raise AssertionError("bad input must be refused before the loss is looked at")


BAD_KEYS = [
    (0, TypeError, r"key must be a single typed key.*got 0"),
    (jax.random.PRNGKey(0), TypeError, "key must be.*got an array of dtype uint32"),
    (jax.random.key(0, impl="rbg"), ValueError, "key must be of implementation.*got rbg"),
]
BAD_COUNTS = [
    (-1, ValueError, "got -1"),
    (1e9 + 0.5, TypeError, r"got 1000000000.5 \(float\)"),
    (2**64, ValueError, "got 18446744073709551616"),
]
BAD_BATCHES = [("abc", TypeError), (np.array([1e300]), ValueError)]
BAD_PARAMS = [
    ({}, ValueError, "params must hold at least one array"),
    ({"w": np.ones(2, int)}, TypeError, r"params must be floats of one dtype; got int32.*\['w'\]"),
]


@every_trainer
def test_keys_counts_and_batches_that_are_none_are_refused(train):
    params, rows = problem()
    for key, error, message in BAD_KEYS:
        with pytest.raises(error, match=f"^{message}"):
            train(key, untouched, params, rows)
    for count, error, message in BAD_COUNTS:
        with pytest.raises(error, match=f"^{COUNTS[train]} must be .*{message}"):
            train(KEY, untouched, params, rows, steps=count)
    for leaf, error in BAD_BATCHES:
        with pytest.raises(error, match=r"^batch\.x must"):
            train(KEY, untouched, params, rows._replace(x=leaf))


@pytest.mark.parametrize(("train", "name"), [(climb, "scale"), (descend, "learning_rate")])
def test_step_sizes_out_of_range_and_params_that_cannot_move_are_refused(train, name):
    for value in (0, np.nan, 1e300):
        with pytest.raises(ValueError, match=f"^{name} must be a finite number above 0"):
            train(KEY, untouched, *problem(), size=value)
    for params, error, message in BAD_PARAMS:
        with pytest.raises(error, match=f"^{message}"):
            train(KEY, untouched, params, problem()[1])


def an_error(params, rows):
    raise LookupError("lost my way")


BAD_LOSSES = [
    (lambda p, b: p["b"], TypeError, r"must return a float scalar; got float32 of shape \(3,\)"),
    (lambda p, b: jnp.int32(3), TypeError, r"must return a float scalar; got int32 of shape \(\)"),
    (lambda p, b: None, TypeError, "must return a float scalar; got a NoneType"),
    (
        lambda p, b: (jnp.sum(p["b"]), {"mean": p["b"]}),
        TypeError,
        "must return a float scalar; got a tuple: return the loss alone, without has_aux",
    ),
    (an_error, LookupError, "lost my way"),
]


@every_bare_trainer
def test_losses_that_are_no_float_scalar_are_refused_at_the_first_look(train):
    """JAX looks once, for the shape; what would be compiled would be looked at again."""
    for loss_fn, error, message in BAD_LOSSES:
        looks = []

        def function(params, rows, loss_fn=loss_fn, looks=looks):
            looks.append(None)
            loss = loss_fn(params, rows)
            return (loss, params) if train is follow else loss

        with pytest.raises(error, match=message) as raised:
            train(KEY, function, *problem())
        said = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
        assert FUNCTIONS[train] in said
        assert len(looks) == 1
    with pytest.raises(TypeError, match=f"^{FUNCTIONS[train]} must be callable"):
        train(KEY, None, *problem())


@every_trainer
def test_tracers_are_refused_wherever_they_come_in(train):
    params, rows = problem()
    calls = {
        "key": lambda t: train(jax.random.wrap_key_data(t), untouched, params, rows),
        r"batch\.x": lambda t: train(KEY, untouched, params, rows._replace(x=t)),
    }
    if train is draw:
        calls["sample_fn"] = lambda t: train(KEY, untouched, params | {"b": t}, rows)
    else:
        calls[r"params\['b'\]"] = lambda t: train(KEY, untouched, params | {"b": t}, rows)
        name = "scale" if train is climb else "learning_rate"
        calls[name] = lambda t: train(KEY, untouched, params, rows, size=t[0])
    if train is descend:
        calls["tolerance"] = lambda t: train(KEY, untouched, params, rows, tolerance=t[0])
    for name, call in calls.items():
        # Under jit all arrays are traced, and the first may be another one.
        with pytest.raises(TypeError, match=f"^({name} must be concrete|.* must be given outside)"):
            jax.jit(call)(jnp.ones(2, jnp.uint32))
        if name != "key":
            with pytest.raises(TypeError, match=f"^{name} must be concrete; got a tracer"):
                jax.vmap(call)(jnp.ones((2, 2)))


@every_trainer
def test_a_trainer_inside_jit_is_refused_although_all_that_it_gets_is_known(train):
    def call():
        return train(KEY, squared_error, *problem()).loss

    with pytest.raises(TypeError, match=r"^(params|batch).* must be given outside jit: a trainer"):
        jax.jit(call)()


@every_bare_trainer
def test_validate_is_asked_before_the_function(train):
    seen = []

    def function(params, rows):
        raise AssertionError("validate comes first")

    def validate(params, rows):
        seen.append((jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params), rows))
        raise ValueError("batch.y must be finite; got nan")

    vars(function)["traits"] = Traits(validate=validate)
    params, rows = problem()
    with pytest.raises(ValueError, match=r"batch\.y must be finite; got nan"):
        train(KEY, function, params, rows)
    ((shapes, batch),) = seen
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, np.float32), params)
    assert batch is rows


# --- the user's own settings of JAX

HOSTILE = {
    "jax_enable_x64": True,
    "jax_threefry_partitionable": False,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_default_matmul_precision": "bfloat16",
    "jax_default_prng_impl": "rbg",
    "jax_enable_checks": True,
    "jax_debug_key_reuse": True,
}


def run_all():
    """Bytes of what the trainers return, and which traced; some losses of the searches are nan."""
    params, rows = problem(limit=float(problem()[0]["b"].max()) + 0.5, poison=0)
    results, traced = [], []
    for train, given in ((draw, (params, rows)), (climb, (params, rows)), (descend, problem())):
        looks = len(LOOKS)
        results.append(train(KEY, squared_error, *given))
        traced.append(len(LOOKS) > looks)
    assert all(result.status == "completed" for result in results)
    facts = [(each.params, np.float64(each.loss), each.history) for each in results]
    return as_bytes(facts), traced


@pytest.fixture
def hostile():
    before = {name: getattr(jax.config, name) for name in HOSTILE}
    for name, value in HOSTILE.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_results_are_the_same_bits_under_all_hostile_settings_at_once(request):
    expected, _ = run_all()
    request.getfixturevalue("hostile")
    found, traced = run_all()
    assert found == expected
    assert traced == [True] * 3, "all must be traced again, under these settings"


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.exhaustive
@every_trainer
def test_a_thousand_calls_look_at_the_loss_no_more_and_keep_no_memory(train):
    """Resident memory may grow by 5 MB, after 100 calls to settle."""

    def call(number):
        key, size = jax.random.key(number), 0.01 + 1e-4 * number
        train(key, squared_error, *problem(seed=number), size=size, steps=20)

    for number in range(100):
        call(number)
    before = len(LOOKS), resident_bytes()
    for number in range(100, 1_100):
        call(number)
    assert len(LOOKS) == before[0]
    assert resident_bytes() - before[1] < 5e6
