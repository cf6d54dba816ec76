"""Activations and their derivatives, against SciPy, explicit formulas and `jax.vjp`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tolerances import FORWARD, GRADIENT, leaf_error

from jaxnn.model import activations
from jaxnn.model.activations import ACTIVATIONS, HIDDEN_ACTIVATIONS

DTYPES = ("float32", "float64")
ELEMENTWISE = ("identity", "relu", "sigmoid", "tanh")
TINY = 1e-30
POINTS = np.array([0.0, TINY, -TINY, 0.3, -0.7, 1.9, -3.1, 20, -20, 88, -89, 1e4, -1e4, 5.5])
Z = np.float32(POINTS).astype(np.float64).reshape(2, 7)
UPSTREAM = np.float32(np.random.default_rng(2).normal(0.5, 2.0, Z.shape)).astype(np.float64)
ROWS = np.array([[0.3, -1.2, 2.5], [1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 20.0, 19.0]])

VALUES = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "sigmoid": scipy.special.expit,
    "tanh": np.tanh,
    "softmax": lambda z: scipy.special.softmax(z, axis=-1),
}
SLOPES = {
    "identity": np.ones_like,
    "relu": lambda z: (z > 0).astype(float),
    "sigmoid": lambda z: scipy.special.expit(z) * scipy.special.expit(-z),
    "tanh": lambda z: 1 / np.cosh(np.clip(z, -300, 300)) ** 2,
}


def softmax_pull_back(z, upstream):
    """The Jacobian of every row, written out: `diag(a) - a a^T`."""
    a = scipy.special.softmax(z, axis=-1)
    jacobians = [np.diag(row) - np.outer(row, row) for row in a]
    return np.stack([j.T @ u for j, u in zip(jacobians, upstream, strict=True)])


def cases():
    for name in ELEMENTWISE:
        yield name, Z, UPSTREAM, UPSTREAM * SLOPES[name](Z)
    upstream = np.random.default_rng(3).normal(1.0, 2.0, ROWS.shape).astype(np.float32)
    yield "softmax", ROWS, upstream.astype(float), softmax_pull_back(ROWS, upstream)


CASES = {name: rest for name, *rest in cases()}


def test_the_tables_name_every_activation():
    assert set(ACTIVATIONS) == set(CASES)
    assert ELEMENTWISE == HIDDEN_ACTIVATIONS
    for name, activation in ACTIVATIONS.items():
        assert activation.forward is getattr(activations, name)
        assert activation.backward is getattr(activations, f"{name}_backward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_value(name, dtype):
    z, _, _ = CASES[name]
    with jax.enable_x64(dtype == "float64"):
        outputs = ACTIVATIONS[name].forward(jnp.asarray(z, dtype))
    assert outputs.dtype == dtype
    expected = VALUES[name](z)
    assert leaf_error(outputs, expected) <= FORWARD[dtype]
    np.testing.assert_allclose(outputs, expected, rtol=10 * FORWARD[dtype], atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_backward_is_the_slope_and_what_jax_finds(name, dtype):
    z, upstream, expected = CASES[name]
    with jax.enable_x64(dtype == "float64"):
        z, upstream = jnp.asarray(z, dtype), jnp.asarray(upstream, dtype)
        outputs, pull_back = jax.vjp(ACTIVATIONS[name].forward, z)
        got, (by_jax,) = ACTIVATIONS[name].backward(outputs, upstream), pull_back(upstream)
    assert got.dtype == dtype
    assert leaf_error(got, expected) <= GRADIENT[dtype]
    assert leaf_error(got, by_jax) <= GRADIENT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_figures(dtype):
    # REFERENCE-FIGURES, "Forward pass and activations": to the eight digits shown
    expected = {
        "softmax": [[1.0], [1.0]],
        "sigmoid": [[0.73105858], [0.99966465]],
        "tanh": [[0.76159416], [0.99999977]],
        "relu": [[1.0], [8.0]],
        "identity": [[1.0], [8.0]],
    }
    with jax.enable_x64(dtype == "float64"):
        z = jnp.array([[1.0], [8.0]], dtype)
        for name, outputs in expected.items():
            got = ACTIVATIONS[name].forward(z)
            np.testing.assert_allclose(got, outputs, rtol=FORWARD[dtype], atol=5e-9)


@pytest.mark.parametrize(
    ("z", "slope"), [(0.0, 0), (-0.0, 0), (TINY, 1), (-TINY, 0), (2.0, 1), (-2.0, 0), (1e4, 1)]
)
def test_relu_slope_at_the_kink_and_beside_it(z, slope):
    # REFERENCE-FIGURES: 1 for positive, 0 for negative input; jax.nn.relu: 0 at 0
    z = jnp.float32(z)
    assert activations.relu_backward(activations.relu(z), jnp.float32(3)) == 3 * slope
    assert jax.grad(activations.relu)(z) == jax.grad(jax.nn.relu)(z) == slope


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_infinities_have_limits(name):
    outputs = ACTIVATIONS[name].forward(jnp.array([-jnp.inf, jnp.inf]))
    slopes = ACTIVATIONS[name].backward(outputs, jnp.array([2.0, 3.0]))
    limits = {
        "identity": ([-np.inf, np.inf], [2, 3]),
        "relu": ([0, np.inf], [0, 3]),
        "sigmoid": ([0, 1], [0, 0]),
        "tanh": ([-1, 1], [0, 0]),
    }
    np.testing.assert_array_equal(outputs, limits[name][0])
    np.testing.assert_array_equal(slopes, limits[name][1])


def test_softmax_of_minus_infinity_is_zero():
    outputs = activations.softmax(jnp.array([[-jnp.inf, 1.0, 1.0]]))
    np.testing.assert_array_equal(outputs, [[0, 0.5, 0.5]])
    pulled = activations.softmax_backward(outputs, jnp.array([[5.0, 1.0, 0.0]]))
    np.testing.assert_array_equal(pulled, [[0, 0.25, -0.25]])


@pytest.mark.parametrize("name", CASES)
def test_nan_stays_nan(name):
    outputs = ACTIVATIONS[name].forward(jnp.array([[jnp.nan, 1.0]]))
    assert jnp.isnan(outputs[0, 0])
    assert jnp.isnan(ACTIVATIONS[name].backward(outputs, jnp.array([[jnp.nan, 1.0]]))[0, 0])


@pytest.mark.parametrize(
    ("name", "shape"), [(name, (2, 1, 4)) for name in CASES] + [(name, ()) for name in ELEMENTWISE]
)
def test_any_shape(name, shape):
    z = jnp.linspace(-1.0, 2.0, int(np.prod(shape))).reshape(shape)
    outputs = ACTIVATIONS[name].forward(z)
    assert outputs.shape == ACTIVATIONS[name].backward(outputs, z).shape == shape
    np.testing.assert_allclose(outputs, VALUES[name](np.float64(z)), rtol=1e-6)


def test_softmax_rows_sum_to_one_and_ignore_a_shift():
    z = np.float32([[0.5, -1.0, 3.0], [100.0, 101.0, 99.0]])
    a = activations.softmax(jnp.asarray(z))
    np.testing.assert_allclose(np.sum(np.float64(a), axis=1), 1, atol=2e-7)
    np.testing.assert_allclose(activations.softmax(jnp.asarray(z + 64)), a, rtol=2e-6)
