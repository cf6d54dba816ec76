"""Compare the kinds of perturbation search at equal evaluations.

Every kind runs on every problem over several seeds. A seed draws its own data (on iris, of which
all rows are used, their order) and its own start (0.01 times normals), the same for all kinds. A
kind is compared with the book's hill climbing seed by seed. Kinds differ in more than one thing,
and their numbers were chosen by hand: a margin tells what a kind does, not why.
Iris and digits need scikit-learn, from the `bench` extra.

    python scripts/experiments/compare_climbers.py
    python scripts/experiments/compare_climbers.py --problems spiral --evaluations 1e5
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.stats import quantile_test
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import cli
from shared.figures import Figure, panels, save, slide
from shared.problems import DATA, from_sklearn
from shared.runs import finished

import jaxnn

PLAIN = "hill climbing"
POINTS = 100


class Problem(NamedTuple):
    """Data, drawn by a key, the network that learns them, and its share of the evaluations."""

    draw: Callable[[jax.Array], jaxnn.Batch]
    sizes: cli.Sizes
    share: float = 1.0


PROBLEMS = {
    "vertical": Problem(partial(DATA["vertical"], samples=100), (2, 3, 3)),
    "spiral": Problem(partial(DATA["spiral"], samples=100), (2, 16, 3)),
    "iris": Problem(lambda key: from_sklearn("iris", key, 150), (4, 8, 3)),
    "digits": Problem(lambda key: from_sklearn("digits", key, 300), (64, 16, 10), 0.1),
}


def kinds(model: jaxnn.Model, evaluations: int) -> dict[str, dict[str, Any]]:
    """Return the options of each kind; every schedule ends with the last step."""
    moves, decay = jaxnn.moves, jaxnn.schedules.exponential_decay
    cooling = decay(0.01, 1e-5, evaluations)
    falling = decay(0.5, 0.01, evaluations)
    one_weight = {"propose_fn": moves.one_coordinate, "scale": decay(1.0, 0.05, evaluations)}
    one_fifth = {"scale": moves.one_fifth(0.05)}
    restarts = {"patience": moves.restart(model.sampler(distribution="he"), 2_000)}
    return {
        PLAIN: {"scale": 0.05},
        "ties accepted": {"scale": 0.05, "temperature": 0.0},
        "falling scale": {"scale": falling},
        "one-fifth rule": one_fifth,
        "one-fifth rule, restarts": one_fifth | restarts,
        "best of 8": {"scale": 0.05, "num_proposals": 8},
        "annealing": {"scale": 0.05, "temperature": cooling},
        "annealing, falling scale": {"scale": falling, "temperature": cooling},
        "one weight": one_weight,
        "one weight, annealing": one_weight | {"temperature": cooling},
    }


class Climb(NamedTuple):
    """What one kind reached on one seed, and the way there."""

    loss: float
    accuracy: float
    evaluations: np.ndarray
    best_loss: np.ndarray


def climb(problem: Problem, kind: str, seed: int, most: int) -> Climb:
    """Search once; data, start and draws depend on the seed alone."""
    evaluations = int(problem.share * most)
    data_key, init_key, key = jax.random.split(jax.random.key(seed), 3)
    model, batch = jaxnn.mlp(problem.sizes), problem.draw(data_key)
    options = kinds(model, evaluations)[kind]
    steps = evaluations // options.get("num_proposals", 1)
    params = model.init(init_key)
    found = jaxnn.perturbation_search(key, model.loss, params, batch, num_steps=steps, **options)
    accuracy = float(model.accuracy(finished(found).params, batch))
    every, history = max(len(found.history.evaluations) // POINTS, 1), found.history
    thinned = (part[every - 1 :: every] for part in (history.evaluations, history.best_loss))
    return Climb(found.loss, accuracy, *thinned)


def row_of(name: str, kind: str, runs: Sequence[Climb], plain: Sequence[Climb]) -> dict[str, Any]:
    """Return a row of the table: quartiles, and the margin over plain hill climbing."""
    losses = np.array([run.loss for run in runs])
    low, median, high = np.quantile(losses, (0.25, 0.5, 0.75))
    margins = np.array([run.loss for run in plain]) - losses
    interval = quantile_test(margins, p=0.5).confidence_interval()
    return {
        "data": name,
        "kind": kind,
        "loss": float(median),
        "quartile": float(low),
        "third": float(high),
        "accuracy": float(np.median([run.accuracy for run in runs])),
        "margin": float(np.median(margins)),
        "from": float(interval.low),
        "to": float(interval.high),
        "seeds won": int(np.sum(margins > 0)),
    }


@slide
def draw(climbs: dict[str, dict[str, list[Climb]]]) -> Figure:
    """Draw the median of the best loss so far over evaluations, a panel a problem."""
    figure, row = panels(len(climbs), 4)
    for axes, (name, by_kind) in zip(row, climbs.items(), strict=True):
        curves = {
            kind: (runs[0].evaluations, np.median([run.best_loss for run in runs], axis=0))
            for kind, runs in by_kind.items()
        }
        jaxnn.plotting.loss_curves(curves, axes, log_x=True, log_y=True)
        axes.set_title(f"{name}, {cli.join_sizes(PROBLEMS[name].sizes)}")
        axes.set_ylabel("best loss so far")
    jaxnn.plotting.shared_legend(figure)
    figure.suptitle("Kinds of perturbation search: medians over the seeds")
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add = parser.add_argument
    add("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="Run on these.")
    add("--evaluations", type=cli.at_least(10_000), default=50_000,
        help="Give each search this many losses, and a tenth of it on digits.")  # fmt: skip
    add("--seeds", type=cli.at_least(6), default=20, help="Run each kind on this many seeds.")
    add("--markdown", action="store_true", help="Print the table as Markdown.")
    cli.add_output(parser)
    return parser.parse_args(argv)


def available(names: Sequence[str]) -> list[str]:
    """Return the problems whose data can be loaded, and say which cannot."""
    found = []
    for name in names:
        try:
            PROBLEMS[name].draw(jax.random.key(0))
            found.append(name)
        except ImportError:
            print(f"{name}: scikit-learn not installed", file=sys.stderr)
    return found


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    arguments = parse(argv)
    problems = available(arguments.problems)
    names = list(kinds(jaxnn.mlp((2, 3, 3)), arguments.evaluations))
    climbs: dict[str, dict[str, list[Climb]]] = {p: {k: [] for k in names} for p in problems}
    work = [(p, k, seed) for p in problems for k in names for seed in range(arguments.seeds)]
    for problem, kind, seed in tqdm(work, unit=" searches"):
        found = climb(PROBLEMS[problem], kind, seed, arguments.evaluations)
        climbs[problem][kind].append(found)
    rows = [
        row_of(name, kind, runs, by_kind[PLAIN])
        for name, by_kind in climbs.items()
        for kind, runs in by_kind.items()
    ]
    if rows:
        cli.print_table(rows, arguments.markdown)
        save(draw(climbs), arguments, "climbers")
    cli.write_json(arguments.json, rows)


if __name__ == "__main__":
    sys.exit(main())
