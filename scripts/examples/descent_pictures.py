"""Film descents of one weight and of two at several learning rates, as GIF or MP4.

The data are y = 1.5 u + 0.5 v with a little noise, and the loss is the mean squared error. The
learning rates are too small, right (0.2), too large and diverging. For two weights the film shows
the path over the contours of the loss; for one, the second weight is known. A star marks the
minimum. A descent that leaves the picture is said to, and is drawn for a few steps more.

    python scripts/examples/descent_pictures.py
    python scripts/examples/descent_pictures.py --learning-rates 0.2 0.5 0.9 --steps 40
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import cli
from shared.figures import FuncAnimation, panels, save_film, slide
from shared.runs import finished

import jaxnn

TRUE, START, MARGIN = (1.5, 0.5), -1.0, 4.0
LINE = "#555555"
NOTE = {"facecolor": "white", "edgecolor": LINE, "alpha": 0.9}
MORE = 5
"""Steps drawn after the one that left: lines that cross the picture again and again bury it."""
LEVELS = (0.1, 0.2, 0.5, 1, 2, 5, 10)
STYLES = tuple(zip(("#0072B2", "#E69F00", "#CC79A7", "#D55E00"), "o^sD", strict=True))


def plane(seed: int) -> jaxnn.Batch:
    """Draw forty rows of two inputs whose loss is a tilted valley."""
    u, other = np.tile([-1.0, 1.0], 20), np.repeat([-1.0, 1.0], 20)
    x = np.stack([u, 0.2 * u + np.sqrt(0.11) * other], axis=1)
    noise = 0.1 * np.random.default_rng(seed).normal(size=len(x))
    return jaxnn.Batch(x, x @ TRUE + noise)


def loss_fn(params: jax.Array, batch: jaxnn.Batch) -> jax.Array:
    """Return the mean squared error; a weight that is not among the params is the true one."""
    weights = jnp.append(params, jnp.asarray(TRUE[len(params) :], params.dtype))
    return jnp.mean(jnp.square(jnp.asarray(batch.x) @ weights - jnp.asarray(batch.y)))


def paths(batch: jaxnn.Batch, rates: np.ndarray, weights: int, steps: int) -> np.ndarray:
    """Return where each descent is after each step, `(steps + 1, rates, weights)`."""
    descend = partial(
        jaxnn.gradient_descent,
        jax.random.key(0),
        jax.value_and_grad(loss_fn),
        np.full((len(rates), weights), START, np.float32),
        batch,
        learning_rate=rates,
        num_networks=len(rates),
    )
    results = (finished(descend(num_epochs=number)) for number in range(steps + 1))
    return np.stack([np.asarray(result.params) for result in results])


def losses(weights: np.ndarray, batch: jaxnn.Batch) -> np.ndarray:
    """Return the losses at weights `(..., weights)`."""
    flat = jnp.asarray(weights.reshape(-1, weights.shape[-1]), jnp.float32)
    return np.asarray(jax.vmap(loss_fn, (0, None))(flat, batch)).reshape(weights.shape[:-1])


def minimum(batch: jaxnn.Batch, weights: int) -> np.ndarray:
    """Return the weights of the lowest loss."""
    x, rest = batch.x[:, :weights], batch.x[:, weights:] @ np.array(TRUE[weights:])
    return np.linalg.lstsq(x, batch.y - rest, rcond=None)[0]


def draw_curve(ax: Axes, batch: jaxnn.Batch) -> None:
    """Draw the loss of one weight."""
    span, best = np.linspace(TRUE[0] - MARGIN, TRUE[0] + MARGIN, 200), minimum(batch, 1)
    ax.plot(span, losses(span[:, None], batch), color=LINE)
    ax.plot(best, losses(best[None], batch), "k*", markersize=14, label="minimum", zorder=3)
    ax.set(xlim=span[[0, -1]], ylim=(-0.5, MARGIN**2), xlabel="weight", ylabel="loss")


def draw_contours(ax: Axes, batch: jaxnn.Batch) -> None:
    """Draw the loss of two weights as contours."""
    sides = [np.linspace(middle - 3, middle + 3, 60) for middle in TRUE]
    height = losses(np.stack(np.meshgrid(*sides), axis=-1), batch)
    lines = ax.contour(*sides, height, levels=LEVELS, colors=LINE, linewidths=1)
    ax.clabel(lines, fmt="%g", fontsize=12)
    ax.plot(*minimum(batch, 2), "k*", markersize=14, label="minimum", zorder=3)
    ax.set(xlim=sides[0][[0, -1]], ylim=sides[1][[0, -1]])
    ax.set(xlabel="first weight", ylabel="second weight")


def left_at(points: np.ndarray, ax: Axes) -> int | None:
    """Return the first step after which points `(steps + 1, 2)` are outside the axes, or None."""
    limits = np.transpose([ax.get_xlim(), ax.get_ylim()])
    outside = ~np.all((points >= limits[0]) & (points <= limits[1]), axis=1)
    return int(outside.argmax()) if outside.any() else None


@slide
def film(
    path: np.ndarray, rates: np.ndarray, draw: Callable[..., None], batch: jaxnn.Batch
) -> FuncAnimation:
    """Film a panel a learning rate and a frame a step; the last one is held."""
    figure, row = panels(len(rates), 5, across=len(STYLES))
    heights = losses(path, batch)
    points = path if path.shape[-1] == 2 else np.stack([path[..., 0], heights], axis=-1)
    for ax, (color, marker) in zip(row, STYLES, strict=False):
        draw(ax, batch)
        ax.plot([], [], marker=marker, color=color, linewidth=1, label="steps")
        height = 0.25 if path.shape[-1] == 1 else 0.1
        ax.text(0.5, height, "", transform=ax.transAxes, ha="center", va="center", bbox=NOTE)
        ax.label_outer()

    def frame(number: int) -> list[Any]:
        step = min(number, len(path) - 1)
        figure.suptitle(f"y = {TRUE[0]} u + {TRUE[1]} v with noise, gradient descent: step {step}")
        for panel, (ax, rate) in enumerate(zip(row, rates, strict=True)):
            left = left_at(points[: step + 1, panel], ax)
            end = step if left is None else min(step, left + MORE)
            ax.lines[-1].set_data(*points[: end + 1, panel].T)
            loss = heights[step, panel]
            words = f"{loss:,.0f}" if 100 <= loss < 1e6 else f"{loss:.3g}"
            ax.set_title(f"learning rate {rate:g}\nloss {words}")
            ax.texts[-1].set_text("" if left is None else f"left the picture\nat step {left}")
            ax.texts[-1].set_visible(left is not None)
        return []

    frame(0)
    jaxnn.plotting.shared_legend(figure)
    return FuncAnimation(figure, frame, frames=len(path) + 5)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add = parser.add_argument
    add("--learning-rates", type=float, nargs="+", default=[0.02, 0.2, 0.9, 1.05],
        help="Film up to four learning rates.")  # fmt: skip
    add("--film", type=cli.film_suffix, default=".gif", metavar=".gif|.mp4",
        help="Write films of this kind; .mp4 needs ffmpeg.")  # fmt: skip
    add("--steps", type=cli.at_least(0), default=24, help="The steps of each descent.")
    cli.add_seed(parser)
    cli.add_output(parser)
    arguments = parser.parse_args(argv)
    if len(arguments.learning_rates) > len(STYLES) or min(arguments.learning_rates) <= 0:
        parser.error(f"--learning-rates takes up to {len(STYLES)} numbers above 0")
    return arguments


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Make both films."""
    arguments = parse(argv)
    rates, batch = np.asarray(arguments.learning_rates), plane(arguments.seed)
    ends = {}
    for weights, name, draw in ((1, "one-weight", draw_curve), (2, "two-weights", draw_contours)):
        path = paths(batch, rates, weights, arguments.steps)
        file = arguments.output / f"descent-{name}{arguments.film}"
        save_film(film(path, rates, draw, batch), file, arguments.dpi)
        ends[name] = losses(path[-1], batch)
        pairs = zip(rates, ends[name], strict=True)
        print(f"{name}:", ", ".join(f"rate {rate:g} loss {loss:.3g}" for rate, loss in pairs))
    results = {name: end.tolist() for name, end in ends.items()}
    cli.write_json(arguments.json, {"learning_rates": rates.tolist(), **results})


if __name__ == "__main__":
    sys.exit(main())
