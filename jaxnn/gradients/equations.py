"""The program that JAX traces of a function: its equations, and how to run them one by one.

A program may hold others: functions that it calls, the branches of a `cond`, the bodies of loops.
An equation is known by its path: its number in its program, behind those of the equations around.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.typing import PyTree

if TYPE_CHECKING:  # The import changes what `jax.config` holds.
    from jax.extend.core import ClosedJaxpr, JaxprEqn

JAX = os.path.dirname(jax.__file__) + os.sep
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call"}
CALLS |= {"custom_vjp_call", "custom_vmap_call"}
MAX_TURNS = 10_000
"""Of a `while` loop; one that a fault has changed may never end by itself."""

Path = tuple[int, ...]
Visit = Callable[[Path, "JaxprEqn", list[Any], Sequence[Any], Any], tuple[Sequence[Any], Any]]
"""`visit(path, equation, inputs, outputs, state)` -> the outputs to go on with, and the state."""


class Equation(NamedTuple):
    """An equation that the params reach, and that reaches the results."""

    path: Path
    eqn: JaxprEqn
    place: str  # The user's own line that it comes from, such as "model.py:42 (relu)".
    within: str  # The public function of JAX that it is a part of, if any.
    depends: tuple[bool, ...]  # Which of its inputs the params reach.


def trace(function: Partial, params: PyTree, batch: PyTree) -> ClosedJaxpr:
    """Return the program of a function; its inputs are the function's own numbers, and both."""
    return jax.make_jaxpr(lambda function, *args: function(*args))(function, params, batch)


def equations(
    closed: ClosedJaxpr, function: Partial, params: PyTree, results: slice
) -> list[Equation]:
    """Return the equations between the params and some of the results, also in nested programs.

    What passes `stop_gradient` does not count as reaching the results. A choice made by whether a
    number is nan or infinite does not count at all.
    """
    graph = _Graph([], defaultdict(list), defaultdict(list), set())
    _connect(graph, closed.jaxpr, (), "", "")
    begin = len(jax.tree.leaves(function))
    inputs = closed.jaxpr.invars[begin : begin + len(jax.tree.leaves(params))]
    reached = _reach(graph.after, _nodes((), inputs))
    needed = _reach(graph.before, _nodes((), closed.jaxpr.outvars[results]))
    found = []
    for each in graph.equations:
        inputs, outputs = (
            _nodes(each.path[:-1], variables) for variables in (each.eqn.invars, each.eqn.outvars)
        )
        depends = tuple(node in reached for node in inputs)
        if any(depends) and not needed.isdisjoint(outputs):
            found.append(each._replace(depends=depends))
    return found


class _Graph(NamedTuple):
    """What depends on what; a node is a variable, behind the path of its program."""

    equations: list[Equation]
    after: dict[Any, list[Any]]
    before: dict[Any, list[Any]]  # Without `stop_gradient`.
    guards: set[Any]  # Whether numbers are nan or infinite.

    def add(self, sources: Iterable[Any], targets: Iterable[Any]) -> None:
        """Joins the nodes one by one."""
        for source, target in zip(sources, targets, strict=True):
            self.after[source].append(target)
            self.before[target].append(source)
            if source in self.guards:
                self.guards.add(target)


def _nodes(path: Path, variables: Iterable[Any]) -> list[Any]:
    """Return nodes; a literal is one that nothing else is joined to."""
    return [(path, id(each) if _is_literal(each) else each) for each in variables]


def _is_literal(variable: Any) -> bool:
    return hasattr(variable, "val")


def _reach(after: dict[Any, list[Any]], nodes: Iterable[Any]) -> set[Any]:
    found, left = set(), list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += after.get(node, ())
    return found


def _connect(graph: _Graph, jaxpr: Any, path: Path, place: str, within: str) -> None:
    """Adds the equations of a program and of all within it; they inherit place and function."""
    for number, eqn in enumerate(jaxpr.eqns):
        own, here, name = _place(eqn), (*path, number), eqn.primitive.name
        at, part_of = (own, "") if own else (place, within)
        inputs, outputs = _nodes(path, eqn.invars), _nodes(path, eqn.outvars)
        if not (name == "select_n" and inputs[0] in graph.guards):
            graph.equations.append(Equation(here, eqn, at, part_of, ()))
        if _is_guard(eqn, [node in graph.guards for node in inputs]):
            graph.guards.update(outputs)
        nested = _nested(eqn)
        for source in inputs[:1] if name == "cond" else () if nested else inputs:
            for target in outputs:
                graph.after[source].append(target)
                if name != "stop_gradient":
                    graph.before[target].append(source)
        called = eqn.params.get("name", "")
        part_of = called if called and not called.startswith("_") else part_of
        for tag, (program, first, carry) in enumerate(nested):
            inner, below = _opened(program)[0], (*here, tag)
            targets = _nodes(below, inner.invars)
            graph.add(inputs[first:], targets)
            _connect(graph, inner, below, at, part_of)
            graph.add(_nodes(below, inner.outvars), outputs)
            graph.add(outputs[: len(targets[carry])], targets[carry])


def _place(eqn: JaxprEqn) -> str:
    """Return where outside JAX an equation comes from; JAX's own functions remember no caller."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not frame.file_name.startswith(JAX):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num} ({frame.function_name})"
    return ""


def _is_guard(eqn: JaxprEqn, are_guards: list[bool]) -> bool:
    """Whether it says no more than that numbers are nan or infinite."""
    name, inputs = eqn.primitive.name, eqn.invars
    if name in ("eq", "ne"):
        is_infinite = any(np.all(np.isinf(each.val)) for each in inputs if _is_literal(each))
        return inputs[0] is inputs[1] or is_infinite
    is_bool = all(each.aval.dtype == bool for each in inputs)
    return name == "is_finite" or (is_bool and bool(inputs) and all(are_guards))


def _nested(eqn: JaxprEqn) -> list[tuple[Any, int, slice]]:
    """Return the programs in an equation: each with the number of the first input that it takes,
    and which of its own inputs are its outputs of the turn before.

    The condition of a `while` is none: it has no slope.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        return [(branch, 1, slice(0)) for branch in params["branches"]]
    if name == "while":
        return [(params["body_jaxpr"], params["cond_nconsts"], slice(params["body_nconsts"], None))]
    if name == "scan":
        consts, carry = _scan_sizes(eqn)
        return [(params["jaxpr"], 0, slice(consts, consts + carry))]
    if name in CALLS:
        return [(next(each for each in params.values() if hasattr(each, "eqns")), 0, slice(0))]
    return []


def _scan_sizes(eqn: JaxprEqn) -> tuple[int, int]:
    """Return how many constants and carried values it has: what its body takes one of is a row."""
    inner = _opened(eqn.params["jaxpr"])[0]

    def num_whole(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        pairs = zip(outer, inner, strict=True)
        return sum(one.aval.ndim == other.aval.ndim for one, other in pairs)

    carry = num_whole(eqn.outvars, inner.outvars)
    return num_whole(eqn.invars, inner.invars) - carry, carry


def _opened(program: Any) -> tuple[Any, Sequence[Any]]:
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def run(
    program: Any, args: Sequence[Any], visit: Visit, state: Any, path: Path = ()
) -> tuple[list[Any], Any]:
    """Return the results of a program, and the state; `visit` sees every equation on the way."""
    jaxpr, consts = _opened(program)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if _is_literal(variable) else values[variable]

    for number, eqn in enumerate(jaxpr.eqns):
        inputs, here = [read(each) for each in eqn.invars], (*path, number)
        outputs, state = _outputs(eqn, inputs, visit, state, here)
        outputs, state = visit(here, eqn, inputs, outputs, state)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(each) for each in jaxpr.outvars], state


def _outputs(
    eqn: JaxprEqn, inputs: list[Any], visit: Visit, state: Any, path: Path
) -> tuple[Sequence[Any], Any]:
    """Return what an equation computes; the programs within it run one by one as well."""
    name, params, nested = eqn.primitive.name, eqn.params, _nested(eqn)
    within = [
        lambda args, state, program=program, tag=tag: run(program, args, visit, state, (*path, tag))
        for tag, (program, _, _) in enumerate(nested)
    ]
    if name == "cond":
        return jax.lax.switch(inputs[0], within, inputs[1:], state)
    if name == "while":
        first, consts = nested[0][1], params["body_nconsts"]

        def is_on(carry: Any) -> jax.Array:
            values, _, turn = carry
            args = (*inputs[:first], *values)
            (go_on,), _ = run(params["cond_jaxpr"], args, _look_on, None)
            return go_on & (turn < MAX_TURNS)

        def turn(carry: Any) -> Any:
            values, state, turn = carry
            return *within[0]((*inputs[first : first + consts], *values), state), turn + 1

        return jax.lax.while_loop(is_on, turn, (inputs[first + consts :], state, 0))[:2]
    if name == "scan":
        consts, carry = _scan_sizes(eqn)

        def step(carried: Any, rows: Any) -> tuple[Any, Any]:
            values, state = carried
            outputs, state = within[0]((*inputs[:consts], *values, *rows), state)
            return (outputs[:carry], state), outputs[carry:]

        begin, rows = (inputs[consts : consts + carry], state), inputs[consts + carry :]
        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        (values, state), stacked = jax.lax.scan(step, begin, rows, **options)
        return [*values, *stacked], state
    if nested:
        return within[0](inputs, state)
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
    return outputs if eqn.primitive.multiple_results else [outputs], state


def _look_on(path: Path, eqn: JaxprEqn, inputs: list[Any], outputs: Any, state: Any) -> Any:
    return outputs, state
