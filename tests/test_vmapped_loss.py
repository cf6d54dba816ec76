"""`jax.vmap(model.loss)`: one loss, whatever the width, the layout and the way it is called."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from output_losses import PAIRS
from test_activations import VALUES as ACTIVATE
from test_losses import ENTRIES
from tolerances import FORWARD, GRADIENT, float32, leaf_error

from jaxnn.batch import Batch
from jaxnn.model import vmapped_loss as candidates
from jaxnn.model.activations import HIDDEN_ACTIVATIONS
from jaxnn.model.layers import Dense, layer_shapes
from jaxnn.model.mlp import mlp

EXHAUSTIVE, SLOW = pytest.mark.exhaustive, pytest.mark.slow
SMALL, LARGE = (3, 5, 2), (3, 12, 8, 2)  # 32 and 170 weights
WIDE = (45, 3, 2)  # 146 weights, 143 without biases, and little to compile
FEW = [("softmax", "categorical_crossentropy"), ("sigmoid", "binary_crossentropy")]
ONE = [FEW[0], pytest.param(FEW[1], marks=SLOW)]
MANY = (0, None)


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
    numbers = float32(rng.normal(0.3, 1.0, shape))
    y = {
        "binary_crossentropy": rng.integers(0, 2, shape),
        "categorical_crossentropy": rng.integers(0, shape[1], rows),
    }
    x = float32(rng.normal(0.5, 1.0, (rows, model.settings.sizes[0])))
    return Batch(x, y.get(model.settings.loss, numbers))


def one_of(population, index):
    return jax.tree.map(lambda leaf: leaf[index], population)


def numpy_losses(model, population, batch):
    """The loss of every candidate by NumPy and SciPy, in float64."""
    _, hidden, output, loss, _ = model.settings
    z, y = np.asarray(batch.x, np.float64), np.asarray(batch.y)
    for layer, (weights, biases) in enumerate(population):
        z = z @ np.asarray(weights, np.float64)
        z = z if biases is None else z + np.asarray(biases, np.float64)[:, None]
        z = ACTIVATE[hidden](z) if layer < len(population) - 1 else z
    if loss == "categorical_crossentropy":
        y = np.eye(z.shape[-1])[y] if y.ndim == 1 else y
        return -np.mean(np.sum(y * scipy.special.log_softmax(z, axis=-1), axis=-1), axis=-1)
    if loss == "binary_crossentropy":
        return np.mean(np.logaddexp(0, z) - y * z, axis=(1, 2))
    return np.mean(ENTRIES[loss](ACTIVATE[output](z) - y), axis=(1, 2))


def network(index, sizes, pair):
    hidden = HIDDEN_ACTIVATIONS[index % len(HIDDEN_ACTIVATIONS)]
    biases = index % 3 > 0
    return mlp(sizes, hidden=hidden, output=pair[0], loss=pair[1], hidden_biases=biases)


LAYOUTS = {"plain": (SMALL, 3, 11), "by scalars": (SMALL, 257, 23), "by rows": (WIDE, 16, 9)}


def marks_of(index, place):
    """Each pair is in one layout in the quick tier, but few of those that are slow to compile."""
    if PAIRS[index] in FEW or (place == index % 3 and place != 1):
        return []
    return SLOW if place == index % 3 else EXHAUSTIVE


@pytest.mark.parametrize(
    ("index", "layout"),
    [
        pytest.param(
            index, layout, id=f"{'-'.join(pair)}, {layout}",
            marks=marks_of(index, place),
        )
        for index, pair in enumerate(PAIRS) for place, layout in enumerate(LAYOUTS)
    ],
)  # fmt: skip
def test_every_loss_in_every_layout_is_numpys(index, layout):
    sizes, width, rows = LAYOUTS[layout]
    model = network(index, sizes, PAIRS[index])
    given = draw_population(model, width), draw_batch(model, rows)
    losses = jax.jit(jax.vmap(model.loss, MANY))(*given)
    assert losses.dtype == np.float32
    assert leaf_error(losses, numpy_losses(model, *given)) <= FORWARD["float32"]


def test_hidden_layers_as_products_are_numpys(monkeypatch):
    """As elsewhere than on CPUs."""
    monkeypatch.setattr(candidates, "MAX_WRITTEN_OUT", 0)
    model = mlp((3, 12, 8, 4), hidden="tanh")
    given = draw_population(model, 16), draw_batch(model, 9)
    function = jax.jit(jax.vmap(model.loss, MANY))
    assert function.trace(*given).lower().as_text().count("stablehlo.dot_general") == 3
    assert leaf_error(function(*given), numpy_losses(model, *given)) <= FORWARD["float32"]


@pytest.mark.parametrize("sizes", [SMALL, pytest.param(LARGE, marks=EXHAUSTIVE)])
@pytest.mark.parametrize("pair", ONE)
@pytest.mark.parametrize("width", [16, pytest.param(3, marks=EXHAUSTIVE)])
def test_accuracy_of_many_is_that_of_each(sizes, pair, width):
    model = mlp(sizes, output=pair[0], loss=pair[1])
    population, batch = draw_population(model, width), draw_batch(model, 11)
    weights, biases = population[-1]
    assert biases is not None
    weights[0, 0, 0] = np.nan  # never right
    weights[1], biases[1] = 0, 0  # all outputs alike
    shares = jax.vmap(model.accuracy, MANY)(population, batch)
    each = [model.accuracy(one_of(population, i), batch) for i in range(width)]
    np.testing.assert_array_equal(shares, each)
    assert len(np.unique(shares)) >= 3
    with jax.enable_x64(True):
        wide = jax.eval_shape(
            jax.vmap(model.accuracy, MANY), jax.tree.map(np.float64, population), batch
        )
    assert wide.dtype == shares.dtype == np.float32


def test_in_float64():
    model = mlp((2, 3, 2), hidden="tanh")
    population, batch = draw_population(model, 17, "float64"), draw_batch(model, 3)
    with jax.enable_x64(True):
        losses = jax.vmap(model.loss, MANY)(population, batch)
    assert losses.dtype == np.float64
    assert leaf_error(losses, numpy_losses(model, population, batch)) <= FORWARD["float64"]


@pytest.mark.parametrize(
    ("sizes", "width", "layout"),
    [
        (SMALL, 16, "by scalars"),
        (SMALL, 15, "plain"),
        (LARGE, 16, "by rows"),
        (LARGE, 15, "plain"),
        ((15, 4), 16, "by scalars"),
        ((16, 4), 16, "by rows"),
        ((9, 16), 16, "by rows"),
        ((3, 17), 16, "plain"),
    ],
)
def test_the_layout_goes_by_weights_outputs_and_width(sizes, width, layout):
    model = mlp(sizes)
    population, batch = draw_population(model, width), draw_batch(model, 10)
    traced = jax.jit(jax.vmap(model.loss, MANY)).trace(population, batch)
    text = str(traced.jaxpr)
    assert ("scan" in text) == (layout == "by scalars")
    assert ("name=_pad" in text) == (layout == "by rows")
    assert ("logsumexp" in text or "reduce_max" in text) == (layout == "plain")
    for platform in ("cpu", "cuda"):
        multiplies = "dot_general" in traced.lower(lowering_platforms=(platform,)).as_text()
        is_hidden_product = layout == "by rows" and platform == "cuda" and len(sizes) > 2
        assert multiplies == (layout == "plain" or is_hidden_product)


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


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ((2, 3, 3), "classes"),
        *(pytest.param((2, 3, 3), kind, marks=SLOW) for kind in KINDS if kind != "classes"),
        *(pytest.param((2, 16, 16, 3), kind, marks=EXHAUSTIVE) for kind in KINDS),
        ((40, 3, 3), "weights"),
    ],
)
def test_every_way_to_the_loss_agrees_and_makes_nan_of_targets_without_a_meaning(sizes, kind):
    model = mlp(sizes, hidden="tanh", output=KINDS[kind][0], loss=KINDS[kind][1])
    population = draw_population(model, 16)
    x = float32(np.random.default_rng(9).normal(0.5, 1.0, (11, sizes[0])))

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

    y = draw_targets(kind, 11)
    values, gradient, by_jax = in_every_way(population, Batch(x, y))
    expected = numpy_losses(model, population, Batch(x, y))
    for way, got in values.items():
        wanted = expected[[0, 0]] if way == "rows backwards" else expected[: len(got)]
        assert leaf_error(np.stack(got), wanted) <= FORWARD["float32"], way
    assert leaf_error(gradient, by_jax) <= GRADIENT["float32"]
    if kind == "classes":
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
POPULATION, BATCHES = draw_population(MODEL, 24), [draw_batch(MODEL, 7, i) for i in range(24)]
BATCH, STACK = BATCHES[0], jax.tree.map(lambda *leaves: np.stack(leaves), *BATCHES)
LAST = jax.tree.map(lambda leaf: np.moveaxis(leaf, 0, -1), POPULATION)
GRID = jax.tree.map(lambda leaf: leaf.reshape(4, 6, *leaf.shape[1:]), POPULATION)
SHARED = (POPULATION[0], one_of(POPULATION, 0)[1])
AXIS: Any = 0
NO_AXIS: Any = None
FIRST_LAYER = ((Dense(AXIS, AXIS), Dense(NO_AXIS, NO_AXIS)), None)
# Of each candidate on each batch.
TABLE = np.stack([numpy_losses(MODEL, POPULATION, batch) for batch in BATCHES], axis=1)
ONE_LAST = (POPULATION[0], jax.tree.map(lambda leaf: leaf[:1], POPULATION[1]))

OTHER_MAPS = {
    "last axis": (lambda f: jax.vmap(f, (-1, None))(LAST, BATCH), TABLE[:, 0]),
    "batches as well": (lambda f: jax.vmap(f, (0, 0))(POPULATION, STACK), np.diag(TABLE)),
    "batches alone": (lambda f: jax.vmap(f, (None, 0))(one_of(POPULATION, 3), STACK), TABLE[3]),
    "one layer alone": (
        lambda f: jax.vmap(f, FIRST_LAYER)(SHARED, BATCH),
        numpy_losses(MODEL, ONE_LAST, BATCH),
    ),
    "nested": (
        lambda f: jax.vmap(jax.vmap(f, MANY), MANY)(GRID, BATCH),
        TABLE[:, 0].reshape(4, 6),
    ),
    "batches around": (
        lambda f: jax.vmap(jax.vmap(f, MANY), (None, 0))(POPULATION, STACK),
        TABLE.T,
    ),
    "params around": (lambda f: jax.vmap(jax.vmap(f, (None, 0)), MANY)(POPULATION, STACK), TABLE),
    "in chunks": (
        lambda f: jax.lax.map(lambda p: f(p, BATCH), POPULATION, batch_size=16),
        TABLE[:, 0],
    ),
    "one by one": (lambda f: jax.lax.map(lambda p: f(p, BATCH), POPULATION), TABLE[:, 0]),
}


@pytest.mark.parametrize(("call", "expected"), OTHER_MAPS.values(), ids=OTHER_MAPS)
def test_other_ways_to_map(call, expected):
    assert np.ptp(expected) > 0.1
    assert leaf_error(jax.jit(lambda: call(MODEL.loss))(), expected) <= FORWARD["float32"]


@pytest.mark.parametrize("pair", ONE, ids="-".join)
def test_gradients_of_many(pair):
    model = mlp((2, 3, 2), hidden="sigmoid", output=pair[0], loss=pair[1])
    population, batch = draw_population(model, 16), draw_batch(model, 4)

    @jax.jit
    def in_every_way(population):
        return (
            jax.vmap(model.value_and_grad, MANY)(population, batch)[1],
            jax.vmap(jax.grad(model.loss), MANY)(population, batch),
            jax.grad(lambda p: jnp.sum(jax.vmap(model.loss, MANY)(p, batch)))(population),
            jax.vmap(jax.grad(model.loss_reference), MANY)(population, batch),
        )

    by_hand, of_grad, of_map, expected = in_every_way(population)
    for got in (by_hand, of_grad, of_map):
        assert leaf_error(got, expected) <= GRADIENT["float32"]


@pytest.mark.parametrize("pair", ONE, ids="-".join)
def test_logits_of_ten_thousand(pair):
    model = mlp((1, 2), output=pair[0], loss=pair[1])
    weights = float32(np.linspace(-1e4, 1e4, 17))
    weights = float32(np.stack([weights, -weights], 1)[:, None])
    population = (Dense(weights, float32(np.zeros((17, 2)))),)
    batch = Batch(float32([[1], [1], [-1]]), np.eye(2)[[0, 1, 1]])
    losses = jax.vmap(model.loss, MANY)(population, batch)
    assert leaf_error(losses, numpy_losses(model, population, batch)) <= FORWARD["float32"]
    assert losses[0] > 1e3
    slopes = jax.vmap(jax.grad(model.loss), MANY)(population, batch)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize(("leaf", "bad"), [(0, np.nan), (1, np.inf), (2, np.inf), (3, np.nan)])
def test_a_broken_candidate_breaks_its_own_loss_alone(leaf, bad):
    leaves, tree = jax.tree.flatten(jax.tree.map(np.copy, POPULATION))
    leaves[leaf][9] = bad
    losses = MAPPED(jax.tree.unflatten(tree, leaves), BATCH)
    assert np.flatnonzero(~np.isfinite(losses)).tolist() == [9]
    others = np.arange(24) != 9
    np.testing.assert_array_equal(losses[others], MAPPED(POPULATION, BATCH)[others])


@pytest.mark.parametrize(
    ("sizes", "pair"),
    [((1, 13), FEW[1]), *(pytest.param((9, 16), pair, marks=EXHAUSTIVE) for pair in FEW)],
)
def test_many_outputs_do_not_overflow_the_product_of_factors(sizes, pair):
    model = mlp(sizes, output=pair[0], loss=pair[1])
    population = jax.tree.map(lambda leaf: 0.01 * leaf, draw_population(model, 16))
    batch = draw_batch(model, candidates.ROWS_PER_BLOCK + 1)
    losses = jax.vmap(model.loss, MANY)(population, batch)
    assert leaf_error(losses, numpy_losses(model, population, batch)) <= FORWARD["float32"]


def test_losses_are_the_same_bits_at_every_wide_width():
    widest = draw_population(MODEL, 64)
    losses = MAPPED(widest, BATCH)
    for width in (16, 32):  # DESIGN: 16, 32 and 64 agree; 1, 4 and 8 do not
        some = jax.tree.map(lambda leaf, n=width: leaf[:n], widest)
        np.testing.assert_array_equal(MAPPED(some, BATCH), losses[:width])
