"""What the trainers take and return: the contracts of the callables, and how a run ends.

Every callable may be a plain function or a `jax.tree_util.Partial`, whose numbers are traced, so
that a sweep over them compiles once. What a function tells a trainer besides its results is in
its attribute `traits`, a `Traits`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax

__all__ = [
    "Device",
    "Function",
    "LossFn",
    "MetricFn",
    "ProposeFn",
    "PyTree",
    "SampleFn",
    "Status",
    "Traits",
    "UnitDraws",
    "ValueAndGradFn",
    "traits_of",
]

PyTree = Any
"""Any tree of arrays that `jax.tree` takes: params, a batch, a state, or one array alone."""

Device = Any
"""A device, as `jax.devices()` returns it; `jax.Device` is no class for type checkers."""

Function = Callable[..., Any]
"""Any callable."""

Status = Literal[
    "running",
    "completed",
    "converged",
    "diverged",
    "interrupted",
    "nonfinite",
    "reached",
    "stopped",
]
"""How a run ended.

running: it has not ended yet; checkpoints that are saved on the way say so.
completed: all of it was done.
converged: a stop rule of the trainer was met.
diverged: a loss was no longer finite; the params returned are the last with a finite one.
interrupted: Ctrl-C or SIGTERM; the result is the best so far.
nonfinite: no finite loss was ever met.
reached: what was looked for was found: a target loss, or enough candidates.
stopped: the time was over, or a callback asked for it.
"""


class LossFn(Protocol):
    """A loss to be made small."""

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Return the loss of `params` on `batch`: a float scalar."""
        ...


class MetricFn(Protocol):
    """A number worth watching, such as the accuracy."""

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Return a float scalar."""
        ...


class ValueAndGradFn(Protocol):
    """A loss together with its gradient, as `jax.value_and_grad(loss_fn)` returns it.

    Where `with_key=True` says so, it takes `key=None` as a third argument.
    """

    def __call__(self, params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        """Return the loss, a float scalar, and its gradient, a tree like `params`."""
        ...


class SampleFn(Protocol):
    """A distribution over params."""

    def __call__(self, key: jax.Array) -> PyTree:
        """Return the params that belong to a typed key: same key, same params."""
        ...


class ProposeFn(Protocol):
    """A random move from params to other params."""

    def __call__(self, key: jax.Array, params: PyTree, scale: jax.Array) -> PyTree:
        """Return params like `params`, all randomness from `key`; `scale` is the step size."""
        ...


class UnitDraws(NamedTuple):
    """How a sampler makes its params: by a map from independent draws of one distribution.

    Attributes:
        distribution: "normal", N(0, 1), or "uniform", between -1 and 1.
        size: how many draws make params.
        to_params: `to_params(draws)` -> params, with draws `(size,)`, float32. Where the sampler is
            a `Partial`, what that binds is bound to `to_params` as well.
    """

    distribution: Literal["normal", "uniform"]
    size: int
    to_params: Callable[..., PyTree]


class Traits(NamedTuple):
    """What a function, such as a loss, tells a trainer: its attribute `traits`, if any.

    `functools.wraps`, and so `jax.jit`, hands the attribute on; a lambda around a function has
    none. Every field may be left out, and so may the whole.

    Attributes:
        validate: `validate(params, batch)` raises `TypeError` or `ValueError` for bad input, by
            shapes and NumPy alone. A trainer calls it first, with shapes in place of params that
            it has not drawn yet.
        candidate_bytes: `candidate_bytes(params, batch)` -> what one candidate adds to the memory
            that `jax.vmap` of the function works in, for float32.
        batch_invariant: `batch_invariant(params, batch)` -> whether `jax.vmap` of the function
            returns the same bits for a candidate at every width that is a multiple of 16.
        constant_loss: `constant_loss(batch)` -> the lowest loss of an answer that is the same for
            every row, or None where it is not known.
        lower_bound: `lower_bound(params, batch)` -> a float scalar of the loss's dtype that is at
            most the loss. The loss has to be the mean over rows, the first axis of every array of
            the batch, of losses of 0 or more. The bound is such a mean as well; the loss itself
            will do. With `keep_below`, random search calls it with some of the rows.
        bound_batch: `bound_batch(batch)` -> the batch of which `lower_bound` takes rows; where a
            loss divides by the sum of its weights, one whose weights are so divided before.
        unit_draws: of a sampler: the draws behind its params; see `UnitDraws`.
    """

    validate: Callable[[PyTree, PyTree], None] = lambda params, batch: None
    candidate_bytes: Callable[[PyTree, PyTree], int] | None = None
    batch_invariant: Callable[[PyTree, PyTree], bool] = lambda params, batch: False
    constant_loss: Callable[[PyTree], float | None] = lambda batch: None
    lower_bound: Callable[[PyTree, PyTree], jax.Array] | None = None
    bound_batch: Callable[[PyTree], PyTree] = lambda batch: batch
    unit_draws: UnitDraws | None = None


def traits_of(function: object) -> Traits:
    """Return the traits of a function; those of a function without any promise nothing.

    Example:
        >>> traits_of(lambda params, batch: 0.0).batch_invariant(None, None)
        False
    """
    return getattr(function, "traits", Traits())
