"""The range of candidates that a search walks, and the width of the tiles it walks in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxnn.run.checks import as_count

__all__ = ["as_range", "tile_size"]

MEMORY_BUDGETS, LARGEST_TILES = {"cpu": 2**22}, {"cpu": 2**14}
"""By platform: on CPUs a tile stays in the caches of the cores. Others get the following."""
MEMORY_BUDGET, LARGEST_TILE = 2**28, 2**20


def as_range(start: int, num_candidates: int) -> tuple[int, int]:
    """The first index and one past the last, checked."""
    num_candidates = as_count("num_candidates", num_candidates, minimum=1)
    start = as_count("start", start)
    if start + num_candidates > 2**63:
        raise ValueError(
            f"start + num_candidates must be at most 2**63; got {start} + {num_candidates}"
        )
    return start, start + num_candidates


def tile_size(
    loss_fn: Callable[..., Any], params: Any, batch: Any, memory_budget: int | None, platform: str
) -> int:
    """Candidates a tile: a power of two, a function of shapes, budget and platform alone.

    A loss function that knows better carries `bytes_per_set(params, batch)`. Of others, rows
    times the widest axis of the params stands for the largest intermediate value of one
    candidate, if its params are not larger yet.
    """
    if memory_budget is None:
        memory_budget = MEMORY_BUDGETS.get(platform, MEMORY_BUDGET)
    budget = as_count("memory_budget", memory_budget, minimum=1)
    rows = max((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim), default=1)
    widest = max((max(leaf.shape, default=1) for leaf in jax.tree.leaves(params)), default=1)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    bytes_per_set = getattr(loss_fn, "bytes_per_set", lambda *_: 4 * max(rows * widest, size))
    fitting = max(budget // max(bytes_per_set(params, batch), 1), 1)
    return min(1 << (fitting.bit_length() - 1), LARGEST_TILES.get(platform, LARGEST_TILE))
