"""`Dense` layers, and the forward pass over a tuple of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from jaxnn.model.activations import ACTIVATIONS, HIDDEN_ACTIVATIONS, Activation
from jaxnn.run.checks import array_record, as_choice, as_values
from jaxnn.run.show import readable
from jaxnn.typing import PyTree

VECTOR = 16
"""Rows are padded to a multiple of this: XLA would do what is left over one by one."""


@readable
@array_record
class Dense(NamedTuple):
    """One layer's numbers: `outputs = activation(inputs @ weights + biases)`.

    Functions that take params accept lists of floats and float64 arrays as well, and round them
    to float32 unless JAX's x64 mode is on. They refuse integers, and say how to convert them.

    Attributes:
        weights: shape `(in, out)`, float32.
        biases: shape `(out,)`, float32, or None where the layer has none.
    """

    weights: jax.Array
    biases: jax.Array | None


Params = tuple[Dense, ...]
Hidden = str | tuple[str, ...]
"""The activation of all hidden layers, or of each."""
LayerShapes = tuple[tuple[tuple[int, int], tuple[int] | None], ...]
"""For each layer the shape of its weights, and of its biases or None."""


def layer_shapes(sizes: tuple[int, ...], hidden_biases: bool = True) -> LayerShapes:
    """Return the shapes of a network's params."""
    last = len(sizes) - 2
    return tuple(
        ((fan_in, fan_out), (fan_out,) if hidden_biases or layer == last else None)
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes))
    )


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Return the matrix product in full float precision; GPUs would round to TF32."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def as_hidden(hidden: Hidden | Sequence[str], layers: int) -> Hidden:
    """Return the activation of all hidden layers, or of each where they differ."""
    if not isinstance(hidden, (tuple, list)):
        return as_choice("hidden", hidden, HIDDEN_ACTIVATIONS)
    if len(hidden) != layers:
        wanted = f"one activation or {layers}, one a hidden layer"
        raise ValueError(f"hidden must be {wanted}; got {tuple(hidden)}")
    names = [as_choice(f"hidden[{i}]", name, HIDDEN_ACTIVATIONS) for i, name in enumerate(hidden)]
    return names[0] if len(set(names)) == 1 else tuple(names)


def activations_of(hidden: Hidden, params: Params) -> list[Activation]:
    """Return the activation of each layer but the last."""
    names = [hidden] * (len(params) - 1) if isinstance(hidden, str) else hidden
    return [ACTIVATIONS[name] for name in names]


def logits_of(params: Params, x: jax.Array, hidden: Hidden) -> jax.Array:
    """Return what the last layer makes of `x`, before the output activation: `(rows, out)`."""
    *before, last = params
    for layer, activation in zip(before, activations_of(hidden, params), strict=True):
        x = activation.forward(_affine(layer, x))
    return _affine(last, x)


def _affine(layer: Dense, inputs: jax.Array) -> jax.Array:
    z = dot(inputs, layer.weights)
    return z if layer.biases is None else z + layer.biases[None, :]


def forward(
    params: Params, x: ArrayLike, *, hidden: Hidden = "relu", output: str = "identity"
) -> jax.Array:
    """Return outputs `(rows, outputs)`: `hidden` after every layer but the last, then `output`.

    Args:
        params: tuple of `Dense`.
        x: inputs, shape `(rows, features)`; an array, a list of rows or a pandas frame.
        hidden: name of the hidden activation, or one name a hidden layer.
        output: name of the output activation.

    Raises:
        ValueError: if an activation is unknown.

    Example:
        >>> layer = Dense(jnp.array([[2.0], [-1.0]]), jnp.array([1.0]))
        >>> forward((layer,), jnp.array([[1.0, 2.0], [3.0, -1.0]]))
        Array([[1.],
               [8.]], dtype=float32)
    """
    params = _as_layers("params", params)
    hidden = as_hidden(hidden, len(params) - 1)
    as_choice("output", output, tuple(ACTIVATIONS))
    logits = logits_of(params, jnp.asarray(as_values("x", x)), hidden)
    return ACTIVATIONS[output].forward(logits)


def check_params(name: str, params: PyTree, shapes: LayerShapes) -> Params:
    """Return the params as arrays that JAX can hold; refuse those of another network."""
    params = _as_layers(name, params)
    if len(params) != len(shapes):
        raise ValueError(f"{name} must hold {len(shapes)} layers; got {len(params)}")
    wide = jax.dtypes.canonicalize_dtype("float64") == "float64"
    allowed = ("float32", "float64") if wide else ("float32",)
    dtypes = set()
    for layer, (dense, wanted) in enumerate(zip(params, shapes, strict=True)):
        for field, leaf, shape in zip(Dense._fields, dense, wanted, strict=True):
            path = f"{name}[{layer}].{field}"
            came = leaf.shape if hasattr(leaf, "shape") else f"a {type(leaf).__name__}"
            if came != shape and shape is not None:
                raise ValueError(f"{path} must be an array of shape {shape}; got {came}")
            if leaf is not None and shape is None:
                none = "None: the network has hidden_biases=False"
                raise ValueError(f"{path} must be {none}; got {came}")
            if leaf is None:
                continue
            dtypes.add(dtype := str(jax.dtypes.canonicalize_dtype(leaf.dtype)))
            if dtype not in allowed:
                raise TypeError(
                    f"{path} must be {' or '.join(allowed)}; got {leaf.dtype}: "
                    "jax.tree.map(jnp.float32, params) converts it"
                )
    if len(dtypes) > 1:
        raise TypeError(f"{name} must be of one dtype; got {', '.join(sorted(dtypes))}")
    return params


def _as_layers(name: str, params: PyTree) -> Params:
    """Return a tuple of `Dense` with arrays of any shapes, or shapes of params not drawn yet."""
    if not isinstance(params, tuple):
        raise TypeError(f"{name} must be a tuple of Dense; got a {type(params).__name__}")
    layers = []
    for layer, dense in enumerate(params):
        if not isinstance(dense, Dense):
            came = type(dense).__name__
            raise TypeError(f"{name}[{layer}] must be a Dense(weights, biases); got a {came}")
        fields = zip(Dense._fields, dense, strict=True)
        layers.append(
            Dense(*(_as_leaf(f"{name}[{layer}].{field}", leaf) for field, leaf in fields))
        )
    return tuple(layers)


def _as_leaf(path: str, leaf: PyTree) -> PyTree:
    is_ready = leaf is None or isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
    return leaf if is_ready else as_values(path, leaf)
