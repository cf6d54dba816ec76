"""What the tests of perturbation search share: losses, the family of methods, the plain loop."""

from functools import cache, partial
from typing import Any, NamedTuple

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
WEIGHTS = jax.random.normal(jax.random.key(4), (6, 257))
NETWORK, WIDE = jaxnn.mlp((2, 2, 3)), jaxnn.mlp((2, 64, 3))
ROWS = jaxnn.datasets.spiral(jax.random.key(1), samples=15)


class Mix(NamedTuple):
    """A batch that says what the loss is, so that nearly all tests run the same programs."""

    stairs: Any = np.float32(1)
    rounded: Any = np.float32(0)
    nan_above: Any = np.float32(np.inf)  # of the first weight
    inf_above: Any = np.float32(np.inf)  # -inf, of the second one
    nan_below: Any = np.float32(-np.inf)  # of the first bias


STAIRS, ROUNDED = Mix(), Mix(np.float32(0), np.float32(1))
"""A loss that float32 holds exactly, whatever the order of its sums, with many ties; and one
whose sums, of a long matrix product, are taken in an order of the compiler's."""
NOWHERE = Mix(nan_below=np.float32(np.inf))


def loss_fn(params, batch):
    flat = ravel_pytree(params)[0]
    stairs = jnp.sum(jnp.square(jnp.round(4 * flat)))
    rounded = jnp.mean(jnp.tanh(flat @ WEIGHTS.astype(flat.dtype)) @ WEIGHTS.T.astype(flat.dtype))
    loss = batch.stairs * stairs + batch.rounded * rounded**2
    loss = jnp.where(params["w"][0, 1] > batch.inf_above, -jnp.inf, loss)
    bad = (params["w"][0, 0] > batch.nan_above) | (params["b"][0] <= batch.nan_below)
    return jnp.where(bad, jnp.nan, loss)


def first_bias(params, batch):
    return params["b"][0]


def fresh(key):
    drawn = 3 * normals(key, 6)
    return {"w": drawn[:4].reshape(2, 2), "b": drawn[4:]}


FAMILY: dict[str, dict[str, Any]] = {  # each option once in the quick tier, and all together
    "strict": {"scale": 0.1},
    "ties": {"temperature": 0.0, "propose_fn": moves.one_coordinate, "scale": 0.1},
    "one-fifth": {"scale": moves.one_fifth(2.0)},
    "metropolis": {"temperature": 20.0},
    "annealing": {
        "temperature": schedules.exponential_decay(40.0, 0.5, 150),
        "scale": schedules.exponential_decay(1.0, 0.05, 150),
    },
    "hot one-fifth": {
        "temperature": 20.0,
        "scale": moves.one_fifth(schedules.inverse_time_decay(1.0, 0.05)),
    },
    "best of three": {"num_proposals": 3},
    "restarts": {"restart": moves.restart(fresh, 20), "scale": 0.01},
    "restarts of two": {"restart": moves.restart(fresh, 15), "num_proposals": 2, "scale": 0.01},
    "all": {
        "temperature": 5.0,
        "scale": moves.one_fifth(0.3),
        "num_proposals": 2,
        "restart": moves.restart(fresh, 25),
        "propose_fn": moves.one_coordinate,
    },
}


def search(
    loss_fn=loss_fn, *, key=KEY, params=START, batch: Any = STAIRS, num_steps=250, **options
) -> Any:
    """`perturbation_search` with the options of a kernel, or with its own."""
    options = {"scale": 0.3, "metric_fn": first_bias, **options}
    if "restart" in options:
        options["patience"] = options.pop("restart")
    return jaxnn.perturbation_search(key, loss_fn, params, batch, num_steps=num_steps, **options)


@cache
def searched(name, num_chains=None, batch=STAIRS) -> Any:
    """A search by a member of the family."""
    return search(**FAMILY[name], num_chains=num_chains, batch=batch)


@cache
def network_search(model, num_chains=None, **options) -> Any:
    """A search from a start near 0, by default by the plain rule."""
    problem = {"params": model.init(jax.random.key(2), scale=0.5), "batch": ROWS}
    options = {"scale": 0.1, **options, **problem}
    return search(model.loss, num_chains=num_chains, metric_fn=None, **options)


def one_by_one(loss_fn=loss_fn, **options) -> Any:
    """A function to the last state and the infos of a chain, one step at a time."""
    kernel = perturbation_kernel(loss_fn, **{"scale": 0.3, **options})

    @partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(key, state, batch):
        return jax.lax.scan(lambda s, _: kernel.step(key, s, batch), state, length=250)

    def scan(params=START, batch=STAIRS, chain=0, state=None):
        if state is None:
            first = init if loss_fn is own else jax.jit(kernel.init)
            state = first(params, batch)
        return jax.tree.map(np.asarray, run(chain_key(KEY, chain), state, batch))

    return scan


own, init = loss_fn, jax.jit(perturbation_kernel(loss_fn, scale=0.3).init)


@cache
def scan_of(name):
    return one_by_one(**FAMILY[name])


def chain_of(result, chain=0):
    """The state of one chain of a result."""
    return jax.tree.map(lambda leaf: leaf[chain], result.state)
