"""Accuracy and explained variance, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FORWARD, float32

from jaxnn import metrics

RNG = np.random.default_rng(5)
SCORES = RNG.normal(1.0, 2.0, (7, 3)).astype(np.float32)
CLASSES = np.array([2, 0, 1, 1, 0, 2, 0])
PROBABILITIES = RNG.random((7, 2)).astype(np.float32)
BITS = (RNG.random((7, 2)) < 0.6).astype(np.float32)
NUMBERS = RNG.normal(-3.0, 5.0, (7, 2))
GUESSES = (NUMBERS + RNG.normal(0.0, 2.0, (7, 2))).astype(np.float32)


def test_accuracy_counts_rows():
    expected = np.mean([int(np.argmax(row)) == c for row, c in zip(SCORES, CLASSES, strict=True)])
    assert 0 < expected < 1
    for labels in (CLASSES, CLASSES.tolist(), np.eye(3)[CLASSES], jnp.asarray(CLASSES)):
        accuracy = metrics.accuracy(SCORES, labels)
        assert accuracy.dtype == jnp.float32
        assert float(accuracy) == pytest.approx(expected, rel=FORWARD["float32"])


def test_accuracy_of_a_uniform_prediction_is_one_in_three():
    # ties go to the lowest class
    assert metrics.accuracy(np.full((6, 3), 1 / 3), np.array([0, 1, 2] * 2)) == np.float32(1 / 3)
    tied = float32([[0, 2, 2]])
    assert metrics.accuracy(tied, np.array([1])) == 1
    assert metrics.accuracy(tied, np.array([2])) == 0


def test_binary_accuracy_counts_entries():
    expected = np.mean((PROBABILITIES > 0.5) == (BITS > 0))
    assert 0 < expected < 1
    for labels in (BITS, BITS.astype(bool), BITS.astype(int)):
        share = float(metrics.binary_accuracy(PROBABILITIES, labels))
        assert share == pytest.approx(expected, rel=FORWARD["float32"])
    a_half = float32([[0.5]])  # says 0
    assert metrics.binary_accuracy(a_half, np.array([[0]])) == 1
    assert metrics.binary_accuracy(a_half, np.array([[1]])) == 0


def test_nan_is_never_right():
    broken = np.where(np.arange(7)[:, None] == 1, np.nan, np.eye(3)[CLASSES])
    assert float(metrics.accuracy(broken, CLASSES)) == pytest.approx(6 / 7, rel=1e-6)
    assert metrics.accuracy(np.full((7, 3), np.nan), CLASSES) == 0
    assert metrics.binary_accuracy(np.full((7, 2), np.nan), BITS) == 0


def test_the_largest_weight_is_the_label():
    weights = float32([[0.1, 0.2, 0.7], [5, 1, 0], [0, 0.4, 0.3], [0.5, 0.5, 0]])
    scores = SCORES[:4]
    expected = np.mean(np.argmax(scores, axis=1) == [2, 0, 1, 0])
    assert 0 < expected < 1
    for accuracy in (metrics.accuracy, jax.jit(metrics.accuracy)):
        assert float(accuracy(scores, weights)) == expected
    soft = np.float32(0.8 * BITS + 0.1)
    for accuracy in (metrics.binary_accuracy, jax.jit(metrics.binary_accuracy)):
        assert accuracy(PROBABILITIES, soft) == metrics.binary_accuracy(PROBABILITIES, BITS)


@pytest.mark.parametrize(
    "labels",
    [
        np.where(np.arange(7) == 4, 3, CLASSES),
        np.where(np.arange(7) == 4, -3, CLASSES),
        np.where(np.arange(7)[:, None] == 4, float32([1, -1, 0]), np.eye(3, dtype="f")[CLASSES]),
        np.where(np.arange(7)[:, None] == 4, np.float32(np.nan), np.eye(3, dtype="f")[CLASSES]),
        np.where(np.arange(7)[:, None] == 4, np.float32(0), np.eye(3, dtype="f")[CLASSES]),
    ],
)
def test_a_label_without_a_meaning_is_never_right(labels):
    right = jax.jit(metrics.accuracy)(np.eye(3, dtype="f")[CLASSES], labels)
    assert float(right) == pytest.approx(6 / 7, rel=FORWARD["float32"])


def test_a_binary_label_outside_of_0_to_1_is_never_right():
    share_of = jax.jit(metrics.binary_accuracy)
    for bad in (2, -1, np.nan, np.inf):
        labels = np.where(np.arange(14).reshape(7, 2) == 5, np.float32(bad), BITS)
        assert float(share_of(BITS, labels)) == pytest.approx(6 / 7, rel=FORWARD["float32"])
        with pytest.raises(ValueError, match=r"^labels must be .* 0 to 1; got .* at \[2, 1\]"):
            metrics.binary_accuracy(PROBABILITIES, labels)


def test_r2_is_one_minus_the_unexplained_share():
    residual = np.sum((NUMBERS - GUESSES) ** 2)
    expected = 1 - residual / np.sum((NUMBERS - NUMBERS.mean(axis=0)) ** 2)
    assert float(metrics.r2(GUESSES, NUMBERS)) == pytest.approx(expected, rel=FORWARD["float32"])
    assert metrics.r2(NUMBERS, NUMBERS) == 1
    means = np.broadcast_to(NUMBERS.mean(axis=0), NUMBERS.shape)
    assert float(metrics.r2(means, NUMBERS)) == pytest.approx(0, abs=1e-6)


def test_metrics_work_on_tracers_and_under_vmap():
    stack = np.stack([SCORES, -SCORES, np.roll(SCORES, 1, axis=0)])
    together = jax.jit(jax.vmap(metrics.accuracy, in_axes=(0, None)))(stack, CLASSES)
    np.testing.assert_array_equal(together, [metrics.accuracy(s, CLASSES) for s in stack])
    for metric, predictions, truth in (
        (metrics.binary_accuracy, PROBABILITIES, BITS),
        (metrics.r2, GUESSES, NUMBERS),
    ):
        eager = float(metric(predictions, truth))
        assert float(jax.jit(metric)(predictions, truth)) == pytest.approx(eager, rel=1e-6)


def test_metrics_are_float32_in_either_width():
    with jax.enable_x64(True):
        for value in (
            metrics.accuracy(np.float64(SCORES), CLASSES),
            metrics.binary_accuracy(np.float64(PROBABILITIES), BITS),
            metrics.r2(np.float64(GUESSES), NUMBERS),
        ):
            assert value.dtype == jnp.float32


@pytest.mark.parametrize(
    ("metric", "predictions", "truth", "first", "second"),
    [
        (metrics.accuracy, SCORES, CLASSES, "predictions", "labels"),
        (metrics.binary_accuracy, PROBABILITIES, BITS, "probabilities", "labels"),
        (metrics.r2, GUESSES, NUMBERS, "predictions", "targets"),
    ],
)
def test_bad_arguments_are_refused(metric, predictions, truth, first, second):
    for bad in (predictions[0], predictions[:0], predictions.astype(complex), None):
        with pytest.raises((TypeError, ValueError), match=f"^{first} must "):
            metric(bad, truth)
    for bad in (truth[:6], truth.reshape(7, -1)[:, :1], truth * np.nan, truth.astype(str), None):
        with pytest.raises((TypeError, ValueError), match=f"^{second} must "):
            metric(predictions, bad)
    with pytest.raises(ValueError, match=f"^{second} must "):
        jax.jit(metric)(predictions, truth[:6])
