"""What a wrong gradient looks like: the usual faults, told from how it differs from a right one.

Some faults show in the ratio: a sign, a factor 2, a missing 1/rows. Others show in where the
wrong gradient becomes right. A weight that is transposed on the way back, or is not, does no harm
while it is symmetric. tanh' at the wrong place does none where pre-activations are near 0. A relu
that lets the gradient of an inactive unit through does none while all units are active, as they
are when params and inputs are positive. So the gradient is tried in such places. A fault is named
only if the loss contains what it is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.run.programs import program

SMALL = 1e-3
"""Factor that brings all pre-activations close to 0."""

ASIDE = 1e-4
"""How far parameter sets are moved off their kinks, relative to each leaf's largest coordinate."""

EXACT, NEAR = 1e-7, 1e-2
"""Residuals up to which a factor counts as the same everywhere: as drawn, and near 0."""

SIGMOID_AT_OUTPUT = 0.9400148
"""`s'(s(0)) / s'(0)` of the sigmoid `s`."""

ACTIVATIONS = ("atan", "cos", "erf", "erfc", "exp", "expm1", "log1p", "logistic", "sin", "tanh")
SIGMOIDS = ("exp", "logistic", "tanh")
SWITCHES = ("clamp", "ge", "gt", "le", "lt", "max", "min", "select_n")
LAYERS = ("conv_general_dilated", "dot_general")
SQUARES = ("integer_pow", "pow", "square")
MEANS = ("div", "mul")
"""JAX's names of what a loss must contain for a fault of it to be named."""

AS_JAX_GRAD = (
    "it is that of jax.grad where that is finite, and the finite differences contradict it"
)
TINY_ERROR = "off by 1e-7 of its largest coordinate at most, as where something is in float32"
AT_A_KINK = (
    "right close by: wrong at a kink alone, where it is not between the slopes on both sides"
)
NEAR_0 = "right only as the params go to 0"
AT_THE_WRONG_PLACE = (
    ": as when an activation's derivative is taken at its output instead of its input, or the "
    "other way round, or is left out"
)
OF_TANH = " (tanh' is 1 - tanh(z)^2)"
SIGMOID_FAULTS = (
    (SIGMOID_AT_OUTPUT, "the sigmoid's derivative is taken at its output instead of its input"),
    (4.0, "the sigmoid's derivative a (1 - a) is left out"),
)
VANISHES = "it vanishes where pre-activations are near 0"
SIGMOID_AT_INPUT = (
    ": the sigmoid's derivative a (1 - a) is taken with the input z in place of the output a"
)
POSITIVE = "right where params and inputs are all positive"
RELU = ": relu's derivative is not 0 for units that are off"
HEAD = "every leaf is wrong, and no usual fault fits"
OF_OUTPUTS = (
    ": look at the derivative of the loss by the outputs, and at that of the output activation"
)


class _Fit(NamedTuple):
    """How the gradient of a leaf differs from the right one; residuals relative to the largest.

    Attributes:
        ratio: the factor that fits it, in least squares.
        residual: largest error left after the factor.
        error: largest error without it.
        size: its largest coordinate.
        turned: largest error of the transpose of the right one; inf if the leaf is not square.
        penalty: factor c, if the gradient is off by c times the leaf everywhere; else nan.
        num_wrong: coordinates that are wrong in any sample.
    """

    ratio: float
    residual: float
    error: float
    size: float
    turned: float
    penalty: float
    num_wrong: int


def suggest(
    loss: Partial,
    by_hand: Partial,
    samples: Any,
    batch: Any,
    wrong: Sequence[bool],
    by_grad: Sequence[bool],
) -> tuple[str, ...]:
    """Sentences that name leaves and what their fault may be.

    Args:
        loss: the loss, which JAX differentiates.
        by_hand: the loss and the gradient under test.
        samples: parameter sets with a leading axis, NumPy float64.
        batch: the batch.
        wrong: which leaves are wrong.
        by_grad: which of them are wrong by `jax.grad`, and not by the finite differences alone.

    Returns:
        A sentence for each fault.
    """
    names = ["params" + keystr(path) for path, _ in tree_leaves_with_path(samples)]
    leaves = jax.tree.leaves(samples)
    first = jax.tree.map(lambda leaf: leaf[0], samples)
    parts = _parts(jax.make_jaxpr(loss)(first, batch).jaxpr)
    places = _places(names, leaves, jax.tree.structure(samples), batch)
    fits = {place: _fits(loss, by_hand, *where) for place, where in places.items()}
    found: dict[str, list[str]] = {}
    is_explained = False
    for number, name in enumerate(names):
        if wrong[number]:
            here = {place: leaf_fits[number] for place, leaf_fits in fits.items()}
            fault = _fault(here, batch, parts) if by_grad[number] else AS_JAX_GRAD
            is_explained = is_explained or fault is not None
            found.setdefault(fault or _share(here["as drawn"], leaves[number]), []).append(name)
    told = tuple(f"{', '.join(of)}: {fault}" for fault, of in found.items())
    is_behind_all = len(names) > 1 and all(wrong) and not is_explained
    return (*told, HEAD + OF_OUTPUTS * _has(parts, LAYERS)) if is_behind_all else told


def _parts(jaxpr: Any) -> frozenset[str]:
    """JAX's names of what a loss does to floats, also within functions that it calls.

    The exp of a softmax is no activation's, and the -inf that a maximum begins with is no relu's.
    """
    found = set()
    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, equation.invars
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            found |= _parts(getattr(part, "jaxpr", part)) if _is_program(part) else set()
        if not (inputs and jnp.issubdtype(getattr(inputs[-1].aval, "dtype", int), jnp.floating)):
            continue
        is_softmax = name == "exp" and any(
            other.primitive.name == "reduce_sum" and other.invars[0] is equation.outvars[0]
            for other in jaxpr.eqns
        )
        is_bound = name == "max" and any(
            np.all(np.isneginf(getattr(value, "val", 0.0))) for value in inputs
        )
        if not (is_softmax or is_bound):
            found.add(name)
        if name in ("mul", "dot_general") and inputs[0] is inputs[1]:
            found.add("square")
    return frozenset(found)


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns")


def _has(parts: frozenset[str], names: Sequence[str]) -> bool:
    return not parts.isdisjoint(names)


def _places(
    names: Sequence[str], leaves: Sequence[np.ndarray], tree: Any, batch: Any
) -> dict[str, tuple[Any, Any]]:
    """Samples and batches at which a fault may show or vanish, by name."""
    drawn, leaves = leaves, [_aside(number, leaf) for number, leaf in enumerate(leaves)]
    places = {
        "as drawn": (drawn, batch),
        "aside": (leaves, batch),
        "near 0": ([SMALL * leaf for leaf in leaves], batch),
        "all positive": ([np.abs(leaf) for leaf in leaves], jax.tree.map(_positive, batch)),
    }
    for number, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if _is_square(leaf):
            symmetric = (leaf + np.swapaxes(leaf, 1, 2)) / 2
            places[name] = ([*leaves[:number], symmetric, *leaves[number + 1 :]], batch)
    return {name: (jax.tree.unflatten(tree, where), rows) for name, (where, rows) in places.items()}


def _aside(number: int, leaf: np.ndarray) -> np.ndarray:
    """A leaf off the kinks that parameters of 0, or equal ones, may lie at."""
    largest = float(np.max(np.abs(leaf), initial=0)) or 1
    steps = np.sin(1 + number + np.arange(leaf.size, dtype=np.float64)).reshape(leaf.shape)
    return leaf + ASIDE * largest * steps


def _positive(leaf: Any) -> Any:
    return np.abs(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _is_square(leaf: Any) -> bool:
    return leaf.ndim == 3 and leaf.shape[1] == leaf.shape[2] > 1


def _fits(loss: Partial, by_hand: Partial, samples: Any, batch: Any) -> list[_Fit]:
    """A fit for each leaf."""
    trees = (*_gradients(loss, by_hand, samples, batch), samples)
    pairs = zip(*map(jax.tree.leaves, trees), strict=True)
    with np.errstate(invalid="ignore", over="ignore"):
        return [_fit(*map(np.asarray, both)) for both in pairs]


@program()
def _gradients(loss: Partial, by_hand: Partial, samples: Any, batch: Any) -> tuple[Any, Any]:
    return jax.lax.map(
        lambda params: (by_hand(params, batch)[1], jax.grad(loss)(params, batch)), samples
    )


def _fit(gradient: np.ndarray, right: np.ndarray, leaf: np.ndarray) -> _Fit:
    """Where the right one is finite, if it is so anywhere."""
    if np.any(is_known := np.isfinite(right)):
        gradient, right = np.where(is_known, gradient, 0), np.where(is_known, right, 0)
    largest, square = np.max(np.abs(right), initial=0), np.vdot(right, right)
    if not (0 < largest < np.inf and square > 0):
        num_wrong = int(np.sum(np.any(gradient != right, axis=0)))
        ratio = 0.0 if largest == 0 else np.nan
        return _Fit(ratio, np.inf, np.inf, np.inf, np.inf, np.nan, num_wrong)
    ratio = float(np.vdot(gradient, right) / square)
    off = np.abs(gradient - right) / largest
    scaled = np.max(np.abs(gradient - ratio * right)) / (abs(ratio) * largest or 1)
    turned = np.inf
    if _is_square(right):
        turned = float(np.max(np.abs(gradient - np.swapaxes(right, 1, 2)))) / largest
    num_wrong = int(np.sum(np.any(~(off <= EXACT), axis=0)))
    size = float(np.max(np.abs(gradient)) / largest)
    penalty = float(np.vdot(gradient - right, leaf) / (np.vdot(leaf, leaf) or 1))
    left = np.max(np.abs(gradient - right - penalty * leaf)) / (np.max(off) * largest or 1)
    penalty = penalty if left <= EXACT else np.nan
    return _Fit(ratio, float(scaled), float(np.max(off)), size, turned, penalty, num_wrong)


def _fault(fits: Mapping[str, _Fit], batch: Any, parts: frozenset[str]) -> str | None:
    """A usual fault, if one fits."""
    if fits["as drawn"].error <= EXACT:
        return TINY_ERROR
    if fits["aside"].error <= EXACT:
        return AT_A_KINK
    return _factor(fits["aside"], batch, parts) or _where_right(fits, parts)


def _factor(fit: _Fit, batch: Any, parts: frozenset[str]) -> str | None:
    """A fault that is a factor, the same for all samples and coordinates."""
    if fit.turned <= EXACT:
        return "transposed"
    if fit.residual == np.inf:
        if fit.ratio == 0:
            return "should be 0 everywhere: the loss does not depend on it"
        return "the gradient of jax.grad is not finite"
    if not fit.residual <= EXACT or np.isclose(fit.ratio, 1, rtol=EXACT):
        if np.isnan(fit.penalty):
            return None
        return f"off by {fit.penalty:.6g} times the params: a penalty, left out or wrong"
    if fit.ratio == 0:
        return "left out: it is 0 everywhere"
    sign, size = ("of the wrong sign", abs(fit.ratio)) if fit.ratio < 0 else ("", fit.ratio)
    if np.isclose(size, 1):
        return sign
    factor = f"off by the factor {size:.6g}{_meaning(size, batch, parts)}"
    return f"{sign} and {factor}" if sign else factor


def _meaning(factor: float, batch: Any, parts: frozenset[str]) -> str:
    """What a factor may come from: the lengths of the batch's axes, and squares."""
    lengths = {}
    for leaf in jax.tree.leaves(batch):
        rows, columns = (*leaf.shape, 1, 1)[:2]
        lengths[f"the {rows} rows"] = rows
        lengths[f"{columns} columns"] = columns
        lengths[f"{rows} rows x {columns} columns"] = rows * columns
    causes: dict[float, list[str]] = {}
    if _has(parts, SQUARES):
        causes[1 / 2] = ["the 2 of 2x, the derivative of x^2, is missing"]
    for name, length in lengths.items():
        if _has(parts, MEANS):
            missing = f"{name}: 1/{length} is missing, a sum in place of the mean"
            causes.setdefault(length, []).append(missing)
            causes.setdefault(1 / length, []).append(f"{name}: 1/{length} is there twice")
        else:
            added = f"{name}: 1/{length} is there, a mean in place of the sum"
            causes.setdefault(1 / length, []).append(added)
    if _has(parts, SQUARES):
        causes.setdefault(2, []).append("the 2 of 2x, the derivative of x^2, is there twice")
    for number, said in causes.items():
        if number != 1 and np.isclose(factor, number):
            shown = f"{number}" if number > 1 else f"1/{1 / number:g}"
            return f" = {shown}; {' or '.join(said)}"
    return ""


def _where_right(fits: Mapping[str, _Fit], parts: frozenset[str]) -> str | None:
    """A fault that vanishes, or becomes a known factor, at one of the other places."""
    special = ("as drawn", "aside", "near 0", "all positive")
    for place, fit in fits.items():
        if place not in special and fit.error <= EXACT:
            return f"right where {place} is symmetric: that is transposed, or not, on the way back"
    if fits["all positive"].error <= EXACT:
        return POSITIVE + RELU * _has(parts, SWITCHES)
    near = fits["near 0"]
    if near.error <= NEAR * min(fits["aside"].error, 1):
        cause = AT_THE_WRONG_PLACE + OF_TANH * ("tanh" in parts)
        return NEAR_0 + cause * _has(parts, ACTIVATIONS)
    if near.size <= 2 * NEAR:
        return VANISHES + SIGMOID_AT_INPUT * _has(parts, SIGMOIDS)
    for layers in range(1, 5):
        for factor, fault in SIGMOID_FAULTS * _has(parts, SIGMOIDS):
            if near.residual <= NEAR and np.isclose(near.ratio, factor**layers, rtol=NEAR / 2):
                return f"near 0 it is off by {factor**layers:.3g}: {fault}"
    return None


def _share(fit: _Fit, leaf: Any) -> str:
    size = int(np.prod(leaf.shape[1:]))
    return f"wrong in {fit.num_wrong} of {size} coordinates, and no usual fault fits"
