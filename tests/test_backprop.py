"""The gradients written by hand, against `jax.grad` and central differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from output_losses import PAIRS
from tolerances import FORWARD, GRADIENT, leaf_error

from jaxnn.batch import Batch
from jaxnn.model.activations import HIDDEN_ACTIVATIONS
from jaxnn.model.layers import Dense, layer_shapes
from jaxnn.model.mlp import mlp

ROWS, WIDTHS, OUTPUTS = 7, (3, 5, 4, 6, 3), 2
DTYPES = ("float32", "float64")
EXHAUSTIVE, SLOW = pytest.mark.exhaustive, pytest.mark.slow
CLASSES = ("softmax", "categorical_crossentropy")
CHOICES = itertools.product(HIDDEN_ACTIVATIONS, PAIRS, range(1, 6), (True, False))
PRODUCT = list(enumerate(CHOICES))


def network(hidden, pair, depth, hidden_biases):
    output, loss = pair
    sizes = (*WIDTHS[:depth], OUTPUTS)
    return mlp(sizes, hidden=hidden, output=output, loss=loss, hidden_biases=hidden_biases)


def problem(model, dtype, seed=7, rows=ROWS):
    """Params and a batch off centre, float32 values in either width."""
    rng = np.random.default_rng(seed)

    def draw(mean, sd, shape):
        return jnp.asarray(rng.normal(mean, sd, shape).astype(np.float32), dtype)

    sizes, _, _, loss, hidden_biases = model.settings
    outputs = sizes[-1]
    params = tuple(
        Dense(draw(0.2, 1.0 / np.sqrt(w[0]), w), b and draw(0.4, 0.3, b))
        for w, b in layer_shapes(sizes, hidden_biases)
    )
    numbers = draw(0.3, 1.0, (rows, outputs))
    y = {
        "binary_crossentropy": draw(0.2, 1.0, (rows, outputs)) > 0,
        "categorical_crossentropy": jnp.asarray(rng.integers(0, outputs, rows)),
    }
    return params, Batch(draw(0.5, 1.0, (rows, sizes[0])), y.get(loss, numbers))


def check_case(case, dtype):
    model = network(*case)

    @jax.jit
    def everything(params, batch):
        return {
            "by hand": model.value_and_grad(params, batch),
            "by jax": jax.value_and_grad(model.loss_reference)(params, batch),
            "loss": model.loss(params, batch),
            "through loss": jax.grad(lambda p: -3 * model.loss(p, batch))(params),
        }

    with jax.enable_x64(dtype == "float64"):
        found = jax.device_get(everything(*problem(model, dtype)))
    (value, gradient), (expected, by_jax) = found["by hand"], found["by jax"]
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}
    assert leaf_error(value, expected) <= FORWARD[dtype]
    assert leaf_error(found["loss"], expected) <= FORWARD[dtype]
    assert leaf_error(gradient, by_jax) <= GRADIENT[dtype]
    three_times = jax.tree.map(lambda leaf: -3 * np.asarray(leaf), gradient)
    assert leaf_error(found["through loss"], three_times) <= FORWARD[dtype]


@pytest.mark.parametrize(
    ("hidden", "pairs"),
    [
        ("tanh", PAIRS[:2]),
        pytest.param("tanh", PAIRS[2:], marks=SLOW),
        *((hidden, PAIRS[10:11]) for hidden in HIDDEN_ACTIVATIONS if hidden != "tanh"),
    ],
)
def test_by_hand_is_by_jax_for_every_loss_in_float64(hidden, pairs):
    models = [network(hidden, pair, 2, True) for pair in pairs]
    with jax.enable_x64(True):
        given = [problem(model, "float64") for model in models]
        functions = [
            (model.value_and_grad, jax.value_and_grad(model.loss_reference)) for model in models
        ]
        found = jax.jit(
            lambda given: [
                [function(*each) for function in both]
                for both, each in zip(functions, given, strict=True)
            ]
        )(given)
    for got, expected in jax.device_get(found):
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float64")}
        assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
        assert leaf_error(got, expected) <= GRADIENT["float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if i % 397 == 27 else EXHAUSTIVE) for i, c in PRODUCT],
    ids=str,
)
def test_by_hand_is_by_jax_and_through_loss(case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize(
    ("pair", "rows", "outputs"),
    [
        (CLASSES, 1, 2),
        (CLASSES, 33, 17),
        pytest.param(("sigmoid", "binary_crossentropy"), 33, 17, marks=SLOW),
    ],
)
def test_any_number_of_rows_and_of_outputs(pair, rows, outputs):
    """Rows are padded to whole vectors, and sums over few outputs written out."""
    model = mlp((3, 5, outputs), hidden="tanh", output=pair[0], loss=pair[1])
    params, batch = problem(model, "float32", rows=rows)
    by_jax = jax.jit(jax.value_and_grad(model.loss_reference))
    assert leaf_error(model.value_and_grad(params, batch), by_jax(params, batch)) <= 1e-5


def test_padded_rows_bring_no_nan_and_a_bad_last_row_brings_it_everywhere():
    model = network("relu", ("softmax", "categorical_crossentropy"), 2, True)
    params, batch = problem(model, "float32", rows=19)
    value_and_grad = jax.jit(model.value_and_grad)
    for label in (0, -1):
        labels = batch.y.at[18].set(label)  # the row that the padding repeats
        value, gradient = value_and_grad(params, Batch(batch.x, labels))
        leaves = [value, *jax.tree.leaves(gradient)]
        assert {bool(np.isnan(entry)) for leaf in leaves for entry in np.ravel(leaf)} == {label < 0}


@pytest.mark.parametrize("pair", PAIRS[:3], ids="-".join)
def test_gradient_by_the_batch_is_right_as_well(pair):
    model = network("tanh", pair, 2, True)
    params, batch = problem(model, "float32")

    @jax.jit
    def both(params, batch):
        def by_rows(loss):
            if pair[1] == "mean_squared_error":  # its targets are numbers too
                return jax.grad(loss, argnums=1)(params, batch)
            return jax.grad(lambda x: loss(params, Batch(x, batch.y)))(batch.x)

        return by_rows(model.loss), by_rows(model.loss_reference)

    got, expected = jax.device_get(both(params, batch))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))
    assert leaf_error(got, expected) <= GRADIENT["float32"]


@pytest.mark.parametrize("hidden", ["relu", "leaky_relu", "elu"])
def test_at_the_kink_the_slope_is_that_of_jax_which_is_0_for_relu(hidden):
    dtype = "float64"
    model = mlp((3, 5, 2), hidden=hidden)
    with jax.enable_x64(True):
        params, batch = problem(model, dtype)
        first = Dense(params[0].weights, jnp.zeros(5, dtype))
        at_kink = (first, params[1]), Batch(jnp.zeros_like(batch.x), batch.y)  # z = 0 exactly
        gradient = jax.device_get(model.value_and_grad(*at_kink)[1])
        by_jax = jax.jit(jax.grad(model.loss_reference))(*at_kink)
    assert leaf_error(gradient, by_jax) <= GRADIENT[dtype]
    assert not np.any(gradient[0].weights)
    assert np.any(gradient[0].biases) == (hidden != "relu")
    assert not np.any(gradient[1].weights)
    assert np.all(gradient[1].biases)
