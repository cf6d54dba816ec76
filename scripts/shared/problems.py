"""Data sets by name, as the option `--data` has them, and two more for single experiments."""

from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax
import numpy as np

import jaxnn

DATA: dict[str, Callable[..., jaxnn.Batch]] = {
    "vertical": jaxnn.datasets.vertical,
    "spiral": jaxnn.datasets.spiral,
    "nnfs-vertical": lambda key, samples: jaxnn.datasets.nnfs_vertical(0, samples),
    "nnfs-spiral": lambda key, samples: jaxnn.datasets.nnfs_spiral(0, samples),
}
"""`DATA[name](key, samples=...)` draws `samples` rows a class: three classes, two features."""


def problem_of(arguments: Namespace, num_keys: int) -> tuple[jaxnn.Model, jaxnn.Batch, jax.Array]:
    """Return the network and the rows that `cli.add_problem` asks for, and more keys."""
    keys = jax.random.split(jax.random.key(arguments.seed), 1 + num_keys)
    batch = DATA[arguments.data](keys[0], samples=arguments.samples)
    return jaxnn.mlp((2, *arguments.hidden, 3)), batch, keys[1:]


def from_sklearn(name: str, key: jax.Array, rows: int) -> jaxnn.Batch:
    """Draw `rows` rows of scikit-learn's "iris" or "digits" without repeats, standardised."""
    load: Any = getattr(import_module("sklearn.datasets"), f"load_{name}")
    x, y = load(return_X_y=True)
    deviation = np.std(x, axis=0)
    x = (x - np.mean(x, axis=0)) / np.where(deviation > 0, deviation, 1)
    chosen = np.asarray(jax.random.permutation(key, len(x)))[:rows]
    return jaxnn.Batch(x[chosen].astype(np.float32), y[chosen].astype(np.int32))


def kink(rows: int, margin: float = 0.25) -> tuple[jaxnn.Batch, jaxnn.Batch]:
    """Return the kink data of Chiang et al. (ICLR 2023): rows to train on, and rows to test on.

    Class 1 lies on y = -|x|, class 0 on y = margin - |x|, for x from -1 to 1: two inverted V's. As
    in the published code, 4,000 points have one fixed random order; the first 70 % of `rows` are
    for training, the last 30 % of `rows` for testing.
    """
    arm = np.linspace(-1, 0, 1_000)
    x, y = np.append(arm, arm + 1), np.append(arm, arm[::-1])
    points = np.concatenate([np.stack([x, y], axis=1), np.stack([x, y + margin], axis=1)])
    labels = np.repeat([1, 0], 2_000)
    order = np.random.default_rng(0).permutation(len(labels))
    whole = jaxnn.Batch(points[order].astype(np.float32), labels[order].astype(np.int32))
    cuts = slice(int(0.7 * rows)), slice(-int(0.3 * rows), None)
    train, test = (jaxnn.Batch(whole.x[cut], whole.y[cut]) for cut in cuts)
    return train, test
