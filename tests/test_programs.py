"""Programs live as long as the functions they were compiled for, and no longer."""

import functools
import gc
import weakref
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxnn
from jaxnn.run import programs
from jaxnn.run.programs import Program, forget, program

KEY, BATCH = jax.random.key(0), jnp.ones(3)


def draw(key):
    return jax.random.normal(key, (3,))


def loss_of(c, traces):
    def loss(params, batch):
        traces.append(c)
        return jnp.sum((params - c * batch) ** 2)

    return loss


RUNS: dict[str, Any] = {
    "random_search": lambda loss: jaxnn.random_search(KEY, loss, draw, BATCH, num_candidates=50),
    "perturbation_search": lambda loss: jaxnn.perturbation_search(
        KEY, loss, jnp.zeros(3), BATCH, num_steps=20, scale=0.1
    ),
    "gradient_descent": lambda loss: jaxnn.gradient_descent(
        KEY, jax.value_and_grad(loss), jnp.zeros(3), BATCH, num_epochs=5, learning_rate=0.1
    ),
    "count_outcomes": lambda loss: jaxnn.count_outcomes(
        KEY, lambda p, b: loss(p, b) > p, draw, BATCH, num_candidates=50
    ),
}


SEARCHES = ("random_search", "perturbation_search", "count_outcomes")
OF_THE_PACKAGE = 2
"""Programs of the package's own functions alone, such as schedules, may stay."""


def num_compiled():
    return sum(len(each._compiled) for each in programs._programs)


@pytest.mark.parametrize(
    "name",
    ["gradient_descent", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in SEARCHES)],
)
def test_a_loss_that_nobody_holds_leaves_no_program_behind(name):
    gc.collect()
    loss, before = loss_of(1.0, []), num_compiled()
    RUNS[name](loss)
    gone = weakref.ref(loss)
    del loss
    gc.collect()
    assert gone() is None
    assert num_compiled() - before <= OF_THE_PACKAGE


@program()
def applied(function, x):
    return function(x)


@dataclass
class Scale:  # It has == and so no hash.
    c: float
    traces: int = 0

    def __call__(self, x):
        self.traces += 1
        return self.c * x


@pytest.mark.parametrize("of", [lambda s: s, lambda s: s.__call__, functools.partial])
def test_objects_bound_methods_and_partials_are_known_again(of):
    scale = Scale(3.0)
    function = of(scale)
    for _ in range(3):
        assert applied(Partial(function), 2.0) == 6
    assert scale.traces == 1


def test_numbers_of_a_partial_compile_nothing():
    traces = []

    def scaled(c, x):
        traces.append(c)
        return c * x

    assert [float(applied(Partial(scaled, c), 2.0)) for c in (1.0, 2.0, 3.0)] == [2, 4, 6]
    assert len(traces) == 1


def test_a_forgotten_function_is_traced_again():
    held = {"c": 2.0}

    def scaled(x):
        return held["c"] * x

    function = Partial(scaled)
    assert applied(function, 2.0) == 4
    held["c"] = 3.0
    assert applied(function, 2.0) == 4  # as under jit: a global is read when JAX traces
    forget(function)
    assert applied(function, 2.0) == 6


def test_a_program_does_what_jit_does():
    twice = Program(lambda function, x, *, times: function(x) * times, static_argnames="times")
    double = Partial(lambda x: 2 * x)
    assert twice(double, 1.0, times=3) == 6
    assert twice.eval_shape(double, np.zeros((4,), np.float32), times=3).shape == (4,)
    ready = twice.compile(double, np.float32(1), times=3)
    assert [float(ready(double, np.float32(x))) for x in (1, 2)] == [6, 12]


class Pen:
    """A callable with an attribute of the name that JAX gives its own box's content."""

    def __init__(self, fun):
        self.fun = fun

    def __call__(self, x):
        return self.fun(x) + 100


def test_an_attribute_is_not_taken_for_the_function():
    assert applied(Partial(Pen(lambda x: 2 * x)), 2.0) == 104


def test_a_derivative_of_ones_own_stays_with_its_function():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, upstream: (7 * upstream,))
    slope = Program(lambda function, x: jax.grad(lambda x: function(x))(x))
    assert slope(Partial(square), 1.0) == 7
