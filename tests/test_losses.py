"""Losses against plain NumPy in float64, and the forms of `OutputLoss` against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from output_losses import PAIRS
from tolerances import FORWARD, GRADIENT, leaf_error

from jaxnn.model import losses
from jaxnn.model.losses import OUTPUT_LOSSES

EXHAUSTIVE = pytest.mark.exhaustive
ROWS, OUTPUTS = 7, 3
DTYPES = ("float32", "float64")
RNG = np.random.default_rng(4)
LOGITS = np.float32(RNG.normal(0.7, 3.0, (ROWS, OUTPUTS))).astype(float)
PROBABILITIES = np.float32(scipy.special.softmax(LOGITS, axis=1)).astype(float)
CLASSES = np.array([2, 0, 1, 1, 0, 2, 0])
ONE_HOT = np.eye(OUTPUTS)[CLASSES]
BITS = (RNG.random((ROWS, OUTPUTS)) < 0.4).astype(float)
SOFT = np.float32(RNG.random((ROWS, OUTPUTS)) * (RNG.random((ROWS, OUTPUTS)) < 0.8)).astype(float)
WEIGHTS = SOFT + 0.5 * ONE_HOT  # rows that do not sum to 1, some entries 0
NUMBERS = np.float32(RNG.normal(-2.0, 4.0, (ROWS, OUTPUTS))).astype(float)
EVEN = np.float32(scipy.special.softmax(LOGITS / 4, axis=1)).astype(float)  # 1/p is moderate

ENTRIES = {
    "mean_squared_error": np.square,
    "mean_absolute_error": np.abs,
    "huber": lambda error: scipy.special.huber(1, error),
}
"""What each loss of errors makes of them, in float64."""

INPUTS = {
    **dict.fromkeys(ENTRIES, (LOGITS, NUMBERS)),
    "binary_crossentropy": (PROBABILITIES, BITS),
    "categorical_crossentropy": (PROBABILITIES, CLASSES),
    "sigmoid_crossentropy": (LOGITS, BITS),
    "softmax_crossentropy": (LOGITS, CLASSES),
}
BINARY = ("binary_crossentropy", "sigmoid_crossentropy")
CATEGORICAL = ("categorical_crossentropy", "softmax_crossentropy")
CASES = [
    *((name, *pair) for name, pair in INPUTS.items()),
    ("binary_crossentropy", EVEN, SOFT),
    ("categorical_crossentropy", EVEN, WEIGHTS),
    ("sigmoid_crossentropy", LOGITS, SOFT),
    ("softmax_crossentropy", LOGITS, WEIGHTS),
]


def as_weights(target):
    return target if np.ndim(target) else np.eye(OUTPUTS)[target]


def numpy_loss(name, predictions, targets):
    """The textbook formulas, one row after the other, in float64."""
    total = 0.0
    for p, t in zip(predictions, targets, strict=True):
        if name in ENTRIES:
            total += np.mean(ENTRIES[name](p - t))
        elif name == "binary_crossentropy":
            total -= np.mean(t * np.log(p) + (1 - t) * np.log(1 - p))
        elif name == "categorical_crossentropy":
            total -= np.sum(as_weights(t) * np.log(p))
        elif name == "sigmoid_crossentropy":
            total += np.mean(np.log(1 + np.exp(p)) - t * p)
        else:
            total += np.sum(as_weights(t) * (np.log(np.sum(np.exp(p))) - p))
    return total / len(predictions)


def central_differences(function, point, step=1e-6):
    slopes = np.zeros_like(point)
    for index in np.ndindex(*point.shape):
        move = np.zeros_like(point)
        move[index] = step
        slopes[index] = (function(point + move) - function(point - move)) / (2 * step)
    return slopes


def evaluate(name, predictions, targets, dtype="float32"):
    """The loss and its derivative by JAX, compiled as one."""
    loss = getattr(losses, name)
    with jax.enable_x64(dtype == "float64"):
        both = jax.jit(jax.value_and_grad(lambda p: loss(p, targets)))
        return both(jnp.asarray(predictions, dtype))


@pytest.mark.parametrize(
    ("name", "predictions", "targets", "dtype"),
    [
        *((*case, "float64") for case in CASES),
        *((*case, "float32") for case in CASES[: len(INPUTS)]),
        *(pytest.param(*case, "float32", marks=EXHAUSTIVE) for case in CASES[len(INPUTS) :]),
    ],
)
def test_value_and_slope_are_those_of_the_formula(name, predictions, targets, dtype):
    value, slopes = evaluate(name, predictions, targets, dtype)
    assert value.dtype == slopes.dtype == dtype
    expected = np.float64(numpy_loss(name, predictions, targets))
    assert leaf_error(value, expected) <= FORWARD[dtype]
    expected = central_differences(lambda p: numpy_loss(name, p, targets), predictions)
    assert leaf_error(slopes, expected) <= max(GRADIENT[dtype], 1e-7)  # what differences can tell


@pytest.mark.parametrize(
    ("names", "targets", "same"),
    [
        (ENTRIES, NUMBERS, [NUMBERS.tolist(), NUMBERS.astype(np.float32)]),
        (BINARY, BITS, [BITS.astype(bool), BITS.astype(np.int32), BITS.astype(np.float16)]),
        (CATEGORICAL, CLASSES, [ONE_HOT.astype(np.int8), CLASSES.astype("u1"), CLASSES.tolist()]),
    ],
)
def test_targets_of_any_type_are_the_same(names, targets, same):
    for name in names:
        expected = evaluate(name, INPUTS[name][0], targets)
        loss, predictions = getattr(losses, name), jnp.asarray(INPUTS[name][0], "float32")
        functions = [jax.value_and_grad(lambda p, y=y, loss=loss: loss(p, y)) for y in same]
        for found in jax.jit(lambda p, every=functions: [each(p) for each in every])(predictions):
            assert leaf_error(found, expected) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_clip_holds_value_and_slope(dtype):
    p = np.array([0.0, 1e-9, 1.0, 2.0])
    low, high = np.array([1e-7, 1 - 1e-7], dtype).astype(float)  # in the dtype's own rounding
    clipped = np.array([low, low, high, high])
    two = np.stack([np.full(4, 0.4), p], axis=1)
    for loss, rows, labels, expected in (
        ("categorical_crossentropy", two, np.ones(4, int), -np.log(clipped)),
        ("binary_crossentropy", p[:, None], np.zeros((4, 1)), -np.log1p(-clipped)),
    ):
        value, slopes = evaluate(loss, rows, labels, dtype)
        assert leaf_error(value, expected.mean()) <= FORWARD[dtype]
        np.testing.assert_array_equal(slopes[:, -1], 0)


def test_slopes_at_the_kinks_of_errors_are_those_of_jax():
    errors, zeros = jnp.array([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), jnp.zeros((7, 1))
    expected = {"mean_absolute_error": jnp.sign(errors), "huber": jnp.clip(errors, -1, 1)}
    for name, slopes in expected.items():
        by_hand = OUTPUT_LOSSES["identity", name].value_and_slope(errors[None], zeros)[1][0]
        by_jax = 7 * evaluate(name, errors[:, None], zeros)[1][:, 0]
        assert leaf_error(by_hand, slopes) == 0
        assert leaf_error(by_jax, slopes) <= FORWARD["float32"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_labels_at_large_logits_are_finite_and_true(dtype):
    big = 1e4
    z = np.array([[big, -big], [big, -big], [-big, big], [0.0, big], [-big, -big]])
    classes = np.array([0, 1, 0, 0, 1])
    bits = np.eye(2)[classes]
    softmax = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0.5, 0.5]])
    sigmoid = (z > 0) + 0.5 * (z == 0)
    row_losses = [0, 2 * big, 2 * big, big, np.log(2)]
    entry_losses = np.maximum(z, 0) - bits * z + np.log(2) * (z == 0)
    for loss, labels, expected, slope in (
        ("softmax_crossentropy", classes, np.mean(row_losses), (softmax - bits) / 5),
        ("sigmoid_crossentropy", bits, np.mean(entry_losses), (sigmoid - bits) / 10),
    ):
        value, slopes = evaluate(loss, z, labels, dtype)
        assert leaf_error(value, expected) <= FORWARD[dtype]
        assert leaf_error(slopes, slope) <= GRADIENT[dtype]


@pytest.mark.parametrize("z", [6.0, 20.0, 80.0])
def test_small_losses_and_slopes_keep_their_digits(z):
    expected = np.log1p(np.exp(-z))  # -log sigmoid(z); of probabilities, it would be 0 here
    value, _ = evaluate("sigmoid_crossentropy", [[z, -z]], [[1, 0]])
    assert float(value) == pytest.approx(expected, rel=FORWARD["float32"])
    by_hand = OUTPUT_LOSSES["sigmoid", "binary_crossentropy"].value_and_slope
    values, slopes = by_hand(jnp.array([[z], [-z]]), jnp.array([[1.0, 0.0]]))
    assert float(values[0]) == pytest.approx(expected, rel=FORWARD["float32"])
    slope = scipy.special.expit(-z) / 2
    np.testing.assert_allclose(slopes, [[-slope], [slope]], rtol=GRADIENT["float32"])
    value, _ = evaluate("softmax_crossentropy", [[z, 0]], [0])
    assert float(value) == pytest.approx(expected, abs=1.2e-7)  # as near as 1 - p can say


def targets_of(loss, rows, outputs):
    """Targets by their kind."""
    rng = np.random.default_rng(6)
    soft = rng.random((rows, outputs)) * (rng.random((rows, outputs)) < 0.8)
    if loss == "categorical_crossentropy":
        return rng.integers(0, outputs, rows), soft + 0.1
    return (soft, rng.integers(0, 2, soft.shape)) if loss == "binary_crossentropy" else (5 * soft,)


@pytest.mark.parametrize("outputs", [3, *(pytest.param(n, marks=EXHAUSTIVE) for n in (2, 17))])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_the_forms_of_an_output_loss_agree(pair, outputs):
    """The mean that JAX differentiates, the slope by hand, and the form per example."""
    mean_loss, value_and_slope, per_example = OUTPUT_LOSSES[pair]

    @jax.jit
    def every_form(z, y):
        target = y if y.ndim == 1 else y.T.astype(z.dtype)
        scores = per_example.score(list(z.T), target)
        return jax.value_and_grad(mean_loss)(z, y), value_and_slope(z.T, y), scores

    z = np.random.default_rng(5).normal(0.3, 2.0, (ROWS, outputs))
    for y in targets_of(pair[1], ROWS, outputs):
        with jax.enable_x64(True):
            found = jax.device_get(every_form(z, y))
        (expected, slopes), by_rows, (factor, rest) = found
        assert leaf_error(np.mean(by_rows[0]), expected) <= FORWARD["float64"]
        assert leaf_error(by_rows[1].T / ROWS, slopes) <= GRADIENT["float64"]
        total = np.sum(rest if factor is None else rest + np.log(factor))
        terms = ROWS * (outputs if per_example.per_output else 1)
        assert leaf_error(total / terms, expected) <= FORWARD["float64"]
        if factor is not None:
            most = 2.0**outputs if per_example.factor_doubles else outputs
            assert np.all((factor >= 1) & (factor <= most))


NONSENSE = {
    **{name: [[np.nan, 0, 0], [0, np.inf, 0], [0, 0, -np.inf]] for name in ENTRIES},
    "binary_crossentropy": [[1.5, 0, 0], [0, -0.5, 0], [0, 0, 2], [np.nan, 0, 0], [np.inf, 0, 0]],
    "categorical_crossentropy": [[1, -0.5, 0], [0, 0, 0], [np.nan, 1, 0], [np.inf, 0, 0]],
}
NONSENSE["sigmoid_crossentropy"] = NONSENSE["binary_crossentropy"]
NONSENSE["softmax_crossentropy"] = NONSENSE["categorical_crossentropy"]
CLASS_NONSENSE = [3, 7, -1, -(2**31), 2**31 - 1]


@pytest.mark.parametrize(
    ("name", "rows"), [*NONSENSE.items(), *((name, CLASS_NONSENSE) for name in CATEGORICAL)]
)
def test_targets_without_a_meaning_are_refused_and_nan_where_their_values_are_not_known(name, rows):
    predictions, targets = INPUTS[name]
    loss = getattr(losses, name)
    both = jax.jit(jax.value_and_grad(loss))
    if np.ndim(rows) == 2:
        targets = np.float32(targets if targets.ndim == 2 else ONE_HOT)
    for place, row in enumerate(rows):
        bad = np.array(targets, targets.dtype)
        bad[place] = row
        with pytest.raises(ValueError, match=r"^(labels|targets) must be "):
            loss(predictions, bad)
        value, slopes = both(np.float32(predictions), bad)
        assert np.isnan(value)
        np.testing.assert_array_equal(np.isnan(slopes).any(axis=1), np.arange(ROWS) == place)


@pytest.mark.parametrize("clipped", [[[0.0, 1.0]], [[-1.0, 2.0]]])
def test_the_clip_does_not_hide_a_target_without_a_meaning(clipped):
    for name, label in (("binary_crossentropy", [[2.0, 2.0]]), ("categorical_crossentropy", [2])):
        loss = jax.jit(getattr(losses, name))
        assert np.isnan(loss(np.float32(clipped), np.asarray(label)))


@pytest.mark.parametrize("name", INPUTS)
def test_bad_arguments_are_refused(name):
    function, (predictions, targets) = getattr(losses, name), INPUTS[name]
    first = "logits" if name.startswith("s") else "probabilities"
    first = "predictions" if name in ENTRIES else first
    second = "targets" if name in ENTRIES else "labels"
    for bad in (predictions[0], predictions[:0], predictions.astype(complex), None):
        with pytest.raises((TypeError, ValueError), match=f"^{first} must "):
            function(bad, targets)
    for bad in (targets[:6], np.eye(4)[CLASSES], targets.astype(object), targets * np.nan, None):
        with pytest.raises((TypeError, ValueError), match=f"^{second} must "):
            function(predictions, bad)
    with pytest.raises(ValueError, match=f"^{second} must "):
        jax.jit(function)(np.float32(predictions), targets[:6])


@pytest.mark.parametrize("name", [*ENTRIES, "sigmoid_crossentropy", "softmax_crossentropy"])
def test_logits_up_to_thirty_keep_six_digits(name):
    rng = np.random.default_rng(15)
    logits = rng.uniform(-30, 30, (9 * ROWS, OUTPUTS)).astype(np.float32)
    targets = np.concatenate([INPUTS[name][1]] * 9)
    value, _ = evaluate(name, logits, targets)
    expected = np.float64(numpy_loss(name, logits.astype(float), targets))
    assert leaf_error(value, expected) <= FORWARD["float32"]
