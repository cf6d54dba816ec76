"""`Dense`, the forward pass over a tuple of them, and params of another network."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FORWARD, float32, leaf_error

from jaxnn.model.layers import Dense, check_params, dot, forward, layer_shapes

RNG = np.random.default_rng(6)
SHAPES = layer_shapes((3, 5, 2))
X = float32(RNG.normal(2.0, 3.0, (7, 3)))
PARAMS: Any = tuple(
    Dense(float32(RNG.normal(0.5, 1.0, w)), float32(RNG.normal(-1.0, 2.0, b)))
    for w, b in (((3, 5), (5,)), ((5, 2), (2,)))
)
FIRST, LAST = PARAMS
WHOLE: Any = np.ones((3, 5), int).tolist()


def dense(weights, biases=None):
    return Dense(jnp.asarray(weights, jnp.float32), biases and jnp.asarray(biases, jnp.float32))


def test_layer_shapes():
    assert layer_shapes((3, 5, 2)) == (((3, 5), (5,)), ((5, 2), (2,)))
    assert layer_shapes((4, 3, 2, 1), hidden_biases=False) == (
        ((4, 3), None),
        ((3, 2), None),
        ((2, 1), (1,)),
    )
    assert layer_shapes((3, 2), hidden_biases=False) == layer_shapes((3, 2)) == (((3, 2), (2,)),)


def test_worked_figures():
    # worked figures
    x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    np.testing.assert_array_equal(forward((dense([[2], [-1]], [1]),), x), [[1], [8]])
    yes = (
        dense([[0.3, 0.6], [0.8, 0.4], [0.1, 0.5]], [1, 1]),
        dense([[0.1, 0.5], [0.7, 0.2]], [1, 1]),
    )
    outputs = forward(yes, jnp.array([[0.29, 0.11, 0.80]]), hidden="sigmoid", output="softmax")
    np.testing.assert_allclose(outputs, [[0.52647369, 0.47352631]], rtol=FORWARD["float32"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": "relus"}, "hidden must be one of 'identity', 'relu'.*got 'relus'"),
        ({"output": "soft"}, "output must be one of .*'softmax'; got 'soft'"),
    ],
)
def test_forward_refuses_an_unknown_activation_and_lists_the_known_ones(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        forward(PARAMS, X, **options)


def as_lists(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), params)


def test_dot_asks_for_full_precision():
    text = str(jax.make_jaxpr(dot)(X, PARAMS[0].weights))
    assert "Precision.HIGHEST" in text
    with jax.default_matmul_precision("bfloat16"):
        assert "Precision.HIGHEST" in str(jax.make_jaxpr(dot)(X, PARAMS[0].weights))


@pytest.mark.parametrize(
    "convert",
    [
        as_lists,
        lambda params: jax.tree.map(np.float64, params),
        lambda params: jax.tree.map(lambda leaf: leaf.astype(">f4"), params),
        lambda params: jax.tree.map(np.longdouble, params),
        lambda params: (as_lists(params)[0], params[1]),
    ],
)
def test_check_params_turns_lists_and_wide_floats_into_arrays_that_jax_can_hold(convert):
    got = jax.jit(lambda params: params)(check_params("params", convert(PARAMS), SHAPES))
    assert leaf_error(got, PARAMS) == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}


MISFITS = [
    (list(PARAMS), "params must be a tuple of Dense; got a list"),
    (LAST, r"params\[0\] must be a Dense\(weights, biases\); got a ndarray"),
    ((FIRST,), "params must hold 2 layers; got 1"),
    (
        (FIRST, Dense(LAST.weights.T, LAST.biases)),
        r"params\[1\]\.weights must be an array of shape \(5, 2\); got \(2, 5\)",
    ),
    (
        (Dense(FIRST.weights, None), LAST),
        r"params\[0\]\.biases must be an array of shape \(5,\); got a NoneType",
    ),
    (
        (FIRST, Dense(LAST.weights, jnp.asarray(LAST.biases, jnp.bfloat16))),
        r"params\[1\]\.biases must be float32; got bfloat16: jax\.tree\.map\(jnp\.float32.*",
    ),
    (
        (Dense(WHOLE, FIRST.biases), LAST),
        r"params\[0\]\.weights must be float32; got int64: jax\.tree\.map\(jnp\.float32, .*",
    ),
]


@pytest.mark.parametrize(("params", "message"), MISFITS)
def test_params_of_another_network_are_refused(params, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        check_params("params", params, SHAPES)


def test_biases_where_the_network_has_none_and_mixed_dtypes_are_refused():
    shapes = layer_shapes((3, 5, 2), hidden_biases=False)
    check_params("params", (Dense(FIRST.weights, None), LAST), shapes)
    with pytest.raises(ValueError, match=r"params\[0\]\.biases must be None.*hidden_biases=False"):
        check_params("params", PARAMS, shapes)
    with jax.enable_x64(True):
        mixed = (FIRST, Dense(LAST.weights, LAST.biases.astype(np.float64)))
        with pytest.raises(TypeError, match="params must be of one dtype; got float32, float64"):
            check_params("params", mixed, SHAPES)
