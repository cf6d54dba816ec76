"""Which branches of a loss the samples of a check have visited.

A gradient is checked on the branches that its samples take, and on no other. The program of the
loss names them: every `max`, `where`, `clip`, `abs` or `cond` between the params and the loss. A
choice by the batch alone is none, nor is one that the loss does not use, one behind a
`stop_gradient`, or one between a number and infinity, such as the start of a maximum. Nor is one
by whether a number is finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from jaxnn.gradients.equations import SMOOTH, Equation, Path, traced
from jaxnn.gradients.functions import (
    at_samples,
    flat,
    joined,
    resized,
    sample_count,
    slopes,
    take,
)
from jaxnn.typing import PyTree

if TYPE_CHECKING:
    from jaxnn.gradients.equations import JaxprEqn, Read, Value

BLOCK = 256  # Samples that a program counts.
FEW, TRIED = 8, 4  # Samples that others are aimed from, and that are tried to reach one side.
STRENGTHS = 1, 10, 100  # Of what changes a sample, mild first.
MAX_PLACES = 16  # Of a maximum; later places count as the last of these.

EXTREMES = {"argmax": 1, "argmin": -1, "reduce_max": 1, "reduce_min": -1}
"""What chooses a place, and the sign with which the number there is the largest."""

UNCOUNTED = {"ceil", "cummax", "cummin", "floor", "reduce_window_max", "reduce_window_min", "round"}
UNCOUNTED |= {"sort", "top_k", "while"}
"""Operations that choose in other ways; a report tells where they are."""


class _Choice(NamedTuple):
    """One choice that an equation makes; `pair(*inputs)` are two numbers, or arrays.

    The first side is where the first number is larger.
    """

    kind: str
    sides: tuple[str, str]
    pair: Callable[..., tuple[ArrayLike, ArrayLike]]


TRUTH = _Choice("", ("false", "true"), lambda *inputs: (0.5, inputs[0]))
SIGN = _Choice("", ("negative", "positive"), lambda x: (0.0, x))
ORDER, BOUND = ("first", "second"), ("clipped", "inside")
CHOICES = {
    "abs": [SIGN._replace(kind="abs")],
    "sign": [SIGN._replace(kind="sign")],
    "cond": [TRUTH._replace(kind="cond")],
    "select_n": [TRUTH._replace(kind="where")],
    "convert_element_type": [TRUTH._replace(kind="mask")],
    "max": [_Choice("max", ORDER, lambda one, other: (one, other))],
    "min": [_Choice("min", ORDER, lambda one, other: (other, one))],
    "clamp": [
        _Choice("clip low", BOUND, lambda low, x, high: (low, x)),
        _Choice("clip high", BOUND, lambda low, x, high: (x, high)),
    ],
}
"""What chooses, by JAX's name of it."""


class Branch(NamedTuple):
    """One choice in a loss's program.

    Attributes:
        place: file, line and function in the user's source, such as `"model.py:42 (relu)"`.
        kind: what chooses, and between what, in the order of `counts`. `"max"`, `"min"`: the first
            operand or the second. `"where"`, `"mask"` (a comparison used as a number), `"cond"`:
            false or true. `"abs"`, `"sign"`: negative or positive. `"clip low"`, `"clip high"`:
            clipped or not. `"reduce_max at 2"`: the largest is at place 2 along the axis, or
            elsewhere; every place is a choice of its own, the 16th together with those behind it.
            `"cond at 2"`, of more than two branches: that one, or another. `"max in relu"`: within
            a function of JAX.
        counts: how often each side was taken, over samples times elements; a tie is on no side.
        sides: what its sides are called, in the order of the counts.
    """

    place: str
    kind: str
    counts: tuple[int, int]
    sides: tuple[str, str]


class Coverage(NamedTuple):
    """Which sides of a loss's branches were visited.

    Attributes:
        branches: in the order of the program.
        num_samples: samples that they are counted over, with those that were added.
        num_tried: other samples that were tried for sides not visited yet.
        uncounted: operations that choose, but whose sides are not counted, such as
            `"sort at model.py:8 (loss)"`.
    """

    branches: tuple[Branch, ...]
    num_samples: int
    num_tried: int
    uncounted: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of sides that were visited; 1 if there is no branch."""
        visited = [count > 0 for branch in self.branches for count in branch.counts]
        return sum(visited) / len(visited) if visited else 1.0

    @property
    def missed(self) -> tuple[Branch, ...]:
        """The branches of which a side was not visited."""
        return tuple(branch for branch in self.branches if not all(branch.counts))


def cover(
    loss: Partial,
    samples: PyTree,
    batch: PyTree,
    draw: Callable[[int], PyTree] | None = None,
    *,
    limit: int = 1_000,
) -> tuple[Coverage, PyTree]:
    """Count the branches that samples take, and find other samples that take the rest.

    `draw(number)` returns new samples, half of those tried. The others are aimed: the samples
    scaled, negated, or with all numbers of one leaf moved. At most `limit` are tried; 0 only
    counts. The samples that were added are returned too; the slopes of the loss are finite there.
    """
    first, size = take(samples, 0), sample_count(samples)
    steps = traced(loss, first, batch)[0].values()
    choices = [(each.place, choice) for each in steps for choice in _choices(each)]
    operations = [(each.eqn.primitive.name, each.place) for each in steps]
    uncounted = {f"{name} at {place}": None for name, place in operations if name in UNCOUNTED}
    counts = np.zeros((0, 3), int)
    if choices:
        counts = np.sum(_count(loss, samples, batch), axis=0)

    def missing() -> np.ndarray:
        """Sides that were not visited, except of what was no choice wherever it was met."""
        return (counts[:, :2] == 0) & ~_is_none(counts)[:, None]

    added, others, found = [], take(samples, slice(0)), counts[None][:0]
    if limit and np.any(missing()):
        drawn = [] if draw is None else [jax.tree.map(np.asarray, draw(-(-limit // 2)))]
        others = take(joined([*drawn, *_aimed(samples)]), slice(limit))
        found = _count(loss, others, batch)
    for row, side in np.argwhere(missing()):
        for place in np.flatnonzero(found[:, row, side])[:TRIED]:
            here = take(others, [place])
            if missing()[row, side] and np.all(np.isfinite(flat(slopes(loss, here, batch)))):
                counts, added = counts + found[place], [*added, place]
    branches = [
        Branch(place, choice.kind, (int(count[0]), int(count[1])), choice.sides)
        for (place, choice), count, is_none in zip(choices, counts, _is_none(counts), strict=True)
        if not is_none
    ]
    coverage = Coverage(tuple(branches), size + len(added), len(found), tuple(uncounted))
    return coverage, take(others, np.array(added, int))


def _is_none(counts: np.ndarray) -> np.ndarray:
    return (counts[:, 2] > 0) & ~np.any(counts[:, :2], axis=1)


def _aimed(samples: PyTree) -> list[PyTree]:
    """Return changed samples: all leaves scaled, or one of them moved."""
    leaves, tree = jax.tree.flatten(take(samples, slice(FEW)))
    changed = []
    for factor in [f for size in STRENGTHS for f in (-size, size, 1 / size)]:
        changed.append([factor * leaf for leaf in leaves])
        for place, leaf in enumerate(leaves):
            moved = leaf + factor * (np.max(np.abs(leaf), initial=0) or 1)
            changed.append([*leaves[:place], moved, *leaves[place + 1 :]])
    return [jax.tree.unflatten(tree, each) for each in changed]


def _choices(equation: Equation) -> list[_Choice]:
    """Return the choices of an equation; none if it does not choose by the params."""
    eqn, _, within, depends = equation
    name, part = eqn.primitive.name, f" in {within}" * bool(within)
    is_reached = depends[0] or name in ("max", "min", "clamp")
    if name not in CHOICES.keys() | EXTREMES.keys() or within in SMOOTH or not is_reached:
        return []
    first, result = (cast(Any, each[0]).aval for each in (eqn.invars, eqn.outvars))
    if not prod(result.shape):
        return []
    if name in EXTREMES:
        sign, axes = EXTREMES[name], eqn.params["axes"]
        size = prod(first.shape[axis] for axis in axes)
        number = min(size, MAX_PLACES) if size > 1 else 0
        return _of_places(name, number, part, lambda x: _place_of_largest(sign * x, axes))
    if name == "cond":
        number = len(eqn.params["branches"])
        if number > 2:
            return _of_places(name, number, part, lambda x: x)
    elif not jnp.issubdtype(result.dtype, jnp.floating) or first.dtype.kind == "c":
        return []
    if name in ("select_n", "convert_element_type") and first.dtype != bool:
        return []
    if within == "clip" and name in ("max", "min"):
        kind = "clip low" if name == "max" else "clip high"
        return [_Choice(kind, BOUND, CHOICES[name][0].pair)]
    return [choice._replace(kind=choice.kind + part) for choice in CHOICES[name]]


def _of_places(
    name: str, number: int, part: str, at: Callable[[jax.Array], jax.Array]
) -> list[_Choice]:
    """Return a choice for each place: it is taken there, or elsewhere."""
    sides = "there", "elsewhere"
    return [
        _Choice(f"{name} at {n}{part}", sides, lambda x, *_, n=n: (at(x) == n, 0.5))
        for n in range(number)
    ]


def _place_of_largest(values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return at which place along the axes the largest number is."""
    rows = jnp.moveaxis(values, axes, range(len(axes)))
    rows = rows.reshape(prod(rows.shape[: len(axes)]), -1)
    return jnp.minimum(jnp.argmax(rows, axis=0), MAX_PLACES - 1)


def _count(loss: Partial, samples: PyTree, batch: PyTree) -> np.ndarray:
    """Return how often each side was taken, and how often there was no choice."""
    size, counts = sample_count(samples), Partial(_counts, loss)
    blocks = [take(samples, slice(begin, begin + BLOCK)) for begin in range(0, size, BLOCK)]
    return joined([at_samples(counts, resized(block, BLOCK), batch) for block in blocks])[:size]


def _counts(loss: Partial, params: PyTree, batch: PyTree) -> jax.Array:
    """Run the loss equation by equation, and count: `(choices, 3)`."""
    found, run = traced(loss, params, batch)
    chosen = {path: _choices(each) for path, each in found.items()}

    def visit(
        path: Path, eqn: JaxprEqn, read: Read, outputs: Sequence[Value], counts: PyTree
    ) -> tuple[Sequence[Value], PyTree]:
        if chosen.get(path):
            inputs = [jnp.asarray(read(each)) for each in eqn.invars]
            sides = [_larger(*choice.pair(*inputs)) for choice in chosen[path]]
            counts = {**counts, path: counts[path] + jnp.stack(sides)}
        return outputs, counts

    begin = {path: jnp.zeros((len(each), 3), int) for path, each in chosen.items() if each}
    counts = run(visit, begin)[1]
    return jnp.concatenate([counts[path] for path in begin])


def _larger(one: ArrayLike, other: ArrayLike) -> jax.Array:
    """Return how often one is larger, how often the other, and how often one is infinite."""
    pair = [jnp.asarray(each, float) for each in (one, other)]
    none = jnp.isinf(pair[0]) | jnp.isinf(pair[1])
    first, second = (pair[0] > pair[1]) & ~none, (pair[0] < pair[1]) & ~none
    return jnp.stack([jnp.sum(first), jnp.sum(second), jnp.sum(none)])
