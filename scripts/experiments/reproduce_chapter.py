"""The optimisation chapter, complete: each of its methods, at its sizes and far beyond.

Random search at several scales and counts, perturbation search of 10,000 and 100,000 steps, and
gradient descent, on vertical and on spiral data, each over several seeds with data and a start of
their own, beside the population's Bayes value and on held-out rows. Prints the tables, writes the
line at every improvement to a file, and draws the chapter's plots.

    python scripts/reproduce_chapter.py
    python scripts/reproduce_chapter.py --full
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from command_line import Sizes, command, count, new_folder, parser_for
from problems import DATA
from resuming import finished, run_pieces

import jaxnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

SMALL, LARGE = (2, 3, 3), (2, 64, 3)
LONG = 10**9
"""Candidates of the random search that the chapter gave up."""
STEPS = (10_000, 100_000)
EPOCHS = 10_000
DATA_SETS = ("vertical", "spiral")
RANDOM = "random search, scale {:g}"
PLOTTED = 1_000
"""Steps of the run that is drawn proposal by proposal."""
OPTIMIZERS = {
    "SGD 1.0": partial(jaxnn.optimizers.sgd, 1.0),
    "Adam 0.05": partial(jaxnn.optimizers.adam, 0.05),
}


class Setting(NamedTuple):
    """One seed of one data set: what every method is given."""

    model: jaxnn.Model
    batch: jaxnn.Batch
    held_out: jaxnn.Batch
    params: Any
    key: jax.Array


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--counts", type=count, nargs="+", default=[10**4, 10**5, 10**6, 10**7],
        help="candidates of random search")  # fmt: skip
    add("--scales", type=float, nargs="+", default=[0.05, 0.5, 1, 2, 4, 8], help="of its weights")
    add("--seeds", type=count, default=5, help="of every method")
    add("--full", action="store_true", help="random search of 10^9 candidates too, on one seed")
    add("--output", type=new_folder, default=Path("output"), help="folder for facts and figures")
    arguments = parser.parse_args(argv)
    if min(*arguments.counts, arguments.seeds) < 1:
        parser.error("--counts and --seeds must be at least 1")
    return arguments


def setting(data: str, sizes: Sizes, seed: int) -> Setting:
    """Data, start and key of a seed; the same data for every method and network."""
    data_key, held_out_key, init_key, key = jax.random.split(jax.random.key(seed), 4)
    model = jaxnn.mlp(sizes)
    batch, held_out = DATA[data](data_key, samples=100), DATA[data](held_out_key, samples=20_000)
    return Setting(model, batch, held_out, model.init(init_key), key)


def over_seeds(
    train: Callable[[Setting], Any], data: str, sizes: Sizes, seeds: int
) -> dict[str, Any]:
    """Loss, accuracy and held-out accuracy of every seed; `train(setting)` -> a result."""
    facts: dict[str, Any] = {"evaluations": [], "loss": [], "accuracy": [], "held out": []}
    for seed in range(seeds):
        given = setting(data, sizes, seed)
        result = finished(train(given))
        facts["evaluations"].append(int(result.num_evaluations))
        facts["loss"].append(float(result.loss))
        facts["accuracy"].append(float(given.model.accuracy(result.params, given.batch)))
        facts["held out"].append(float(given.model.accuracy(result.params, given.held_out)))
    return facts


def draw_candidates(
    number: int, scale: float, checkpoint: Path | None, given: Setting
) -> jaxnn.RandomSearchResult:
    """Random search."""
    return jaxnn.random_search(
        given.key,
        given.model.loss,
        given.model.sampler(scale=scale),
        given.batch,
        num_candidates=number,
        checkpoint=checkpoint,
        progress=checkpoint is not None,
    )


def climb(steps: int, given: Setting) -> jaxnn.PerturbationSearchResult:
    """The chapter's chain."""
    return jaxnn.perturbation_search(
        given.key,
        given.model.loss,
        given.params,
        given.batch,
        num_steps=steps,
        scale=0.05,
        metric_fn=given.model.accuracy,
    )


def descend(optimizer: str, given: Setting) -> jaxnn.GradientDescentResult:
    """Descent on all rows."""
    return jaxnn.gradient_descent(
        given.key,
        given.model.value_and_grad,
        given.params,
        given.batch,
        num_epochs=EPOCHS,
        optimizer=OPTIMIZERS[optimizer](),
    )


def name_of(data: str, sizes: Sizes, method: str, amount: int) -> str:
    """The name of a row."""
    return f"{data} | {'-'.join(map(str, sizes))} | {method} | {amount:,}"


def pieces_of(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Everything there is to run, by the name of its row: data, network, method, amount."""
    pieces: dict[str, Callable[[], Any]] = {}

    def add(data: str, sizes: Sizes, method: str, amount: int, train: Any, seeds: int) -> None:
        name = name_of(data, sizes, method, amount)
        pieces[name] = partial(over_seeds, train, data, sizes, seeds)

    for data in DATA_SETS:
        for scale in arguments.scales:
            method = RANDOM.format(scale)
            for number in arguments.counts:
                train = partial(draw_candidates, number, scale, None)
                add(data, SMALL, method, number, train, arguments.seeds)
            if arguments.full:
                checkpoint = arguments.output / f"chapter-{data}-{scale:g}.npz"
                train = partial(draw_candidates, LONG, scale, checkpoint)
                add(data, SMALL, method, LONG, train, 1)
        for steps in STEPS:
            train = partial(climb, steps)
            add(data, SMALL, "perturbation search", steps, train, arguments.seeds)
        for sizes in (SMALL, LARGE):
            for optimizer in OPTIMIZERS:
                method, train = f"gradient descent, {optimizer}", partial(descend, optimizer)
                add(data, sizes, method, EPOCHS, train, arguments.seeds)
    return pieces


def show(facts: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Prints random search, a row a scale and a column a count, and then the other methods."""
    counts = [*arguments.counts, *[LONG] * arguments.full]
    rows = [("data", "scale", *(f"{number:,} candidates" for number in counts))]
    for data in DATA_SETS:
        for scale in arguments.scales:
            found = [facts[name_of(data, SMALL, RANDOM.format(scale), n)] for n in counts]
            cells = (f"{spread(f['loss'])}, {np.median(f['held out']):.3f}" for f in found)
            rows.append((data, f"{scale:g}", *cells))
    print("Random search, 2-3-3: loss, median and range over seeds; held-out accuracy, median")
    print("(the larger counts of a row include the draws of the smaller ones)")
    print_table(rows)
    print("\nThe other methods: medians and ranges over seeds")
    columns = ("loss", "accuracy", "held out")
    others: list[tuple[str, ...]] = [("data", "network", "method", "amount", *columns)]
    for name, fact in facts.items():
        if "random search" not in name:
            others.append((*name.split(" | "), *(spread(fact[column]) for column in columns)))
    bayes = jaxnn.datasets.vertical_bayes(3)
    values = f"{bayes.crossentropy:.3f}", "", f"{bayes.accuracy:.3f}"
    print_table([*others, ("vertical", "", "population Bayes value", "", *values)])


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Prints rows of equal length, columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def write_improvements(arguments: argparse.Namespace) -> Path:
    """Writes the chapter's line at every improvement, of both searches on the first seed."""
    path = arguments.output / "chapter-improvements.txt"
    lines = []
    for data in DATA_SETS:
        given = setting(data, SMALL, 0)
        lines.append(f"random search, scale 0.05, {data}")
        found = draw_candidates(10_000, 0.05, None, given)
        sample_fn = given.model.sampler(scale=0.05)
        for index, loss in zip(found.history.index, found.history.loss, strict=True):
            params = jaxnn.candidate_params(given.key, sample_fn, int(index))
            lines.append(line(int(index), loss, given.model.accuracy(params, given.batch)))
        lines.append(f"perturbation search, {data}")
        climbed = climb(STEPS[0], given)
        for step in np.flatnonzero(climbed.history.accepted):
            metric = climbed.history.proposed_metric
            assert metric is not None
            lines.append(line(step, climbed.history.proposed_loss[step], metric[step]))
    path.write_text("\n".join(lines) + "\n")
    return path


def line(iteration: Any, loss: Any, accuracy: Any) -> str:
    """An improvement."""
    return f"  iteration {iteration:>9,}  loss {loss:.6f}  accuracy {float(accuracy):.3f}"


def draw_counts(facts: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> Figure:
    """Best loss of random search against the count, a line a scale; bars are ranges."""
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(arguments.scales)))
    shifts = np.geomspace(0.85, 1.18, len(arguments.scales))  # or bars hide each other
    counts = np.array([*arguments.counts, *[LONG] * arguments.full])
    for ax, data in zip(panels, DATA_SETS, strict=True):
        for scale, color, shift in zip(arguments.scales, colors, shifts, strict=True):
            found = [facts[name_of(data, SMALL, RANDOM.format(scale), n)] for n in counts]
            middle = np.array([np.median(fact["loss"]) for fact in found])
            ends = np.array([(min(fact["loss"]), max(fact["loss"])) for fact in found])
            ax.errorbar(
                counts * shift, middle, np.abs(ends.T - middle), color=color, marker="o",
                markersize=4, capsize=3, label=f"{scale:g}",
            )  # fmt: skip
        ax.set(xscale="log", xlabel="candidates", title=f"{data}, 2-3-3")
        ax.grid(alpha=0.3)
    bayes = jaxnn.datasets.vertical_bayes(3).crossentropy
    panels[0].axhline(bayes, color="black", linestyle="--", label="population Bayes value")
    panels[0].set_ylabel("best loss: median and range over seeds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title="scale", frameon=False)
    return figure


def draw_proposals() -> Figure:
    """The chapter's two plots: loss, and smoothed accuracy, of every proposal of a short run."""
    figure, axes = plt.subplots(2, 2, figsize=(11.5, 7), layout="constrained")
    for row, data in zip(axes, DATA_SETS, strict=True):
        history = climb(PLOTTED, setting(data, SMALL, 0)).history
        steps = np.arange(PLOTTED)
        curves = {
            "proposed": (steps, history.proposed_loss),
            "best so far": (steps, history.best_loss),
        }
        jaxnn.plotting.loss_curves(curves, row[0], xlabel="iteration").legend(frameon=False)
        accuracies = history.proposed_metric
        assert accuracies is not None
        jaxnn.plotting.smoothed(accuracies, row[1], window=51, ylabel="accuracy of the proposal")
        row[0].set_title(f"perturbation search, {data}")
    return figure


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not done yet; prints the tables and draws the figures."""
    arguments = parse(argv)
    settings = {"seeds": arguments.seeds}
    facts = run_pieces(arguments.output / "chapter.json", settings, pieces_of(arguments))
    show(facts, arguments)
    print(write_improvements(arguments))
    figures = {"random-search": draw_counts(facts, arguments), "proposals": draw_proposals()}
    for name, figure in figures.items():
        path = arguments.output / f"chapter-{name}.png"
        figure.savefig(path, dpi=110)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
