"""Compare gradients estimated from losses alone with exact ones.

Prints the cosine between both, in root mean square over many estimates, against the number of
perturbations: for a linear loss, for a network at its start and after a descent. A linear or
quadratic loss in d dimensions has sqrt(n / (n + d - 1)) exactly.

    python scripts/experiments/perturbation_gradients.py
    python scripts/experiments/perturbation_gradients.py --hidden 64 --data spiral --scale 0.1
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import cli
from shared.figures import BLUE, GREEN, ORANGE, Figure, error_bars, plt, save, slide
from shared.intervals import of_mean
from shared.problems import problem_of
from shared.resuming import run_pieces
from shared.runs import finished

import jaxnn

Problem = tuple[Callable[..., jax.Array], Any, Any]
"""A loss, params and a batch."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    cli.add_problem(parser)
    add = parser.add_argument
    add("--pairs", type=cli.at_least(1), nargs="+", default=[4**power for power in range(7)],
        help="Estimate from these numbers of pairs.")  # fmt: skip
    add("--estimates", type=cli.at_least(2), default=1_000, help="Estimate this many times.")
    add("--scale", type=float, default=0.01, help="Perturb by this times a normal.")
    add("--epochs", type=cli.at_least(0), default=200, help="Descend for this many epochs.")
    cli.add_output(parser, json_file=False)
    return parser.parse_args(argv)


def problems(arguments: argparse.Namespace) -> dict[str, Problem]:
    """Return the losses and the params at which gradients are taken."""
    model, batch, (init_key, key), _ = problem_of(arguments, 2)
    start = model.init(init_key, scale=1.0, distribution="he")
    adam = {"num_epochs": arguments.epochs, "optimizer": jaxnn.optimizers.adam(0.05)}
    trained = jaxnn.gradient_descent(key, model.value_and_grad, start, batch, **adam)
    slopes = ravel_pytree(start)[0]
    return {
        "linear loss": (jnp.vdot, slopes, slopes),
        "network, at the start": (model.loss, start, batch),
        f"network, after {arguments.epochs} epochs": (model.loss, finished(trained).params, batch),
    }


def cosines(problem: Problem, num_pairs: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the cosines between estimates and the exact gradient, and the ratio of lengths."""
    loss_fn, params, batch = problem
    exact = ravel_pytree(jax.grad(loss_fn)(params, batch))[0]
    estimate = partial(jaxnn.perturbation_gradient, num_pairs=num_pairs, scale=arguments.scale)
    keys = jax.random.split(jax.random.key(arguments.seed + 1), arguments.estimates)
    gradients = [estimate(key, loss_fn, params, batch) for key in keys]
    found = np.stack([ravel_pytree(gradient)[0] for gradient in gradients])
    lengths, length = np.linalg.norm(found, axis=1), np.linalg.norm(exact)
    squares = np.square(found @ exact / (lengths * length))
    return {
        "pairs": num_pairs,
        "dimensions": len(exact),
        "root_mean_square": float(np.sqrt(np.mean(squares))),
        "interval": np.sqrt(np.clip(of_mean(squares), 0, 1)).tolist(),
        "length_ratio": float(np.median(lengths) / length),
    }


def predicted(num_pairs: Any, dimensions: int) -> Any:
    """Return the root mean square of the cosine on a linear loss."""
    return np.sqrt(num_pairs / (num_pairs + dimensions - 1))


@slide
def draw(found: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """Draw root mean squares against the number of pairs; bars are 95 % intervals."""
    figure, axes = plt.subplots()
    first = next(iter(found.values()))
    pairs = np.geomspace(first[0]["pairs"], first[-1]["pairs"], 200)
    law = predicted(pairs, first[0]["dimensions"])
    axes.plot(pairs, law, "k--", label=r"$\sqrt{n / (n + d - 1)}$")
    styles = zip((BLUE, ORANGE, GREEN), "os^", (0.93, 1, 1.07), strict=True)
    for (name, rows), (color, marker, shift) in zip(found.items(), styles, strict=True):
        middle, ends = ([row[part] for row in rows] for part in ("root_mean_square", "interval"))
        at = [shift * row["pairs"] for row in rows]
        error_bars(axes, at, middle, ends, fmt=marker, color=color, label=name)
    jaxnn.plotting.log_scale(axes, "x")
    axes.set(xlabel="pairs of perturbations n", ylabel="cosine, root mean square")
    axes.set(ylim=(0, 1.03), title=title)
    axes.legend(loc="lower right")
    return figure


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Estimate what is not there yet; print the table and draw the figure."""
    arguments = parse(argv)
    known = problems(arguments)
    unlike = ("pairs", "output", "formats", "dpi")
    settings = {k: v for k, v in vars(arguments).items() if k not in unlike}
    pieces = {
        f"{name}, {num_pairs} pairs": partial(cosines, problem, num_pairs, arguments)
        for name, problem in known.items()
        for num_pairs in arguments.pairs
    }
    pieces = run_pieces(arguments.output / "perturbation-gradients.json", settings, pieces)
    found = {name: [pieces[f"{name}, {n} pairs"] for n in arguments.pairs] for name in known}
    cli.print_table([
        {
            "loss": name,
            "pairs": piece["pairs"],
            "cosine": f"{piece['root_mean_square']:.4f}",
            "95 % interval": "{:.4f} to {:.4f}".format(*piece["interval"]),
            "predicted": f"{predicted(piece['pairs'], piece['dimensions']):.4f}",
        }
        for name, pieces_of in found.items()
        for piece in pieces_of
    ])  # fmt: skip
    sizes = cli.join_sizes((2, *arguments.hidden, 3))
    dimensions = found["linear loss"][0]["dimensions"]
    title = f"Perturbation gradients: {arguments.data}, {sizes}, {dimensions} weights, "
    save(draw(found, title + f"scale {arguments.scale:g}"), arguments, "perturbation-gradients")


if __name__ == "__main__":
    sys.exit(main())
