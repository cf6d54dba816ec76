"""How often each of many rows of bits came up, in bounded memory.

When there are more rows than may be kept, the count of the first that is one too many is taken
off all counts, and rows that have nothing left are dropped: a count is then at most `error` too
low, and `error` at most the number of rows seen over the number kept plus 1 (Misra and Gries,
"Finding repeated elements", 1982; Agarwal et al., "Mergeable summaries", 2012).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Tally", "merge", "take"]

SMALLEST_MERGE = 2**22
"""Bytes that are taken into the counts in one go at least."""


class Tally(NamedTuple):
    """Counts so far, outcomes in the order of their bits.

    Attributes:
        packed: `(outcomes, bytes)`, uint8, whole words of 8 bytes.
        count: how often each came up, `(outcomes,)`, int64; too low by at most `error`.
        error: what was taken off all counts.
        waiting: packed outcomes that are not counted yet, in the order of their indices.
        end: one past the last index taken in.
    """

    packed: np.ndarray
    count: np.ndarray
    error: int
    waiting: np.ndarray
    end: int


def take(tally: Tally, drawn: np.ndarray, max_outcomes: int) -> Tally:
    """Adds outcomes in the order of their indices; merges where their number alone says so."""
    waiting = np.concatenate([tally.waiting, drawn])
    tally = tally._replace(waiting=waiting, end=tally.end + len(drawn))
    least = max(SMALLEST_MERGE // tally.packed.shape[1], 1)
    while len(tally.waiting) >= (size := max(least, len(tally.count) // 2)):
        tally = merge(tally, size, max_outcomes)
    return tally


def merge(tally: Tally, size: int, max_outcomes: int) -> Tally:
    """Counts the first `size` of those that wait."""
    first, waiting = tally.waiting[:size], tally.waiting[size:]
    packed = np.concatenate([tally.packed, first])
    count = np.concatenate([tally.count, np.ones(len(first), np.int64)])
    by_word = packed.view(">u8")
    order = np.lexsort(by_word.T[::-1])
    packed, count, by_word = packed[order], count[order], by_word[order]
    is_new = np.append(True, np.any(by_word[1:] != by_word[:-1], axis=1))[: len(count)]
    begins = np.flatnonzero(is_new)
    packed, count = packed[begins], np.add.reduceat(count, begins) if len(begins) else count
    excess = len(count) - max_outcomes
    if excess <= 0:
        return Tally(packed, count, tally.error, waiting, tally.end)
    cut = np.partition(count, excess - 1)[excess - 1]
    kept = count > cut
    return Tally(packed[kept], count[kept] - cut, tally.error + int(cut), waiting, tally.end)
