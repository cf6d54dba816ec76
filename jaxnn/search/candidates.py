"""Candidates by index: an index stands for its params.

Candidate `i` is `sample_fn(key_i)`, whose key depends on the search's key and on `i` alone. So a
search stores indices, and `candidate_params` returns the params. Indices go to 2^63: inside
compiled code an index is two uint32 words, `high` and `low`; outside it is a Python int.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from jaxnn.run.checks import as_count, as_key, as_numpy, as_partial, check_concrete
from jaxnn.run.programs import own_settings, program
from jaxnn.run.random import fold_in
from jaxnn.typing import PyTree, SampleFn

TAG = 0x52414E44
"""Folded into the key, so that no other trainer draws the same from it."""
DRAWS_TO_DIFFER = 64
"""A sampler of one fair bit draws the same from as many keys once in 2^63 searches."""


def candidate_params(
    key: jax.Array, sample_fn: SampleFn, candidate: int | Sequence[int] | ArrayLike
) -> PyTree:
    """Return the params of a candidate of the random search with this key and sampler.

    Args:
        key: the search's key.
        sample_fn: the search's sampler.
        candidate: the candidate's index, below 2^63; or several, `(candidates,)`, such as
            `result.collected.candidate`.

    Returns:
        The candidate's params; of several, with a leading axis of candidates.

    Raises:
        TypeError: if an index is not an integer.
        ValueError: if an index is out of range.

    Example:
        >>> sample_fn = lambda key: jax.random.normal(key, (2,))
        >>> candidate_params(jax.random.key(0), sample_fn, 2**40).shape
        (2,)
    """
    key, sample = as_key("key", key), as_partial("sample_fn", sample_fn)
    with own_settings():
        return _draw(sample, jax.random.fold_in(key, TAG), *_words_of(candidate))


def draw(sample: Partial, stream: jax.Array, high: jax.Array, low: jax.Array) -> PyTree:
    """Return the params of a candidate."""
    return sample(fold_index(stream, high, low))


draw_many = jax.vmap(draw, (None, None, 0, 0))
"""The same for candidates side by side."""


@program()
def _draw(sample: Partial, stream: jax.Array, high: jax.Array, low: jax.Array) -> PyTree:
    return (draw_many if high.ndim else draw)(sample, stream, high, low)


def check_draws(sample: Partial, stream: jax.Array, start: int) -> None:
    """Refuse a sampler that draws the same params from every key."""
    indices = ((start + i) % 2**63 for i in range(DRAWS_TO_DIFFER))
    draws = (jax.tree.leaves(_draw(sample, stream, *words(index))) for index in indices)
    first, equal = next(draws), partial(np.array_equal, equal_nan=True)
    if all(all(map(equal, first, other)) for other in draws):
        raise ValueError(
            f"sample_fn must draw from its key; got the same params from {DRAWS_TO_DIFFER} keys: "
            "use jax.random with the key, not NumPy's random numbers"
        )


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
    return fold_in(fold_in(stream, high), low)


def _words_of(candidate: Any) -> tuple[Any, Any]:
    """The words of an index, or of each index of an array."""
    check_concrete("candidate", candidate)
    if isinstance(candidate, (list, tuple)) or getattr(candidate, "ndim", 0):
        indices: Any = as_numpy("candidate", candidate)
        indices = indices if indices.size else indices.astype(np.int64)
    else:
        indices = np.asarray(as_count("candidate", candidate, maximum=2**63 - 1))
    if indices.ndim > 1 or indices.dtype.kind not in "iu":
        raise TypeError(
            "candidate must be an integer or an array of integers (candidates,); "
            f"got {indices.dtype} of shape {indices.shape}"
        )
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < 2**63:
        raise ValueError(f"candidate must be between 0 and 2**63 - 1; got {indices}")
    return words(indices.astype(np.uint64))
