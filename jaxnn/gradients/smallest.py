"""The smallest case in which a gradient is wrong: few numbers, to be followed by hand.

Params and batch shrink together while the same leaf stays wrong (delta debugging: Zeller and
Hildebrandt, IEEE Transactions on Software Engineering 28, 2002). Axes go first: rows, inputs and
units are whatever axes can change their length together, which is found by trying. Then numbers
become 0, 1, small integers, halves. What the data obey is kept: classes stay classes, rows that
sum to 1 do so again, positive numbers stay positive.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from inspect import unwrap
from itertools import combinations, count, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.gradients.diagnose import aside
from jaxnn.gradients.functions import STEP, Checked, NumpyFunction, slopes, values_and_gradients
from jaxnn.gradients.leaves import LeafReport, at_worst, leaf_reports, loss_report
from jaxnn.gradients.witnesses import KINK, ROUNDING, TINY, measure
from jaxnn.run.checks import check_loss_and_gradients, check_scalar
from jaxnn.run.programs import bare_function
from jaxnn.run.show import Table, described, readable
from jaxnn.typing import PyTree

PLAIN = 0.05
"""Relative error that is plain to see; a case keeps it, or half of the error that it began with."""

WINDOWS = 24
"""How many parts of an axis are tried at each length; they cost no compilation."""

FEW = 16  # Numbers of an array that are shown themselves.
ROUNDS = 4  # Of axes and numbers: zeros may let an axis go.
FOR_AXES = 0.7  # Share of the time, at most; simple numbers are worth the rest.
COMPANIONS, SETS = 4, 150  # Most axes of a set, and most sets, that are tried before all at once.

Leaves = tuple[Any, ...]
Axis = tuple[int, int]  # Number of the leaf, and of its axis.


@readable
class Counterexample(NamedTuple):
    """A case in which a gradient is wrong, in numbers as few and as simple as were found.

    Attributes:
        params: NumPy arrays in float64, in the tree of the params.
        batch: NumPy arrays, in the tree of the batch.
        leaf: name of the wrong leaf, such as `params['w']`; "loss" if the losses differ alone.
        coordinate: place of the wrong number in the leaf; `()` for a scalar.
        gradient: what the function under test returns there.
        expected: what it should be.
        script: a program of about 15 lines that shows it; its functions are imported by name, or
            to be filled in where they have none.
    """

    params: PyTree
    batch: PyTree
    leaf: str
    coordinate: tuple[int, ...]
    gradient: float
    expected: float
    script: str

    def where(self) -> str:
        """Return the place of the wrong number, what is there and what should be."""
        return at_worst(self.leaf, self.coordinate, self.gradient, self.expected)

    def _table(self) -> Table:
        return Table(
            f"smallest case: {self.where()}",
            [("params", _short(self.params)), ("batch", _short(self.batch))],
            ["print(report.smallest.script) is a program that shows it"],
        )


def shrink(
    loss: Checked,
    by_hand: Checked,
    samples: PyTree,
    batch: PyTree,
    worst: LeafReport,
    wrong: Collection[str],
    tolerances: tuple[float, float],
    max_seconds: float = 10.0,
) -> Counterexample:
    """Return the smallest case found in which the worst leaf, or the "loss", is wrong as well.

    What is not among the names `wrong` stays right, and what holds for the numbers of all samples
    of params holds for these as well. Works in float64, where the caller sees to that.
    """
    search = _Search(loss, by_hand, samples, batch, worst, wrong, tolerances)
    begin, first = time.monotonic(), (search.kept, search.found)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if not search.is_wrong(search.kept):
            search.judge = _wrong
        for _ in range(ROUNDS):
            before = search.kept
            search.deadline = begin + FOR_AXES * max_seconds
            _narrow(search)
            search.deadline = begin + max_seconds
            _simplify(search)
            if search.kept is before:
                break
        # The check has the last word.
        search.judge, search.deadline = _wrong, math.inf
        if not search.is_wrong(search.kept):
            search.kept, search.found = first
    params, batch = search.arguments(search.kept)
    case = Counterexample(params, batch, worst.name, *search.found[1:], script="")
    return case._replace(script=_script(case, loss, by_hand))


class _Search:
    """The smallest case so far, and whether another may take its place."""

    def __init__(
        self,
        loss: Checked,
        by_hand: Checked,
        samples: PyTree,
        batch: PyTree,
        worst: LeafReport,
        wrong: Collection[str],
        tolerances: tuple[float, float],
    ) -> None:
        params = jax.tree.map(lambda leaf: leaf[worst.sample], samples)
        start, self.tree = jax.tree.flatten((params, batch))
        self.kept = tuple(leaf if _is_opaque(leaf) else np.asarray(leaf) for leaf in start)
        self.found = _Found(error_of(worst), worst.coordinate, worst.gradient, worst.expected)
        self.habits = _habits(jax.tree.leaves((samples, batch)))
        self.functions = tuple(map(_apart, (loss, by_hand)))
        self.name, self.wrong, self.tolerances = worst.name, set(wrong), tolerances
        self.least = min(self.found.error, PLAIN) / 2
        self.judge, self.deadline = _wrong_beside, math.inf

    def arguments(self, leaves: Leaves) -> tuple[PyTree, PyTree]:
        return jax.tree.unflatten(self.tree, leaves)

    def fits(self, leaves: Leaves) -> bool:
        """Whether both functions run on arrays of these shapes."""
        in_time = time.monotonic() < self.deadline
        return in_time and _runs(*self.functions, *self.arguments(leaves))

    def is_wrong(self, leaves: Leaves) -> bool | None:
        """Whether another case is wrong in the same way; if so, it is kept.

        None if it is wrong elsewhere too: a number such as 1/rows may be written into a function.
        """
        if time.monotonic() > self.deadline or not np.all(_habits(leaves) >= self.habits):
            return False
        try:
            others = self.judge(*self.functions, *self.arguments(leaves), self.tolerances)
        except Exception:  # Other numbers than the user's may be none that the functions take.
            return False
        if not others.keys() <= self.wrong:
            return None
        other = others.get(self.name)
        if other is None or other.error < self.least:
            return False
        if np.isfinite(other.gradient) != np.isfinite(self.found.gradient):
            return False
        self.kept, self.found = leaves, other
        return True


class _Found(NamedTuple):
    error: float  # Relative.
    coordinate: tuple[int, ...]
    gradient: float
    expected: float


def _wrong(
    loss: Checked, by_hand: Checked, params: PyTree, batch: PyTree, tolerances: tuple[float, float]
) -> dict[str, _Found]:
    """Return what is wrong by the check's own judgement, and is known to be; none if all is odd."""
    samples = jax.tree.map(lambda leaf: leaf[None], params)
    values, by_hands, evidence = measure(loss, by_hand, samples, batch, tolerances)
    leaves, _ = leaf_reports(params, values, evidence, tolerances)
    found = {
        leaf.name: _Found(error_of(leaf), leaf.coordinate, leaf.gradient, leaf.expected)
        for leaf in (*leaves, loss_report(values, by_hands, tolerances))
        if not leaf.passed
    }
    is_known = np.isfinite([values[0], *(each.expected for each in found.values())])
    return found if np.all(is_known) else {}


def _wrong_beside(
    loss: Checked, by_hand: Checked, params: PyTree, batch: PyTree, tolerances: tuple[float, float]
) -> dict[str, _Found]:
    """Return what differs from `jax.grad` here and on both sides, if no kink is near.

    It is compiled sooner than the witnesses. Of a loss in NumPy there are central differences.
    """
    leaves, tree = jax.tree.flatten(params)
    moved = [aside(number, leaf) - leaf for number, leaf in enumerate(leaves)]
    pairs = zip(leaves, moved, strict=True)
    samples = tree.unflatten([np.stack([leaf, leaf + by, leaf - by]) for leaf, by in pairs])
    values, gradients = values_and_gradients(by_hand, samples, batch)
    right = list(map(np.asarray, jax.tree.leaves(slopes(loss, samples, batch))))
    least = max(TINY, *(1e-3 * np.max(np.abs(leaf), initial=0) for leaf in right))
    least = max(least, ROUNDING / STEP * np.max(np.abs(values)))

    def size(slope: np.ndarray) -> float:
        return max(least, float(np.max(np.abs(slope), initial=0)))

    found = {}
    paths = tree_leaves_with_path(gradients)
    for (path, gradient), slope in zip(paths, right, strict=True):
        off = np.abs(gradient - slope).reshape(3, -1)
        off = np.where(np.isnan(off), np.inf, off) / size(slope)
        error = float(np.min(np.max(off, axis=1, initial=0)))
        if error > tolerances[isinstance(loss, NumpyFunction)]:
            place = np.unravel_index(np.argmax(off[0]), slope.shape[1:])
            at = (0, *place)
            coordinate = tuple(map(int, place))
            found["params" + keystr(path)] = _Found(
                error, coordinate, float(gradient[at]), float(slope[at])
            )
    jumps = [np.max(np.ptp(slope, axis=0), initial=0) / size(slope) for slope in right]
    is_known = np.isfinite([values[0], *(each.expected for each in found.values())])
    return found if np.all(is_known) and max(jumps) < KINK else {}


def error_of(leaf: LeafReport) -> float:
    """Return the largest error of a leaf, relative, by whichever witness."""
    return float(np.nanmax([leaf.error, leaf.difference_error, 0]))


def _runs(loss: Checked, by_hand: Checked, params: PyTree, batch: PyTree) -> bool:
    def results(function: Checked) -> PyTree:
        call = isinstance(function, NumpyFunction)
        return function(params, batch) if call else jax.eval_shape(function, params, batch)

    try:
        check_scalar("loss_fn", results(loss))
        check_loss_and_gradients(results(by_hand), params)
    except Exception:
        return False
    return True


def _apart(function: Checked) -> Checked:
    """The same function as another object, whose many programs are gone with it."""
    if isinstance(function, NumpyFunction):
        return function
    own = function.func
    return Partial(
        lambda *args, **keywords: own(*args, **keywords), *function.args, **function.keywords
    )


def _is_opaque(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _habits(leaves: Sequence[Any]) -> np.ndarray:
    """Return what holds for the numbers of each leaf, `(leaves, habits)`."""

    def of(leaf: Any) -> list[bool]:
        if _is_opaque(leaf):
            return [True] * 5
        sums_to_1 = leaf.ndim > 1 and np.allclose(np.sum(leaf, axis=-1), 1)
        tests = leaf >= 0, leaf > 0, leaf <= 1, leaf == np.round(leaf)
        return [*(bool(np.all(test)) for test in tests), sums_to_1]

    return np.array([of(leaf) for leaf in leaves])


# --- axes


def _narrow(search: _Search) -> None:
    """Shorten the axes, the longest first, each with those that have its length for a reason."""
    tried: set[Axis] = set()
    while axes := [axis for axis in _axes(search.kept) if axis not in tried]:
        seed = max(axes, key=lambda axis: search.kept[axis[0]].shape[axis[1]])
        group = _companions(search.kept, seed, search.fits)
        tried |= group | {seed}
        is_shorter = bool(group)
        while is_shorter:
            length = search.kept[seed[0]].shape[seed[1]]
            for part in sorted({1, 2, length // 2} - {0, length}):
                is_shorter = _shorten(search, group, part)
                if is_shorter is not False:
                    break
            is_shorter = is_shorter and part > 2


def _axes(leaves: Leaves) -> list[Axis]:
    shapes = [() if _is_opaque(leaf) else leaf.shape for leaf in leaves]
    return [
        (number, axis)
        for number, shape in enumerate(shapes)
        for axis, length in enumerate(shape)
        if length > 1
    ]


def _companions(leaves: Leaves, seed: Axis, fits: Callable[[Leaves], bool]) -> set[Axis]:
    """Return the axes whose length has to change with that of one; none if it cannot change."""
    lengths = {axis: leaves[axis[0]].shape[axis[1]] for axis in _axes(leaves)}
    others = [axis for axis, n in lengths.items() if n == lengths[seed] and axis != seed]
    # Another length than any: with one that exists, or 1, arrays might fit by chance.
    fresh = next(n for n in count(2) if n not in lengths.values())
    places = np.resize(np.arange(lengths[seed]), fresh)

    def changes(group: set[Axis]) -> bool:
        return fits(_taken(leaves, group, places))

    sets = (set(extra) for n in range(COMPANIONS) for extra in combinations(others, n))
    for extra in islice(sets, SETS):
        if changes({seed} | extra):
            return {seed} | extra
    group = {seed, *others}
    if not changes(group):
        return set()
    for axis in others:
        group -= {axis} if changes(group - {axis}) else set()
    return group


def _shorten(search: _Search, group: set[Axis], part: int) -> bool | None:
    """Find a part of the axes, of this length, that is wrong as well; None if none ever will be."""
    number, axis = min(group)
    spare = search.kept[number].shape[axis] - part
    for begin in np.unique(np.linspace(0, spare, WINDOWS).astype(int)):
        shorter = _taken(search.kept, group, np.arange(begin, begin + part))
        found = search.fits(shorter) and search.is_wrong(shorter)
        if found is not False:
            return found
    return False


def _taken(leaves: Leaves, group: set[Axis], places: np.ndarray) -> Leaves:
    """Take these places along the axes; integers that may be places stay within them."""
    length = next(leaves[number].shape[axis] for number, axis in group)

    def of(number: int, leaf: Any) -> Any:
        axes = [axis for other, axis in group if other == number]
        for axis in axes:
            leaf = np.take(leaf, places, axis)
        may_index = not axes and not _is_opaque(leaf) and leaf.dtype.kind in "iu" and leaf.size
        if may_index and np.min(leaf) >= 0 and np.max(leaf) < length:
            leaf = leaf % leaf.dtype.type(len(places))
        return leaf

    return tuple(of(number, leaf) for number, leaf in enumerate(leaves))


# --- numbers


def _simplify(search: _Search) -> None:
    """Make numbers simple: all at once, leaf by leaf, half by half, one by one."""
    kinds = ["" if _is_opaque(leaf) else leaf.dtype.kind for leaf in search.kept]

    def put(number: int, place: Any, value: Any) -> bool | None:
        leaf = search.kept[number].copy()
        leaf[place] = value
        is_other = np.any(leaf != search.kept[number])
        return is_other and search.is_wrong(
            (*search.kept[:number], leaf, *search.kept[number + 1 :])
        )

    def rounded(parts: int) -> Leaves:
        pairs = zip(kinds, search.kept, strict=True)
        return tuple(
            np.asarray(np.round(parts * leaf) / parts + 0.0) if kind == "f" else leaf
            for kind, leaf in pairs
        )

    any(search.is_wrong(rounded(parts)) for parts in (1, 2, 10))
    for number, kind in enumerate(kinds):
        shape, size = np.shape(search.kept[number]), np.size(search.kept[number])
        if kind not in {*"fiu"} or not np.any(search.kept[number]):
            continue
        if put(number, ..., 0) or put(number, ..., 1):
            continue
        part = size
        while part > 1:
            part = -(-part // 2)
            for begin in range(0, size, part):
                places = np.arange(begin, min(begin + part, size))
                put(number, np.unravel_index(places, shape), 0)
        for place in np.ndindex(shape):
            value = float(search.kept[number][place])
            any(put(number, place, simpler) for simpler in _simpler(value))


def _simpler(value: float) -> Iterator[float]:
    """Yield the numbers that are simpler than one and may stand for it, the simplest first."""
    near = (np.round(parts * value) / parts for parts in (1, 2, 10, 100))
    for other in (0.0, 1.0, -1.0, 2.0, -2.0, *near):
        if other == value:
            return
        yield float(other) + 0.0


# --- what is shown


class _Text(str):
    __slots__ = ()
    __repr__ = str.__str__


def _short(tree: PyTree) -> str:
    """Return the numbers of a tree, or what they are like where they are many."""
    if any(_is_opaque(leaf) or leaf.size > FEW for leaf in jax.tree.leaves(tree)):
        return described(tree)
    return repr(jax.tree.map(lambda leaf: _Text(_numbers(leaf.tolist())), tree))


def _numbers(nested: Any) -> str:
    is_list = isinstance(nested, list)
    return f"[{', '.join(map(_numbers, nested))}]" if is_list else f"{nested:.6g}"


def _literal(tree: PyTree) -> str:
    """Return a tree as Python writes it, its arrays as `np.array(...)`."""

    def of(leaf: Any) -> _Text:
        if _is_opaque(leaf):
            data = np.asarray(jax.random.key_data(leaf)).tolist()
            return _Text(f"jax.random.wrap_key_data(np.array({data}, 'uint32'))")
        if not leaf.size:
            return _Text(f"np.zeros({leaf.shape})")
        numbers = f"{leaf.tolist()}".replace("nan", "np.nan").replace("inf", "np.inf")
        dtype = f", '{leaf.dtype}'" * (leaf.dtype != np.float64)
        return _Text(f"np.array({numbers}{dtype})")

    return repr(jax.tree.map(of, tree))


def _imported(name: str, function: Any) -> str:
    """Return the line that imports a function under another name, or leaves room for it."""
    if isinstance(function, Partial) and not (function.args or function.keywords):
        function = bare_function(function.func)
    own, module = getattr(function, "__qualname__", None), getattr(function, "__module__", None)
    if own and module != "__main__" and getattr(sys.modules.get(module), own, None) is function:
        return f"from {module} import {own} as {name}"
    inner = unwrap(function)
    if own and getattr(inner, "__globals__", {}).get(own) is function:
        return f"{name} = run_path({inner.__code__.co_filename!r})[{own!r}]"
    return f"{name} = ...  # Your own function goes here."


def _classes(tree: Any) -> set[type]:
    """The classes of a tree that the script has to import."""
    data = tree.node_data()
    own = {data[0]} if data and data[0].__module__ != "builtins" else set()
    return own.union(*(_classes(child) for child in tree.children()))


def _script(case: Counterexample, loss: Checked, by_hand: Checked) -> str:
    """Return a program that computes what is wrong in a case, and what it should be."""
    imports = ["import jax", "import numpy as np"]
    imports += [
        f"from {kind.__module__} import {kind.__qualname__}"
        for kind in sorted(_classes(jax.tree.structure((case.params, case.batch))), key=repr)
    ]
    functions = [
        _imported("loss_fn", getattr(loss, "function", loss)),
        _imported("value_and_grad_fn", getattr(by_hand, "function", by_hand)),
    ]
    imports += ["from runpy import run_path"] * any("run_path" in line for line in functions)
    imports += [line for line in functions if line.startswith("from")]
    calls = [
        f"{name}_fn" if isinstance(function, NumpyFunction) else f"jax.jit({name}_fn)"
        for name, function in (("loss", loss), ("value_and_grad", by_hand))
    ]
    path, at = case.leaf.removeprefix("params"), ", ".join(map(str, case.coordinate)) or "()"
    lines = [
        f"loss, value_and_grad = {', '.join(calls)}",
        "value, gradient = value_and_grad(params, batch)",
        'print("losses:", value, "under test,", loss(params, batch), "by the loss alone")',
    ]
    if case.leaf != "loss":
        lines.append(f'print("gradient:", np.asarray(gradient{path})[{at}], "under test")')
        if isinstance(loss, NumpyFunction):
            lines += [
                f"leaf, step = params{path}, 1e-5",
                f"leaf[{at}] += step",
                "above = float(loss(params, batch))",
                f"leaf[{at}] -= 2 * step",
                "slope = (above - float(loss(params, batch))) / (2 * step)",
                'print("gradient:", slope, "by differences")',
            ]
        else:
            right = f"jax.jit(jax.grad(loss_fn))(params, batch){path}[{at}]"
            lines.append(f'print("gradient:", {right}, "by jax.grad")')
    return "\n".join(
        [
            f'"""{case.where()}."""',
            "",
            *imports,
            "",
            'jax.config.update("jax_enable_x64", True)',
            *(line for line in functions if not line.startswith("from")),
            f"params = {_literal(case.params)}",
            f"batch = {_literal(case.batch)}",
            "",
            *lines,
            "",
        ]
    )
