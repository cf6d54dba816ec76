"""Reproduce the optimization chapter of the book, at its sizes and far beyond.

Random search at several scales and counts, perturbation search of 10,000 and 100,000 steps, and
gradient descent, on vertical and spiral data. Every seed has its own data and its own start. Prints
the tables, draws random search against the count, and writes a line for every improvement.

    python scripts/experiments/reproduce_chapter.py
    python scripts/experiments/reproduce_chapter.py --full
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from compare import OPTIMIZERS, Experiment, climb, descend, draw_candidates, setting_of
from shared import cli
from shared.figures import Figure, colors_of, error_bars, panels, save, slide
from shared.resuming import run_pieces
from shared.runs import finished, improvement_lines

import jaxnn

SMALL, LARGE = (2, 3, 3), (2, 64, 3)
LONG = 10**9
"""Candidates of the random search that the book gave up."""
STEPS, EPOCHS = (10_000, 100_000), 10_000
DATA_SETS = ("vertical", "spiral")
TOP = 1.2
"""The largest loss that is drawn: guessing has log 3, which is 1.1."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add, some = parser.add_argument, cli.at_least(1)
    add("--counts", type=some, nargs="+", default=[10**4, 10**5, 10**6, 10**7],
        help="Search at random over these numbers of candidates.")  # fmt: skip
    add("--scales", type=float, nargs="+", default=[0.05, 0.5, 1, 2, 4, 8],
        help="Search at random at these scales.")  # fmt: skip
    add("--seeds", type=some, default=5, help="Run every method on this many seeds.")
    add("--full", action="store_true", help="Add 10^9 candidates at every scale, on one seed.")
    cli.add_output(parser, json_file=False)
    return parser.parse_args(argv)


def over_seeds(train: Callable[..., Any], experiment: Experiment, seeds: int) -> dict[str, Any]:
    """Return losses and accuracies over the seeds of `train(setting)`."""
    rows = []
    for seed in range(seeds):
        given = setting_of(experiment, seed)
        result = finished(train(given))
        rows.append((result.num_evaluations, result.loss, *given.scores(result.params)))
    names = ("evaluations", "loss", "accuracy", "held out")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def name_of(data: str, method: str, amount: int, sizes: Sequence[int] = SMALL) -> str:
    """Return the name of a piece: data, network, method and amount."""
    return f"{data} | {cli.join_sizes(sizes)} | {method} | {amount:,}"


def random_name(data: str, scale: float, number: int) -> str:
    """Return the name of a random search."""
    return name_of(data, f"random search, scale {scale:g}", number)


def pieces_of(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return everything there is to run, by name."""
    pieces: dict[str, Callable[[], Any]] = {}
    for data in DATA_SETS:
        small, large = (Experiment(data, sizes, 0.05) for sizes in (SMALL, LARGE))
        seeds = arguments.seeds
        for scale in arguments.scales:
            for number in arguments.counts:
                train = partial(draw_candidates, scale=scale, num_candidates=number)
                name = random_name(data, scale, number)
                pieces[name] = partial(over_seeds, train, small, seeds)
            if arguments.full:
                saved = {"checkpoint": arguments.output / f"chapter-{data}-{scale:g}.npz"}
                saved |= {"num_candidates": LONG, "progress": True}
                train = partial(draw_candidates, scale=scale, **saved)
                pieces[random_name(data, scale, LONG)] = partial(over_seeds, train, small, 1)
        for steps in STEPS:
            name = name_of(data, "perturbation search", steps)
            pieces[name] = partial(over_seeds, partial(climb, num_steps=steps), small, seeds)
        for experiment in (small, large):
            for optimizer, given in OPTIMIZERS.items():
                train = partial(descend, optimizer=given, num_epochs=EPOCHS)
                name = name_of(data, f"gradient descent, {optimizer}", EPOCHS, experiment.sizes)
                pieces[name] = partial(over_seeds, train, experiment, seeds)
    return pieces


def show(found: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print random search, a row a scale and a column a count, and then the other methods."""

    def spread(values: Sequence[float]) -> str:
        return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    print("Random search, 2-3-3: loss, median and range over seeds; held-out accuracy, median")
    print("(each column continues the search of the column on its left)")
    rows = []
    for data in DATA_SETS:
        for scale in arguments.scales:
            row = {"data": data, "scale": f"{scale:g}"}
            for number in [*arguments.counts, *[LONG] * arguments.full]:
                piece = found[random_name(data, scale, number)]
                held_out = np.median(piece["held out"])
                row[f"{number:,} candidates"] = f"{spread(piece['loss'])}, {held_out:.3f}"
            rows.append(row)
    cli.print_table(rows)
    print("\nThe other methods: medians and ranges over seeds")
    rows = [
        dict(zip(("data", "network", "method", "amount"), name.split(" | "), strict=True))
        | {column: spread(piece[column]) for column in ("loss", "accuracy", "held out")}
        for name, piece in found.items()
        if "random search" not in name
    ]
    bayes = jaxnn.datasets.vertical_bayes(3)
    values = {"loss": f"{bayes.crossentropy:.3f}", "held out": f"{bayes.accuracy:.3f}"}
    cli.print_table([*rows, {"data": "vertical", "method": "population Bayes value", **values}])


def write_improvements(path: Path) -> None:
    """Write a line for every improvement of both searches on the first seed."""
    lines = []
    for data in DATA_SETS:
        given = setting_of(Experiment(data, SMALL, 0.05), 0)
        lines += [f"random search, scale 0.05, {data}"]
        lines += improvement_lines(draw_candidates(given, 0.05, num_candidates=10_000))
        lines += [f"perturbation search, {data}"]
        lines += improvement_lines(climb(given, num_steps=STEPS[0]))
    path.write_text("\n".join(lines) + "\n")
    print(path)


@slide
def draw(found: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> Figure:
    """Draw the best loss of random search against the count, a line a scale; bars are ranges.

    Bars above TOP leave the picture.
    """
    figure, row = panels(2, 6)
    colors = colors_of(len(arguments.scales))
    shifts = np.geomspace(0.85, 1.18, len(arguments.scales))  # or bars hide each other
    counts = np.array([*arguments.counts, *[LONG] * arguments.full])
    for ax, data in zip(row, DATA_SETS, strict=True):
        marks = itertools.cycle(jaxnn.plotting.MARKERS)
        for scale, color, shift, marker in zip(
            arguments.scales, colors, shifts, marks, strict=False
        ):
            losses = [found[random_name(data, scale, n)]["loss"] for n in counts]
            middle = [np.median(each) for each in losses]
            ends = [(min(each), max(each)) for each in losses]
            style = {"marker": marker, "color": color, "label": f"scale {scale:g}"}
            error_bars(ax, counts * shift, middle, ends, **style)
        jaxnn.plotting.log_scale(ax, "x")
        ax.set(xlabel="candidates", title=f"random search: {data}, 2-3-3")
        if ax.get_ylim()[1] > TOP:
            ax.set_ylim(top=TOP)
            ax.set_title(f"{ax.get_title()}, cut at {TOP:g}")
    bayes = jaxnn.datasets.vertical_bayes(3).crossentropy
    row[0].axhline(bayes, color="black", linestyle="--", label="population Bayes value")
    row[0].set_ylabel("best loss: median and range over seeds")
    jaxnn.plotting.shared_legend(figure)
    return figure


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not done yet; print the tables and draw the figure."""
    arguments = parse(argv)
    settings, path = {"seeds": arguments.seeds}, arguments.output / "chapter.json"
    found = run_pieces(path, settings, pieces_of(arguments))
    show(found, arguments)
    write_improvements(arguments.output / "chapter-improvements.txt")
    save(draw(found, arguments), arguments, "chapter-random-search")


if __name__ == "__main__":
    sys.exit(main())
