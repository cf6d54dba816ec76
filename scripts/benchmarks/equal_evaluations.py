"""Compare the losses that libraries reach with the same number of evaluations, and their pace.

An evaluation is one loss on all rows; a gradient step counts as three. Everybody has the same data,
and within a method the same distribution of starts, draws and steps, over several seeds. Where a
library cannot do the same: mlrose-ky moves one weight a step and has biases at the inputs alone,
nevergrad starts at 0 and adapts its step, pyperch keeps ties as well, evosax makes two proposals a
generation, and scikit-learn draws its own start. Compiled torch is slower than eager torch on
networks of this size, and left out.

Each library is called twice, and for a second, before it is timed; then all libraries of a method
take turns, one call each for every seed. mlrose-ky, which compiles nothing and takes a quarter of a
minute a call, is called once. Searches with a choice of tile run at their best one.

    python scripts/benchmarks/equal_evaluations.py --markdown
    python scripts/benchmarks/equal_evaluations.py --seeds 1 --evaluations 2048
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).parents[1]))
from peers.chains import CLIMBERS
from peers.descent import DESCENTS
from peers.search import SEARCHES, best_tile
from shared import cli
from shared.figures import BLUE, GREEN, ORANGE, Figure, panels, save, slide
from shared.problems import DATA
from shared.resuming import run_pieces
from shared.timing import MISSING, Search, machine, take_turns

import jaxnn

TILE = 2_048
"""The largest tile of a peer; evaluations are a multiple of it."""
PROBLEMS: dict[str, cli.Sizes] = {"vertical": (2, 3, 3), "spiral": (2, 16, 3)}
WARM = 1.0
"""Seconds for which libraries are called before the timing."""
SLOW = ("mlrose-ky",)
"""Libraries whose first call is the one timed."""
COLORS = {"random search": BLUE, "perturbation search": ORANGE, "gradient descent": GREEN}
HATCHES = {"random search": None, "perturbation search": "//", "gradient descent": ".."}


def at_best_tile(peer: str, model: jaxnn.Model, batch: jaxnn.Batch, seed: int) -> Search:
    """Prepare random search by a peer at its best tile."""
    prepare, tiles = SEARCHES[peer]
    tile = tiles[0] if len(tiles) == 1 else best_tile(peer, model.settings.sizes, 0.05)[0]
    return prepare(model, batch, tile, seed=seed)


def comparable(peers: Mapping[str, tuple[Callable[..., Search], float]]) -> dict[str, Any]:
    """Return the peers but for those that do other work, or are slow for networks this small."""
    left_out = ("chains", "random", "networks", "compiled", "momentum", "Adam")
    kept = [peer for peer in peers if not any(word in peer for word in left_out)]
    return {peer: peers[peer][0] for peer in kept}


METHODS: dict[str, tuple[dict[str, Callable[..., Search]], int]] = {
    "random search": ({peer: partial(at_best_tile, peer) for peer in SEARCHES}, 1),
    "perturbation search": (comparable(CLIMBERS), 1),
    "gradient descent": (comparable(DESCENTS), 3),
}
"""For each method its libraries, and how many losses a step of it counts as."""


def loss_of(found: Any) -> float:
    """Return the loss that a search found."""
    return float(found[0] if isinstance(found, tuple) else found)


def measure(problem: str, method: str, evaluations: int, seed: int) -> dict[str, Any]:
    """Return loss and evaluations a second of each library; None for one not installed."""
    libraries, cost = METHODS[method]
    model, steps = jaxnn.mlp(PROBLEMS[problem]), evaluations // cost
    batch = DATA[problem](jax.random.key(seed), samples=100)
    found: dict[str, Any] = dict.fromkeys(libraries)
    ready: dict[str, tuple[Search, int]] = {}
    for library, prepare in libraries.items():
        try:
            search = prepare(model, batch, seed=seed)
        except ImportError:
            continue
        started = time.perf_counter()
        found[library] = {"loss": loss_of(search(steps))}
        if library in SLOW:
            found[library]["pace"] = cost * steps / (time.perf_counter() - started)
            continue
        ready[library] = search, steps
        search(steps)  # may compile as well: what looks ahead tries another depth
        while time.perf_counter() - started < WARM:
            search(steps)
    for library, rates in take_turns(ready, 1).items():
        found[library]["pace"] = cost * float(rates[0])
    return found


def pieces_of(evaluations: int, seeds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what measures, by name: data, method and seed."""
    return {
        f"{problem} | {method} | {seed}": partial(measure, problem, method, evaluations, seed)
        for problem in PROBLEMS
        for method in METHODS
        for seed in range(seeds)
    }


def compared(found: Mapping[str, Mapping[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Return a row a library, with its pace beside that of jaxnn's fastest in the same round."""
    rows = []
    for problem, sizes in PROBLEMS.items():
        for method, (libraries, _) in METHODS.items():
            turns = [found[f"{problem} | {method} | {seed}"] for seed in range(seeds)]
            best = [max(t[name]["pace"] for name in t if name.startswith("jaxnn")) for t in turns]
            for library in libraries:
                row = {"data": problem, "net": cli.join_sizes(sizes), "method": method}
                row |= {"library": library, "evaluations/s": MISSING}
                rows.append(row)
                if turns[0][library] is None:
                    continue
                paces = np.array([turn[library]["pace"] for turn in turns])
                losses = [turn[library]["loss"] for turn in turns]
                row |= {
                    "evaluations/s": float(np.median(paces)),
                    "slowest": float(np.min(paces)),
                    "fastest": float(np.max(paces)),
                    "x jaxnn": float(np.median(paces / best)),
                    "to": float(np.max(paces / best)),
                    "loss": float(np.median(losses)),
                    "lowest": float(np.min(losses)),
                    "highest": float(np.max(losses)),
                }
    return rows


def faster(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each library that makes more evaluations a second than jaxnn."""
    return [
        f"faster than jaxnn: {row['library']}, {row['method']} on {row['data']}, "
        f"{row['x jaxnn']:.2f} times its pace"
        for row in rows
        if not row["library"].startswith("jaxnn") and row.get("x jaxnn", 0) > 1
    ]


@slide
def draw(rows: Sequence[dict[str, Any]], evaluations: int) -> Figure:
    """Draw pace and loss of every library: medians over the seeds; bars are ranges."""
    known = [row for row in rows if "loss" in row]
    problems = list(dict.fromkeys(row["data"] for row in known))
    figure, axes = panels(2 * len(problems), 5.6, across=2)
    for pace, loss, problem in zip(axes[::2], axes[1::2], problems, strict=True):
        here = [row for row in known if row["data"] == problem][::-1]
        colors = [COLORS[row["method"]] for row in here]
        hatches = [HATCHES[row["method"]] for row in here]
        places = np.arange(len(here))
        paces = np.array([row["evaluations/s"] for row in here])
        ranges = np.array([(row["slowest"], row["fastest"]) for row in here])
        bars = {"xerr": np.abs(ranges.T - paces), "ecolor": "black", "capsize": 2}
        pace.barh(places, paces, color=colors, hatch=hatches, edgecolor="white", **bars)
        jaxnn.plotting.log_scale(pace, "x")
        pace.set(xlabel="evaluations a second, compilation left out")
        pace.set(yticks=places, yticklabels=[row["library"] for row in here])
        middle = np.array([row["loss"] for row in here])
        ends = np.array([(row["lowest"], row["highest"]) for row in here])
        for place, color in enumerate(colors):
            bar = np.abs(ends[place][:, None] - middle[place])
            style = {"fmt": "o", "capsize": 3, "color": color}
            loss.errorbar(middle[place], place, xerr=bar, **style)
        loss.set(xlabel="loss: median and range over the seeds", yticks=places, yticklabels=[])
        for ax in (pace, loss):
            ax.grid(axis="x", alpha=0.3)
            ax.set_ylim(-0.7, len(here) - 0.3)
        pace.set_title(f"{problem}, {here[0]['net']}", loc="left")
    for method, color in COLORS.items():
        style = {"hatch": HATCHES[method], "edgecolor": "white", "label": method}
        axes[0].add_patch(Rectangle((0, 0), 0, 0, facecolor=color, **style))
    jaxnn.plotting.shared_legend(figure)
    figure.suptitle(f"{evaluations:,} evaluations each")
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add = parser.add_argument
    add("--evaluations", type=cli.at_least(TILE), default=5 * TILE,
        help="The losses of each library.")  # fmt: skip
    add("--seeds", type=cli.at_least(1), default=3, help="Call each library on this many seeds.")
    add("--markdown", action="store_true", help="Print the table as Markdown.")
    cli.add_output(parser)
    return parser.parse_args(argv)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet; print the table and draw the figure."""
    arguments = parse(argv)
    evaluations = arguments.evaluations // TILE * TILE
    here = {name: value for name, value in machine().items() if name != "date"}
    settings = {"evaluations": evaluations, "seeds": arguments.seeds, "machine": here}
    pieces = pieces_of(evaluations, arguments.seeds)
    found = run_pieces(arguments.output / "equal-evaluations.json", settings, pieces)
    rows = compared(found, arguments.seeds)
    print(f"{evaluations:,} evaluations each, {arguments.seeds} seeds: medians, ranges of losses")
    cli.print_table(rows, arguments.markdown)
    print("\n".join(faster(rows)) or "nobody is faster than jaxnn")
    save(draw(rows, evaluations), arguments, "equal-evaluations")
    cli.write_json(arguments.json, rows)


if __name__ == "__main__":
    sys.exit(main())
