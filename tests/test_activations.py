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
OF_JAX = ("leaky_relu", "elu", "gelu")
ELEMENTWISE = ("identity", "relu", *OF_JAX, "sigmoid", "tanh")
TINY = 1e-30
POINTS = np.array([0.0, TINY, -TINY, 0.3, -0.7, 1.9, -3.1, 20, -20, 88, -89, 1e4, -1e4, 5.5])
Z = np.float32(POINTS).astype(np.float64).reshape(2, 7)
UPSTREAM = np.float32(np.random.default_rng(2).normal(0.5, 2.0, Z.shape)).astype(np.float64)
ROWS = np.array([[0.3, -1.2, 2.5], [1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 20.0, 19.0]])


def gelu_of(z):
    """With the gate as a logistic function; any complex number within 20."""
    return z / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def gelu_near(z):
    return np.where(z > -20, np.maximum(z, 20) - 20 + gelu_of(np.clip(z, -20, 20)), 0)


VALUES = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.maximum(z, 0.01 * z),
    "elu": lambda z: np.maximum(z, np.expm1(np.minimum(z, 0))),
    "gelu": gelu_near,
    "sigmoid": scipy.special.expit,
    "tanh": np.tanh,
    "softmax": lambda z: scipy.special.softmax(z, axis=-1),
}
SLOPES = {
    "identity": np.ones_like,
    "relu": lambda z: (z > 0).astype(float),
    "leaky_relu": lambda z: np.where(z < 0, 0.01, 1),
    "elu": lambda z: np.exp(np.minimum(z, 0)),
    "gelu": lambda z: np.imag(gelu_of(np.clip(z, -20, 20) + 1e-20j)) / 1e-20,
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


def evaluate(name, z, upstream, dtype="float32"):
    """Outputs, `upstream` pulled back by hand and by JAX, compiled as one."""
    activation = ACTIVATIONS[name]

    def all_three(z, upstream):
        outputs, pull_back = jax.vjp(activation.forward, z)
        return outputs, activation.pull_back(z, outputs, upstream), *pull_back(upstream)

    with jax.enable_x64(dtype == "float64"):
        return jax.jit(all_three)(jnp.asarray(z, dtype), jnp.asarray(upstream, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_value_and_slope(name, dtype):
    z, upstream, expected_slope = CASES[name]
    outputs, by_hand, by_jax = evaluate(name, z, upstream, dtype)
    assert outputs.dtype == by_hand.dtype == dtype
    expected = VALUES[name](z)
    assert leaf_error(outputs, expected) <= FORWARD[dtype]
    np.testing.assert_allclose(outputs, expected, rtol=10 * FORWARD[dtype], atol=1e-37)
    assert leaf_error(by_hand, expected_slope) <= GRADIENT[dtype]
    assert leaf_error(by_hand, by_jax) <= GRADIENT[dtype]


@pytest.mark.parametrize(
    "name", ["leaky_relu", *(pytest.param(n, marks=pytest.mark.slow) for n in ("elu", "gelu"))]
)
def test_these_are_the_defaults_of_jax_nn_with_the_same_slope_at_0(name):
    forward, by_jax = ACTIVATIONS[name].forward, getattr(jax.nn, name)
    z = jnp.linspace(-6, 6, 49)
    assert leaf_error(forward(z), by_jax(z)) <= 2e-7
    at_0 = [evaluate(name, [0.0], [1.0])[1][0], jax.grad(by_jax)(0.0)]
    np.testing.assert_array_equal(at_0, SLOPES[name](np.zeros(1))[0])


def test_outputs_lie_within_their_bounds_and_reach_them():
    z = np.append(np.linspace(-40, 40, 100_001), [-1e30, 1e30])
    for name in ELEMENTWISE:
        outputs, (low, high) = VALUES[name](z), ACTIVATIONS[name].bounds
        ends = [np.min(outputs) if np.isfinite(low) else -1e99, np.max(outputs)]
        np.testing.assert_allclose(ends, [max(low, -1e99), min(high, 1e30)], atol=1e-8)
        assert np.isfinite(low) or np.min(outputs) < -1e20


def test_infinities_have_limits_and_nan_stays_nan():
    limits = {
        "identity": ([-np.inf, np.inf], [2, 3]),
        "relu": ([0, np.inf], [0, 3]),
        "leaky_relu": ([-np.inf, np.inf], [2 * np.float32(0.01), 3]),
        "elu": ([-1, np.inf], [0, 3]),
        "gelu": ([0, np.inf], [0, 3]),
        "sigmoid": ([0, 1], [0, 0]),
        "tanh": ([-1, 1], [0, 0]),
    }
    for name, expected in limits.items():
        outputs, slopes, _ = evaluate(name, [-np.inf, np.inf, np.nan], [2, 3, np.nan])
        np.testing.assert_array_equal(outputs, [*expected[0], np.nan])
        np.testing.assert_array_equal(slopes, [*expected[1], np.nan])
    outputs, slopes, _ = evaluate("softmax", [[np.nan, 1]], [[np.nan, 1]])
    assert np.isnan(outputs[0, 0])
    assert np.isnan(slopes[0, 0])


def test_the_slope_of_a_saturated_softmax_keeps_its_digits():
    """For two classes it is `a_0 a_1 (g_0 - g_1)`; `jax.vjp` of softmax has no right digit here."""
    z, upstream = np.array([[0.0, -30.0]]), np.array([[1.25, -0.5]])
    expected = np.exp(-30.0) / (1 + np.exp(-30.0)) ** 2 * 1.75 * np.array([[1.0, -1.0]])
    with jax.enable_x64(True):
        outputs = activations.softmax(jnp.asarray(z))
        slopes = activations.softmax_backward(outputs, jnp.asarray(upstream))
    assert leaf_error(slopes, expected) < 1e-14
