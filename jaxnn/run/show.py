"""What is shown of results and records: a few lines of text, and a table in a notebook."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxnn.typing import PyTree

WIDTH, FEW = 100, 5  # Columns of a line; an array of so few numbers is shown itself.
ENDINGS: Mapping[str, str] = {
    "running": "not ended: it still runs, or was killed",
    "completed": "completed, all of it was done",
    "converged": "converged, a stop rule was met",
    "diverged": "diverged, a loss was not finite; the params are the last with a finite one",
    "interrupted": "interrupted by Ctrl-C or SIGTERM",
    "nonfinite": "no loss was finite",
    "reached": "reached what was looked for",
    "stopped": "stopped by a limit of time or by a callback",
}
"""A `Status` in words."""
NEXT: Mapping[str, str] = {
    "diverged": "a smaller step size; result.history.loss shows where it went wrong",
    "nonfinite": "the loss of single params: are the inputs finite, the params not too large?",
}
"""What to look at next, instead of the result's own hint."""

Record = TypeVar("Record", bound=type)


class Table(NamedTuple):
    """What is shown: a title, rows of as many cells each, and lines below."""

    title: str
    rows: Sequence[Sequence[str]]
    below: Sequence[str] = ()

    def __str__(self) -> str:
        """Return it as text, in columns."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        padded = [map(str.ljust, row, widths) for row in self.rows]
        lines = ("  ".join(["", *row]).rstrip() for row in padded)
        return "\n".join([self.title, *lines, *self.below])

    def _repr_html_(self) -> str:
        rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.rows)
        lines = "<br>".join(map(escape, self.below))
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<b>{escape(self.title)}</b><table>{body}</table>{lines}"


def readable(record: Record) -> Record:
    """Make a NamedTuple print in a few lines, and show as a table in a notebook.

    Its own method `_table()` says what is shown; without one, it is the shape, dtype and range of
    every field, but for those that may be left out and are.
    """
    shown: Any = record

    def of_fields(self: Any) -> Table:
        left_out = {name for name, default in shown._field_defaults.items() if default is None}
        fields = [
            (name, described(value))
            for name, value in self._asdict().items()
            if value is not None or name not in left_out
        ]
        return Table(record.__name__, fields)

    def in_a_line(self: object) -> str:
        fields = ", ".join(f"{name}={text}" for name, text in of_fields(self).rows)
        options: Any = {"break_long_words": False, "break_on_hyphens": False}
        line = f"{record.__name__}({fields})"
        return textwrap.fill(line, WIDTH, subsequent_indent="    ", **options)

    own = getattr(record, "_table", None)
    shown.__repr__ = in_a_line if own is None else lambda self: str(own(self))
    shown._repr_html_ = lambda self: (own or of_fields)(self)._repr_html_()
    return record


class Text(str):
    """A text that stands in a tree as it is, without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def described(tree: PyTree) -> str:
    """Return a tree in which shape, dtype and range stand for every array.

    Example:
        >>> described({"w": np.zeros((2, 3)), "b": np.arange(3)})
        "{'b': [0, 1, 2], 'w': (2, 3) float64 0 to 0}"
    """
    return repr(jax.tree.map(lambda leaf: Text(_array(leaf)), tree))


def _array(leaf: object) -> str:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return repr(leaf)
    text = f"{leaf.shape} {leaf.dtype}"
    try:
        values = np.asarray(leaf)
    except Exception:  # Tracers, keys, and arrays that are deleted or elsewhere have no values.
        return text
    if values.ndim < 2 and 0 < values.size <= FEW:
        return np.array2string(values, separator=", ", precision=6)
    if values.dtype == bool:
        return f"{text} {np.sum(values):,} True"
    if values.dtype.kind not in "iuf":
        return text
    finite = values[np.isfinite(values)]
    lost = f", {values.size - finite.size:,} not finite" * (finite.size < values.size)
    extent = f" {np.min(finite):.4g} to {np.max(finite):.4g}" if finite.size else ""
    return text + extent + lost


def summary(
    title: str,
    status: str | np.ndarray,
    loss: float | np.floating | np.ndarray,
    num_evaluations: int | np.ndarray,
    *,
    details: Mapping[str, str] = MappingProxyType({}),
    notes: Sequence[str] = (),
    hint: str,
) -> Table:
    """Return what is shown of a result: a line for each number and note, and where to look next.

    The status, the loss and the evaluations may be arrays `(runs,)`: then the lines tell how they
    are spread.

    Example:
        >>> print(summary("a search", "completed", 0.25, 1_000, notes=["cold"], hint="top"))
        a search
          status       completed, all of it was done
          loss         0.25
          evaluations  1,000
          note         cold
          look at      top
    """
    only = str(status) if np.ndim(status) == 0 else ""
    rows = [
        ("status", _ending(status)),
        ("loss", _spread(loss)),
        ("evaluations", f"{np.sum(num_evaluations):,}"),
        *details.items(),
        *(("note", note) for note in notes),
        ("look at", NEXT.get(only, hint)),
    ]
    room = WIDTH - 4 - max(len(name) for name, _ in rows)
    cut = [(name, textwrap.shorten(text, room, placeholder=" ...")) for name, text in rows]
    return Table(title, cut)


def _ending(status: str | np.ndarray) -> str:
    """The status in words, or how many runs ended in each way."""
    if np.ndim(status) == 0:
        return ENDINGS[str(status)]
    words, counts = np.unique(status, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return ", ".join(f"{counts[place]:,} {words[place]}" for place in order)


def _spread(loss: float | np.floating | np.ndarray) -> str:
    if np.ndim(loss) == 0:
        return f"{loss:.6g}"
    return f"lowest {np.min(loss):.6g}, median {np.median(loss):.6g}"
