"""Which mistakes a gradient check would have caught: faults planted into the gradient under test.

Some are planted into the arrays of the gradient: a sign, a factor, a leaf transposed. Others into
its program, where JAX can trace it: `/` for `*`, a bound moved, the first row left out, the input
of an activation for its output. All of these are compiled together, and a number says which one is
on (mutation schemata; Untch, Offutt and Harrold 1993).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.gradients.equations import Equation, Path, bind, equations, run, trace
from jaxnn.gradients.functions import (
    Checked,
    at_samples,
    flat,
    names_of,
    resized,
    sample_count,
    take,
)
from jaxnn.run.programs import program
from jaxnn.typing import PyTree

BLOCK, SAMPLES_AT_ONCE = 128, 16
MAX_FAULTS = 64  # Of a program, spread evenly over it,
MAX_SAMPLES = 1_024  # which are looked for at this many samples at most, first and last ones.
SAME = 1e-12  # What rounding may change, relative to the largest slope of the sample.
RARE = "twice as large in 1 of"

Passes = Callable[[np.ndarray, np.ndarray, np.ndarray], bool]
Change = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # Of rows: values and gradients.

IN_LEAVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "wrong sign": lambda leaf: -leaf,
    "twice as large": lambda leaf: 2 * leaf,
    "left out": lambda leaf: 0 * leaf,
    "off by 0.0001": lambda leaf: 1.0001 * leaf,
    "last coordinate off by 0.0001": lambda leaf: leaf * (1 + 1e-4 * _is_last(leaf)),
    "of the sample before": lambda leaf: np.roll(leaf, 1, axis=0),
}
"""Faults of a leaf `(samples, ...)` of the gradient."""

OTHERS: dict[str, dict[str, Callable[..., Any]]] = {
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
ACTIVATIONS = {"cos", "erf", "exp", "expm1", "log", "log1p", "logistic", "max", "sin", "tanh"}
ACTIVATIONS |= {"custom_jvp_call", "jit", "pjit"}
"""Where an output may be taken for the input that it is made of, and what makes such outputs."""


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

    A fault in one of 10, 100 or 1,000 params, by their hash, is missed if no sample is among them.
    A fault of the program is looked for at 1,024 samples at most, the first and the last 512.

    Args:
        by_hand: the gradient under test, `(params, batch)` -> loss and gradient. If JAX cannot
            trace it, or if it has a `while` loop, faults are planted into its arrays alone.
        samples: params with a leading axis of samples.
        batch: any pytree that it takes.
        passes: `passes(rows, values, gradients)`: whether the check passes losses `(rows,)` and
            gradients `(rows, size)`, the leaves one after the other, at the samples of the numbers
            `rows`. It is asked about those that a fault changes.

    Returns:
        A `Power`.

    Example:
        >>> by_hand = Partial(lambda params, batch: (jnp.sum(params**2), 2 * params))
        >>> samples = np.array([[1.0, 2.0]])
        >>> def passes(rows, values, gradients):
        ...     return np.allclose(gradients, 2 * samples[rows], rtol=1e-3)
        >>> power(by_hand, samples, None, passes).missed[0]
        'params: off by 0.0001'
    """
    values, gradients = at_samples(by_hand, samples, batch)
    results, faults, without_effect = (values, flat(gradients)), [], []
    rows = np.arange(len(values))
    plants = [(rows, *each) for each in _in_arrays(samples, batch, gradients, values)]
    if isinstance(by_hand, Partial):
        few = rows[(rows < MAX_SAMPLES // 2) | (rows >= len(rows) - MAX_SAMPLES // 2)]
        plants += [(few, *each) for each in _in_program(by_hand, samples, batch)]
    for rows, fault, change in plants:
        with np.errstate(over="ignore", invalid="ignore"):
            is_caught = _is_caught(change, rows, results, passes)
        if is_caught is None and not fault.startswith(RARE):
            without_effect.append(fault)
        else:
            faults.append(PlantedFault(fault, bool(is_caught)))
    return Power(tuple(faults), tuple(without_effect))


def _is_caught(change: Change, rows: np.ndarray, results: Any, passes: Passes) -> bool | None:
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


def _is_square(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == shape[1] > 1


def _is_last(leaf: np.ndarray) -> np.ndarray:
    size = leaf[0].size
    return (np.arange(size) == size - 1).reshape(leaf.shape[1:])


def _in_arrays(
    samples: PyTree, batch: PyTree, gradients: PyTree, values: np.ndarray
) -> Iterator[tuple[str, Change]]:
    """Yield the faults of each leaf, and of all leaves at some samples."""
    leaves = jax.tree.leaves(gradients)
    sizes = {len(leaf) for leaf in jax.tree.leaves(batch) if np.ndim(leaf)} - {0, 1}
    means = {f"1/{size} of it": lambda leaf, size=size: leaf / size for size in sizes}
    square = {"transposed": lambda leaf: np.swapaxes(leaf, 1, 2)}

    def in_leaf(rows: np.ndarray, place: int, change: Any) -> Any:
        parts = [leaf[rows] for leaf in leaves]
        parts[place] = change(parts[place])
        return values[rows], flat(parts)

    for place, (name, leaf) in enumerate(zip(names_of(gradients), leaves, strict=True)):
        faults = IN_LEAVES | means | (square if _is_square(leaf.shape[1:]) else {})
        for fault, change in faults.items():
            yield f"{name}: {fault}", partial(in_leaf, place=place, change=change)
    hashes = np.array([zlib.crc32(row) for row in np.ascontiguousarray(flat(samples))])

    def in_some(rows: np.ndarray, odds: int) -> Any:
        factor = np.where(hashes[rows] % odds == 0, 2, 1)
        return values[rows], factor[:, None] * flat([leaf[rows] for leaf in leaves])

    for odds in (10, 100, 1_000):
        yield f"{RARE} {odds:,} samples", partial(in_some, odds=odds)


def _in_program(by_hand: Partial, samples: PyTree, batch: PyTree) -> Iterator[tuple[str, Change]]:
    """Yield the faults of the program."""
    width = min(BLOCK, sample_count(samples))

    def at(rows: np.ndarray, number: int) -> Any:
        here = resized(take(samples, rows), width)
        results = _results(by_hand, here, batch, number)
        return [np.asarray(each)[: len(rows)] for each in results]

    first = take(samples, 0)
    for number, (fault, *_) in enumerate(_faults(trace(by_hand, first, batch), by_hand, first)):
        yield fault, partial(at, number=number)


@program()
def _results(by_hand: Partial, samples: PyTree, batch: PyTree, number: Any) -> Any:
    """Compute losses and gradients with the fault of this number."""

    def at(params: PyTree) -> tuple[jax.Array, jax.Array]:
        closed = trace(by_hand, params, batch)
        faults = _faults(closed, by_hand, params)

        def visit(path: Any, read: Any, outputs: Any, state: Any) -> Any:
            for each, (_, place, change) in enumerate(faults):
                if place == path:
                    changed = jnp.asarray(change(read)).astype(outputs[0].dtype)
                    outputs = [jnp.where(number == each, changed, outputs[0])]
            return outputs, state

        (value, *gradient), _ = run(closed, jax.tree.leaves((by_hand, params, batch)), visit)
        return value, jnp.concatenate([leaf.ravel() for leaf in gradient])

    return jax.lax.map(at, samples, batch_size=SAMPLES_AT_ONCE)


def _faults(closed: Any, by_hand: Partial, params: PyTree) -> list[tuple[str, Path, Any]]:
    """Return what may be wrong in a program: words, the path of an equation, `change(read)`."""
    found = equations(closed, by_hand, params, first_result=1)
    if any(each.eqn.primitive.name == "while" for each in found.values()):
        return []  # With a fault it might never end.
    makers = {(path[:-1], each.eqn.outvars[0]): each for path, each in found.items()}
    faults = [
        (f"{fault} at {each.place}", path, change)
        for path, each in found.items()
        for fault, change in _faults_of(each, lambda of, path=path: makers.get((path[:-1], of)))
    ]
    chosen = np.linspace(0, len(faults) - 1, min(MAX_FAULTS, len(faults))).astype(int)
    return [faults[place] for place in chosen]


def _faults_of(equation: Equation, maker: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    """Yield the faults of one equation: in its operation, or in one of its inputs."""
    eqn, inputs = equation.eqn, cast(list[Any], equation.eqn.invars)

    def with_other_input(read: Any, place: int, change: Any) -> Any:
        values = [jnp.asarray(read(each)) for each in inputs]
        values[place] = change(values[place], read)
        return bind(eqn, values)[0]

    if all(jnp.issubdtype(each.aval.dtype, jnp.floating) for each in inputs):
        for fault, other in OTHERS.get(eqn.primitive.name, {}).items():
            yield fault, lambda read, other=other: other(*map(read, inputs))
        for fault, place, change in _of_inputs(equation, inputs, maker):
            yield fault, partial(with_other_input, place=place, change=change)


def _of_inputs(
    equation: Equation, inputs: list[Any], maker: Callable[[Any], Any]
) -> Iterator[tuple[str, int, Callable[[Any, Any], Any]]]:
    """Yield what may be another input of an equation: words, its place, `change(value, read)`."""
    name, options, axes = equation.eqn.primitive.name, equation.eqn.params, ()
    if name in ("reduce_sum", "dot_general"):
        axes = options["axes"] if name == "reduce_sum" else options["dimension_numbers"][0][0]
    for axis in axes[:1]:
        first = (*[slice(None)] * axis, 0)
        change = partial(lambda value, read, first: value.at[first].set(0), first=first)
        yield "first term of a sum left out", 0, change
    for place, (each, depends) in enumerate(zip(inputs, equation.depends, strict=True)):
        if name in ("dot_general", "transpose") and _is_square(each.aval.shape):
            yield "transposed", place, lambda value, read: value.T
        if name in BOUNDED and not depends:
            yield "bound moved", place, lambda value, read: value + (1 + jnp.abs(value)) / 10
        made = maker(each) if name in PRODUCTS and depends else None
        if made is not None and made.eqn.primitive.name in ACTIVATIONS:
            word = made.eqn.params.get("name", made.eqn.primitive.name).strip("_")
            pairs = zip(made.eqn.invars, made.depends, strict=True)
            sources = [one for one, depends in pairs if depends and _are_alike(one, each)]
            for source in sources[:1]:
                fault = f"input of {word} for its output"
                yield fault, place, lambda value, read, source=source: read(source)


def _are_alike(one: Any, other: Any) -> bool:
    return (one.aval.shape, one.aval.dtype) == (other.aval.shape, other.aval.dtype)
