"""Schedules at their ends, in between and beyond; numbers that change compile nothing."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnn import schedules

SHAPES = {
    "linear": lambda share: 3.0 - 2.5 * share,
    "exponential_decay": lambda share: 3.0 * (0.5 / 3.0) ** share,
    "cosine_decay": lambda share: 0.5 + 2.5 * (1 + np.cos(np.pi * share)) / 2,
}


@pytest.mark.parametrize("name", SHAPES)
def test_values_against_their_formula(name):
    schedule = getattr(schedules, name)(3.0, 0.5, 40)
    steps = np.array([0, 1, 7, 20, 39, 40, 41, 10**6, 2**32 - 2], np.uint32)
    got = jax.jit(jax.vmap(schedule))(steps)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, SHAPES[name](np.minimum(steps / 40, 1)), rtol=1e-5)
    assert float(schedule(0)) == 3.0
    assert float(schedule(40)) == pytest.approx(0.5, rel=1e-6)


def test_other_numbers_compile_nothing():
    traces = []

    @jax.jit
    def at(schedule, step):
        traces.append(step)
        return schedule(step)

    for start in (1.0, 2.0, 3.5):
        assert float(at(schedules.exponential_decay(start, 0.1, 5), jnp.uint32(0))) == start
    assert len(traces) == 1


def test_a_number_is_a_constant():
    for schedule in (schedules.as_schedule("scale", 0.25), schedules.constant(0.25)):
        assert float(schedule(jnp.uint32(9))) == 0.25


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0, 1.0, 5), ValueError, "init_value must be a finite number above 0"),
        ((1.0, -1.0, 5), ValueError, "end_value must be"),
        ((1.0, 1.0, 0), ValueError, "transition_steps must be an integer of at least 1"),
        ((1.0, 1.0, 2.5), TypeError, "transition_steps must be"),
    ],
)
@pytest.mark.parametrize("name", SHAPES)
def test_bad_numbers_are_refused(name, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(schedules, name)(*arguments)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.constant(0.5),
        schedules.inverse_time_decay(0.5, 0.25),
        schedules.linear_warmup(schedules.cosine_decay(3.0, 0.5, 40), 10),
        *(getattr(schedules, name)(3.0, 0.5, 40) for name in SHAPES),
    ],
)
def test_schedules_pickle(schedule):
    again = pickle.loads(pickle.dumps(schedule))
    assert jax.tree.structure(again) == jax.tree.structure(schedule)
    steps = np.arange(50, dtype=np.uint32)
    np.testing.assert_array_equal(jax.vmap(again)(steps), jax.vmap(schedule)(steps))
