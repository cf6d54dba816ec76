"""Candidates by index: an index stands for its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from jaxnn.run.callables import SampleFn, as_partial, check_concrete
from jaxnn.run.checks import as_count, as_key
from jaxnn.run.programs import program
from jaxnn.run.random import fold_index, own_settings, words

__all__ = ["candidates_stream", "check_draws", "reconstruct"]

TAG = 0x52414E44
"""Folded into the key, so that no other trainer draws the same from it."""

DRAWS_TO_DIFFER = 64
"""A sampler of one fair bit draws the same from as many keys once in 2^63 searches."""


def candidates_stream(key: jax.Array) -> jax.Array:
    """The key that the candidates' own keys are folded from."""
    return jax.random.fold_in(key, TAG)


def reconstruct(key: jax.Array, sample_fn: SampleFn, index: int | Sequence[int] | ArrayLike) -> Any:
    """The weights of candidate `index` of the random search with this key and sampler.

    Args:
        key: the search's key.
        sample_fn: the search's sampler.
        index: the candidate's index, below 2^63; or several, `(candidates,)`, as
            `found.collected.index`.

    Returns:
        The candidate's params; of several, with a leading axis of candidates.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the index is out of range.

    Example:
        >>> sample_fn = lambda key: jax.random.normal(key, (2,))
        >>> reconstruct(jax.random.key(0), sample_fn, 2**40).shape
        (2,)
    """
    key, sample = as_key("key", key), as_partial("sample_fn", sample_fn)
    with own_settings():
        return _draw(sample, candidates_stream(key), *_words_of(index))


def check_draws(key: jax.Array, sample: Partial, start: int) -> None:
    """Refuses a sampler that draws the same params from every key."""
    stream = candidates_stream(key)
    first = _draw(sample, stream, *words(start))
    for index in range(1, DRAWS_TO_DIFFER):
        other = _draw(sample, stream, *words((start + index) % 2**63))
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
            return
    raise ValueError(
        f"sample_fn must draw from its key; got the same params from {DRAWS_TO_DIFFER} keys: "
        "use jax.random with the key, not NumPy's random numbers"
    )


def _words_of(index: Any) -> tuple[Any, Any]:
    """The words of an index, or of each index of an array."""
    check_concrete("index", index)
    if isinstance(index, (list, tuple, jax.Array)):
        index = np.asarray(index, None if np.size(index) else np.int64)
    if not (isinstance(index, np.ndarray) and index.ndim):
        return words(as_count("index", index, maximum=2**63 - 1))
    if index.ndim > 1 or index.dtype.kind not in "iu":
        raise TypeError(
            "index must be an integer or an array of integers (candidates,); "
            f"got {index.dtype} of shape {index.shape}"
        )
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < 2**63:
        raise ValueError(f"index must be between 0 and 2**63 - 1; got {index}")
    wide = index.astype(np.uint64)
    return (wide >> np.uint64(32)).astype(np.uint32), wide.astype(np.uint32)


@program()
def _draw(sample: Partial, stream: jax.Array, high: jax.Array, low: jax.Array) -> Any:
    if high.ndim:
        return jax.vmap(lambda *index: sample(fold_index(stream, *index)))(high, low)
    return sample(fold_index(stream, high, low))
