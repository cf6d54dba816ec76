"""Compiled programs that live no longer than the functions they were compiled for.

`jax.jit` keeps every program of a function for as long as that function lives. The compiled loops
of this package live for ever, and take the user's functions as arguments; under plain `jit` they
would keep a program, some 12 MiB, for every loss that anybody ever closed over a new number. So a
`Program` is `jit` once for each set of functions among its arguments, which it holds by weak
references: when one of them is gone, so is the program.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakMethod, ref

import jax
from jax.tree_util import Partial

from jaxnn.typing import Device, Function, PyTree

BOX: Any = type(Partial(functools.partial(int)).func)
"""What JAX puts around a `functools.partial`, anew for each `Partial`."""

COMPILER_OPTIONS = {"xla_cpu_prefer_vector_width": "512"}
"""XLA stops at 256 bits a vector unless it is told otherwise; a CPU with less uses what it has."""


@contextmanager
def own_settings() -> Iterator[None]:
    """Set JAX as the trainers need it: draws by index, and inf as the loss of what has none."""
    with jax.threefry_partitionable(True), jax.debug_infs(False):
        yield


class _Handle:
    """Stands for a function among a program's arguments without keeping it alive."""

    def __init__(self, function: Function, key: tuple[int, ...]) -> None:
        drop = _drop  # Names of a module are gone before the last functions are.

        def is_gone(_: object) -> None:
            drop(key, self)

        weak = WeakMethod if inspect.ismethod(function) else ref
        try:
            self.function: Callable[[], Any] = weak(function, is_gone)
        except TypeError:  # Some callables take no weak reference; they stay.
            self.function = lambda: function
        with suppress(TypeError, ValueError):  # Built-in functions may have no signature.
            self.__signature__ = inspect.signature(function)

    def __call__(self, *args: PyTree, **keywords: PyTree) -> PyTree:
        return self.function()(*args, **keywords)


_handles: dict[tuple[int, ...], _Handle] = {}
_programs: list[Program] = []


class Program:
    """A function as `jax.jit` compiles it, anew for every set of functions it is given.

    Functions are the `Partial`s among the positional arguments, at any depth; the numbers that a
    `Partial` holds are traced. Keywords have to be static.

    Example:
        >>> apply = Program(lambda function, x: function(x))
        >>> apply(Partial(lambda number, x: number * x, 2.0), 3.0)
        Array(6., dtype=float32, weak_type=True)
    """

    def __init__(self, function: Function, **options: Any) -> None:
        """Takes the function, and the options of `jax.jit`."""
        self._function, self._options = function, options
        self._compiled: dict[tuple[_Handle, ...], PyTree] = {}
        functools.update_wrapper(self, function)
        _programs.append(self)

    def __call__(self, *args: PyTree, **static: object) -> PyTree:
        """Runs the program, which is compiled first where it is a new one."""
        compiled, light = self._of(args)
        return compiled(*light, **static)

    def compile(self, *args: PyTree, **static: object) -> Function:
        """Return the program, compiled ahead: for these static and for such other arguments."""
        compiled, light = self._of(args)
        ready = compiled.lower(*light, **static).compile()
        return lambda *args: ready(*_with_handles(args, []))

    def trace(self, *args: PyTree, **static: object) -> PyTree:
        """Return what `jax.jit` returns as `trace(...)`."""
        compiled, light = self._of(args)
        return compiled.trace(*light, **static)

    def eval_shape(self, *args: PyTree, **static: object) -> PyTree:
        """Return shapes and dtypes of the results."""
        compiled, light = self._of(args)
        return compiled.eval_shape(*light, **static)

    def _of(self, args: PyTree) -> tuple[PyTree, PyTree]:
        """The program of the functions among the arguments, and the arguments with handles."""
        handles: list[_Handle] = []
        light = _with_handles(args, handles)
        key = tuple(handles)
        compiled = self._compiled.get(key)
        if compiled is None:  # Another thread may do the same, or forget the function.
            compiled = jax.jit(_copy(self._function), **self._options)
            compiled = self._compiled.setdefault(key, compiled)
        return compiled, light


def program(**options: Any) -> Callable[[Function], Program]:
    """Return a decorator that makes a `Program`; the options are those of `jax.jit`."""
    return functools.partial(Program, **options)


def run_at_once(
    function: Program,
    calls: Sequence[tuple[PyTree, ...]],
    devices: Sequence[Device],
    **static: object,
) -> list[PyTree]:
    """Return what a program makes of each call's arguments, as many at once as there are cores.

    Small work pays this way: XLA by itself keeps 1.4 of 2 cores busy on wide networks. The
    arguments of call `n` are on device `n % len(devices)`. All is compiled here, in the caller's
    settings of JAX, which the threads would not know.
    """
    if len(calls) == 1:
        return [function(*calls[0], **static)]
    programs = [function.compile(*call, **static) for call in calls[: len(devices)]]

    def run(number: int) -> PyTree:
        return jax.block_until_ready(programs[number % len(programs)](*calls[number]))

    with ThreadPoolExecutor(num_threads(devices)) as threads:
        return list(threads.map(run, range(len(calls))))


def num_threads(devices: Sequence[Device]) -> int:
    """Return how many programs are worth running at once."""
    if devices[0].platform != "cpu":
        return len(devices)
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def forget(tree: PyTree) -> None:
    """Drop all programs of the functions in a tree, which compute something else than before."""
    handles: list[_Handle] = []
    _with_handles(tree, handles)
    for handle in handles:
        for key in [key for key, each in list(_handles.items()) if each is handle]:
            _drop(key, handle)


def _with_handles(tree: PyTree, handles: list[_Handle]) -> PyTree:
    """The tree with a handle in place of each function, which is appended to the list."""

    def lighten(leaf: object) -> PyTree:
        if not isinstance(leaf, Partial):
            return leaf
        handle = _handle_of(leaf.func)
        handles.append(handle)
        args, keywords = _with_handles((leaf.args, leaf.keywords), handles)
        return Partial(handle, *args, **keywords)

    return jax.tree.map(lighten, tree, is_leaf=lambda leaf: isinstance(leaf, Partial))


def _handle_of(function: Function) -> _Handle:
    function = bare_function(function)
    key = _key(function)
    handle = _handles.get(key)
    if handle is None or handle.function() is None:
        handle = _handles[key] = _Handle(function, key)
    return handle


def bare_function(function: Any) -> PyTree:
    """Return the user's own function, where `Partial` has put a `functools.partial` in a box."""
    return function.fun if type(function) is BOX else function


def _key(function: Function) -> tuple[int, ...]:
    """What a living function is known by; a bound method is another object at every look."""
    if inspect.ismethod(function):
        return id(function.__self__), id(function.__func__)
    return (id(function),)


def _drop(
    key: tuple[int, ...],
    handle: _Handle,
    handles: dict[tuple[int, ...], _Handle] = _handles,
    programs: list[Program] = _programs,
) -> None:
    """Drops a handle, and the programs that it is an argument of."""
    if handles.get(key) is handle:
        del handles[key]
    for each in programs:
        for among in list(each._compiled):
            if handle in among:
                each._compiled.pop(among, None)


def _copy(function: Function) -> Function:
    """The same function as another object, whose programs JAX keeps apart."""

    @functools.wraps(function)
    def copy(*args: PyTree, **keywords: PyTree) -> PyTree:
        return function(*args, **keywords)

    return copy
