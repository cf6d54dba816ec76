"""The program that JAX traces of a function: its equations, and how to run them one by one.

A program may hold others: functions that it calls, the branches of a `cond`, the body of a `scan`.
An equation is known by its path: its number in its program, behind those of the equations around.
A `while` is one equation as a whole: JAX has no gradient of what is in it.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.tree_util import Partial

from jaxnn.typing import PyTree

if TYPE_CHECKING:  # The import changes what `jax.config` holds.
    from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

    Atom = Var | Literal
    Value = jax.Array | np.ndarray
    Read = Callable[[Atom], Value]
    Program = tuple[Jaxpr, Sequence[Value]]  # With the constants that it comes with.

JAX = os.path.dirname(jax.__file__) + os.sep
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call"}
CALLS |= {"custom_vjp_call", "custom_vmap_call"}

SMOOTH = {"hypot", "logaddexp", "logaddexp2", "logsumexp", "softplus"}
"""Functions of JAX that are smooth, whatever choices they are computed by."""

Path = tuple[int, ...]
Node = tuple[Path, int]  # A variable, by its identity, behind the path of its program.
Graph = dict[Node, list[Node]]


class Visit(Protocol):
    """What is called after each equation."""

    def __call__(
        self, path: Path, eqn: JaxprEqn, read: Read, outputs: Sequence[Value], state: PyTree, /
    ) -> tuple[Sequence[Value], PyTree]:
        """Return the outputs to go on with, and the state.

        `read(variable)` is the value of a variable of the same program.
        """
        ...


class Equation(NamedTuple):
    """An equation that the params reach, and that reaches the results."""

    eqn: JaxprEqn
    place: str  # The user's own line that it comes from, such as "model.py:42 (relu)".
    within: str  # The public function of JAX that it is a part of, if any.
    depends: tuple[bool, ...] = ()  # Which of its inputs the params reach.


def traced(
    function: Partial, params: PyTree, batch: PyTree, first_result: int = 0
) -> tuple[dict[Path, Equation], Callable[[Visit, PyTree], tuple[list[Value], PyTree]]]:
    """Return the equations between the params and the results, also in nested programs.

    What passes `stop_gradient` does not count as reaching the results, and params do not reach
    what only tells whether they are finite. The second one is `run(visit, state)`, which returns
    the results and the state; `visit` sees every equation on the way.
    """
    closed = jax.make_jaxpr(lambda function, *args: function(*args))(function, params, batch)
    found: dict[Path, Equation] = {}
    after: Graph = defaultdict(list)
    before: Graph = defaultdict(list)
    _walk(closed.jaxpr, (), ("", ""), found, (after, before))
    first, size = len(jax.tree.leaves(function)), len(jax.tree.leaves(params))
    reached = _reach(after, _nodes((), closed.jaxpr.invars[first : first + size]))
    needed = _reach(before, _nodes((), closed.jaxpr.outvars[first_result:]))
    between = {}
    for path, each in found.items():
        depends = tuple(node in reached for node in _nodes(path[:-1], each.eqn.invars))
        if any(depends) and not needed.isdisjoint(_nodes(path[:-1], each.eqn.outvars)):
            between[path] = each._replace(depends=depends)
    args = [*closed.consts, *jax.tree.leaves((function, params, batch))]
    return between, functools.partial(_run, (), closed.jaxpr, args)


def _nodes(path: Path, variables: Iterable[Atom]) -> list[Node]:
    """Return variables behind the path of their program; a literal is like no other."""
    return [(path, id(each)) for each in variables]


def _reach(neighbours: Graph, nodes: Iterable[Node]) -> set[Node]:
    found: set[Node] = set()
    left = list(nodes)
    while left:
        if (node := left.pop()) not in found:
            found.add(node)
            left += neighbours.get(node, ())
    return found


def _walk(
    jaxpr: Jaxpr,
    path: Path,
    around: tuple[str, str],
    found: dict[Path, Equation],
    graph: tuple[Graph, Graph],
) -> None:
    """Add the equations of a program and of those in it, and what depends on what."""

    def join(sources: Sequence[Node], targets: Sequence[Node], is_stopped: bool = False) -> None:
        for source, target in zip(sources, targets, strict=True):
            graph[0][source].append(target)
            graph[1][target] += [] if is_stopped else [source]

    for number, eqn in enumerate(jaxpr.eqns):
        name, here, own = eqn.primitive.name, (*path, number), _place(eqn)
        place, within = own if own[0] else around
        found[here], nested = Equation(eqn, place, within), _nested(eqn)
        inputs, outputs = _nodes(path, eqn.invars), _nodes(path, eqn.outvars)
        # A test for nan or infinity is not a choice by the params.
        is_guard = name == "is_finite" or (name in ("eq", "ne") and inputs[0] == inputs[1])
        for source in inputs[:1] if name == "cond" else inputs * (not nested and not is_guard):
            join([source] * len(outputs), outputs, name == "stop_gradient")
        called = eqn.params.get("name", "_")
        within = within if called.startswith("_") else called
        for tag, (inner, _) in enumerate(nested):
            below = (*here, tag)
            targets = _nodes(below, inner.invars)
            join(inputs[name == "cond" :], targets)
            _walk(inner, below, (place, within), found, graph)
            join(_nodes(below, inner.outvars), outputs)
            if name == "scan":
                consts, carry = _scan_sizes(eqn)
                join(outputs[:carry], targets[consts : consts + carry])


def _place(eqn: JaxprEqn) -> tuple[str, str]:
    """Return where outside JAX an equation comes from, and the smooth function of JAX it is in."""
    traceback, within = eqn.source_info.traceback, ""
    for frame in traceback.frames if traceback else ():
        name = frame.function_name.rpartition("<locals>.")[2]
        if not frame.file_name.startswith(JAX):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num} ({name})", within
        within = name if name in SMOOTH else within
    return "", ""  # In a compiled function of JAX, which remembers no caller.


def programs(eqn: JaxprEqn) -> list[Program]:
    """Return the programs that an equation holds, and the constants that each comes with."""
    parts = jax.tree.leaves([*eqn.params.values()], is_leaf=lambda part: hasattr(part, "eqns"))
    found = [part for part in parts if hasattr(part, "eqns")]
    return [(getattr(part, "jaxpr", part), getattr(part, "consts", ())) for part in found]


def _nested(eqn: JaxprEqn) -> list[Program]:
    return programs(eqn) if eqn.primitive.name in CALLS | {"cond", "scan"} else []


def _scan_sizes(eqn: JaxprEqn) -> tuple[int, int]:
    """Return how many constants and carried values it has: its body takes them whole."""
    ((inner, _),) = programs(eqn)

    def num_whole(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        pairs = zip(outer, inner, strict=True)
        return sum(one.aval.ndim == other.aval.ndim for one, other in pairs)

    carry = num_whole(eqn.outvars, inner.outvars)
    return num_whole(eqn.invars, inner.invars) - carry, carry


def _run(
    path: Path, jaxpr: Jaxpr, args: Sequence[Value], visit: Visit, state: PyTree
) -> tuple[list[Value], PyTree]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

    def read(variable: Any) -> Value:
        return variable.val if hasattr(variable, "val") else values[variable]

    for number, eqn in enumerate(jaxpr.eqns):
        inputs, here = [read(each) for each in eqn.invars], (*path, number)
        outputs, state = _outputs(eqn, inputs, visit, state, here)
        outputs, state = visit(here, eqn, read, outputs, state)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(each) for each in jaxpr.outvars], state


def _outputs(
    eqn: JaxprEqn, inputs: list[Value], visit: Visit, state: PyTree, path: Path
) -> tuple[Sequence[Value], PyTree]:
    """Return what an equation computes; the programs in it run one by one as well."""

    def inner(
        program: tuple[int, Program], state: PyTree, *args: Value
    ) -> tuple[list[Value], PyTree]:
        tag, (jaxpr, consts) = program
        return _run((*path, tag), jaxpr, (*consts, *args), visit, state)

    within = [functools.partial(inner, program) for program in enumerate(_nested(eqn))]
    if not within:
        return bind(eqn, inputs), state
    if eqn.primitive.name == "cond":
        return jax.lax.switch(inputs[0], within, state, *inputs[1:])
    if eqn.primitive.name != "scan":
        return within[0](state, *inputs)
    consts, carry = _scan_sizes(eqn)

    def step(carried: PyTree, rows: Sequence[Value]) -> tuple[PyTree, Sequence[Value]]:
        outputs, state = within[0](carried[1], *inputs[:consts], *carried[0], *rows)
        return (outputs[:carry], state), outputs[carry:]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    start, rows = (inputs[consts : consts + carry], state), inputs[consts + carry :]
    (values, state), stacked = jax.lax.scan(step, start, rows, **options)
    return [*values, *stacked], state


def bind(eqn: JaxprEqn, inputs: Sequence[Value]) -> Sequence[Value]:
    """Return what an equation without programs makes of these inputs."""
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if eqn.primitive.multiple_results else [outputs]
