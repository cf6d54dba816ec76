"""What the trainers take and return: the contracts of the callables, and how a run ends.

Every callable may be a plain function or a `jax.tree_util.Partial`, whose numbers are traced, so
that a sweep over them compiles once. A callable may carry `validate(params, batch)`, which raises
for bad input with NumPy alone; a trainer calls it first, with shapes in place of params that it
has not drawn yet.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import jax

__all__ = [
    "LossFn",
    "MetricFn",
    "ProposeFn",
    "PyTree",
    "SampleFn",
    "Status",
    "ValueAndGradFn",
]

PyTree = Any
"""Any tree of arrays that `jax.tree` takes: params, a batch, a state, or one array alone."""

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
    """A loss together with its gradient, as `jax.value_and_grad(loss_fn)` returns it."""

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
