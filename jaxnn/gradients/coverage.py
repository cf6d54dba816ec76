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
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.gradients.equations import SMOOTH, Equation, equations, run, trace
from jaxnn.gradients.functions import joined, resized, sample_count, slopes, take
from jaxnn.run.programs import program
from jaxnn.typing import PyTree

SAMPLES_AT_ONCE, BLOCK = 16, 256
FEW, TRIED = 8, 4  # Samples that others are aimed from, and that are tried to reach one side.
STRENGTHS = 1, 10, 100  # Of what changes a sample, mild first.
MAX_PLACES = 16  # Of a maximum; later places count as the last of these.

EXTREMES = {"argmax": 1, "argmin": -1, "reduce_max": 1, "reduce_min": -1}
"""What chooses a place, and the sign with which the number there is the largest."""

CHOOSING = {"abs", "clamp", "cond", "convert_element_type", "max", "min", "select_n", "sign"}
CHOOSING |= EXTREMES.keys()

UNCOUNTED = {"ceil", "cummax", "cummin", "floor", "reduce_window_max", "reduce_window_min", "round"}
UNCOUNTED |= {"sort", "top_k", "while"}
"""Operations that choose in other ways; a report tells where they are."""


SIDES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("max", "min"), ("first", "second")),
    **dict.fromkeys(("where", "mask", "cond"), ("false", "true")),
    **dict.fromkeys(("abs", "sign"), ("negative", "positive")),
    "clip": ("clipped", "inside"),
}
"""What both sides of a choice are called, by the first word of its kind."""


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
    """

    place: str
    kind: str
    counts: tuple[int, int]

    @property
    def sides(self) -> tuple[str, str]:
        """What its sides are called, in the order of the counts."""
        kind = "" if " at " in self.kind else self.kind.split()[0]
        return SIDES.get(kind, ("there", "elsewhere"))


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

    Args:
        loss: `loss(params, batch)` -> a float scalar.
        samples: params with a leading axis of samples.
        batch: any pytree that the loss takes.
        draw: `draw(number)` returns that many new samples, half of those tried. The others are
            aimed: the samples scaled, negated, or with all numbers of one leaf moved.
        limit: how many samples are tried at most; 0 only counts.

    Returns:
        A `Coverage`, and the samples that were added to it, a tree like `samples`; the slopes of
        the loss are finite there.

    Example:
        >>> loss = Partial(lambda params, batch: jnp.maximum(params, 0.0))
        >>> coverage, added = cover(loss, np.array([1.0, 2.0]), None)
        >>> coverage.branches[0].kind, coverage.branches[0].counts, added.tolist()
        ('max', (2, 1), [-1.0])
    """
    first, size = take(samples, 0), sample_count(samples)
    steps = equations(trace(loss, first, batch), loss, first).values()
    names = [(each.place, kind) for each in steps for kind in _kinds(each)]
    operations = [(each.eqn.primitive.name, each.place) for each in steps]
    uncounted = {f"{name} at {place}": None for name, place in operations if name in UNCOUNTED}
    block = min(BLOCK, size + -size % SAMPLES_AT_ONCE)
    counts = np.zeros((0, 3), int)
    if names:
        counts = np.sum(_count(loss, samples, batch, block), axis=0)

    def missing() -> np.ndarray:
        """Sides that were not visited, except of what was no choice wherever it was met."""
        return (counts[:, :2] == 0) & ~_is_none(counts)[:, None]

    added, others, found = [], take(samples, slice(0)), counts[None][:0]
    if limit and np.any(missing()):
        drawn = [] if draw is None else [jax.tree.map(np.asarray, draw(-(-limit // 2)))]
        others = joined([*drawn, *_aimed(samples)])
        others = take(others, slice(limit))
        found = _count(loss, others, batch, block)
    for row, side in np.argwhere(missing()):
        for place in np.flatnonzero(found[:, row, side])[:TRIED]:
            if missing()[row, side] and _has_slopes(loss, take(others, [place]), batch):
                counts, added = counts + found[place], [*added, place]
    branches = [
        Branch(*name, (int(count[0]), int(count[1])))
        for name, count, is_none in zip(names, counts, _is_none(counts), strict=True)
        if not is_none
    ]
    coverage = Coverage(tuple(branches), size + len(added), len(found), tuple(uncounted))
    return coverage, take(others, np.array(added, int))


def _is_none(counts: np.ndarray) -> np.ndarray:
    return (counts[:, 2] > 0) & ~np.any(counts[:, :2], axis=1)


def _has_slopes(loss: Partial, sample: PyTree, batch: PyTree) -> bool:
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes(loss, sample, batch)))


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


def _choices(closed: Any, loss: Partial, params: PyTree) -> dict[Any, Equation]:
    """Return the equations that choose by the params."""
    found = equations(closed, loss, params)
    return {path: each for path, each in found.items() if _kinds(each)}


def _kinds(equation: Equation) -> list[str]:
    """Return what the choices of an equation are called; none if it does not choose."""
    kinds: list[str] = []
    if equation.eqn.primitive.name in CHOOSING and equation.within not in SMOOTH:
        avals = [cast(Any, each).aval for each in equation.eqn.invars]
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        jax.eval_shape(lambda *inputs: kinds.extend(_pairs(equation, inputs)), *shapes)
    return kinds


def _pairs(equation: Equation, inputs: Sequence[Any]) -> dict[str, tuple[Any, Any]]:
    """Return by kind two numbers, or arrays: the first side is where the first one is larger."""
    (eqn, _, within, depends), first, last = equation, inputs[0], inputs[-1]
    name, part = eqn.primitive.name, f" in {within}" * bool(within)
    result = cast(Any, eqn.outvars[0]).aval
    if not prod(result.shape) or not (depends[0] or name in ("max", "min", "clamp")):
        return {}
    if name in EXTREMES:
        at, number = _place_of_largest(EXTREMES[name] * first, eqn.params["axes"])
        places = range(number) if number > 1 else ()
        return {f"{name} at {place}{part}": (at == place, 0.5) for place in places}
    if name == "cond":
        number = len(eqn.params["branches"])
        several = {f"cond at {place}{part}": (first == place, 0.5) for place in range(number)}
        return several if number > 2 else {"cond" + part: (0.5, first)}
    is_complex = jnp.issubdtype(first.dtype, jnp.complexfloating)
    if is_complex or not jnp.issubdtype(result.dtype, jnp.floating):
        return {}
    if name in ("select_n", "convert_element_type"):
        word = "where" if name == "select_n" else "mask"
        return {word + part: (0.5, first)} if first.dtype == bool else {}
    if name in ("abs", "sign"):
        return {name + part: (0.0, first)}
    if name == "clamp":
        return {"clip low": (first, inputs[1]), "clip high": (inputs[1], last)}
    pair, clip = ((first, last), "low") if name == "max" else ((last, first), "high")
    return {f"clip {clip}" if within == "clip" else name + part: pair}


def _place_of_largest(values: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, int]:
    """Return at which place along the axes the largest number is, and how many places count."""
    rows = jnp.moveaxis(values, axes, range(len(axes)))
    rows = rows.reshape(prod(rows.shape[: len(axes)]), -1)
    number = min(len(rows), MAX_PLACES)
    return jnp.minimum(jnp.argmax(rows, axis=0), number - 1), number


def _count(loss: Partial, samples: PyTree, batch: PyTree, block: int) -> np.ndarray:
    """Return how often each side was taken, and how often there was no choice."""
    size = sample_count(samples)
    blocks = [take(samples, slice(begin, begin + block)) for begin in range(0, size, block)]
    counts = [np.asarray(_counts(loss, resized(each, block), batch)) for each in blocks]
    return np.concatenate(counts)[:size]


@program()
def _counts(loss: Partial, samples: PyTree, batch: PyTree) -> jax.Array:
    """Run the loss equation by equation, and count: `(samples, choices, 3)`."""

    def at(params: PyTree) -> jax.Array:
        closed = trace(loss, params, batch)
        chosen = _choices(closed, loss, params)

        def visit(path: Any, read: Any, outputs: Any, counts: Any) -> Any:
            if path in chosen:
                inputs = [jnp.asarray(read(each)) for each in chosen[path].eqn.invars]
                sides = jnp.stack(
                    [_larger(*pair) for pair in _pairs(chosen[path], inputs).values()]
                )
                counts = {**counts, path: counts[path] + sides}
            return outputs, counts

        begin = {path: jnp.zeros((len(_kinds(each)), 3), int) for path, each in chosen.items()}
        args = jax.tree.leaves((loss, params, batch))
        counts = run(closed, args, visit, begin)[1]
        return jnp.concatenate([counts[path] for path in chosen])

    return jax.lax.map(at, samples, batch_size=SAMPLES_AT_ONCE)


def _larger(one: Any, other: Any) -> jax.Array:
    """Return how often one is larger, how often the other, and how often one is infinite."""
    one, other = (jnp.asarray(each, float) for each in (one, other))
    none = jnp.isinf(one) | jnp.isinf(other)
    first, second = (one > other) & ~none, (one < other) & ~none
    return jnp.stack([jnp.sum(first), jnp.sum(second), jnp.sum(none)])
