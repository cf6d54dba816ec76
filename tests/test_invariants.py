"""Symmetries are found in the loss, and a gradient that lacks one is told from one that has it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted_faults import FAULTS, PROBLEMS

from jaxnn.gradients.functions import NumpyFunction, as_checked
from jaxnn.gradients.invariants import invariants
from jaxnn.gradients.witnesses import widened

ROWS, PERMUTED, RESCALED = "of rows", "permuted", "rescaled"
WANTED = {
    "linear": [ROWS],
    "softmax": [r"\['b'\] sum to 0 along axis 0", r"\['w'\] sum to 0 along axis 1", ROWS],
    "sigmoid network": [r"units of params\['w0'\] can be permuted", ROWS],
    "relu network": [
        r"b2'\] sum to 0 along axis 0", r"w2'\] sum to 0 along axis 1",
        *(said for i in range(2) for said in (
            rf"w{i}'\] and params\['w{i + 1}'\] can be rescaled", rf"w{i}'\] can be permuted")),
        ROWS,
    ],
    "layer norm": [r"\['w'\] sum to 0 along axis 1", ROWS],
}  # fmt: skip
"""The symmetries that some losses have, worked out by hand."""

BROKEN = {
    ("linear", "no_mean"): ROWS,
    ("softmax", "transposed"): "sum to 0",
    ("softmax", "softmax_over_rows"): "sum to 0",
    ("tanh network", "not_transposed"): PERMUTED,
    ("relu network", "relu_left_out"): RESCALED,
    ("relu network", "mask_of_next"): PERMUTED,
    ("layer norm", "mean_taken_as_constant"): "sum to 0",
}
"""Faults that break one, and which."""


@functools.cache
def arguments(name):
    problem = PROBLEMS[name]
    samples = jax.jit(jax.vmap(problem.sample))(jax.random.split(jax.random.key(7), 3))
    return problem, samples, jax.tree.map(jnp.asarray, problem.batch)


def found(name, fault=None, numpy=False):
    problem, samples, batch = arguments(name)
    with jax.enable_x64(True):
        samples, batch = jax.tree.map(np.asarray, widened(samples)), widened(batch)
        first = jax.tree.map(lambda leaf: leaf[0], samples)
        loss, by_hand = as_checked(problem.loss, problem.value_and_grad(fault), first, batch)
        if numpy:
            loss, by_hand = NumpyFunction("loss", loss), NumpyFunction("by_hand", by_hand)
        return invariants(loss, by_hand, samples, batch)


QUICK = {"linear", "softmax"}


def some(cases, name=lambda case: case):
    return [
        pytest.param(case, marks=() if name(case) in QUICK else pytest.mark.slow) for case in cases
    ]


@pytest.mark.parametrize("name", some(WANTED))
def test_the_symmetries_of_a_loss_are_found_and_a_right_gradient_has_them(name):
    kinds = found(name)
    assert len(kinds) == len(WANTED[name]), kinds
    for kind, wanted in zip(kinds, WANTED[name], strict=True):
        assert re.search(wanted, kind.name)
        assert kind.passed
        assert kind.error < 1e-14


@pytest.mark.parametrize("case", some(BROKEN, lambda case: case[0]))
def test_a_fault_that_breaks_a_symmetry_is_told(case):
    broken = [kind for kind in found(*case) if not kind.passed]
    assert broken
    assert any(re.search(BROKEN[case], kind.name) for kind in broken), broken
    assert all(kind.error > 1e-6 for kind in broken)


@pytest.mark.slow
def test_functions_in_numpy_have_the_same_symmetries():
    for fault in (None, "transposed"):
        by_jax, in_numpy = found("softmax", fault), found("softmax", fault, numpy=True)
        assert [(kind.name, kind.passed) for kind in in_numpy] == [
            (kind.name, kind.passed) for kind in by_jax
        ]


def test_a_loss_that_is_no_mean_of_rows_and_takes_no_single_one_has_no_symmetry():
    def loss(params, batch):
        return jnp.sum(params * batch.reshape(2, 3)[0])

    samples, batch = np.ones((2, 3)), np.arange(6.0)
    with jax.enable_x64(True):
        functions = as_checked(loss, jax.value_and_grad(loss), samples[0], batch)
        assert invariants(*functions, samples, batch) == ()


@pytest.mark.parametrize("logit", [17.0, 50.0])
def test_rounding_breaks_no_symmetry_and_hides_none(logit):
    """Of a softmax that is sure: its slopes are 1e-7 and 1e-21, what rounding adds is 1e-16."""

    def loss(params, factor):
        return factor * (jax.nn.logsumexp(params) - params[0])

    def not_summing_to_0(params, factor):
        value, slopes = jax.value_and_grad(loss)(params, factor)
        return value, slopes.at[1].add(1e-8 * factor)

    samples = np.array([[logit, 0, 0, 0]])
    for factor in (1e-30, 1.0):
        for by_hand, passed in ((jax.value_and_grad(loss), True), (not_summing_to_0, False)):
            with jax.enable_x64(True):
                functions = as_checked(loss, by_hand, samples[0], np.float64(factor))
                (kind,) = invariants(*functions, samples, np.float64(factor))
            assert (kind.passed, "sum to 0" in kind.name) == (passed, True), kind


@pytest.mark.exhaustive
def test_three_in_ten_planted_faults_break_a_symmetry_and_no_right_gradient_does():
    assert all(kind.passed for name in PROBLEMS for kind in found(name))
    told = [case for case in FAULTS if not all(kind.passed for kind in found(*case))]
    assert len(told) >= 18
