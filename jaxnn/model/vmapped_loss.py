"""One loss for many candidates at once: what `jax.vmap(model.loss)` and `model.accuracy` run.

The plain `vmap` of a small network is a batch of tiny matrix products, which are slow on CPUs and
in XLA. Two layouts do better. Both are the loss of *one* candidate, which `vmap` maps.

`loss_by_scalars`, for small networks: every weight is a scalar, so under `vmap` the candidates
are the vector lanes. XLA fuses such a chain of elementwise operations into one loop; a `dot`, a
`sum` or a `logsumexp` over a tiny axis would break the chain. A `scan` walks over blocks of rows.

`loss_by_rows`, for the others: the rows come last and are the lanes. Layers of up to 32 x 32
weights are sums over their inputs, which XLA fuses with what follows; larger ones are products.
Elsewhere than on CPUs, all hidden layers are products.

Measured on 2 cores with AVX-512 (jax 0.10.2, 300 rows, softmax, drawing included, 512-bit
vectors), in thousand candidates a second, plain `vmap` and the layout chosen here: 2-3-3 110 and
3,200; 2-16-16-3 89 and 294; 2-64-64-3 17 and 22; 64-32-10 38 and 58.

Faster by scalars: labels chosen by `where`, not by a product with one-hot rows, 1.3 times; the
running softmax 1.2; 10 rows a block instead of 6 1.1 (20 are no better); 512-bit vectors 1.6.
Faster by rows, on 2-16-16-3: the last layer and the softmax as one loop 1.2 times, the middle
layer as a sum instead of a product 1.8, rows padded to whole vectors 1.25.
On an H200 (jax 0.11.2), a search of 2-16-16-3 makes 19.9 million candidates a second if the middle
layer is a product; if it is a sum, the kernels alone take the time of 12.6 million.
By scalars, 99 weights (2-16-3) take 1.9 s of compilation and 0.65 us a candidate, by rows 0.2 s
and 0.75 us; 21 weights (2-3-3) 0.5 s and 0.16 us, by rows 0.15 s and 0.41 us.
Slower: by scalars above 130 weights (2-16-16-3: 40 s of compilation, a tenth of the pace) or
above 16 outputs; by scalars with the rows of a block as an axis (faster to compile, but XLA makes
one loop of it at some block sizes only); sums for 64 x 32 weights and more (a tenth of the pace);
tiles by rows beyond the caches; candidates last, with a scan over a layer's inputs or outputs (a
fifth of the pace).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np

from jaxnn.batch import Batch
from jaxnn.model.activations import ACTIVATIONS
from jaxnn.model.layers import VECTOR, Hidden, Params, activations_of, dot
from jaxnn.model.losses import PerExample, Units, sum_of

ROWS_PER_BLOCK = 10
MIN_LANES = 16
"""Fewer candidates than this do not fill a vector: they go through plain `vmap`."""
MAX_SCALARS = 64
"""Networks with more weights than this take long to compile: they take rows last."""
MAX_WRITTEN_OUT = 1024
"""Weights of a layer that is a sum of products by rows on a CPU; larger ones are products."""
MAX_OUTPUTS = 16
"""Outputs are written out one by one; networks with more go through plain `vmap`."""

LossFn = Callable[[Params, Batch], jax.Array]


def with_fast_vmap(plain: LossFn, hidden: Hidden, per_example: PerExample) -> LossFn:
    """Return `plain`, the mean score of one candidate, with a fast `vmap` over params alone."""
    function = jax.custom_batching.custom_vmap(plain)

    @function.def_vmap
    def rule(axis_size: int, mapped: tuple[Params, Batch], params: Params, batch: Batch):
        only_params = all(jax.tree.leaves(mapped[0])) and not any(jax.tree.leaves(mapped[1]))
        layout = plain
        if only_params and axis_size >= MIN_LANES and params[-1].weights.shape[-1] <= MAX_OUTPUTS:
            is_small = _num_weights(params) <= MAX_SCALARS * axis_size
            fast = loss_by_scalars if is_small else loss_by_rows
            layout = partial(fast, hidden=hidden, per_example=per_example)
        axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped)
        return jax.vmap(layout, in_axes=axes)(params, batch), True

    return function


def candidate_bytes(params: Params, batch: Batch) -> int:
    """Return what one candidate adds to the memory of `jax.vmap`, about, in bytes of float32."""
    size, rows = _num_weights(params), np.shape(batch.x)[0]
    if batch_invariant(params, batch):
        return 4 * (size + ROWS_PER_BLOCK)
    return 4 * max(size, rows * max(layer.weights.shape[-1] for layer in params))


def batch_invariant(params: Params, batch: Batch) -> bool:
    """Return whether `jax.vmap` gives a candidate the same bits at every multiple of 16."""
    del batch  # by rows, XLA may order sums by the number of candidates
    return _num_weights(params) <= MAX_SCALARS and params[-1].weights.shape[-1] <= MAX_OUTPUTS


def loss_by_scalars(
    params: Params, batch: Batch, hidden: Hidden, per_example: PerExample
) -> jax.Array:
    """Return the mean score of one candidate, written out weight by weight.

    Rows are added up in order: the relative error is some 1e-7 at 300 rows, and 1e-5 at 10^6.
    """
    layers, activations = [_neurons(*layer) for layer in params], activations_of(hidden, params)
    rows, outputs = batch.x.shape[0], len(layers[-1])

    def add_block(total: jax.Array, block: Batch) -> tuple[jax.Array, None]:
        # Every value below is a scalar. `vmap` turns it into a vector over the candidates, and
        # XLA makes one loop of the whole block, in which they stay in registers. The factors of
        # all rows share one logarithm.
        factors, rests = [], []
        weights = [None] * len(block.x) if block.weights is None else block.weights
        for x, target, weight in zip(block.x, block.y, weights, strict=True):
            values = list(x)
            for layer, neurons in enumerate(layers):
                values = [_neuron(values, *neuron) for neuron in neurons]
                if layer < len(activations):
                    values = [activations[layer].forward(z) for z in values]
            factor, rest = per_example.weighted(values, target, weight)
            factors.append(factor)
            rests.append(rest)
        losses = sum_of(rests)
        if factors[0] is not None:
            losses = losses + jnp.log(reduce(operator.mul, factors))
        return total + losses, None

    size = ROWS_PER_BLOCK
    if per_example.factor_doubles:  # The product of a block's factors has to fit float32.
        size = max(1, min(ROWS_PER_BLOCK, 126 // outputs))
    in_blocks = rows - rows % size
    # A 0 that vmap turns into one for each candidate; else scan traces its body a second time.
    total = jnp.sum(params[0].weights[:0])
    if in_blocks:
        blocks = jax.tree.map(lambda a: a[:in_blocks].reshape(-1, size, *a.shape[1:]), batch)
        total, _ = jax.lax.scan(add_block, total, blocks)
    if in_blocks < rows:
        total, _ = add_block(total, jax.tree.map(lambda a: a[in_blocks:], batch))
    return total / (_total_weight(batch) * (outputs if per_example.per_output else 1))


def loss_by_rows(
    params: Params, batch: Batch, hidden: Hidden, per_example: PerExample
) -> jax.Array:
    """Return the mean score of one candidate, computed with the rows last."""
    # Rows, padded to whole vectors, are the lanes: an array here is `(units, rows)`, and the
    # candidates that `vmap` adds come before both.
    rows = batch.x.shape[0]
    values, targets, weights = jax.tree.map(
        lambda a: jnp.moveaxis(jnp.pad(a, ((0, -rows % VECTOR), *[(0, 0)] * (a.ndim - 1))), 0, -1),
        batch,
    )
    *before, last = params
    activations = activations_of(hidden, params)
    for layer, (dense, activation) in enumerate(zip(before, activations, strict=True)):
        values = activation.forward(_dense(values, *dense))
        if layer < len(before) - 1:  # or XLA computes a value again for each unit it goes to
            values = jax.lax.optimization_barrier(values)
    if last.weights.size > MAX_WRITTEN_OUT:
        logits = list(_dense(values, *last))
    else:  # A list of units lets XLA fuse the last layer with the score.
        logits = [_neuron(list(values), *neuron) for neuron in _neurons(*last)]
    factors, losses = per_example.weighted(logits, targets, weights)
    if factors is not None:
        losses = losses + jnp.log(factors)
    total = jnp.sum(jnp.where(jnp.arange(losses.size) < rows, losses, 0))
    return total / (_total_weight(batch) * (len(logits) if per_example.per_output else 1))


def _total_weight(batch: Batch) -> int | jax.Array:
    """What the rows count together."""
    return batch.x.shape[0] if batch.weights is None else jnp.sum(batch.weights)


def _dense(inputs: jax.Array, weights: jax.Array, biases: jax.Array | None) -> jax.Array:
    z = _product(inputs, weights)
    return z if biases is None else z + biases[:, None]


def _product(inputs: jax.Array, weights: jax.Array) -> jax.Array:
    def by_dot(inputs: jax.Array, weights: jax.Array) -> jax.Array:
        return dot(weights.T, inputs)

    def written_out(inputs: jax.Array, weights: jax.Array) -> jax.Array:
        return sum_of([jnp.outer(w, h) for w, h in zip(weights, inputs, strict=True)])

    if weights.size > MAX_WRITTEN_OUT:
        return by_dot(inputs, weights)
    return jax.lax.platform_dependent(inputs, weights, cpu=written_out, default=by_dot)


def _neurons(weights: jax.Array, biases: jax.Array | None) -> list[tuple[Units, jax.Array | None]]:
    """Return each unit's weights, a scalar an input, and its bias."""
    fan_in, fan_out = weights.shape
    columns = [[weights[i, j] for i in range(fan_in)] for j in range(fan_out)]
    return list(zip(columns, [None] * fan_out if biases is None else list(biases), strict=True))


def _neuron(inputs: Units, column: Units, bias: jax.Array | None) -> jax.Array:
    products = [w * h for w, h in zip(column, inputs, strict=True)]
    return sum_of(products if bias is None else [bias, *products])


def _num_weights(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _right_class(logits: Units, label: jax.Array) -> tuple[None, jax.Array]:
    """1 if the first of the largest logits is the label's and none is nan, else 0."""
    largest, is_right, has_nan = logits[0], label == 0, jnp.isnan(logits[0])
    for number, z in enumerate(logits[1:], start=1):
        is_right = jnp.where(z > largest, label == number, is_right)
        largest, has_nan = jnp.maximum(largest, z), has_nan | jnp.isnan(z)
    return None, (is_right & ~has_nan).astype(largest.dtype)


def _right_sides(logits: Units, targets: jax.Array) -> tuple[None, jax.Array]:
    """How many outputs are on the target's side of 1/2; nan never is."""
    outputs = [ACTIVATIONS["sigmoid"].forward(z) for z in logits]
    pairs = zip(outputs, list(targets), strict=True)
    hits = [((p > 0.5) == (y > 0.5)) & ~jnp.isnan(p) for p, y in pairs]
    return None, sum_of([hit.astype(outputs[0].dtype) for hit in hits])


CATEGORICAL_ACCURACY = PerExample(_right_class)
BINARY_ACCURACY = PerExample(_right_sides, per_output=True)
