"""Random streams by index: draw `i` is a function of the key and of `i` alone.

Indices go to 2^63. Inside compiled code an index is two uint32 words, `high` and `low`; outside
it is a Python int.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["add", "fold_index", "join", "own_settings", "words"]


@contextmanager
def own_settings() -> Iterator[None]:
    """Sets JAX as the trainers need it: draws by index, and inf as the loss of what has none."""
    with jax.threefry_partitionable(True), jax.debug_infs(False):
        yield


def words(index: int) -> tuple[np.uint32, np.uint32]:
    """The high and the low 32 bits of an index."""
    return np.uint32(index >> 32), np.uint32(index & 0xFFFFFFFF)


def join(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The uint64 index, or indices, of two uint32 words."""
    return np.asarray(high, np.uint64) << np.uint64(32) | np.asarray(low, np.uint64)


def add(high: jax.Array, low: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The words of `index + offset`; all uint32, the carry included."""
    sums = low + offset
    return high + (sums < low).astype(jnp.uint32), sums


def fold_index(stream: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    """The key of one index: `fold_in(fold_in(stream, high), low)`."""
    return jax.random.fold_in(jax.random.fold_in(stream, high), low)
