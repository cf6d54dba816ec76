"""Train a model of another library, Flax or Equinox, by the three trainers.

The trainers take any `loss_fn(params, batch)` and any pytree of params, so a module of another
library needs a line or two: Flax splits into its state, Equinox into its arrays.

    pip install --editable '.[models]'
    python scripts/examples/own_model.py --library flax
    python scripts/examples/own_model.py --library equinox
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import cli
from shared.problems import DATA
from shared.runs import finished

import jaxnn

LossAndSampler = tuple[Callable[..., jax.Array], Callable[..., Any]]


def crossentropy(logits: jax.Array, batch: jaxnn.Batch) -> jax.Array:
    """Return the mean over the rows."""
    return jaxnn.losses.softmax_crossentropy(logits, batch.y)


def flax_model(hidden: int) -> LossAndSampler:
    """Return a Flax module as a loss and a sampler of its state."""
    nnx: Any = import_module("flax.nnx")

    def build(key: jax.Array) -> Any:
        streams = nnx.Rngs(key)
        layers = nnx.Linear(2, hidden, rngs=streams), jnp.tanh, nnx.Linear(hidden, 3, rngs=streams)
        return nnx.Sequential(*layers)

    graph = nnx.split(build(jax.random.key(0)))[0]

    def loss_fn(params: Any, batch: jaxnn.Batch) -> jax.Array:
        return crossentropy(nnx.merge(graph, params)(batch.x), batch)

    return loss_fn, lambda key: nnx.to_pure_dict(nnx.split(build(key))[1])


def equinox_model(hidden: int) -> LossAndSampler:
    """Return an Equinox module as a loss and a sampler of its arrays."""
    equinox: Any = import_module("equinox")
    build = partial(equinox.nn.MLP, 2, 3, hidden, depth=1, activation=jnp.tanh)
    static = equinox.partition(build(key=jax.random.key(0)), equinox.is_array)[1]

    def loss_fn(params: Any, batch: jaxnn.Batch) -> jax.Array:
        return crossentropy(jax.vmap(equinox.combine(params, static))(batch.x), batch)

    return loss_fn, lambda key: equinox.filter(build(key=key), equinox.is_array)


LIBRARIES = {"flax": flax_model, "equinox": equinox_model}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add, some = parser.add_argument, cli.at_least(1)
    add("--library", choices=LIBRARIES, default="flax", help="The library of the model.")
    add("--data", choices=DATA, default="spiral", help="The data set to learn.")
    add("--hidden", type=some, default=32, help="The units of the hidden layer.")
    add("--candidates", type=some, default=20_000, help="The candidates of random search.")
    add("--steps", type=some, default=20_000, help="The steps of perturbation search.")
    add("--epochs", type=some, default=5_000, help="The epochs of gradient descent.")
    cli.add_seed(parser)
    return parser.parse_args(argv)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Train the model three ways and print what came out."""
    arguments = parse(argv)
    data_key, init_key, key = jax.random.split(jax.random.key(arguments.seed), 3)
    batch = DATA[arguments.data](data_key, samples=100)
    loss_fn, sample_fn = LIBRARIES[arguments.library](arguments.hidden)
    start, value_and_grad = sample_fn(init_key), jax.value_and_grad(loss_fn)
    rule, optimizer = jaxnn.moves.one_fifth(0.1), jaxnn.optimizers.adam(0.05)
    trainers = {
        "random search": partial(
            jaxnn.random_search, key, loss_fn, sample_fn, num_candidates=arguments.candidates
        ),
        "perturbation search": partial(
            jaxnn.perturbation_search, key, loss_fn, start, num_steps=arguments.steps, scale=rule
        ),
        "gradient descent": partial(
            jaxnn.gradient_descent, key, value_and_grad, start,
            num_epochs=arguments.epochs, optimizer=optimizer,
        ),
    }  # fmt: skip
    for name, train in trainers.items():
        result = finished(train(batch, progress=True))
        print(f"{name:20} {result.status:10} loss {float(result.loss):.4f}")


if __name__ == "__main__":
    sys.exit(main())
