"""`mlp(...)` and `Model`: values against plain NumPy, the border, and what is compiled when."""

import copy
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import scipy.special
from jax import monitoring
from programs import start_program
from tolerances import FORWARD, GRADIENT, float32, leaf_error

from jaxnn import metrics
from jaxnn.batch import Batch
from jaxnn.descent.gradient_descent import gradient_descent
from jaxnn.model.layers import Dense
from jaxnn.model.losses import OUTPUT_LOSSES
from jaxnn.model.mlp import Model, ModelFunction, mlp
from jaxnn.search.random_search import random_search
from jaxnn.typing import traits_of

ROWS, SIZES = 7, (3, 5, 2)
DTYPES = ("float32", "float64")
RNG = np.random.default_rng(13)
X = float32(RNG.normal(0.5, 1.5, (ROWS, 3)))
CLASSES = np.array([1, 0, 0, 1, 0, 1, 1])
ONE_HOT = np.eye(2)[CLASSES]
BITS = float32(RNG.integers(0, 2, (ROWS, 2)))
NUMBERS = float32(RNG.normal(-2.0, 3.0, (ROWS, 2)))
PARAMS = tuple(
    Dense(float32(RNG.normal(0.2, 0.9, (i, o))), float32(RNG.normal(0.5, 1.0, o)))
    for i, o in ((3, 5), (5, 2))
)
TARGETS = {
    "mean_squared_error": NUMBERS,
    "binary_crossentropy": BITS,
    "categorical_crossentropy": CLASSES,
}
CATEGORICAL, BINARY, SQUARED = (
    "categorical_crossentropy",
    "binary_crossentropy",
    "mean_squared_error",
)
BATCH_FUNCTIONS = ("loss", "value_and_grad", "loss_reference", "accuracy")

ACTIVATE = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "sigmoid": scipy.special.expit,
    "tanh": np.tanh,
    "softmax": lambda z: scipy.special.softmax(z, axis=1),
}


def numpy_outputs(params, x, hidden, output):
    for layer, (weights, biases) in enumerate(params):
        x = x.astype(float) @ weights.astype(float) + biases.astype(float)
        x = ACTIVATE[output if layer == len(params) - 1 else hidden](x)
    return x


def numpy_loss(outputs, targets, loss):
    if loss == "mean_squared_error":
        return np.mean((outputs - targets) ** 2)
    if loss == "binary_crossentropy":
        return -np.mean(targets * np.log(outputs) + (1 - targets) * np.log(1 - outputs))
    return -np.mean(np.log(outputs[np.arange(len(outputs)), targets]))


def put(array, index, value):
    copy = np.array(array, np.result_type(array, np.asarray(value)))
    copy[index] = value
    return copy


@pytest.fixture
def compilations():
    """A list that grows with whatever JAX traces, lowers or compiles."""
    events = []

    def listen(event, duration_secs, **_):
        if event.startswith("/jax/core/compile"):
            events.append((event, duration_secs))

    monitoring.register_event_duration_secs_listener(listen)
    yield events
    monitoring.unregister_event_duration_listener(listen)


# What a model computes.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", OUTPUT_LOSSES, ids="-".join)
def test_outputs_and_losses_are_numpys(head, dtype):
    (output, loss), y = head, TARGETS[head[1]]
    model = mlp(SIZES, hidden="tanh", output=output, loss=loss)
    expected = numpy_outputs(PARAMS, X, "tanh", output)

    @jax.jit
    def everything(params, batch):
        value, _ = model.value_and_grad(params, batch)
        losses = model.loss(params, batch), model.loss_reference(params, batch), value
        return model.apply(params, batch.x), losses

    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
        outputs, losses = everything(params, Batch(X, y))
    assert outputs.dtype == dtype
    assert outputs.shape == (ROWS, 2)
    assert leaf_error(outputs, expected) <= FORWARD[dtype]
    for value in losses:
        assert value.dtype == dtype
        assert value.shape == ()
        assert leaf_error(value, numpy_loss(expected, y, loss)) <= FORWARD[dtype]


def test_the_answer_is_yes():
    # worked figures: 52.65 %
    model = mlp((3, 2, 2), hidden="sigmoid")
    params = (
        Dense(float32([[0.3, 0.6], [0.8, 0.4], [0.1, 0.5]]), float32([1, 1])),
        Dense(float32([[0.1, 0.5], [0.7, 0.2]]), float32([1, 1])),
    )
    outputs = model.apply(params, float32([[0.29, 0.11, 0.80]]))
    np.testing.assert_allclose(outputs, [[0.52647369, 0.47352631]], rtol=FORWARD["float32"])


def test_a_uniform_prediction():
    # worked figures: loss ln 3 = 1.098612, accuracy 1/3
    model = mlp((2, 4, 3))
    params = jax.tree.map(np.zeros_like, model.init(jax.random.key(0)))
    batch = Batch(X[:6, :2], np.array([0, 1, 2, 2, 1, 0]))
    assert float(model.loss(params, batch)) == pytest.approx(np.log(3), rel=FORWARD["float32"])
    assert float(model.accuracy(params, batch)) == pytest.approx(1 / 3, rel=FORWARD["float32"])


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (X, ONE_HOT),
        (X, ONE_HOT.astype(np.float16)),
        (X, CLASSES.astype(np.uint8)),
        (X.astype(np.float64), CLASSES),
        (jnp.asarray(X), jnp.asarray(CLASSES)),
        (X.tolist(), CLASSES.tolist()),
        (X.astype(">f4"), CLASSES.astype(">i4")),
        (X.astype(np.longdouble), ONE_HOT.astype(">f8")),
    ],
)
def test_batches_that_mean_the_same_give_the_same_bits(x, y):
    model = mlp(SIZES)
    expected = model.value_and_grad(PARAMS, Batch(X, CLASSES))
    got = model.value_and_grad(PARAMS, Batch(x, y))
    assert leaf_error(got, expected) == 0


def test_pandas_frames_are_batches_for_every_function():
    pandas = pytest.importorskip("pandas")
    model, batch = mlp(SIZES), Batch(X, CLASSES)
    same = Batch(pandas.DataFrame(X, columns=["a", "b", "c"]), pandas.Series(CLASSES))
    for name in BATCH_FUNCTIONS:
        function = getattr(model, name)
        assert leaf_error(function(PARAMS, same), function(PARAMS, batch)) == 0
    assert leaf_error(model.apply(PARAMS, same.x), model.apply(PARAMS, X)) == 0


@pytest.mark.parametrize("convert", [np.float64, np.longdouble, lambda leaf: leaf.tolist()])
def test_params_that_round_to_float32_are_params_for_every_function(convert):
    model, batch, params = mlp(SIZES), Batch(X, CLASSES), jax.tree.map(convert, PARAMS)
    for name in BATCH_FUNCTIONS:
        function = getattr(model, name)
        assert leaf_error(function(params, batch), function(PARAMS, batch)) == 0
    assert leaf_error(model.apply(params, X), model.apply(PARAMS, X)) == 0


def same_batches():
    yield Batch(X.tolist(), CLASSES.tolist())
    yield Batch(X.astype(">f8"), CLASSES.astype(">i2"))
    yield Batch(X.astype(np.longdouble), tuple(CLASSES.tolist()))
    pandas = pytest.importorskip("pandas")
    yield Batch(pandas.DataFrame(X), pandas.Series(CLASSES))


def test_the_trainers_take_what_the_functions_take():
    model, key = mlp(SIZES), jax.random.key(0)
    expected = model.loss(PARAMS, Batch(X, CLASSES))
    as_lists = jax.tree.map(lambda leaf: leaf.tolist(), PARAMS)
    as_big_endian = jax.tree.map(lambda leaf: leaf.astype(">f8"), PARAMS)

    def wrapped(params, batch):
        return model.value_and_grad(params, batch)

    for batch, params in zip(same_batches(), (as_lists, as_big_endian) * 2, strict=True):
        for function in (model.value_and_grad, wrapped):
            given = key, function, params, batch
            result = gradient_descent(*given, learning_rate=0.1, num_epochs=0)
            assert result.loss == pytest.approx(float(expected), rel=FORWARD["float32"])
            assert leaf_error(result.params, PARAMS) == 0


def test_integer_params_are_refused_by_the_trainers_with_the_conversion():
    model, whole = mlp(SIZES), jax.tree.map(lambda leaf: leaf.astype(int), PARAMS)
    given = jax.random.key(0), model.value_and_grad, whole, Batch(X, CLASSES)
    with pytest.raises(TypeError, match=r"^params must be floats .* at params\[0\]\.weights: jax"):
        gradient_descent(*given, learning_rate=0.1, num_epochs=0)


def test_integer_inputs_are_numbers():
    model, x = mlp(SIZES), np.arange(21).reshape(7, 3) - 9
    same = Batch(float32(x), CLASSES)
    assert model.loss(PARAMS, Batch(x, CLASSES)) == model.loss(PARAMS, same)


@pytest.mark.parametrize(("rows", "features"), [(1, 3), (7, 1), (1, 1)])
def test_one_row_and_one_feature(rows, features):
    model = mlp((features, 5, 2))
    params = (Dense(PARAMS[0].weights[:features], PARAMS[0].biases), PARAMS[1])
    x, y = X[:rows, :features], CLASSES[:rows]
    value, gradient = model.value_and_grad(params, Batch(x, y))
    expected = numpy_loss(numpy_outputs(params, x, "relu", "softmax"), y, model.settings.loss)
    assert leaf_error(value, expected) <= FORWARD["float32"]
    by_jax = jax.grad(model.loss_reference)(params, Batch(x, y))
    assert leaf_error(gradient, by_jax) <= GRADIENT["float32"]


def test_accuracy_of_classes_and_of_bits():
    outputs = numpy_outputs(PARAMS, X, "relu", "softmax")
    expected = np.mean(np.argmax(outputs, axis=1) == CLASSES)
    got = float(mlp(SIZES).accuracy(PARAMS, Batch(X, CLASSES)))
    assert 0 < expected < 1
    assert got == pytest.approx(expected, rel=FORWARD["float32"])
    outputs = numpy_outputs(PARAMS, X, "relu", "sigmoid")
    model = mlp(SIZES, output="sigmoid", loss="binary_crossentropy")
    expected = np.mean((outputs > 0.5) == (BITS == 1))
    assert 0 < expected < 1
    got = float(model.accuracy(PARAMS, Batch(X, BITS)))
    assert got == pytest.approx(expected, rel=FORWARD["float32"])


def test_there_is_no_accuracy_of_numbers(compilations):
    model = mlp(SIZES, output="identity", loss="mean_squared_error")
    for refuse in (model.accuracy, traits_of(model.accuracy).validate):
        with pytest.raises(
            ValueError, match=r"accuracy must be of classes.*use jaxnn\.metrics\.r2"
        ):
            refuse(PARAMS, Batch(X, NUMBERS))
    assert compilations == []
    r2 = metrics.r2(model.apply(PARAMS, X), NUMBERS)  # the advice runs as written
    assert r2 < 1


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("loss", ["binary_crossentropy", "categorical_crossentropy"])
def test_logits_of_ten_thousand_give_a_true_loss_and_a_finite_gradient(loss, dtype):
    output = "sigmoid" if loss == "binary_crossentropy" else "softmax"
    model = mlp((2, 2), output=output, loss=loss)
    rows = np.array([[1e4, -1e4], [-1e4, 1e4], [1e4, -1e4], [1e4, 1e4]])
    right = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    entries = np.where(right == 1, np.maximum(-rows, 0), np.maximum(rows, 0))
    picked = rows[np.arange(4), right.argmax(axis=1)]
    row_losses = np.logaddexp(rows[:, 0], rows[:, 1]) - picked
    expected = entries.mean() if output == "sigmoid" else row_losses.mean()
    with jax.enable_x64(dtype == "float64"):
        params = (Dense(jnp.eye(2, dtype=dtype), jnp.zeros(2, dtype)),)
        value, gradient = model.value_and_grad(params, Batch(rows, right))
        loss_alone = model.loss(params, Batch(rows, right))
        by_jax = jax.grad(model.loss_reference)(params, Batch(rows, right))
    assert leaf_error(value, expected) <= FORWARD[dtype]
    assert leaf_error(loss_alone, expected) <= FORWARD[dtype]
    assert leaf_error(gradient, by_jax) <= GRADIENT[dtype]
    delta = (ACTIVATE[output](rows) - right) / (8 if output == "sigmoid" else 4)
    assert leaf_error(gradient[0].biases, delta.sum(axis=0)) <= GRADIENT[dtype]


@pytest.mark.parametrize("leaf", range(4))
def test_nan_anywhere_in_the_params_is_nan_in_the_loss(leaf):
    leaves, tree = jax.tree.flatten(jax.tree.map(np.copy, PARAMS))
    leaves[leaf].flat[1] = np.nan
    broken, batch = jax.tree.unflatten(tree, leaves), Batch(X, CLASSES)
    model = mlp(SIZES)
    assert np.isnan(model.loss(broken, batch))
    value, gradient = model.value_and_grad(broken, batch)
    assert np.isnan(value)
    assert any(np.any(np.isnan(g)) for g in jax.tree.leaves(gradient))


def test_a_line_around_the_loss_does_not_train_on_labels_without_a_meaning():
    model = mlp(SIZES)

    def penalised(params, batch):
        return model.loss(params, batch) + 0.01 * sum(map(jnp.sum, jax.tree.leaves(params)))

    for labels in (CLASSES + 1, CLASSES - 1):
        given = jax.random.key(0), penalised, model.sampler(), Batch(X, labels)
        found = random_search(*given, num_candidates=20)
        assert found.loss == np.inf
        assert found.num_nonfinite == 20


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_inputs_that_are_not_finite_are_nan_where_their_values_are_not_known(bad):
    model, batch = mlp(SIZES, hidden="tanh"), Batch(put(X, (3, 1), np.float32(bad)), CLASSES)
    value, (first, _) = jax.jit(model.value_and_grad)(PARAMS, batch)
    assert np.isnan(value)
    assert np.isnan(first.weights).all()
    assert np.isnan(jax.jit(model.loss)(PARAMS, batch))


@pytest.mark.exhaustive
def test_loss_reference_has_second_derivatives():
    model = mlp(SIZES, hidden="tanh")
    batch, step = Batch(X, CLASSES), 1e-5
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, PARAMS)

        def at(biases):
            return (Dense(params[0].weights, biases), params[1])

        start = jnp.asarray(params[0].biases)
        hessian = jax.hessian(lambda b: model.loss_reference(at(b), batch))(start)
        slopes = [
            [model.value_and_grad(at(start + sign * move), batch)[1][0].biases for sign in (1, -1)]
            for move in step * np.eye(5)
        ]
    expected = np.array([np.subtract(*pair) / (2 * step) for pair in slopes])
    assert leaf_error(hessian, expected) <= 1e-7  # what central differences can tell


# Transformations, and what is compiled when.


def test_tracers_are_welcome():
    model, batch = mlp(SIZES), Batch(X, CLASSES)
    value, gradient = model.value_and_grad(PARAMS, batch)
    stack = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf, -leaf]), PARAMS)
    twice = jax.tree.map(lambda leaf: 2 * leaf, PARAMS)
    for loss in (model.loss, model.loss_reference):
        assert leaf_error(jax.jit(loss)(PARAMS, batch), value) <= FORWARD["float32"]
        assert leaf_error(jax.grad(loss)(PARAMS, batch), gradient) <= GRADIENT["float32"]
    values, gradients = jax.vmap(model.value_and_grad, (0, None))(stack, batch)
    assert leaf_error(values[1], model.loss(twice, batch)) <= FORWARD["float32"]
    second = jax.tree.map(lambda leaf: leaf[1], gradients)
    assert leaf_error(second, model.value_and_grad(twice, batch)[1]) <= GRADIENT["float32"]
    outputs = jax.jit(model.apply)(PARAMS, X)
    assert leaf_error(outputs, model.apply(PARAMS, X)) <= FORWARD["float32"]
    assert jax.jit(model.accuracy)(PARAMS, batch) == model.accuracy(PARAMS, batch)


@pytest.mark.parametrize("name", BATCH_FUNCTIONS)
def test_shapes_are_refused_while_tracing(name):
    function = getattr(mlp(SIZES), name)
    for batch, argument in (
        (Batch(X[:, :2], CLASSES), r"batch\.x"),
        (Batch(X, CLASSES[:6]), r"batch\.y"),
        (Batch(X, CLASSES[:, None]), r"batch\.y"),
        (Batch(X, CLASSES + 0.5), r"batch\.y"),
    ):
        with pytest.raises(ValueError, match=f"^{argument} must be"):
            jax.jit(function)(PARAMS, batch)
    too_deep = jax.tree.map(lambda leaf: np.stack([leaf[None]] * 4), PARAMS)
    with pytest.raises(ValueError, match=r"^params\[0\]\.weights must be.*got \(1, 3, 5\)"):
        jax.vmap(function, (0, None))(too_deep, Batch(X, CLASSES))
    with pytest.raises(ValueError, match=r"^batch\.x must be finite"):  # concrete: values too
        jax.jit(lambda p: function(p, Batch(X * np.nan, CLASSES)))(PARAMS)


def test_a_second_call_compiles_nothing(compilations):
    model, (a, b) = mlp((3, 6, 2)), (mlp((3, 6, 2)).sampler(), mlp([3, 6, 2]).sampler(scale=2.0))
    first, second = (jax.tree.map(np.asarray, draw(jax.random.key(1))) for draw in (a, b))

    def use(model, params, x, y):
        for name in BATCH_FUNCTIONS:
            getattr(model, name)(params, Batch(x, y))
        model.apply(params, x)
        jax.grad(model.loss)(params, Batch(x, y))
        jax.vmap(model.loss, (0, None))(
            jax.tree.map(lambda p: np.stack([p] * 16), params), Batch(x, y)
        )

    compilations.clear()
    use(model, first, X, CLASSES)
    assert len(compilations) > 6
    compilations.clear()
    use(mlp([3, 6, 2]), second, 2 * X, 1 - CLASSES)
    assert compilations == []


@pytest.mark.parametrize("as_array", [np.array, jnp.array])
def test_the_callers_arrays_are_left_alone(as_array):
    params, batch = jax.tree.map(as_array, (PARAMS, Batch(X, CLASSES)))
    for leaf in jax.tree.leaves((params, batch)):
        if isinstance(leaf, np.ndarray):
            leaf.flags.writeable = False
    model = mlp(SIZES)
    for name in BATCH_FUNCTIONS:
        getattr(model, name)(params, batch)
    model.apply(params, batch.x)
    jax.grad(model.loss)(params, batch)
    assert leaf_error((params, batch), (PARAMS, Batch(X, CLASSES))) == 0


# The bundle.


def test_the_same_settings_are_the_same_object():
    model = mlp((3, 5, 2), hidden="relu", output="softmax", loss="categorical_crossentropy")
    assert mlp([3, 5, 2]) is model
    assert mlp(tuple(np.array(SIZES))) is model
    assert mlp(SIZES, hidden_biases=True) is model
    assert mlp((3.0, np.float32(5), 2)) is model  # pyright: ignore[reportArgumentType]
    others = [
        mlp((3, 5, 3)),
        mlp((3, 5, 5, 2)),
        mlp(SIZES, hidden="tanh"),
        mlp(SIZES, hidden_biases=False),
        mlp(SIZES, loss="mean_squared_error"),
        mlp(SIZES, loss="mean_squared_error", output="tanh"),
    ]
    assert len({id(other) for other in (model, *others)}) == 7


@pytest.mark.parametrize(
    "model",
    [
        mlp([2, 3, 3]),
        mlp((4, 1), hidden="tanh", output="identity", loss="mean_squared_error"),
        mlp((3, 5, 2), output="sigmoid", loss="binary_crossentropy", hidden_biases=False),
    ],
)
def test_repr_is_the_call_that_builds_it(model):
    assert eval(repr(model)) is model


def test_repr_in_words():
    expected = "mlp((2, 3, 3), hidden='relu', output='softmax', loss='categorical_crossentropy')"
    assert repr(mlp((2, 3, 3))) == expected


def test_a_model_is_immutable_and_its_functions_carry_their_names():
    model = mlp(SIZES)
    assert isinstance(model, Model)
    with pytest.raises(AttributeError):
        model.loss = None  # pyright: ignore[reportAttributeAccessIssue]
    for name in BATCH_FUNCTIONS:
        function = getattr(model, name)
        assert function.__name__ == name
        assert traits_of(function).validate(PARAMS, Batch(X, CLASSES)) is None


def test_wrappers_of_a_function_carry_its_traits():
    model, batch = mlp(SIZES), Batch(X, CLASSES)
    for wrapper in (jax.jit(model.loss), jax.value_and_grad(model.loss)):
        traits = traits_of(wrapper)
        assert traits == traits_of(model.loss)
        assert traits.batch_invariant(PARAMS, batch)
        assert traits.candidate_bytes is not None
        assert traits.candidate_bytes(PARAMS, batch) == 4 * (32 + 10)
        with pytest.raises(ValueError, match=r"^batch\.y must be classes 0 to 1; got -1"):
            traits.validate(PARAMS, Batch(X, CLASSES - 1))
    assert not traits_of(model.accuracy).batch_invariant(PARAMS, batch)


def test_functions_show_their_arguments():
    model = mlp(SIZES)
    assert str(inspect.signature(model.loss)).startswith("(params: ")
    assert list(inspect.signature(model.init).parameters) == ["key", "scale", "distribution"]


def test_functions_are_equal_by_value_and_pickle_as_the_cached_thing():
    model = mlp(SIZES, hidden="tanh")
    assert pickle.loads(pickle.dumps(model)) is model
    assert copy.deepcopy(model) is model
    functions = model[1:]
    for name, function in zip(Model._fields[1:], functions, strict=True):
        assert pickle.loads(pickle.dumps(function)) is function
        assert repr(function) == f"{model!r}.{name}"
    assert len(set(functions)) == len(functions)
    again = ModelFunction(model.settings, "loss")
    assert again == model.loss
    assert hash(again) == hash(model.loss)
    assert mlp(SIZES).loss != model.loss
    other = model._replace(loss=model.loss_reference)
    assert pickle.loads(pickle.dumps(other)) == other


def test_what_was_pickled_computes_the_same_in_another_process(tmp_path):
    model, sample_fn = mlp(SIZES), mlp(SIZES).sampler(scale=2.0, distribution="he")
    batch, key = Batch(X, CLASSES), jax.random.key(4)
    path = tmp_path / "functions.pickle"
    path.write_bytes(pickle.dumps((model, model.loss, model.value_and_grad, sample_fn, batch)))
    program = f"""
import pickle, jax, jaxnn
model, loss, value_and_grad, sample_fn, batch = pickle.load(open({str(path)!r}, "rb"))
assert jaxnn.mlp({SIZES}) is model and model.loss is loss
assert sample_fn.func is model.sampler(distribution="he").func
params = sample_fn(jax.random.key(4))
print(loss(params, batch).item().hex(), value_and_grad(params, batch)[0].item().hex())
"""
    running = start_program("-c", program)
    printed, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
    params = sample_fn(key)
    expected = model.loss(params, batch), model.value_and_grad(params, batch)[0]
    assert printed.split() == [value.item().hex() for value in expected]


# The loss of the best constant answer.

SPREAD = np.array([[0.25, 0.75], [1.0, 0.5], [0.0, 1.0], [0.5, 0.5]])
CONSTANT = [
    (CATEGORICAL, "softmax", np.array([0, 1, 1, 1]), lambda y: np.eye(2)[y]),
    (CATEGORICAL, "softmax", SPREAD, None),
    (BINARY, "sigmoid", SPREAD, None),
    (BINARY, "sigmoid", SPREAD * [0, 1], None),  # an output that is always 0 costs nothing
    (SQUARED, "identity", 7 * SPREAD - 3, None),
    (SQUARED, "relu", SPREAD - [2, 0], None),
    (SQUARED, "sigmoid", SPREAD - [0, 2], None),
    (SQUARED, "tanh", 3 * SPREAD - 6, None),
]


@pytest.mark.parametrize(("loss", "output", "y", "encode"), CONSTANT)
def test_constant_loss_is_the_lowest_of_all_constant_answers(loss, output, y, encode):
    model = mlp((3, 5, 2), output=output, loss=loss)
    rows = encode(y) if encode else y

    def of_constant(logits):
        outputs = ACTIVATE[output](np.tile(logits, (4, 1)))
        if loss == CATEGORICAL:
            return -np.mean(np.sum(rows * np.log(outputs), axis=1))
        return numpy_loss(outputs, rows, loss)

    with np.errstate(divide="ignore", invalid="ignore"):
        lowest = scipy.optimize.minimize(of_constant, [0.1, 0.2], method="Nelder-Mead", tol=1e-12)
    for function in (model.loss, model.value_and_grad, model.loss_reference):
        told = traits_of(function).constant_loss(Batch(X[:4], y))
        assert told == pytest.approx(lowest.fun, abs=1e-6)


def test_constant_loss_is_none_where_no_constant_answer_is_known():
    lowest = traits_of(mlp(SIZES, output="softmax", loss=SQUARED).loss).constant_loss
    assert lowest(Batch(X, NUMBERS)) is None
    assert lowest(Batch(X, ONE_HOT)) == pytest.approx(np.mean(np.var(ONE_HOT, axis=0)), rel=1e-6)
    uniform = jax.tree.map(np.zeros_like, PARAMS)
    batch = Batch(X[:6], np.array([0, 1, 1, 0, 0, 1]))
    assert traits_of(mlp(SIZES).loss).constant_loss(batch) == pytest.approx(np.log(2), rel=1e-12)
    assert mlp(SIZES).loss(uniform, batch) == pytest.approx(np.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((), ValueError, r"^sizes must have at least 2 entries.*got \(\)"),
        ((3,), ValueError, r"^sizes must have at least 2 entries.*got \(3,\)"),
        ((3, 0, 2), ValueError, r"^sizes\[1\] must be an integer of at least 1; got 0"),
        ((-3, 2), ValueError, r"^sizes\[0\] must be.*got -3"),
        ((3, 5.5, 2), TypeError, r"^sizes\[1\] must be.*got 5.5 \(float\)"),
        ((3, True), TypeError, r"^sizes\[1\] must be.*got True"),
        ((3, "5", 2), TypeError, r"^sizes\[1\] must be.*got '5'"),
        ((3, None), TypeError, r"^sizes\[1\] must be.*got None"),
        ("352", TypeError, "^sizes must be a sequence of integers; got a str"),
        (3, TypeError, "^sizes must be a sequence of integers; got a int"),
        (None, TypeError, "^sizes must be a sequence of integers; got a NoneType"),
        ({3, 2}, TypeError, "^sizes must be a sequence of integers; got a set"),
        ((3, 5, 1), ValueError, "^sizes must end in at least 2 for output 'softmax'"),
    ],
)
def test_bad_sizes_are_refused(sizes, error, message):
    with pytest.raises(error, match=message):
        mlp(sizes)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"hidden": "swish"}, ValueError, "^hidden must be one of 'identity', 'relu'.*got 'swish'"),
        ({"hidden": "ReLU"}, ValueError, "^hidden must be one of.*got 'ReLU'"),
        ({"hidden": "softmax"}, ValueError, "^hidden must be one of 'identity'.*got 'softmax'"),
        ({"hidden": jnp.tanh}, TypeError, "^hidden must be one of.*got a "),
        ({"output": "step"}, ValueError, "^output must be one of.*'softmax'; got 'step'"),
        ({"output": None}, TypeError, "^output must be one of.*got None"),
        ({"loss": "mse"}, ValueError, "^loss must be one of 'mean_squared_error'.*got 'mse'"),
        ({"loss": 2}, TypeError, r"^loss must be one of.*got 2 \(int\)"),
        ({"output": "sigmoid"}, ValueError, "^output must be softmax for loss 'categorical_cross"),
        ({"loss": "binary_crossentropy"}, ValueError, "^output must be sigmoid for loss 'binary"),
        ({"hidden_biases": 1}, TypeError, "^hidden_biases must be True or False; got 1"),
        ({"hidden_biases": None}, TypeError, "^hidden_biases must be True or False; got None"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        mlp(SIZES, **settings)


# The border of a network that never ran: refused by name, with nothing traced or compiled.

NEVER_RUN = {
    loss: mlp((3, 5, 2), hidden="sigmoid", output=output, loss=loss, hidden_biases=False)
    for output, loss in OUTPUT_LOSSES
    if output in ("softmax", "sigmoid")
}
NO_BIASES = (Dense(PARAMS[0].weights, None), PARAMS[1])


BAD_X = [
    (X[:0], ValueError, r"must be .*got shape \(0, 3\)"),
    (X[:, :0], ValueError, r"must be .*got shape \(7, 0\)"),
    (X[0], ValueError, r"must be .*got shape \(3,\)"),
    (X[None], ValueError, r"must be .*got shape \(1, 7, 3\)"),
    (1.5, ValueError, r"must be .*got shape \(\)"),
    (X[:, :2], ValueError, r"must be .*\(rows, 3\), as the network's sizes say.*\(7, 2\)"),
    ([[1.0, 2.0, 3.0], [4.0]], ValueError, "must be an array of numbers; got ragged rows"),
    (X.astype(object), TypeError, "must be .*got dtype object"),
    (X.astype(str), TypeError, "must be .*got dtype <U"),
    (X.astype(complex), TypeError, "must be .*got dtype complex128"),
    (X > 0, ValueError, "must be numbers.*got bool"),
    (scipy.sparse.csr_array(X), TypeError, "must be .*got dtype object"),
    (None, TypeError, "must be .*got dtype object"),
    (put(X, (4, 1), np.nan), ValueError, "must be finite; got nan at row 4, column 1"),
    (put(X, (6, 2), np.inf), ValueError, "must be finite; got inf at row 6, column 2"),
    (put(X, (3, 2), np.float64(1e300)), ValueError, "must fit float32; got magnitudes"),
    (np.full((7, 3), 2**40), ValueError, "must fit int32; got 1099511627776"),
]
BAD_Y = [
    (CATEGORICAL, CLASSES[:6], r"must have 7 rows, as batch\.x; got shape \(6,\)"),
    (CATEGORICAL, CLASSES[:, None], r"must be .*got int64 of shape \(7, 1\); use batch\.y\[:, 0\]"),
    (CATEGORICAL, np.eye(3)[CLASSES], r"must be .*\(7, 2\); got float64 of shape \(7, 3\)"),
    (CATEGORICAL, put(CLASSES, 2, -1), r"must be classes 0 to 1; got -1 at \[2\]"),
    (CATEGORICAL, put(CLASSES, 2, 2), r"must be classes 0 to 1; got 2 at \[2\]"),
    (CATEGORICAL, put(CLASSES, 2, 255).astype("uint8"), r"must be classes 0 to 1; got 255 at"),
    (CATEGORICAL, CLASSES + 0.5, r"must be integer classes.*got float64 of shape \(7,\)"),
    (CATEGORICAL, CLASSES > 0, r"must be integer classes.*got bool of shape \(7,\)"),
    (CATEGORICAL, CLASSES * np.nan, r"must be integer classes.*got float64"),
    (CATEGORICAL, CLASSES + 1, r"must be classes 0 to 1; .* at 1 need batch\.y - 1"),
    (CATEGORICAL, ONE_HOT - 0.5, r"must be non-negative weights; got -0.5 at \[0, 0\]"),
    (CATEGORICAL, ONE_HOT * 0, r"must be non-negative weights, not all 0; got \[0. 0.\] at \[0\]"),
    (BINARY, BITS + 1, r"must be numbers from 0 to 1; got .* at 1 need batch\.y - 1"),
    (BINARY, 2 * BITS - 1, "must be numbers from 0 to 1; got -1.0 at"),
    (BINARY, BITS * np.nan, "must be numbers from 0 to 1; got nan at"),
    (BINARY, CLASSES, r"must be numbers from 0 to 1 of shape \(7, 2\), .*; got int64"),
    (SQUARED, NUMBERS[:, 0], r"must be numbers of shape \(7, 2\).*got float32 of shape \(7,\)"),
    (SQUARED, put(NUMBERS, (1, 1), -np.inf), r"must be finite; got -inf at \[1, 1\]"),
    (SQUARED, np.float64(NUMBERS) * 1e300, "must fit float32"),
]
BAD_PARAMS = [
    (list(NO_BIASES), TypeError, "params must be a tuple of Dense; got a list"),
    (NO_BIASES[0], TypeError, r"params\[0\] must be a Dense.*; got a ndarray"),
    (NO_BIASES[:1], ValueError, "params must hold 2 layers; got 1"),
    (PARAMS, ValueError, r"params\[0\]\.biases must be None.*hidden_biases=False; got \(5,\)"),
    (
        (NO_BIASES[0], Dense(PARAMS[1].weights, None)),
        ValueError,
        r"params\[1\]\.biases must be .*\(2,\); got a NoneType",
    ),
    (
        (Dense(PARAMS[0].weights.T, None), PARAMS[1]),
        ValueError,
        r"params\[0\]\.weights must be .*\(3, 5\); got \(5, 3\)",
    ),
    (
        jax.tree.map(np.int64, NO_BIASES),
        TypeError,
        r"params\[0\]\.weights must be float32; got int64: jax\.tree\.map\(jnp\.float32, params\)",
    ),
]


def refusers(loss, *arguments):
    """Every public function that looks at params and a batch, ready to be called."""
    for name in BATCH_FUNCTIONS:
        function = getattr(NEVER_RUN[loss], name)
        yield lambda function=function: function(*arguments)
        yield lambda function=function: traits_of(function).validate(*arguments)


@pytest.mark.parametrize(("x", "error", "message"), BAD_X)
def test_bad_inputs_are_refused_before_any_compilation(x, error, message, compilations):
    for refuse in refusers(CATEGORICAL, NO_BIASES, Batch(x, CLASSES)):
        with pytest.raises(error, match=rf"^batch\.x {message}"):
            refuse()
    with pytest.raises(error, match=f"^x {message}"):
        NEVER_RUN[CATEGORICAL].apply(NO_BIASES, x)
    assert compilations == []


@pytest.mark.parametrize(("loss", "y", "message"), BAD_Y)
def test_bad_targets_are_refused_before_any_compilation(loss, y, message, compilations):
    for refuse in refusers(loss, NO_BIASES, Batch(X, y)):
        with pytest.raises(ValueError, match=rf"^batch\.y {message}"):
            refuse()
    assert compilations == []


@pytest.mark.parametrize(("params", "error", "message"), BAD_PARAMS)
def test_bad_params_are_refused_before_any_compilation(params, error, message, compilations):
    for refuse in refusers(CATEGORICAL, params, Batch(X, CLASSES)):
        with pytest.raises(error, match=f"^{message}"):
            refuse()
    with pytest.raises(error, match=f"^{message}"):
        NEVER_RUN[CATEGORICAL].apply(params, X)
    assert compilations == []


@pytest.mark.parametrize("batch", [(X, CLASSES), X, None])
def test_only_a_batch_is_a_batch(batch, compilations):
    for refuse in refusers(CATEGORICAL, NO_BIASES, batch):
        with pytest.raises(TypeError, match=r"^batch must be a jaxnn.Batch\(x, y\); got a "):
            refuse()
    assert compilations == []


def test_the_counter_of_compilations_counts(compilations):
    jax.jit(lambda x: 3 * x - 1)(np.ones(5, np.float32))
    assert len(compilations) == 3  # traced, lowered, compiled
