"""Every derivative, transpose and mean of backpropagation, broken: caught, and named."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from test_gradient_check import FAULTS, NAMES, ROWS, by_hand, check, data, loss_fn, sample

import jaxnn
from jaxnn.gradient_check import check_gradients
from jaxnn.model import backprop
from jaxnn.model.activations import ACTIVATIONS, Activation
from jaxnn.model.heads import HEADS, Head

KEY = jax.random.key(3)
AT_WRONG_PLACE = "right only where pre-activations are near 0"


@pytest.mark.parametrize(
    ("fault", "names", "said"),
    [
        (
            "relu lets everything through",
            "b0 w0",
            "relu's derivative is not 0 for units that are off",
        ),
        ("tanh differentiated at its output", "b0 b1 w0 w1", AT_WRONG_PLACE),
        ("no 1/N", "b0 b1 b2 w0 w1 w2", "factor 7 = the 7 rows: 1/7 is missing"),
        ("wrong sign", "b0 b1 b2 w0 w1 w2", "of the wrong sign"),
        ("weight not transposed", "b0 w0", r"right where params\['w1'\] is symmetric"),
        ("hidden bias forgotten", "b0", "left out: it is 0 everywhere"),
        ("half a weight gradient", "w2", "off by the factor 0.5 = 1/2"),
        ("output bias of one row", "b2", "wrong in 3 of 3 coordinates"),
        ("one coordinate off by a millionth", "w0", "wrong in 1 of 8 coordinates"),
        ("nan in one coordinate", "w0", "wrong in 1 of 8 coordinates"),
    ],
)
def test_the_suggestion_names_the_fault_and_the_leaves(fault, names, said):
    (suggestion,) = check(fault).suggestions
    leaves, sentence = suggestion.split(": ", 1)
    assert leaves == ", ".join(f"params['{name}']" for name in names.split())
    assert re.search(said, sentence), sentence
    assert f"perhaps: {suggestion}" in str(check(fault))


def test_what_is_right_is_suspected_of_nothing():
    assert check().suggestions == ()
    assert "perhaps" not in str(check())
    assert "return another loss" in str(check("loss without its mean"))


def logit(a):
    return jnp.log(a) - jnp.log1p(-a)


HIDDEN = {
    ("relu", "everywhere 1"): (lambda a, g: g, "relu's derivative"),
    ("tanh", "at the output"): (lambda a, g: g * (1 - jnp.tanh(a) ** 2), AT_WRONG_PLACE),
    ("tanh", "at the input"): (lambda a, g: g * (1 - jnp.arctanh(a) ** 2), AT_WRONG_PLACE),
    ("tanh", "left out"): (lambda a, g: g, AT_WRONG_PLACE),
    ("sigmoid", "at the output"): (
        lambda a, g: g * jax.nn.sigmoid(a) * (1 - jax.nn.sigmoid(a)),
        "sigmoid's derivative is taken at its output",
    ),
    ("sigmoid", "at the input"): (
        lambda a, g: g * logit(a) * (1 - logit(a)),
        "with the input z in place of the output a",
    ),
    ("sigmoid", "left out"): (lambda a, g: g, r"sigmoid's derivative a \(1 - a\) is left out"),
}


USUAL = [("relu", "everywhere 1"), ("tanh", "at the output"), ("sigmoid", "at the output")]
DEPTHS = [
    *((fault, 2) for fault in USUAL),
    *(
        pytest.param(fault, depth, marks=pytest.mark.exhaustive)
        for fault in HIDDEN
        for depth in (2, 3)
        if fault not in USUAL or depth == 3
    ),
]


@pytest.mark.parametrize(("fault", "depth"), DEPTHS)
def test_a_broken_derivative_of_a_hidden_activation_is_named(fault, depth, monkeypatch):
    hidden, (backward, said) = fault[0], HIDDEN[fault]
    report = check_network(hidden, ("softmax", "categorical_crossentropy"), depth)
    assert report.passed
    broken = Activation(ACTIVATIONS[hidden].forward, backward)
    monkeypatch.setitem(ACTIVATIONS, hidden, broken)
    report = check_network(hidden, ("softmax", "categorical_crossentropy"), depth)
    assert [leaf.passed for leaf in report.leaves] == [False] * 2 * (depth - 1) + [True] * 2
    assert len(report.suggestions) >= 1
    assert all(re.search(said, suggestion) for suggestion in report.suggestions), str(report)


def rows_times(factor):
    return lambda rows: (
        lambda logits, targets: (
            rows(logits, targets)[0],
            factor * rows(logits, targets)[1],
        )
    )


def without_targets(rows):
    return lambda logits, targets: (rows(logits, targets)[0], jax.nn.softmax(logits, axis=0))


def without_sigmoid(rows):
    return lambda logits, targets: (
        rows(logits, targets)[0],
        (jax.nn.sigmoid(logits) - targets.T) * 2 / len(logits),
    )


HEAD_FAULTS = {
    "no 1/N": (("softmax", "categorical_crossentropy"), rows_times(ROWS), "the 7 rows: 1/7"),
    "1/N twice": (("softmax", "categorical_crossentropy"), rows_times(1 / ROWS), "1/7: once too"),
    "no mean over outputs": (("sigmoid", "binary_crossentropy"), rows_times(3), "the 3 outputs"),
    "no mean": (("tanh", "mean_squared_error"), rows_times(3 * ROWS), "7 rows x 3 outputs"),
    "no 2": (("identity", "mean_squared_error"), rows_times(0.5), "factor 0.5 = 1/2"),
    "twice 2": (("identity", "mean_squared_error"), rows_times(2), "factor 2 = 2, as of"),
    "sign": (("identity", "mean_squared_error"), rows_times(-1), "of the wrong sign"),
    "sign and mean": (
        ("softmax", "categorical_crossentropy"), rows_times(-ROWS), "wrong sign and off by the"
    ),
    "targets forgotten": (
        ("softmax", "categorical_crossentropy"), without_targets, "derivative of the loss by the"
    ),
    "output left out": (("sigmoid", "mean_squared_error"), without_sigmoid, "is left out"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEAD_FAULTS)
def test_a_broken_derivative_of_a_loss_is_named(fault):
    name, change, said = HEAD_FAULTS[fault]
    report = check_network("tanh", name, 2, change)
    assert not any(leaf.passed for leaf in report.leaves)
    assert re.search(said, " ".join(report.suggestions)), str(report)


def check_network(hidden, head, depth, change=lambda rows: rows) -> Any:
    """The report on a network whose head is changed."""
    sizes = (2, *(4, 5)[: depth - 1], 3)
    model = jaxnn.mlp(sizes, hidden=hidden, output=head[0], loss=head[1])
    changed = Head(HEADS[head].loss, change(HEADS[head].rows))
    generator = np.random.default_rng(4)
    y = {
        "categorical_crossentropy": generator.integers(0, 3, ROWS),
        "binary_crossentropy": generator.integers(0, 2, (ROWS, 3)),
        "mean_squared_error": generator.uniform(0, 1, (ROWS, 3)).astype(np.float32),
    }[head[1]]
    batch = jaxnn.Batch(generator.normal(size=(ROWS, 2)).astype(np.float32), y)

    def changed_gradient(params, batch):
        return backprop.value_and_grad(params, batch, hidden, changed)

    return check_gradients(
        KEY, model.loss_reference, changed_gradient, model.sampler(scale=0.8), batch
    )


def test_a_square_gradient_that_is_transposed_is_named():
    def loss(params, batch):
        return jnp.sum(jnp.tanh(params @ batch))

    def turned(params, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        return value, gradient.T

    def normals(key):
        return jax.random.normal(key, (3, 3))

    report = check_gradients(KEY, loss, turned, normals, np.ones((3, 1), np.float32))
    assert report.suggestions == ("params: transposed",)


def test_the_worst_case_can_be_had_again():
    report = check("tanh differentiated at its output")
    worst = report.worst
    assert worst.name in {f"params['{name}']" for name in ("b0", "b1", "w0", "w1")}
    again: Any = sample(report.worst_key)
    fault = FAULTS.index("tanh differentiated at its output")
    function = Partial(by_hand, np.int32(fault))
    alone = check_gradients(KEY, loss_fn, function, again, data())
    same = alone.leaves[NAMES.index(worst.name)]
    assert (same.coordinate, same.sample, alone.worst_key) == (worst.coordinate, 0, None)
    assert same.gradient == pytest.approx(worst.gradient, rel=1e-12)
    assert same.expected == pytest.approx(worst.expected, rel=1e-6)
