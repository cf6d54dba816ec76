"""What makes two runs the same run: their data, and what their functions compute.

A function is known by its program: the StableHLO text that JAX lowers it to on the shapes at hand,
with all constants, for one fixed platform, so that parts of a search from a CPU and a GPU still
merge. Another name, or another process, changes nothing; anything that changes a number does. The
values that a function holds under a name are kept beside it for one purpose only: to say in the
user's words what differs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import CellType

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Traced
from jax.tree_util import KeyPath, Partial, keystr, tree_leaves_with_path
from jax.typing import ArrayLike

from jaxnn.run.checks import call
from jaxnn.run.programs import bare_function, forget
from jaxnn.typing import PyTree

LANES = 16
"""Arguments side by side in the program that shows what `vmap` makes of a function."""
MOST_SETTINGS, LONGEST = 40, 160
CHECKSUM = re.compile(r"[0-9a-f]{64}")
SYMBOL = re.compile(r'(?<!custom_call )@(?:"[^"]*"|[\w.$-]+)')
CALLBACK = re.compile(r"custom_call @\w*callback\w*\(.*-> (?!\(\)$|!stablehlo\.token$)")
"""A call of Python from compiled code that returns numbers; prints return none."""


def fingerprint(tree: PyTree) -> str:
    """Return a checksum of a pytree: of each array's place in it, shape, dtype and bytes.

    NumPy and JAX arrays of the same values count as the same, and so do containers that name
    their entries alike, such as a list and a tuple.

    Example:
        >>> fingerprint({"x": np.arange(3)}) == fingerprint({"x": np.arange(4)})
        False
    """
    return checksum(_named_array(*leaf) for leaf in tree_leaves_with_path(tree)).hex()


def function_metadata(
    name: str, function: Partial, *arguments: PyTree, axes: tuple[int | None, ...] | None = None
) -> dict[str, object]:
    """Return what a function computes, and the values that it holds, as JSON keeps them.

    `computes` is a checksum of its program on these arguments (shapes will do), and with `axes`,
    as of `jax.vmap`, of its program for many arguments at once: some functions have one of their
    own for that. `settings` are the values by name. A function that asks Python for numbers is
    refused.

    Example:
        >>> first, second = (
        ...     function_metadata("loss_fn", Partial(lambda x, c=c: c * x), 1.0) for c in (2, 3)
        ... )
        >>> first["computes"] == second["computes"], first["settings"], second["settings"]
        (False, {'c': '2'}, {'c': '3'})
    """
    texts = [_text(function, arguments)]
    # Python code may compute something else than when JAX traced it, by a global that has changed.
    if texts[0] != _lowered(call.trace(function, *arguments)):
        forget((function, arguments))
    if axes is not None:
        texts.append(_text(function, arguments, axes))
    if any(CALLBACK.search(line) for line in texts[0].splitlines()):
        raise TypeError(
            f"{name} must not call back into Python, as jax.pure_callback does, with a checkpoint: "
            "what it computes there cannot be known again"
        )
    if "jax.const = true" in texts[0]:
        raise ValueError(
            "jax_use_simplified_jaxpr_constants must be False with a checkpoint; got True: "
            'jax.config.update("jax_use_simplified_jaxpr_constants", False) turns it off'
        )
    computes = hashlib.sha256("\0".join([*texts, fingerprint(jax.tree.leaves(function))]).encode())
    return {"computes": computes.hexdigest(), "settings": settings_of(function)}


def run_metadata(
    trainer: str,
    key: jax.Array,
    data: Mapping[str, PyTree],
    functions: Mapping[
        str, tuple[Partial | None, tuple[PyTree, ...], tuple[int | None, ...] | None]
    ],
) -> dict[str, object]:
    """Return what two runs of a trainer have to share, as JSON keeps it.

    Data and functions stand under the names of the arguments; a function comes with what it is
    called with, and with its axes under `vmap`, or None.
    """
    return {
        "trainer": trainer,
        "jax": jax.__version__,  # The draws of a key hang on it.
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "key_implementation": str(jax.random.key_impl(key)),
        **{name: fingerprint(tree) for name, tree in data.items()},
        **{
            name: None if function is None else function_metadata(name, function, *args, axes=axes)
            for name, (function, args, axes) in functions.items()
        },
    }


def check_same_run(
    path: str | os.PathLike[str], saved: Mapping[str, object], wanted: Mapping[str, object]
) -> None:
    """Refuse a checkpoint whose metadata are not those wanted; name the first difference.

    Fields that `wanted` lacks are ignored, and one that `saved` lacks counts as None.

    Example:
        >>> check_same_run("a.npz", {"rows": 5}, {"rows": 7})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: checkpoint a.npz is of another run: rows was 5, is 7; ...
    """
    for field, value in wanted.items():
        if (difference := _difference(field, saved.get(field), value)) is not None:
            raise ValueError(
                f"checkpoint {os.fspath(path)} is of another run: {difference}; "
                "give the same again, or another file"
            )


def as_metadata(number: ArrayLike | None) -> float | int | None:
    """Return a NumPy number as JSON keeps it, with no more digits than it has."""
    if number is None:
        return None
    scalar = np.asarray(number)[()]
    return float(str(scalar)) if scalar.dtype.kind == "f" else int(scalar)


def checksum(arrays: Iterable[tuple[str, np.ndarray]]) -> bytes:
    """SHA-256 of names, dtypes, shapes and bytes."""
    checksum = hashlib.sha256()
    for name, array in arrays:
        checksum.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        checksum.update(array.reshape(-1).view(np.uint8).data)
    return checksum.digest()


def _text(function: Partial, arguments: PyTree, axes: tuple[int | None, ...] | None = None) -> str:
    """The program of a function, traced anew; of many calls side by side where there are axes."""
    leaves, tree = jax.tree.flatten(function)

    def call(leaves: list[PyTree], *arguments: PyTree) -> PyTree:
        bound = jax.tree.unflatten(tree, leaves)
        return (bound if axes is None else jax.vmap(bound, axes))(*arguments)

    if axes is not None:
        arguments = [
            argument if axis is None else jax.tree.map(_side_by_side, argument)
            for argument, axis in zip(arguments, axes, strict=True)
        ]
    return _lowered(jax.jit(call, keep_unused=True).trace(leaves, *arguments))


def _side_by_side(leaf: PyTree) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((LANES, *np.shape(leaf)), jnp.result_type(leaf))


def _lowered(traced: Traced) -> str:
    """The program as text, with numbers in place of the names of functions."""
    text, names = traced.lower(lowering_platforms=("cpu",)).as_text(), {}

    def numbered(match: re.Match[str]) -> str:
        return f"@{names.setdefault(match[0], len(names))}"

    return SYMBOL.sub(numbered, text)


def _difference(field: str, before: object, after: object) -> str | None:
    """What differs, in the user's words; None if nothing does."""
    if before == after:
        return None
    if field == "jax":
        return f"it was saved under jax {before}, this is {after}, which may round otherwise"
    if isinstance(after, dict) and isinstance(before, dict):
        if before["computes"] == after["computes"]:
            return None
        was, now = before["settings"], after["settings"]
        for name in [name for name in now if name in was and was[name] != now[name]]:
            return _words(_setting_name(field, name), was[name], now[name])
        return f"{field} computes something else than when it was saved"
    return _words(field, before, after)


def _setting_name(field: str, name: str) -> str:
    """A setting of a function's by its own name; `value` is what the field itself says."""
    own = [part for part in name.split(".") if part != "value"]
    return f"{own[-1]} of {field}" if own else field


def _words(name: str, was: object, now: object) -> str:
    is_long = any(len(str(value)) > LONGEST or CHECKSUM.search(str(value)) for value in (was, now))
    if name == "key" or is_long:
        return f"{name} is another than when it was saved"
    return f"{name} was {was}, is {now}"


def settings_of(function: object) -> dict[str, str]:
    """Values that a function holds under a name: bound, closed over, by default, or global."""
    found: dict[str, str] = {}
    for name, value in _walk(function, frozenset()):
        if len(found) < MOST_SETTINGS:
            found.setdefault(name, value)
    return found


def _walk(function: object, inside: frozenset[int]) -> Iterator[tuple[str, str]]:
    """Names and values of a function and of those within it; `inside` are those around it."""
    function = bare_function(function)
    if id(function) in inside:
        return
    inside |= {id(function)}
    for name, value in _held(function):
        if callable(value):
            yield from ((f"{name}.{inner}", each) for inner, each in _walk(value, inside))
        else:
            with suppress(Exception):  # What serves a message alone must not end a run.
                if (setting := _setting(value)) is not None:
                    yield name, setting
    inner = getattr(function, "func", getattr(function, "__wrapped__", None))
    if callable(inner):
        yield from _walk(inner, inside)


def _held(function: object) -> Iterator[tuple[str, object]]:
    if isinstance(function, partial):
        try:
            names = [*inspect.signature(bare_function(function.func)).parameters]
        except (TypeError, ValueError):
            names = []
        names += [f"argument {number}" for number in range(len(names), len(function.args))]
        yield from zip(names, function.args, strict=False)
        yield from function.keywords.items()
    elif inspect.ismethod(function):
        yield from _attributes(function.__self__)
        yield from _held(function.__func__)
    elif inspect.isfunction(function):
        code, cells = function.__code__, function.__closure__ or ()
        closed = zip(code.co_freevars, cells, strict=True)
        yield from ((name, cell.cell_contents) for name, cell in closed if cell != CellType())
        named = inspect.signature(function, follow_wrapped=False).parameters.values()
        yield from ((each.name, each.default) for each in named if each.default is not each.empty)
        values = function.__globals__
        used = (name for name in code.co_names if name in values and not callable(values[name]))
        yield from ((name, values[name]) for name in used)
    elif not inspect.isbuiltin(function):
        yield from _attributes(function)


def _attributes(thing: object) -> Iterator[tuple[str, object]]:
    for name in (*getattr(type(thing), "__slots__", ()), *getattr(thing, "__dict__", ())):
        if hasattr(thing, name):
            yield name, getattr(thing, name)


def _setting(value: PyTree) -> str | None:
    """A value as short text, an array or what is long by its checksum; None for other things."""
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        is_number = np.ndim(value) == 0 and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        return str(np.asarray(value)[()]) if is_number else fingerprint(value)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        if len(value) > MOST_SETTINGS:
            return None
        return "(" + ", ".join(str(_setting(each)) for each in value) + ")"
    text = repr(value)
    if " at 0x" in text:
        return None
    return text if len(text) <= LONGEST else hashlib.sha256(text.encode()).hexdigest()


def _named_array(path: KeyPath, leaf: PyTree) -> tuple[str, np.ndarray]:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return f"{keystr(path)} {leaf.dtype}", np.asarray(jax.random.key_data(leaf))
    array = np.asarray(leaf, order="C")
    if array.dtype.hasobject:
        raise TypeError(f"tree{keystr(path)} must be an array; got a {type(leaf).__name__}")
    return keystr(path), array.astype(array.dtype.newbyteorder("="), copy=False)
