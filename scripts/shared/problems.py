"""Data sets by name, as the scripts' `--data` has them."""

from __future__ import annotations

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
"""`DATA[name](key, samples=...)`: `samples` rows a class, of three classes and two features."""


def measured(name: str, key: jax.Array, rows: int) -> jaxnn.Batch:
    """Rows of a data set that scikit-learn holds, drawn without repeats; features standardised.

    Args:
        name: "iris" or "digits".
        key: which rows.
        rows: how many; all there are, if there are fewer.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    load: Any = getattr(import_module("sklearn.datasets"), f"load_{name}")
    x, y = load(return_X_y=True)
    spread = np.std(x, axis=0)
    x = (x - np.mean(x, axis=0)) / np.where(spread > 0, spread, 1)
    chosen = np.asarray(jax.random.permutation(key, len(x)))[:rows]
    return jaxnn.Batch(x[chosen].astype(np.float32), y[chosen].astype(np.int32))


def kink(rows: int, margin: float = 0.25) -> tuple[jaxnn.Batch, jaxnn.Batch]:
    """Two inverted V's, one above the other: rows to train on and rows to test on.

    Of 4,000 points in an order that is drawn once and for all, the first 70 % of `rows` and the
    last 30 % of `rows`; class 1 lies on y = -|x|, class 0 on y = margin - |x|, x from -1 to 1.
    As the published code of Chiang et al. (ICLR 2023) has them.

    Args:
        rows: for training and testing together.
        margin: between the two, along y.
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
