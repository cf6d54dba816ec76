"""How many steps to look ahead: what is known of each depth, and the one to take next.

A deep window is wasted where proposals are often accepted, a shallow one where they hardly ever
are; and a depth that was not used yet has to be compiled first, which takes seconds.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DEPTHS", "Depths", "best_depth", "learn"]

DEPTHS = (1, 4, 16, 64, 128)
FREE_LANES = 16
"""So many losses take no longer than one: fewer are never scored, unless in smaller blocks."""
MOST_LANES = 2**12
PATIENT = 0.75
"""Look ahead this share of the expected number of steps to the next acceptance (tuned)."""


class Depths(NamedTuple):
    """What a search has learnt about its depths.

    Attributes:
        fixed: the depth asked for; None to choose.
        width: losses of a step, over all chains.
        block: losses scored side by side; None for all of a window.
        share: share of the steps that were accepted lately.
        paces: steps a second at each depth compiled, as last measured; inf if it was not yet.
        compile_seconds: what the last compilation took.
    """

    fixed: int | None
    width: int
    block: int | None
    share: float = 1.0
    paces: dict[int, float] = {}  # noqa: RUF012
    compile_seconds: float = 0.0


def best_depth(known: Depths, steps_left: int) -> int:
    """Somewhat fewer steps than it takes until one is accepted; compiled only if that pays.

    Args:
        known: what was learnt so far.
        steps_left: steps that are still to be taken.

    Returns:
        A depth of `DEPTHS`, or the one asked for.
    """
    if known.fixed is not None:
        return known.fixed
    least, most = (known.block or FREE_LANES) / known.width, MOST_LANES / known.width
    wanted = max(min(max(PATIENT / known.share, least), most), 1)
    depth = max(depth for depth in DEPTHS if depth <= wanted)
    if depth in known.paces or not known.paces:
        return depth
    nearest = min(known.paces, key=lambda used: abs(used - depth))
    return depth if steps_left / known.paces[nearest] > 2 * known.compile_seconds else nearest


def learn(known: Depths, depth: int, share: float, steps: int, seconds: float) -> Depths:
    """What is known after `steps` steps at a depth, of which that share was accepted."""
    pace = steps / seconds if depth in known.paces else float("inf")
    return known._replace(
        share=max(share, PATIENT / DEPTHS[-1]),
        paces={**known.paces, depth: pace},
        compile_seconds=known.compile_seconds if depth in known.paces else seconds,
    )
