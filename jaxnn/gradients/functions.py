"""The functions that a gradient check calls: JAX's, compiled, or NumPy's, outside JAX.

A function that JAX cannot trace, and that takes NumPy arrays, is NumPy's. It gets the same samples
and the same batch, in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.run.checks import as_partial, check_loss_and_gradients, check_scalar, shapes_of
from jaxnn.run.programs import program
from jaxnn.typing import Function, PyTree

STEP = 1e-5
"""Of the central differences, relative to the leaf's largest coordinate."""


class NumpyFunction(NamedTuple):
    """A function of params and a batch that JAX cannot trace."""

    name: str
    function: Function

    def __call__(self, params: PyTree, batch: PyTree) -> PyTree:
        """Return the results as NumPy arrays; the function cannot write to its arguments."""
        try:
            results = self.function(*jax.tree.map(_read_only, (params, batch)))
        except Exception as error:
            error.add_note(f"This came from calling {self.name} with read-only NumPy arrays.")
            raise
        return jax.tree.map(np.asarray, results)


Checked = Partial | NumpyFunction


def as_checked(
    loss_fn: Function, value_and_grad_fn: Function, params: PyTree, batch: PyTree
) -> tuple[Checked, Checked]:
    """Return both functions; refuse params without numbers, and results that none can judge."""
    if not sum(leaf.size for leaf in jax.tree.leaves(params)):
        raise ValueError("params must hold at least one number; got empty arrays")
    loss, value = traced_or_numpy("loss_fn", loss_fn, params, batch)
    check_scalar("loss_fn", value)
    if value.dtype != jnp.float64:
        raise TypeError(
            f"loss_fn must compute in the dtype of the params; got {value.dtype} for float64"
        )
    by_hand, results = traced_or_numpy("value_and_grad_fn", value_and_grad_fn, params, batch)
    check_loss_and_gradients(results, params)
    return loss, by_hand


def traced_or_numpy(
    name: str, function: Function, params: PyTree, batch: PyTree
) -> tuple[Checked, PyTree]:
    """Return the function with its results, which are shapes if JAX can trace it."""
    traced = as_partial(name, function)
    try:
        return traced, shapes_of(name, traced, params, batch)
    except Exception as error:
        tracing_error = error
    own = NumpyFunction(name, function)
    try:
        results = own(params, batch)
    except Exception as error:
        refusals = jax.errors.JAXTypeError, jax.errors.JAXIndexError
        if isinstance(tracing_error, refusals) or "immutable" in str(tracing_error):
            raise error from None
        raise tracing_error from None
    again = own(params, batch)
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(again), strict=False)
    if not all(np.array_equal(one, other, equal_nan=True) for one, other in pairs):
        raise ValueError(f"{name} must return the same when it is called again; got other numbers")
    return own, results


def _read_only(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    view = np.asarray(leaf).view()
    view.flags.writeable = False
    return view


def values_and_gradients(
    function: Checked, samples: PyTree, batch: PyTree
) -> tuple[np.ndarray, PyTree]:
    """Return the losses and the gradients of some samples, with a leading axis of samples."""
    if isinstance(function, Partial):
        return jax.tree.map(np.asarray, _results(function, samples, batch))
    results = [function(params, batch) for params in each(samples)]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *results)


def slopes(loss: Checked, samples: PyTree, batch: PyTree) -> PyTree:
    """Return the gradients of some samples by `jax.grad`, or by central differences."""
    if isinstance(loss, Partial):
        return jax.tree.map(np.asarray, _gradients(loss, samples, batch))
    found = []
    for params, step in zip(each(samples), steps(samples, STEP), strict=True):
        up, down = losses_beside(loss, params, batch, step)
        found.append(from_flat(params, (up - down) / (2 * step)))
    return jax.tree.map(lambda *arrays: np.stack(arrays), *found)


@program()
def _results(by_hand: Partial, samples: PyTree, batch: PyTree) -> PyTree:
    return jax.lax.map(lambda params: by_hand(params, batch), samples)


@program()
def _gradients(loss: Partial, samples: PyTree, batch: PyTree) -> PyTree:
    return jax.lax.map(lambda params: jax.grad(loss)(params, batch), samples)


def take(samples: PyTree, places: Any) -> PyTree:
    """Return the samples at these places, or the one at a number."""
    return jax.tree.map(lambda leaf: leaf[places], samples)


def each(samples: PyTree) -> list[PyTree]:
    """Return the samples one by one."""
    return [take(samples, place) for place in range(len(jax.tree.leaves(samples)[0]))]


def num_rows(batch: PyTree) -> int:
    """Return the length that most leaves of a batch have; 0 if they are scalars."""
    lengths = [len(leaf) for leaf in jax.tree.leaves(batch) if leaf.ndim]
    return max(lengths, key=lengths.count, default=0)


def with_rows(batch: PyTree, change: Function) -> PyTree:
    """Return a batch with its rows changed, in all leaves that have them."""
    rows = num_rows(batch)
    return jax.tree.map(lambda x: change(x) if x.ndim and len(x) == rows else x, batch)


def steps(samples: PyTree, step: float) -> np.ndarray:
    """Return steps relative to the largest coordinate of each leaf, `(samples, size)`."""
    leaves = [np.abs(leaf.reshape(len(leaf), -1)) for leaf in jax.tree.leaves(samples)]
    largest = [np.max(leaf, axis=1, keepdims=True, initial=0) for leaf in leaves]
    pairs = zip(largest, leaves, strict=True)
    return step * np.concatenate(
        [np.broadcast_to(np.where(most > 0, most, 1), leaf.shape) for most, leaf in pairs], axis=1
    )


def losses_beside(
    loss: NumpyFunction, params: PyTree, batch: PyTree, step: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses a step above and a step below each coordinate, `(size,)` each."""
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])

    def beside(sign: int) -> np.ndarray:
        losses = np.empty_like(flat)
        for coordinate in range(flat.size):
            moved = flat.copy()
            moved[coordinate] += sign * step[coordinate]
            losses[coordinate] = loss(from_flat(params, moved), batch)
        return losses

    return beside(1), beside(-1)


def from_flat(params: PyTree, flat: np.ndarray) -> PyTree:
    """Return the numbers of all coordinates as a tree like the params."""
    leaves, tree = jax.tree.flatten(params)
    parts = np.split(flat, np.cumsum([np.size(leaf) for leaf in leaves])[:-1])
    pairs = zip(parts, leaves, strict=True)
    return jax.tree.unflatten(tree, [part.reshape(np.shape(leaf)) for part, leaf in pairs])
