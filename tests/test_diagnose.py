"""What a wrong gradient is called, from how it differs from the right one.

What is said of whole networks is in `test_check`, `test_functions` and `test_planted_faults`.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from keys import rng_of

from jaxnn.gradients import diagnose
from jaxnn.gradients.check import check_gradients

KEY = jax.random.key(3)
ROWS = 7
BATCH = np.zeros((ROWS, 2)), np.zeros((ROWS, 3))
MISSING = "a sum in place of the mean"
FACTORS = [
    (7, "div", f"7 times too large: 1/7 is missing (7 rows): {MISSING}"),
    (1 / 7, "mul", "7 times too small: 1/7 is there twice (7 rows)"),
    (3, "mul", f"3 times too large: 1/3 is missing (3 columns): {MISSING}"),
    (21, "div", f"21 times too large: 1/21 is missing (7 rows x 3 columns): {MISSING}"),
    (-1, "square div", "of the wrong sign"),
    (-7, "div", f"of the wrong sign and 7 times too large: 1/7 is missing (7 rows): {MISSING}"),
    (0.5, "square", "2 times too small: the 2 of 2x, the derivative of x^2, is missing, or "
     "1/2 is there (2 columns): a mean in place of the sum"),
    (2, "square div", f"2 times too large: 1/2 is missing (2 columns): {MISSING}, or "
     "the 2 of 2x, the derivative of x^2, is there twice"),
    (1.25, "square div", "off by the factor 1.25"),
]  # fmt: skip


@pytest.mark.parametrize(("ratio", "parts", "said"), FACTORS)
def test_a_factor_is_told_from_the_axes_of_the_batch_and_from_what_the_loss_contains(
    ratio, parts, said
):
    assert diagnose._factor(ratio, BATCH, set(parts.split())) == said


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_sigmoids_on_the_way_back_are_counted(layers):
    right = np.random.default_rng(2).normal(size=(4, 5))
    for factor, said in ((4.0, "(1 - a) is left out"), (0.9400148, "taken at its output")):
        pair = diagnose._Pair(factor**layers * right, right, right, exact=1e-7)
        pairs: Any = dict.fromkeys(("as drawn", "aside", "near 0"), pair)
        (fault,) = diagnose._near_0(pairs, {"logistic"})
        assert fault.startswith(f"near 0 it is off by {factor**layers:.3g}: the sigmoid's")
        assert said in fault
        assert not list(diagnose._near_0(pairs, {"max"}))


# --- other losses


def cubic(params, batch):
    """Neither a layer nor an activation, neither a square nor a mean."""
    return jnp.sum(jnp.sum(batch, axis=1) * jnp.sum(params + params * params * params))


def two_normals(key):
    return rng_of(key).normal(size=2)


def cubic_by_hand(number, params, batch):
    total, square = jnp.sum(batch), params * params
    wrong = [
        total * jnp.ones_like(params),
        3 * square * total,
        4 * (1 + 3 * square + square * square) * total,
        (1 + 3 * square) * total / len(batch),
        (1 + 3 * square) * total * (1 + 1e-8),
        (1 + 3 * square) * total * (1 + 1e-6),
    ]
    return cubic(params, batch), jnp.stack(wrong)[number]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "right only as the params go to 0"),
        (1, "it vanishes where pre-activations are near 0"),
        (2, "wrong in 2 of 2 coordinates, and no usual fault fits"),
        (3, "7 times too small: 1/7 is there twice (7 rows)"),
        (4, "off by 1e-7 of its largest coordinate at most, as where something is in float32"),
        (5, "off by the factor 1.000001"),
    ],
)
def test_nothing_is_blamed_that_the_loss_does_not_contain(number, said):
    rows = np.ones((ROWS, 3), np.float32)
    by_hand = Partial(cubic_by_hand, np.int32(number))
    report = check_gradients(KEY, cubic, by_hand, two_normals, rows, num_samples=16)
    assert report.suggestions == (f"params: {said}",)


def changed(loss, change):
    """The loss, and its gradient with a change: `change(gradient, params)`."""

    def by_hand(params, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        return value, change(gradient, params)

    return by_hand


def with_penalty(params, batch):
    error = jnp.mean((batch @ params["w"] - 1) ** 2)
    return error + 0.1 * jnp.sum(params["w"] ** 2) + 0 * params["idle"]


def without_penalty(gradient, params):
    return {"w": gradient["w"] - 0.2 * params["w"], "idle": jnp.ones_like(gradient["idle"])}


def with_it_twice(gradient, params):
    return gradient | {"w": gradient["w"] + 0.2 * params["w"]}


def two_parts(params, batch):
    return jnp.sum(jnp.exp(params["a"]) + params["a"]) + jnp.sum(jnp.exp(params["b"]))


def one_unknown(gradient, params):
    """That of b is as small as rounding where numbers cancel."""
    return {"a": gradient["a"] * jnp.array([1.5, 3.0, 2.0]), "b": 1e-17 * gradient["b"]}


def magnitude(params, batch):
    return jnp.sum(jnp.abs(params))


def layer(params, batch):
    return jnp.sum(jnp.tanh(params["w"] @ batch + params["b"]))


def transposed(gradient, params):
    return gradient | {"w": gradient["w"].T}


def all_unknown(gradient, params):
    """As where the derivative of the loss by the outputs is wrong."""
    factors = jnp.array([[1.5], [3.0], [2.0]])
    return jax.tree.map(lambda slopes: slopes * factors, gradient)


def float32s(**leaves):
    return {name: np.float32(leaf) for name, leaf in leaves.items()}


PENALIZED = float32s(w=[0.5, -2], idle=1), np.arange(6, dtype=np.float32).reshape(3, 2)
LAYER = float32s(w=np.random.default_rng(5).normal(size=(3, 3)), b=np.ones((3, 1))), np.ones((3, 1))
OTHER = [
    (
        with_penalty, without_penalty, PENALIZED,
        "params['idle']: should be 0 everywhere: the loss does not depend on it",
        "params['w']: lacks 0.2 times the params: a penalty, left out, or its factor 2 forgotten",
    ),
    (
        with_penalty, with_it_twice, PENALIZED,
        "params['w']: exceeds the right one by 0.2 times the params: a penalty, wrong, or there "
        "twice",
    ),
    (  # The leaf without a cause comes last.
        two_parts, one_unknown, (float32s(a=[0.5, -2, 1], b=[1, 1]), None),
        "params['b']: it is 0: left out, or summed over the wrong axis",
        "params['a']: wrong in 3 of 3 coordinates, and no usual fault fits",
    ),
    (
        magnitude,  # which has no relu to be blamed
        lambda gradient, params: jnp.ones_like(gradient), (np.array([1, -2], np.float32), None),
        "params: right where params and inputs are all positive: a negative number loses its sign",
    ),
    (layer, transposed, LAYER, "params['w']: transposed"),
    (
        layer, all_unknown, LAYER,
        "every leaf is wrong, and no usual fault fits: look at the derivative of the loss by the "
        "outputs, and of the output activation",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "change", "given", "said"), [(*e[:3], e[3:]) for e in OTHER])
def test_faults_of_other_losses_are_named(loss, change, given, said):
    assert check_gradients(KEY, loss, changed(loss, change), *given).suggestions == said


@pytest.mark.parametrize(
    ("function", "contains", "lacks"),
    [
        (jax.nn.sigmoid, "logistic", "max tanh exp"),
        (jax.nn.softmax, "div", "max exp logistic"),
        (lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(c), None), x, None, 3)[0], "tanh", "max"),
        (lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.square, x), "sin square gt", "max exp"),
        (lambda x: x[:, None] * x[None, :] @ x, "dot_general", "square max"),
        (lambda x: (jax.debug.callback(lambda: None), jnp.where(True, x, 0))[1], "select_n", "max"),
        (lambda x: jnp.arange(3)[jnp.argmax(x)].astype(x.dtype) * x, "mul", "lt select_n max"),
    ],
)
def test_what_a_loss_is_made_of_is_read_through_every_inner_function(function, contains, lacks):
    for wrapped in (function, jax.jit(function), jax.checkpoint(function)):
        parts = diagnose._parts(jax.make_jaxpr(wrapped)(jnp.ones(3)).jaxpr)
        assert set(contains.split()) <= parts
        assert not set(lacks.split()) & parts


def test_a_hint_that_explains_few_samples_is_not_given():
    """relu's mask is taken from the way back, which is right in few samples of a single row."""

    def sample(key):
        return dict(zip("uvw", rng_of(key).normal(size=(3, 1, 4)), strict=True))

    def hidden(params, batch):
        return batch[:, None] @ params["u"] + params["v"]

    def loss(params, batch):
        return jnp.mean(jnp.square(jax.nn.relu(hidden(params, batch)) @ params["w"].T - 1))

    def masked(params, batch):
        z = hidden(params, batch)
        off = 2 * (jax.nn.relu(z) @ params["w"].T - 1) / len(z)
        back = off @ params["w"]
        back = jnp.where(back > 0, back, 0)
        gradient = {"u": batch[None, :] @ back, "v": jnp.sum(back, axis=0)[None, :]}
        return loss(params, batch), gradient | {"w": off.T @ jax.nn.relu(z)}

    batch = np.arange(-3, 4, dtype=np.float32)
    report = check_gradients(KEY, loss, masked, sample, batch, num_samples=16)
    assert [leaf.passed for leaf in report.leaves] == [False, False, True]
    assert not re.search("in \\d+ of \\d+ samples", str(report.suggestions)), report.suggestions


def test_a_batch_of_keys_and_a_noisy_loss_keep_the_report():
    def loss(params, batch):
        return jnp.sum(params * jax.random.normal(batch, (3,), params.dtype)) + 1e6

    def slightly(gradient, params):
        return gradient * (1 + 3e-6 * jnp.array([0.0, 0.0, 1.0], gradient.dtype))

    params = np.ones(3, np.float32)
    report = check_gradients(KEY, loss, changed(loss, slightly), params, jax.random.key(1))
    assert not report.passed
    assert report.worst.coordinate == (2,)
    assert report.worst.gradient == pytest.approx(report.worst.expected, rel=4e-6)
