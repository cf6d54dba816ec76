"""What tells one run from another: checksums of data, names of functions, and their comparison."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
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

    Bound are the arguments of a `Partial`, functions among them, and what a closure holds.
    """
    return f"{_name(function.func)} {_bound((function.args, function.keywords))}"


def _bound(tree: Any) -> str:
    """Names of the functions bound, and a checksum of the numbers."""
    leaves = jax.tree.leaves(tree, is_leaf=callable)
    names = [identity(leaf) if isinstance(leaf, Partial) else _name(leaf)
             for leaf in leaves if callable(leaf)]  # fmt: skip
    numbers = {str(i): leaf for i, leaf in enumerate(leaves) if not callable(leaf)}
    return " ".join([fingerprint(numbers), *names])


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


def _name(function: Any) -> str:
    bare = getattr(function, "fun", function)  # JAX boxes what functools.partial made
    if isinstance(bare, partial):
        return f"{_name(bare.func)} {bare.args} {bare.keywords}"
    name = getattr(bare, "__qualname__", type(bare).__qualname__)
    held = [cell.cell_contents for cell in getattr(bare, "__closure__", None) or ()]
    return " ".join([name, *(_held(value) for value in held)])


def _held(value: Any) -> str:
    """What a closure holds, as far as it is numbers, text or functions."""
    if isinstance(value, Partial):
        return identity(value)
    if inspect.isfunction(value) or isinstance(value, partial):
        return _name(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (np.ndarray, jax.Array)):
        return fingerprint(value)
    if isinstance(value, (tuple, list)):
        return f"({' '.join(_held(each) for each in value)})"
    return type(value).__qualname__


def _named_array(path: Any, leaf: Any) -> tuple[str, np.ndarray]:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return f"{keystr(path)} {leaf.dtype}", np.asarray(jax.random.key_data(leaf))
    array = np.asarray(leaf, order="C")
    if array.dtype.hasobject:
        raise TypeError(f"tree{keystr(path)} must be an array; got a {type(leaf).__name__}")
    return keystr(path), array.astype(array.dtype.newbyteorder("="), copy=False)
