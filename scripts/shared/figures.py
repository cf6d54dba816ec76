"""Figures and films, written to files: matplotlib without a display."""

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
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

plt.rcParams |= {
    "figure.constrained_layout.use": True, "legend.frameon": False, "grid.alpha": 0.3,
    "errorbar.capsize": 3, "lines.markersize": 5,
}  # fmt: skip
FRAMES = 24
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Colours that colour-blind readers tell apart (Okabe and Ito)."""


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure to a file, close it and print the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    print(path)


def error_bars(axes: Axes, x: ArrayLike, middle: ArrayLike, ends: ArrayLike, **style: Any) -> None:
    """Draw values `(points,)` with bars from the first to the last of their ends `(points, 2)`."""
    axes.errorbar(x, middle, np.abs(np.transpose(ends) - middle), **style)
    axes.grid(visible=True)


def colors_of(number: int) -> np.ndarray:
    """Return colours in order, dark to light, for numbers that rise."""
    return plt.get_cmap("viridis")(np.linspace(0, 0.92, number))


def save_film(film: FuncAnimation, path: Path) -> None:
    """Write a film as a GIF of five frames a second, and print the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    film.save(path, PillowWriter(fps=5))
    print(path)
    plt.close("all")


def film_regions(
    train: Callable[[int], Any], model: jaxnn.Model, batch: jaxnn.Batch, steps: int, path: Path
) -> None:
    """Film the decision regions after ever more steps; `train(steps)` returns a result."""
    counts = np.unique(np.geomspace(1, steps + 1, FRAMES).astype(int)) - 1
    figure, axes = plt.subplots(figsize=(6.4, 5.2))

    def frame(number: int) -> list[Any]:
        axes.clear()
        found = finished(train(int(counts[number])))
        jaxnn.plotting.decision_regions(partial(model.apply, found.params), batch, ax=axes)
        axes.set_title(f"step {counts[number]:,}: loss {found.loss:.3f}")
        return []

    save_film(FuncAnimation(figure, frame, frames=len(counts)), path)
