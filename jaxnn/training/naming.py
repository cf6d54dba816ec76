"""The arrays of a pytree by number, as a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

__all__ = ["numbered_leaves", "with_leaves"]


def numbered_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Every leaf, in the order of the tree: keys of a user's own may be no names for files.

    Example:
        >>> numbered_leaves({"x": [1.0]})
        {'leaf.0': array(1.)}
    """
    return {f"leaf.{place}": np.asarray(leaf) for place, leaf in enumerate(jax.tree.leaves(tree))}


def with_leaves(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """A tree like this one, of the arrays that `numbered_leaves` told."""
    leaves = [arrays[name] for name in numbered_leaves(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
