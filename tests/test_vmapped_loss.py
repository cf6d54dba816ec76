"""`jax.vmap(model.loss)`: one loss, whatever the width, the layout and the way it is called."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FORWARD, GRADIENT, float32, leaf_error

from jaxnn.batch import Batch
from jaxnn.model import vmapped_loss as candidates
from jaxnn.model.activations import HIDDEN_ACTIVATIONS
from jaxnn.model.layers import Dense, layer_shapes
from jaxnn.model.losses import OUTPUT_LOSSES
from jaxnn.model.mlp import mlp

SMALL, LARGE, OUTPUTS = (3, 5, 2), (3, 12, 8, 2), 2  # 32 and 170 weights
LARGER = (2, 40, 40, 2)  # with a matrix product
WIDTHS, ROWS = (1, 15, 16, 64, 257), (1, 9, 10, 11, 23)
PRODUCT = list(enumerate(itertools.product((SMALL, LARGE), OUTPUT_LOSSES, WIDTHS, ROWS)))
SAMPLE = PRODUCT[::31]
FEW = [("softmax", "categorical_crossentropy"), ("sigmoid", "binary_crossentropy")]
FEW += [("identity", "mean_squared_error"), ("softmax", "mean_squared_error")]
MANY = (0, None)


def name_of(case):
    _, (sizes, pair, width, rows) = case
    return f"{'large' if sizes == LARGE else 'small'}-{'-'.join(pair)}-{width}-{rows}"


def draw_population(model, width, dtype="float32", seed=8):
    """`width` candidates as NumPy arrays, which come first; float32 values in either width."""
    rng = np.random.default_rng(seed)

    def draw(shape) -> Any:
        if shape is None:
            return None
        return float32(rng.normal(0.1, 1.4 / np.sqrt(shape[0]), (width, *shape))).astype(dtype)

    shapes = layer_shapes(model.settings.sizes, model.settings.hidden_biases)
    return tuple(Dense(draw(weights), draw(biases)) for weights, biases in shapes)


def draw_batch(model, rows, seed=9):
    rng = np.random.default_rng(seed)
    shape = (rows, model.settings.sizes[-1])
    y = {
        "mean_squared_error": float32(rng.normal(0.3, 1.0, shape)),
        "binary_crossentropy": rng.integers(0, 2, shape),
        "categorical_crossentropy": rng.integers(0, shape[1], rows),
    }
    x = float32(rng.normal(0.5, 1.0, (rows, model.settings.sizes[0])))
    return Batch(x, y[model.settings.loss])


def one_of(population, index):
    return jax.tree.map(lambda leaf: leaf[index], population)


def reference(model, population, batch):
    """`loss_reference` of every candidate, in float64."""
    with jax.enable_x64(True):
        population = jax.tree.map(np.float64, population)
        return np.asarray(jax.jit(jax.vmap(model.loss_reference, MANY))(population, batch))


def check_case(case):
    index, (sizes, (output, loss), width, rows) = case
    model = mlp(
        sizes,
        hidden=HIDDEN_ACTIVATIONS[index % 4],
        output=output,
        loss=loss,
        hidden_biases=index % 3 > 0,
    )
    population, batch = draw_population(model, width), draw_batch(model, rows)
    mapped = jax.vmap(model.loss, MANY)
    ways = {
        "eager": mapped(population, batch),
        "jit": jax.jit(mapped)(population, batch),
        "loop": np.array([model.loss(one_of(population, i), batch) for i in range(width)]),
    }
    expected = reference(model, population, batch)
    for way, losses in ways.items():
        assert losses.dtype == np.float32, way
        assert leaf_error(losses, expected) <= FORWARD["float32"], way


def test_the_sample_holds_every_choice():
    for position, choices in enumerate(((SMALL, LARGE), OUTPUT_LOSSES, WIDTHS, ROWS)):
        assert {case[position] for _, case in SAMPLE} == set(choices)
    assert {index % 4 for index, _ in SAMPLE} == set(range(4))


@pytest.mark.parametrize("case", SAMPLE, ids=name_of)
def test_loop_eager_jit_and_reference_agree(case):
    check_case(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", PRODUCT, ids=name_of)
def test_loop_eager_jit_and_reference_agree_everywhere(case):
    check_case(case)


@pytest.mark.parametrize("sizes", [SMALL, pytest.param(LARGE, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("pair", FEW[:2])
@pytest.mark.parametrize("width", [16, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_accuracy_of_many_is_that_of_each(sizes, pair, width):
    model = mlp(sizes, output=pair[0], loss=pair[1])
    population, batch = draw_population(model, width), draw_batch(model, 23)
    weights, biases = population[-1]
    assert biases is not None
    weights[0, 0, 0] = np.nan  # never right
    weights[1], biases[1] = 0, 0  # all outputs alike
    shares = jax.vmap(model.accuracy, MANY)(population, batch)
    each = [model.accuracy(one_of(population, i), batch) for i in range(width)]
    np.testing.assert_array_equal(shares, each)
    assert len(np.unique(shares)) >= 3
    with jax.enable_x64(True):
        wide = jax.vmap(model.accuracy, MANY)(jax.tree.map(np.float64, population), batch)
    assert wide.dtype == shares.dtype == np.float32


@pytest.mark.parametrize("pair", FEW[:2], ids="-".join)
def test_in_float64(pair):
    model = mlp(SMALL, hidden="tanh", output=pair[0], loss=pair[1])
    population, batch = draw_population(model, 17, "float64"), draw_batch(model, 7)
    with jax.enable_x64(True):
        losses = jax.vmap(model.loss, MANY)(population, batch)
    assert losses.dtype == np.float64
    assert leaf_error(losses, reference(model, population, batch)) <= FORWARD["float64"]


@pytest.mark.parametrize(
    ("sizes", "width", "layout"),
    [
        (SMALL, 16, "by scalars"),
        (SMALL, 15, "plain"),
        (LARGE, 16, "by rows"),
        (LARGE, 15, "plain"),
        ((31, 4), 16, "by scalars"),
        ((32, 4), 16, "by rows"),
        ((9, 16), 16, "by rows"),
        ((2, 40, 40, 3), 16, "by rows"),
        ((90, 12), 16, "by rows"),
        ((3, 17), 16, "plain"),
        ((9, 17), 16, "plain"),
    ],
)
def test_the_layout_goes_by_weights_outputs_and_width(sizes, width, layout):
    model = mlp(sizes)
    population, batch = draw_population(model, width), draw_batch(model, 23)
    text = str(jax.make_jaxpr(jax.vmap(model.loss, MANY))(population, batch))
    assert ("scan" in text) == (layout == "by scalars")
    assert ("name=_pad" in text) == (layout == "by rows")
    assert ("dot_general" in text) == (layout == "plain" or max(sizes) > 32)
    assert ("logsumexp" in text or "reduce_max" in text) == (layout == "plain")


KINDS = {
    "classes": ("softmax", "categorical_crossentropy"),
    "one-hot": ("softmax", "categorical_crossentropy"),
    "weights": ("softmax", "categorical_crossentropy"),
    "soft bits": ("sigmoid", "binary_crossentropy"),
    "numbers": ("identity", "mean_squared_error"),
}
NONSENSE = {
    "classes": [3, 7, -1],
    "one-hot": [[0, -1, 0], [0, 0, 0]],
    "weights": [[1, -0.1, 0], [0, 0, 0], [np.nan, 1, 0], [np.inf, 0, 0]],
    "soft bits": [[0, 1.5, 0], [0, 1, -0.1], [0, np.nan, 0], [2, 1, 2]],
    "numbers": [[0, np.nan, 0], [np.inf, 0, 0]],
}


def draw_targets(kind, rows, seed=10):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, rows)
    return {
        "classes": classes,
        "one-hot": np.eye(3, dtype=np.int32)[classes],
        "weights": float32(rng.random((rows, 3)) * (rng.random((rows, 3)) < 0.7) + 0.01),
        "soft bits": float32(rng.random((rows, 3))),
        "numbers": float32(rng.normal(0.3, 1.0, (rows, 3))),
    }[kind]


BY_ROWS = [pytest.param((2, 16, 16, 3), kind, marks=pytest.mark.exhaustive) for kind in KINDS]


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [*(((2, 3, 3), kind) for kind in KINDS), ((2, 16, 16, 3), "weights"), *BY_ROWS],
)
def test_every_way_to_the_loss_agrees_and_makes_nan_of_targets_without_a_meaning(sizes, kind):
    model = mlp(sizes, hidden="tanh", output=KINDS[kind][0], loss=KINDS[kind][1])
    population = draw_population(model, 16)
    x = float32(np.random.default_rng(9).normal(0.5, 1.0, (23, 2)))

    @jax.jit
    def in_every_way(population, batch):
        one, few = one_of(population, 0), jax.tree.map(lambda leaf: leaf[:3], population)
        rows = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), batch)
        value, gradient = model.value_and_grad(one, batch)
        values = {
            "loss": [model.loss(one, batch)],
            "by hand": [value],
            "reference": [model.loss_reference(one, batch)],
            "few": jax.vmap(lambda p: model.loss(p, batch))(few),
            "many": jax.vmap(lambda p, b: model.loss(p, b), MANY)(population, batch),
            "rows backwards": jax.vmap(model.loss, (None, 0))(one, rows),
        }
        return values, gradient, jax.grad(model.loss_reference)(one, batch)

    y = draw_targets(kind, 23)
    values, gradient, by_jax = in_every_way(population, Batch(x, y))
    expected = reference(model, population, Batch(x, y))
    for way, got in values.items():
        wanted = expected[[0, 0]] if way == "rows backwards" else expected[: len(got)]
        assert leaf_error(np.stack(got), wanted) <= FORWARD["float32"], way
    assert leaf_error(gradient, by_jax) <= GRADIENT["float32"]
    if kind != "one-hot":
        eager = model.loss(one_of(population, 0), Batch(x, y))
        assert leaf_error(eager, expected[0]) <= FORWARD["float32"]
    for row in NONSENSE[kind]:
        bad = np.array(y, y.dtype)
        bad[-1] = row
        values, gradient, _ = in_every_way(population, Batch(x, bad))
        for way, got in values.items():
            assert np.isnan(got).all(), way
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(gradient))


MODEL = mlp(SMALL)
MAPPED = jax.jit(jax.vmap(MODEL.loss, MANY))
POPULATION, BATCH = draw_population(MODEL, 24), draw_batch(MODEL, 7)
LAST = jax.tree.map(lambda leaf: np.moveaxis(leaf, 0, -1), POPULATION)
GRID = jax.tree.map(lambda leaf: leaf.reshape(4, 6, *leaf.shape[1:]), POPULATION)
SHARED = (POPULATION[0], one_of(POPULATION, 0)[1])
AXIS: Any = 0
NO_AXIS: Any = None
FIRST_LAYER = ((Dense(AXIS, AXIS), Dense(NO_AXIS, NO_AXIS)), None)
STACK = jax.tree.map(lambda *a: np.stack(a), *[draw_batch(MODEL, 7, seed) for seed in range(24)])

OTHER_MAPS = {
    "last axis": lambda loss: jax.vmap(loss, (-1, None))(LAST, BATCH),
    "batches as well": lambda loss: jax.vmap(loss, (0, 0))(POPULATION, STACK),
    "batches alone": lambda loss: jax.vmap(loss, (None, 0))(one_of(POPULATION, 3), STACK),
    "one layer alone": lambda loss: jax.vmap(loss, FIRST_LAYER)(SHARED, BATCH),
    "nested": lambda loss: jax.vmap(jax.vmap(loss, MANY), MANY)(GRID, BATCH),
    "batches around": lambda loss: jax.vmap(jax.vmap(loss, MANY), (None, 0))(POPULATION, STACK),
    "params around": lambda loss: jax.vmap(jax.vmap(loss, (None, 0)), MANY)(POPULATION, STACK),
    "in chunks": lambda loss: jax.lax.map(lambda p: loss(p, BATCH), POPULATION, batch_size=16),
    "one by one": lambda loss: jax.lax.map(lambda p: loss(p, BATCH), POPULATION),
}


@pytest.mark.parametrize("name", OTHER_MAPS)
def test_other_ways_to_map(name):
    got = jax.jit(lambda: OTHER_MAPS[name](MODEL.loss))()
    expected = jax.jit(lambda: OTHER_MAPS[name](MODEL.loss_reference))()  # no rule of its own
    assert np.ptp(expected) > 0.1
    assert leaf_error(got, expected) <= FORWARD["float32"]


@pytest.mark.parametrize("pair", FEW[:2], ids="-".join)
def test_gradients_of_many(pair):
    model = mlp(SMALL, hidden="sigmoid", output=pair[0], loss=pair[1])
    population, batch = draw_population(model, 16), draw_batch(model, 7)

    def total(loss):
        return lambda population: jnp.sum(jax.vmap(loss, MANY)(population, batch))

    @jax.jit
    def three_ways(population):
        return (
            jax.vmap(jax.grad(model.loss), MANY)(population, batch),
            jax.grad(total(model.loss))(population),
            jax.grad(total(model.loss_reference))(population),
        )

    of_grad, of_map, expected = three_ways(population)
    _, alone = model.value_and_grad(one_of(population, 5), batch)
    assert leaf_error(of_grad, expected) <= GRADIENT["float32"]
    assert leaf_error(of_map, expected) <= GRADIENT["float32"]
    assert leaf_error(one_of(of_grad, 5), alone) <= GRADIENT["float32"]


@pytest.mark.parametrize(
    "pair", [pair for pair in OUTPUT_LOSSES if pair[1] != "mean_squared_error"], ids="-".join
)
def test_logits_of_ten_thousand(pair):
    model = mlp((1, 2), output=pair[0], loss=pair[1])
    weights = float32(np.linspace(-1e4, 1e4, 17))
    weights = float32(np.stack([weights, -weights], 1)[:, None])
    population = (Dense(weights, float32(np.zeros((17, 2)))),)
    batch = Batch(float32([[1], [1], [-1]]), np.eye(2)[[0, 1, 1]])
    losses = jax.vmap(model.loss, MANY)(population, batch)
    assert leaf_error(losses, reference(model, population, batch)) <= FORWARD["float32"]
    assert losses[0] > 1e3
    slopes = jax.vmap(jax.grad(model.loss), MANY)(population, batch)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("leaf", range(4))
def test_a_broken_candidate_breaks_its_own_loss_alone(leaf, bad):
    leaves, tree = jax.tree.flatten(jax.tree.map(np.copy, POPULATION))
    leaves[leaf][9] = bad
    losses = MAPPED(jax.tree.unflatten(tree, leaves), BATCH)
    assert np.flatnonzero(~np.isfinite(losses)).tolist() == [9]
    others = np.arange(24) != 9
    np.testing.assert_array_equal(losses[others], MAPPED(POPULATION, BATCH)[others])


@pytest.mark.parametrize("pair", FEW[:2], ids="-".join)
@pytest.mark.parametrize("sizes", [(1, 13), pytest.param((9, 16), marks=pytest.mark.exhaustive)])
def test_many_outputs_do_not_overflow_the_product_of_factors(sizes, pair):
    model = mlp(sizes, output=pair[0], loss=pair[1])
    population = jax.tree.map(lambda leaf: 0.01 * leaf, draw_population(model, 16))
    batch = draw_batch(model, 2 * candidates.ROWS_PER_BLOCK + 1)
    losses = jax.vmap(model.loss, MANY)(population, batch)
    assert leaf_error(losses, reference(model, population, batch)) <= FORWARD["float32"]


def test_losses_are_the_same_bits_at_every_wide_width():
    widest = draw_population(MODEL, 64)
    losses = MAPPED(widest, BATCH)
    for width in (16, 32):  # DESIGN: 16, 32 and 64 agree; 1, 4 and 8 do not
        some = jax.tree.map(lambda leaf, n=width: leaf[:n], widest)
        np.testing.assert_array_equal(MAPPED(some, BATCH), losses[:width])
