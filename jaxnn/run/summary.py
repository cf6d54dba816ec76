"""What a result says when it is printed: a few lines, without its arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

__all__ = ["summary"]

ENDINGS = {
    "completed": "completed, all of it was done",
    "converged": "converged, a stop rule was met",
    "diverged": "diverged, a loss was not finite; the params are the last with a finite one",
    "interrupted": "interrupted by Ctrl-C or SIGTERM",
    "nonfinite": "no loss was finite",
    "reached": "reached what was looked for",
    "stopped": "stopped by a limit of time or by a callback",
}
"""A `Status` in words."""


def summary(
    title: str,
    status: Any,
    loss: Any,
    num_evaluations: Any,
    *,
    details: Mapping[str, str] = MappingProxyType({}),
    notes: Sequence[str] = (),
) -> str:
    """Returns the lines of a result; of several runs, how they are spread.

    Args:
        title: what was run.
        status: a `Status`, or an array of them, `(runs,)`.
        loss: the loss, or that of each run.
        num_evaluations: evaluations made, by each run where there are several.
        details: other numbers by name.
        notes: a line each.

    Returns:
        A title, then a line for each of the others.

    Example:
        >>> print(summary("a search", "completed", 0.25, 1_000, notes=["cold"]))
        a search
          status       completed, all of it was done
          loss         0.25
          evaluations  1,000
          note         cold
    """
    rows = [
        ("status", _ending(status)),
        ("loss", _spread(loss)),
        ("evaluations", f"{np.sum(num_evaluations):,}"),
        *details.items(),
        *(("note", note) for note in notes),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _ending(status: Any) -> str:
    """The status in words, or how many runs ended in each way."""
    if np.ndim(status) == 0:
        return ENDINGS[str(status)]
    words, counts = np.unique(status, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return ", ".join(f"{counts[place]:,} {words[place]}" for place in order)


def _spread(loss: Any) -> str:
    if np.ndim(loss) == 0:
        return f"{loss:.6g}"
    return f"lowest {np.min(loss):.6g}, median {np.median(loss):.6g}"
