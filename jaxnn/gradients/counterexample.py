"""A case in which a gradient is wrong, in plain numbers: shown, and as a program that runs."""

from __future__ import annotations

import sys
from inspect import unwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.gradients.functions import Checked, NumpyFunction
from jaxnn.gradients.leaves import at_worst
from jaxnn.run.programs import bare_function
from jaxnn.run.show import Table, Text, described, readable
from jaxnn.typing import PyTree

FEW = 16  # Numbers of an array that are shown themselves.


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


def script_of(case: Counterexample, loss: Checked, by_hand: Checked) -> str:
    """Return a program that computes what is wrong in a case, and what it should be."""
    pairs = ("loss", loss), ("value_and_grad", by_hand)
    functions = [_imported(f"{name}_fn", function) for name, function in pairs]
    imports = ["import jax", "import numpy as np", *_classes((case.params, case.batch))]
    imports += ["from runpy import run_path"] * any("= run_path(" in line for line in functions)
    calls = [
        f"{name}_fn" if isinstance(function, NumpyFunction) else f"jax.jit({name}_fn)"
        for name, function in pairs
    ]
    path, at = case.leaf.removeprefix("params"), ", ".join(map(str, case.coordinate)) or "()"
    if case.leaf == "loss":
        shown = []
    elif isinstance(loss, NumpyFunction):
        shown = [
            f"leaf, step = params{path}, 1e-5",
            f"leaf[{at}] += step",
            "above = float(loss(params, batch))",
            f"leaf[{at}] -= 2 * step",
            "slope = (above - float(loss(params, batch))) / (2 * step)",
            'print("gradient:", slope, "by differences")',
        ]
    else:
        right = f"jax.jit(jax.grad(loss_fn))(params, batch){path}[{at}]"
        shown = [f'print("gradient:", {right}, "by jax.grad")']
    if shown:
        shown = [f'print("gradient:", np.asarray(gradient{path})[{at}], "under test")', *shown]
    lines = [
        f'"""{case.where()}."""',
        "",
        *imports,
        *(line for line in functions if line.startswith("from")),
        "",
        'jax.config.update("jax_enable_x64", True)',
        *(line for line in functions if not line.startswith("from")),
        f"params = {_literal(case.params)}",
        f"batch = {_literal(case.batch)}",
        "",
        f"loss, value_and_grad = {', '.join(calls)}",
        "value, gradient = value_and_grad(params, batch)",
        'print("losses:", value, "under test,", loss(params, batch), "by the loss alone")',
        *shown,
    ]
    return "\n".join([*lines, ""])


def _imported(name: str, function: Any) -> str:
    """The line that imports a function under another name, or leaves room for it."""
    function = function.function if isinstance(function, NumpyFunction) else function
    if isinstance(function, Partial) and not (function.args or function.keywords):
        function = bare_function(function.func)
    own, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "") or ""
    if own and module != "__main__" and getattr(sys.modules.get(module), own, None) is function:
        return f"from {module} import {own} as {name}"
    inner = unwrap(function)
    if own and getattr(inner, "__globals__", {}).get(own) is function:
        path = inner.__code__.co_filename
        if Path(path).is_file():
            return f"{name} = run_path({path!r})[{own!r}]"
    return f"{name} = ...  # Your own function goes here."


def _classes(tree: PyTree) -> list[str]:
    """The lines that import the classes of a tree."""

    def of(node: Any) -> set[str]:
        kind, _ = node.node_data() or (dict, None)
        own = {f"from {kind.__module__} import {kind.__qualname__}"}
        own -= {line for line in own if line.startswith("from builtins")}
        return own.union(*map(of, node.children()))

    return sorted(of(jax.tree.structure(tree)))


def _literal(tree: PyTree) -> str:
    """A tree as Python writes it, its arrays as `np.array(...)`."""

    def of(leaf: Any) -> Text:
        if is_key(leaf):
            data = np.asarray(jax.random.key_data(leaf)).tolist()
            return Text(f"jax.random.wrap_key_data(np.array({data}, 'uint32'))")
        if not leaf.size:
            return Text(f"np.zeros({leaf.shape})")
        numbers = f"{leaf.tolist()}".replace("nan", "np.nan").replace("inf", "np.inf")
        dtype = f", '{leaf.dtype}'" * (leaf.dtype != np.float64)
        return Text(f"np.array({numbers}{dtype})")

    return repr(jax.tree.map(of, tree))
