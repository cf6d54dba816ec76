"""`mlp(...)` and `Model`: values against plain NumPy, the border, and what is compiled when."""

import copy
import inspect
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from output_losses import PAIRS
from programs import start_program
from test_activations import VALUES as ACTIVATE
from test_losses import ENTRIES
from tolerances import FORWARD, GRADIENT, float32, leaf_error

from jaxnn import gradient_descent, metrics
from jaxnn.batch import CROSSENTROPIES, Batch
from jaxnn.model.layers import Dense
from jaxnn.model.mlp import Model, ModelFunction, mlp
from jaxnn.typing import traits_of

ROWS, SIZES = 7, (3, 5, 2)
CATEGORICAL_PAIR = ("softmax", "categorical_crossentropy")
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
BINARY, CATEGORICAL = CROSSENTROPIES
SQUARED = "mean_squared_error"
TARGETS = {CATEGORICAL: CLASSES, BINARY: BITS, **dict.fromkeys(ENTRIES, NUMBERS)}
BATCH_FUNCTIONS = ("loss", "value_and_grad", "loss_reference", "accuracy")


def numpy_outputs(params, x, hidden, output):
    for layer, (weights, biases) in enumerate(params):
        x = x.astype(float) @ weights.astype(float) + biases.astype(float)
        names = (hidden,) * 9 if isinstance(hidden, str) else hidden
        x = ACTIVATE[output if layer == len(params) - 1 else names[layer]](x)
    return x


def numpy_loss(outputs, targets, loss):
    if loss in ENTRIES:
        return np.mean(ENTRIES[loss](outputs - targets))
    if loss == BINARY:
        return -np.mean(targets * np.log(outputs) + (1 - targets) * np.log(1 - outputs))
    return -np.mean(np.log(outputs[np.arange(len(outputs)), targets]))


def put(array, index, value):
    copy = np.array(array, np.result_type(array, np.asarray(value)))
    copy[index] = value
    return copy


# What a model computes.


QUICK = [CATEGORICAL_PAIR, *PAIRS[1::3]]
"""`test_vmapped_loss` holds the others against NumPy in the quick tier."""


@pytest.mark.parametrize(
    ("pair", "dtype"),
    [
        *(
            pytest.param(pair, "float64", marks=() if pair in QUICK else pytest.mark.slow)
            for pair in PAIRS
        ),
        (CATEGORICAL_PAIR, "float32"),
    ],
)
def test_outputs_and_losses_are_numpys(pair, dtype):
    (output, loss), y = pair, TARGETS[pair[1]]
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


@pytest.mark.parametrize(  # by rows, by scalars
    ("sizes", "hidden"),
    [
        pytest.param((3, 9, 8, 4, 2), ("gelu", "tanh", "relu"), marks=pytest.mark.slow),
        ((3, 3, 3, 2), ("relu", "elu")),
    ],
)
def test_each_layer_may_have_an_activation_of_its_own(sizes, hidden):
    model, batch = mlp(sizes, hidden=hidden), Batch(X, CLASSES)
    rng = np.random.default_rng(1)
    population = tuple(
        Dense(float32(rng.normal(0.2, 2 / i**0.5, (16, i, o))), float32(rng.normal(size=(16, o))))
        for i, o in itertools.pairwise(sizes)
    )
    params = jax.tree.map(lambda leaf: leaf[0], population)
    outputs = numpy_outputs(params, X, hidden, "softmax")

    @jax.jit
    def everything(params, population, batch):
        value, gradient = model.value_and_grad(params, batch)
        of_many = jax.vmap(model.loss, (0, None))(population, batch)[0]
        losses = value, model.loss(params, batch), model.loss_reference(params, batch), of_many
        by_jax = jax.grad(model.loss_reference)(params, batch)
        return losses, model.apply(params, batch.x), gradient, by_jax

    losses, applied, gradient, by_jax = everything(params, population, batch)
    for got in losses:
        assert leaf_error(got, numpy_loss(outputs, CLASSES, CATEGORICAL)) <= FORWARD["float32"]
    assert leaf_error(applied, outputs) <= FORWARD["float32"]
    assert leaf_error(gradient, by_jax) <= GRADIENT["float32"]


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
    ("output", "loss"),
    [*PAIRS[:4], *(pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in PAIRS[4:])],
)
def test_predictions_have_the_form_of_the_targets_and_agree_with_the_outputs(output, loss):
    model = mlp(SIZES, hidden="tanh", output=output, loss=loss)
    outputs = numpy_outputs(PARAMS, X, "tanh", output)
    for predict in (model.predict, jax.jit(model.predict)):
        got = predict(PARAMS, X)
        if loss not in CROSSENTROPIES:
            assert got.dtype == np.float32
            assert leaf_error(got, outputs) <= FORWARD["float32"]
            continue
        assert got.dtype == np.int32
        expected = outputs.argmax(axis=1) if loss == CATEGORICAL else outputs > 0.5
        np.testing.assert_array_equal(got, expected)
        assert np.unique(got).tolist() == [0, 1]
        hits = np.mean(np.asarray(got) == TARGETS[loss])
        assert model.accuracy(PARAMS, Batch(X, TARGETS[loss])) == pytest.approx(hits)
    if loss not in CROSSENTROPIES:
        with pytest.raises(ValueError, match=r"predict_proba must be of classes.*model\.predict"):
            model.predict_proba(PARAMS, X)
    else:
        assert leaf_error(model.predict_proba(PARAMS, X.tolist()), outputs) <= FORWARD["float32"]


def test_the_likelier_answer_is_predicted_also_where_probabilities_round_to_one_number():
    model = mlp((1, 3))
    params = (Dense(float32([[1, 1 + 2**-20, 0]]), float32([0, 0, -200])),)
    x = float32([[1e-3], [0.0]])  # a tie goes to the lowest class
    assert len(np.unique(model.predict_proba(params, x)[0, :2])) == 1
    np.testing.assert_array_equal(model.predict(params, x), [1, 0])
    binary = mlp((1, 1), output="sigmoid", loss=BINARY)
    params = (Dense(float32([[1]]), float32([0])),)
    np.testing.assert_array_equal(
        binary.predict(params, float32([[0.01], [0.0], [-0.01]])), [[1], [0], [0]]
    )


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_inputs_that_are_not_finite_are_nan_where_their_values_are_not_known(bad):
    model, batch = mlp(SIZES, hidden="tanh"), Batch(put(X, (3, 1), np.float32(bad)), CLASSES)
    value, (first, _) = jax.jit(model.value_and_grad)(PARAMS, batch)
    assert np.isnan(value)
    assert np.isnan(first.weights).all()
    assert np.isnan(jax.jit(model.loss)(PARAMS, batch))


# Transformations, and what is compiled when.


@pytest.mark.parametrize("name", BATCH_FUNCTIONS)
def test_shapes_and_known_values_are_refused_while_tracing(name):
    function = getattr(mlp(SIZES), name)
    with pytest.raises(ValueError, match=r"^batch\.y must be"):
        jax.jit(function)(PARAMS, Batch(X, CLASSES[:, None]))
    too_deep = jax.tree.map(lambda leaf: np.stack([leaf[None]] * 4), PARAMS)
    with pytest.raises(ValueError, match=r"^params\[0\]\.weights must be.*got \(1, 3, 5\)"):
        jax.vmap(function, (0, None))(too_deep, Batch(X, CLASSES))
    with pytest.raises(ValueError, match=r"^batch\.x must be finite"):
        jax.jit(lambda p: function(p, Batch(X * np.nan, CLASSES)))(PARAMS)


def test_a_second_call_compiles_nothing(compilations):
    model, (a, b) = mlp((3, 6, 2)), (mlp((3, 6, 2)).sampler(), mlp([3, 6, 2]).sampler(scale=2.0))
    first, second = (jax.tree.map(np.asarray, draw(jax.random.key(1))) for draw in (a, b))

    def use(model, params, x, y):
        for name in BATCH_FUNCTIONS:
            getattr(model, name)(params, Batch(x, y))
        model.apply(params, x)
        jax.grad(model.loss)(params, Batch(x, y))
        jax.vmap(model.loss, (0, None))(jax.tree.map(lambda p: p[None], params), Batch(x, y))

    compilations.clear()
    use(model, first, X, CLASSES)
    assert len(compilations) > 6
    compilations.clear()
    use(mlp([3, 6, 2]), second, 2 * X, 1 - CLASSES)
    assert compilations == []


# The bundle.


def test_the_same_settings_are_the_same_object():
    model = mlp((3, 5, 2), hidden="relu", output="softmax", loss="categorical_crossentropy")
    assert mlp(tuple(np.array(SIZES))) is model
    assert mlp([3.0, np.float32(5), 2]) is model  # pyright: ignore[reportArgumentType]
    others = [mlp((3, 5, 3)), mlp(SIZES, hidden="tanh"), mlp(SIZES, hidden_biases=False)]
    assert len({id(other) for other in (model, *others)}) == 4


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


# The loss of the best constant answer.

SPREAD = np.array([[0.25, 0.75], [1.0, 0.5], [0.0, 1.0], [0.5, 0.5]])
CONSTANT = [
    (CATEGORICAL, "softmax", SPREAD),
    (BINARY, "sigmoid", SPREAD * [0, 1]),  # an output that is always 0 costs nothing
    (SQUARED, "identity", 7 * SPREAD - 3),
    (SQUARED, "relu", SPREAD - [2, 0]),
    (SQUARED, "tanh", 3 * SPREAD - 6),
    (SQUARED, "elu", SPREAD - [2, 0]),
    ("mean_absolute_error", "identity", 7 * SPREAD - 3),
    ("mean_absolute_error", "tanh", 3 * SPREAD - 6),
    ("huber", "identity", 7 * SPREAD - 3),
    ("huber", "gelu", SPREAD - [2, 0]),
]


@pytest.mark.parametrize(("loss", "output", "y"), CONSTANT)
def test_constant_loss_is_the_lowest_of_all_constant_answers(loss, output, y):
    model = mlp((3, 5, 2), output=output, loss=loss)

    def of_constant(logits):
        outputs = ACTIVATE[output](np.tile(logits, (4, 1)))
        if loss == CATEGORICAL:
            return -np.mean(np.sum(y * np.log(outputs), axis=1))
        return numpy_loss(outputs, y, loss)

    with np.errstate(divide="ignore", invalid="ignore"):
        lowest = scipy.optimize.minimize(of_constant, [0.1, 0.2], method="Nelder-Mead", tol=1e-12)
    told = traits_of(model.loss).constant_loss(Batch(X[:4], y))
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
    ("settings", "error", "message"),
    [
        ({"sizes": (3,)}, ValueError, r"^sizes must have at least 2 entries.*got \(3,\)"),
        ({"sizes": (3, 0, 2)}, ValueError, r"^sizes\[1\] must be an integer of at least 1; got 0"),
        ({"sizes": (3, 5.5, 2)}, TypeError, r"^sizes\[1\] must be.*got 5.5 \(float\)"),
        ({"sizes": "352"}, TypeError, "^sizes must be a sequence of integers; got a str"),
        ({"sizes": (3, 1)}, ValueError, "^sizes must end in at least 2 for output 'softmax'"),
        ({"hidden": "ReLU"}, ValueError, "^hidden must be one of 'identity', 'relu'.*got 'ReLU'"),
        (
            {"hidden": ("relu", "tanh")},
            ValueError,
            "^hidden must be one activation or 1, ",
        ),
        ({"hidden": ("softmax",)}, ValueError, r"^hidden\[0\] must be one of .*got 'softmax'"),
        ({"output": None}, TypeError, "^output must be one of.*got None"),
        ({"loss": "mse"}, ValueError, "^loss must be one of 'mean_squared_error'.*got 'mse'"),
        ({"output": "sigmoid"}, ValueError, "^output must be softmax for loss 'categorical_cross"),
        ({"loss": "binary_crossentropy"}, ValueError, "^output must be sigmoid for loss 'binary"),
        ({"hidden_biases": 1}, TypeError, "^hidden_biases must be True or False; got 1"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        mlp(**{"sizes": SIZES, **settings})


# The border: refused by name, with nothing traced or compiled. `test_batch` and `test_layers` hold
# all that is refused.

NO_BIASES = (Dense(PARAMS[0].weights, None), PARAMS[1])
REFUSED = [
    (CATEGORICAL, NO_BIASES, Batch(X[:, :2], CLASSES), r"batch\.x must be .*\(rows, 3\).*\(7, 2\)"),
    (SQUARED, NO_BIASES, Batch(put(X, (4, 1), np.nan), NUMBERS), r"batch\.x must be finite"),
    (CATEGORICAL, NO_BIASES, Batch(X, CLASSES + 1), r"batch\.y must be classes .* need batch"),
    (BINARY, NO_BIASES, Batch(X, 2 * BITS - 1), r"batch\.y must be numbers from 0 to 1; got -1.0"),
    (SQUARED, NO_BIASES, Batch(X, NUMBERS[:, 0]), r"batch\.y must be numbers of shape \(7, 2\)"),
    (CATEGORICAL, NO_BIASES, (X, CLASSES), r"batch must be a jaxnn.Batch\(x, y\); got a tuple"),
    (CATEGORICAL, PARAMS, Batch(X, CLASSES), r"params\[0\]\.biases must be None.*got \(5,\)"),
    (BINARY, NO_BIASES[:1], Batch(X, BITS), r"params must hold 2 layers; got 1"),
]


@pytest.mark.parametrize(("loss", "params", "batch", "message"), REFUSED)
def test_bad_arguments_are_refused_before_any_compilation(
    loss, params, batch, message, compilations
):
    output = {CATEGORICAL: "softmax", BINARY: "sigmoid", SQUARED: "identity"}[loss]
    model = mlp(SIZES, hidden="sigmoid", output=output, loss=loss, hidden_biases=False)
    for name in BATCH_FUNCTIONS:
        function = getattr(model, name)
        for refuse in (function, traits_of(function).validate):
            with pytest.raises((ValueError, TypeError), match=f"^{message}"):
                refuse(params, batch)
    if message.startswith((r"batch\.x", "params")):
        with pytest.raises(ValueError, match=message.replace(r"batch\.x", "^x")):
            model.apply(params, batch.x)
    assert compilations == []


def test_the_trainers_take_what_the_functions_take():
    model, key = mlp(SIZES), jax.random.key(0)
    expected = model.loss(PARAMS, Batch(X, CLASSES))
    for convert, batch in (
        (lambda leaf: leaf.tolist(), Batch(X.tolist(), CLASSES.tolist())),
        (lambda leaf: leaf.astype(">f8"), Batch(X.astype(">f8"), CLASSES.astype(">i2"))),
    ):
        given = key, model.value_and_grad, jax.tree.map(convert, PARAMS), batch
        result = gradient_descent(*given, learning_rate=0.1, num_epochs=0)
        assert result.loss == pytest.approx(float(expected), rel=FORWARD["float32"])
        assert leaf_error(result.params, PARAMS) == 0


def test_repr_is_the_call_that_builds_it():
    expected = "mlp((2, 3, 3), hidden='relu', output='softmax', loss='categorical_crossentropy')"
    assert repr(mlp((2, 3, 3))) == expected
    model = mlp((3, 5, 2), output="sigmoid", loss="binary_crossentropy", hidden_biases=False)
    assert eval(repr(model)) is model
    mixed = mlp((3, 5, 5, 2), hidden=["relu", "tanh"])
    assert "hidden=('relu', 'tanh')" in repr(mixed)
    assert eval(repr(mixed)) is mixed
    assert mlp((3, 5, 5, 2), hidden=("tanh", "tanh")) is mlp((3, 5, 5, 2), hidden="tanh")


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


@pytest.mark.slow
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
