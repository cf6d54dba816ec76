"""The gradient from pairs of losses: its formula, its law of cosines, and its border."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxnn
from jaxnn.gradients import estimate as module
from jaxnn.run.random import normals

KEY = jax.random.key(8)
SLOPES = {"w": jnp.arange(1.0, 7.0).reshape(2, 3), "b": jnp.array([-3.0, 0.5])}
START = jax.tree.map(jnp.ones_like, SLOPES)


def linear(params, slopes):
    return sum(jnp.vdot(p, s) for p, s in zip(*map(jax.tree.leaves, (params, slopes)), strict=True))


def estimate(key=KEY, loss_fn=linear, batch=SLOPES, **options: Any):
    given = {"num_pairs": 300, "scale": 0.5, **options}
    return jaxnn.perturbation_gradient(key, loss_fn, START, batch, **given)


def test_it_is_the_formula():
    found = estimate(num_pairs=20)
    flat, unravel = ravel_pytree(START)
    stream = jax.random.fold_in(KEY, module.TAG)
    expected = np.zeros(8)
    for pair in range(20):
        noise = normals(jax.random.fold_in(stream, pair), 8)
        ends = (linear(unravel(flat + s * noise), SLOPES) for s in (0.5, -0.5))
        upper, lower = map(float, ends)
        expected += (upper - lower) / (2 * 20 * 0.5) * np.asarray(noise)
    assert jax.tree.structure(found) == jax.tree.structure(START)
    np.testing.assert_allclose(ravel_pytree(found)[0], expected, rtol=1e-3)


@pytest.mark.parametrize("num_pairs", [30, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_the_cosine_with_the_gradient_follows_its_law(num_pairs):
    """cos^2 ~ Beta(n/2, (d-1)/2): the mean of 200 is within 4 standard errors."""
    gradient, (n, d) = np.asarray(ravel_pytree(SLOPES)[0]), (num_pairs, 8)
    cosines = []
    for key in jax.random.split(KEY, 200):
        found = np.concatenate(
            [np.ravel(leaf) for leaf in jax.tree.leaves(estimate(key, num_pairs=num_pairs))]
        )
        cosines.append(found @ gradient / (np.linalg.norm(found) * np.linalg.norm(gradient)))
    mean = n / (n + d - 1)
    deviation = np.sqrt(2 * n * (d - 1) / ((n + d - 1) ** 2 * (n + d + 1)))
    assert abs(np.mean(np.square(cosines)) - mean) < 4 * deviation / np.sqrt(200)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"num_pairs": 0}, ValueError, "num_pairs must be"),
        ({"scale": 0.0}, ValueError, "scale must be"),
        ({"key": 0}, TypeError, "key must be"),
        ({"loss_fn": lambda p, b: p["b"]}, TypeError, "loss_fn must"),
    ],
)
def test_what_it_cannot_take_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        estimate(**given)


def total(params, batch):
    return jnp.sum(params.astype(jnp.float32))


def test_narrow_params_add_up_in_float32_and_params_of_no_number_come_back():
    narrow = jnp.zeros(2, jnp.bfloat16)
    found = jaxnn.perturbation_gradient(KEY, total, narrow, (), num_pairs=100_000, scale=1.0)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), 1, atol=0.025)
    none = jaxnn.perturbation_gradient(KEY, total, jnp.zeros(0), (), num_pairs=2)
    assert none.shape == (0,)


def test_a_second_estimate_compiles_nothing(caplog):
    estimate()
    with jax.log_compiles():
        estimate(num_pairs=1_000, scale=0.1)
        assert [r for r in caplog.records if "Compiling" in r.getMessage()] == []
        estimate(loss_fn=lambda p, b: linear(p, b))
        assert [r for r in caplog.records if "Compiling" in r.getMessage()]
