"""Gradient descent against plain loops in NumPy float64 and against the material's figures."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FORWARD, assert_same

import jaxnn
from jaxnn.run.random import permutation
from jaxnn.typing import Traits

KEY = jax.random.key(12)
MODEL = jaxnn.mlp((2, 1), output="identity", loss="mean_squared_error")
LINE = jaxnn.datasets.linear_rows()
ROWS = 12


def line(weight_1, weight_2, bias):
    weights = jnp.array([[weight_1], [weight_2]], jnp.float32)
    return (jaxnn.Dense(weights, jnp.array([bias], jnp.float32)),)


ONES = line(1, 1, 0)


def descend(
    params: Any = ONES,
    *,
    key=KEY,
    epochs=100,
    batch: Any = LINE,
    function: Any = MODEL.value_and_grad,
    **options: Any,
) -> Any:
    """All rows at rate 0.1 from weights of one, unless asked otherwise."""
    if "optimizer" not in options:
        options = {"learning_rate": 0.1} | options
    return jaxnn.gradient_descent(key, function, params, batch, num_epochs=epochs, **options)


def numbers(params):
    """Both weights and the bias."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def loss_and_slope(theta, rows):
    """Mean squared error of a line and its gradient, in float64."""
    x = np.column_stack([np.asarray(LINE.x, np.float64), np.ones(ROWS)])[rows]
    error = x @ theta - np.asarray(LINE.y, np.float64)[rows, 0]
    return np.mean(error**2), 2 * x.T @ error / len(error)


def orders(key, epochs, batch_size, drop_remainder=True):
    """Rows of every step: a fresh permutation an epoch, its remainder last or dropped."""
    stream = jaxnn.descent.network_key(key)
    for epoch in range(epochs):
        order = permutation(jax.random.fold_in(stream, epoch), ROWS)
        last = ROWS - batch_size + 1 if drop_remainder else ROWS
        for begin in range(0, last, batch_size):
            yield np.asarray(order[begin : begin + batch_size])


def by_loop(steps, rate=0.1, start=(1.0, 1.0, 0.0)):
    """Losses before every step, and where the steps lead."""
    theta, losses = np.array(start), []
    for rows in steps:
        loss, slope = loss_and_slope(theta, rows)
        losses.append(loss)
        theta = theta - rate * slope
    return np.array(losses), theta


# --- the loop


def test_all_rows_at_once_follow_the_plain_loop():
    losses, theta = by_loop([np.arange(ROWS)] * 40)
    result = descend(epochs=40)
    np.testing.assert_allclose(result.history.loss, losses, rtol=1e-5)
    np.testing.assert_allclose(numbers(result.params), theta, rtol=1e-6)
    assert result.loss == pytest.approx(loss_and_slope(theta, np.arange(ROWS))[0], rel=1e-4)


@pytest.mark.parametrize(
    ("batch_size", "drops", "rate", "rtol"),
    [pytest.param(7, True, 0.03, 1e-4, marks=pytest.mark.slow), (5, False, 0.05, 1e-5)],
)
def test_batches_follow_the_plain_loop_over_the_same_permutations(batch_size, drops, rate, rtol):
    steps = list(orders(KEY, 6, batch_size, drops))
    losses, theta = by_loop(steps, rate)
    options = {"batch_size": batch_size, "drop_remainder": drops, "learning_rate": rate}
    result = descend(epochs=6, **options)
    assert len(result.history.loss) == result.num_steps == len(steps) == 6 * (1 if drops else 3)
    np.testing.assert_allclose(result.history.loss, losses, rtol=rtol)
    np.testing.assert_allclose(numbers(result.params), theta, rtol=1e-5)
    work = 3 * np.cumsum([len(rows) for rows in steps]) / ROWS
    assert np.array_equal(result.history.evaluations, work)
    assert result.num_evaluations == int(np.ceil(work[-1])) + 1
    assert [array.dtype for array in result.history[:2]] == [np.float64, np.float32]
    assert result.history.validation_loss is None


def rows_seen(params, batch):
    """As a loss the sum of the rows, here powers of two, and no slope."""
    return jnp.sum(batch) + 0 * params[0], jnp.zeros_like(params)


POWERS = (2.0 ** np.arange(ROWS)).astype(np.float32)


@pytest.mark.parametrize("batch_size", [12, 2**31])
def test_a_batch_size_of_all_rows_or_more_means_all_rows(batch_size):
    got, expected = descend(batch_size=batch_size, epochs=20), descend(epochs=20)
    assert np.array_equal(got.history.loss, expected.history.loss)
    assert np.array_equal(numbers(got.params), numbers(expected.params))
    assert got.num_evaluations == expected.num_evaluations == 61


# --- stop rules


@pytest.mark.parametrize("batch_size", [None, pytest.param(5, marks=pytest.mark.slow)])
def test_it_stops_at_the_first_two_losses_closer_than_the_tolerance(batch_size):
    """Of all rows in any case, of batches where steps are to be compared."""
    options = {"batch_size": batch_size, "learning_rate": 0.05}
    losses = descend(epochs=200, **options).history.loss
    stop = int(np.argmax(np.abs(np.diff(losses)) < np.float32(1e-3))) + 2
    assert 2 < stop < len(losses)
    result: Any = None
    for unit in ("step",) if batch_size else ("step", "epoch"):
        result = descend(epochs=200, tolerance=1e-3, tolerance_unit=unit, **options)
        assert (result.status, result.num_steps) == ("converged", stop)
        assert np.array_equal(result.history.loss, losses[:stop])
    if batch_size is None:
        assert result.loss == pytest.approx(float(losses[stop - 1]), rel=FORWARD["float32"])
        before = descend(epochs=stop - 1, **options)
        assert np.array_equal(numbers(result.params), numbers(before.params))


def first_flat_epoch(losses, rows, tolerance):
    """The first with a mean loss over five epochs within 5 tolerances of the five before."""
    means = np.average(losses.reshape(-1, len(rows)), axis=1, weights=rows)
    fives = np.convolve(means, np.ones(5) / 5, "valid")
    return int(np.argmax(np.abs(fives[5:] - fives[:-5]) < 5 * tolerance)) + 9


NOISY = jaxnn.Batch(LINE.x, LINE.y + np.linspace(-1, 1, ROWS, dtype=np.float32)[::-1, None] ** 3)


@pytest.mark.parametrize(
    ("tolerance", "batch_size", "keeps", "rows"), [(0.1, 5, True, [5, 5, 2]), (1e-3, 7, False, [7])]
)
def test_batches_are_compared_by_the_mean_losses_of_five_epochs(tolerance, batch_size, keeps, rows):
    options = {"batch_size": batch_size, "drop_remainder": not keeps, "learning_rate": 0.01}
    options |= {"batch": NOISY, "epochs": 300}
    losses = descend(**options).history.loss
    stop = (first_flat_epoch(losses, rows, tolerance) + 1) * len(rows)
    assert 10 * len(rows) <= stop < len(losses)
    result = descend(tolerance=tolerance, **options)
    assert (result.status, result.num_steps) == ("converged", stop)
    assert np.array_equal(result.history.loss, losses[:stop])


def test_a_tolerance_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    options = {"batch_size": 5, "learning_rate": 0.01, "batch": NOISY, "tolerance": 1e-2}
    whole = descend(epochs=300, **options)
    assert whole.status == "converged"
    last = whole.num_steps // 2
    for epochs in (last - 7, last - 2, 300):
        found = descend(epochs=epochs, checkpoint=tmp_path / "descent.npz", **options)
    assert (found.status, found.num_steps) == ("converged", whole.num_steps)
    assert np.array_equal(numbers(found.params), numbers(whole.params))


STILL = "no step changed the params (is the gradient 0, as of a dead network?)"


def test_a_tolerance_of_zero_never_stops_and_any_other_stops_where_nothing_changes():
    params, options = np.zeros(1, np.float32), {"batch": POWERS, "function": rows_seen}
    whole = descend(params, epochs=50, **options)
    assert (whole.status, whole.num_steps) == ("completed", 50)
    stopped = descend(params, epochs=50, tolerance=1e-30, **options)
    assert (stopped.status, stopped.num_steps, stopped.notes) == ("converged", 2, (STILL,))


@pytest.mark.parametrize("options", [{}, {"batch_size": 5, "drop_remainder": False}])
@pytest.mark.parametrize("rate", [1e30, 3.0])
def test_a_rate_too_high_diverges_and_leaves_the_last_finite_params(rate, options):
    result = descend(epochs=500, learning_rate=rate, **options)
    assert result.status == "diverged"
    assert np.all(np.isfinite(numbers(result.params)))
    assert np.isfinite(result.history.loss).tolist() == [True] * (result.num_steps - 1) + [False]
    assert result.num_steps < 500
    assert result.num_evaluations == int(np.ceil(result.history.evaluations[-1])) + 1
    if not options:
        before = descend(epochs=result.num_steps - 2, learning_rate=rate)
        assert np.array_equal(numbers(before.params), numbers(result.params))
        assert result.loss == pytest.approx(float(result.history.loss[-2]), rel=FORWARD["float32"])


def test_a_last_step_into_the_infinite_is_taken_back_and_called_divergence():
    """Every loss of the history is finite here; only the params reached have none."""
    result = descend(epochs=1, learning_rate=1e30)
    assert (result.status, np.isfinite(result.history.loss).all()) == ("diverged", True)
    assert np.array_equal(numbers(result.params), numbers(ONES))
    assert result.loss == pytest.approx(float(MODEL.loss(ONES, LINE)), rel=FORWARD["float32"])
    none = descend(line(1e30, 1e30, 0), epochs=0)
    assert (none.status, none.loss) == ("nonfinite", np.inf)
    assert np.array_equal(numbers(none.params), numbers(line(1e30, 1e30, 0)))


# --- optimizers


class Plain(NamedTuple):
    """An optax transformation in all but name."""

    init: Any
    update: Any


def unlike(params, rows):
    """A loss and, as its gradient, numbers that are not its derivative."""
    return jnp.mean(rows) * jnp.sum(params), jnp.full_like(params, jnp.max(rows))


def tell(gradients, state, params, *, value, grad, value_fn):
    """Moves the params to what it is told."""
    slope = jax.grad(value_fn)(params)
    _, rise = jax.jvp(value_fn, (params,), (jnp.ones(5),))
    return jnp.stack([value, value_fn(params + 1), grad[0], slope[1], rise]) - params, state


@pytest.mark.parametrize(("batch_size", "wrap"), [(None, jax.jit), (5, lambda update: update)])
def test_an_optimizer_that_asks_is_told_of_the_loss_on_the_rows_of_the_step(batch_size, wrap):
    """Its derivative is the function's own gradient, forward and in reverse."""
    rows, expected = np.arange(1.0, ROWS + 1), np.ones(5)
    for places in [np.arange(ROWS)] if batch_size is None else orders(KEY, 1, batch_size):
        mean, most = np.mean(rows[places]), np.max(rows[places])
        expected = np.array(
            [mean * expected.sum(), mean * (expected.sum() + 5), most, most, 5 * most]
        )
    options = {"function": unlike, "batch": rows, "batch_size": batch_size, "epochs": 1}
    optimizer = Plain(lambda params: (), wrap(tell))
    found = descend(np.ones(5), optimizer=optimizer, **options)
    np.testing.assert_allclose(found.params, expected, rtol=1e-6)


OPTAX = {
    "polyak": lambda o: o.polyak_sgd(),
    "lbfgs": lambda o: o.lbfgs(),
}
"""Transformations, most of which take the loss into account."""
VERTICAL = jaxnn.datasets.vertical(jax.random.key(0), samples=100, classes=3)
SMALL = jaxnn.mlp((2, 3, 3))


def by_optax(optax, optimizer, params, steps):
    """The losses of a plain optax loop over all rows, before every step."""
    optimizer = optax.with_extra_args_support(optimizer)

    def loss_fn(params):
        return SMALL.loss_reference(params, VERTICAL)

    @jax.jit
    def step(params, state):
        value, grad = SMALL.value_and_grad(params, VERTICAL)
        told = {"value": value, "grad": grad, "value_fn": loss_fn}
        updates, state = optimizer.update(grad, state, params, **told)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(loss)
    return losses


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("polyak", marks=pytest.mark.slow),
        pytest.param("lbfgs", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.filterwarnings("default")
def test_transformations_of_optax_descend_as_in_its_own_loop(name):
    optax = pytest.importorskip("optax")
    optimizer, start = OPTAX[name](optax), SMALL.init(jax.random.key(0), scale=1.0)
    options = {"function": SMALL.value_and_grad, "batch": VERTICAL, "optimizer": optimizer}
    with jax.numpy_dtype_promotion("standard"):
        found = descend(start, epochs=20, **options)
        expected = by_optax(optax, optimizer, start, 20)
    np.testing.assert_allclose(found.history.loss, expected, rtol=1e-4)
    assert found.loss < 0.9 * expected[0]


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda g, s, p: (g, (s, s)), "must return a state like that of optimizer.init"),
        (lambda g, s, p: (g, s.astype(int)), "must return a state like .* got .*dtype=int32"),
    ],
)
def test_updates_that_cannot_run_are_refused_by_name(update, message):
    with jax.numpy_dtype_promotion("standard"):
        optimizer = Plain(lambda params: jnp.float32(0), update)
        with pytest.raises(TypeError, match=f"optimizer.update {message}"):
            descend(optimizer=optimizer)


# --- the material's figures


def test_the_defaults_of_the_material_give_its_figures():
    """Exact: batch 32, rate 0.1, at most 100 epochs, tolerance 1e-8."""
    result = descend(batch_size=32, tolerance=1e-8)
    assert (result.status, result.num_steps) == ("completed", 100)
    np.testing.assert_allclose(
        numbers(result.params), [1.49966686, 1.49862483, 0.10270104], atol=2e-6
    )


DRAWN = [
    (ONES, 0.1, 0.01, 0.02),
    (line(1.4, 1.6, 0.15), 0.05, 0.01, 0.02),
    (line(-10, -10, 5), 0.05, 0.015, 0.03),
]


@pytest.mark.parametrize("num_seeds", [3, pytest.param(300, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("start", "rate", "of_weights", "of_bias"), DRAWN)
def test_small_batches_end_near_the_line(start, rate, of_weights, of_bias, num_seeds):
    """Batch 3, 1,000 epochs, tolerance 1e-8."""
    options: dict[str, Any] = {"batch_size": 3, "epochs": 1_000, "learning_rate": rate}
    options |= {"tolerance": 1e-8, "tolerance_unit": "step"}
    for seed in range(num_seeds):
        result = descend(start, key=jax.random.key(seed), **options)
        assert result.status in {"completed", "converged"}
        errors = np.abs(numbers(result.params) - [1.5, 1.5, 0.1])
        assert np.all(errors <= [of_weights, of_weights, of_bias]), (seed, errors)


@pytest.mark.exhaustive
def test_a_he_start_and_a_cosine_schedule_solve_the_spiral_on_18_seeds_of_20():
    """20 of 20 when it was written; the loss at most 0.077, the accuracy at least 0.957."""
    model, solved = jaxnn.mlp((2, 64, 3)), 0
    optimizer = jaxnn.optimizers.adam(jaxnn.schedules.cosine_decay(0.05, 5e-5, 10_000))
    for seed in range(20):
        data_key, init_key = jax.random.split(jax.random.key(seed))
        batch = jaxnn.datasets.spiral(data_key)
        start = model.init(init_key, scale=1.0, distribution="he")
        options = {"batch": batch, "function": model.value_and_grad, "optimizer": optimizer}
        result = descend(start, epochs=10_000, **options)
        solved += result.loss <= 0.13 and float(model.accuracy(result.params, batch)) >= 0.94
    assert solved >= 18


# --- precision


def test_the_loss_may_be_wider_than_the_params():
    """As where x64 is on and only the batch is float64."""

    def function(params, batch):
        error = params.astype(jnp.float64) - batch
        return jnp.sum(jnp.square(error)), (2 * error).astype(params.dtype)

    with jax.enable_x64(True):
        batch = np.array([1.0, 2.0])
        result = descend(np.zeros(2, np.float32), function=function, batch=batch)
    assert result.params.dtype == np.float32
    assert result.history.loss.dtype == np.float64
    np.testing.assert_allclose(result.params, batch, rtol=1e-6)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"learning_rate": None}, ValueError, "give either learning_rate or .*; got neither"),
        (
            {"learning_rate": 0.1, "optimizer": jaxnn.optimizers.sgd(0.1)},
            ValueError,
            "learning_rate or optimizer; got both",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1; got 0"),
        ({"tolerance": -1e-8}, ValueError, "tolerance must be a finite number of at least 0"),
        (
            {"tolerance_unit": "batch"},
            ValueError,
            "tolerance_unit must be one of 'epoch', 'step'; got 'batch'",
        ),
        ({"epochs": 2**32}, ValueError, "num_epochs must be at most 4294967295"),
        ({"patience": 3}, ValueError, "validation_batch must be given with patience"),
        ({"patience": 0, "validation_batch": LINE}, ValueError, "patience must be an integer"),
        ({"min_delta": 0.1}, ValueError, "patience must be given with min_delta; got None"),
        ({"min_delta": -0.1}, ValueError, "min_delta must be a finite number of at least 0"),
        ({"drop_remainder": 1}, TypeError, "drop_remainder must be True or False"),
        ({"target_loss": "low"}, TypeError, "target_loss must be a finite number"),
        ({"max_seconds": 0}, ValueError, "max_seconds must be a finite number above 0"),
        ({"callback": 3}, TypeError, "callback must be callable"),
        ({"optimizer": 3}, TypeError, "optimizer must have init and update.*got a int"),
        ({"optimizer": Plain(1, 2)}, TypeError, r"optimizer\.init must be callable; got a int"),
        ({"optimizer": Plain(print, 2)}, TypeError, r"optimizer\.update must be callable"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        descend(**options)


@pytest.mark.parametrize(
    "batch",
    [{"x": np.ones((4, 2)), "y": np.ones(3)}, {"x": np.ones(4), "y": 1.0}, (), np.ones((0, 2))],
)
def test_batches_without_rows_to_cut_are_refused(batch):
    with pytest.raises(ValueError, match="batch must have the same number of rows, at least 1"):
        descend(np.ones(1), function=rows_seen, batch=batch, batch_size=2)


# --- stop rules and the validation batch


@pytest.mark.parametrize("plan", [{}, {"batch_size": 5, "drop_remainder": False}])
def test_a_target_ends_it_with_the_params_that_reached_it(plan):
    """Here at the second step of an epoch of three: the remainder after it is not stepped on."""
    options = {"epochs": 100, "learning_rate": 0.01} | plan
    losses = descend(**options).history.loss
    lower = losses < np.minimum.accumulate(np.append(np.inf, losses))[:-1]
    number = next(number for number in range(7, 100, 3) if lower[number])
    target = float(losses[number])
    found = descend(target_loss=target, **options)
    assert (found.status, found.num_steps) == ("reached", number + 1)
    assert np.array_equal(found.history.loss, losses[: number + 1])
    assert plan or found.loss == pytest.approx(target, rel=2e-6)


def swinging(params, batch):
    """Training lowers `(p - 3)^2`; the other batch is best at its own place."""
    return (params - batch) ** 2, 2 * (params - batch)


def test_the_params_returned_are_the_best_on_the_validation_batch():
    options = {"batch": jnp.array(3.0), "function": swinging, "learning_rate": 0.05}
    options |= {"validation_batch": jnp.array(1.0)}
    found = descend(jnp.array(0.0), epochs=40, **options)
    path = 3 - 3 * 0.9 ** np.arange(1, 41)
    np.testing.assert_allclose(found.history.validation_loss, (path - 1) ** 2, atol=1e-5)
    assert f"; lowest validation loss {found.history.validation_loss.min():.6g}" in repr(found)
    best = np.argmin((path - 1) ** 2)
    assert found.params == pytest.approx(path[best], rel=1e-5)
    assert found.loss == pytest.approx((path[best] - 3) ** 2, rel=1e-5)
    assert found.status == "completed"
    stopped = descend(jnp.array(0.0), epochs=40, patience=5, **options)
    assert (stopped.status, stopped.num_steps) == ("converged", best + 1 + 5)
    assert stopped.params == found.params


@pytest.mark.parametrize("min_delta", [0.0, 0.02, 0.3, 100.0])
def test_patience_waits_for_losses_that_are_lower_by_more_than_min_delta(min_delta):
    """Small steps down count in sum: each is compared with the last that counted."""
    options = {"batch": jnp.array(3.0), "function": swinging, "learning_rate": 0.01}
    options |= {"validation_batch": jnp.array(1.0), "epochs": 60}
    losses = descend(jnp.array(0.0), **options).history.validation_loss
    to_beat, since, number = np.inf, 0, 0
    while number < len(losses) and since < 4:
        is_improvement = losses[number] < to_beat - np.float32(min_delta)
        to_beat, since = (losses[number], 0) if is_improvement else (to_beat, since + 1)
        number += 1
    found = descend(jnp.array(0.0), patience=4, min_delta=min_delta, **options)
    assert (found.status, found.num_steps) == ("converged", number)
    assert 5 <= number < 60
    lowest = losses[:number].min()
    assert float(found.params - 1) ** 2 == pytest.approx(float(lowest), rel=1e-5)
    if min_delta:
        return
    default = descend(jnp.array(0.0), patience=4, **options)
    assert_same(default[:5], found[:5])


def test_a_descent_that_diverges_keeps_its_best_on_the_validation_batch():
    found = descend(epochs=200, learning_rate=0.9, validation_batch=LINE)
    assert found.status == "diverged"
    best = np.nanargmin(found.history.validation_loss)
    assert float(MODEL.loss(found.params, LINE)) == pytest.approx(
        float(found.history.validation_loss[best]), rel=1e-5
    )


def test_an_error_of_the_validation_batch_says_so():
    wrong = jaxnn.Batch(LINE.x[:, :1], LINE.y)
    with pytest.raises(ValueError, match=r"^validation_batch is refused: batch\.x must be numbers"):
        descend(validation_batch=wrong)


def steep(params, batch):
    """`(p - 3)^2` up to 1, and beyond the two numbers of the batch: a value and a slope."""
    loss = jnp.where(params > 1, batch[0], (params - 3) ** 2)
    return loss, jnp.where(params > 1, batch[1], 2 * (params - 3))


@pytest.mark.parametrize("rule", [{"target_loss": 1e-3}, {"tolerance": 1e-3}])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_loss_that_is_not_finite_meets_no_rule(value, rule):
    batch = jnp.array([value, 0.0])
    found = descend(jnp.array(0.0), epochs=9, batch=batch, function=steep, **rule)
    assert (found.status, found.params, found.num_steps) == ("diverged", pytest.approx(0.6), 3)


def mean_distance(params, batch):
    return jnp.mean(jnp.abs(params - batch))


def test_the_metric_is_recorded_after_every_epoch_on_both_batches():
    options = {"batch": jnp.array(3.0), "function": swinging, "learning_rate": 0.05}
    options |= {"validation_batch": jnp.array(1.0)}
    plain = descend(jnp.array(0.0), epochs=40, **options)
    found = descend(jnp.array(0.0), epochs=40, metric_fn=mean_distance, **options)
    assert plain.history.metric is plain.history.validation_metric is None
    path = 3 - 3 * 0.9 ** np.arange(1, 41)
    np.testing.assert_allclose(found.history.metric, 3 - path, atol=1e-5)
    np.testing.assert_allclose(found.history.validation_metric, abs(1 - path), atol=1e-5)
    np.testing.assert_array_equal(found.history.epoch_evaluations, 3 * np.arange(1, 41))
    assert found.params == plain.params
    assert "on the validation batch" in repr(found)
    *_, last = found.improvements()
    assert last.metric == pytest.approx(3 - path[38], rel=1e-5)


def test_a_metric_of_many_networks_is_that_of_each():
    starts = np.array([[-9.0], [5.0], [np.inf]], np.float32)
    options = {"batch": jnp.ones(1), "function": jax.value_and_grad(mean_distance)}
    found = descend(
        starts, epochs=7, learning_rate=0.25, metric_fn=mean_distance, num_networks=3, **options
    )
    expected = np.abs(starts[:2] + 0.25 * np.array([[1], [-1]]) * np.arange(1, 8) - 1)
    np.testing.assert_allclose(found.history.metric[:2], expected, atol=1e-6)
    assert np.all(np.isnan(found.history.metric[2, 1:]))
    assert found.history.validation_metric is None


def test_a_metric_that_is_no_scalar_is_refused():
    options = {"function": jax.value_and_grad(mean_distance), "batch": jnp.ones(2), "epochs": 1}
    with pytest.raises(TypeError, match="metric_fn must return a float scalar"):
        descend(jnp.zeros(2), metric_fn=lambda params, batch: params, **options)


# --- the summary


def test_a_result_prints_as_a_few_lines_without_its_arrays():
    result = descend(epochs=25)
    assert str(result).splitlines() == [
        "gradient descent",
        "  status       completed, all of it was done",
        f"  loss         {result.loss:.6g}",
        "  evaluations  76",
        "  steps        25",
        "  look at      result.params, result.history.loss",
    ]
    assert result.notes == ()


def test_a_descent_that_changed_nothing_says_so():
    """A network whose hidden units are 0 on all rows, and whose last bias is the mean."""
    model = jaxnn.mlp((2, 3, 1), output="identity", loss="mean_squared_error")
    start = model.init(jax.random.key(0), scale=1.0)
    hidden = start[0]._replace(biases=jnp.full(3, -100.0))
    start = (hidden, start[1]._replace(biases=jnp.mean(LINE.y, axis=0)))
    result = descend(start, function=model.value_and_grad)
    constant = "no better than the best constant answer, of loss 5.63812"
    assert (result.status, result.notes) == ("completed", (STILL, constant))
    assert f"note         {STILL}" in str(result)


def test_one_that_did_not_step_or_ended_otherwise_does_not():
    options: Any
    for options in ({"epochs": 0}, {"epochs": 1}, {"learning_rate": 1e30}, {"target_loss": 1e9}):
        assert descend(**options).notes == ()
    assert descend(epochs=2, tolerance=1e9).notes == ()


def beside_a_constant(params, batch):
    """The line's loss; the batch holds that of the best constant answer too."""
    return MODEL.value_and_grad(params, batch[0])


vars(beside_a_constant)["traits"] = Traits(constant_loss=lambda batch: batch[1])


@pytest.mark.parametrize(
    ("constant_loss", "is_told"),
    [(None, False), (0.0, False), (np.nan, False), (0.999, True), (1.0009, True), (1.002, False)],
)
def test_a_loss_no_better_than_a_constant_answer_is_told(constant_loss, is_told):
    """Up to a thousandth lower."""
    loss = descend(epochs=5).loss
    scaled = constant_loss and np.float32(constant_loss * loss)
    options = {"function": beside_a_constant, "batch": (LINE, scaled)}
    result = descend(epochs=5, **options)
    note = f"no better than the best constant answer, of loss {scaled or 0:.6g}"
    assert result.notes == ((note,) if is_told else ())
    assert len(str(result).splitlines()) == 6 + is_told
    assert descend(epochs=0, **options).notes == ()


def test_half_precision_steps_are_finite():
    def function(params, batch):
        return jnp.sum(params) + 0 * batch, jnp.zeros_like(params)

    start, batch = jnp.ones(2, jnp.float16), jnp.zeros((), jnp.float16)
    options = {"batch": batch, "function": function, "optimizer": jaxnn.optimizers.adam(0.1)}
    assert np.array_equal(descend(start, epochs=3, **options).params, start)


def test_float64_params_descend_in_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), ONES)
        result = descend(params, learning_rate=0.0625)
    losses, theta = by_loop([np.arange(ROWS)] * 100, rate=0.0625)
    np.testing.assert_allclose(result.history.loss, losses, rtol=1e-5)
    assert numbers(result.params).dtype == np.float64
    np.testing.assert_allclose(numbers(result.params), theta, rtol=1e-6)


class Goal(NamedTuple):
    """Where to go, and the loss of params below a limit."""

    place: Any
    limit: Any = np.float32(-np.inf)
    bad: Any = np.float32(0)


def to_goal(params, goal):
    loss = jnp.where(params < goal.limit, goal.bad, (params - goal.place) ** 2)
    return loss, 2 * (params - goal.place)


@pytest.mark.parametrize("bad", [-np.inf, np.nan])
@pytest.mark.parametrize(("limit", "reached"), [(0.3, 0.36), (np.inf, 1 - 0.8**5)])
def test_a_validation_loss_that_is_not_finite_is_never_the_best(bad, limit, reached):
    """The way from 0 to 1 passes 0.36, close to what the validation batch wants; without any that
    is finite, the params are those reached."""
    validation_batch = Goal(*map(np.float32, (0.4, limit, bad)))
    options = {"function": to_goal, "batch": Goal(np.float32(1)), "epochs": 5}
    found = descend(np.float32(0), validation_batch=validation_batch, **options)
    np.testing.assert_equal(found.history.validation_loss[0], np.float32(bad))
    assert (found.status, found.params) == ("completed", pytest.approx(reached, rel=1e-6))
