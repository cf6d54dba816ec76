"""What the trainers ask of the functions they are given, and how they check it.

Every callable may be a plain function or a `jax.tree_util.Partial`, whose numbers are traced: a
sweep over them compiles once. A callable may carry `validate(params, batch)`, which raises for
bad input with NumPy alone; a trainer calls it first, with shapes in place of params it has not
drawn yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jaxnn.run.checks import as_arrays, is_traced
from jaxnn.run.programs import program

__all__ = [
    "LossFn",
    "MetricFn",
    "SampleFn",
    "ValueAndGradFn",
    "as_batch",
    "as_optional",
    "as_params",
    "as_partial",
    "call",
    "check_concrete",
    "check_like_params",
    "check_scalar",
    "check_value_and_grad",
    "drawn_shapes",
    "shapes_of",
]


class LossFn(Protocol):
    """A loss to be made small."""

    def __call__(self, params: Any, batch: Any) -> jax.Array:
        """Returns the loss of `params`, any pytree, on `batch`, any pytree: a float scalar."""
        ...


class MetricFn(Protocol):
    """A number worth watching, such as the accuracy."""

    def __call__(self, params: Any, batch: Any) -> jax.Array:
        """Returns a float scalar."""
        ...


class ValueAndGradFn(Protocol):
    """A loss together with its gradient, as `jax.value_and_grad(loss_fn)` returns it."""

    def __call__(self, params: Any, batch: Any) -> tuple[jax.Array, Any]:
        """Returns the loss, a float scalar, and its gradient, a tree like `params`."""
        ...


class SampleFn(Protocol):
    """A distribution over whole weight sets."""

    def __call__(self, key: jax.Array) -> Any:
        """Returns the params that belong to a typed key: same key, same params."""
        ...


def as_partial(name: str, function: Any) -> Partial:
    """The callable as a `Partial`, a pytree that can be an argument of a compiled function."""
    if not callable(function):
        raise TypeError(f"{name} must be callable; got a {type(function).__name__}")
    check_concrete(name, function)
    return function if isinstance(function, Partial) else Partial(function)


def as_optional(name: str, function: Any) -> Partial | None:
    """The same, of a callable that may be left out."""
    return None if function is None else as_partial(name, function)


def check_concrete(name: str, value: Any) -> None:
    """Refuses a number, or a `Partial` with a number, that has no value yet: the host needs it."""
    if any(is_traced(leaf) for leaf in jax.tree.leaves(value)):
        raise TypeError(f"{name} must be concrete; got a tracer: call this outside jit and vmap")


def shapes_of(name: str, function: Partial, *arguments: Any) -> Any:
    """Shapes and dtypes of a function's result; traced once for the same function and shapes.

    An error of the function's own goes through, with a note that says which function it was.
    """
    try:
        return call.eval_shape(function, *arguments)
    except Exception as error:
        error.add_note(f"This came from tracing {name}.")
        raise


def drawn_shapes(sample: Partial, key: jax.Array) -> Any:
    """What a sampler draws, as shapes; at least one array."""
    shapes = shapes_of("sample_fn", sample, key)
    if not jax.tree.leaves(shapes):
        raise TypeError(f"sample_fn must return params, a tree of arrays; got {shapes}")
    return shapes


@program(keep_unused=True)
def call(function: Partial, *arguments: Any) -> Any:
    """Calls a function, under `jit`."""
    return function(*arguments)


def as_batch(batch: Any, params: Any, *functions: Callable[..., Any] | None) -> Any:
    """The batch as fresh JAX arrays, once each function's own `validate` has let it pass.

    Lists are containers, as in every pytree; only in the fields of a `Batch` they are arrays.
    """
    for function in functions:
        validate = getattr(function, "validate", None)
        if validate is not None:
            validate(params, batch)
    return as_arrays("batch", batch)


def as_params(params: Any) -> Any:
    """Params as fresh JAX arrays; every leaf a float of one dtype.

    NumPy's float64 is rounded to float32 unless JAX's x64 mode is on. Lists are containers, as in
    every pytree; only in the fields of a `Dense` they are arrays.
    """
    arrays = as_arrays("params", params)
    leaves = tree_leaves_with_path(arrays)
    if not leaves:
        raise ValueError("params must hold at least one array; got an empty tree")
    for path, leaf in leaves:
        if leaf.dtype != leaves[0][1].dtype or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params must be floats of one dtype; got {leaf.dtype} at params{keystr(path)}: "
                "jax.tree.map(jnp.float32, params) converts them"
            )
    return arrays


def check_scalar(name: str, value: Any) -> None:
    """Refuses a function's result, as `jax.eval_shape` tells it, that is not a float scalar."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{name} must return a float scalar; got a {type(value).__name__}")
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name} must return a float scalar; got {value.dtype} of shape {value.shape}"
        )


def check_value_and_grad(function: Partial, params: Any, batch: Any) -> Any:
    """Refuses results that are no loss and gradient like the params; returns the loss's dtype."""
    results = shapes_of("value_and_grad_fn", function, params, batch)
    if not (isinstance(results, tuple) and len(results) == 2):
        raise TypeError(
            "value_and_grad_fn must return (loss, gradients), as jax.value_and_grad(loss_fn) "
            f"does; got a {type(results).__name__}"
        )
    check_scalar("value_and_grad_fn", results[0])
    check_like_params("value_and_grad_fn", "gradients", results[1], params)
    return results[0].dtype


def check_like_params(name: str, what: str, got: Any, params: Any) -> None:
    """Refuses a result whose tree, shapes or dtypes are not those of the params."""
    if jax.tree.structure(got) != jax.tree.structure(params):
        raise TypeError(
            f"{name} must return {what} with the tree of params, "
            f"{jax.tree.structure(params)}; got {jax.tree.structure(got)}"
        )
    pairs = zip(tree_leaves_with_path(got), jax.tree.leaves(params), strict=True)
    for (path, found), leaf in pairs:
        if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise TypeError(
                f"{name} must return {what} like params; got {found.dtype} of shape "
                f"{found.shape} for params{keystr(path)}, {leaf.dtype} of shape {leaf.shape}"
            )
