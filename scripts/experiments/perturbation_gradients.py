"""A gradient from losses alone beside the exact one: how alike, for how many perturbations?

The cosine between both, for a linear loss and for the network at its start and after a descent,
against the number of perturbations, in root mean square over many estimates. A linear loss in d
dimensions has sqrt(n / (n + d - 1)) exactly, and so has a quadratic one.

    python scripts/perturbation_gradients.py
    python scripts/perturbation_gradients.py --hidden 64 --data spiral --scale 0.1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from command_line import add_output, add_problem, command, count, parser_for, write_json
from intervals import of_mean
from jax.flatten_util import ravel_pytree
from problems import DATA
from resuming import finished, run_pieces

import jaxnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

COLORS, MARKERS = ("#0072B2", "#D55E00", "#009E73"), "os^"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add_problem(parser)
    add = parser.add_argument
    add("--pairs", type=count, nargs="+", default=[4**power for power in range(7)])
    add("--estimates", type=count, default=1_000, help="of each number of pairs")
    add("--scale", type=float, default=0.01, help="of the perturbations")
    add("--epochs", type=count, default=200, help="of the descent")
    add_output(parser)
    arguments = parser.parse_args(argv)
    if min(arguments.pairs) < 1 or arguments.estimates < 2:
        parser.error("--pairs must be at least 1 and --estimates at least 2")
    return arguments


Problem = tuple[Callable[..., jax.Array], Any, Any]
"""A loss, params, and a batch."""


def problems(arguments: argparse.Namespace) -> dict[str, Problem]:
    """Where gradients are taken."""
    data_key, init_key, key = jax.random.split(jax.random.key(arguments.seed), 3)
    batch = DATA[arguments.data](data_key, samples=arguments.samples)
    model = jaxnn.mlp((2, *arguments.hidden, 3))
    start = model.init(init_key, scale=1.0, distribution="he")
    trained = jaxnn.gradient_descent(
        key,
        model.value_and_grad,
        start,
        batch,
        num_epochs=arguments.epochs,
        optimizer=jaxnn.optimizers.adam(0.05),
    )
    slopes = ravel_pytree(start)[0]
    return {
        "linear loss": (jnp.vdot, slopes, slopes),
        "network, at the start": (model.loss, start, batch),
        f"network, after {arguments.epochs} epochs": (model.loss, finished(trained).params, batch),
    }


def cosines(problem: Problem, num_pairs: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Cosines between estimates and the exact gradient, and how long both are."""
    loss_fn, params, batch = problem
    exact = ravel_pytree(jax.grad(loss_fn)(params, batch))[0]
    found, lengths = [], []
    for key in jax.random.split(jax.random.key(arguments.seed + 1), arguments.estimates):
        estimate = jaxnn.perturbation_gradient(
            key, loss_fn, params, batch, num_pairs=num_pairs, scale=arguments.scale
        )
        flat = ravel_pytree(estimate)[0]
        lengths.append(float(jnp.linalg.norm(flat)))
        found.append(float(jnp.vdot(flat, exact)) / (lengths[-1] * float(jnp.linalg.norm(exact))))
    squares = np.square(found)
    ends = np.sqrt(np.clip(of_mean(squares), 0, 1))
    return {
        "pairs": num_pairs,
        "dimensions": len(exact),
        "root_mean_square": float(np.sqrt(np.mean(squares))),
        "interval": ends.tolist(),
        "length_ratio": float(np.median(lengths)) / float(jnp.linalg.norm(exact)),
    }


def predicted(num_pairs: Any, dimensions: int) -> Any:
    """Root mean square of the cosine on a linear loss."""
    return np.sqrt(num_pairs / (num_pairs + dimensions - 1))


def draw(facts: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """Root mean square against the number of pairs; bars are 95 % intervals."""
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    first = next(iter(facts.values()))
    pairs = np.geomspace(first[0]["pairs"], first[-1]["pairs"], 200)
    law = predicted(pairs, first[0]["dimensions"])
    axes.plot(pairs, law, "k--", label=r"$\sqrt{n / (n + d - 1)}$")
    for (name, rows), color, marker, shift in zip(
        facts.items(), COLORS, MARKERS, (0.93, 1, 1.07), strict=True
    ):
        middle = np.array([row["root_mean_square"] for row in rows])
        bars = np.abs(np.transpose([row["interval"] for row in rows]) - middle)
        at = shift * np.array([row["pairs"] for row in rows])
        style = {"fmt": marker, "capsize": 3, "markersize": 5}
        axes.errorbar(at, middle, bars, color=color, label=name, **style)
    axes.set(xscale="log", xlabel="pairs of perturbations n", ylabel="cosine, root mean square")
    axes.set(ylim=(0, 1.03), title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    return figure


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Estimates what is not there yet; prints the table and draws the figure."""
    arguments = parse(argv)
    known = problems(arguments)
    facts = {}
    settings = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("pairs", "output", "json")
    }
    pieces = {
        f"{name}, {num_pairs} pairs": partial(cosines, problem, num_pairs, arguments)
        for name, problem in known.items()
        for num_pairs in arguments.pairs
    }
    found = run_pieces(arguments.output / "perturbation-gradients.json", settings, pieces)
    print(f"{'loss':28} {'pairs':>7} {'cosine':>8}  {'95 % interval':16} {'predicted':>9}")
    for name in known:
        facts[name] = [found[f"{name}, {num_pairs} pairs"] for num_pairs in arguments.pairs]
        for row in facts[name]:
            law = predicted(row["pairs"], row["dimensions"])
            low, high = row["interval"]
            print(
                f"{name:28} {row['pairs']:>7,} {row['root_mean_square']:>8.4f}  "
                f"{low:.4f} to {high:.4f} {law:>9.4f}"
            )
    sizes = "-".join(map(str, (2, *arguments.hidden, 3)))
    dimensions = facts["linear loss"][0]["dimensions"]
    title = f"Perturbation gradients, {sizes} on {arguments.data}: {dimensions} weights"
    path = arguments.output / "perturbation-gradients.png"
    draw(facts, title).savefig(path, dpi=110)
    print(path)
    write_json(arguments.json, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
