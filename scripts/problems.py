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
"""`DATA[name](key, samples=...)`: so many rows a class, of three classes and two features."""


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
