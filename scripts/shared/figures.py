"""Animations of training, as GIFs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from resuming import finished

import jaxnn

FRAMES = 24


def film_regions(
    train: Callable[[int], Any], model: jaxnn.Model, batch: jaxnn.Batch, steps: int, path: Path
) -> None:
    """The decision regions after more and more steps; `train(steps)` -> a result."""
    counts = np.unique(np.geomspace(1, steps + 1, FRAMES).astype(int)) - 1
    figure, axes = plt.subplots(figsize=(6.4, 5.2), layout="constrained")

    def frame(number: int) -> list[Any]:
        axes.clear()
        found = finished(train(int(counts[number])))
        jaxnn.plotting.decision_regions(partial(model.apply, found.params), batch, ax=axes)
        axes.set_title(f"step {counts[number]:,}: loss {found.loss:.3f}")
        return []

    write(FuncAnimation(figure, frame, frames=len(counts)), path)
    plt.close(figure)


def write(film: FuncAnimation, path: Path) -> None:
    """Writes a GIF, five frames a second, into a folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    film.save(path, PillowWriter(fps=5))
