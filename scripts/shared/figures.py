"""Figures and films for a slide, written to files: matplotlib without a display."""

import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

import jaxnn
from shared.runs import finished

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.animation import FFMpegWriter, FuncAnimation, PillowWriter
from matplotlib.figure import Figure

FRAMES, FRAMES_A_SECOND = 24, 5
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Colours that colour-blind readers tell apart (Okabe and Ito)."""
DOTS = 400
slide = jaxnn.plotting.style("slide")
"""Decorates every function that draws; `matplotlib.rcParams` stay as they were."""


@slide
def save(figure: Figure, arguments: Namespace, name: str) -> None:
    """Write a figure as the options of `cli.add_output` ask; close it and print the files."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    for suffix in arguments.formats:
        path = arguments.output / f"{name}.{suffix}"
        figure.savefig(path, dpi=arguments.dpi)
        print(path)
    plt.close(figure)


def panels(number: int, height: float = 3.75, across: int = 3) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels of a height in inches, in rows of at most `across`."""
    rows = math.ceil(number / across)
    columns = math.ceil(number / rows)
    size = (plt.rcParams["figure.figsize"][0], height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in grid.flat[number:]:
        ax.remove()
    return figure, list(grid.flat[:number])


def error_bars(axes: Axes, x: ArrayLike, middle: ArrayLike, ends: ArrayLike, **style: Any) -> None:
    """Draw values `(points,)` with bars from the first to the last of their ends `(points, 2)`."""
    axes.errorbar(x, middle, np.abs(np.transpose(ends) - middle), **style)
    axes.grid(visible=True)


def dots(axes: Axes, x: np.ndarray, y: np.ndarray, label: str) -> None:
    """Draw a noisy series as crosses, few enough to be seen apart on the scale of x."""
    spread = np.geomspace if axes.get_xscale() == "log" else np.linspace
    chosen = np.unique(spread(1, len(x), DOTS).astype(int)) - 1
    style: dict[str, Any] = {"color": "0.45", "markersize": 4, "zorder": 1.5}
    axes.plot(x[chosen], y[chosen], "x", label=label, **style)


def colors_of(number: int) -> np.ndarray:
    """Return colours in order, dark to light, for numbers that rise."""
    return plt.get_cmap("viridis")(np.linspace(0, 0.85, number))


@slide
def save_film(film: FuncAnimation, path: Path, dpi: int = 144) -> None:
    """Write a film as a GIF or, where ffmpeg is found, as MP4, and print the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = PillowWriter if path.suffix == ".gif" else FFMpegWriter
    film.save(path, writer(fps=FRAMES_A_SECOND), dpi=dpi)
    print(path)
    plt.close("all")


@slide
def film_regions(
    train: Callable[[int], Any],
    model: jaxnn.Model,
    batch: jaxnn.Batch,
    steps: int,
    path: Path,
    title: str,
    dpi: int = 144,
) -> None:
    """Film decision regions, loss and accuracy over the steps; `train(steps)` returns a result."""
    counts = np.unique(np.geomspace(1, steps + 1, FRAMES).astype(int)) - 1
    found = [finished(train(int(count))) for count in counts]
    losses = np.array([each.loss for each in found])
    rights = [100 * float(model.accuracy(each.params, batch)) for each in found]
    figure, (left, right) = panels(2, 5.6)
    other = right.twinx()
    jaxnn.plotting.data(batch, left)
    jaxnn.plotting.shared_legend(figure)

    def frame(number: int) -> list[Any]:
        for ax in (left, right, other):
            ax.clear()
        predict, seen = partial(model.apply, found[number].params), counts[: number + 1]
        jaxnn.plotting.decision_regions(predict, batch, left)
        left.legend().remove()  # The one below, of all frames, hides no point.
        left.set_title(f"{rights[number]:.1f} % of {len(batch.x)} rows right")
        right.plot(seen, losses[: number + 1], "o-", color=BLUE)
        other.plot(seen, rights[: number + 1], "s--", color=ORANGE)
        right.set_xscale("symlog", linthresh=1)
        right.xaxis.set_major_formatter("{x:,.0f}")
        right.set(xlim=(-0.2, 1.2 * counts[-1] + 1), ylim=(0, 1.05 * np.nanmax(losses)))
        right.set(xlabel="step", title=f"loss {losses[number]:.3f}")
        right.set_ylabel("loss (circles)", color=BLUE)
        other.set_ylim(0, 102)
        other.yaxis.set_label_position("right")
        other.yaxis.tick_right()
        other.set_ylabel("rows right, % (squares)", color=ORANGE)
        figure.suptitle(f"{title}: step {counts[number]:,}")
        return []

    save_film(FuncAnimation(figure, frame, frames=len(counts)), path, dpi)
