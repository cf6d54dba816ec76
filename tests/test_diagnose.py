"""Every derivative, transpose and mean of backpropagation, broken: caught, and named."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from test_check import FAULTS, NAMES, ROWS, by_hand, check, data, loss_fn, sample

import jaxnn
from jaxnn.gradients import diagnose as gradient_faults
from jaxnn.gradients.check import check_gradients
from jaxnn.model import backprop
from jaxnn.model.activations import ACTIVATIONS, Activation
from jaxnn.model.heads import OUTPUT_LOSSES, Head

KEY = jax.random.key(3)
AT_WRONG_PLACE = "right only as the params go to 0"


@pytest.mark.parametrize(
    ("fault", "names", "said"),
    [
        (
            "relu lets everything through",
            "b0 w0",
            "relu's derivative is not 0 for units that are off",
        ),
        ("tanh differentiated at its output", "b0 b1 w0 w1", AT_WRONG_PLACE),
        ("no 1/N", "b0 b1 b2 w0 w1 w2", "factor 7 = 7; the 7 rows: 1/7 is missing"),
        ("wrong sign", "b0 b1 b2 w0 w1 w2", "of the wrong sign"),
        ("weight not transposed", "b0 w0", r"right where params\['w1'\] is symmetric"),
        ("hidden bias forgotten", "b0", "left out: it is 0 everywhere"),
        ("half a weight gradient", "w2", "off by the factor 0.5 = 1/2; 2 columns: [^x]*$"),
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


USUAL = [("tanh", "at the output")]
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
    "1/N twice": (
        ("softmax", "categorical_crossentropy"), rows_times(1 / ROWS), "1/7 is there twice"
    ),
    "no mean over outputs": (("sigmoid", "binary_crossentropy"), rows_times(3), "3 columns: 1/3"),
    "no mean": (("tanh", "mean_squared_error"), rows_times(3 * ROWS), "7 rows x 3 columns"),
    "no 2": (("identity", "mean_squared_error"), rows_times(0.5), "the 2 of 2x, .* is missing"),
    "twice 2": (("identity", "mean_squared_error"), rows_times(2), "2 columns.* or the 2 of 2x"),
    "sign": (("identity", "mean_squared_error"), rows_times(-1), "of the wrong sign"),
    "sign and mean": (
        ("softmax", "categorical_crossentropy"), rows_times(-ROWS), "wrong sign and off by the"
    ),
    "targets forgotten": (
        ("softmax", "categorical_crossentropy"), without_targets, "derivative of the loss by the"
    ),
    "output left out": (("sigmoid", "mean_squared_error"), without_sigmoid, "is left out"),
}  # fmt: skip


QUICK = ("no 1/N", "no 2", "targets forgotten")


@pytest.mark.parametrize(
    "fault",
    [
        *QUICK,
        *(
            pytest.param(fault, marks=pytest.mark.exhaustive)
            for fault in HEAD_FAULTS
            if fault not in QUICK
        ),
    ],
)
def test_a_broken_derivative_of_a_loss_is_named(fault):
    name, change, said = HEAD_FAULTS[fault]
    report = check_network("tanh", name, 2, change)
    assert not any(leaf.passed for leaf in report.leaves)
    assert re.search(said, " ".join(report.suggestions)), str(report)


def check_network(hidden, head, depth, change=lambda rows: rows) -> Any:
    """The report on a network whose head is changed."""
    sizes = (2, *(4, 5)[: depth - 1], 3)
    model = jaxnn.mlp(sizes, hidden=hidden, output=head[0], loss=head[1])
    changed = Head(OUTPUT_LOSSES[head].loss, change(OUTPUT_LOSSES[head].rows))
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


def test_a_penalty_left_out_and_a_leaf_that_does_not_matter_are_named():
    def loss(params, batch):
        error = jnp.mean((batch @ params["w"] - 1) ** 2)
        return error + 0.1 * jnp.sum(params["w"] ** 2) + 0 * params["idle"]

    def without_penalty(params, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        return value, {"w": gradient["w"] - 0.2 * params["w"], "idle": jnp.ones_like(value)}

    def sample_both(key):
        return {"w": jax.random.normal(key, (2,)), "idle": jnp.ones(())}

    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    report = check_gradients(KEY, loss, without_penalty, sample_both, rows)
    assert report.suggestions == (
        "params['idle']: should be 0 everywhere: the loss does not depend on it",
        "params['w']: off by -0.2 times the params: a penalty, left out or wrong",
    )


def cubic(params, batch):
    """Neither a layer nor an activation, neither a square nor a mean."""
    return jnp.sum(jnp.sum(batch, axis=1) * jnp.sum(params + params * params * params))


def cubic_by_hand(number, params, batch):
    total, square = jnp.sum(batch), params * params
    wrong = [
        total * jnp.ones_like(params),
        3 * square * total,
        4 * (1 + 3 * square + square * square) * total,
        (1 + 3 * square) * total / len(batch),
        (1 + 3 * square) * total * (1 + 1e-8),
    ]
    return cubic(params, batch), jnp.stack(wrong)[number]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "right only as the params go to 0"),
        (1, "it vanishes where pre-activations are near 0"),
        (2, "wrong in 2 of 2 coordinates, and no usual fault fits"),
        (3, "off by the factor 0.142857 = 1/7; the 7 rows: 1/7 is there twice"),
        (4, "off by 1e-7 of its largest coordinate at most, as where something is in float32"),
    ],
)
def test_nothing_is_blamed_that_the_loss_does_not_contain(number, said):
    def normals(key):
        return jax.random.normal(key, (2,))

    rows = np.ones((ROWS, 3), np.float32)
    report = check_gradients(KEY, cubic, Partial(cubic_by_hand, np.int32(number)), normals, rows)
    assert report.suggestions == (f"params: {said}",)


def test_a_relu_is_blamed_only_where_the_loss_has_one():
    def magnitude(params, batch):
        return jnp.sum(jnp.abs(params))

    def ones(params, batch):
        return magnitude(params, batch), jnp.ones_like(params)

    params = np.array([1.0, -2.0], np.float32)
    report = check_gradients(KEY, magnitude, ones, params, None)
    assert report.suggestions == ("params: right where params and inputs are all positive",)


@pytest.mark.parametrize(
    ("function", "contains", "lacks"),
    [
        (jax.nn.sigmoid, "logistic", "max tanh exp"),
        (jax.nn.relu, "max", "logistic exp"),
        (jax.nn.softmax, "div", "max exp logistic"),
        (lambda x: 1 / (1 + jnp.exp(-x)), "exp div", "logistic max"),
        (lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(c), None), x, None, 3)[0], "tanh", "max"),
        (lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.square, x), "sin square gt", "max exp"),
        (lambda x: x[:, None] * x[None, :] @ x, "dot_general", "square max"),
        (lambda x: x * x, "square", "max"),
        (lambda x: (jax.debug.callback(lambda: None), jnp.where(True, x, 0))[1], "select_n", "max"),
        (lambda x: jnp.arange(3)[jnp.argmax(x)].astype(x.dtype) * x, "mul", "lt select_n max"),
    ],
)  # fmt: skip
def test_what_a_loss_is_made_of_is_read_through_every_inner_function(function, contains, lacks):
    for wrapped in (function, jax.jit(function), jax.checkpoint(function)):
        parts = gradient_faults._parts(jax.make_jaxpr(wrapped)(jnp.ones(3)).jaxpr)
        assert set(contains.split()) <= parts
        assert not set(lacks.split()) & parts


def test_a_batch_of_keys_and_a_noisy_loss_keep_the_report():
    def loss(params, batch):
        return jnp.sum(params * jax.random.normal(batch, (3,), params.dtype)) + 1e6

    def slightly_off(params, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        return value, gradient * (1 + 3e-6 * jnp.array([0.0, 0.0, 1.0], gradient.dtype))

    report = check_gradients(KEY, loss, slightly_off, np.ones(3, np.float32), jax.random.key(1))
    assert not report.passed
    assert report.worst.coordinate == (2,)
    assert report.worst.gradient == pytest.approx(report.worst.expected, rel=4e-6)


def test_params_without_numbers_are_refused():
    def loss(params, batch):
        return jnp.sum(params**2)

    square = jax.value_and_grad(loss)
    with pytest.raises(ValueError, match="params must hold at least one number"):
        check_gradients(KEY, loss, square, np.zeros(0, np.float32), None)


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
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
