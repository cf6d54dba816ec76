"""Losses and their gradients, against plain NumPy in float64 and against `jax.grad`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tolerances import FORWARD, GRADIENT, leaf_error

from jaxnn.model import losses

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

CLIPPED_LOSSES = ("binary_crossentropy", "categorical_crossentropy")
INPUTS = {
    "mean_squared_error": (LOGITS, NUMBERS),
    "binary_crossentropy": (PROBABILITIES, BITS),
    "categorical_crossentropy": (PROBABILITIES, CLASSES),
    "sigmoid_crossentropy": (LOGITS, BITS),
    "softmax_crossentropy": (LOGITS, CLASSES),
}


def as_weights(target):
    return target if np.ndim(target) else np.eye(OUTPUTS)[target]


def numpy_loss(name, predictions, targets):
    """The textbook formulas, one row after the other, in float64."""
    total = 0.0
    for p, t in zip(predictions, targets, strict=True):
        if name == "mean_squared_error":
            total += np.mean((p - t) ** 2)
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


def pair(name):
    return getattr(losses, name), getattr(losses, f"{name}_gradient")


def evaluate(name, predictions, targets, dtype="float32"):
    """The loss, its gradient by hand and its gradient by JAX, compiled as one."""
    loss, gradient = pair(name)

    def all_three(p):
        return loss(p, targets), gradient(p, targets), jax.grad(loss)(p, targets)

    with jax.enable_x64(dtype == "float64"):
        return jax.jit(all_three)(jnp.asarray(predictions, dtype))


EVEN = np.float32(scipy.special.softmax(LOGITS / 4, axis=1)).astype(float)  # 1/p is moderate
CASES = [
    *((name, *pair) for name, pair in INPUTS.items()),
    ("binary_crossentropy", EVEN, SOFT),
    ("categorical_crossentropy", EVEN, WEIGHTS),
    ("sigmoid_crossentropy", LOGITS, SOFT),
    ("softmax_crossentropy", LOGITS, WEIGHTS),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "predictions", "targets"), CASES)
def test_value_is_numpys_and_gradient_is_jaxs(name, predictions, targets, dtype):
    value, gradient, by_jax = evaluate(name, predictions, targets, dtype)
    assert value.dtype == gradient.dtype == dtype
    expected = np.float64(numpy_loss(name, predictions, targets))
    assert leaf_error(value, expected) <= FORWARD[dtype]
    assert leaf_error(gradient, by_jax) <= GRADIENT[dtype]


@pytest.mark.parametrize(("name", "predictions", "targets"), CASES)
def test_gradient_is_the_slope_of_the_numpy_loss(name, predictions, targets):
    _, gradient, _ = evaluate(name, predictions, targets, "float64")
    expected = central_differences(lambda p: numpy_loss(name, p, targets), predictions)
    assert leaf_error(gradient, expected) <= 1e-7  # what central differences can tell


@pytest.mark.parametrize("name", ["categorical_crossentropy", "softmax_crossentropy"])
def test_labels_as_integers_and_one_hot_are_the_same(name):
    predictions, classes = INPUTS[name]
    expected = evaluate(name, predictions, classes)
    for labels in (ONE_HOT, ONE_HOT.astype(np.int8), classes.astype(np.uint8), classes.tolist()):
        assert leaf_error(evaluate(name, predictions, labels), expected) == 0


@pytest.mark.parametrize("name", ["binary_crossentropy", "sigmoid_crossentropy"])
def test_binary_labels_of_any_type_are_the_same(name):
    predictions, bits = INPUTS[name]
    expected = evaluate(name, predictions, bits)
    for dtype in (bool, np.int32, np.float16):
        assert leaf_error(evaluate(name, predictions, bits.astype(dtype)), expected) == 0


@pytest.mark.parametrize(
    "name", ["mean_squared_error", "sigmoid_crossentropy", "softmax_crossentropy"]
)
def test_logits_up_to_thirty_keep_six_digits(name):
    rng = np.random.default_rng(15)
    logits = rng.uniform(-30, 30, (9 * ROWS, OUTPUTS)).astype(np.float32)
    targets = np.concatenate([INPUTS[name][1]] * 9)
    value, _, _ = evaluate(name, logits, targets)
    expected = np.float64(numpy_loss(name, logits.astype(float), targets))
    assert leaf_error(value, expected) <= FORWARD["float32"]


def test_logit_forms_are_the_probability_forms_of_the_activation():
    p, q = scipy.special.expit(LOGITS), scipy.special.softmax(LOGITS, axis=1)
    for of_logits, of_probabilities in (
        (("sigmoid_crossentropy", LOGITS, BITS), ("binary_crossentropy", p, BITS)),
        (("softmax_crossentropy", LOGITS, CLASSES), ("categorical_crossentropy", q, CLASSES)),
    ):
        expected, *_ = evaluate(*of_probabilities, "float64")
        assert leaf_error(evaluate(*of_logits, "float64")[0], expected) <= FORWARD["float64"]


def test_reference_figures():
    # worked by hand
    labels = [0, 1, 2] * 2
    for name, uniform in (
        ("categorical_crossentropy", np.full((6, 3), 1 / 3)),
        ("softmax_crossentropy", np.zeros((6, 3))),
    ):
        value, _, _ = evaluate(name, uniform, labels)
        assert float(value) == pytest.approx(1.098612, abs=5e-7)
        assert float(value) == pytest.approx(np.log(3), rel=FORWARD["float32"])
    value, slopes, _ = evaluate("mean_squared_error", [[9], [3]], [[3], [3]])
    assert value == 18  # errors 6 and 0, and no factor 1/2
    value, slopes, _ = evaluate("mean_squared_error", [[7]], [[0]])
    assert (value, slopes) == (49, 14)
    _, slopes, _ = evaluate("mean_squared_error", [[-4]], [[0]])
    assert slopes * 3 == -24  # 2 x (-4) x input 3


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
        value, gradient, by_jax = evaluate(loss, rows, labels, dtype)
        assert leaf_error(value, expected.mean()) <= FORWARD[dtype]
        np.testing.assert_array_equal(gradient[:, -1], 0)
        np.testing.assert_array_equal(by_jax[:, -1], 0)


def test_the_floor_of_a_confident_mistake():
    wrong, _, _ = evaluate("categorical_crossentropy", [[1, 0]], [1])
    right, _, _ = evaluate("categorical_crossentropy", [[1, 0]], [0])
    assert float(wrong) == pytest.approx(16.118096, abs=1e-5)  # -ln 1e-7
    assert float(right) == pytest.approx(1.2e-7, abs=3e-8)


@pytest.mark.parametrize("p", [2e-7, 1 - 2e-7])
def test_slopes_within_the_clip(p):
    _, binary, _ = evaluate("binary_crossentropy", [[p]], [[0.0]], "float64")
    _, categorical, _ = evaluate("categorical_crossentropy", [[1 - p, p]], [1], "float64")
    np.testing.assert_allclose(binary, [[1 / (1 - p)]], rtol=1e-8)
    np.testing.assert_allclose(categorical, [[0, -1 / p]], rtol=FORWARD["float64"])


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
    for loss, labels, value, slope in (
        ("softmax_crossentropy", classes, np.mean(row_losses), (softmax - bits) / 5),
        ("sigmoid_crossentropy", bits, np.mean(entry_losses), (sigmoid - bits) / 10),
    ):
        got, gradient, by_jax = evaluate(loss, z, labels, dtype)
        assert leaf_error(got, value) <= FORWARD[dtype]
        assert leaf_error(gradient, slope) <= GRADIENT[dtype]
        assert leaf_error(by_jax, slope) <= GRADIENT[dtype]


@pytest.mark.parametrize("z", [6.0, 20.0, 80.0])
def test_small_losses_keep_their_digits(z):
    expected = np.log1p(np.exp(-z))  # -log sigmoid(z); of probabilities, it would be 0 here
    value, slopes, _ = evaluate("sigmoid_crossentropy", [[z, -z]], [[1, 0]])
    assert float(value) == pytest.approx(expected, rel=FORWARD["float32"])
    slope = scipy.special.expit(-z) / 2
    np.testing.assert_allclose(slopes, [[-slope, slope]], rtol=GRADIENT["float32"])
    value, _, _ = evaluate("softmax_crossentropy", [[z, 0]], [0])
    assert float(value) == pytest.approx(expected, abs=1.2e-7)  # as near as 1 - p can say


NONSENSE = {
    "mean_squared_error": [[np.nan, 0, 0], [0, np.inf, 0], [0, 0, -np.inf]],
    "binary_crossentropy": [[1.5, 0, 0], [0, -0.5, 0], [0, 0, 2], [np.nan, 0, 0], [np.inf, 0, 0]],
    "categorical_crossentropy": [[1, -0.5, 0], [0, 0, 0], [np.nan, 1, 0], [np.inf, 0, 0]],
}
NONSENSE["sigmoid_crossentropy"] = NONSENSE["binary_crossentropy"]
NONSENSE["softmax_crossentropy"] = NONSENSE["categorical_crossentropy"]
CLASS_NONSENSE = [3, 7, -1, -(2**31), 2**31 - 1]


@pytest.mark.parametrize(
    ("name", "rows"),
    [*NONSENSE.items(), *((name, CLASS_NONSENSE) for name in list(NONSENSE)[2::2])],
)
def test_targets_without_a_meaning_are_refused_and_nan_where_their_values_are_not_known(name, rows):
    predictions, targets = INPUTS[name]
    loss, gradient = pair(name)
    both = jax.jit(lambda p, y: (loss(p, y), gradient(p, y)))
    if np.ndim(rows) == 2:
        targets = np.float32(targets if targets.ndim == 2 else ONE_HOT)
    for place, row in enumerate(rows):
        bad = np.array(targets, targets.dtype)
        bad[place] = row
        for function in (loss, gradient):
            with pytest.raises(ValueError, match=r"^(labels|targets) must be "):
                function(predictions, bad)
        value, slopes = both(np.float32(predictions), bad)
        assert np.isnan(value)
        np.testing.assert_array_equal(np.isnan(slopes).all(axis=1), np.arange(ROWS) == place)
        assert np.isfinite(np.delete(slopes, place, axis=0)).all()


@pytest.mark.parametrize("clipped", [[[0.0, 1.0]], [[-1.0, 2.0]]])
def test_the_clip_does_not_hide_a_target_without_a_meaning(clipped):
    for name, label in (("binary_crossentropy", [[2.0, 2.0]]), ("categorical_crossentropy", [2])):
        _, gradient = pair(name)
        assert np.isnan(jax.jit(gradient)(np.float32(clipped), np.asarray(label))).all()


def test_integer_predictions_count_as_numbers():
    assert losses.mean_squared_error(np.array([[3], [5]]), np.array([[1], [1]])) == 10


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("gradient", [False, True])
def test_bad_arguments_are_refused(name, gradient):
    function = pair(name)[gradient]
    predictions, targets = INPUTS[name]
    first = {"mean_squared_error": "predictions", "sigmoid_crossentropy": "logits"}.get(name)
    first = first or ("logits" if name == "softmax_crossentropy" else "probabilities")
    second = "targets" if name == "mean_squared_error" else "labels"
    for bad, error in (
        (predictions[0], ValueError),
        (predictions[:0], ValueError),
        (predictions[None], ValueError),
        (predictions.astype(complex), TypeError),
        (predictions.astype(str), TypeError),
        (predictions * 1e300, ValueError),
        (None, TypeError),
    ):
        with pytest.raises(error, match=f"^{first} must "):
            function(bad, targets)
    for bad, error in (
        (targets[:6], ValueError),
        (CLASSES[:, None], ValueError),
        (np.eye(4)[CLASSES], ValueError),
        (targets.astype(object), TypeError),
        (targets * np.nan, ValueError),
        (None, TypeError),
    ):
        with pytest.raises(error, match=f"^{second} must "):
            function(predictions, bad)
    with pytest.raises(ValueError, match=f"^{second} must "):
        jax.jit(function)(np.float32(predictions), targets[:6])


@pytest.mark.parametrize("name", ["categorical_crossentropy", "softmax_crossentropy"])
@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (CLASSES - 1, r"0 to 2; got -1 at \[1\]"),
        (CLASSES + 1, r"0 to 2; got 3 at \[0\]"),
        (CLASSES + 0.5, "float64 of shape"),
        (ONE_HOT - 0.5, "non-negative weights"),
    ],
)
def test_labels_out_of_range_are_refused(name, labels, got):
    with pytest.raises(ValueError, match=f"^labels must .*{got}"):
        pair(name)[0](INPUTS[name][0], labels)


@pytest.mark.parametrize("name", ["binary_crossentropy", "sigmoid_crossentropy"])
@pytest.mark.parametrize("labels", [BITS + 1, 2 * BITS - 1, BITS + 1e-5])
def test_labels_outside_of_0_to_1_are_refused(name, labels):
    with pytest.raises(ValueError, match=r"^labels must be numbers from 0 to 1; got "):
        pair(name)[0](INPUTS[name][0], labels)


def test_encode():
    encoded = losses.encode(jnp.array([2, 0], jnp.uint8), 3, jnp.dtype("float32"))
    np.testing.assert_array_equal(encoded, [[0, 0, 1], [1, 0, 0]])
    assert encoded.dtype == jnp.float32
    assert losses.encode(jnp.ones((2, 3), jnp.int32), 3, jnp.dtype("float32")).dtype == jnp.float32
