"""Compare networks that are right by chance with networks that were trained: guess and check.

Networks 2-u-2 (relu, no hidden biases) are drawn from U(-1, 1) until enough of them get all 11 rows
of the kink data right. Others start there and descend (SGD, rate 0.1, 3 rows a step, 200 epochs).
How rare are hits, and how many of 30 fresh rows do both get right? After figure 2 of Chiang et al.,
"Loss Landscapes are All You Need", ICLR 2023.

    python scripts/experiments/guess_and_check.py
    python scripts/experiments/guess_and_check.py --full
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import cli
from shared.figures import BLUE, ORANGE, Figure, error_bars, panels, plt, save, slide
from shared.intervals import of_mean, of_share
from shared.problems import kink
from shared.resuming import run_pieces
from shared.runs import finished

import jaxnn

TRAIN, TEST = kink(16)[0], kink(100)[1]
RATE, BATCH_SIZE, EPOCHS = 0.1, 3, 200
MOST_GUESSES = 1_000_000
"""Guesses that a hit may take on average before the search gives up."""
SIDE = 60
"""Points of the maps along each axis."""
METHODS = {"guess and check": BLUE, "gradient descent": ORANGE}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add, some = parser.add_argument, cli.at_least(2)
    add("--widths", type=some, nargs="+", default=[2, 4, 6, 8, 10, 15, 20],
        help="The hidden units of the networks.")  # fmt: skip
    add("--hits", type=some, default=10_000, help="Find this many hits at each width.")
    add("--networks", type=some, default=5_000, help="Train this many networks at each width.")
    add("--full", action="store_true", help="Find 500,000 and train 50,000, as the paper does.")
    cli.add_seed(parser)
    cli.add_output(parser, json_file=False)
    arguments = parser.parse_args(argv)
    if arguments.full:
        arguments.hits, arguments.networks = 500_000, 50_000
    return arguments


def network(width: int) -> tuple[jaxnn.Model, Any]:
    """Return the network and the distribution of guesses and starts."""
    model = jaxnn.mlp((2, width, 2), hidden_biases=False)
    return model, model.sampler(distribution="uniform")


def guess(width: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw networks until there are enough hits."""
    model, sample_fn = network(width)
    key = jax.random.fold_in(jax.random.key(arguments.seed), width)

    def error_rate(params: Any, batch: jaxnn.Batch) -> jax.Array:
        return 1 - model.accuracy(params, batch)

    found = jaxnn.random_search(
        key,
        error_rate,
        sample_fn,
        TRAIN,
        num_candidates=arguments.hits * MOST_GUESSES,
        thresholds=[0.0],
        collect=jaxnn.Collect(threshold=0.0, limit=arguments.hits, stop=True),
        checkpoint=arguments.output / f"guesses-{width}-{arguments.hits}-{arguments.seed}.npz",
    )
    hits, counts = finished(found).collected.candidate, found.counts
    return {
        "guesses": found.num_evaluations,
        "acceptance": len(hits) / found.num_evaluations,
        "acceptance_interval": [float(counts.low[0]), float(counts.high[0])],
        **solutions(model, jaxnn.candidate_params(key, sample_fn, hits)),
    }


def descend(width: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train networks from the same distribution, and keep those that get all rows right."""
    model, sample_fn = network(width)
    start_key, key = jax.random.split(jax.random.fold_in(jax.random.key(arguments.seed), width))
    trained = jaxnn.gradient_descent(
        key,
        model.value_and_grad,
        jax.vmap(sample_fn)(jax.random.split(start_key, arguments.networks)),
        TRAIN,
        num_networks=arguments.networks,
        num_epochs=EPOCHS,
        learning_rate=RATE,
        batch_size=BATCH_SIZE,
        drop_remainder=False,
    )
    params = finished(trained).params
    right = np.asarray(jax.vmap(model.accuracy, in_axes=(0, None))(params, TRAIN)) == 1
    return {
        "solved": float(right.mean()),
        "solved_interval": list(of_share(int(right.sum()), len(right))),
        **solutions(model, jax.tree.map(lambda leaf: leaf[right], params)),
    }


def solutions(model: jaxnn.Model, params: Any) -> dict[str, Any]:
    """Measure networks that get all rows right on fresh rows and on the plane."""
    number = len(params[0].weights)
    if not number:
        return {"solutions": 0}
    shares = np.asarray(jax.vmap(model.accuracy, in_axes=(0, None))(params, TEST))
    losses = np.asarray(jax.vmap(model.loss, in_axes=(0, None))(params, TRAIN))
    low, high = np.clip(of_mean(shares), 0, 1).tolist()
    return {
        "solutions": number,
        "test_accuracy": float(shares.mean()),
        "test_accuracy_interval": None if np.isnan(low) else [low, high],
        "median_loss": float(np.median(losses)),
        "map": np.round(share_of_class_0(model, params), 3).tolist(),
    }


def share_of_class_0(model: jaxnn.Model, params: Any) -> np.ndarray:
    """Return, at each point of the plane, the share of networks that answer class 0."""
    axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
    plane = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)

    @jax.jit
    def total(params: Any, points: jax.Array) -> jax.Array:
        def add(sums: jax.Array, one: Any) -> tuple[jax.Array, None]:
            outputs = model.apply(one, points)
            return sums + (outputs[:, 0] >= outputs[:, 1]).astype(jnp.int32), None

        return jax.lax.scan(add, jnp.zeros(len(points), jnp.int32), params)[0]

    return np.asarray(total(params, plane)).reshape(SIDE, SIDE) / len(params[0].weights)


def row_of(width: int, guessed: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table."""

    def share(piece: dict[str, Any], name: str, form: str) -> str:
        if piece.get(name) is None:
            return "none"
        low, high = piece.get(f"{name}_interval") or (np.nan, np.nan)
        return f"{piece[name]:{form}} ({low:{form}} to {high:{form}})"

    return {
        "width": width,
        "guesses": guessed["guesses"],
        "hits": guessed["solutions"],
        "acceptance": share(guessed, "acceptance", ".3g"),
        "test, hits": share(guessed, "test_accuracy", ".4f"),
        "test, trained": share(trained, "test_accuracy", ".4f"),
        "solved": share(trained, "solved", ".3f"),
    }


@slide
def draw_curves(found: dict[str, Any], widths: Sequence[int]) -> Figure:
    """Draw acceptance and fresh accuracy against the width; bars are 95 % intervals."""
    figure, axes = panels(2, 6)
    labels = ("share of guesses that get all rows right", "mean accuracy on 30 fresh rows")
    for ax, name, label in zip(axes, ("acceptance", "test_accuracy"), labels, strict=True):
        for marker, (method, color) in zip("os", METHODS.items(), strict=True):
            pieces = {width: found[f"{method}, width {width}"] for width in widths}
            known = {w: piece for w, piece in pieces.items() if piece.get(f"{name}_interval")}
            if known:
                middle = [piece[name] for piece in known.values()]
                ends = [piece[f"{name}_interval"] for piece in known.values()]
                style = {"marker": marker, "color": color, "label": method}
                error_bars(ax, list(known), middle, ends, **style)
        ax.set(xlabel="hidden units", ylabel=label, xticks=widths)
    axes[0].set_ylim(bottom=0)
    axes[0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    jaxnn.plotting.shared_legend(figure)
    figure.suptitle("Guess and check on the kink data, 11 rows, networks 2-u-2; 95 % intervals")
    return figure


@slide
def draw_maps(found: dict[str, Any], widths: Sequence[int]) -> Figure:
    """Draw what all solutions together answer, a row a method and a column a width."""
    size = (plt.rcParams["figure.figsize"][0], 5)
    figure, axes = plt.subplots(2, len(widths), figsize=size, squeeze=False)
    style = {"cmap": "cividis", "vmin": 0, "vmax": 1, "origin": "lower"}
    image = None
    for row, method in zip(axes, METHODS, strict=True):
        for ax, width in zip(row, widths, strict=True):
            piece = found[f"{method}, width {width}"]
            ax.set(xticks=[], yticks=[], xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
            if piece["solutions"]:
                image = ax.imshow(piece["map"], extent=(-1, 1, -1, 1), **style)
            for label, marker in ((0, "^"), (1, "o")):
                points = TRAIN.x[TRAIN.y == label]
                ax.scatter(*points.T, marker=marker, color="white", edgecolors="black")
            ax.set_title(f"{width} units\n{piece['solutions']:,} found")
        row[0].set_ylabel(method)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label("share that answer class 0 (triangles)")
    figure.suptitle("What all solutions answer together: kink data, networks 2-u-2")
    return figure


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done yet; print the table and draw the figures."""
    arguments = parse(argv)
    settings = {name: getattr(arguments, name) for name in ("hits", "networks", "seed")}
    find = dict(zip(METHODS, (guess, descend), strict=True))
    pieces = {
        f"{method}, width {width}": partial(find[method], width, arguments)
        for width in arguments.widths
        for method in METHODS
    }
    found = run_pieces(arguments.output / "guess-and-check.json", settings, pieces)
    cli.print_table([
        row_of(width, *(found[f"{method}, width {width}"] for method in METHODS))
        for width in arguments.widths
    ])  # fmt: skip
    save(draw_curves(found, arguments.widths), arguments, "guess-and-check-curves")
    save(draw_maps(found, arguments.widths), arguments, "guess-and-check-maps")


if __name__ == "__main__":
    sys.exit(main())
