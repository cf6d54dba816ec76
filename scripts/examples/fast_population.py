"""What another optimizer gains from `jax.vmap(model.loss)`: evosax, on the same network.

The strategy, its population and the generations are the same; only the loss differs: matrix
products under `vmap`, as anyone would write them, or the `vmap` of a jaxnn model.

    python scripts/fast_population.py
    python scripts/fast_population.py --strategy CMA_ES --population 256
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from command_line import add_problem, command, count, parser_for
from problems import DATA
from search_peers import jax_loss
from turns import Search, take_turns, timed

import jaxnn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add_problem(parser)
    add = parser.add_argument
    add("--strategy", default="Open_ES", help="any of evosax's that starts from a mean")
    add("--population", type=count, default=1_024)
    add("--generations", type=count, default=500)
    add("--repeats", type=count, default=5, help="rounds")
    return parser.parse_args(argv)


def evolve(
    strategy_name: str,
    loss_fn: Callable[..., jax.Array],
    start: Any,
    batch: jaxnn.Batch,
    population: int,
) -> Search:
    """Run that number of generations; return the best loss met."""
    strategies: Any = import_module("evosax.algorithms")
    if not hasattr(strategies, strategy_name):
        raise ValueError(f"--strategy must be one of evosax.algorithms; got {strategy_name}")
    strategy = getattr(strategies, strategy_name)(population, start)
    settings = strategy.default_params
    losses_of = jax.vmap(partial(loss_fn, batch=batch))

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        ask_key, tell_key = jax.random.split(key)
        params, state = strategy.ask(ask_key, state, settings)
        return strategy.tell(tell_key, params, losses_of(params), state, settings)[0], None

    @partial(jax.jit, static_argnums=0)
    def run(generations: int) -> jax.Array:
        init_key, key = jax.random.split(jax.random.key(0))
        state = strategy.init(init_key, start, settings)
        state = jax.lax.scan(step, state, jax.random.split(key, generations))[0]
        return state.best_fitness

    return lambda generations: float(run(generations))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Takes turns with both losses; prints the pace of each and the loss it comes to."""
    arguments = parse(argv)
    data_key, init_key = jax.random.split(jax.random.key(arguments.seed))
    batch = DATA[arguments.data](data_key, samples=arguments.samples)
    batch = jax.tree.map(jnp.asarray, batch)
    model = jaxnn.mlp((2, *arguments.hidden, 3))
    start = model.init(init_key, scale=1.0, distribution="he")
    losses: dict[str, Any] = {"matrix products": jax_loss, "jaxnn": model.loss}
    runs = {
        name: evolve(arguments.strategy, loss_fn, start, batch, arguments.population)
        for name, loss_fn in losses.items()
    }
    for run in runs.values():
        timed(run, arguments.generations)
    turns = {name: (run, arguments.generations) for name, run in runs.items()}
    rates = take_turns(turns, arguments.repeats)
    print(f"evosax {arguments.strategy}, {arguments.population} networks a generation")
    for name, rate in rates.items():
        pace = float(np.median(rate)) * arguments.population
        print(f"{name:16} {pace:>12,.0f} losses/s  best {runs[name](arguments.generations):.4f}")
    ratios = rates["jaxnn"] / rates["matrix products"]
    print(f"ratio {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
