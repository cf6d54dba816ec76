"""Saved networks: the same bits back, read by NumPy alone, and refused where they do not fit."""

import json
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_same

import jaxnn
from jaxnn import Columns, Dense, load, mlp, save
from jaxnn.run import checkpoint

MODEL = mlp((2, 4, 3), hidden="tanh")
PARAMS = MODEL.init(jax.random.key(3), scale=1.0)
COLUMNS = Columns(
    ("width", "größe"), np.array(["a", "b", "c d"]), np.array([0.1, -2.0]), np.array([1e-3, 5.0])
)
X = np.random.default_rng(5).normal(size=(20, 2)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.npz"


def assert_equal(columns, wanted):
    assert type(columns) is type(wanted)
    for got, value in zip(columns, wanted, strict=True):
        assert type(got) is type(value)
        np.testing.assert_array_equal(got, value)


@pytest.mark.parametrize(
    "columns",
    [
        Columns(),
        COLUMNS,
        Columns(class_names=COLUMNS.class_names),
        Columns(mean=COLUMNS.mean, std=COLUMNS.std),
    ],
)
def test_model_params_and_columns_come_back(path, columns):
    save(path, MODEL, PARAMS)
    assert load(path).columns == Columns()
    save(path, MODEL, PARAMS, columns)
    saved = load(path)
    assert saved.model is MODEL
    assert_same(saved.params, PARAMS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(saved.params))
    assert_equal(saved.columns, columns)
    model, params, _ = saved
    assert_same(model.predict_proba(params, X), MODEL.predict_proba(PARAMS, X))


def test_names_and_figures_may_be_lists(path):
    listed = COLUMNS._replace(feature_names=["width", "größe"], mean=[0.1, -2], std=[1e-3, 5])
    save(path, MODEL, PARAMS, listed)
    assert_equal(load(path).columns, COLUMNS)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.sampled_from(["identity", "relu", "sigmoid", "tanh"]),
    st.sampled_from(["mean_squared_error", "binary_crossentropy"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_every_network_comes_back_bit_for_bit(
    tmp_path_factory, sizes, hidden, loss, hidden_biases, random
):
    model = mlp(sizes, hidden=hidden, output="sigmoid", loss=loss, hidden_biases=hidden_biases)
    draws = np.random.default_rng(random.getrandbits(32))
    leaves: Any = [
        [shape and jnp.asarray(draws.normal(size=shape), np.float32) for shape in layer]
        for layer in model.settings.shapes
    ]
    params = tuple(Dense(*layer) for layer in leaves)
    path = tmp_path_factory.mktemp("net") / "a"
    save(path, model, params)
    saved = load(path)
    assert saved.model is model
    assert_same(saved.params, params)


def test_numpy_alone_reads_the_file_and_predicts(path):
    save(path, MODEL, PARAMS, COLUMNS)
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(file["metadata"].tobytes())
        hidden = np.tanh(X @ file["weights.0"] + file["biases.0"])
        logits = hidden @ file["weights.1"] + file["biases.1"]
        np.testing.assert_array_equal(file["mean"], COLUMNS.mean)
        np.testing.assert_array_equal(file["std"], COLUMNS.std)
        assert set(file) == {
            "weights.0", "biases.0", "weights.1", "biases.1", "mean", "std", "metadata", "format",
            "sha256",
        }  # fmt: skip
    assert about["model"] == MODEL.settings._asdict() | {"sizes": [2, 4, 3]}
    assert about["columns"]["class_names"] == ["a", "b", "c d"]
    np.testing.assert_array_equal(logits.argmax(axis=1), MODEL.predict(PARAMS, X))


def test_a_file_is_replaced_whole_or_not_at_all(path, monkeypatch):
    save(path, MODEL, PARAMS)
    before = path.read_bytes()

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", no_space)
        with pytest.raises(OSError, match=re.escape(str(path))):
            save(path, MODEL, jax.tree.map(jnp.zeros_like, PARAMS))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    save(path, MODEL, jax.tree.map(jnp.zeros_like, PARAMS))
    assert not np.any(load(path).params[0].weights)


BINARY = mlp((2, 1), output="sigmoid", loss="binary_crossentropy")
BINARY_PARAMS = BINARY.init(jax.random.key(0))


def test_one_sigmoid_output_has_two_class_names(path):
    save(path, BINARY, BINARY_PARAMS, Columns(class_names=np.array(["no", "yes"])))
    assert load(path).columns.class_names.tolist() == ["no", "yes"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda x: x, PARAMS), TypeError, "must be as jaxnn.mlp(...) returned it; got fun"),
        ((MODEL._replace(loss=MODEL.accuracy), PARAMS), TypeError, "got one with another function"),
        ((MODEL, PARAMS[:1]), ValueError, "params must hold 2 layers; got 1"),
        ((BINARY, PARAMS[:1]), ValueError, "params[0].weights must be an array of shape (2, 1)"),
        ((MODEL, PARAMS, ("a", "b")), TypeError, "columns must be a jaxnn.Columns; got a tuple"),
        (
            (MODEL, PARAMS, Columns(("a",))),
            ValueError,
            "columns.feature_names must have 2 entries; got 1",
        ),
        (
            (BINARY, BINARY_PARAMS, COLUMNS),
            ValueError,
            "columns.class_names must have 2 entries; got 3",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(path, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        save(path, *arguments)
    assert not path.exists()


def test_params_that_have_no_values_yet_are_refused(path):
    with pytest.raises(TypeError, match="params must be concrete; got a tracer"):
        jax.jit(lambda params: save(path, MODEL, params))(PARAMS)


def test_a_file_that_does_not_exist_is_named(path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        load(path)


ARRAYS = {
    f"{field}.{layer}": np.asarray(leaf)
    for layer, dense in enumerate(PARAMS)
    for field, leaf in dense._asdict().items()
}
ABOUT = {"model_format": 1, "model": json.loads(json.dumps(MODEL.settings._asdict()))}
ABOUT |= {"columns": {}}


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({}, {"trainer": "random_search"}, "it is a checkpoint of a run, which goes to a trainer"),
        (ARRAYS, ABOUT | {"model_format": 7}, "it has model format 7; this version of jaxnn reads"),
        (ARRAYS, ABOUT | {"model": {"sizes": [2, 0]}}, "sizes[1] must be an integer of at least 1"),
        (ARRAYS, ABOUT | {"model": {"depth": 2}}, "unexpected keyword argument 'depth'"),
        (ARRAYS, ABOUT | {"model": {"sizes": [2, 4]}}, "it has arrays of another network"),
        (ARRAYS, ABOUT | {"model": {"sizes": [2, 5, 3]}}, "params[0].weights must be an array"),
        (ARRAYS | {"weights.0": np.ones((2, 4), int)}, ABOUT, "params[0].weights must be float32"),
        ({}, ABOUT, "params[0].weights must be an array of shape (2, 4); got a NoneType"),
        (ARRAYS, ABOUT | {"columns": {"feature_names": ["a"]}}, "columns.feature_names must have"),
        (ARRAYS, ABOUT | {"model": 3}, "'int' object has no attribute 'items'"),
    ],
)  # fmt: skip
def test_a_file_that_says_what_makes_no_network_is_refused(path, arrays, metadata, message):
    checkpoint.save(path, arrays, metadata)
    pattern = re.escape(f"cannot load {path}: ") + ".*" + re.escape(message)
    with pytest.raises(ValueError, match=pattern):
        load(path)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", bytes(1_000)])
def test_a_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot load .*: it is no zip archive"):
        load(path)


def test_any_damaged_byte_is_found(path):
    save(path, MODEL, PARAMS, COLUMNS)
    whole = path.read_bytes()
    at = whole.index(np.asarray(PARAMS[0].weights).tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match="cannot load"):
        load(path)


OTHER = """
import sys, numpy as np, jaxnn
model, params, columns = jaxnn.load(sys.argv[1])
x = jaxnn.datasets.load_csv(sys.argv[2], target=None, columns=columns).batch.x
print(*columns.class_names[model.predict(params, x)])
"""


@pytest.mark.slow
def test_another_process_predicts_the_same_words_from_the_file(path, tmp_path):
    rows = np.random.default_rng(1).normal(size=(60, 2)) * [3, 40] + [5, -100]
    labels = np.where(rows[:, 0] > 5, "big", np.where(rows[:, 1] > -100, "mid", "low"))
    lines = [f"{a},{word},{b}" for (a, b), word in zip(rows, labels, strict=True)]
    (tmp_path / "rows.csv").write_text("\n".join(["a,size,b", *lines]))
    table = jaxnn.datasets.load_csv(tmp_path / "rows.csv", target="size", standardise=True)
    model = mlp((2, 16, 3))
    start = model.init(jax.random.key(0), scale=1.0, distribution="he")
    trained = jaxnn.gradient_descent(
        jax.random.key(1),
        model.value_and_grad,
        start,
        table.batch,
        optimizer=jaxnn.optimizers.adam(0.05),
        num_epochs=500,
    )
    save(path, model, trained.params, table.columns)
    (tmp_path / "new.csv").write_text("\n".join(["b,a", *(f"{b},{a}" for a, b in rows)]))
    command = [sys.executable, "-W", "error", "-c", OTHER, path, tmp_path / "new.csv"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert np.mean(np.array(told) == labels) > 0.95
    predicted = table.columns.class_names[model.predict(trained.params, table.batch.x)]
    assert told == predicted.tolist()
