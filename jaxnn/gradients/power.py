"""Which mistakes a gradient check would have caught: faults planted into the gradient under test.

Some are planted into the arrays of the gradient: a sign, a factor, a leaf transposed. Others into
its program, where JAX can trace it: `/` for `*`, a bound moved, the first row left out, the input
of an activation for its output. All of these are compiled together, and a number says which one is
on (mutation schemata; Untch, Offutt and Harrold 1993).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.gradients.equations import Equation, Path, bind, traced
from jaxnn.gradients.functions import (
    Checked,
    at_samples,
    flat,
    is_square,
    names_of,
    resized,
    sample_count,
    take,
)
from jaxnn.typing import PyTree

if TYPE_CHECKING:
    from jaxnn.gradients.equations import Atom, JaxprEqn, Read, Value

    Maker = Callable[[Atom], Equation | None]  # What makes a variable of the same program.
    OfInput = Callable[[jax.Array, Read], Value]

BLOCK = 128  # Samples that a program takes.
MAX_FAULTS = 64  # Of a program, spread evenly over it,
MAX_SAMPLES = 1_024  # which are looked for at this many samples at most, first and last ones.
SAME = 1e-12  # What rounding may change, relative to the largest slope of the sample.
RARE = "twice as large in 1 of"

Passes = Callable[[np.ndarray, np.ndarray, np.ndarray], bool]
Results = tuple[np.ndarray, np.ndarray]  # Values and gradients.
Change = Callable[[np.ndarray], Results]  # Of rows.
OfLeaf = Callable[[np.ndarray], np.ndarray]

IN_LEAVES: dict[str, OfLeaf] = {
    "wrong sign": lambda leaf: -leaf,
    "twice as large": lambda leaf: 2 * leaf,
    "left out": lambda leaf: 0 * leaf,
    "off by 0.0001": lambda leaf: 1.0001 * leaf,
    "last coordinate off by 0.0001": lambda leaf: (
        leaf * (1 + 1e-4 * (np.arange(leaf[0].size) == leaf[0].size - 1).reshape(leaf.shape[1:]))
    ),
    "of the sample before": lambda leaf: np.roll(leaf, 1, axis=0),
}
"""Faults of a leaf `(samples, ...)` of the gradient."""

OTHERS: dict[str, dict[str, Callable[..., jax.Array]]] = {
    "mul": {"/ for *": jnp.divide},
    "div": {"* for /": jnp.multiply},
    "add": {"- for +": jnp.subtract},
    "add_any": {"a sum without its second part": lambda one, other: one},
    "sub": {"+ for -": jnp.add, "- the other way round": lambda one, other: other - one},
    "neg": {"- left out": jnp.positive},
    "abs": {"| | left out": jnp.positive},
    "square": {"^2 left out": jnp.positive},
    "exp": {"expm1 for exp": jnp.expm1},
    "log": {"log1p for log": jnp.log1p},
    "log1p": {"log for log1p": jnp.log},
    "tanh": {"sigmoid for tanh": jax.nn.sigmoid},
    "logistic": {"tanh for sigmoid": jnp.tanh},
    "sin": {"cos for sin": jnp.cos},
    "cos": {"sin for cos": jnp.sin},
    "max": {"min for max": jnp.minimum},
    "min": {"max for min": jnp.maximum},
    "gt": {"< for >": jnp.less, ">= for >": jnp.greater_equal},
    "ge": {"< for >=": jnp.less, "> for >=": jnp.greater},
    "lt": {"> for <": jnp.greater, "<= for <": jnp.less_equal},
    "le": {"> for <=": jnp.greater, "< for <=": jnp.less},
}
"""What may stand in place of an operation, by JAX's name of it."""

BOUNDED = {"clamp", "ge", "gt", "le", "lt", "max", "min"}
"""Operations of which an input that the params do not reach is a bound."""

PRODUCTS = {"div", "dot_general", "integer_pow", "mul", "square", "sub"}
MAKERS = {"cos", "erf", "exp", "expm1", "log", "log1p", "logistic", "max", "sin", "tanh"}
MAKERS |= {"custom_jvp_call", "jit", "pjit"}
"""Operations whose input may be taken for what it is made of, and those that make such inputs."""


class PlantedFault(NamedTuple):
    """A fault, and whether it is caught.

    Attributes:
        fault: in words, such as `"params[0].weights: wrong sign"`.
        is_caught: whether the check would have failed.
    """

    fault: str
    is_caught: bool


class Power(NamedTuple):
    """Which of the planted faults a check catches, with its samples and tolerances.

    Attributes:
        faults: those that change a result.
        without_effect: those that change nothing beyond rounding, at the samples.
    """

    faults: tuple[PlantedFault, ...]
    without_effect: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share of the faults that is caught; 1 if there is none."""
        caught = [each.is_caught for each in self.faults]
        return sum(caught) / len(caught) if caught else 1.0

    @property
    def missed(self) -> tuple[str, ...]:
        """The faults that are not caught."""
        return tuple(each.fault for each in self.faults if not each.is_caught)


def power(by_hand: Checked, samples: PyTree, batch: PyTree, passes: Passes) -> Power:
    """Plant faults into a gradient that a check passes, and see which of them it catches.

    `passes(rows, values, gradients)` tells whether the check passes losses `(rows,)` and gradients
    `(rows, size)` at the samples of these numbers; it is asked about those that a fault changes.
    A fault in one of 10, 100 or 1,000 params, by their hash, is missed if no sample is among them.
    A function that JAX cannot trace, or that has a `while` loop, gets no faults in its program.
    """
    values, gradients = at_samples(by_hand, samples, batch)
    results, faults, without_effect = (values, flat(gradients)), [], []
    every = np.arange(len(values))
    plants = [(every, *each) for each in _in_arrays(samples, batch, values, gradients)]
    if isinstance(by_hand, Partial):
        few = every[(every < MAX_SAMPLES // 2) | (every >= len(every) - MAX_SAMPLES // 2)]
        plants += [(few, *each) for each in _in_program(by_hand, samples, batch)]
    for rows, fault, change in plants:
        with np.errstate(over="ignore", invalid="ignore"):
            is_caught = _is_caught(change, rows, results, passes)
        if is_caught is None and not fault.startswith(RARE):
            without_effect.append(fault)
        else:
            faults.append(PlantedFault(fault, bool(is_caught)))
    return Power(tuple(faults), tuple(without_effect))


def _is_caught(change: Change, rows: np.ndarray, results: Results, passes: Passes) -> bool | None:
    """Return whether the judge objects; None if nothing differs from the results."""
    is_changed = None
    for begin in range(0, len(rows), BLOCK):
        here = rows[begin : begin + BLOCK]
        changed = change(here)
        now, before = np.column_stack(changed), np.column_stack([each[here] for each in results])
        size = SAME * np.max(np.abs(before), axis=1, keepdims=True)
        off = ~np.all(np.isclose(now, before, rtol=0, atol=size, equal_nan=True), axis=1)
        if np.any(off):
            is_changed = False
            if not passes(here[off], *(each[off] for each in changed)):
                return True
    return is_changed


def _in_arrays(
    samples: PyTree, batch: PyTree, values: np.ndarray, gradients: PyTree
) -> Iterator[tuple[str, Change]]:
    """Yield the faults of each leaf, and of all leaves at some samples."""
    leaves, every = jax.tree.leaves(gradients), flat(gradients)
    sizes = {len(leaf) for leaf in jax.tree.leaves(batch) if np.ndim(leaf)} - {0, 1}
    means = {f"1/{size} of it": lambda leaf, size=size: leaf / size for size in sizes}
    square = {"transposed": lambda leaf: np.swapaxes(leaf, 1, 2)}

    def in_leaf(rows: np.ndarray, place: int, change: OfLeaf) -> Results:
        parts = [leaf[rows] for leaf in leaves]
        parts[place] = change(parts[place])
        return values[rows], flat(parts)

    def in_some(rows: np.ndarray, odds: int) -> Results:
        return values[rows], np.where(hashes[rows] % odds == 0, 2, 1)[:, None] * every[rows]

    for place, (name, leaf) in enumerate(zip(names_of(gradients), leaves, strict=True)):
        faults = IN_LEAVES | means | (square if is_square(leaf.shape[1:]) else {})
        for fault, change in faults.items():
            yield f"{name}: {fault}", partial(in_leaf, place=place, change=change)
    hashes = np.array([zlib.crc32(row) for row in np.ascontiguousarray(flat(samples))])
    for odds in (10, 100, 1_000):
        yield f"{RARE} {odds:,} samples", partial(in_some, odds=odds)


def _in_program(by_hand: Partial, samples: PyTree, batch: PyTree) -> Iterator[tuple[str, Change]]:
    """Yield the faults of the program."""
    width = min(BLOCK, sample_count(samples))

    def at(rows: np.ndarray, number: int) -> Results:
        here, faulty = resized(take(samples, rows), width), Partial(_faulty, by_hand, number)
        values, gradients = at_samples(faulty, here, batch)
        return values[: len(rows)], flat(gradients)[: len(rows)]

    found, _ = traced(by_hand, take(samples, 0), batch, first_result=1)
    for number, (fault, *_) in enumerate(_faults(found)):
        yield fault, partial(at, number=number)


def _faulty(by_hand: Partial, number: jax.Array, params: PyTree, batch: PyTree) -> PyTree:
    """Compute loss and gradient with the fault of this number."""
    found, run = traced(by_hand, params, batch, first_result=1)
    faults = _faults(found)

    def visit(
        path: Path, eqn: JaxprEqn, read: Read, outputs: Sequence[Value], state: PyTree
    ) -> tuple[Sequence[Value], PyTree]:
        for each, (_, place, change) in enumerate(faults):
            if place == path:
                changed = jnp.asarray(change(read)).astype(outputs[0].dtype)
                outputs = [jnp.where(number == each, changed, outputs[0])]
        return outputs, state

    (value, *gradient), _ = run(visit, None)
    return value, gradient


def _faults(found: dict[Path, Equation]) -> list[tuple[str, Path, Callable[[Read], Value]]]:
    """Return what may be wrong in a program: words, the path of an equation, `change(read)`."""
    if any(each.eqn.primitive.name == "while" for each in found.values()):
        return []  # With a fault it might never end.
    makers: dict[tuple[Path, Atom], Equation] = {
        (path[:-1], each.eqn.outvars[0]): each for path, each in found.items()
    }
    faults = [
        (f"{fault} at {each.place}", path, change)
        for path, each in found.items()
        for fault, change in _faults_of(each, lambda of, path=path: makers.get((path[:-1], of)))
    ]
    chosen = np.linspace(0, len(faults) - 1, min(MAX_FAULTS, len(faults))).astype(int)
    return [faults[place] for place in chosen]


def _faults_of(equation: Equation, maker: Maker) -> Iterator[tuple[str, Callable[[Read], Value]]]:
    """Yield the faults of one equation: in its operation, or in one of its inputs."""
    eqn, inputs = equation.eqn, cast(list[Any], equation.eqn.invars)

    def with_other_input(read: Read, place: int, change: OfInput) -> Value:
        values = [jnp.asarray(read(each)) for each in inputs]
        values[place] = jnp.asarray(change(values[place], read))
        return bind(eqn, values)[0]

    if all(jnp.issubdtype(each.aval.dtype, jnp.floating) for each in inputs):
        for fault, other in OTHERS.get(eqn.primitive.name, {}).items():
            yield fault, lambda read, other=other: other(*map(read, inputs))
        for fault, place, change in _of_inputs(equation, inputs, maker):
            yield fault, partial(with_other_input, place=place, change=change)


def _of_inputs(
    equation: Equation, inputs: list[Any], maker: Maker
) -> Iterator[tuple[str, int, OfInput]]:
    """Yield what may be another input of an equation: words, its place, `change(value, read)`."""
    name, options, axes = equation.eqn.primitive.name, equation.eqn.params, ()
    if name in ("reduce_sum", "dot_general"):
        axes = options["axes"] if name == "reduce_sum" else options["dimension_numbers"][0][0]
    if axes:
        first = (*[slice(None)] * axes[0], 0)
        yield "first term of a sum left out", 0, lambda value, read: value.at[first].set(0)
    for place, (each, depends) in enumerate(zip(inputs, equation.depends, strict=True)):
        if name in ("dot_general", "transpose") and is_square(each.aval.shape):
            yield "transposed", place, lambda value, read: value.T
        if name in BOUNDED and not depends:
            yield "bound moved", place, lambda value, read: value + (1 + jnp.abs(value)) / 10
        made = maker(each) if name in PRODUCTS and depends else None
        if made is not None and made.eqn.primitive.name in MAKERS:
            word = made.eqn.params.get("name", made.eqn.primitive.name).strip("_")
            aval, pairs = each.aval, zip(made.eqn.invars, made.depends, strict=True)
            reached: list[Any] = [one for one, depends in pairs if depends]
            alike = [
                x for x in reached if x.aval.shape == aval.shape and x.aval.dtype == aval.dtype
            ]
            for source in alike[:1]:
                fault = f"input of {word} for its output"
                yield fault, place, lambda value, read, source=source: read(source)
