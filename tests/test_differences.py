"""The V: a right gradient meets central differences at the best step, a wrong one never does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnn import difference_errors

PARAMS = {"a": np.array([0.5, -1.0], np.float32), "b": np.float32(2.0)}
BATCH = np.array([1.0, 0.25], np.float32)


def loss_fn(params, batch, library=jnp):
    return library.sum(library.exp(params["a"] * batch)) + params["b"] ** 3


def by_hand(factor, params, batch):
    """Loss and gradient in NumPy; that of b is off by a factor."""
    slopes = {"a": batch * np.exp(params["a"] * batch), "b": factor * 3 * params["b"] ** 2}
    return loss_fn(params, batch, np), slopes


LOSSES = {"numpy": partial(loss_fn, library=np), "jax": loss_fn}


def test_a_right_gradient_makes_a_v():
    errors = difference_errors(loss_fn, jax.value_and_grad(loss_fn), PARAMS, BATCH)
    np.testing.assert_array_equal(errors.gradient, errors.by_jax)
    best = int(np.argmin(errors.gradient))
    assert 1e-7 < errors.step[best] < 1e-3
    assert errors.gradient[best] < 1e-9
    assert errors.gradient[0] > 1e3 * errors.gradient[best]
    assert errors.gradient[-1] > 1e3 * errors.gradient[best]


@pytest.mark.parametrize("library", LOSSES)
def test_truncation_falls_with_the_square_of_the_step(library):
    """Of b^3 at 2 the difference is off by h^2, and h is the step times the largest, 2."""
    steps = [1e-3, 1e-2]
    errors = difference_errors(LOSSES[library], partial(by_hand, 1), PARAMS, BATCH, steps=steps)
    np.testing.assert_allclose(errors.gradient, np.square(np.multiply(2, steps)) / 12, rtol=1e-3)


@pytest.mark.parametrize("library", LOSSES)
def test_a_wrong_gradient_stays_as_far_off_as_it_is_wrong(library):
    given = LOSSES[library], partial(by_hand, 1.5), PARAMS, BATCH
    errors = difference_errors(*given, steps=np.logspace(-9, -4, 6))
    np.testing.assert_allclose(errors.gradient, 0.5, rtol=1e-5)
    assert (errors.by_jax is None) == (library == "numpy")
    if errors.by_jax is not None:
        assert np.max(errors.by_jax) < 1e-6


@pytest.mark.parametrize("steps", [[0.0], [-1e-3], [np.nan], [np.inf], [[1e-3]]])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match="steps must be numbers above 0"):
        difference_errors(loss_fn, jax.value_and_grad(loss_fn), PARAMS, BATCH, steps=steps)
