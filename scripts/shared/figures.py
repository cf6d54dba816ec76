"""Figures and films, written to files: matplotlib without a display."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import jaxnn
from shared.runs import finished

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

FRAMES = 24
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Colours that colour-blind readers tell apart (Okabe and Ito)."""


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure to a file, close it and print the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    print(path)


def save_film(film: FuncAnimation, path: Path) -> None:
    """Write a film as a GIF of five frames a second, and print the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    film.save(path, PillowWriter(fps=5))
    print(path)


def film_regions(
    train: Callable[[int], Any], model: jaxnn.Model, batch: jaxnn.Batch, steps: int, path: Path
) -> None:
    """Film the decision regions after ever more steps; `train(steps)` returns a result."""
    counts = np.unique(np.geomspace(1, steps + 1, FRAMES).astype(int)) - 1
    figure, axes = plt.subplots(figsize=(6.4, 5.2), layout="constrained")

    def frame(number: int) -> list[Any]:
        axes.clear()
        found = finished(train(int(counts[number])))
        jaxnn.plotting.decision_regions(partial(model.apply, found.params), batch, ax=axes)
        axes.set_title(f"step {counts[number]:,}: loss {found.loss:.3f}")
        return []

    save_film(FuncAnimation(figure, frame, frames=len(counts)), path)
    plt.close(figure)
