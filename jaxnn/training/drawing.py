"""Candidates by index: an index stands for its weights."""

from __future__ import annotations

from typing import Any

import jax
from jax.tree_util import Partial

from jaxnn.checks import as_count, as_key
from jaxnn.training.callables import SampleFn, as_partial
from jaxnn.training.streams import fold_index, words

__all__ = ["candidates_stream", "reconstruct"]

TAG = 0x52414E44
"""Folded into the key, so that no other trainer draws the same from it."""


def candidates_stream(key: jax.Array) -> jax.Array:
    """The key that the candidates' own keys are folded from."""
    return jax.random.fold_in(key, TAG)


def reconstruct(key: jax.Array, sample_fn: SampleFn, index: int) -> Any:
    """The weights of candidate `index` of the random search with this key and sampler.

    Args:
        key: the search's key.
        sample_fn: the search's sampler.
        index: the candidate's index, below 2^63.

    Returns:
        The candidate's params.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the index is out of range.

    Example:
        >>> sample_fn = lambda key: jax.random.normal(key, (2,))
        >>> reconstruct(jax.random.key(0), sample_fn, 2**40).shape
        (2,)
    """
    key = as_key("key", key)
    index = as_count("index", index, maximum=2**63 - 1)
    with jax.threefry_partitionable(True):
        return _draw(as_partial("sample_fn", sample_fn), candidates_stream(key), *words(index))


@jax.jit
def _draw(sample: Partial, stream: jax.Array, high: jax.Array, low: jax.Array) -> Any:
    return sample(fold_index(stream, high, low))
