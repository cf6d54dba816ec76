"""How close is close: one table, and the measure it is held against."""

from typing import Any

import jax
import numpy as np

FORWARD = {"float32": 2e-6, "float64": 1e-12}
GRADIENT = {"float32": 1e-5, "float64": 1e-12}


def float32(values) -> Any:
    """The values as users hold them: a NumPy array of float32."""
    return np.asarray(values, np.float32)


def leaf_error(got, expected) -> float:
    """Largest difference in any leaf, relative to that leaf's largest expected entry.

    The trees must have one structure, and the leaves the same shapes. A leaf of zeros is
    measured absolutely; anything not finite counts as infinitely wrong.
    """
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(_error(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    largest = float(np.max(np.abs(expected)))
    error = float(np.max(np.abs(got - expected))) / (largest or 1.0)
    return error if np.isfinite(error) else np.inf
