"""Gradient descent on a small network, with any of the optimizers and schedules.

python scripts/gradient_descent.py --data spiral --hidden 64 --epochs 1e4 --plot
python scripts/gradient_descent.py --data spiral --hidden 64 --start small --schedule constant
python scripts/gradient_descent.py --optimizer momentum --learning-rate 0.5 --batch-size 32
python scripts/gradient_descent.py --validation 1000 --patience 200 --animate descent.gif
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from command_line import add_output, add_problem, count, parser_for, write_json
from films import film_regions
from problems import DATA

import jaxnn
from jaxnn.training import checkpoints

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OPTIMIZERS: dict[str, Callable[..., jaxnn.optimizers.Optimizer]] = {
    "sgd": jaxnn.optimizers.sgd,
    "momentum": partial(jaxnn.optimizers.sgd, momentum=0.9),
    "nesterov": partial(jaxnn.optimizers.sgd, momentum=0.9, nesterov=True),
    "rmsprop": jaxnn.optimizers.rmsprop,
    "adam": jaxnn.optimizers.adam,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add_problem(parser)
    add = parser.add_argument
    add("--epochs", type=count, default=10_000, help="passes over the rows, as 1e4")
    add("--start", choices=("he", "small"), default="he", help="small: 0.01 times normals")
    add("--optimizer", choices=OPTIMIZERS, default="adam")
    add("--learning-rate", type=float, default=0.05)
    add("--schedule", choices=("cosine", "constant", "inverse-time"), default="cosine")
    add("--decay", type=float, default=1e-3, help="of the inverse-time schedule")
    add("--warm-up", type=count, default=0, help="steps of rising learning rate")
    add("--batch-size", type=int, help="rows a step; all if not given")
    add("--keep-remainder", action="store_true", help="step on what is left of an epoch")
    add("--weight-decay", type=float, default=0.0, help="of Adam, decoupled")
    add("--l2", type=float, default=0.0, help="strength of an L2 penalty")
    add("--max-norm", type=float, help="clip longer gradients to this")
    add("--tolerance", type=float, default=0.0, help="stop when losses differ by less")
    add("--target-loss", type=float, help="stop at the first step at or below")
    add("--validation", type=count, default=0, help="rows a class to validate on")
    add("--patience", type=count, help="epochs without a better loss on them")
    add("--max-seconds", type=float, help="stop when these are over")
    add("--checkpoint", type=Path, help="save here, and go on from here")
    add("--plot", action="store_true", help="draw the loss and the decision regions")
    add("--animate", type=Path, metavar="FILE.gif", help="draw the regions while it trains")
    add_output(parser)
    arguments = parser.parse_args(argv)
    if arguments.animate and arguments.animate.suffix != ".gif":
        parser.error(f"--animate must name a .gif file; got {arguments.animate}")
    if arguments.patience and not arguments.validation:
        parser.error("--patience needs rows to validate on: give --validation")
    if arguments.keep_remainder and arguments.batch_size is None:
        parser.error("--keep-remainder needs --batch-size")
    if arguments.weight_decay and arguments.optimizer != "adam":
        parser.error("--weight-decay is Adam's: give --optimizer adam, or --l2")
    return arguments


def optimizer_of(arguments: argparse.Namespace, steps: int) -> jaxnn.optimizers.Optimizer:
    """The optimizer that the options describe, for so many steps in all."""
    rate, schedules = arguments.learning_rate, jaxnn.schedules
    schedule = {
        "constant": schedules.constant(rate),
        "cosine": schedules.cosine(rate, rate / 1_000, max(steps, 1)),
        "inverse-time": schedules.inverse_time(rate, arguments.decay),
    }[arguments.schedule]
    if arguments.warm_up:
        schedule = schedules.warm_up(schedule, arguments.warm_up)
    decay = {"weight_decay": arguments.weight_decay} if arguments.weight_decay else {}
    optimizer = OPTIMIZERS[arguments.optimizer](schedule, **decay)
    if arguments.max_norm is not None:
        optimizer = jaxnn.optimizers.clipped(optimizer, arguments.max_norm)
    return jaxnn.optimizers.with_l2_penalty(optimizer, arguments.l2) if arguments.l2 else optimizer


def draw(result: Any, model: jaxnn.Model, batch: jaxnn.Batch, title: str, path: Path) -> None:
    """The loss at every step and after every epoch, and the regions at the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    history = result.history
    curves = {"training": (history.evaluations, history.loss)}
    if history.validation_loss is not None:
        ends = np.linspace(0, history.evaluations[-1], len(history.validation_loss) + 1)[1:]
        curves["validation"] = (ends, history.validation_loss)
    jaxnn.plotting.loss_curves(curves, left, log_x=True, log_y=True).set_title(title)
    jaxnn.plotting.decision_regions(partial(model.apply, result.params), batch, ax=right)
    right.set_title(f"loss {result.loss:.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def timed(train: Callable[..., Any], arguments: argparse.Namespace) -> tuple[Any, dict[str, float]]:
    """Runs the descent; returns its result and its pace."""
    train(num_epochs=1)  # compiles, so that the seconds below are the descent's own
    saved: Path | None = arguments.checkpoint
    before = len(checkpoints.load(saved)[0]["losses"]) if saved and saved.exists() else 0
    started = time.perf_counter()
    result = train(
        num_epochs=arguments.epochs,
        max_seconds=arguments.max_seconds,
        checkpoint=saved,
        progress=True,
    )
    seconds = time.perf_counter() - started
    return result, {"seconds": seconds, "steps_per_second": (result.num_steps - before) / seconds}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains one network and reports; returns the exit status."""
    arguments = parse(argv)
    data_key, init_key, key, validation_key = jax.random.split(jax.random.key(arguments.seed), 4)
    batch = DATA[arguments.data](data_key, samples=arguments.samples)
    model = jaxnn.mlp((2, *arguments.hidden, 3))
    start = {"he": {"scale": 1.0, "distribution": "he"}, "small": {}}[arguments.start]
    rows = len(batch.x)
    full, rest = divmod(rows, min(arguments.batch_size or rows, rows))
    steps = arguments.epochs * (full + (arguments.keep_remainder and rest > 0))
    validation = None
    if arguments.validation:
        validation = DATA[arguments.data](validation_key, samples=arguments.validation)
    train = partial(
        jaxnn.gradient_descent,
        key,
        model.value_and_grad,
        model.init(init_key, **start),
        batch,
        optimizer=optimizer_of(arguments, steps),
        batch_size=arguments.batch_size,
        keep_remainder=arguments.keep_remainder,
        tolerance=arguments.tolerance,
        target_loss=arguments.target_loss,
        validation_batch=validation,
        patience=arguments.patience,
    )
    result, pace = timed(train, arguments)
    accuracy = float(model.accuracy(result.params, batch))
    print(
        f"{result.status}: loss {result.loss:.4f}, accuracy {accuracy:.3f}; "
        f"{result.num_steps:,} steps, {pace['steps_per_second']:,.0f} a second"
    )
    sizes = "-".join(map(str, model.settings.sizes))
    if arguments.plot and result.num_steps:
        path = arguments.output / f"gradient-descent-{arguments.data}-{sizes}.png"
        title = f"{arguments.data}, {sizes}, {arguments.optimizer}"
        draw(result, model, batch, title, path)
        print(path)
    facts = {
        "loss": result.loss if np.isfinite(result.loss) else None,
        "accuracy": accuracy,
        "num_steps": result.num_steps,
        "num_evaluations": result.num_evaluations,
        "status": result.status,
    }
    write_json(arguments.json, facts | pace)
    if arguments.animate:
        done = -(-result.num_steps * arguments.epochs // max(steps, 1))  # if it stopped before
        film_regions(lambda epochs: train(num_epochs=epochs), model, batch, done, arguments.animate)
        print(arguments.animate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
