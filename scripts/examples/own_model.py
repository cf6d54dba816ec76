"""A model of another library through the three trainers: Flax or Equinox.

The trainers take any `loss_fn(params, batch)` and any pytree of params, so a module of another
library needs a line or two: Flax splits into its state, Equinox into its arrays.

    pip install --editable '.[models]'
    python scripts/own_model.py --library flax
    python scripts/own_model.py --library equinox
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from command_line import command, count, parser_for
from problems import DATA
from resuming import finished

import jaxnn

LossFn = Callable[..., jax.Array]
"""`loss_fn(params, batch)`."""


def flax_model(hidden: int) -> tuple[LossFn, Callable[..., Any]]:
    """A Flax module as a loss and a sampler of its state."""
    nnx: Any = import_module("flax.nnx")

    def build(key: jax.Array) -> Any:
        streams = nnx.Rngs(key)
        layers = nnx.Linear(2, hidden, rngs=streams), jnp.tanh, nnx.Linear(hidden, 3, rngs=streams)
        return nnx.Sequential(*layers)

    graph = nnx.split(build(jax.random.key(0)))[0]

    def loss_fn(params: Any, batch: jaxnn.Batch) -> jax.Array:
        return crossentropy(nnx.merge(graph, params)(batch.x), batch)

    return loss_fn, lambda key: nnx.to_pure_dict(nnx.split(build(key))[1])


def equinox_model(hidden: int) -> tuple[LossFn, Callable[..., Any]]:
    """An Equinox module as a loss and a sampler of its arrays."""
    equinox: Any = import_module("equinox")

    def build(key: jax.Array) -> Any:
        return equinox.nn.MLP(2, 3, hidden, depth=1, activation=jnp.tanh, key=key)

    static = equinox.partition(build(jax.random.key(0)), equinox.is_array)[1]

    def loss_fn(params: Any, batch: jaxnn.Batch) -> jax.Array:
        return crossentropy(jax.vmap(equinox.combine(params, static))(batch.x), batch)

    return loss_fn, lambda key: equinox.filter(build(key), equinox.is_array)


def crossentropy(logits: jax.Array, batch: jaxnn.Batch) -> jax.Array:
    """The mean over the rows."""
    return jaxnn.losses.softmax_crossentropy(logits, batch.y)


LIBRARIES = {"flax": flax_model, "equinox": equinox_model}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--library", choices=LIBRARIES, default="flax")
    add("--data", choices=DATA, default="spiral")
    add("--hidden", type=count, default=32, help="units of the hidden layer")
    add("--candidates", type=count, default=20_000, help="of random search")
    add("--steps", type=count, default=20_000, help="of perturbation search")
    add("--epochs", type=count, default=5_000, help="of gradient descent")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Trains the model three ways and prints what came out."""
    arguments = parse(argv)
    data_key, init_key, key = jax.random.split(jax.random.key(arguments.seed), 3)
    batch = DATA[arguments.data](data_key, samples=100)
    loss_fn, sample_fn = LIBRARIES[arguments.library](arguments.hidden)
    start = sample_fn(init_key)
    trainers = {
        "random search": lambda: jaxnn.random_search(
            key, loss_fn, sample_fn, batch, num_candidates=arguments.candidates, progress=True
        ),
        "perturbation search": lambda: jaxnn.perturbation_search(
            key, loss_fn, start, batch,
            num_steps=arguments.steps, scale=0.1, adapt_scale=True, progress=True,
        ),
        "gradient descent": lambda: jaxnn.gradient_descent(
            key, jax.value_and_grad(loss_fn), start, batch,
            num_epochs=arguments.epochs, optimizer=jaxnn.optimizers.adam(0.05), progress=True,
        ),
    }  # fmt: skip
    for name, train in trainers.items():
        result = finished(train())
        print(f"{name:20} {result.status:10} loss {float(result.loss):.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
