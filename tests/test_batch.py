"""`Batch` and its border: what a loss may look at, and what is refused in which words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnn.batch import CROSSENTROPIES, Batch, check_batch, check_inputs, check_targets, valid_rows

ROWS, FEATURES, OUTPUTS = 7, 3, 2
X = np.random.default_rng(1).normal(2.0, 3.0, (ROWS, FEATURES)).astype(np.float32)
CLASSES = np.array([0, 1, 1, 0, 1, 0, 0])
ONE_HOT = np.eye(OUTPUTS)[CLASSES]
BINARY, CATEGORICAL = CROSSENTROPIES
SQUARED = "mean_squared_error"


def changed(array, index, value):
    copy = np.array(array, np.result_type(array, np.asarray(value)))
    copy[index] = value
    return copy


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (CATEGORICAL, jnp.asarray(CLASSES)),
        (CATEGORICAL, ONE_HOT.astype(np.int8)),
        (CATEGORICAL, 2 * ONE_HOT),
        (BINARY, 0.8 * ONE_HOT + 0.1),
        (BINARY, ONE_HOT.astype(bool)),
        (SQUARED, 5 * ONE_HOT - 3.5),
    ],
)
def test_good_targets_pass_concrete_and_traced(loss, y):
    before = np.array(y)
    check_batch("batch", Batch(X, y), loss, FEATURES, OUTPUTS)
    jax.jit(lambda batch: check_batch("batch", batch, loss, FEATURES, OUTPUTS))(
        Batch(X, np.asarray(y))
    )
    np.testing.assert_array_equal(y, before)


def frames():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(X), pandas.Series(CLASSES)


@pytest.mark.parametrize(
    "same",
    [
        lambda: (X.tolist(), CLASSES.tolist()),
        lambda: (X.astype(">f4"), CLASSES.astype(">i8")),
        lambda: (X.astype(np.longdouble), CLASSES.astype(">u2")),
        lambda: (jnp.asarray(X), jnp.asarray(CLASSES)),
        frames,
    ],
)
def test_every_kind_of_batch_becomes_the_same_arrays(same):
    got = check_batch("batch", Batch(*same()), CATEGORICAL, FEATURES, OUTPUTS)
    np.testing.assert_array_equal(got.x, X)
    np.testing.assert_array_equal(got.y, CLASSES)
    jax.jit(lambda batch: batch)(got)  # JAX can hold them


@pytest.mark.parametrize("dtype", ["float64", "float32", "int8", ">f4"])
def test_one_hot_rows_become_classes_and_soft_ones_stay(dtype):
    got = check_targets("y", ONE_HOT.astype(dtype), CATEGORICAL, ROWS, OUTPUTS)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, CLASSES)
    several = (2 * ONE_HOT).astype(dtype)
    np.testing.assert_array_equal(check_targets("y", several, CATEGORICAL, ROWS, OUTPUTS), several)
    bits = check_targets("y", ONE_HOT.astype(dtype), BINARY, ROWS, OUTPUTS)
    np.testing.assert_array_equal(bits, ONE_HOT)


VALID = [
    (CATEGORICAL, [0, 2, 3, -1, 1], [1, 1, 0, 0, 1]),
    (CATEGORICAL, np.array([0, 2, 3, 255, 1], np.uint8), [1, 1, 0, 0, 1]),
    (CATEGORICAL, [[0.2, 0.8], [-0.1, 1.1], [0, 0], [np.nan, 1], [np.inf, 0]], [1, 0, 0, 0, 0]),
    (CATEGORICAL, [[1, 0], [5, 3], [0, 0], [-1, 2]], [1, 1, 0, 0]),
    (BINARY, [[0, 1], [0.5, 0.25], [1.5, 0], [0, -1e-3], [np.nan, 0]], [1, 1, 0, 0, 0]),
    (SQUARED, [[-7, 1e30], [np.nan, 0], [0, np.inf], [-np.inf, 1]], [1, 0, 0, 0]),
]


@pytest.mark.parametrize(("loss", "targets", "expected"), VALID)
def test_rows_without_a_meaning_are_known_by_numpy_and_under_jit(loss, targets, expected):
    targets = np.asarray(targets)
    outputs = 3 if targets.ndim == 1 else 2
    of_numpy = valid_rows(targets, loss, outputs)
    np.testing.assert_array_equal(of_numpy, np.array(expected, bool))
    of_jax = jax.jit(lambda y: valid_rows(y, loss, outputs))(targets)
    np.testing.assert_array_equal(of_jax, of_numpy)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:0], r"got shape \(0, 3\)"),
        (X[:, :0], r"got shape \(7, 0\)"),
        (np.float32(1), r"got shape \(\)"),
        (X[:, :2], r"shape \(rows, 3\), as the network's.*float32 of shape \(7, 2\)"),
        (X > 0, r"numbers.*got bool of shape \(7, 3\)"),
        (changed(X, (4, 1), np.nan), "finite; got nan at row 4, column 1"),
        (changed(X, (3, 2), np.float64(1e300)), "fit float32; got magnitudes.*1e[+]300"),
        (np.full((ROWS, FEATURES), 2**40), "fit int32; got 1099511627776"),
    ],
)
def test_bad_inputs_are_refused(x, message):
    with pytest.raises((TypeError, ValueError), match=message) as info:
        check_batch("batch", Batch(x, CLASSES), CATEGORICAL, FEATURES, OUTPUTS)
    assert str(info.value).startswith("batch.x must ")


BAD_TARGETS = [
    (CATEGORICAL, CLASSES[:6], r"must have 7 rows, as batch\.x; got shape \(6,\)"),
    (CATEGORICAL, CLASSES[:, None], r"got int64 of shape \(7, 1\); use batch\.y\[:, 0\]"),
    (CATEGORICAL, np.eye(3)[CLASSES], r"one-hot.*\(7, 2\); got float64 of shape \(7, 3\)"),
    (CATEGORICAL, changed(CLASSES, 2, -1), r"classes 0 to 1; got -1 at \[2\]"),
    (CATEGORICAL, changed(CLASSES, 6, 255).astype("u1"), r"classes 0 to 1; got 255 at \[6\]"),
    (CATEGORICAL, CLASSES + 0.5, r"integer classes.*got float64 of shape \(7,\)"),
    (CATEGORICAL, ONE_HOT > 0, r"got bool of shape \(7, 2\)"),
    (CATEGORICAL, changed(ONE_HOT, (3, 1), np.nan), r"weights.*got nan at \[3, 1\]"),
    (CATEGORICAL, changed(ONE_HOT, (3, 1), -0.5), r"non-negative weights; got -0.5 at \[3, 1\]"),
    (CATEGORICAL, changed(ONE_HOT, 2, [0, 0]), r"not all 0; got \[0. 0.\] at \[2\]"),
    (CATEGORICAL, CLASSES + 1, r"got 2 at \[1\]; labels that start at 1 need batch\.y - 1$"),
    (CATEGORICAL, ["0", "1"] * 3 + ["0"], r"dtype <U1: `classes, y = np\.unique"),
    (BINARY, ONE_HOT + 1, r"0 to 1; got 2.0 at \[0, 0\]; .* need batch\.y - 1$"),
    (BINARY, changed(ONE_HOT, (4, 0), np.nan), r"0 to 1; got nan at \[4, 0\]$"),
    (BINARY, CLASSES, r"0 to 1 of shape \(7, 2\).*got int64 of shape \(7,\)"),
    (SQUARED, X[:, 0], r"numbers of shape \(7, 2\).*got float32 of shape \(7,\)"),
    (SQUARED, changed(ONE_HOT, (5, 1), np.inf), r"finite; got inf at \[5, 1\]"),
    (SQUARED, ONE_HOT * 1e300, "fit float32; got magnitudes up to 1e[+]300"),
]


@pytest.mark.parametrize(("loss", "y", "message"), BAD_TARGETS)
def test_bad_targets_are_refused(loss, y, message):
    with pytest.raises((TypeError, ValueError), match=message) as info:
        check_batch("batch", Batch(X, y), loss, FEATURES, OUTPUTS)
    assert str(info.value).startswith("batch.y must ")


@pytest.mark.parametrize("batch", [(X, CLASSES), {"x": X, "y": CLASSES}, X, None])
def test_only_a_batch_is_a_batch(batch):
    wanted = rf"^batch must be a jaxnn.Batch\(x, y\); got a {type(batch).__name__}$"
    with pytest.raises(TypeError, match=wanted):
        check_batch("batch", batch, CATEGORICAL, FEATURES, OUTPUTS)


@pytest.mark.parametrize(
    ("loss", "x", "y", "message"),
    [
        (CATEGORICAL, X[:, :2], CLASSES, r"batch\.x must be.*\(7, 2\)"),
        (CATEGORICAL, X, CLASSES[:6], r"batch\.y must be.*\(7,\).*\(6,\)"),
        (CATEGORICAL, X, CLASSES + 0.5, r"batch\.y must be.*got float32 of shape \(7,\)"),
        (BINARY, X, CLASSES, r"batch\.y must be numbers from 0 to 1 of shape \(7, 2\)"),
        (SQUARED, X, ONE_HOT.astype(np.complex64), r"batch\.y must be.*real.*complex64"),
    ],
)
def test_shapes_and_dtypes_are_checked_while_tracing(loss, x, y, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jax.jit(lambda batch: check_batch("batch", batch, loss, FEATURES, OUTPUTS))(Batch(x, y))


def test_values_pass_while_tracing():
    nan, out_of_range = np.full_like(X, np.nan), CLASSES + 5
    assert jax.jit(lambda x: check_inputs("x", x, FEATURES))(nan).shape == X.shape
    jax.jit(lambda y: check_targets("y", y, CATEGORICAL, ROWS, OUTPUTS))(out_of_range)
    with pytest.raises(ValueError, match=r"^y must be classes 0 to 1; got 5"):
        check_targets("y", out_of_range, CATEGORICAL, ROWS, OUTPUTS)
