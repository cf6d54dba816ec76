"""Measure what another optimizer gains from `jax.vmap(model.loss)`: evosax, on the same network.

The strategy, its population and the generations are the same; only the loss differs: matrix
products under `vmap`, as anyone would write them, or the `vmap` of a jaxnn model.

    python scripts/benchmarks/fast_population.py
    python scripts/benchmarks/fast_population.py --strategy CMA_ES --population 256
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from peers.search import evosax_run, jax_loss
from shared import cli
from shared.problems import problem_of
from shared.timing import take_turns


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    cli.add_problem(parser)
    add, some = parser.add_argument, cli.at_least(1)
    add("--strategy", default="Open_ES", help="A strategy of evosax that starts from a mean.")
    add("--population", type=some, default=1_024, help="The networks of a generation.")
    add("--generations", type=some, default=500, help="The generations.")
    add("--repeats", type=some, default=5, help="The rounds.")
    return parser.parse_args(argv)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Take turns with both losses; print the pace of each and the loss it reaches."""
    arguments = parse(argv)
    model, batch, (init_key,), _ = problem_of(arguments, 1)
    start = model.init(init_key, scale=1.0, distribution="he")
    strategies: Any = import_module("evosax.algorithms")
    if not hasattr(strategies, arguments.strategy):
        raise ValueError(f"--strategy must be in evosax.algorithms; got {arguments.strategy}")
    strategy = getattr(strategies, arguments.strategy)(arguments.population, start)
    batch = jax.tree.map(jnp.asarray, batch)
    losses = {"matrix products": jax_loss, "jaxnn": model.loss}
    runs = {
        name: evosax_run(strategy, jax.vmap(partial(loss_fn, batch=batch)), start)
        for name, loss_fn in losses.items()
    }
    best = {name: float(run(arguments.generations)) for name, run in runs.items()}  # compiles
    turns = {name: (run, arguments.generations) for name, run in runs.items()}
    rates = take_turns(turns, arguments.repeats)
    print(f"evosax {arguments.strategy}, {arguments.population} networks a generation")
    for name, rate in rates.items():
        pace = float(np.median(rate)) * arguments.population
        print(f"{name:16} {pace:>12,.0f} losses/s  best {best[name]:.4f}")
    ratios = rates["jaxnn"] / rates["matrix products"]
    print(f"ratio {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})")


if __name__ == "__main__":
    sys.exit(main())
