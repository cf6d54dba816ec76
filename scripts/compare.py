"""Compare random search, perturbation search and gradient descent on vertical and spiral data.

Each method runs several times; every seed has its own data and its own start. Prints a table and
draws the figures.

    python scripts/compare.py
    python scripts/compare.py --seeds 10 --verbose --json comparison.json

A CSV file takes the place of the data; every seed holds out another quarter of its rows.

    python scripts/compare.py --data iris.csv --target species --standardise --hidden 16
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from shared import cli
from shared.figures import Figure, dots, panels, save, slide
from shared.problems import DATA, csv_of, has_regions, model_of, score_of, split
from shared.runs import finished, improvement_lines, timed
from tqdm.auto import tqdm

import jaxnn
from jaxnn.typing import traits_of

SAMPLES, CLASSES = 100, 3
BOOK_SCALE = 0.05
"""The scale of the book's weights, and of its perturbations."""
FIRST = {"loss evaluations": 10.0, "seconds, compilation left out": 1e-3}
"""Where the curves begin: no call of a compiled function takes less than about a millisecond."""
CONSTANT = (
    "Such networks answer nearly alike on every row. A descent is still on its first plateau, or\n"
    "all hidden relu units are off. More epochs, a larger start (--start he of\n"
    "gradient_descent.py) or another seed may help."
)
NEAR = 10
"""Medians that differ by a larger factor than this need more than one panel."""
HELD_OUT = 20_000
"""Fresh rows a class, on which accuracy is measured again."""
BAYES = {"vertical": jaxnn.datasets.vertical_bayes(CLASSES)}
OPTIMIZERS = {"SGD 1.0": jaxnn.optimizers.sgd(1.0), "Adam 0.05": jaxnn.optimizers.adam(0.05)}


class Experiment(NamedTuple):
    """Data, a network, and a scale at which random search works on them."""

    data: str
    sizes: cli.Sizes
    scale: float
    table: jaxnn.datasets.Table | None = None

    @property
    def title(self) -> str:
        """Return data and network in words."""
        return cli.title_of(self.data, self.sizes)

    @property
    def model(self) -> jaxnn.Model:
        """Return the network."""
        if self.table is not None:
            return model_of(self.sizes[1:-1], self.table)
        return jaxnn.mlp(self.sizes)


EXPERIMENTS = (
    Experiment("vertical", (2, 3, 3), scale=4.0),
    Experiment("spiral", (2, 3, 3), scale=1.0),
    Experiment("spiral", (2, 64, 3), scale=0.25),
)


class Setting(NamedTuple):
    """What a method is given on one seed."""

    key: jax.Array
    model: jaxnn.Model
    params: Any
    batch: jaxnn.Batch
    held_out: jaxnn.Batch

    def scores(self, params: Any) -> tuple[float, float]:
        """Return the score on the rows trained on, and on fresh rows."""
        metric_fn = score_of(self.model)[1]
        return float(metric_fn(params, self.batch)), float(metric_fn(params, self.held_out))


Method = tuple[Any, str, int]
"""`train`, `amount` and `number`: `train(setting, **{amount: number})` returns a result."""


class Run(NamedTuple):
    """One method, once."""

    experiment: Experiment
    method: str
    seed: int
    result: Any
    seconds: float
    score: float
    held_out_score: float
    constant_loss: float


def setting_of(experiment: Experiment, seed: int) -> Setting:
    """Draw or split data, and draw a start; they depend on the seed alone."""
    data_key, held_out_key, init_key, key = jax.random.split(jax.random.key(seed), 4)
    model = experiment.model
    if experiment.table is not None:
        rows = experiment.table.batch
        batch, held_out = split(data_key, rows, len(rows.x) // 4)
    else:
        draw = DATA[experiment.data]
        batch, held_out = draw(data_key, samples=SAMPLES), draw(held_out_key, samples=HELD_OUT)
    return Setting(key, model, model.init(init_key), batch, held_out)


def draw_candidates(given: Setting, scale: float, **amount: Any) -> Any:
    """Search at random."""
    return jaxnn.random_search(
        given.key, given.model.loss, given.model.sampler(scale=scale), given.batch,
        metric_fn=score_of(given.model)[1], **amount,
    )  # fmt: skip


def climb(given: Setting, **amount: Any) -> Any:
    """Search by perturbations at the book's scale."""
    return jaxnn.perturbation_search(
        given.key, given.model.loss, given.params, given.batch,
        scale=BOOK_SCALE, metric_fn=score_of(given.model)[1], **amount,
    )  # fmt: skip


def descend(given: Setting, optimizer: Any, **amount: Any) -> Any:
    """Descend on all rows."""
    return jaxnn.gradient_descent(
        given.key, given.model.value_and_grad, given.params, given.batch,
        optimizer=optimizer, **amount,
    )  # fmt: skip


def methods(experiment: Experiment, arguments: argparse.Namespace) -> dict[str, Method]:
    """Return the three methods, random search at two scales and descent by two optimizers."""
    found = {}
    for scale in (BOOK_SCALE, experiment.scale):
        train = partial(draw_candidates, scale=scale)
        found[f"random search, scale {scale:g}"] = train, "num_candidates", arguments.candidates
    found[f"perturbation search, scale {BOOK_SCALE:g}"] = climb, "num_steps", arguments.steps
    for name, optimizer in OPTIMIZERS.items():
        train = partial(descend, optimizer=optimizer)
        found[f"gradient descent, {name}"] = train, "num_epochs", arguments.epochs
    return found


def run(experiment: Experiment, name: str, method: Method, seed: int, verbose: bool) -> Run:
    """Train once, timed without compilation."""
    given, (train, amount, number) = setting_of(experiment, seed), method
    result, seconds = timed(partial(train, given), amount, number)
    finished(result)
    if verbose:
        tqdm.write(f"\n{experiment.title}, seed {seed}, {name}")
        if not isinstance(result, jaxnn.GradientDescentResult):  # of which nearly every step is
            for line in improvement_lines(result, score_of(given.model)[0]):
                tqdm.write(f"  {line}")
    constant_loss: Any = traits_of(given.model.loss).constant_loss(given.batch)
    scores = given.scores(result.params)
    return Run(experiment, name, seed, result, seconds, *scores, float(constant_loss))


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what all seeds of one method came to, with mean and standard deviation."""
    experiment, method = runs[0][:2]
    score = score_of(experiment.model)[0]
    columns = {
        "loss": [run.result.loss for run in runs],
        score: [run.score for run in runs],
        f"held_out_{score}": [run.held_out_score for run in runs],
        "seconds": [run.seconds for run in runs],
        "constant_loss": [run.constant_loss for run in runs],
    }
    bayes = BAYES.get(experiment.data)
    return {
        "data": Path(experiment.data).stem,
        "sizes": experiment.sizes,
        "method": method,
        "seeds": [run.seed for run in runs],
        "status": [run.result.status for run in runs],
        "evaluations": [run.result.num_evaluations for run in runs],
        **columns,
        "mean": {name: float(np.mean(column)) for name, column in columns.items()},
        "sd": {name: float(np.std(column)) for name, column in columns.items()},
        "bayes_accuracy": bayes and bayes.accuracy,
        "bayes_crossentropy": bayes and bayes.crossentropy,
    }


def table_of(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows to print: mean +- standard deviation over the seeds."""
    rows = []
    for row in summaries:
        mean, deviation = row["mean"], row["sd"]
        score = "accuracy" if "accuracy" in row else "r2"
        columns = {"loss": "loss", score: score, f"held_out_{score}": "held out"}
        rows.append({
            "data": row["data"],
            "network": cli.join_sizes(row["sizes"]),
            "method": row["method"],
            "evaluations": round(np.mean(row["evaluations"])),
            "seconds": f"{mean['seconds']:.2f}",
            **{title: f"{mean[c]:.3f} +- {deviation[c]:.3f}" for c, title in columns.items()},
        })  # fmt: skip
    return rows + [
        {
            "data": data,
            "method": "population Bayes value",
            "loss": f"{bayes.crossentropy:.4f}",
            "held out": f"{bayes.accuracy:.4f}",
        }
        for data, bayes in BAYES.items()
        if any(row["data"] == data for row in summaries)
    ]


def note_of(summaries: Sequence[dict[str, Any]]) -> str:
    """Return in words which methods came to the loss of the best constant answer; "" if none."""
    found = [
        f"  {cli.join_sizes(row['sizes'])} on {row['data']}, {row['method']}: "
        f"{row['mean']['constant_loss']:.3f}"
        for row in summaries
        if np.isclose(row["mean"]["loss"], row["mean"]["constant_loss"], rtol=1e-3, atol=0)
    ]
    head = "within 0.1 % of the loss of the best constant answer:"
    return "\n".join([head, *found, CONSTANT]) if found else ""


def later(curves: dict[str, Any], first: float) -> Any:
    """Return the part of every curve from `first` on."""
    return {
        name: [(x[x >= first], y[x >= first]) for x, y in seeds] for name, seeds in curves.items()
    }


def crowd(ends: np.ndarray, width: float = 1.5) -> tuple[float, float]:
    """Return the lowest and the highest of the most ends that lie within a factor of each other."""
    ends = np.sort(ends)
    groups = [ends[(ends >= low) & (ends <= width * low)] for low in ends]
    most = max(groups, key=len)
    return float(most[0]), float(most[-1])


@slide
def draw_methods(runs: Sequence[Run]) -> Figure:
    """Draw the loss of every method against evaluations and seconds, and where most of them end.

    The last panel is left out where the medians end far apart.
    """
    by_evaluations: dict[str, Any] = {}
    by_seconds: dict[str, Any] = {}
    for method, group in groupby(runs, key=lambda run: run.method):
        members = list(group)
        pace = np.mean([run.seconds / run.result.num_evaluations for run in members])
        curves = [jaxnn.plotting.curves_of(run.result, log_x=True) for run in members]
        by_evaluations[method] = [each for (each,) in curves]
        by_seconds[method] = [(pace * x, loss) for x, loss in by_evaluations[method]]
    ends = np.array([np.median([y[-1] for _, y in seeds]) for seeds in by_evaluations.values()])
    are_near = bool(np.max(ends) <= NEAR * np.min(ends))
    figure, axes = panels(2 + are_near, 6.2)
    bayes = BAYES.get(runs[0].experiment.data)
    look = {"log_x": True, "log_y": True, "steps": True, "reference": bayes and bayes.crossentropy}
    look["reference_label"] = "population Bayes value"
    for ax, curves, (label, first) in zip(
        axes, (by_evaluations, by_seconds), FIRST.items(), strict=False
    ):
        first = min(first, *(seeds[0][0][-1] / 10 for seeds in curves.values()))
        jaxnn.plotting.loss_curves(later(curves, first), ax, xlabel=label, **look)
    if are_near:
        low, high = crowd(np.array([*ends, bayes.crossentropy] if bayes else ends))
        last = max(seeds[0][0][-1] for seeds in by_evaluations.values())
        jaxnn.plotting.loss_curves(later(by_evaluations, last / 30), axes[2], **look)
        axes[2].set(ylim=(low / (high / low) ** 0.4 / 1.01, high * (high / low) ** 0.4 * 1.01))
        axes[2].set_title("where most of them end")
    for ax in axes[1:]:
        ax.set_ylabel("")
    jaxnn.plotting.shared_legend(figure)
    figure.suptitle(f"{runs[0].experiment.title}: every seed pale, medians on top")
    return figure


@slide
def draw_regions(runs: Sequence[Run]) -> Figure:
    """Draw the first seed's data, and the decision regions of every method on them."""
    first = [run for run in runs if run.seed == runs[0].seed]
    given = setting_of(first[0].experiment, first[0].seed)
    figure, axes = panels(1 + len(first))
    jaxnn.plotting.data(given.batch, axes[0])
    for run, ax in zip(first, axes[1:], strict=True):
        predict = partial(given.model.apply, run.result.params)
        jaxnn.plotting.decision_regions(predict, given.batch, ax)
        ax.set_title(f"{run.method}\n{100 * run.score:.1f} % of rows right")
    for ax in axes:
        ax.label_outer()
    jaxnn.plotting.shared_legend(figure)
    figure.suptitle(f"{first[0].experiment.title}, seed {first[0].seed}")
    return figure


@slide
def draw_proposals(run: Run) -> Figure:
    """Draw the book's pictures of one perturbation search: loss, on two scales, and score."""
    figure, axes = panels(3, 5.6)
    history = run.result.history
    steps = np.arange(1, len(history.proposed_loss) + 1)
    best = {"best so far": (steps, history.best_loss)}
    for ax, is_log in zip(axes, (False, True), strict=False):
        jaxnn.plotting.loss_curves(best, ax, xlabel="step", log_x=is_log, log_y=is_log)
        dots(ax, steps, history.proposed_loss, "proposals, a part of them")
        ax.set_title(f"loss, {'logarithmic' if is_log else 'even'} axes")
    score = score_of(run.experiment.model)[0]
    jaxnn.plotting.smoothed(history.proposed_metric, axes[2], window=201, ylabel=score)
    axes[2].set_title(f"{score} of proposals (pale)\nand mean of 201")
    jaxnn.plotting.shared_legend(figure)
    figure.suptitle(f"{run.experiment.title}, seed {run.seed}: {run.method}")
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add, some = parser.add_argument, cli.at_least(1)
    add("--seeds", type=some, default=3, help="Run every method on this many seeds.")
    add("--candidates", type=some, default=20_000, help="The candidates of random search.")
    add("--steps", type=some, default=10_000, help="The steps of perturbation search.")
    add("--epochs", type=some, default=10_000, help="The epochs of gradient descent.")
    cli.add_data(parser, "Compare on this CSV file instead.")
    add("--hidden", type=int, nargs="*", default=[16], help="The units of each hidden layer there.")
    cli.add_verbose(parser)
    cli.add_output(parser)
    return parser.parse_args(argv)


def experiments_of(arguments: argparse.Namespace) -> Sequence[Experiment]:
    """Return the experiments: those of the book, or one on a file."""
    table = csv_of(arguments)
    if table is None:
        return EXPERIMENTS
    sizes = model_of(arguments.hidden, table).settings.sizes
    return [Experiment(arguments.data, sizes, scale=1.0, table=table)]


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Run every method on every experiment, print the table and draw the figures."""
    arguments = parse(argv)
    work = [
        (experiment, name, method, seed, arguments.verbose)
        for experiment in experiments_of(arguments)
        for name, method in methods(experiment, arguments).items()
        for seed in range(arguments.seeds)
    ]
    runs = [run(*each) for each in tqdm(work, unit=" runs")]
    by_method = groupby(runs, key=lambda run: (run.experiment, run.method))
    summaries = [summary(list(group)) for _, group in by_method]
    cli.print_table(table_of(summaries))
    if note := note_of(summaries):
        print(note)
    for experiment, group in groupby(runs, key=lambda run: run.experiment):
        members, name = list(group), experiment.title.replace(", ", "-")
        search = next(run for run in members if run.method.startswith("perturbation"))
        pictures = {"methods": draw_methods(members), "proposals": draw_proposals(search)}
        if has_regions(experiment.model):
            pictures["regions"] = draw_regions(members)
        for kind, figure in pictures.items():
            save(figure, arguments, f"{kind}-{name}")
    cli.write_json(arguments.json, summaries)


if __name__ == "__main__":
    sys.exit(main())
