"""Jacobians and Hessian-vector products by hand, checked as gradients of scalars.

Row `i` of a Jacobian is the gradient of output `i`. Each output gets params of its own, so that
the rows together are one gradient, that of the sum of `f_i(params_i)`, and the report names output
and leaf. The product of a Hessian with a direction `v` is the gradient of `<grad loss(params), v>`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.gradients.check import GradientReport, check_gradients, is_sampler
from jaxnn.gradients.diagnose import OF_OUTPUTS
from jaxnn.gradients.functions import traced_or_numpy
from jaxnn.gradients.witnesses import widened
from jaxnn.run.checks import as_batch, as_key, as_params, as_partial, call, check_like
from jaxnn.typing import Function, LossFn, PyTree, SampleFn

TAG = 0x4A414348
"""Folded into the key, so that directions are not those of anything else."""


def check_jacobian(
    key: jax.Array,
    function: Function,
    jacobian_fn: Function,
    sampler: SampleFn | PyTree,
    batch: PyTree,
    **options: Any,
) -> GradientReport:
    """Compare a Jacobian with automatic differentiation and with differences, in float64.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        function: `function(params, batch)` -> an array of floats of any shape; in JAX or NumPy, as
            for `check_gradients`. Of some hundred outputs at most: each is differentiated alone.
        jacobian_fn: the Jacobian under test, `(params, batch)` -> a tree like the params, each leaf
            with the axes of the output before its own, as `jax.jacobian(function)`.
        sampler: `sample_fn(key)` -> params, or params themselves, any pytree of floats.
        batch: any pytree that both functions take.
        **options: those of `check_gradients` but `certify`: `num_samples` and the tolerances.

    Returns:
        A `GradientReport` with a leaf for each output and leaf of the params.

    Raises:
        TypeError: if the function returns no array of floats, the Jacobian is not like it, or
            `certify` is given.
        ValueError: if the function returns an empty array, and as `check_gradients`.

    Example:
        >>> outputs = lambda params, batch: jnp.tanh(batch @ params)
        >>> by_hand = lambda params, batch: (1 - outputs(params, batch)[:, None]) * batch
        >>> report = check_jacobian(jax.random.key(0), outputs, by_hand, jnp.ones(2), jnp.eye(2))
        >>> report.passed, report.worst.name
        (False, "params['output[0]']")
    """
    parts = as_partial("function", function), as_partial("jacobian_fn", jacobian_fn)
    params, data = _prepared("check_jacobian", key, sampler, batch, options, function, jacobian_fn)
    with jax.enable_x64(True):
        params, data = widened(params), widened(data)
        own, outputs = traced_or_numpy("function", function, params, data)
        _check_outputs(outputs)
        by_hand, jacobian = traced_or_numpy("jacobian_fn", jacobian_fn, params, data)
    wanted = jax.tree.map(lambda x: np.broadcast_to(x, outputs.shape + x.shape), params)
    check_like("jacobian_fn", "a Jacobian", jacobian, wanted, "jax.jacobian(function)")
    digits = [len(str(size - 1)) for size in outputs.shape]
    places = [", ".join(map("{:0{}}".format, at, digits)) for at in np.ndindex(outputs.shape)]
    names = [f"output[{place}]" if place else "output" for place in places]  # Sorted, as in trees.

    def copies(params: PyTree) -> PyTree:
        return dict.fromkeys(names, params)

    given = (lambda key: copies(sampler(key))) if is_sampler(sampler) else copies(sampler)
    # Those of JAX are compiled: NumPy arrays lack `.at`, and the other may be in NumPy.
    pairs = zip(parts, (own, by_hand), strict=True)
    parts = [Partial(call, part) if isinstance(each, Partial) else part for part, each in pairs]
    functions = Partial(_sum, parts[0]), Partial(_sum_and_rows, *parts)
    report = check_gradients(key, *functions, given, batch, **options)
    return _named(report, "Jacobian", loss_fn="function", value_and_grad_fn="jacobian_fn")


def check_hvp(
    key: jax.Array,
    loss_fn: LossFn,
    hvp_fn: Function,
    sampler: SampleFn | PyTree,
    batch: PyTree,
    **options: Any,
) -> GradientReport:
    """Compare a Hessian-vector product with automatic differentiation and with differences.

    The differences are those of `jax.grad(loss_fn)`. The direction is one draw of normals; the
    product is linear in it, so that a wrong part of the Hessian shows with probability 1.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar that JAX can differentiate twice, as
            `model.loss_reference`.
        hvp_fn: the product under test, `(params, direction, batch)` -> a tree like the params, as
            the direction is one.
        sampler: `sample_fn(key)` -> params, or params themselves, any pytree of floats.
        batch: any pytree that both functions take.
        **options: those of `check_gradients` but `certify`: `num_samples` and the tolerances.

    Returns:
        A `GradientReport` with a leaf for each leaf of the params.

    Raises:
        TypeError: if JAX cannot trace the loss, the product is not like the params, or `certify`
            is given.
        ValueError: as `check_gradients`.

    Example:
        >>> loss_fn = lambda params, batch: jnp.sum(params**4)
        >>> by_hand = lambda params, direction, batch: 4 * params**2 * direction
        >>> report = check_hvp(jax.random.key(0), loss_fn, by_hand, jnp.ones(2), None)
        >>> report.passed, round(report.leaves[0].ratio, 6)
        (False, 0.333333)
    """
    parts = as_partial("loss_fn", loss_fn), as_partial("hvp_fn", hvp_fn)
    params, data = _prepared("check_hvp", key, sampler, batch, options, loss_fn, hvp_fn)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(key, TAG), len(leaves))
    drawn = map(jax.random.normal, keys, [leaf.shape for leaf in leaves])
    direction = tree.unflatten(np.asarray(draw) for draw in drawn)
    with jax.enable_x64(True):
        params, data, along = widened(params), widened(data), Partial(_product, direction, parts[1])
        if not isinstance(traced_or_numpy("loss_fn", loss_fn, params, data)[0], Partial):
            raise TypeError("loss_fn must be a function that JAX can trace; got one of NumPy")
        product = traced_or_numpy("hvp_fn", along, params, data)[1]
    check_like("hvp_fn", "a product", product, params)
    functions = (
        Partial(_slope_along, direction, parts[0]),
        Partial(_slope_and_product, direction, *parts),
    )
    report = check_gradients(key, *functions, sampler, batch, **options)
    return _named(report, "Hessian-vector product", value_and_grad_fn="hvp_fn")


def _prepared(
    name: str,
    key: jax.Array,
    sampler: PyTree,
    batch: PyTree,
    options: dict[str, Any],
    *functions: Function,
) -> tuple[PyTree, PyTree]:
    """Return some params, and the batch."""
    if "certify" in options:  # It would show the user functions of this file as their own.
        raise TypeError(f"certify must be left out of {name}: only check_gradients takes it")
    key = as_key("key", key)
    params = as_params(sampler(key) if is_sampler(sampler) else sampler)
    return params, as_batch(batch, params, *functions)


def _named(report: GradientReport, kind: str, **names: str) -> GradientReport:
    """Name the functions in the notes as the user does, and leave out hints about outputs."""
    notes = report.notes
    for ours, own in names.items():
        notes = tuple(note.replace(ours, own) for note in notes)
    hints = tuple(hint.removesuffix(OF_OUTPUTS) for hint in report.suggestions)
    return report._replace(notes=notes, suggestions=hints, kind=kind)


def _check_outputs(outputs: PyTree) -> None:
    """Refuse what has no Jacobian in float64."""
    is_array = hasattr(outputs, "dtype")
    if not is_array or outputs.dtype != jnp.float64:
        came = f"{outputs.dtype} of shape {outputs.shape}" if is_array else type(outputs).__name__
        raise TypeError(
            f"function must return an array of floats in the dtype of the params; got {came}"
        )
    if not outputs.size:
        raise ValueError(f"function must return at least one number; got shape {outputs.shape}")


def _sum(function: Function, copies: PyTree, batch: PyTree) -> Any:
    """Sum the outputs, each of its own params."""
    outputs = (jnp.reshape(function(params, batch), -1) for params in copies.values())
    return sum(output[number] for number, output in enumerate(outputs))


def _sum_and_rows(
    function: Function, jacobian_fn: Function, copies: PyTree, batch: PyTree
) -> tuple[Any, PyTree]:
    """Return the same with the rows of the Jacobian, each at the params of its output."""
    rows, count = {}, len(copies)
    for number, (name, params) in enumerate(copies.items()):
        jacobian = jacobian_fn(params, batch)
        rows[name] = jax.tree.map(
            lambda slopes, leaf, number=number: jnp.reshape(slopes, (count, *leaf.shape))[number],
            jacobian,
            params,
        )
    return _sum(function, copies, batch), rows


def _slope_along(direction: PyTree, loss: LossFn, params: PyTree, batch: PyTree) -> Any:
    """Return the slope of the loss along the direction."""
    slopes = jax.grad(loss)(params, batch)
    parts = jax.tree.map(lambda v, slope: jnp.sum(v * slope), _like(direction, slopes), slopes)
    return sum(jax.tree.leaves(parts))


def _slope_and_product(
    direction: PyTree, loss: LossFn, hvp_fn: Function, params: PyTree, batch: PyTree
) -> tuple[Any, PyTree]:
    return _slope_along(direction, loss, params, batch), _product(direction, hvp_fn, params, batch)


def _product(direction: PyTree, hvp_fn: Function, params: PyTree, batch: PyTree) -> PyTree:
    return hvp_fn(params, _like(direction, params), batch)


def _like(direction: PyTree, params: PyTree) -> PyTree:
    """Return the direction in the dtype of the params."""
    return jax.tree.map(lambda v, leaf: v.astype(leaf.dtype), direction, params)
