"""What the tests of perturbation search share: losses, the family of methods, the plain loop."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import jaxnn
from jaxnn import moves, schedules
from jaxnn.chains import COMPILER_OPTIONS, chain_key, perturbation_kernel
from jaxnn.run.random import normals

KEY = jax.random.key(5)
START = {
    "w": np.array([[2.5, -1.0], [0.5, 3.0]], np.float32),
    "b": np.array([1.5, -2.0], np.float32),
}
SHIFT = np.float32(0)
WEIGHTS = jax.random.normal(jax.random.key(4), (6, 257))
NETWORK, WIDE = jaxnn.mlp((2, 3, 3)), jaxnn.mlp((2, 64, 3))
ROWS = jaxnn.datasets.spiral(jax.random.key(1), samples=15)


def stairs(params, batch):
    """A loss that float32 holds exactly, whatever the order of its sums; it has many ties."""
    steps = jax.tree.map(lambda leaf: jnp.square(jnp.round(4 * leaf)), params)
    return jnp.sum(steps["w"]) + jnp.sum(steps["b"]) + 0 * batch


def rounded(params, batch):
    """A loss whose sums, of a long matrix product, are taken in an order of the compiler's."""
    flat = ravel_pytree(params)[0]
    return jnp.mean(jnp.tanh(flat @ WEIGHTS) @ WEIGHTS.T) ** 2 + batch


def first_bias(params, batch):
    return params["b"][0] - batch


def fresh(key):
    drawn = 3 * normals(key, 6)
    return {"w": drawn[:4].reshape(2, 2), "b": drawn[4:]}


FAMILY: dict[str, dict[str, Any]] = {
    "strict": {},
    "ties": {"temperature": 0.0},
    "one-fifth": {"scale": moves.one_fifth(2.0)},
    "schedule": {"scale": schedules.inverse_time_decay(1.0, 0.05)},
    "metropolis": {"temperature": 20.0},
    "annealing": {"temperature": schedules.exponential_decay(40.0, 0.5, 150)},
    "hot one-fifth": {
        "temperature": 20.0,
        "scale": moves.one_fifth(schedules.inverse_time_decay(1.0, 0.05)),
    },
    "best of three": {"num_proposals": 3},
    "restarts": {"restart": moves.restart(fresh, 20)},
    "restarts of two": {"restart": moves.restart(fresh, 15), "num_proposals": 2, "scale": 0.01},
    "one coordinate": {"propose_fn": moves.one_coordinate},
    "all": {
        "temperature": 5.0,
        "scale": moves.one_fifth(0.3),
        "num_proposals": 2,
        "restart": moves.restart(fresh, 25),
        "propose_fn": moves.one_coordinate,
    },
}


def search(
    loss_fn=stairs, *, key=KEY, params=START, batch: Any = SHIFT, num_steps=250, **options
) -> Any:
    """`perturbation_search` with the options of a kernel, or with its own."""
    options = {"scale": 0.3, **options}
    if "restart" in options:
        options["patience"] = options.pop("restart")
    return jaxnn.perturbation_search(key, loss_fn, params, batch, num_steps=num_steps, **options)


def scan(loss_fn=stairs, *, params=START, batch=SHIFT, num_steps=250, chain=0, state=None,
         **options) -> Any:  # fmt: skip
    """The last state and the infos of a chain, one step at a time."""
    kernel = perturbation_kernel(loss_fn, **{"scale": 0.3, **options})
    key = chain_key(KEY, chain)

    @partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(state):
        return jax.lax.scan(lambda s, _: kernel.step(key, s, batch), state, length=num_steps)

    return run(jax.jit(kernel.init)(params, batch) if state is None else state)


def same(one, other):
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(
        np.array_equal(a, b, equal_nan=True) if not isinstance(a, str) else a == b
        for a, b in zip(leaves, others, strict=True)
    )


def chain_of(result, chain=0):
    """The state of one chain of a result."""
    return jax.tree.map(lambda leaf: leaf[chain], result.state)
