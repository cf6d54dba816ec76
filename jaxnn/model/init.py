"""Drawing params from a distribution, all of them from one key.

One flat vector of unit draws is cut into layers and scaled: a single call of the random
generator, where one a layer would cost a third of the pace. With unit draws `u`, a layer's
weights are `scale * gain(fan_in) * u`:

    "normal"   u ~ N(0, 1)       gain 1
    "uniform"  u ~ U(-1, 1)      gain 1
    "lecun"    u ~ N(0, 1)       gain sqrt(1 / fan_in)     (LeCun et al. 1998)
    "he"       u ~ N(0, 1)       gain sqrt(2 / fan_in)     (He et al. 2015)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import numpy as np
from jax.tree_util import Partial

from jaxnn.model.layers import Dense, LayerShapes, Params
from jaxnn.run.checks import as_choice, as_key, as_real
from jaxnn.run.random import normals, uniforms
from jaxnn.typing import PyTree, Traits, UnitDraws

Distribution = Literal["normal", "uniform", "lecun", "he"]
DISTRIBUTIONS: tuple[str, ...] = ("normal", "uniform", "lecun", "he")


def sampler(
    shapes: LayerShapes,
    *,
    scale: float | Sequence[float] = 1.0,
    distribution: Distribution = "normal",
    bias_scale: float | Sequence[float] | None = None,
) -> Partial:
    """Return a function `sample_fn(key) -> params`; a sweep over its scales compiles once.

    Args:
        shapes: for each layer the shape of its weights, and of its biases or None.
        scale: multiplies the weights' unit draws; above 0; one number, or one a layer.
        distribution: `"normal"`, `"uniform"`, `"lecun"` or `"he"`.
        bias_scale: multiplies the biases' unit draws in the same way; 0 for zero biases. By default
            the biases of a layer are drawn as its weights are.

    Raises:
        ValueError: if a scale is out of range, the distribution unknown, or the number of
            scales is not that of the layers.

    Example:
        >>> sample_fn = sampler((((2, 3), (3,)),), scale=0.05)
        >>> sample_fn(jax.random.key(0))[0].weights.shape
        (2, 3)
    """
    as_choice("distribution", distribution, DISTRIBUTIONS)
    scale = _per_layer("scale", scale, shapes)
    if bias_scale is not None:
        bias_scale = _per_layer("bias_scale", bias_scale, shapes, inclusive=True)
    return Partial(_drawer(shapes, distribution), scale=scale, bias_scale=bias_scale)


def _per_layer(name: str, value: PyTree, shapes: LayerShapes, *, inclusive: bool = False) -> Any:
    """Return one number, or a tuple with one for each layer."""
    if not isinstance(value, (tuple, list)):
        return as_real(name, value, inclusive=inclusive)
    if len(value) != len(shapes):
        raise ValueError(f"{name} must be one number or {len(shapes)}, one a layer; got {value}")
    return tuple(as_real(f"{name}[{i}]", each, inclusive=inclusive) for i, each in enumerate(value))


@dataclass(frozen=True)
class Drawer:
    """The function behind a sampler. Its shapes and distribution say all, so it pickles."""

    shapes: LayerShapes
    distribution: str

    def __reduce__(self):
        return _drawer, (self.shapes, self.distribution)

    @property
    def traits(self) -> Traits:
        """What the sampler tells a trainer."""
        return Traits(unit_draws=self.unit_draws)

    @property
    def unit_draws(self) -> UnitDraws:
        """The draws behind the params, and what makes params of them."""
        kind = "uniform" if self.distribution == "uniform" else "normal"
        size = sum(math.prod(shape) for layer in self.shapes for shape in layer if shape)
        return UnitDraws(kind, size, self.to_params)

    def __call__(self, key: jax.Array, *, scale: Any, bias_scale: Any) -> Params:
        """Return the params that belong to a key; each scale is one number or a tuple of them."""
        key, unit = as_key("key", key, traced=True), self.unit_draws
        flat = (uniforms if unit.distribution == "uniform" else normals)(key, unit.size)
        return self.to_params(flat, scale=scale, bias_scale=bias_scale)

    def to_params(self, flat: jax.Array, *, scale: Any, bias_scale: Any) -> Params:
        """Return the params of unit draws `(size,)`."""
        layers, begin = [], 0
        for layer, ((fan_in, fan_out), biases) in enumerate(self.shapes):
            gain = {"lecun": math.sqrt(1 / fan_in), "he": math.sqrt(2 / fan_in)}
            by, bias_by = (s[layer] if isinstance(s, tuple) else s for s in (scale, bias_scale))
            by = by * np.float32(gain.get(self.distribution, 1.0))
            middle = begin + fan_in * fan_out
            end = middle + (biases[0] if biases else 0)
            drawn = flat[middle:end] * (by if bias_by is None else bias_by) if biases else None
            layers.append(Dense(flat[begin:middle].reshape(fan_in, fan_out) * by, drawn))
            begin = end
        return tuple(layers)


@cache
def _drawer(shapes: LayerShapes, distribution: str) -> Drawer:
    """Return one object for the same settings, so that `jit` knows it again."""
    return Drawer(shapes, distribution)
