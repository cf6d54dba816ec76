"""What tells one run from another: checksums of data, names of functions, and their comparison."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from types import CellType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr, tree_leaves_with_path

__all__ = ["checksum", "fingerprint", "identity", "refuse_other"]


def fingerprint(tree: Any) -> str:
    """A checksum of a pytree: of each array's place in it, shape, dtype and bytes.

    NumPy and JAX arrays of the same values count as the same, and so do containers that name
    their entries alike, such as a list and a tuple.

    Args:
        tree: any pytree of arrays; typed keys may be among them.

    Returns:
        A SHA-256, as 64 hexadecimal digits.

    Raises:
        TypeError: if a leaf is not an array.

    Example:
        >>> fingerprint({"x": np.arange(3)}) == fingerprint({"x": np.arange(4)})
        False
    """
    return checksum(_named_array(*leaf) for leaf in tree_leaves_with_path(tree)).hex()


def identity(function: Partial) -> str:
    """A function's name and all that is bound to it: as much as one can know of it later.

    Args:
        function: its arguments may hold functions too, and any of them may be a closure, of
            which numbers, text, arrays and functions count.

    Returns:
        Text; equal for functions that agree in all of that.

    Raises:
        TypeError: if an argument is neither an array nor a function.

    Example:
        >>> identity(Partial(max, 1)) == identity(Partial(max, 2))
        False
    """
    return _name(function, frozenset())


def refuse_other(
    path: str | os.PathLike[str], saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Refuses to go on with a checkpoint that another kind of run has made.

    Args:
        path: the checkpoint, for the message.
        saved: its facts; fields that `wanted` lacks are ignored, and a missing one is None.
        wanted: the facts of this run that must be the same.

    Raises:
        ValueError: naming the first field that differs, with both values.

    Example:
        >>> refuse_other("run.npz", {"num_candidates": 5}, {"num_candidates": 7})
        Traceback (most recent call last):
        ValueError: checkpoint run.npz was made with num_candidates=5; this run has 7
    """
    for field, value in wanted.items():
        if (before := saved.get(field)) != value:
            raise ValueError(
                f"checkpoint {os.fspath(path)} was made with {field}={before!r}; "
                f"this run has {value!r}"
            )


def checksum(arrays: Iterable[tuple[str, np.ndarray]]) -> bytes:
    """SHA-256 of names, dtypes, shapes and bytes."""
    checksum = hashlib.sha256()
    for name, array in arrays:
        checksum.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        checksum.update(array.reshape(-1).view(np.uint8).data)
    return checksum.digest()


def _name(function: Any, inside: frozenset[int]) -> str:
    """The name, and what is bound; `inside` are the functions whose names this one is a part of."""
    bare = getattr(function, "fun", function)  # JAX boxes what functools.partial made
    if id(bare) in inside:
        return "itself"
    inside |= {id(bare)}
    if isinstance(bare, partial):
        named = [f"{key!r}: {_bound([value], inside)}" for key, value in bare.keywords.items()]
        return " ".join([_name(bare.func, inside), _bound(bare.args, inside), *named])
    if not inspect.isfunction(bare):
        bare = getattr(bare, "__wrapped__", bare)  # what jax.jit compiles
    name = getattr(bare, "__qualname__", type(bare).__qualname__)
    return f"{name} {_bound(_held(bare), inside)}"


def _bound(values: Iterable[Any], inside: frozenset[int]) -> str:
    """Names of functions, text and numbers as they are, checksums of arrays, types of the rest."""
    words = []
    for value in values:
        if isinstance(value, (np.ndarray, np.generic, jax.Array)):
            words.append(fingerprint(value))
        elif value is None or isinstance(value, (bool, int, float, str)):
            words.append(repr(value))
        elif callable(value):
            words.append(_name(value, inside))
        else:
            parts = [f"{keystr(path)} {_bound([part], inside)}" for path, part in _parts(value)]
            words += parts or [type(value).__qualname__]
    return " ".join(words)


def _parts(tree: Any) -> list[tuple[Any, Any]]:
    """What a tree holds one level down, each with its place; nothing if it is a leaf."""
    pairs = tree_leaves_with_path(tree, is_leaf=lambda each: each is not tree)
    return [pair for pair in pairs if pair[1] is not tree]


def _held(function: Any) -> list[Any]:
    """What a closure holds; a cell may still be empty."""
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells if cell != CellType()]


def _named_array(path: Any, leaf: Any) -> tuple[str, np.ndarray]:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return f"{keystr(path)} {leaf.dtype}", np.asarray(jax.random.key_data(leaf))
    array = np.asarray(leaf, order="C")
    if array.dtype.hasobject:
        raise TypeError(f"tree{keystr(path)} must be an array; got a {type(leaf).__name__}")
    return keystr(path), array.astype(array.dtype.newbyteorder("="), copy=False)
