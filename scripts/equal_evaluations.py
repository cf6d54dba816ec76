"""What each library comes to with the same number of losses, and how long it takes.

An evaluation is one loss on all rows; a gradient step counts as three. Everybody has the same
data, and within a method the same distribution of starts, draws and steps, over several seeds;
where a library cannot do the same, it is said here: mlrose-ky moves one weight a step and has
biases at the inputs alone, nevergrad starts at 0 and adapts its step, pyperch keeps ties as well,
evosax climbs by two proposals a generation, and scikit-learn draws its own start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import matplotlib
import numpy as np
from chain_peers import WAYS
from command_line import Sizes
from descent_peers import DESCENTS
from problems import DATA
from search_peers import PEERS
from turns import MISSING, Search, timed

import jaxnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

TILE = 512
"""Candidates that peers of random search draw at once; evaluations are rounded to it."""
PROBLEMS: dict[str, Sizes] = {"vertical": (2, 3, 3), "spiral": (2, 16, 3)}
PATIENCE = (10.0, 1.0, 0.0)
"""Seconds a call: after a longer one there is no other. The fastest counts, as the first compiles
and the second still may; libraries that take long do not compile."""
COLORS = {
    "random search": "#0072B2",
    "perturbation search": "#D55E00",
    "gradient descent": "#009E73",
}

Runs = Mapping[str, Callable[[jaxnn.Model, jaxnn.Batch, int], Search]]


def methods() -> dict[str, tuple[Runs, int]]:
    """For each method its libraries, `prepare(model, batch, seed)`, and losses a step."""

    def draw(peer: str, model: jaxnn.Model, batch: jaxnn.Batch, seed: int) -> Search:
        prepare, tiles = PEERS[peer]
        tile = TILE if len(tiles) > 1 else tiles[0]
        return prepare(model.settings.sizes, batch, tile, seed=seed)

    def climb(peer: str, model: jaxnn.Model, batch: jaxnn.Batch, seed: int) -> Search:
        return WAYS[peer][0](model, batch, seed=seed)

    def descend(peer: str, model: jaxnn.Model, batch: jaxnn.Batch, seed: int) -> Search:
        return DESCENTS[peer][0](model, batch, None, seed=seed)

    climbers = [peer for peer in WAYS if "chains" not in peer and "random" not in peer]
    descents = [peer for peer in DESCENTS if "networks" not in peer and "compiled" not in peer]
    return {
        "random search": ({peer: partial(draw, peer) for peer in PEERS}, 1),
        "perturbation search": ({peer: partial(climb, peer) for peer in climbers}, 1),
        "gradient descent": ({peer: partial(descend, peer) for peer in descents}, 3),
    }


def run(search: Search, steps: int) -> tuple[float, float]:
    """Loss and seconds."""
    reached: list[Any] = []
    fastest = math.inf
    for patience in PATIENCE:
        seconds = timed(lambda count: reached.append(search(count)), steps)
        fastest = min(fastest, seconds)
        if seconds > patience:
            break
    found = reached[-1]
    return float(found[0] if isinstance(found, tuple) else found), fastest


def pieces_of(evaluations: int, seeds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What finds a row, by the row's name: data, method, library."""
    return {
        f"{problem}, {method}, {library}": partial(
            row_of, problem, method, library, evaluations, seeds
        )
        for problem in PROBLEMS
        for method, (libraries, _) in methods().items()
        for library in libraries
    }


def row_of(problem: str, method: str, library: str, evaluations: int, seeds: int) -> dict[str, Any]:
    """A library's row, also if it is missing."""
    libraries, cost = methods()[method]
    model = jaxnn.mlp(PROBLEMS[problem])
    net = "-".join(map(str, model.settings.sizes))
    row = {"data": problem, "net": net, "method": method, "library": library}
    found = []
    try:
        for seed in range(seeds):
            batch = DATA[problem](jax.random.key(seed), samples=100)
            found.append(run(libraries[library](model, batch, seed), evaluations // cost))
    except ImportError:
        return {**row, "evaluations/s": MISSING}
    losses, seconds = np.transpose(found)
    return {
        **row,
        "evaluations/s": evaluations / float(np.median(seconds)),
        "x jaxnn": None,
        "call s": float(np.median(seconds)),
        "loss": float(np.median(losses)),
        "lowest": float(np.min(losses)),
        "highest": float(np.max(losses)),
    }


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with each library's pace beside that of jaxnn's fastest on the same work."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["library"].startswith("jaxnn") and "loss" in row:
            work = row["data"], row["method"]
            best[work] = max(best.get(work, 0.0), row["evaluations/s"])
    return [
        {**row, "x jaxnn": row["evaluations/s"] / best[row["data"], row["method"]]}
        if "loss" in row
        else row
        for row in rows
    ]


def faster(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each library that makes more evaluations a second than jaxnn."""
    return [
        f"faster than jaxnn: {row['library']}, {row['method']} on {row['data']}, "
        f"{row['x jaxnn']:.2f} times its pace"
        for row in rows
        if "loss" in row and row["x jaxnn"] > 1
    ]


def draw(rows: Sequence[dict[str, Any]], evaluations: int) -> Figure:
    """Pace and loss of every library; bars from the lowest to the highest loss of the seeds."""
    known = [row for row in rows if "loss" in row]
    problems = list(dict.fromkeys(row["data"] for row in known))
    figure, axes = plt.subplots(
        len(problems), 2, figsize=(12, 4.6 * len(problems)), layout="constrained", squeeze=False
    )
    for (pace, loss), problem in zip(axes, problems, strict=True):
        here = [row for row in known if row["data"] == problem][::-1]
        colors = [COLORS[row["method"]] for row in here]
        places = np.arange(len(here))
        pace.barh(places, [row["evaluations/s"] for row in here], color=colors)
        pace.set(xscale="log", xlabel="evaluations a second, compilation left out")
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
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, list(COLORS), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{evaluations:,} evaluations each")
    return figure
