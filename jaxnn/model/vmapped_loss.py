"""The same score for very many weight sets at once: what `jax.vmap(model.loss)` runs.

So does `jax.vmap(model.accuracy)`, which puts another score in the place of a row's loss.

The obvious `vmap` of a small network is a batch of tiny matrix products, which neither CPUs nor
XLA like. Two layouts do better; both are the loss of *one* weight set, which `vmap` maps.

`loss_by_scalars`, for small networks: every weight is a scalar, so the weight sets become the
vector lanes. XLA fuses such a chain of elementwise operations into one loop; a `dot`, a `sum` or
a `logsumexp` over a tiny axis would break the chain. A `scan` walks over blocks of rows.

`loss_by_rows`, for the others: the rows come last and are the lanes. Layers of up to 32 x 32
weights are written out as sums over their inputs, which XLA fuses with what follows; larger ones
are matrix products.

In both a row's loss is `log(factor) + rest`, and one logarithm does for the factors of many rows:
see `row_scores`.

Measured on 2 cores with AVX-512 (jax 0.10.2, 300 rows, softmax, drawing included, 512-bit
vectors), in thousand weight sets a second, plain `vmap` and the layout chosen here: 2-3-3 110 and
3,200; 2-16-16-3 89 and 294; 2-64-64-3 17 and 22; 64-32-10 38 and 58.

What made the difference by scalars, in the loss alone: labels chosen by `where` instead of a
product with one-hot rows, 1.3 times; the running softmax, one exponential fewer a row, 1.2 times;
10 rows a block instead of 6, 1.1 times, and 20 no more than that; 512-bit vectors, 1.6 times.
By rows, on 2-16-16-3: the last layer and the softmax as one loop 1.2 times, the middle layer as a
sum instead of a product 1.8 times, rows padded to whole vectors 1.25 times.

What did not: by scalars above 130 weights (2-16-16-3: 40 s of compilation, a tenth of the pace)
or above 16 outputs; sums in place of products for 64 x 32 weights and more (a tenth of the pace
when the inputs are the data); tiles by rows beyond the caches; candidates last with a scan over
the inputs, or over the outputs, of a layer (a fifth of the pace of `loss_by_rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnn.batch import Batch
from jaxnn.model.activations import ACTIVATIONS
from jaxnn.model.layers import Params
from jaxnn.model.row_scores import OF_CLASSES, RowScore, Values, product_of, row_score, sum_of

ROWS_PER_BLOCK = 10
MIN_LANES = 16
"""Fewer weight sets than this do not fill a vector: they go through plain `vmap`."""
MAX_SCALARS = 128
"""Networks with more weights than this fill more registers than there are: they take rows last."""
MAX_WRITTEN_OUT = 1024
"""Weights of a layer that is a sum of products by rows; larger ones are matrix products."""
VECTOR = 16
"""Rows are padded to a multiple of this, or XLA would do the rest one by one."""
MAX_OUTPUTS = 16
"""Outputs are written out one by one; networks with more go through plain `vmap`."""

LossFn = Callable[[Params, Batch], jax.Array]


def with_fast_vmap(one_set: LossFn, by_scalars: LossFn, by_rows: LossFn) -> LossFn:
    """`one_set`, with a `vmap` rule that maps the same loss in a faster layout.

    Args:
        one_set: the loss of one weight set.
        by_scalars: the same loss, written out weight by weight.
        by_rows: the same loss, rows last.

    Returns:
        A function equal to `one_set`, whose `vmap` over params alone is fast.
    """
    loss = jax.custom_batching.custom_vmap(one_set)

    @loss.def_vmap
    def rule(axis_size: int, mapped: tuple[Params, Batch], params: Params, batch: Batch):
        only_params = all(jax.tree.leaves(mapped[0])) and not any(jax.tree.leaves(mapped[1]))
        layout = one_set
        if only_params and axis_size >= MIN_LANES and params[-1].weights.shape[-1] <= MAX_OUTPUTS:
            layout = by_scalars if _num_weights(params) <= MAX_SCALARS * axis_size else by_rows
        axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped)
        return jax.vmap(layout, in_axes=axes)(params, batch), True

    return loss


def candidate_bytes(params: Params, batch: Batch) -> int:
    """What one weight set adds to the memory that `jax.vmap` of the loss works in, about.

    Args:
        params: tuple of `Dense`; shapes will do.
        batch: inputs `(rows, features)` and targets.

    Returns:
        Bytes, for float32.
    """
    size, rows = _num_weights(params), np.shape(batch.x)[0]
    if batch_invariant(params, batch):
        return 4 * (size + ROWS_PER_BLOCK)
    return 4 * max(size, rows * max(layer.weights.shape[-1] for layer in params))


def batch_invariant(params: Params, batch: Batch) -> bool:
    """Whether `jax.vmap` of the loss gives a weight set the same bits whatever stands beside it.

    By scalars it does, for every multiple of 16 sets; by rows XLA may order sums by their number.

    Args:
        params: tuple of `Dense`; shapes will do.
        batch: inputs `(rows, features)` and targets.
    """
    del batch
    return _num_weights(params) <= MAX_SCALARS and params[-1].weights.shape[-1] <= MAX_OUTPUTS


def loss_by_scalars(params: Params, batch: Batch, hidden: str, output: str, loss: str):
    """The mean loss of one weight set, written out weight by weight.

    Args:
        params: tuple of `Dense`.
        batch: inputs `(rows, features)` and targets.
        hidden: name of the hidden activation.
        output: name of the output activation.
        loss: name of the loss, or "categorical_accuracy", or "binary_accuracy".

    Returns:
        The loss, a scalar; equal to that of the head to rounding. Rows are added up in order, so
        the relative error grows with their number: some 1e-7 at 300 rows, 1e-5 at 10^6.
    """
    dtype = params[0].weights.dtype
    x = jnp.asarray(batch.x).astype(dtype)
    targets = _targets(batch, loss, dtype)
    outputs = params[-1].weights.shape[1]
    row_loss = row_score(output, loss)
    layers = [_unpack(weights, biases) for weights, biases in params]

    def add_block(total, block):
        rows, answers = block
        return total + _block_loss(layers, rows, answers, hidden, row_loss), None

    per_block = _rows_per_block(loss, outputs)
    blocks, rest = divmod(x.shape[0], per_block)
    cut = blocks * per_block
    total = jnp.zeros((), dtype)
    if blocks:
        stacked = tuple(a[:cut].reshape(blocks, per_block, *a.shape[1:]) for a in (x, targets))
        total, _ = jax.lax.scan(add_block, total, stacked)
    if rest:
        total, _ = add_block(total, (x[cut:], targets[cut:]))
    return total / _num_terms(loss, x.shape[0], outputs)


def loss_by_rows(params: Params, batch: Batch, hidden: str, output: str, loss: str):
    """The mean loss of one weight set, rows last: arguments and result as `loss_by_scalars`."""
    dtype = params[0].weights.dtype
    rows = batch.x.shape[0]
    values, targets = (
        jnp.moveaxis(jnp.pad(a, ((0, -rows % VECTOR), *[(0, 0)] * (a.ndim - 1))), 0, -1)
        for a in (jnp.asarray(batch.x).astype(dtype), _targets(batch, loss, dtype))
    )
    *before, last = params
    for layer, (weights, biases) in enumerate(before):
        values = ACTIVATIONS[hidden].forward(_dense(values, weights, biases))
        if layer < len(before) - 1:  # or XLA computes a value again for each unit it goes to
            values = jax.lax.optimization_barrier(values)
    if last.weights.size > MAX_WRITTEN_OUT:
        logits = list(_dense(values, *last))
    else:
        logits = [_neuron(list(values), *unit) for unit in zip(*_unpack(*last), strict=True)]
    factors, rests = row_score(output, loss)(logits, targets)
    losses = rests if factors is None else rests + jnp.log(factors)
    losses = jnp.where(jnp.arange(losses.shape[0]) < rows, losses, 0)
    return jnp.sum(losses) / _num_terms(loss, rows, len(logits))


def _dense(inputs: jax.Array, weights: jax.Array, biases: jax.Array | None) -> jax.Array:
    """Units first, rows last; small matrix products are written out."""
    if weights.size > MAX_WRITTEN_OUT:
        z = weights.T @ inputs
    else:
        z = sum_of([jnp.outer(w, h) for w, h in zip(weights, inputs, strict=True)])
    return z if biases is None else z + biases[:, None]


def _num_weights(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _targets(batch: Batch, loss: str, dtype: Any) -> jax.Array:
    """Classes as integers `(rows,)`, other targets as floats `(rows, outputs)`."""
    targets = jnp.asarray(batch.y)
    if loss == "categorical_accuracy" and targets.ndim == 2:
        return jnp.argmax(targets, axis=1)
    return targets.astype(dtype) if targets.ndim == 2 else targets


def _num_terms(loss: str, rows: int, outputs: int) -> int:
    """How many terms the mean of a loss is over."""
    return rows if loss in OF_CLASSES else rows * outputs


def _rows_per_block(loss: str, outputs: int) -> int:
    """So few rows that the product of their factors, at most 2 an output, fits float32."""
    if loss != "binary_crossentropy":
        return ROWS_PER_BLOCK
    return max(1, min(ROWS_PER_BLOCK, 126 // outputs))


def _unpack(weights: jax.Array, biases: jax.Array | None):
    """Weights as a list of columns of scalars, biases as a list of scalars."""
    fan_in, fan_out = weights.shape
    columns = [[weights[i, j] for i in range(fan_in)] for j in range(fan_out)]
    return columns, [None if biases is None else biases[j] for j in range(fan_out)]


def _block_loss(layers, x: jax.Array, targets: jax.Array, hidden: str, row_loss: RowScore):
    """Sum of the rows' losses, one logarithm for the whole block."""
    factors, rests = [], []
    for row in range(x.shape[0]):
        values = list(x[row])
        for layer, (columns, biases) in enumerate(layers):
            values = [_neuron(values, *neuron) for neuron in zip(columns, biases, strict=True)]
            if layer < len(layers) - 1:
                values = [ACTIVATIONS[hidden].forward(z) for z in values]
        factor, rest = row_loss(values, targets[row])
        factors.append(factor)
        rests.append(rest)
    total = sum_of(rests)
    return total if factors[0] is None else total + jnp.log(product_of(factors))


def _neuron(inputs: Values, column: Values, bias: jax.Array | None) -> jax.Array:
    products = [w * h for w, h in zip(column, inputs, strict=True)]
    return sum_of(products if bias is None else [bias, *products])
