"""Every derivative and mean of backpropagation, broken: caught, and named.

The faults of one network by hand, and what is said of them, are in `test_check`.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from keys import rng_of
from test_check import ROWS

import jaxnn
from jaxnn.gradients import diagnose
from jaxnn.gradients.check import check_gradients

KEY = jax.random.key(3)
AT_WRONG_PLACE = "right only as the params go to 0"
EXHAUSTIVE, SLOW = pytest.mark.exhaustive, pytest.mark.slow


# --- a network of the product, whose gradient is that of a network with one wrong derivative


def wrong_derivative(value, slope, z):
    """The value at z with another slope: a straight line through the point."""
    value, slope = jax.lax.stop_gradient((value, slope))
    return value + slope * (z - jax.lax.stop_gradient(z))


def check_network(hidden, output_loss, depth, activation, slope_of_logits=None) -> Any:
    """Check the gradient through `activation(z)`, and through another slope of the logits."""
    output, loss = output_loss
    model = jaxnn.mlp((2, *(4, 5)[: depth - 1], 3), hidden=hidden, output=output, loss=loss)
    rng = np.random.default_rng(4)
    y = {
        "categorical_crossentropy": rng.integers(0, 3, ROWS),
        "binary_crossentropy": rng.integers(0, 2, (ROWS, 3)),
        "mean_squared_error": rng.uniform(0, 1, (ROWS, 3)).astype(np.float32),
    }[loss]
    batch = jaxnn.Batch(rng.normal(size=(ROWS, 2)).astype(np.float32), y)
    identity = jaxnn.mlp((3, 3), output=output, loss=loss)

    def of_logits(z, y):
        layer = jaxnn.Dense(jnp.eye(3, dtype=z.dtype), jnp.zeros(3, z.dtype))
        return identity.loss_reference((layer,), jaxnn.Batch(z, y))

    def broken(params, batch):
        a = batch.x
        for layer in params[:-1]:
            a = activation(a @ layer.weights + layer.biases[None, :])
        z = a @ params[-1].weights + params[-1].biases[None, :]
        if slope_of_logits is None:
            return of_logits(z, batch.y)
        slope = slope_of_logits(z, batch.y, jax.grad(of_logits)(z, batch.y))
        return jnp.sum(wrong_derivative(of_logits(z, batch.y) / z.size, slope, z))

    functions = model.loss_reference, jax.value_and_grad(broken)
    return check_gradients(KEY, *functions, model.sampler(scale=0.8), batch)


ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}
SOFTMAX = ("softmax", "categorical_crossentropy")
HIDDEN = {
    "relu everywhere 1": (lambda z, a: jnp.ones_like(z), "relu's derivative"),
    "tanh at the output": (lambda z, a: 1 - jnp.tanh(a) ** 2, AT_WRONG_PLACE),
    "tanh at the input": (lambda z, a: 1 - z**2, AT_WRONG_PLACE),
    "tanh left out": (lambda z, a: jnp.ones_like(z), AT_WRONG_PLACE),
    "sigmoid at the output": (
        lambda z, a: jax.nn.sigmoid(a) * (1 - jax.nn.sigmoid(a)),
        "sigmoid's derivative is taken at its output",
    ),
    "sigmoid at the input": (lambda z, a: z * (1 - z), "with the input z in place of the output a"),
    "sigmoid left out": (
        lambda z, a: jnp.ones_like(z), r"sigmoid's derivative a \(1 - a\) is left out"
    ),
}  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("fault", HIDDEN)
def test_a_broken_derivative_of_a_hidden_activation_is_named(fault, depth):
    hidden, (derivative, said) = fault.split()[0], HIDDEN[fault]
    right = ACTIVATIONS[hidden]
    assert check_network(hidden, SOFTMAX, depth, right).passed
    report = check_network(
        hidden, SOFTMAX, depth, lambda z: wrong_derivative(right(z), derivative(z, right(z)), z)
    )
    assert [leaf.passed for leaf in report.leaves] == [False] * 2 * (depth - 1) + [True] * 2
    assert len(report.suggestions) >= 1
    assert all(re.search(said, suggestion) for suggestion in report.suggestions), str(report)


def times(factor):
    return lambda z, y, slope: factor * slope


SIGMOID, SQUARES = ("sigmoid", "binary_crossentropy"), ("identity", "mean_squared_error")
OUTPUT = {
    "no 1/N": (SOFTMAX, times(ROWS), r"7 times too large: 1/7 is missing \(7 rows\): a [a-z ]*$"),
    "1/N twice": (SOFTMAX, times(1 / ROWS), "1/7 is there twice"),
    "no mean over outputs": (SIGMOID, times(3), r"1/3 is missing \(3 columns\)"),
    "no mean": (("tanh", "mean_squared_error"), times(3 * ROWS), "7 rows x 3 columns"),
    "no 2": (SQUARES, times(0.5), "the 2 of 2x, .* is missing"),
    "twice 2": (SQUARES, times(2), r"2 columns\): a sum in place of the mean, or the 2 of 2x"),
    "sign": (SQUARES, times(-1), "of the wrong sign"),
    "sign and mean": (SOFTMAX, times(-ROWS), "wrong sign and 7 times too large: 1/7 is missing"),
    "targets forgotten": (
        SOFTMAX, lambda z, y, slope: jax.nn.softmax(z) / ROWS, "derivative of the loss by the"
    ),
    "output left out": (
        ("sigmoid", "mean_squared_error"),
        lambda z, y, slope: (jax.nn.sigmoid(z) - y) * 2 / z.size,
        "is left out",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=SLOW if name == "no 2" else EXHAUSTIVE) for name in OUTPUT],
)
def test_a_broken_derivative_of_a_loss_is_named(fault):
    output_loss, slope, said = OUTPUT[fault]
    report = check_network("tanh", output_loss, 1, jnp.tanh, slope)
    assert not any(leaf.passed for leaf in report.leaves)
    assert re.search(said, " ".join(report.suggestions)), str(report)


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
