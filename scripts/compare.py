"""Compares random search, perturbation search and gradient descent on the chapter's data.

Each method runs on vertical and on spiral data over several seeds; every seed draws its own data
and its own start. Prints a table and writes the figures.

    python scripts/compare.py
    python scripts/compare.py --seeds 10 --verbose --json comparison.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from command_line import command, new_file, new_folder, write_json
from resuming import finished
from tqdm import tqdm

import jaxnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SAMPLES, CLASSES = 100, 3
HELD_OUT = 20_000
"""Rows a class of the sample on which accuracy is measured again."""


class Experiment(NamedTuple):
    """Data, a network, and the scale at which random search works on them."""

    data: str
    sizes: tuple[int, ...]
    scale: float

    @property
    def title(self) -> str:
        """Data and network in words."""
        return f"{self.data}, {'-'.join(map(str, self.sizes))}"


EXPERIMENTS = (
    Experiment("vertical", (2, 3, 3), scale=4.0),
    Experiment("spiral", (2, 3, 3), scale=1.0),
    Experiment("spiral", (2, 64, 3), scale=0.25),
)


class Method(NamedTuple):
    """A way to train, and how much of it: `train(key, model, params, batch, amount)`."""

    name: str
    amount: int
    train: Callable[..., Any]
    sampling_scale: float = 0.0


class Run(NamedTuple):
    """One method, once."""

    experiment: Experiment
    method: str
    seed: int
    result: Any
    seconds: float
    accuracy: float
    held_out_accuracy: float


def draw(data: str, key: jax.Array, samples: int) -> jaxnn.Batch:
    """Data by name."""
    make = {"vertical": jaxnn.datasets.vertical, "spiral": jaxnn.datasets.spiral}[data]
    return make(key, samples=samples, classes=CLASSES)


def methods(experiment: Experiment, arguments: argparse.Namespace) -> list[Method]:
    """The three methods, random search at two scales and gradient descent by two optimizers."""

    def random_search(scale: float) -> Method:
        def train(key, model, params, batch, amount):
            del params
            sample_fn = model.sampler(scale=scale)
            return jaxnn.random_search(key, model.loss, sample_fn, batch, num_candidates=amount)

        return Method(f"random search, scale {scale:g}", arguments.candidates, train, scale)

    def perturbation_search(key, model, params, batch, amount):
        return jaxnn.perturbation_search(
            key, model.loss, params, batch,
            num_steps=amount, scale=0.05, metric_fn=model.accuracy,
        )  # fmt: skip

    def gradient_descent(name: str, optimizer: jaxnn.optimizers.Optimizer) -> Method:
        def train(key, model, params, batch, amount):
            return jaxnn.gradient_descent(
                key, model.value_and_grad, params, batch, optimizer=optimizer, num_epochs=amount
            )

        return Method(f"gradient descent, {name}", arguments.epochs, train)

    return [
        random_search(0.05),
        random_search(experiment.scale),
        Method("perturbation search", arguments.steps, perturbation_search),
        gradient_descent("SGD 1.0", jaxnn.optimizers.sgd(1.0)),
        gradient_descent("Adam 0.05", jaxnn.optimizers.adam(0.05)),
    ]


def run(experiment: Experiment, method: Method, seed: int, verbose: bool) -> Run:
    """Trains once; the first, tiny run compiles, so that the second is timed without it."""
    data_key, held_out_key, init_key, key = jax.random.split(jax.random.key(seed), 4)
    model = jaxnn.mlp(experiment.sizes)
    batch = draw(experiment.data, data_key, SAMPLES)
    params = model.init(init_key)
    # Tiny, for compilation's sake.
    finished(method.train(key, model, params, batch, 1))
    started = time.perf_counter()
    result = finished(method.train(key, model, params, batch, method.amount))
    seconds = time.perf_counter() - started
    if verbose:
        tqdm.write(f"\n{experiment.title}, seed {seed}, {method.name}")
        for iteration, loss, accuracy in improvements(result, key, model, method, batch):
            tqdm.write(f"  iteration {iteration:>9,}  loss {loss:.6f}  accuracy {accuracy:.3f}")
    accuracy = float(model.accuracy(result.params, batch))
    held_out = draw(experiment.data, held_out_key, HELD_OUT)
    held_out_accuracy = float(model.accuracy(result.params, held_out))
    return Run(experiment, method.name, seed, result, seconds, accuracy, held_out_accuracy)


def improvements(
    result: Any, key: jax.Array, model: jaxnn.Model, method: Method, batch: jaxnn.Batch
) -> Iterator[tuple[int, float, float]]:
    """Iteration, loss and accuracy at each improvement; the searches alone have such a trail."""
    history = result.history
    if isinstance(result, jaxnn.RandomSearchResult):
        sample_fn = model.sampler(scale=method.sampling_scale)
        for index, loss in zip(history.index, history.loss, strict=True):
            params = jaxnn.candidate_params(key, sample_fn, int(index))
            yield int(index), float(loss), float(model.accuracy(params, batch))
    elif isinstance(result, jaxnn.PerturbationSearchResult):
        for step in np.flatnonzero(history.accepted):
            yield int(step), history.proposed_loss[step], history.proposed_metric[step]


def summary(runs: Sequence[Run], bayes: dict[str, jaxnn.datasets.Bayes]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of one method on one experiment."""
    known = bayes.get(runs[0].experiment.data)
    columns = {
        "loss": [run.result.loss for run in runs],
        "accuracy": [run.accuracy for run in runs],
        "held_out_accuracy": [run.held_out_accuracy for run in runs],
        "seconds": [run.seconds for run in runs],
    }
    return {
        "data": runs[0].experiment.data,
        "sizes": runs[0].experiment.sizes,
        "method": runs[0].method,
        "seeds": [run.seed for run in runs],
        "status": [run.result.status for run in runs],
        "evaluations": [run.result.num_evaluations for run in runs],
        **columns,
        "mean": {name: float(np.mean(column)) for name, column in columns.items()},
        "sd": {name: float(np.std(column)) for name, column in columns.items()},
        "bayes_accuracy": known and known.accuracy,
        "bayes_crossentropy": known and known.crossentropy,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summaries as text: mean +- standard deviation over seeds."""
    header = ("data", "network", "method", "evaluations", "seconds", "loss", "accuracy", "held out")
    body = []
    for row in rows:
        cells = [
            f"{row['mean'][c]:.3f} +- {row['sd'][c]:.3f}"
            for c in ("loss", "accuracy", "held_out_accuracy")
        ]
        network = "-".join(map(str, row["sizes"]))
        count = f"{round(np.mean(row['evaluations'])):,}"
        seconds = f"{row['mean']['seconds']:.2f}"
        body.append((row["data"], network, row["method"], count, seconds, *cells))
    known = {row["data"]: row for row in rows if row["bayes_accuracy"] is not None}
    for data, row in known.items():
        values = f"{row['bayes_crossentropy']:.4f}", "", f"{row['bayes_accuracy']:.4f}"
        body.append((data, "", "population Bayes value", "", "", *values))
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (header, *body)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def curve(result: Any) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations and loss on a common, roughly geometric grid, so that seeds have one x."""
    history = result.history
    losses = history.best_loss if hasattr(history, "best_loss") else history.loss
    grid = np.unique(np.geomspace(1, result.num_evaluations, 300).astype(int))
    last = np.searchsorted(history.evaluations, grid, side="right") - 1
    return grid, np.where(last < 0, np.nan, losses[np.maximum(last, 0)])


def share_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend below the panels in place of one beside each."""
    handles, labels = axes[0].get_legend_handles_labels()
    for legend in filter(None, (ax.get_legend() for ax in axes)):
        legend.remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def draw_methods(runs: Sequence[Run], bayes: dict[str, jaxnn.datasets.Bayes]) -> Figure:
    """Loss of every method against evaluations and against seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    by_evaluations: dict[str, list] = {}
    by_seconds: dict[str, list] = {}
    for run in runs:
        evaluations, losses = curve(run.result)
        by_evaluations.setdefault(run.method, []).append((evaluations, losses))
    for method, curves in by_evaluations.items():
        rates = [r.seconds / r.result.num_evaluations for r in runs if r.method == method]
        by_seconds[method] = [(x * np.mean(rates), y) for x, y in curves]
    known = bayes.get(runs[0].experiment.data)
    reference = None if known is None else known.crossentropy
    axis_labels = ("loss evaluations", "seconds, compilation left out")
    for ax, curves, label in zip(axes, (by_evaluations, by_seconds), axis_labels, strict=True):
        jaxnn.plotting.loss_curves(
            curves, ax, xlabel=label, log_x=True, log_y=True, steps=True,
            reference=reference, reference_label="population Bayes value",
        )  # fmt: skip
    axes[1].set_ylabel("")
    share_legend(figure, axes)
    figure.suptitle(f"{runs[0].experiment.title}: every seed, and the median on top")
    return figure


def draw_regions(runs: Sequence[Run]) -> Figure:
    """Decision regions of every method on the first seed's data."""
    first = [run for run in runs if run.seed == runs[0].seed]
    figure, axes = plt.subplots(1, len(first), figsize=(4 * len(first), 4.4), layout="constrained")
    for run, ax in zip(first, axes, strict=True):
        model = jaxnn.mlp(run.experiment.sizes)
        data_key = jax.random.split(jax.random.key(run.seed), 4)[0]
        batch = draw(run.experiment.data, data_key, SAMPLES)
        jaxnn.plotting.decision_regions(partial(model.apply, run.result.params), batch, ax)
        ax.set_title(f"{run.method}\naccuracy {run.accuracy:.3f}")
    share_legend(figure, axes)
    figure.suptitle(f"{first[0].experiment.title}, seed {first[0].seed}")
    return figure


def draw_proposals(run: Run) -> Figure:
    """The chapter's pictures of one perturbation search: loss, on two scales, and accuracy."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    history = run.result.history
    steps = np.arange(len(history.proposed_loss))
    curves = {"proposed": (steps, history.proposed_loss), "best so far": (steps, history.best_loss)}
    for ax, is_log in zip(axes, (False, True), strict=False):
        jaxnn.plotting.loss_curves(curves, ax, xlabel="step", log_y=is_log)
        ax.set_title(f"Loss, {'logarithmic' if is_log else 'linear'}")
    share_legend(figure, axes[:2])
    jaxnn.plotting.smoothed(
        history.proposed_metric, axes[2], window=201, ylabel="accuracy of the proposal"
    )
    figure.suptitle(f"{run.experiment.title}, seed {run.seed}: {run.method}")
    return figure


def draw_all(runs: Sequence[Run], bayes: dict, folder: Path) -> list[Path]:
    """Writes every figure; returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for experiment, group in groupby(runs, key=lambda run: run.experiment):
        members = list(group)
        name = experiment.title.replace(", ", "-")
        search = next(run for run in members if run.method == "perturbation search")
        figures = {
            "methods": draw_methods(members, bayes),
            "regions": draw_regions(members),
            "proposals": draw_proposals(search),
        }
        for kind, figure in figures.items():
            paths.append(folder / f"{kind}-{name}.png")
            figure.savefig(paths[-1], dpi=110)
            plt.close(figure)
    return paths


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--candidates", type=int, default=20_000, help="of random search")
    parser.add_argument("--steps", type=int, default=10_000, help="of perturbation search")
    parser.add_argument("--epochs", type=int, default=10_000, help="of gradient descent")
    parser.add_argument(
        "--output", type=new_folder, default=Path("output"), help="folder for figures"
    )
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="write the table's facts here"
    )
    parser.add_argument("--verbose", action="store_true", help="print every improvement")
    arguments = parser.parse_args(argv)
    for name in ("seeds", "candidates", "steps", "epochs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(arguments, name)}")
    return arguments


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    arguments = parse(argv)
    bayes = {"vertical": jaxnn.datasets.vertical_bayes(CLASSES)}
    work = [
        (experiment, method, seed)
        for experiment in EXPERIMENTS
        for method in methods(experiment, arguments)
        for seed in range(arguments.seeds)
    ]
    runs = [run(*each, arguments.verbose) for each in tqdm(work, unit=" runs")]
    groups = groupby(runs, key=lambda run: (run.experiment, run.method))
    rows = [summary(list(group), bayes) for _, group in groups]
    print(table(rows))
    for path in draw_all(runs, bayes, arguments.output):
        print(path)
    write_json(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
