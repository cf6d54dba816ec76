"""Which branches of a loss a check's samples have visited.

A gradient is only checked on the branches that its samples take. The program of the loss names
them: every `max`, `where`, `clip`, `abs` or `cond` between the params and the loss. A choice by the
batch alone is none, nor is one that the loss does not use, that is behind a `stop_gradient`, or by
whether a number is infinite or nan.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.gradients.equations import Equation, equations, run, trace
from jaxnn.gradients.functions import slopes
from jaxnn.run.programs import program
from jaxnn.typing import PyTree

SAMPLES_AT_ONCE, BLOCK = 16, 256
FEW, TRIED = 16, 4  # Samples that others are aimed from, and that one side is tried with at once.
STRENGTHS = 1, 10, 100  # Of what changes a sample, mild first.
MAX_PLACES = 16  # Of a maximum that are told apart; the rest counts as the last of them.

EXTREMES = {"argmax": 1, "argmin": -1, "reduce_max": 1, "reduce_min": -1}
"""What chooses a position, and the sign with which that is the largest."""

WORDS = {name: name for name in (*EXTREMES, "abs", "clamp", "cond", "max", "min", "sign")}
WORDS |= {"select_n": "where", "convert_element_type": "mask"}
"""What the primitives that choose are called."""

CLIPS = {"max": "clip low", "min": "clip high"}
SMOOTH = {"hypot", "logaddexp", "logaddexp2", "logsumexp", "softplus"}
"""Functions of JAX that are smooth, whatever choices they are computed by."""


class Branch(NamedTuple):
    """One choice in a loss's program.

    Attributes:
        place: file, line and function in the user's source, such as `"model.py:42 (relu)"`.
        kind: which choice, and between what, as `counts` has them. `"max"`, `"min"`: the first
            operand or the second. `"where"`, `"mask"` (a comparison that is used as a number),
            `"cond"`: false or true. `"abs"`, `"sign"`: negative or positive. `"clip low"`,
            `"clip high"`: clipped or not. `"reduce_max at 2"`, and so on: position 2 is the
            largest, or another one is. `"cond at 2"`, of more than two branches: that or another.
            A choice within a function of JAX names it: `"max in relu"`.
        counts: how often each side was taken, over samples times elements. A tie counts on
            neither side.
    """

    place: str
    kind: str
    counts: tuple[int, int]


class Coverage(NamedTuple):
    """Which sides of a loss's branches were visited.

    Attributes:
        branches: in the order of the program.
        num_samples: samples that they are counted over, with those that were added.
        num_tried: samples that were tried for sides that were not visited yet.
    """

    branches: tuple[Branch, ...]
    num_samples: int
    num_tried: int

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
    limit: int = 2_000,
) -> tuple[Coverage, PyTree]:
    """Count the branches that samples take, and find samples that take the others.

    Args:
        loss: `loss(params, batch)` -> a float scalar.
        samples: params with a leading axis of samples, in float64.
        batch: any pytree that the loss takes.
        draw: `draw(number)` -> so many other samples, which are tried first. Then samples are
            tried that are scaled, negated, or moved by a leaf.
        limit: how many samples are tried at most; 0 counts alone.

    Returns:
        A `Coverage`, and the samples added, a tree like `samples`: the loss and its gradient are
        finite there. A check that compares gradients there as well visits all that is counted.

    Example:
        >>> loss = Partial(lambda params, batch: jnp.maximum(params, 0.0))
        >>> coverage, added = cover(loss, jnp.array([1.0, 2.0]), None)
        >>> coverage.branches[0].kind, coverage.branches[0].counts, added
        ('max', (2, 1), array([-1.]))
    """
    samples = jax.tree.map(np.asarray, samples)
    first, size = _take(samples, 0), len(jax.tree.leaves(samples)[0])
    rows = [(each, kind) for each in _choices(loss, first, batch) for kind in _kinds(each)]
    block = min(BLOCK, size + -size % SAMPLES_AT_ONCE)
    counts = np.sum(_count(loss, samples, batch, block), axis=0) if rows else np.zeros((0, 3), int)

    def missing() -> np.ndarray:
        """Sides that were not visited, except of what was never a choice where it was met."""
        is_choice = np.any(counts[:, :2], axis=1) | (counts[:, 2] == 0)
        return (counts[:, :2] == 0) & is_choice[:, None]

    added, others, found = [], _take(samples, slice(0)), np.zeros((0, *counts.shape), int)
    if limit and np.any(missing()):
        drawn = [] if draw is None else [jax.tree.map(np.asarray, draw(-(-limit // 2)))]
        others = _take(_joined([*drawn, *_aimed(samples)]), slice(limit))
        found = _count(loss, others, batch, block)
    for row, side in np.argwhere(missing()):
        for place in np.flatnonzero(found[:, row, side])[:TRIED]:
            if missing()[row, side] and _has_slope(loss, _take(others, [place]), batch):
                counts, added = counts + found[place], [*added, place]
    branches = tuple(
        Branch(each.place, kind, (int(first_side), int(second_side)))
        for (each, kind), (first_side, second_side, none) in zip(rows, counts, strict=True)
        if first_side or second_side or not none
    )
    coverage = Coverage(branches, size + len(added), len(found))
    return coverage, _take(others, np.array(added, int))


def _has_slope(loss: Partial, sample: PyTree, batch: PyTree) -> bool:
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes(loss, sample, batch)))


def _take(samples: PyTree, places: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[places], samples)


def _joined(parts: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _aimed(samples: PyTree) -> list[PyTree]:
    """Return changed samples, mild changes first: a leaf moved, or all of them scaled."""
    leaves, tree = jax.tree.flatten(_take(samples, slice(FEW)))
    sizes = [np.max(np.abs(leaf), initial=0) or 1 for leaf in leaves]
    changed = []
    for strength in STRENGTHS:
        for factor in (-strength, strength, 1 / strength):
            changed.append([factor * leaf for leaf in leaves])
            for place, leaf in enumerate(leaves):
                moved = leaf + factor * sizes[place]
                changed.append([*leaves[:place], moved, *leaves[place + 1 :]])
    return [jax.tree.unflatten(tree, each) for each in changed]


def _choices(loss: Partial, params: PyTree, batch: PyTree) -> list[Equation]:
    """Return the equations that choose by the params."""
    found = equations(trace(loss, params, batch), loss, params, slice(None))
    return [each for each in found if each.within not in SMOOTH and _is_choice(each)]


def _is_choice(equation: Equation) -> bool:
    eqn, by_first = equation.eqn, equation.depends[0]
    name = eqn.primitive.name
    if name not in WORDS or name in ("argmax", "argmin", "cond"):
        return name in WORDS and by_first
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return False
    is_bool = eqn.invars[0].aval.dtype == bool
    return by_first and is_bool if name in ("convert_element_type", "select_n") else True


def _kinds(equation: Equation) -> list[str]:
    """Return what the choices of an equation are called, one for each row of its counts."""
    name, within = equation.eqn.primitive.name, equation.within
    if name == "clamp":
        return list(CLIPS.values())
    if name in CLIPS and within == "clip":
        return [CLIPS[name]]
    word, number = WORDS[name] + f" in {within}" * bool(within), _num_places(equation.eqn)
    return [f"{word} at {place}" for place in range(number)] if number else [word]


def _num_places(eqn: Any) -> int:
    """Return among how many positions or branches an equation chooses; 0 if between two sides."""
    name, params = eqn.primitive.name, eqn.params
    if name in EXTREMES:
        return min(prod(eqn.invars[0].aval.shape[axis] for axis in params["axes"]), MAX_PLACES)
    return len(params["branches"]) * (len(params["branches"]) > 2) if name == "cond" else 0


def _count(loss: Partial, samples: PyTree, batch: PyTree, block: int) -> np.ndarray:
    """Return how often each side was taken, and how often there was none to take."""
    size = len(jax.tree.leaves(samples)[0])
    counts = [
        np.asarray(_counts(loss, _take(samples, np.arange(begin, begin + block) % size), batch))
        for begin in range(0, size, block)
    ]
    return np.concatenate(counts)[:size]


@program()
def _counts(loss: Partial, samples: PyTree, batch: PyTree) -> jax.Array:
    """Run the loss equation by equation, and count: `(samples, choices, 3)`."""

    def at(params: PyTree) -> jax.Array:
        chosen = {each.path: each for each in _choices(loss, params, batch)}

        def visit(path: Any, eqn: Any, inputs: Any, outputs: Any, counts: Any) -> Any:
            if path in chosen:
                counts = {**counts, path: counts[path] + _sides(eqn, inputs)}
            return outputs, counts

        begin = {path: jnp.zeros((len(_kinds(each)), 3), int) for path, each in chosen.items()}
        args = jax.tree.leaves((loss, params, batch))
        counts = run(trace(loss, params, batch), args, visit, begin)[1]
        return jnp.concatenate([counts[path] for path in chosen])

    return jax.lax.map(at, samples, batch_size=SAMPLES_AT_ONCE)


def _sides(eqn: Any, inputs: list[Any]) -> jax.Array:
    """Return how often an equation took its first side, its second, and none: `(choices, 3)`."""
    number = _num_places(eqn)
    if number:
        pairs = [(place, 0.5) for place in _places(eqn, inputs[0], number)]
    else:
        pairs = _compared(eqn.primitive.name, inputs)
    return jnp.stack([_larger(one, other) for one, other in pairs])


def _larger(one: jax.Array, other: jax.Array) -> jax.Array:
    none = jnp.isinf(one) | jnp.isinf(other)
    return jnp.stack(
        [jnp.sum((one > other) & ~none), jnp.sum((one < other) & ~none), jnp.sum(none)]
    )


def _compared(name: str, inputs: list[Any]) -> list[tuple[Any, Any]]:
    """Return the numbers of which the larger one decides; the first side is the first number's."""
    first, last = inputs[0], inputs[-1]
    if name in ("max", "min"):
        return [(first, last)] if name == "max" else [(last, first)]
    if name in ("abs", "sign"):
        return [(0.0, first)]
    if name == "clamp":
        return [(first, inputs[1]), (inputs[1], last)]
    return [(0.5, jnp.asarray(first).astype(float))]


def _places(eqn: Any, values: Any, number: int) -> jax.Array:
    """Return 1.0 where a position is the chosen one, else 0.0, inf for none: `(places, others)`."""
    at, is_none = jnp.atleast_1d(values), jnp.zeros(1, bool)
    if eqn.primitive.name in EXTREMES:
        axes = eqn.params["axes"]
        rows = jnp.moveaxis(EXTREMES[eqn.primitive.name] * values, axes, range(len(axes)))
        rows = rows.reshape(prod(rows.shape[: len(axes)]), -1)
        at, is_none = jnp.argmax(rows, axis=0), jnp.isinf(jnp.max(rows, axis=0))
    is_at = jnp.minimum(at, number - 1)[None, :] == jnp.arange(number)[:, None]
    return jnp.where(is_none[None, :], jnp.inf, is_at.astype(float))
