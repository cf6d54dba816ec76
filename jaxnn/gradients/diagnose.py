"""What a wrong gradient looks like: the usual faults, told from how it differs from a right one.

Some faults show in the ratio: a sign, a factor 2, a missing 1/rows. Others show in where the
wrong gradient becomes right. A weight that is transposed on the way back, or is not, does no harm
while it is symmetric. tanh' at the wrong place does none where pre-activations are near 0. A relu
that lets the gradient of an inactive unit through does none while all units are active, as they
are when params and inputs are positive. A branch that is wrong does none where it is not taken. A
row that is left out is known by its own gradient, that of a batch in which all rows are alike. So
the gradient is tried in such places. A fault is named only if the loss contains what it is about;
nobody knows what a loss in NumPy contains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.gradients.equations import programs
from jaxnn.gradients.functions import (
    NumpyFunction,
    Problem,
    at_samples,
    is_square,
    names_of,
    num_rows,
    slopes,
    take,
    with_rows,
)
from jaxnn.gradients.leaves import LeafReport
from jaxnn.typing import PyTree

if TYPE_CHECKING:  # The import changes what `jax.config` holds.
    from jax.extend.core import Jaxpr

SMALL, SMALL_BY_DIFFERENCES = 1e-3, 1e-2  # Bring all pre-activations close to 0.
ASIDE = 1e-4  # Moves params off their kinks, relative to each leaf's largest coordinate.
EXACT, NEAR = 1e-7, 1e-2  # Errors up to which something holds: everywhere, and near 0.
BY_FORM = 1e-13  # Errors up to which a gradient is right by its form, not by an approximation.
EXACT_BY_DIFFERENCES = 1e-5  # The same everywhere, where the right gradient is of differences.

# JAX's names of what a loss must contain for a fault of it to be named.
ACTIVATIONS = {"atan", "cos", "erf", "erfc", "exp", "expm1", "log1p", "logistic", "sin", "tanh"}
SIGMOIDS = {"exp", "logistic", "tanh"}
ODD = {"atan", "erf", "sin", "tanh"}  # Near 0 their derivatives change with the square of z alone.
SWITCHES = {"clamp", "ge", "gt", "le", "lt", "max", "min", "select_n"}
LAYERS = {"conv_general_dilated", "dot_general"}
SQUARES = {"integer_pow", "pow", "square"}
MEANS = {"div", "mul"}
ANYTHING = ACTIVATIONS | SWITCHES | LAYERS | SQUARES | MEANS

# By the factor that a layer adds near 0: s'(s(0)) / s'(0) and 1 / s'(0).
SIGMOID_FAULTS = {
    0.9400148: "the sigmoid's derivative is taken at its output instead of its input",
    4.0: "the sigmoid's derivative a (1 - a) is left out",
}
OF_INPUT = ": the sigmoid's derivative a (1 - a) is taken with the input z in place of the output a"
OF_WAY_BACK = ": as when a way back through a weight is left out, or tanh' is 1 - tanh(z)"
OF_BRANCH = ": elsewhere a branch, a bound or a rare case is wrong"
OF_PLACE = ": as when an activation's derivative is left out, or taken at its output, not its input"
UNUSUAL = "no usual fault fits"
OF_OUTPUTS = ": look at the derivative of the loss by the outputs, and of the output activation"


class _Pair(NamedTuple):
    """The gradient of a leaf and the right one at some samples, and the leaf itself."""

    gradient: np.ndarray
    right: np.ndarray
    leaf: np.ndarray
    exact: float  # Up to which error it counts as right.

    def relative(self, numbers: np.ndarray) -> float:
        """Largest magnitude, relative to that of the right gradient if it has one, else inf."""
        largest = np.max(np.abs(self.right), initial=0)
        return float(np.max(np.abs(numbers)) / largest) if 0 < largest < np.inf else np.inf

    def error(self) -> float:
        return self.relative(self.gradient - self.right)

    def is_right(self) -> bool:
        return self.error() <= self.exact

    def are_wrong(self) -> np.ndarray:
        """Which coordinates are ever wrong."""
        off, largest = np.abs(self.gradient - self.right), np.max(np.abs(self.right), initial=0)
        return np.any(~(off <= self.exact * largest), axis=0)

    def samples(self) -> tuple[int, int]:
        """In how many samples the gradient is right and not 0, and in how many it is wrong."""
        axes = tuple(range(1, self.right.ndim))
        off = np.max(np.abs(self.gradient - self.right), axis=axes, initial=0)
        largest = np.max(np.abs(self.right), axis=axes, initial=0)
        is_right = off <= self.exact * largest
        return int(np.sum(is_right & (largest > 0))), int(np.sum(~is_right))


def _fit(numbers: np.ndarray, *parts: np.ndarray) -> tuple[list[float], float]:
    """Return the factors with which the parts add up to the numbers, and the error they leave."""
    columns = np.stack([part.ravel() for part in parts], axis=1)
    lengths = np.linalg.norm(columns, axis=0)
    if not (np.all(np.isfinite(numbers)) and np.all((lengths > 0) & (lengths < np.inf))):
        return [np.nan] * len(parts), np.inf
    fitted, _, rank, _ = np.linalg.lstsq(columns / lengths, numbers.ravel(), rcond=1e-4)
    left = np.abs(numbers.ravel() - columns / lengths @ fitted)
    error = np.max(left) / (np.max(np.abs(numbers)) or 1) if rank == len(parts) else np.inf
    return list(map(float, fitted / lengths)), float(error)


def suggest(problem: Problem, samples: PyTree, leaves: Sequence[LeafReport]) -> tuple[str, ...]:
    """Return sentences that name wrong leaves and what their fault may be."""
    loss, _, batch, tolerances = problem
    parts = ANYTHING
    if isinstance(loss, Partial):
        parts = _parts(jax.make_jaxpr(loss)(take(samples, 0), batch).jaxpr)
    found: dict[str, list[str]] = {}
    wrong = [leaf for leaf in leaves if not leaf.passed]
    with np.errstate(all="ignore"):
        pairs = _pairs(problem, samples)
        for leaf in wrong:
            drawn = pairs[leaf.name]["as drawn"]
            if leaf.error <= tolerances[0] or drawn.error() <= BY_FORM:
                fault = "it is that of jax.grad, and the finite differences contradict it"
            else:
                unusual = f"wrong in {_share(drawn.are_wrong())}, and {UNUSUAL}"
                fault = next(_faults(pairs[leaf.name], batch, parts), unusual)
            found.setdefault(fault, []).append(leaf.name)
    is_everywhere = 1 < len(pairs) == len(wrong) and bool(parts & LAYERS)
    if is_everywhere and all(fault.endswith(UNUSUAL) for fault in found):
        return (f"every leaf is wrong, and {UNUSUAL}{OF_OUTPUTS}",)
    usual_first = sorted(found.items(), key=lambda item: item[0].endswith(UNUSUAL))
    return tuple(f"{', '.join(names)}: {fault}" for fault, names in usual_first)


def _share(are_wrong: np.ndarray) -> str:
    return f"{np.sum(are_wrong)} of {are_wrong.size} coordinates"


def _parts(jaxpr: Jaxpr) -> set[str]:
    """Return JAX's names of what a loss does to floats, also within functions that it calls."""
    found = set()
    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, equation.invars
        found = found.union(*(_parts(inner) for inner, _ in programs(equation)))
        if not (inputs and jnp.issubdtype(getattr(inputs[-1].aval, "dtype", int), jnp.floating)):
            continue
        # The exp of a softmax is no activation's; the -inf that a maximum begins with, no relu's.
        is_softmax = name == "exp" and any(
            other.primitive.name == "reduce_sum" and other.invars[0] is equation.outvars[0]
            for other in jaxpr.eqns
        )
        bounds = [getattr(value, "val", 0.0) for value in inputs if name == "max"]
        if not (is_softmax or any(np.all(np.isneginf(bound)) for bound in bounds)):
            found.add(name)
        if name in ("mul", "dot_general") and inputs[0] is inputs[1]:
            found.add("square")
    return found


def _pairs(problem: Problem, samples: PyTree) -> dict[str, dict[str, _Pair]]:
    """Return the pair of every leaf, by name, at each place where a fault may show or vanish."""
    loss, by_hand, batch, _ = problem
    drawn, tree = jax.tree.flatten(samples)
    leaves = [aside(number, leaf) for number, leaf in enumerate(drawn)]
    positive = jax.tree.map(
        lambda x: np.abs(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, batch
    )
    exact, small = EXACT, SMALL
    if isinstance(loss, NumpyFunction):  # Differences of smaller params are all rounding.
        exact, small = EXACT_BY_DIFFERENCES, SMALL_BY_DIFFERENCES
    places = {
        "as drawn": (drawn, batch),
        "aside": (leaves, batch),
        "near 0": ([small * leaf for leaf in leaves], batch),
        "all positive": ([np.abs(leaf) for leaf in leaves], positive),
    }
    if isinstance(loss, Partial):
        places["wider"] = [10 * small * leaf for leaf in leaves], batch
    if num_rows(batch) > 1:  # All rows are alike.
        for row, place in (("first row", 0), ("last row", -1)):
            alike = with_rows(batch, lambda x, place=place: x[np.full(len(x), place)])
            places[row] = leaves, alike
    names = names_of(samples)
    for number, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if is_square(leaf.shape[1:]):
            symmetric = (leaf + np.swapaxes(leaf, 1, 2)) / 2
            places[name] = [*leaves[:number], symmetric, *leaves[number + 1 :]], batch
    found: dict[str, dict[str, _Pair]] = {name: {} for name in names}
    for place, (numbers, data) in places.items():
        here = tree.unflatten(numbers)
        gradients = at_samples(by_hand, here, data)[1], slopes(loss, here, data)
        arrays = zip(names, *map(jax.tree.leaves, gradients), numbers, strict=True)
        for name, gradient, right, leaf in arrays:
            known = np.isfinite(right) | ~np.any(np.isfinite(right))
            pair = _Pair(np.where(known, gradient, 0), np.where(known, right, 0), leaf, exact)
            found[name][place] = pair
    return found


def aside(number: int, leaf: np.ndarray) -> np.ndarray:
    """Move a leaf off the kinks that params of 0, or equal ones, may lie at."""
    largest = float(np.max(np.abs(leaf), initial=0)) or 1
    steps = np.sin(1 + number + np.arange(leaf.size, dtype=np.float64)).reshape(leaf.shape)
    return leaf + ASIDE * largest * steps


def _faults(pairs: Mapping[str, _Pair], batch: PyTree, parts: set[str]) -> Iterator[str]:
    """Yield the usual faults that fit, the likeliest first; those behind it may be nonsense."""
    gradient, right, _, exact = pairs["aside"]
    if pairs["as drawn"].is_right():
        yield "off by 1e-7 of its largest coordinate at most, as where something is in float32"
    if pairs["aside"].is_right():
        yield "right close by: wrong at a kink alone, outside of the slopes on both sides"
    yield from _everywhere(pairs["aside"], batch, parts)
    # The first row or the last: it alone counts, or too little, or too much.
    for row in [row for row in ("first row", "last row") if row in pairs and gradient.size > 3]:
        if _fit(gradient, pairs[row].right)[1] <= exact:
            yield f"it is that of the {row} alone"
        (ratio,), left = _fit(gradient - right, pairs[row].right)
        if left <= exact:
            yield f"the {row} {'counts too much' if ratio > 0 else 'is left out'}"
    are_wrong = pairs["aside"].are_wrong()
    if 2 * np.sum(are_wrong) < np.sum(are_wrong | np.any(right != 0, axis=0)):
        yield f"wrong in {_share(are_wrong)}, and right in the others"
    yield from _where_right(pairs, parts)


def _everywhere(pair: _Pair, batch: PyTree, parts: set[str]) -> Iterator[str]:
    """Yield a fault that is the same for all samples and coordinates, such as a factor."""
    gradient, right, _, exact = pair
    if not np.any(right):
        yield "should be 0 everywhere: the loss does not depend on it"
    if not np.all(np.isfinite(right)):
        yield "the right gradient is not finite"
    if pair.relative(gradient) <= BY_FORM:
        yield "it is 0: left out, or summed over the wrong axis"
    if is_square(right.shape[1:]) and pair.relative(gradient - np.swapaxes(right, 1, 2)) <= exact:
        yield "transposed"
    in_order = [np.sort(each.reshape(len(each), -1), axis=1) for each in (gradient, right)]
    if pair.relative(in_order[0] - in_order[1]) <= exact:
        yield "the right numbers in another order, as reversed ones"
    (ratio,), left = _fit(gradient, right)
    if left <= exact and not np.isclose(ratio, 1, rtol=exact):
        yield _factor(ratio, batch, parts)
    yield from _of_penalty(pair, batch, parts)


def _of_penalty(pair: _Pair, batch: PyTree, parts: set[str]) -> Iterator[str]:
    """Yield a fault that is a multiple of the params, with a factor or without."""
    gradient, right, leaf, exact = pair
    (penalty,), left = _fit(gradient - right, leaf)
    is_exact, ratio = left <= exact, 1.0
    if not is_exact and gradient.size > 3:
        (ratio, penalty), left = _fit(gradient, right, leaf)
    if is_exact or (left <= exact and np.isclose(ratio, 1, rtol=exact)):
        off, cause = "lacks", "left out, or its factor 2 forgotten"
        if penalty > 0:
            off, cause = "exceeds the right one by", "wrong, or there twice"
        yield f"{off} {abs(penalty):.6g} times the params: a penalty, {cause}"
    if left <= exact and abs(ratio) <= exact:
        yield f"it is {penalty:.6g} times the params, as of a penalty alone"
    if left <= exact:
        rest = f"whose gradient is {penalty / (1 - ratio):.6g} times the params"
        yield f"apart from a penalty, {rest}: {_factor(ratio, batch, parts)}"


def _factor(ratio: float, batch: PyTree, parts: set[str]) -> str:
    """Return what a factor on the right gradient is called."""
    said, size = ["of the wrong sign"] * (ratio < 0), abs(ratio)
    if not said or not np.isclose(size, 1):
        text = f"off by the factor {size:.8g}"
        for number, word in ((size, "large"), (1 / size, "small")):
            if number > 1 and np.isclose(number, round(number), rtol=EXACT):
                text = f"{number:.6g} times too {word}"
        said.append(text + _meaning(size, batch, parts))
    return " and ".join(said)


def _meaning(factor: float, batch: PyTree, parts: set[str]) -> str:
    """Return what a factor may come from: the lengths of the batch's axes, and squares."""
    axes: dict[int, dict[str, None]] = {}  # By their length.
    for leaf in jax.tree.leaves(batch):
        rows, columns = (*leaf.shape, 1, 1)[:2]
        axes.setdefault(rows, {})[f"{rows} rows"] = None
        axes.setdefault(columns, {})[f"{columns} columns"] = None
        if min(rows, columns) > 1:
            axes.setdefault(rows * columns, {})[f"{rows} rows x {columns} columns"] = None
    causes: list[tuple[float, str]] = []
    if parts & SQUARES:
        causes.append((1 / 2, "the 2 of 2x, the derivative of x^2, is missing"))
    for length, names in axes.items():
        if not length:
            continue
        share, of = f"1/{length} is", f"({' or '.join(names)})"
        if parts & MEANS:
            causes.append((length, f"{share} missing {of}: a sum in place of the mean"))
            causes.append((1 / length, f"{share} there twice {of}"))
        else:
            causes.append((1 / length, f"{share} there {of}: a mean in place of the sum"))
    if parts & SQUARES:
        causes.append((2, "the 2 of 2x, the derivative of x^2, is there twice"))
    said = [cause for number, cause in causes if number != 1 and np.isclose(factor, number)]
    return f": {', or '.join(said)}" if said else ""


def _where_right(pairs: Mapping[str, _Pair], parts: set[str]) -> Iterator[str]:
    """Yield a fault that vanishes at one of the other places."""
    if "wider" in pairs and pairs["wider"].error() <= BY_FORM:
        yield "right where the params are small" + OF_BRANCH
    for place, pair in pairs.items():
        if place.startswith("params") and pair.is_right():
            yield f"right where {place} is symmetric: that is transposed, or not, on the way back"
    if pairs["all positive"].is_right():
        causes = ["relu's derivative is not 0 for units that are off"] * bool(parts & SWITCHES)
        causes += ["a negative number loses its sign"] * ("abs" in parts)
        cause = ": " * bool(causes) + ", or ".join(causes)
        yield "right where params and inputs are all positive" + cause
    yield from _near_0(pairs, parts)


def _near_0(pairs: Mapping[str, _Pair], parts: set[str]) -> Iterator[str]:
    """Yield a fault that vanishes with the params, or in some samples, or is a factor near 0."""
    near = pairs["near 0"]
    if near.error() <= NEAR * min(pairs["aside"].error(), 1):
        cause = OF_PLACE + " (tanh' is 1 - tanh(z)^2)" * ("tanh" in parts)
        # A derivative at the wrong place is off by z^2, a way back that is left out by z.
        is_odd = "wider" in pairs and parts & ACTIVATIONS <= ODD
        if is_odd and 3 < pairs["wider"].error() / near.error() < 30:
            cause = OF_WAY_BACK
        yield "right only as the params go to 0" + cause * bool(parts & ACTIVATIONS)
    for place in [place for place in ("as drawn", "first row", "last row") if place in pairs]:
        num_right, num_wrong = pairs[place].samples()
        if num_right >= num_wrong > 0:
            alike = f" with the {place} alone" * (place != "as drawn")
            yield f"right in {num_right} of {num_right + num_wrong} samples{alike}{OF_BRANCH}"
    if near.relative(near.gradient) <= 2 * NEAR:
        yield "it vanishes where pre-activations are near 0" + OF_INPUT * bool(parts & SIGMOIDS)
    (ratio,), left = _fit(near.gradient, near.right)
    for layers in range(1, 5) if parts & SIGMOIDS and left <= NEAR else ():
        for factor, fault in SIGMOID_FAULTS.items():
            if np.isclose(ratio, factor**layers, rtol=NEAR / 2):
                yield f"near 0 it is off by {factor**layers:.3g}: {fault}"
