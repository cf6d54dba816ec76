"""What each library comes to with the same number of losses, and how long it takes.

An evaluation is one loss on all rows; a gradient step counts as three. Everybody has the same
data, and within a method the same distribution of starts, draws and steps, over several seeds;
where a library cannot do the same, it is said here: mlrose-ky moves one weight a step and has
biases at the inputs alone, nevergrad starts at 0 and adapts its step, pyperch keeps ties as well,
evosax climbs by two proposals a generation, and scikit-learn draws its own start. Compiled torch
is slower than eager torch on networks of this size, and left out.

A library is called twice, and for a second, before it is timed; then all libraries of a method take
turns, a call each for every seed. mlrose-ky, which compiles nothing and takes a quarter of a minute
a call, is called once.
Searches with a choice of tile run at their best one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import matplotlib
import numpy as np
from chain_peers import WAYS
from command_line import Sizes
from descent_peers import DESCENTS
from problems import DATA
from search_peers import PEERS, random_batch
from turns import MISSING, Search, take_turns, timed

import jaxnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

TILE = 2_048
"""The largest tile of a peer; evaluations are a multiple of it."""
PROBLEMS: dict[str, Sizes] = {"vertical": (2, 3, 3), "spiral": (2, 16, 3)}
WARM = 1.0
"""Seconds for which libraries are called before the timing."""
SLOW = ("mlrose-ky",)
"""Libraries whose first call stands for itself."""
COLORS = {
    "random search": "#0072B2",
    "perturbation search": "#D55E00",
    "gradient descent": "#009E73",
}


def draw(peer: str, model: jaxnn.Model, batch: jaxnn.Batch, seed: int) -> Search:
    """Random search by a peer at its best tile."""
    sizes = model.settings.sizes
    return PEERS[peer][0](sizes, batch, best_tile(peer, sizes), seed=seed)


@cache
def best_tile(peer: str, sizes: Sizes) -> int:
    """The tile at which a peer draws fastest."""
    prepare, tiles = PEERS[peer]
    if len(tiles) == 1:
        return tiles[0]

    def seconds(tile: int) -> float:
        search = prepare(sizes, random_batch(sizes), tile)
        return min(timed(search, 4 * TILE) for _ in range(3))

    return min(tiles, key=seconds)


def climb(peer: str, model: jaxnn.Model, batch: jaxnn.Batch, seed: int) -> Search:
    """Perturbation search by a peer."""
    return WAYS[peer][0](model, batch, seed=seed)


def descend(peer: str, model: jaxnn.Model, batch: jaxnn.Batch, seed: int) -> Search:
    """Descent on all rows by a peer."""
    return DESCENTS[peer][0](model, batch, None, seed=seed)


Prepare = Callable[[jaxnn.Model, jaxnn.Batch, int], Search]
CLIMBERS = [peer for peer in WAYS if "chains" not in peer and "random" not in peer]
DESCENDERS = [peer for peer in DESCENTS if "networks" not in peer and "compiled" not in peer]
METHODS: dict[str, tuple[dict[str, Prepare], int]] = {
    "random search": ({peer: partial(draw, peer) for peer in PEERS}, 1),
    "perturbation search": ({peer: partial(climb, peer) for peer in CLIMBERS}, 1),
    "gradient descent": ({peer: partial(descend, peer) for peer in DESCENDERS}, 3),
}
"""For each method its libraries, and how many losses a step of it counts as."""


def loss_of(found: Any) -> float:
    """The loss that a search returned."""
    return float(found[0] if isinstance(found, tuple) else found)


def measure(problem: str, method: str, evaluations: int, seed: int) -> dict[str, Any]:
    """Loss and evaluations a second of each library; None for those that are not installed."""
    libraries, cost = METHODS[method]
    model, steps = jaxnn.mlp(PROBLEMS[problem]), evaluations // cost
    batch = DATA[problem](jax.random.key(seed), samples=100)
    found: dict[str, Any] = dict.fromkeys(libraries)
    ready: dict[str, tuple[Search, int]] = {}
    for library, prepare in libraries.items():
        try:
            search = prepare(model, batch, seed)
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
    """What measures, by name: data, method and seed."""
    return {
        f"{problem} | {method} | {seed}": partial(measure, problem, method, evaluations, seed)
        for problem in PROBLEMS
        for method in METHODS
        for seed in range(seeds)
    }


def compared(found: Mapping[str, Mapping[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """A row a library, with its pace beside that of jaxnn's fastest in the same turn."""
    rows = []
    for problem, sizes in PROBLEMS.items():
        for method, (libraries, _) in METHODS.items():
            turns = [found[f"{problem} | {method} | {seed}"] for seed in range(seeds)]
            best = [max(t[name]["pace"] for name in t if is_ours(name)) for t in turns]
            for library in libraries:
                row = {"data": problem, "net": "-".join(map(str, sizes)), "method": method}
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


def is_ours(library: str) -> bool:
    """Whether a row is jaxnn's."""
    return library.startswith("jaxnn")


def faster(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each library that makes more evaluations a second than jaxnn."""
    return [
        f"faster than jaxnn: {row['library']}, {row['method']} on {row['data']}, "
        f"{row['x jaxnn']:.2f} times its pace"
        for row in rows
        if not is_ours(row["library"]) and row.get("x jaxnn", 0) > 1
    ]


def draw_rows(rows: Sequence[dict[str, Any]], evaluations: int) -> Figure:
    """Pace and loss of every library: medians over the seeds, with error bars for their ranges."""
    known = [row for row in rows if "loss" in row]
    problems = list(dict.fromkeys(row["data"] for row in known))
    figure, axes = plt.subplots(
        len(problems), 2, figsize=(12, 4.6 * len(problems)), layout="constrained", squeeze=False
    )
    for (pace, loss), problem in zip(axes, problems, strict=True):
        here = [row for row in known if row["data"] == problem][::-1]
        colors = [COLORS[row["method"]] for row in here]
        places = np.arange(len(here))
        paces = np.array([row["evaluations/s"] for row in here])
        ranges = np.array([(row["slowest"], row["fastest"]) for row in here])
        bars = {"xerr": np.abs(ranges.T - paces), "ecolor": "black", "capsize": 2}
        pace.barh(places, paces, color=colors, **bars)
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
