"""A gradient from losses alone: the slopes along random directions, averaged.

With noise `z_i ~ N(0, I)` and both signs of each (antithetic, or mirrored, sampling),

    g = 1 / (2 n s) * sum_i [L(p + s z_i) - L(p - s z_i)] z_i

is an unbiased estimate of the gradient of the loss smoothed by noise of scale `s` (Nesterov and
Spokoiny 2017; Salimans et al. 2017). Where the loss is linear or quadratic over that scale, each
pair gives the exact slope along its noise, and the cosine between `g` and the gradient in `d`
dimensions has root mean square `sqrt(n / (n + d - 1))`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxnn.run import checks
from jaxnn.run.programs import program
from jaxnn.run.random import normals
from jaxnn.typing import LossFn, PyTree

TAG = 0x50475244  # Folded into the key, so that no trainer draws the same from it.
LARGEST_BLOCK, MEMORY_BUDGET = 256, 2**26  # Pairs side by side, and bytes of their noise.


def perturbation_gradient(
    key: jax.Array,
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    num_pairs: int,
    scale: float = 0.01,
) -> PyTree:
    """Estimate the gradient of a loss from pairs of losses on both sides of the params.

    Args:
        key: a typed key, `jax.random.key(seed)`.
        loss_fn: `loss_fn(params, batch)` -> a float scalar.
        params: where to estimate, any pytree of floats of one dtype.
        batch: any pytree that the loss takes.
        num_pairs: number of pairs of losses, 1 to 2^31. They are evaluated in blocks of a power
            of two, at most 256 and fewer if params are large; the last block is padded.
        scale: scale of the noise, above 0. A larger one smooths the loss; a smaller one loses
            the difference of the losses in rounding.

    Returns:
        The estimate, a tree like the params. Pair `i` depends on the key and on `i` alone.

    Raises:
        TypeError: if the loss is not a float scalar.
        ValueError: if a number is out of range, or the params hold no array.

    Example:
        >>> loss_fn = lambda params, batch: jnp.sum((params - batch) ** 2)
        >>> estimate = perturbation_gradient(
        ...     jax.random.key(0), loss_fn, jnp.zeros(2), jnp.ones(2), num_pairs=10_000
        ... )
        >>> bool(jnp.allclose(estimate, -2, atol=0.1))
        True
    """
    key = checks.as_key("key", key)
    params = checks.as_params(params)
    num_pairs = checks.as_count("num_pairs", num_pairs, 1, 2**31)
    step = checks.as_real("scale", scale)
    loss = checks.as_partial("loss_fn", loss_fn)
    batch = checks.as_batch(batch, params, loss_fn)
    checks.check_scalar("loss_fn", checks.shapes_of("loss_fn", loss, params, batch))
    fitting = MEMORY_BUDGET // max(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), 1)
    block = max(min(LARGEST_BLOCK, fitting, num_pairs), 1)
    block = 1 << (block.bit_length() - 1)  # a power of two
    with jax.threefry_partitionable(True):
        stream = jax.random.fold_in(key, TAG)
        numbers = stream, np.uint32(num_pairs), step
        return _estimate(loss, params, batch, numbers, block=block)


@program(static_argnames="block")
def _estimate(
    loss: Partial, params: PyTree, batch: PyTree, numbers: tuple[jax.Array, ...], *, block: int
) -> PyTree:
    stream, num_pairs, scale = numbers
    flat, unravel = ravel_pytree(params)
    dtype = flat.dtype if flat.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)  # of the sums
    lanes = jnp.arange(block, dtype=jnp.uint32)

    # Both losses of a pair share one draw of noise; pairs beyond the last count nothing.
    def pair(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise = normals(jax.random.fold_in(stream, number), flat.size).astype(flat.dtype)
        step = scale.astype(flat.dtype) * noise
        rise = loss(unravel(flat + step), batch) - loss(unravel(flat - step), batch)
        return jnp.where(number < num_pairs, rise, 0).astype(dtype), noise.astype(dtype)

    def add_block(number: jax.Array, total: jax.Array) -> jax.Array:
        rises, noises = jax.vmap(pair)(number * jnp.uint32(block) + lanes)
        return total + jnp.dot(rises, noises, precision=jax.lax.Precision.HIGHEST)

    num_blocks = (num_pairs + jnp.uint32(block - 1)) // jnp.uint32(block)
    total = jax.lax.fori_loop(jnp.uint32(0), num_blocks, add_block, jnp.zeros(flat.shape, dtype))
    mean = total / (2 * scale.astype(dtype) * num_pairs.astype(dtype))
    return unravel(mean.astype(flat.dtype))
