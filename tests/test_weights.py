"""Weights of rows: whole numbers of them are as many copies of each row, everywhere."""

import itertools

import jax
import numpy as np
import pytest
from output_losses import PAIRS
from test_losses import BITS, CLASSES, EVEN, INPUTS, NUMBERS, WEIGHTS
from tolerances import FORWARD, GRADIENT, float32, leaf_error

import jaxnn
from jaxnn import losses, metrics
from jaxnn.batch import CROSSENTROPIES, Batch
from jaxnn.run.random import permutation
from jaxnn.typing import traits_of

SLOW = pytest.mark.slow
KEY = jax.random.key(2)
COUNTS = np.array([2, 0, 1, 3, 1, 0, 4])
X = float32(np.random.default_rng(12).normal(0.5, 1.5, (7, 3)))
BINARY, CATEGORICAL = CROSSENTROPIES
TARGETS = {CATEGORICAL: CLASSES, BINARY: BITS}


def repeated(array):
    return np.repeat(array, COUNTS, axis=0)


def both(x, y):
    """A batch with weights, twice their counts, and one of as many rows."""
    return Batch(x, y, 2.0 * COUNTS), Batch(repeated(x), repeated(y))


def network(pair, sizes=(3, 4, 3)):
    return jaxnn.mlp(sizes, hidden="tanh", output=pair[0], loss=pair[1])


EACH_LOSS = [*PAIRS[:2], ("identity", "huber")]


@pytest.mark.parametrize(
    "pair",
    [pair if pair in EACH_LOSS else pytest.param(pair, marks=SLOW) for pair in PAIRS],
    ids="-".join,
)
def test_losses_and_gradients_of_every_network(pair):
    model = network(pair)
    params = jax.tree.map(np.asarray, model.sampler()(KEY))
    weighted, copies = both(X, TARGETS.get(pair[1], NUMBERS))

    @jax.jit
    def everything(params, weighted, copies):
        return (
            [model.loss(params, weighted), model.value_and_grad(params, weighted)],
            jax.value_and_grad(model.loss_reference)(params, weighted),
            jax.value_and_grad(model.loss_reference)(params, copies),
        )

    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, params)
        (loss, by_hand), by_jax, expected = everything(wide, weighted, copies)
    assert leaf_error(loss, expected[0]) <= FORWARD["float64"]
    for got in (by_hand, by_jax):
        assert leaf_error(got, expected) <= GRADIENT["float64"]
    lowest = traits_of(model.loss).constant_loss
    if (told := lowest(copies)) is not None:
        assert lowest(weighted) == pytest.approx(told, rel=1e-6)


FORMS = {
    "classes": (PAIRS[0], CLASSES),
    "soft labels": (PAIRS[0], WEIGHTS),
    "bits": (PAIRS[1], BITS),
    "numbers": (("identity", "huber"), NUMBERS),
}


LAYOUTS = {"by scalars": ((3, 5, 3), 16), "by rows": ((3, 30, 3), 16), "plain": ((3, 5, 3), 12)}
QUICK = [("soft labels", "by scalars"), ("classes", "by rows")]


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        each if each in QUICK else pytest.param(*each, marks=SLOW)
        for each in itertools.product(FORMS, LAYOUTS)
    ],
)
def test_losses_and_accuracy_of_many(form, layout):
    (pair, y), (sizes, width) = FORMS[form], LAYOUTS[layout]
    model = network(pair, sizes)
    population = jax.jit(jax.vmap(model.sampler(scale=2.0)))(jax.random.split(KEY, width))
    names = ["loss"] if form == "numbers" else ["loss", "accuracy"]
    mapped = [jax.vmap(getattr(model, name), (0, None)) for name in names]
    evaluate = jax.jit(lambda batch: [function(population, batch) for function in mapped])
    got, expected = map(evaluate, both(X, float32(y) if y.dtype == float else y))
    for found, wanted in zip(got, expected, strict=True):
        assert leaf_error(found, wanted) <= FORWARD["float32"]
        assert np.ptp(wanted) > 0.1


@pytest.mark.parametrize("name", INPUTS)
def test_public_losses(name):
    predictions, targets = INPUTS[name]
    predictions = EVEN if name in CROSSENTROPIES else predictions
    loss = getattr(losses, name)
    expected = loss(repeated(float32(predictions)), repeated(targets))
    assert leaf_error(loss(float32(predictions), targets, COUNTS), expected) <= FORWARD["float32"]
    with pytest.raises(ValueError, match=r"^weights must be of shape \(7,\), one a row"):
        loss(predictions, targets, COUNTS[:6])
    assert np.isnan(jax.jit(loss)(float32(predictions), targets, float32(COUNTS - 1)))


@pytest.mark.parametrize(
    ("metric", "predictions", "targets"),
    [
        (metrics.accuracy, EVEN, CLASSES),
        (metrics.binary_accuracy, EVEN, BITS),
        (metrics.r2, NUMBERS + EVEN, NUMBERS),
    ],
)
def test_metrics(metric, predictions, targets):
    expected = metric(repeated(predictions), repeated(targets))
    assert leaf_error(metric(predictions, targets, COUNTS), expected) <= FORWARD["float32"]
    assert abs(metric(predictions, targets) - expected) > 1e-3
    assert np.isnan(jax.jit(metric)(float32(predictions), targets, np.zeros(7)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (COUNTS[:6], r"of shape \(7,\), one a row; got \(6,\)"),
        (COUNTS[:, None], r"of shape \(7,\), one a row; got \(7, 1\)"),
        (2.0, r"of shape \(7,\), one a row; got \(\)"),
        (np.where(COUNTS == 1, -0.5, COUNTS), r"finite numbers of at least 0; got -0.5 at \[2\]"),
        (np.where(COUNTS == 3, np.nan, COUNTS), r"finite numbers .*; got nan at \[3\]"),
        (np.where(COUNTS == 4, np.inf, COUNTS), r"finite numbers .*; got inf at \[6\]"),
        (0 * COUNTS, r"a finite sum above 0; got 0.0"),
        (np.full(7, 3e38), r"a finite sum above 0; got inf"),
        (["a"] * 7, "an array of real numbers; got dtype <U1"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_weights_are_refused(weights, message):
    model = network(PAIRS[0])
    params, batch = model.init(KEY, scale=1.0), Batch(X, CLASSES, weights)
    wanted = rf"^batch\.weights must (be|have) {message}"
    for refuse in (model.loss, model.accuracy, traits_of(model.value_and_grad).validate):
        with pytest.raises((TypeError, ValueError), match=wanted):
            refuse(params, batch)


@pytest.mark.parametrize("sizes", [(3, 5, 3), pytest.param((3, 30, 3), marks=SLOW)])
def test_weights_without_a_meaning_make_nan_where_their_values_are_not_known(sizes):
    model = network(PAIRS[0], sizes)
    population = jax.jit(jax.vmap(model.sampler()))(jax.random.split(KEY, 16))

    @jax.jit
    def everything(weights):
        one, batch = jax.tree.map(lambda leaf: leaf[0], population), Batch(X, CLASSES, weights)
        many = [jax.vmap(f, (0, None))(population, batch) for f in (model.loss, model.accuracy)]
        return many, model.value_and_grad(one, batch)

    for bad in (-1, np.nan, np.inf):
        for leaf in jax.tree.leaves(everything(float32(np.where(COUNTS == 3, bad, COUNTS)))):
            assert np.isnan(leaf).all()
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(everything(np.zeros(7, "f"))))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(everything(float32(COUNTS))))


def test_a_batch_without_weights_has_two_arrays_and_weights_of_1_change_nothing():
    model, batch = network(PAIRS[0]), Batch(X, CLASSES)
    assert batch == Batch(X, CLASSES, None)
    assert len(jax.tree.leaves(batch)) == 2
    params = model.sampler()(KEY)
    ones = model.value_and_grad(params, Batch(X, CLASSES, np.ones(7, bool)))
    assert leaf_error(ones, model.value_and_grad(params, batch)) <= FORWARD["float32"]


def test_minibatches_divide_by_the_weights_of_their_own_rows():
    model = network(("identity", "mean_squared_error"), (3, 3))
    weights = float32([0.5, 2, 1, 3, 1, 0.25, 4])
    batch, start = Batch(X, float32(NUMBERS), weights), model.sampler()(KEY)
    trained = jaxnn.gradient_descent(
        KEY, model.value_and_grad, start, batch,
        learning_rate=0.05, num_epochs=1, batch_size=3, drop_remainder=False,
    )  # fmt: skip
    key = jax.random.fold_in(jaxnn.descent.network_key(KEY), 0)
    order = np.asarray(permutation(key, 7))
    w, b = (np.float64(leaf) for leaf in start[0])
    for rows in (order[:3], order[3:6], order[6:]):
        share = (weights[rows] / weights[rows].sum())[:, None]
        slopes = 2 / 3 * share * (X[rows] @ w + b - NUMBERS[rows])
        w, b = w - 0.05 * X[rows].T @ slopes, b - 0.05 * slopes.sum(axis=0)
    assert leaf_error(tuple(trained.params[0]), (w, b)) <= GRADIENT["float32"]
    assert trained.loss == pytest.approx(float(model.loss(trained.params, batch)), rel=1e-6)


@SLOW
def test_a_perturbation_search_takes_weights():
    """So does random search: `test_rejection` has one."""
    model, batch = network(PAIRS[0]), Batch(X, CLASSES, COUNTS.tolist())
    start = model.init(KEY, scale=1.0)
    found = jaxnn.perturbation_search(KEY, model.loss, start, batch, num_steps=50, scale=0.1)
    expected = model.loss(found.params, Batch(repeated(X), repeated(CLASSES)))
    assert found.num_accepted
    assert found.loss == pytest.approx(float(expected), rel=1e-5)


@SLOW
def test_gradient_checks_take_weights_and_find_where_they_are_forgotten():
    model, batch = network(PAIRS[0], (3, 3)), Batch(X, CLASSES, COUNTS)

    def without(params, batch):
        return model.value_and_grad(params, batch._replace(weights=None))

    for by_hand in (model.value_and_grad, without):
        report = jaxnn.check_gradients(KEY, model.loss_reference, by_hand, model.init(KEY), batch)
        assert report.passed == (by_hand is not without)
