"""Which mistakes a gradient check would have caught: faults planted into the gradient under test.

Some are planted into the arrays of the gradient: a sign, a factor, a leaf transposed. Others into
its program, where JAX can trace it: `/` for `*`, a bound moved, the last row left out, the input of
an activation for its output. All faults of a program are compiled together: a number says which one
is on (mutation schemata; Untch, Offutt and Harrold 1993).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.gradients.equations import Equation, Path, bind, equations, run, trace
from jaxnn.gradients.functions import Checked, values_and_gradients
from jaxnn.run.programs import program
from jaxnn.typing import PyTree

BLOCK, SAMPLES_AT_ONCE = 128, 16
MAX_FAULTS = 64  # Of a program, spread evenly over it.
SMALL = 1e-4  # A fault that is hard to see, relative.
SAME = 1e-12  # What rounding may change, relative to the sample's largest slope.
RARE, RARELY = (10, 100, 1_000), "twice as large in 1 of"

Results = tuple[np.ndarray, np.ndarray]
Change = Callable[[np.ndarray], Results]
Passes = Callable[[np.ndarray, np.ndarray, np.ndarray], bool]
"""`passes(rows, values, gradients)`: whether the check passes these losses `(rows,)` and gradients
`(rows, size)` at some of the samples, whose numbers are `rows`."""

IN_LEAVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "wrong sign": lambda leaf: -leaf,
    "twice as large": lambda leaf: 2 * leaf,
    "0": lambda leaf: 0 * leaf,
    f"off by {SMALL:g}": lambda leaf: leaf * (1 + SMALL),
    f"last coordinate off by {SMALL:g}": lambda leaf: _scaled_last(leaf),
    "of the sample before": lambda leaf: np.roll(leaf, 1, axis=0),
}
"""Faults of a leaf `(samples, ...)` of the gradient."""

OTHERS: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "mul": [("/ for *", jnp.divide)],
    "div": [("* for /", jnp.multiply)],
    "add": [("- for +", jnp.subtract)],
    "add_any": [("a sum without its second part", lambda one, other: one)],
    "sub": [("+ for -", jnp.add), ("wrong sign of -", lambda one, other: other - one)],
    "neg": [("a sign left out", jnp.positive)],
    "abs": [("| | left out", jnp.positive)],
    "square": [("no square", jnp.positive)],
    "exp": [("expm1 for exp", jnp.expm1)],
    "expm1": [("exp for expm1", jnp.exp)],
    "log": [("log1p for log", jnp.log1p)],
    "log1p": [("log for log1p", jnp.log)],
    "tanh": [("sigmoid for tanh", jax.nn.sigmoid)],
    "logistic": [("tanh for sigmoid", jnp.tanh)],
    "sin": [("cos for sin", jnp.cos)],
    "cos": [("sin for cos", jnp.sin)],
    "max": [("min for max", jnp.minimum)],
    "min": [("max for min", jnp.maximum)],
    "gt": [("< for >", jnp.less), (">= for >", jnp.greater_equal)],
    "ge": [("< for >=", jnp.less), ("> for >=", jnp.greater)],
    "lt": [("> for <", jnp.greater), ("<= for <", jnp.less_equal)],
    "le": [("> for <=", jnp.greater), ("< for <=", jnp.less)],
}
"""What may stand in place of an operation, by the name of JAX's primitive."""

BOUNDED = {"clamp", "ge", "gt", "le", "lt", "max", "min"}
"""Operations of which an input that the params do not reach is a bound, which may be moved."""

ACTIVATIONS = {
    "cos",
    "erf",
    "exp",
    "expm1",
    "jit",
    "log",
    "log1p",
    "logistic",
    "max",
    "pjit",
    "sin",
}
ACTIVATIONS |= {"custom_jvp_call", "tanh"}
"""What an output is made by for which the input may be taken,"""

PRODUCTS = {"div", "dot_general", "integer_pow", "mul", "square", "sub"}
"""where that is an input of one of these."""


class PlantedFault(NamedTuple):
    """A fault, in words such as `"wrong sign: params[0].weights"`, and whether it is caught."""

    fault: str
    is_caught: bool


class Power(NamedTuple):
    """Which of the planted faults a check catches, with its samples and tolerances.

    Attributes:
        faults: those that change a result.
        without_effect: those that change nothing at any sample, beyond rounding.
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
    """Plant faults into a gradient that the check passes, and see which of them it catches.

    A fault in one of 10, 100 or 1,000 params (by their hash) is caught if a sample is among them.

    Args:
        by_hand: the gradient under test, `(params, batch)` -> loss and gradient. If JAX cannot
            trace it, faults are planted into its arrays alone.
        samples: params with a leading axis of samples, in float64.
        batch: any pytree that it takes.
        passes: the judge, `passes(rows, values, gradients)`: whether the check passes losses
            `(rows,)` and gradients `(rows, size)`, leaves one after the other, at the samples of
            these numbers.

    Returns:
        A `Power`.

    Example:
        >>> by_hand = Partial(lambda params, batch: (jnp.sum(params**2), 2 * params))
        >>> samples = np.array([[1.0, 2.0]])
        >>> def passes(rows, values, gradients):
        ...     return np.allclose(gradients, 2 * samples[rows], rtol=1e-3)
        >>> power(by_hand, samples, None, passes).missed[0]
        'params, off by 0.0001'
    """
    results = values_and_gradients(by_hand, samples, batch)
    values, right = results[0], _flat(results[1])
    plants = _in_arrays(samples, batch, results[1], values)
    if isinstance(by_hand, Partial):
        plants += _in_program(by_hand, samples, batch)
    faults, without_effect = [], []
    for fault, change in plants:
        is_caught = _is_caught(change, values, right, passes)
        if is_caught is None and not fault.startswith(RARELY):
            without_effect.append(fault)
        else:
            faults.append(PlantedFault(fault, bool(is_caught)))
    return Power(tuple(faults), tuple(without_effect))


def _flat(gradients: PyTree) -> np.ndarray:
    leaves = jax.tree.leaves(gradients)
    return np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in leaves], axis=1)


def _is_caught(
    change: Change, values: np.ndarray, right: np.ndarray, passes: Passes
) -> bool | None:
    """Return whether the judge objects; None if nothing differs from what is right."""
    is_changed = None
    for begin in range(0, len(right), BLOCK):
        rows = np.arange(begin, min(begin + BLOCK, len(right)))
        changed = change(rows)
        both = np.column_stack(changed), np.column_stack((values[rows], right[rows]))
        with np.errstate(invalid="ignore"):
            size = SAME * np.max(np.abs(both[1]), axis=1, keepdims=True)
            is_same = np.isclose(*both, rtol=0, atol=size, equal_nan=True)
        off = ~np.all(is_same, axis=1)
        is_changed = False if np.any(off) else is_changed
        if np.any(off) and not passes(rows[off], changed[0][off], changed[1][off]):
            return True
    return is_changed


def _in_arrays(
    samples: PyTree, batch: PyTree, gradients: PyTree, values: np.ndarray
) -> list[tuple[str, Change]]:
    """Return the faults of each leaf, and those of all of them in some samples."""
    right, begin, found = _flat(gradients), 0, []

    def plant(fault: str, change: Callable[..., np.ndarray], part: slice) -> None:
        def at(rows: np.ndarray) -> Results:
            changed = right[rows]
            changed[:, part] = change(changed[:, part], rows)
            return values[rows], changed

        found.append((fault, at))

    sizes = {len(leaf) for leaf in jax.tree.leaves(batch) if np.ndim(leaf)}
    means = {f"1/{size} of it": lambda leaf, size=size: leaf / size for size in sizes - {1}}
    for path, leaf in tree_leaves_with_path(gradients):
        shape, part = leaf.shape[1:], slice(begin, begin := begin + leaf[0].size)
        turned = {"transposed": lambda leaf: np.swapaxes(leaf, 1, 2)} if _is_square(shape) else {}
        for fault, change in (IN_LEAVES | means | turned).items():

            def of_leaf(flat, rows, change=change, shape=shape):
                return change(flat.reshape(-1, *shape)).reshape(flat.shape)

            plant(f"params{keystr(path)}: {fault}", of_leaf, part)
    flat = np.ascontiguousarray(_flat(samples))
    hashes = np.array([zlib.crc32(row) for row in flat])
    for odds in RARE:

        def in_some(flat, rows, odds=odds):
            return np.where(hashes[rows, None] % odds == 0, 2, 1) * flat

        plant(f"{RARELY} {odds:,} samples", in_some, slice(None))
    return found


def _scaled_last(leaf: np.ndarray) -> np.ndarray:
    changed = leaf.reshape(len(leaf), -1).copy()
    changed[:, -1:] *= 1 + SMALL
    return changed.reshape(leaf.shape)


def _is_square(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == shape[1] > 1


def _in_program(by_hand: Partial, samples: PyTree, batch: PyTree) -> list[tuple[str, Change]]:
    """Return the faults of the program, all compiled together."""
    first = jax.tree.map(lambda leaf: leaf[0], samples)
    count = len(jax.tree.leaves(samples)[0])

    def at(rows: np.ndarray, number: int) -> Results:
        padded = jax.tree.map(lambda leaf: leaf[np.resize(rows, min(BLOCK, count))], samples)
        values, gradients = jax.tree.map(np.asarray, _results(by_hand, padded, batch, number))
        return values[: len(rows)], gradients[: len(rows)]

    words = [fault for fault, *_ in _faults(trace(by_hand, first, batch), by_hand, first)]
    return [(fault, functools.partial(at, number=each)) for each, fault in enumerate(words)]


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
    makers = {(path[:-1], id(each.eqn.outvars[0])): each for path, each in found.items()}
    faults = []
    for path, each in found.items():
        made_by = [makers.get((path[:-1], id(variable))) for variable in each.eqn.invars]
        for fault, change in _faults_of(each, made_by):
            faults.append((f"{fault} at {each.place}", path, change))
    chosen = np.linspace(0, len(faults) - 1, min(MAX_FAULTS, len(faults))).astype(int)
    return [faults[place] for place in chosen]


def _faults_of(equation: Equation, makers: list[Equation | None]) -> list[tuple[str, Any]]:
    """Return the faults of one equation, which are in its operation or in one of its inputs."""
    eqn, inputs = equation.eqn, equation.eqn.invars
    name, options = eqn.primitive.name, eqn.params
    found = [
        (fault, lambda read, other=other: other(*map(read, inputs)))
        for fault, other in OTHERS.get(name, ())
    ]

    def put(fault: str, place: int, change: Callable[..., Any]) -> None:
        def changed(read: Any) -> Any:
            values = [jnp.asarray(read(each)) for each in inputs]
            values[place] = change(values[place], read)
            return bind(eqn, values)[0]

        found.append((fault, changed))

    if name in ("dot_general", "reduce_sum"):
        axis = options["axes"][0] if name == "reduce_sum" else options["dimension_numbers"][0][0][0]
        put("the first of a sum left out", 0, lambda value, read: _without_first(value, axis))
    for place, (each, maker) in enumerate(zip(inputs, makers, strict=True)):
        if name in ("dot_general", "transpose") and _is_square(each.aval.shape):
            put("transposed the other way", place, lambda value, read: value.T)
        if name in BOUNDED and not equation.depends[place]:
            put("a bound moved", place, lambda value, read: value + (1 + jnp.abs(value)) / 10)
        source = _source(maker) if maker and name in PRODUCTS else None
        if source is not None:
            word = maker.eqn.params.get("name", maker.eqn.primitive.name).strip("_")
            put(f"the input of {word} for its output", place, lambda value, read, s=source: read(s))
    return found


def _source(maker: Equation) -> Any:
    """Return the input of an activation, if the equation is one: it has the shape of the output."""
    eqn, wanted = maker.eqn, maker.eqn.outvars[0].aval
    sources = [
        each
        for each, depends in zip(eqn.invars, maker.depends, strict=True)
        if depends and (each.aval.shape, each.aval.dtype) == (wanted.shape, wanted.dtype)
    ]
    return sources[0] if sources and eqn.primitive.name in ACTIVATIONS else None


def _without_first(values: jax.Array, axis: int) -> jax.Array:
    size = values.shape[axis]
    shape = [size if each == axis else 1 for each in range(values.ndim)]
    return values * (jnp.arange(size) > 0).reshape(shape).astype(values.dtype)
