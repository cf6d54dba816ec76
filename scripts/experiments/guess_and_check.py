"""Guess and check: networks that are right by chance, beside networks that were trained.

Networks 2-u-2 (relu, no hidden biases) are drawn from U(-1, 1) until enough of them get all 11
rows of the kink data right; as many start there and descend (SGD, rate 0.1, 3 rows a step, 200
epochs). How rare are hits, and what do both get right of 30 fresh rows? After Chiang et al.,
"Loss Landscapes are All You Need", ICLR 2023, figure 2.

    python scripts/guess_and_check.py
    python scripts/guess_and_check.py --full
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from command_line import command, count, new_folder, parser_for
from intervals import of_mean, of_share
from problems import kink
from resuming import finished, run_pieces

import jaxnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

TRAIN, TEST = kink(16)[0], kink(100)[1]
RATE, BATCH_SIZE, EPOCHS = 0.1, 3, 200
MOST_GUESSES = 1_000_000
"""Guesses that a hit may take on the average before the search gives up."""
SIDE = 60
"""Points of the maps along x and along y."""
PALE = ListedColormap(plt.get_cmap("PuOr")(np.linspace(0.2, 0.8, 256)))
METHODS = {"guess and check": "#0072B2", "gradient descent": "#D55E00"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[2, 4, 6, 8, 10, 15, 20], help="of the layer")
    add("--hits", type=count, default=10_000, help="to find at each width")
    add("--networks", type=count, default=5_000, help="to train at each width")
    add("--full", action="store_true", help="the paper's counts: 500,000 hits, 50,000 networks")
    add("--seed", type=int, default=0)
    add("--output", type=new_folder, default=Path("output"), help="folder for facts and figures")
    arguments = parser.parse_args(argv)
    if arguments.full:
        arguments.hits, arguments.networks = 500_000, 50_000
    if min(*arguments.widths, arguments.hits, arguments.networks) < 2:
        parser.error("--widths, --hits and --networks must be at least 2")
    return arguments


def network(width: int) -> tuple[jaxnn.Model, jax.tree_util.Partial]:
    """The network and the distribution that guesses and starts are drawn from."""
    model = jaxnn.mlp((2, width, 2), hidden_biases=False)
    return model, model.sampler(distribution="uniform")


def guess(width: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Draws until there are enough hits."""
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
        collect=jaxnn.Collect(threshold=0.0, limit=arguments.hits, stop=True),
        checkpoint=arguments.output / f"guesses-{width}-{arguments.hits}-{arguments.seed}.npz",
    )
    hits = finished(found).collected.index
    low, high = of_share(len(hits), found.num_evaluations, until=found.status == "reached")
    return {
        "guesses": found.num_evaluations,
        "acceptance": len(hits) / found.num_evaluations,
        "acceptance_interval": [low, high],
        **solutions(model, jaxnn.candidate_params(key, sample_fn, hits)),
    }


def descend(width: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains as many networks from the same distribution; those that get all rows right count."""
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
    finished(trained)
    right = np.asarray(jax.vmap(model.accuracy, in_axes=(0, None))(trained.params, TRAIN)) == 1
    solved = jax.tree.map(lambda leaf: leaf[right], trained.params)
    interval = of_share(int(right.sum()), len(right))
    return {
        "solved": float(right.mean()),
        "solved_interval": list(interval),
        **solutions(model, solved),
    }


def solutions(model: jaxnn.Model, params: Any) -> dict[str, Any]:
    """What networks that get all rows right make of fresh rows, and of the plane."""
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
    """At each point of the plane, the share of networks that answer class 0: `(SIDE, SIDE)`."""
    axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
    plane = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)

    @jax.jit
    def total(params: Any, points: jax.Array) -> jax.Array:
        def add(sums: jax.Array, one: Any) -> tuple[jax.Array, None]:
            outputs = model.apply(one, points)
            return sums + (outputs[:, 0] >= outputs[:, 1]).astype(jnp.int32), None

        return jax.lax.scan(add, jnp.zeros(len(points), jnp.int32), params)[0]

    sums = np.asarray(total(params, plane), float)
    return (sums / len(params[0].weights)).reshape(SIDE, SIDE)


def rows_of(facts: dict[str, Any], widths: Sequence[int]) -> list[list[str]]:
    """A row a width."""

    def share(fact: dict[str, Any], name: str, form: str) -> str:
        if fact.get(name) is None:
            return "none"
        low, high = fact.get(f"{name}_interval") or (np.nan, np.nan)
        return f"{fact[name]:{form}} ({low:{form}} to {high:{form}})"

    rows = [["width", "guesses", "hits", "acceptance", "test, hits", "test, trained", "solved"]]
    for width in widths:
        guessed, trained = (facts[f"{method}, width {width}"] for method in METHODS)
        rows.append([
            str(width),
            f"{guessed['guesses']:,}",
            f"{guessed['solutions']:,}",
            share(guessed, "acceptance", ".3g"),
            share(guessed, "test_accuracy", ".4f"),
            share(trained, "test_accuracy", ".4f"),
            share(trained, "solved", ".3f"),
        ])  # fmt: skip
    return rows


def draw_curves(facts: dict[str, Any], widths: Sequence[int]) -> Figure:
    """Acceptance, and accuracy on fresh rows, against the width; bars are 95 % intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    panels = (
        ("acceptance", "share of guesses that get all rows right"),
        ("test_accuracy", "mean accuracy on 30 fresh rows"),
    )
    for ax, (name, label) in zip(axes, panels, strict=True):
        for number, (method, color) in enumerate(METHODS.items()):
            known = [w for w in widths if facts[f"{method}, width {w}"].get(f"{name}_interval")]
            if not known:
                continue
            each = [facts[f"{method}, width {w}"] for w in known]
            middle = np.array([fact[name] for fact in each])
            ends = np.array([fact[f"{name}_interval"] for fact in each])
            bars = np.abs(ends.T - middle)
            style = {"marker": "os"[number], "capsize": 3, "markersize": 5}
            ax.errorbar(known, middle, bars, label=method, color=color, **style)
        ax.set(xlabel="hidden units", ylabel=label, xticks=widths)
        ax.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes[1].legend(frameon=False)
    figure.suptitle("Guess and check on the kink data, 11 rows; 95 % intervals")
    return figure


def draw_maps(facts: dict[str, Any], widths: Sequence[int]) -> Figure:
    """What all solutions together answer, a row a method and a column a width."""
    size = (2.0 * len(widths) + 1.2, 4.6)
    figure, axes = plt.subplots(2, len(widths), figsize=size, layout="constrained", squeeze=False)
    image = None
    for row, method in zip(axes, METHODS, strict=True):
        for ax, width in zip(row, widths, strict=True):
            fact = facts[f"{method}, width {width}"]
            ax.set(xticks=[], yticks=[], xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
            if fact["solutions"]:
                image = ax.imshow(
                    fact["map"], cmap=PALE, vmin=0, vmax=1, origin="lower", extent=(-1, 1, -1, 1)
                )
            for label, marker in ((0, "^"), (1, "o")):
                points = TRAIN.x[TRAIN.y == label]
                ax.scatter(*points.T, s=18, marker=marker, color="black", linewidths=0)
            ax.set_title(f"{width} units\n{fact['solutions']:,} solutions", fontsize=8)
        row[0].set_ylabel(method)
    if image is not None:
        figure.colorbar(image, ax=axes, label="share that answer class 0 (triangles)", shrink=0.8)
    return figure


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not done yet; prints the table and draws the figures."""
    arguments = parse(argv)
    settings = {name: getattr(arguments, name) for name in ("hits", "networks", "seed")}
    find = dict(zip(METHODS, (guess, descend), strict=True))
    pieces = {
        f"{method}, width {width}": partial(find[method], width, arguments)
        for width in arguments.widths
        for method in METHODS
    }
    facts = run_pieces(arguments.output / "guess-and-check.json", settings, pieces)
    rows = rows_of(facts, arguments.widths)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.rjust, row, widths)))
    draws = {"curves": draw_curves, "maps": draw_maps}
    for name, draw in draws.items():
        path = arguments.output / f"guess-and-check-{name}.png"
        draw(facts, arguments.widths).savefig(path, dpi=110)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
