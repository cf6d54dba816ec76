"""The functions that a gradient check calls: JAX's, compiled, or NumPy's, outside JAX.

A function that JAX cannot trace, and that takes NumPy arrays, is NumPy's. It gets the same samples
and the same batch, in float64. Samples are a tree like the params, with an axis of samples before
theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.run.checks import as_partial, check_loss_and_gradients, check_scalar, shapes_of
from jaxnn.run.programs import program
from jaxnn.typing import Function, PyTree

STEP_OF_DIFFERENCES = 1e-5
"""The step of central differences, relative to the leaf's largest coordinate."""

SAMPLES_AT_ONCE, COORDINATES_AT_ONCE = 16, 64


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


class Problem(NamedTuple):
    """What is checked: a loss and the function under test, on a batch, to tolerances."""

    loss: Checked
    by_hand: Checked
    batch: PyTree
    tolerances: tuple[float, float]  # Against jax.grad, and against the differences.


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


def at_samples(function: Checked, samples: PyTree, batch: PyTree) -> PyTree:
    """Return what a function makes of each sample, as NumPy arrays with an axis of samples."""
    if isinstance(function, NumpyFunction):
        places = range(sample_count(samples))
        results = [function(take(samples, place), batch) for place in places]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *results)
    # Numbers of samples share a program; some samples are taken twice.
    count = sample_count(samples)
    padded = resized(samples, 1 if count == 1 else count + -count % SAMPLES_AT_ONCE)
    return take(jax.tree.map(np.asarray, _at_samples(function, padded, batch)), slice(count))


def values_and_slopes(loss: Partial, samples: PyTree, batch: PyTree) -> tuple[np.ndarray, PyTree]:
    """Return the losses and what `jax.grad` says of their gradients."""
    return at_samples(Partial(_value_and_grad, loss), samples, batch)


def slopes(loss: Checked, samples: PyTree, batch: PyTree) -> PyTree:
    """Return the gradients of some samples by `jax.grad`, or by central differences."""
    if isinstance(loss, Partial):
        return values_and_slopes(loss, samples, batch)[1]
    step = steps(samples, STEP_OF_DIFFERENCES)
    up, down = losses_beside(loss, samples, batch, step)
    return from_flat(take(samples, 0), (up - down) / (2 * step))


def losses_beside(
    loss: Checked, samples: PyTree, batch: PyTree, step: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses a step above and a step below each coordinate, `(samples, size)` each."""
    if isinstance(loss, Partial):
        return at_samples(Partial(_losses_beside, loss), (samples, step), batch)
    first, points = take(samples, 0), flat(samples)

    def beside(sign: int) -> np.ndarray:
        losses = np.empty_like(points)
        for row, coordinate in np.ndindex(points.shape):
            moved = points[row].copy()
            moved[coordinate] += sign * step[row, coordinate]
            losses[row, coordinate] = loss(from_flat(first, moved), batch)
        return losses

    return beside(1), beside(-1)


@program()
def _at_samples(function: Partial, samples: PyTree, batch: PyTree) -> PyTree:
    return jax.lax.map(lambda params: function(params, batch), samples)


def _value_and_grad(loss: Function, params: PyTree, batch: PyTree) -> PyTree:
    return jax.value_and_grad(loss)(params, batch)


def _losses_beside(loss: Partial, sample: tuple[PyTree, jax.Array], batch: PyTree) -> PyTree:
    step, (point, unravel) = sample[1], ravel_pytree(sample[0])

    def beside(coordinate: jax.Array) -> list[jax.Array]:
        moves = step[coordinate], -step[coordinate]
        return [loss(unravel(point.at[coordinate].add(move)), batch) for move in moves]

    return jax.lax.map(beside, jnp.arange(point.size), batch_size=COORDINATES_AT_ONCE)


def take(samples: PyTree, places: Any) -> PyTree:
    """Return the samples at these places, or the one at a number."""
    return jax.tree.map(lambda leaf: leaf[places], samples)


def resized(samples: PyTree, size: int) -> PyTree:
    """Return `size` samples; if there are fewer, they repeat from the first one on."""
    return take(samples, np.resize(np.arange(sample_count(samples)), size))


def sample_count(samples: PyTree) -> int:
    """Return how many samples a tree holds."""
    return len(jax.tree.leaves(samples)[0])


def joined(trees: Sequence[PyTree]) -> PyTree:
    """Return the samples of several trees in one."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *trees)


def names_of(params: PyTree) -> list[str]:
    """Return what each leaf is called, such as `params[0].weights`."""
    return ["params" + keystr(path) for path, _ in tree_leaves_with_path(params)]


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

    def largest(leaf: np.ndarray) -> np.ndarray:
        axes = tuple(range(1, leaf.ndim))
        most = np.max(np.abs(leaf), axis=axes, keepdims=True, initial=0)
        return np.broadcast_to(np.where(most > 0, most, 1), leaf.shape)

    return step * flat(jax.tree.map(largest, samples))


def flat(samples: PyTree) -> np.ndarray:
    """Return the numbers of all leaves, one after the other, `(samples, size)`."""
    leaves = [np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(samples)]
    return np.concatenate(leaves, axis=1)


def from_flat(params: PyTree, numbers: np.ndarray) -> PyTree:
    """Return numbers `(..., size)` as a tree like the params, with the axes before theirs."""
    leaves, tree = jax.tree.flatten(params)
    parts = np.split(numbers, np.cumsum([np.size(leaf) for leaf in leaves])[:-1], axis=-1)
    shapes = [(*numbers.shape[:-1], *np.shape(leaf)) for leaf in leaves]
    return jax.tree.unflatten(tree, map(np.reshape, parts, shapes))


def is_square(shape: tuple[int, ...]) -> bool:
    """Return whether it is that of a matrix which can be transposed."""
    return len(shape) == 2 and shape[0] == shape[1] > 1
