"""Drawing whole weight sets from a distribution, all of them from one key.

One flat vector of unit draws a weight set, cut into layers and scaled: a single call of the
random generator, where one a layer would cost a third of the pace. With unit draws `u`, a
layer's weights are `scale * gain(fan_in) * u`:

    "normal"   u ~ N(0, 1)       gain 1
    "uniform"  u ~ U(-1, 1)      gain 1
    "lecun"    u ~ N(0, 1)       gain sqrt(1 / fan_in)     (LeCun et al. 1998)
    "he"       u ~ N(0, 1)       gain sqrt(2 / fan_in)     (He et al. 2015)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import jax
import numpy as np

from jaxnn.model.layers import Dense, LayerShapes, Params
from jaxnn.run.checks import as_choice, as_key, as_real
from jaxnn.run.unit_draws import normals, uniforms

__all__ = ["DISTRIBUTIONS", "Distribution", "sampler"]

Distribution = Literal["normal", "uniform", "lecun", "he"]
DISTRIBUTIONS: tuple[str, ...] = ("normal", "uniform", "lecun", "he")


def sampler(
    shapes: LayerShapes,
    *,
    scale: float | Sequence[float] = 1.0,
    distribution: Distribution = "normal",
    bias_scale: float | Sequence[float] | None = None,
) -> jax.tree_util.Partial:
    """A function `sample_fn(key) -> params` whose scales are leaves: a sweep compiles once.

    Args:
        shapes: for each layer the shape of its weights, and of its biases or None.
        scale: multiplies the weights' unit draws; above 0; one number, or one a layer.
        distribution: `"normal"`, `"uniform"`, `"lecun"` or `"he"`.
        bias_scale: multiplies the biases' unit draws, likewise; 0 for zero biases. By default
            the biases of a layer are drawn as its weights are.

    Returns:
        A `jax.tree_util.Partial` of one argument, a typed key.

    Raises:
        TypeError: if a scale is not a number or the distribution not a word.
        ValueError: if a scale is out of range, the distribution unknown, or the number of
            scales is not that of the layers.

    Example:
        >>> sample_fn = sampler((((2, 3), (3,)),), scale=0.05)
        >>> sample_fn(jax.random.key(0))[0].weights.shape
        (2, 3)
    """
    as_choice("distribution", distribution, DISTRIBUTIONS)
    scales = [
        each * np.float32(_gain(distribution, fan_in))
        for each, ((fan_in, _), _) in zip(_per_layer("scale", scale, shapes), shapes, strict=True)
    ]
    bias_scales = scales
    if bias_scale is not None:
        bias_scales = _per_layer("bias_scale", bias_scale, shapes, inclusive=True)
    unit = "uniform" if distribution == "uniform" else "normal"
    return jax.tree_util.Partial(_drawer(shapes, unit), tuple(scales), tuple(bias_scales))


def _gain(distribution: str, fan_in: int) -> float:
    return {"lecun": math.sqrt(1 / fan_in), "he": math.sqrt(2 / fan_in)}.get(distribution, 1.0)


def _per_layer(name: str, value: Any, shapes: LayerShapes, *, inclusive: bool = False) -> list[Any]:
    if not isinstance(value, (tuple, list)):
        return [as_real(name, value, inclusive=inclusive)] * len(shapes)
    if len(value) != len(shapes):
        raise ValueError(f"{name} must be one number or {len(shapes)}, one a layer; got {value}")
    return [as_real(f"{name}[{i}]", each, inclusive=inclusive) for i, each in enumerate(value)]


@cache
def _drawer(shapes: LayerShapes, unit: str):
    """The function behind a sampler: one object for the same settings, so `jit` knows it again."""
    total = sum(math.prod(shape) for layer in shapes for shape in layer if shape)

    def draw(scales: tuple[jax.Array, ...], bias_scales: tuple[jax.Array, ...], key: jax.Array):
        key = as_key("key", key, traced=True)
        flat = uniforms(key, total) if unit == "uniform" else normals(key, total)
        return _cut(flat, shapes, scales, bias_scales)

    draw.__qualname__ = f"sampler({shapes}, {unit!r})"
    return draw


def _cut(flat: jax.Array, shapes: LayerShapes, scales: Any, bias_scales: Any) -> Params:
    """Cuts a flat vector into layers, weights row by row and then biases, and scales each."""
    layers, begin = [], 0
    for (weights, biases), scale, bias_scale in zip(shapes, scales, bias_scales, strict=True):
        middle = begin + math.prod(weights)
        end = middle + (biases[0] if biases else 0)
        drawn = flat[middle:end] * bias_scale if biases else None
        layers.append(Dense(flat[begin:middle].reshape(weights) * scale, drawn))
        begin = end
    return tuple(layers)
