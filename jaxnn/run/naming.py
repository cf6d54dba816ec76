"""The arrays of a pytree by number, as a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

__all__ = ["check_saveable", "numbered_leaves", "with_leaves"]


def numbered_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Every leaf, in the order of the tree: keys of a user's own may be no names for files.

    Example:
        >>> numbered_leaves({"x": [1.0]})
        {'leaf.0': array(1.)}
    """
    return {f"leaf.{place}": np.asarray(leaf) for place, leaf in enumerate(jax.tree.leaves(tree))}


def check_saveable(tree: Any) -> None:
    """Refuses a state that a checkpoint cannot hold, before the work rather than after it."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf.dtype, np.dtype) and leaf.dtype.kind in "biuf" and leaf.dtype.isbuiltin:
            continue
        raise TypeError(
            "params and what the optimizer remembers must be of NumPy's numbers to be saved; "
            f"got {leaf.dtype}: cast it, or leave checkpoint out"
        )


def with_leaves(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """A tree like this one, of the arrays that `numbered_leaves` told.

    Raises:
        ValueError: if an array is missing, or of another dtype or number of axes.
    """
    wanted = numbered_leaves(tree)
    for name, leaf in wanted.items():
        found = arrays.get(name)
        if found is None or (found.dtype, found.ndim) != (leaf.dtype, leaf.ndim):
            raise ValueError(f"the checkpoint is of another run: it lacks {name} as {leaf.dtype}")
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in wanted])
