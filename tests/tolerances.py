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


def same(one, other) -> bool:
    """Whether two trees agree in every bit; nan is nan."""
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(
        np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")
        for a, b in zip(leaves, others, strict=True)
    )


def assert_same(got, expected) -> None:
    """The trees have one structure, and their leaves agree in every bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    largest = float(np.max(np.abs(expected)))
    error = float(np.max(np.abs(got - expected))) / (largest or 1.0)
    return error if np.isfinite(error) else np.inf
