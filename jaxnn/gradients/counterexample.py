"""A case in which a gradient is wrong, in plain numbers: shown, and as a program that runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from inspect import unwrap
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from jaxnn.gradients.functions import Checked, NumpyFunction, Problem
from jaxnn.gradients.leaves import at_worst
from jaxnn.run.programs import bare_function
from jaxnn.run.show import Table, Text, described, readable
from jaxnn.typing import PyTree

FEW = 16  # Numbers of an array that are shown themselves.
OPTIONS = "tolerance", "difference_tolerance"

FILE_IMPORTS = [f"from {name}" for name in (
    "functools import cache", "pathlib import Path", "runpy import run_path"
)]  # fmt: skip
FILE_LINES = [
    'own, *above = Path(globals().get("__file__", "program")).resolve().parents',
    "",
    "@cache",
    "def names_in(file):",
    "    names, folders = (file, Path(file).name), (own, Path.cwd(), *above)",
    "    places = [folder / name for name in names for folder in folders]",
    "    return run_path(str(next(filter(Path.is_file, places), file)))",
    "",
]
"""What a program has to find and run the files of functions and classes, each once."""


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
        script: a program of some 30 lines that prints the wrong leaf beside the right one, and
            exits with 1 while `check_gradients` finds the gradient wrong, with 0 once it is right.
            Its functions and classes are imported by name, or to be filled in where they have none.
            A file of yours is looked for beside the program, in the working directory, and in the
            folders above the program; one outside of today's working directory by its whole path.
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


def is_key(leaf: Any) -> bool:
    """Return whether a leaf is an array of random keys, which holds no numbers of its own."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _short(tree: PyTree) -> str:
    """The numbers of a tree, or what they are like where they are many."""

    def numbers(nested: Any) -> str:
        is_list = isinstance(nested, list)
        return f"[{', '.join(map(numbers, nested))}]" if is_list else f"{nested:.6g}"

    if any(is_key(leaf) or leaf.size > FEW for leaf in jax.tree.leaves(tree)):
        return described(tree)
    return repr(jax.tree.map(lambda leaf: Text(numbers(leaf.tolist())), tree))


def script_of(case: Counterexample, problem: Problem) -> str:
    """Return a program that computes what is wrong in a case, and what it should be."""
    checked = {"loss_fn": problem.loss, "value_and_grad_fn": problem.by_hand}
    functions = {name: _bare(function) for name, function in checked.items()}
    classes = {kind.__name__: kind for kind in _classes((case.params, case.batch))}
    scopes = [getattr(unwrap(function), "__globals__", {}) for function in functions.values()]
    owned = [_imported(name, own, scopes) for name, own in (classes | functions).items()]
    lines = list(dict.fromkeys(line for each in owned for line in each))
    imports = [line for line in lines if line.startswith("from ")]
    lines = [line for line in lines if line not in imports]
    if any("= names_in(" in line for line in lines):
        imports += FILE_IMPORTS
        lines = ["", *FILE_LINES, *lines]
    calls = [
        name if isinstance(function, NumpyFunction) else f"jax.jit({name})"
        for name, function in checked.items()
    ]
    script = [
        f'"""{case.where()}."""',
        "",
        "import jax",
        "import jaxnn",
        "import numpy as np",
        *sorted(imports),
        "",
        'jax.config.update("jax_enable_x64", True)',
        *lines,
        f"params = {_literal(case.params)}",
        f"batch = {_literal(case.batch)}",
        "",
        f"loss, value_and_grad = {', '.join(calls)}",
        "value, gradient = value_and_grad(params, batch)",
        'print("losses:", value, "under test,", loss(params, batch), "by the loss alone")',
        *_compared(case, isinstance(problem.loss, NumpyFunction)),
        "options = {" + ", ".join(map('"{}": {}'.format, OPTIONS, problem.tolerances)) + "}",
        "given = loss_fn, value_and_grad_fn, params, batch",
        "report = jaxnn.check_gradients(jax.random.key(0), *given, **options)",
        "raise SystemExit(not report.passed)",
        "",
    ]
    return "\n".join(script)


def _compared(case: Counterexample, by_differences: bool) -> list[str]:
    """The lines that print the wrong leaf beside the right one; of many numbers, those near."""
    leaves = {keystr(path): leaf for path, leaf in tree_leaves_with_path(case.params)}
    path = case.leaf.removeprefix("params")
    if path not in leaves:  # The losses alone differ.
        return []
    places, shape = "np.ndindex(wrong.shape)", leaves[path].shape
    if leaves[path].size > FEW:
        begin = np.ravel_multi_index(case.coordinate, shape) // FEW * FEW
        places = f"list({places})[{begin}:{begin + FEW}]"
    told = f'print({case.leaf!r}, at, wrong[at], "under test,", '
    if by_differences:
        return [
            f"wrong, leaf, step = np.asarray(gradient{path}), params{path}, 1e-5",
            f"for at in {places}:",
            "    leaf[at] += step",
            "    above = float(loss(params, batch))",
            "    leaf[at] -= 2 * step",
            "    slope = (above - float(loss(params, batch))) / (2 * step)",
            "    leaf[at] += step",
            f'    {told}slope, "by differences")',
        ]
    return [
        "expected = jax.jit(jax.grad(loss_fn))(params, batch)",
        f"wrong, right = np.asarray(gradient{path}), np.asarray(expected{path})",
        f"for at in {places}:",
        f'    {told}right[at], "by jax.grad")',
    ]


def _bare(function: Checked) -> Any:
    """The user's own function, if nothing is bound to it."""
    if isinstance(function, NumpyFunction):
        return function.function
    is_bound = function.args or function.keywords
    return function if is_bound else bare_function(function.func)


def _imported(name: str, own: Any, scopes: Sequence[dict[str, Any]]) -> list[str]:
    """The lines that import a function or a class under a name, or leave room for it."""
    path, module = getattr(own, "__qualname__", ""), getattr(own, "__module__", None) or ""

    def holds(scope: dict[str, Any]) -> bool:
        try:
            return attrgetter(path)(SimpleNamespace(**scope)) is own
        except AttributeError:
            return False

    outer, _, inner = path.partition(".")
    first = outer if inner else name
    within = [f"{name} = {path}"] * bool(inner)
    scope = getattr(sys.modules.get(module), "__dict__", {})
    if module != "__main__" and holds(scope):
        return [f"from {module} import {outer}" + f" as {first}" * (first != outer), *within]
    files = [Path(each.get("__file__") or "") for each in (scope, *scopes) if holds(each)]
    file = next(filter(Path.is_file, files), None)
    if file is not None:
        file, folder = file.resolve(), Path.cwd().resolve()
        place = file.relative_to(folder) if file.is_relative_to(folder) else file
        return [f"{first} = names_in({place.as_posix()!r})[{outer!r}]", *within]
    kind = "class" if isinstance(own, type) else "function"
    return [f"{name} = ...  # Your own {kind} goes here."]


def _classes(tree: PyTree) -> list[type]:
    """The classes of a tree's nodes, but for Python's own."""

    def of(node: Any) -> Iterator[type]:
        kind, _ = node.node_data() or (dict, None)
        if kind.__module__ != "builtins":
            yield kind
        for child in node.children():
            yield from of(child)

    return list(of(jax.tree.structure(tree)))


def _literal(tree: PyTree) -> str:
    """A tree as Python writes it, its arrays as `np.array(...)`."""

    def of(leaf: Any) -> Text:
        if is_key(leaf):
            data = np.asarray(jax.random.key_data(leaf)).tolist()
            impl = str(jax.random.key_impl(leaf))
            return Text(f"jax.random.wrap_key_data(np.array({data}, 'uint32'), impl={impl!r})")
        dtype = f", '{leaf.dtype}'" * (leaf.dtype != np.float64)
        if not leaf.size:
            return Text(f"np.zeros({leaf.shape}{dtype})")
        numbers = f"{leaf.tolist()}".replace("nan", "np.nan").replace("inf", "np.inf")
        return Text(f"np.array({numbers}{dtype})")

    return repr(jax.tree.map(of, tree))
