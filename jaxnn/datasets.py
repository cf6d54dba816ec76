"""Small data sets to train on, CSV files, weights of rows, and what the best classifier scores.

Every set but a file's is a `Batch` of JAX arrays, x float32; classes are int32 and come in order. A
function with a key draws new rows, the same for the same key, with JAX's x64 mode on or off.
`nnfs_vertical`, `nnfs_spiral` and `linear_rows` are fixed rows that others have published. JAX
draws the normals and NumPy places the points, so drawn and published sets share their geometry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnn.batch import Batch, check_values
from jaxnn.run.checks import as_choice, as_count, as_key, as_real
from jaxnn.tables import Table, load_csv

__all__ = [
    "Bayes",
    "Table",
    "balanced_weights",
    "linear",
    "linear_rows",
    "load_csv",
    "nnfs_spiral",
    "nnfs_vertical",
    "spiral",
    "vertical",
    "vertical_bayes",
]

Layout = Literal["clusters", "bands"]
LAYOUTS: tuple[str, ...] = ("clusters", "bands")

STEPS = {"clusters": 1 / 3, "bands": 0.2}  # between the means of neighbouring classes
DEVIATIONS = {"clusters": 0.1, "bands": 1.0}  # around each mean
LINE_WEIGHTS, LINE_BIAS = (1.5, 1.5), 0.1


def vertical(
    key: jax.Array, samples: int = 100, classes: int = 3, *, layout: Layout = "clusters"
) -> Batch:
    """Draw classes side by side, which straight lines separate as well as anything can.

    With `n` a standard normal of its own each time, a row of class `c` is

        "clusters"   x = (0.1 n + c/3, 0.1 n + 0.5)
        "bands"      x = (evenly spaced from 0 to 1, n + 0.2 c)

    so only one of the two columns tells the classes apart: the first, or in bands the second.

    Args:
        key: a typed key.
        samples: rows of each class, at least 1.
        classes: number of classes, at least 1.
        layout: `"clusters"` or `"bands"`.

    Returns:
        A `Batch`: x `(samples * classes, 2)` float32, y `(samples * classes,)` int32.

    Raises:
        ValueError: if a count is below 1 or the layout unknown.

    Example:
        >>> vertical(jax.random.key(0), samples=2, classes=3).y
        Array([0, 0, 1, 1, 2, 2], dtype=int32)
    """
    samples, classes = _counts(samples, classes)
    if as_choice("layout", layout, LAYOUTS) == "bands":
        across = np.broadcast_to(np.linspace(0, 1, samples), (classes, samples))
        normals = DEVIATIONS["bands"] * _normals(key, (classes, samples))
        up = normals + STEPS["bands"] * np.arange(classes)[:, None]
        return _classified(np.stack([across, up], axis=-1))
    return _classified(_clusters(_normals(key, (classes, 2, samples))))


def spiral(key: jax.Array, samples: int = 100, classes: int = 3) -> Batch:
    """Draw arms of a spiral, an arm a class, which no straight lines separate.

    Along the arm of class `c` the radius `r` is evenly spaced from 0 to 1, and so is the angle
    `t` from `4c` to `4(c + 1)`, plus 0.2 times a standard normal; x = (r sin 2.5t, r cos 2.5t).

    Arguments and errors are those of `vertical`.

    Returns:
        A `Batch`, as `vertical` returns it.

    Example:
        >>> spiral(jax.random.key(0), samples=100, classes=3).x.shape
        (300, 2)
    """
    samples, classes = _counts(samples, classes)
    return _classified(_spiral(_normals(key, (classes, samples))))


def linear(
    key: jax.Array,
    samples: int = 100,
    *,
    noise: float = 0.0,
    weights: Sequence[float] = LINE_WEIGHTS,
    bias: float = LINE_BIAS,
) -> Batch:
    """Draw rows for a linear regression: `y = x @ weights + bias + noise * normal`.

    x is standard normal, the same for the same key whatever the noise, the bias and the weights.

    Args:
        key: a typed key.
        samples: number of rows, at least 1.
        noise: standard deviation of what the line leaves unexplained, at least 0.
        weights: a slope for each feature.
        bias: the value at the origin.

    Returns:
        A `Batch`: x `(samples, features)`, by default two features; y `(samples, 1)`, float32.

    Raises:
        ValueError: if there is no weight, or a number is out of range.

    Example:
        >>> batch = linear(jax.random.key(0), samples=50, noise=0.1)
        >>> batch.x.shape, batch.y.shape
        ((50, 2), (50, 1))
    """
    samples = as_count("samples", samples, minimum=1)
    noise = float(as_real("noise", noise, minimum=0.0, inclusive=True))
    entries = check_values("weights", weights, 1, "a sequence of numbers, one a feature")
    finite = [as_real(f"weights[{i}]", w, minimum=-math.inf) for i, w in enumerate(entries)]
    slopes = np.array(finite, np.float64)
    offset = float(as_real("bias", bias, minimum=-math.inf))
    normals = _normals(key, (samples, slopes.size + 1))
    x, errors = normals[:, :-1], normals[:, -1:]
    # In float64, so that y is rounded to float32 once.
    y = x @ slopes[:, None] + offset + noise * errors.astype(np.float64)
    return Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))


def linear_rows() -> Batch:
    """Return twelve fixed rows on the plane `y = 1.5 x1 + 1.5 x2 + 0.1`: x (12, 2), y (12, 1).

    Example:
        >>> linear_rows().y[:3, 0]
        Array([4.6, 6.1, 3.1], dtype=float32)
    """
    x1 = [1, 3, 1, 0, 2, -2, 1, -1, 0.5, 2, -2, -1]
    x2 = [2, 1, 1, 1, 2, 3, 2, -0.5, 1.2, 1, 3, 1]
    x = np.stack([x1, x2], axis=1)
    y = x @ np.array(LINE_WEIGHTS)[:, None] + LINE_BIAS
    return Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))


def nnfs_vertical(seed: int = 0, samples: int = 100, classes: int = 3) -> Batch:
    """Return the rows of `vertical_data(samples, classes)` of the package nnfs 0.5.1, bit for bit.

    They are what it returns first after `nnfs.init(random_seed=seed)`; 0 is its own default.
    NumPy's global generator is neither read nor moved.

    Args:
        seed: 0 to 2^32 - 1.
        samples: rows of each class, at least 1.
        classes: number of classes, 1 to 256: nnfs counts them in a byte (here they are int32).

    Returns:
        A `Batch`: x `(samples * classes, 2)` float32, y `(samples * classes,)` int32.

    Example:
        >>> nnfs_vertical().x[1]
        Array([0.04001572, 0.3652241 ], dtype=float32)
    """
    return _classified(_clusters(_nnfs_normals(seed, samples, classes, 2)))


def nnfs_spiral(seed: int = 0, samples: int = 100, classes: int = 3) -> Batch:
    """Return the rows of `spiral_data(samples, classes)` of the package nnfs 0.5.1, bit for bit.

    Arguments, result and errors are those of `nnfs_vertical`.

    Example:
        >>> nnfs_spiral().x[1]
        Array([0.00299556, 0.00964661], dtype=float32)
    """
    return _classified(_spiral(_nnfs_normals(seed, samples, classes, 1)[:, 0]))


def balanced_weights(y: ArrayLike) -> jax.Array:
    """Return a weight for each row with which every class counts the same: `Batch.weights`.

    A row weighs `rows / (classes * rows of its class)`, as in "balanced" of scikit-learn. For
    weights of your own, `class_weights[y]` is the same form.

    Args:
        y: integer classes `(rows,)`; those that are not there do not count.

    Returns:
        An array `(rows,)`, float32, with a mean of 1.

    Raises:
        TypeError: if the classes are not numbers.
        ValueError: if they are not integers `(rows,)`.

    Example:
        >>> balanced_weights([0, 0, 0, 1])
        Array([0.6666667, 0.6666667, 0.6666667, 2.       ], dtype=float32)
    """
    wanted = "integer classes, one a row"
    classes = np.asarray(check_values("y", y, 1, wanted))
    if classes.dtype.kind not in "iu":
        raise ValueError(f"y must be {wanted}; got dtype {classes.dtype}")
    _, places, counts = np.unique(classes, return_inverse=True, return_counts=True)
    return jnp.asarray(len(classes) / (len(counts) * counts[places]), jnp.float32)


class Bayes(NamedTuple):
    """What the best possible classifier scores on rows drawn without end.

    Attributes:
        accuracy: share of rows whose most probable class is the right one.
        crossentropy: mean of `-log` of the true posterior probability of the right class.
    """

    accuracy: float
    crossentropy: float


def vertical_bayes(classes: int = 3, *, layout: Layout = "clusters") -> Bayes:
    """Return Bayes accuracy and cross-entropy of `vertical`, in float64.

    These are values of the population and no floor for a training loss: on 300 rows the true
    posterior itself scores above or below them by luck, and a network can fit those rows better.

    With `step` between neighbouring means and `deviation` around each, the accuracy is
    `(1 + (classes - 1) erf(step / deviation / sqrt 8)) / classes`; the cross-entropy is
    integrated numerically. Classes, layout and errors are as for `vertical`.

    Example:
        >>> print("{:.4f} {:.4f}".format(*vertical_bayes(3)))
        0.9363 0.1627
    """
    classes = as_count("classes", classes, minimum=1)
    as_choice("layout", layout, LAYOUTS)
    gap = STEPS[layout] / DEVIATIONS[layout]
    accuracy = (1 + (classes - 1) * math.erf(gap / math.sqrt(8))) / classes
    # Of each class, at 0 among unit Gaussians, the mean of -log posterior over its own rows. The
    # trapezoid rule is exact to rounding here: the integrand is smooth and dies out.
    z = np.linspace(-10, 10, 401)
    density, surprises = np.exp(-(z**2) / 2), []
    for own in range(classes):
        means = gap * (np.arange(classes) - own)[:, None]
        log_odds = means * z[None, :] - means**2 / 2
        surprises.append(density @ np.logaddexp.reduce(log_odds, axis=0) / density.sum())
    return Bayes(accuracy, math.fsum(surprises) / classes)


def _clusters(normals: np.ndarray) -> np.ndarray:
    """Normals `(classes, 2, samples)` float32 -> points `(classes, samples, 2)`."""
    across = STEPS["clusters"] * np.arange(len(normals))
    means = np.stack([across, np.full_like(across, 0.5)], axis=1).astype(np.float32)
    # A float32 product and a float32 sum: nnfs rounds so, and its bits are promised.
    points = normals * np.float32(DEVIATIONS["clusters"]) + means[:, :, None]
    return points.swapaxes(1, 2)


def _spiral(normals: np.ndarray) -> np.ndarray:
    """Normals `(classes, samples)` float32 -> points `(classes, samples, 2)`."""
    classes, samples = normals.shape
    r = np.linspace(0, 1, samples)
    starts = 4.0 * np.arange(classes)
    # The noise is rounded to float32 before the float64 sum, as in nnfs.
    t = np.linspace(starts, starts + 4, samples, axis=1) + normals * np.float32(0.2)
    return np.stack([r * np.sin(2.5 * t), r * np.cos(2.5 * t)], axis=-1)


def _classified(points: np.ndarray) -> Batch:
    classes, samples, _ = points.shape
    y = np.repeat(np.arange(classes, dtype=np.int32), samples)
    return Batch(jnp.asarray(points.reshape(-1, 2), jnp.float32), jnp.asarray(y))


def _normals(key: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    key = as_key("key", key)
    # Concrete also where the caller is being traced, since NumPy goes on from here.
    with jax.ensure_compile_time_eval():
        return np.asarray(jax.random.normal(key, shape, jnp.float32))


def _counts(samples: int, classes: int, most_classes: int = 2**31) -> tuple[int, int]:
    samples = as_count("samples", samples, minimum=1)
    return samples, as_count("classes", classes, minimum=1, maximum=most_classes)


def _nnfs_normals(seed: int, samples: int, classes: int, columns: int) -> np.ndarray:
    samples, classes = _counts(samples, classes, most_classes=256)
    generator = np.random.RandomState(as_count("seed", seed, maximum=2**32 - 1))
    return generator.randn(classes, columns, samples).astype(np.float32)
