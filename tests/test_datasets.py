"""Each data set against its formula, nnfs 0.5.1 and, for Bayes, outside integration and draws.

Means and deviations of drawn columns may miss by 5 standard errors, which a right program does
less than once in a million keys; the keys are fixed.
"""

import hashlib
import math
import pickle
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import pytest
from scipy import integrate, stats

from jaxnn import datasets
from jaxnn.batch import Batch, check_batch

UNTYPED: Any = datasets  # for arguments that pass though their types are others
KEY = jax.random.key(7)
STANDARD_ERRORS = 5
ROUNDING = 2.0**-24  # float32: half a unit in the last place, relative

DRAWN = {
    "clusters": datasets.vertical,
    "bands": partial(datasets.vertical, layout="bands"),
    "spiral": datasets.spiral,
    "linear": partial(datasets.linear, noise=0.5),
}
CLASSIFIED = {name: DRAWN[name] for name in ("clusters", "bands", "spiral")} | {
    "nnfs_vertical": lambda key, samples, classes: datasets.nnfs_vertical(3, samples, classes),
    "nnfs_spiral": lambda key, samples, classes: datasets.nnfs_spiral(3, samples, classes),
}


def by_class(batch: Batch, samples: int) -> np.ndarray:
    """Inputs in float64, shape `(classes, samples, 2)`."""
    return np.asarray(batch.x, np.float64).reshape(-1, samples, 2)


def assert_normal(values: np.ndarray, mean: float, deviation: float) -> None:
    count = values.size
    assert abs(values.mean() - mean) <= STANDARD_ERRORS * deviation / math.sqrt(count)
    assert abs(values.std() - deviation) <= STANDARD_ERRORS * deviation / math.sqrt(2 * count)
    assert stats.kstest((values - mean) / deviation, "norm").pvalue > 1e-6


def assert_uncorrelated(columns: np.ndarray) -> None:
    correlations = np.triu(np.corrcoef(columns), k=1)
    assert np.abs(correlations).max() <= STANDARD_ERRORS / math.sqrt(columns.shape[1])


def assert_same(first: Batch, second: Batch) -> None:
    for mine, other in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        assert mine.dtype == other.dtype
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()


def digest(batch: Batch) -> str:
    return hashlib.sha256(np.asarray(batch.x).tobytes() + np.asarray(batch.y).tobytes()).hexdigest()


@pytest.mark.parametrize("name", CLASSIFIED)
@pytest.mark.parametrize(("samples", "classes"), [(7, 5)])
def test_classes_come_in_order_with_the_stated_shapes_and_dtypes(name, samples, classes):
    batch = CLASSIFIED[name](KEY, samples, classes)
    assert isinstance(batch, Batch)
    assert isinstance(batch.x, jax.Array)
    assert isinstance(batch.y, jax.Array)
    assert (batch.x.shape, batch.x.dtype) == ((samples * classes, 2), np.float32)
    assert batch.y.dtype == np.int32
    assert batch.y.tolist() == [c for c in range(classes) for _ in range(samples)]
    check_batch("batch", batch, "categorical_crossentropy", features=2, outputs=classes)


@pytest.mark.parametrize("make", DRAWN.values(), ids=DRAWN)
def test_rows_depend_on_the_key_alone(make):
    rows = make(KEY)
    assert rows.x.shape == (100 if make is DRAWN["linear"] else 300, 2)
    assert_same(rows, make(jax.random.key(7)))
    assert_same(rows, jax.jit(lambda: make(KEY))())
    with jax.enable_x64(True):
        wide = make(KEY)
    assert_same(rows, wide)
    same = np.asarray(rows.x) == np.asarray(make(jax.random.key(8)).x)
    evenly_spaced = make is DRAWN["bands"]
    assert same[:, 1].mean() < 0.02
    assert same[:, 0].mean() == (1 if evenly_spaced else pytest.approx(0, abs=0.02))


# vertical


@pytest.mark.parametrize("layout", datasets.LAYOUTS)
def test_vertical_has_the_stated_means_and_deviations_each_drawn_afresh(layout):
    points = by_class(datasets.vertical(KEY, 20_000, 5, layout=layout), 20_000)
    for c in range(5):
        if layout == "clusters":
            assert_normal(points[c, :, 0], c / 3, 0.1)
            assert_normal(points[c, :, 1], 0.5, 0.1)
        else:
            assert_normal(points[c, :, 1], 0.2 * c, 1.0)
    columns = [points[..., 0], points[..., 1]][layout == "bands" :]  # no draw in bands: the first
    assert_uncorrelated(np.concatenate(columns))


@pytest.mark.parametrize(("samples", "classes"), [(1, 1), (7, 5)])
def test_bands_and_the_spirals_radius_are_evenly_spaced_from_0_to_1(samples, classes):
    even = np.tile(np.arange(samples) / max(samples - 1, 1), (classes, 1))
    points = by_class(datasets.vertical(KEY, samples, classes, layout="bands"), samples)
    np.testing.assert_array_equal(points[..., 0], np.float32(even))
    points = by_class(datasets.spiral(KEY, samples, classes), samples)
    radius = np.hypot(points[..., 0], points[..., 1])
    np.testing.assert_allclose(radius, even, rtol=ROUNDING, atol=0)


def test_spiral_angle_runs_evenly_from_4c_to_4c_plus_4_with_noise():
    samples, classes = 20_000, 5
    points = by_class(datasets.spiral(KEY, samples, classes), samples)[:, 1:]
    # float32 normals stay within 5.42, so the angle 2.5 t strays less than half a turn
    # (0.2 x 2.5 x 5.42 = 2.71 < pi), and its whole turns are known.
    starts = 4 * np.arange(classes)[:, None]
    even = 2.5 * (starts + 4 * np.arange(samples) / (samples - 1))[:, 1:]
    noise = (np.arctan2(points[..., 0], points[..., 1]) - even + np.pi) % (2 * np.pi) - np.pi
    for c in range(classes):
        assert_normal(noise[c] / 2.5, 0, 0.2)
    assert_uncorrelated(noise)


# linear


@pytest.mark.parametrize(("weights", "bias"), [((1.5, 1.5), 0.1), ((0.25, -3.0, 1e4), -7.0)])
def test_linear_without_noise_is_on_the_plane_to_rounding(weights, bias):
    x, y, _ = datasets.linear(KEY, 100, weights=weights, bias=bias)
    assert (x.dtype, y.dtype) == (np.float32, np.float32)
    assert (x.shape, y.shape) == ((100, len(weights)), (100, 1))
    plane = np.asarray(x, np.float64) @ np.array(weights)[:, None] + np.float32(bias)
    np.testing.assert_allclose(np.asarray(y, np.float64), plane, rtol=ROUNDING, atol=1e-12)


def test_linear_inputs_and_noise_are_normal():
    x, y = (np.asarray(part) for part in datasets.linear(KEY, 20_000, noise=0.3)[:2])
    noise = y[:, 0] - x.astype(np.float64) @ [1.5, 1.5] - 0.1
    assert_normal(x[:, 0].astype(np.float64), 0, 1)
    assert_normal(x[:, 1].astype(np.float64), 0, 1)
    assert_normal(noise, 0, 0.3)
    assert_uncorrelated(np.column_stack([x, noise]).T)


def test_linear_rows_are_the_published_ones():
    x, y, _ = datasets.linear_rows()
    assert (x.dtype, y.dtype, y.shape) == (np.float32, np.float32, (12, 1))
    rows = [[1, 2], [3, 1], [1, 1], [0, 1], [2, 2], [-2, 3]]
    rows += [[1, 2], [-1, -0.5], [0.5, 1.2], [2, 1], [-2, 3], [-1, 1]]
    np.testing.assert_array_equal(x, np.array(rows, np.float32))
    answers = [4.6, 6.1, 3.1, 1.6, 6.1, 1.6, 4.6, -2.15, 2.65, 4.6, 1.6, 0.1]
    np.testing.assert_array_equal(y[:, 0], np.array(answers, np.float32))


# nnfs. The digests are sha256 over the bytes of x and then of y as int32, from nnfs 0.5.1 of
# PyPI with NumPy 2.4.6, each in a fresh process: nnfs.init(random_seed=seed), then
# vertical_data(samples, classes) or spiral_data(samples, classes). nnfs.init() gave the
# digests of seed 0.

LAST = 2**32 - 1
NNFS = [
    ("vertical", 0, 100, 3, "01c044bf72a8cd3b4fcd42ba9ccfb77d41675fa04f9c8a44f2be66ecab9ae93d"),
    ("vertical", 3, 20, 256, "4d59ddbe01df7bf6f6c888cf563d680c639c40c0acbb946fd27f83fd594685f9"),
    ("spiral", 0, 100, 3, "9dc7b475dfe217f6d011c6a583a791a029b27c545c3efac5f180e27dd5ba879b"),
    ("spiral", LAST, 33, 2, "1ed32cca71fed984350c7559f45a9be3a7f757ca8224f538f5b53fe49376066d"),
]
NNFS_MAKERS = {"vertical": datasets.nnfs_vertical, "spiral": datasets.nnfs_spiral}


@pytest.mark.parametrize(("name", "seed", "samples", "classes", "expected"), NNFS)
def test_nnfs_rows_are_those_of_the_package(name, seed, samples, classes, expected):
    assert digest(NNFS_MAKERS[name](seed, samples, classes)) == expected


@pytest.mark.parametrize("make", NNFS_MAKERS.values(), ids=NNFS_MAKERS)
def test_nnfs_neither_reads_nor_moves_the_global_generator(make):
    before = pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002
    first = make(5)
    assert pickle.dumps(np.random.get_state(legacy=False)) == before  # noqa: NPY002
    np.random.random(3)  # noqa: NPY002
    assert_same(first, make(5))
    with jax.enable_x64(True):
        assert_same(make(seed=0, samples=100, classes=3), make())


# Bayes


def test_bayes_values_to_four_digits_and_of_one_class():
    # The published 0.1626 is 0.162666 cut off, not rounded.
    assert datasets.vertical_bayes() == pytest.approx((0.9363, 0.1627), abs=5e-5)
    assert datasets.vertical_bayes(layout="bands") == pytest.approx((0.3864, 1.0855), abs=5e-5)
    assert UNTYPED.vertical_bayes(1, layout="bands") == (1.0, 0.0)
    assert [type(number) for number in datasets.vertical_bayes()] == [float, float]


@pytest.mark.parametrize(
    ("classes", "layout", "step", "deviation"),
    [(5, "clusters", 1 / 3, 0.1), (5, "bands", 0.2, 1.0)],
)
def test_bayes_agrees_with_adaptive_integration(classes, layout, step, deviation):
    means = step * np.arange(classes)

    def joint(position):
        """Prior times density of each class."""
        return stats.norm.pdf(position, means, deviation) / classes

    def surprise(position):
        shares = joint(position)
        return shares @ np.log(shares.sum() / np.maximum(shares, 1e-300))

    # Between the middles of neighbouring means both integrands are smooth.
    middles = step * (np.arange(classes + 1) - 0.5)
    middles[0], middles[-1] = -10 * deviation, step * (classes - 1) + 10 * deviation
    expected = [
        sum(integrate.quad(f, a, b, epsabs=1e-12)[0] for a, b in pairwise(middles))
        for f in (lambda position: joint(position).max(), surprise)
    ]
    assert datasets.vertical_bayes(classes, layout=layout) == pytest.approx(expected, abs=1e-11)


def test_balanced_weights_make_every_class_count_the_same():
    y = np.array([3, 0, 0, 3, 0, 7, 0, 0])
    weights = datasets.balanced_weights(y)
    np.testing.assert_allclose([np.sum(weights[y == c]) for c in (0, 3, 7)], 8 / 3, rtol=1e-6)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(datasets.balanced_weights(y.tolist()), weights)
    np.testing.assert_allclose(np.asarray(weights)[[1, 0, 5]], [8 / 15, 8 / 6, 8 / 3], rtol=1e-6)


@pytest.mark.parametrize("y", [[0.5, 1.0], [[0, 1]], [], ["a", "b"]])
def test_balanced_weights_refuse_what_is_no_class(y):
    with pytest.raises((TypeError, ValueError), match=r"^y must be (integer classes|an array)"):
        datasets.balanced_weights(y)


# Bad input: the type of the error, the argument that the message names, what came, for whom.

MAKERS = [datasets.vertical, datasets.spiral, datasets.linear]
CLASSIFIERS = [datasets.vertical, datasets.spiral, datasets.nnfs_vertical, datasets.nnfs_spiral]
SEEDED = [datasets.nnfs_vertical, datasets.nnfs_spiral]

BAD = [
    (TypeError, "key", [0, None, jax.random.PRNGKey(0)], MAKERS),
    (ValueError, "key", [jax.random.split(KEY, 2)], MAKERS),
    (ValueError, "samples", [0], [*MAKERS, *SEEDED]),
    (TypeError, "samples", [9.5, True], [*MAKERS, *SEEDED]),
    (ValueError, "classes", [0], [*CLASSIFIERS, datasets.vertical_bayes]),
    (TypeError, "classes", ["3"], [*CLASSIFIERS, datasets.vertical_bayes]),
    (ValueError, "classes", [257], SEEDED),
    (ValueError, "seed", [-1, 2**32], SEEDED),
    (ValueError, "layout", ["rings"], [datasets.vertical, datasets.vertical_bayes]),
    (ValueError, "noise", [-1e-9, math.nan, 1e39], [datasets.linear]),
    (ValueError, "bias", [math.nan, -math.inf, 1e39], [datasets.linear]),
    (
        ValueError,
        "weights",
        [1.5, (), [[1.5, 1.5]], (1.5, math.nan), (-1e39, 1.5)],
        [datasets.linear],
    ),
    (TypeError, "weights", ["1.5", ("1", "2"), None, (True, False)], [datasets.linear]),
]


@pytest.mark.parametrize(("error", "argument", "values", "makers"), BAD)
def test_bad_input_is_refused_by_name(error, argument, values, makers):
    for make in makers:
        key = {"key": KEY} if make in MAKERS else {}
        for value in values:
            with pytest.raises(error, match=rf"^{argument}\b.* must "):
                make(**{**key, argument: value})
