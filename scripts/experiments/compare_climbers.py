"""Which member of the family of perturbation search climbs best, at equal evaluations.

Every member runs on every problem over several seeds; a seed draws its own data (on iris, which
has no more rows than are used, their order alone) and its own start (0.01 times normals), the same
for all members, and a member is held against the chapter's hill climbing seed by seed. Members
differ in more than one thing at a time, and their numbers were chosen by hand: a margin tells what
a member does, not why. Iris and digits need scikit-learn, from the `bench` extra.

    python scripts/compare_climbers.py
    python scripts/compare_climbers.py --problems spiral --evaluations 1e5 --json climbers.json
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
from command_line import add_output, command, count, parser_for, write_json
from problems import DATA, measured
from resuming import finished
from scipy.stats import quantile_test
from tqdm import tqdm
from turns import MISSING, table

import jaxnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLAIN = "hill climbing"
POINTS = 100


class Problem(NamedTuple):
    """Data, drawn by a key, the network that learns them, and its share of the evaluations."""

    draw: Callable[[jax.Array], jaxnn.Batch]
    sizes: tuple[int, ...]
    share: float = 1.0


PROBLEMS = {
    "vertical": Problem(partial(DATA["vertical"], samples=100), (2, 3, 3)),
    "spiral": Problem(partial(DATA["spiral"], samples=100), (2, 16, 3)),
    "iris": Problem(lambda key: measured("iris", key, 150), (4, 8, 3)),
    "digits": Problem(lambda key: measured("digits", key, 300), (64, 16, 10), 0.1),
}


def members(model: jaxnn.Model, evaluations: int) -> dict[str, dict[str, Any]]:
    """The options of each member; every schedule ends with the last step."""
    geometric = jaxnn.schedules.exponential_decay
    cooling = geometric(0.01, 1e-5, evaluations)
    falling = geometric(0.5, 0.01, evaluations)
    nudging = {"propose_fn": jaxnn.moves.one_coordinate}
    nudging["scale"] = geometric(1.0, 0.05, evaluations)
    restarts = {"patience": 2_000, "restart_fn": model.sampler(distribution="he")}
    return {
        PLAIN: {"scale": 0.05},
        "ties accepted": {"scale": 0.05, "accept_ties": True},
        "falling scale": {"scale": falling},
        "one-fifth rule": {"scale": 0.05, "adapt_scale": True},
        "one-fifth rule, restarts": {"scale": 0.05, "adapt_scale": True, **restarts},
        "best of 8": {"scale": 0.05, "num_proposals": 8},
        "annealing": {"scale": 0.05, "temperature": cooling},
        "annealing, falling scale": {"scale": falling, "temperature": cooling},
        "one weight": nudging,
        "one weight, annealing": {**nudging, "temperature": cooling},
    }


class Climb(NamedTuple):
    """What one member reached on one seed, and the way there."""

    loss: float
    accuracy: float
    evaluations: np.ndarray
    best_loss: np.ndarray


def climb(problem: Problem, member: str, seed: int, most: int) -> Climb:
    """One search; data, start and draws depend on the seed alone."""
    evaluations = int(problem.share * most)
    data_key, init_key, key = jax.random.split(jax.random.key(seed), 3)
    model, batch = jaxnn.mlp(problem.sizes), problem.draw(data_key)
    options = members(model, evaluations)[member]
    steps = evaluations // options.get("num_proposals", 1)
    found = jaxnn.perturbation_search(
        key,
        model.loss,
        model.init(init_key),
        batch,
        num_steps=steps,
        record_every=max(steps // POINTS, 1),
        **options,
    )
    accuracy = float(model.accuracy(finished(found).params, batch))
    return Climb(found.loss, accuracy, found.history.evaluations, found.history.best_loss)


def row_of(name: str, member: str, runs: Sequence[Climb], plain: Sequence[Climb]) -> dict[str, Any]:
    """What the table says of a member: quartiles, and its margin over plain hill climbing."""
    losses = np.array([run.loss for run in runs])
    low, median, high = np.quantile(losses, (0.25, 0.5, 0.75))
    margins = np.array([run.loss for run in plain]) - losses
    interval = quantile_test(margins, p=0.5).confidence_interval()
    return {
        "data": name,
        "member": member,
        "loss": float(median),
        "quartile": float(low),
        "third": float(high),
        "accuracy": float(np.median([run.accuracy for run in runs])),
        "margin": float(np.median(margins)),
        "from": float(interval.low),
        "to": float(interval.high),
        "seeds won": int(np.sum(margins > 0)),
    }


def draw(climbs: dict[str, dict[str, list[Climb]]], path: Path) -> None:
    """The median of the best loss so far over evaluations, a panel a problem."""
    figure, panels = plt.subplots(
        1, len(climbs), figsize=(5 * len(climbs) + 2, 4.6), layout="constrained", squeeze=False
    )
    for axes, (name, by_member) in zip(panels[0], climbs.items(), strict=True):
        curves = {
            member: (runs[0].evaluations, np.median([run.best_loss for run in runs], axis=0))
            for member, runs in by_member.items()
        }
        jaxnn.plotting.loss_curves(curves, axes, log_x=True, log_y=True)
        axes.set_title(f"{name}, {'-'.join(map(str, PROBLEMS[name].sizes))}")
        axes.set_ylabel("best loss so far, median")
        if axes is not panels[0, -1]:
            axes.get_legend().remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    add(
        "--evaluations",
        type=count,
        default=50_000,
        help="losses that each may evaluate; a tenth on digits",
    )
    add("--seeds", type=int, default=20, help="at least 6, or there is no interval")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add_output(parser)
    arguments = parser.parse_args(argv)
    if arguments.evaluations < 10_000 or arguments.seeds < 6:
        parser.error("--evaluations must be at least 10000 and --seeds at least 6")
    return arguments


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    arguments = parse(argv)
    climbs: dict[str, dict[str, list[Climb]]] = {}
    names = list(members(jaxnn.mlp((2, 3, 3)), arguments.evaluations))
    total = len(arguments.problems) * len(names) * arguments.seeds
    with tqdm(total=total, unit=" searches") as bar:
        for name in arguments.problems:
            try:
                PROBLEMS[name].draw(jax.random.key(0))
            except ImportError:
                print(f"{name}: scikit-learn {MISSING}", file=sys.stderr)
                continue
            climbs[name] = {member: [] for member in names}
            for member, runs in climbs[name].items():
                for seed in range(arguments.seeds):
                    runs.append(climb(PROBLEMS[name], member, seed, arguments.evaluations))
                    bar.update()
    rows = [
        row_of(name, member, runs, by_member[PLAIN])
        for name, by_member in climbs.items()
        for member, runs in by_member.items()
    ]
    if rows:
        print(table(rows, arguments.markdown))
        path = arguments.output / "climbers.png"
        draw(climbs, path)
        print(path)
    write_json(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
