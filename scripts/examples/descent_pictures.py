"""Draws descents of one weight and of two at several learning rates, as GIFs.

The data are y = 1.5 u + 0.5 v with a little noise, and the loss is the mean squared error. The
learning rates are too small, right (0.2), too large and diverging; for two weights the path goes
over the surface of the loss, for one the second weight is known.

    python scripts/descent_pictures.py
    python scripts/descent_pictures.py --learning-rates 0.2 0.5 0.9 --steps 40
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from command_line import add_output, command, count, parser_for, write_json
from films import write
from matplotlib.animation import FuncAnimation
from resuming import finished

import jaxnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TRUE, START, MARGIN = (1.5, 0.5), -1.0, 4.0
LINE = "#555555"
LEVELS = np.geomspace(0.02, 10, 9)
STYLES = tuple(zip(("#0072B2", "#E69F00", "#CC79A7", "#D55E00"), "o^sD", strict=True))


def plane(seed: int) -> jaxnn.Batch:
    """Forty rows of two inputs; mean squares 1 and 0.15, mean product 0.2: a tilted valley."""
    u, other = np.tile([-1.0, 1.0], 20), np.repeat([-1.0, 1.0], 20)
    x = np.stack([u, 0.2 * u + np.sqrt(0.11) * other], axis=1)
    noise = 0.1 * np.random.default_rng(seed).normal(size=len(x))
    return jaxnn.Batch(x, x @ TRUE + noise)


def loss_fn(params: jax.Array, batch: jaxnn.Batch) -> jax.Array:
    """Mean squared error; a weight that is not among the params is the true one."""
    weights = jnp.append(params, jnp.asarray(TRUE[len(params) :], params.dtype))
    return jnp.mean(jnp.square(jnp.asarray(batch.x) @ weights - jnp.asarray(batch.y)))


def paths(batch: jaxnn.Batch, rates: np.ndarray, weights: int, steps: int) -> np.ndarray:
    """Where each descent is after each step, `(steps + 1, rates, weights)`."""
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
    """The loss at weights `(..., weights)`."""
    flat = jnp.asarray(weights.reshape(-1, weights.shape[-1]), jnp.float32)
    return np.asarray(jax.vmap(loss_fn, (0, None))(flat, batch)).reshape(weights.shape[:-1])


def draw_weight(ax: Axes, path: np.ndarray, rate: float, style: tuple, batch: jaxnn.Batch) -> None:
    """The loss of one weight, and the steps taken on it."""
    span = np.linspace(TRUE[0] - MARGIN, TRUE[0] + MARGIN, 200)
    ax.plot(span, losses(span[:, None], batch), color=LINE, linewidth=1)
    here = losses(path, batch)
    ax.plot(path[:, 0], here, marker=style[1], color=style[0], markersize=5, linewidth=1)
    ax.set(xlim=span[[0, -1]], ylim=(-0.5, MARGIN**2), xlabel="weight", ylabel="loss")
    ax.set_title(f"learning rate {rate:g}: loss {here[-1]:.3g}")


def draw_surface(ax: Axes, path: np.ndarray, rate: float, style: tuple, batch: jaxnn.Batch) -> None:
    """The loss of two weights as contours, and the path over it."""
    sides = [np.linspace(middle - 3, middle + 3, 60) for middle in TRUE]
    height = losses(np.stack(np.meshgrid(*sides), axis=-1), batch)
    ax.contour(*sides, height, levels=LEVELS, colors=LINE, linewidths=0.7)
    ax.plot(*path.T, marker=style[1], color=style[0], markersize=5, linewidth=1)
    ax.set(xlim=sides[0][[0, -1]], ylim=sides[1][[0, -1]])
    ax.set(xlabel="first weight", ylabel="second weight")
    ax.set_title(f"learning rate {rate:g}: loss {losses(path[-1], batch):.3g}")


def film(path: np.ndarray, rates: np.ndarray, draw: Callable[..., None]) -> FuncAnimation:
    """A panel a learning rate and a frame a step, the last one held."""
    size = (3.4 * len(rates), 3.4)
    figure, row = plt.subplots(1, len(rates), figsize=size, layout="constrained", squeeze=False)

    def frame(number: int) -> list[Any]:
        step = min(number, len(path) - 1)
        figure.suptitle(f"step {step}")
        for panel, (ax, rate) in enumerate(zip(row[0], rates, strict=True)):
            ax.clear()
            draw(ax, path[: step + 1, panel], rate, STYLES[panel])
        return []

    return FuncAnimation(figure, frame, frames=len(path) + 5)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    rates = parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[0.02, 0.2, 0.9, 1.05], help="up to 4"
    )
    parser.add_argument("--steps", type=count, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    add_output(parser)
    arguments = parser.parse_args(argv)
    if len(arguments.learning_rates) > len(STYLES) or min(arguments.learning_rates) <= 0:
        parser.error(f"{rates.option_strings[0]} takes up to {len(STYLES)} numbers above 0")
    return arguments


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draws both films; returns the exit status."""
    arguments = parse(argv)
    rates, steps = np.asarray(arguments.learning_rates), arguments.steps
    batch = plane(arguments.seed)
    one, two = (paths(batch, rates, weights, steps) for weights in (1, 2))

    for name, path, draw in (("one", one, draw_weight), ("two", two, draw_surface)):
        place = arguments.output / f"descent-{name}-weight{'s' * (name == 'two')}.gif"
        write(film(path, rates, partial(draw, batch=batch)), place)
        print(place)
    ends = {"one weight": losses(one[-1], batch), "two weights": losses(two[-1], batch)}
    for name, end in ends.items():
        pairs = zip(rates, end, strict=True)
        print(f"{name}:", ", ".join(f"rate {rate:g} loss {loss:.3g}" for rate, loss in pairs))
    write_json(
        arguments.json,
        {"learning_rates": rates.tolist(), **{name: end.tolist() for name, end in ends.items()}},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
