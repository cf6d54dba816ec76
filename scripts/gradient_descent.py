"""Gradient descent on a small network, or on many, with any of the optimizers and schedules.

python scripts/gradient_descent.py --data spiral --hidden 64 --epochs 1e4 --plot
python scripts/gradient_descent.py --data spiral --hidden 64 --networks 20 --start small
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
from command_line import (
    add_limits,
    add_output,
    add_problem,
    command,
    count,
    film_file,
    parser_for,
    write_json,
)
from films import film_regions
from problems import DATA
from resuming import finished

import jaxnn
from jaxnn.run import checkpoint as checkpoints

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OPTIMIZERS: dict[str, Callable[..., jaxnn.optimizers.Optimizer]] = {
    "sgd": jaxnn.optimizers.sgd,
    "momentum": partial(jaxnn.optimizers.sgd, momentum=0.9),
    "nesterov": partial(jaxnn.optimizers.sgd, momentum=0.9, nesterov=True),
    "rmsprop": jaxnn.optimizers.rmsprop,
    "adam": jaxnn.optimizers.adam,
}


STARTS: dict[str, dict[str, Any]] = {"he": {"scale": 1.0, "distribution": "he"}, "small": {}}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add_problem(parser)
    add = parser.add_argument
    add("--epochs", type=count, default=10_000, help="passes over the rows, as 1e4")
    add(
        "--networks",
        type=count,
        help="train this many networks, each from a start of its own; one by default",
    )
    add("--start", choices=STARTS, default="he", help="small: 0.01 times normals")
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
    add("--validation", type=count, default=0, help="rows a class to validate on")
    add("--patience", type=count, help="epochs without a better loss on them")
    add_limits(parser, "step")
    add("--plot", action="store_true", help="draw the loss and the decision regions")
    add("--animate", type=film_file, metavar="FILE.gif", help="draw the regions while it trains")
    add_output(parser)
    arguments = parser.parse_args(argv)
    if arguments.networks is not None and (arguments.networks < 1 or arguments.animate):
        parser.error("--networks must be at least 1, and --animate films one network alone")
    if arguments.patience and not arguments.validation:
        parser.error("--patience needs rows to validate on: give --validation")
    if arguments.keep_remainder and arguments.batch_size is None:
        parser.error("--keep-remainder needs --batch-size")
    if arguments.weight_decay and arguments.optimizer != "adam":
        parser.error("--weight-decay is Adam's: give --optimizer adam, or --l2")
    return arguments


def optimizer_of(arguments: argparse.Namespace, steps: int) -> jaxnn.optimizers.Optimizer:
    """The optimizer that the options describe, for that number of steps."""
    rate, schedules = arguments.learning_rate, jaxnn.schedules
    schedule = {
        "constant": schedules.constant(rate),
        "cosine": schedules.cosine_decay(rate, rate / 1_000, max(steps, 1)),
        "inverse-time": schedules.inverse_time_decay(rate, arguments.decay),
    }[arguments.schedule]
    if arguments.linear_warmup:
        schedule = schedules.linear_warmup(schedule, arguments.linear_warmup)
    decay = {"weight_decay": arguments.weight_decay} if arguments.weight_decay else {}
    optimizer = OPTIMIZERS[arguments.optimizer](schedule, **decay)
    if arguments.max_norm is not None:
        optimizer = jaxnn.optimizers.clip_by_global_norm(optimizer, arguments.max_norm)
    return jaxnn.optimizers.add_l2(optimizer, arguments.l2) if arguments.l2 else optimizer


def draw(result: Any, model: jaxnn.Model, batch: jaxnn.Batch, title: str, path: Path) -> None:
    """The loss at every step and after every epoch, and the best network's regions at the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    history, losses = result.history, np.atleast_1d(result.loss)
    curves = {"training": [(history.evaluations, loss) for loss in np.atleast_2d(history.loss)]}
    if history.validation_loss is not None:
        rows = np.atleast_2d(history.validation_loss)
        curves["validation"] = [(history.validation_evaluations, row) for row in rows]
    jaxnn.plotting.loss_curves(curves, left, log_x=True, log_y=True).set_title(title)
    best = params_of_best(result)
    jaxnn.plotting.decision_regions(partial(model.apply, best), batch, ax=right)
    right.set_title(f"loss {losses.min():.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def params_of_best(result: Any) -> Any:
    """The params of the network, or of that with the lowest loss."""
    if np.ndim(result.loss) == 0:
        return result.params
    return jax.tree.map(lambda leaf: leaf[np.argmin(result.loss)], result.params)


def timed(train: Callable[..., Any], arguments: argparse.Namespace) -> tuple[Any, dict[str, float]]:
    """Runs the descent; returns its result and its pace."""
    saved: Path | None = arguments.checkpoint
    before = 0
    if saved and saved.exists():
        before = int(np.sum(checkpoints.load(saved)[0].get("num_steps", 0)))
    finished(train(num_epochs=1))  # compiles, so that the seconds below are the descent's own
    started = time.perf_counter()
    result = train(
        num_epochs=arguments.epochs,
        max_seconds=arguments.max_seconds,
        checkpoint=saved,
        progress=True,
    )
    seconds = time.perf_counter() - started
    steps = int(np.sum(result.num_steps)) - before
    return result, {"seconds": seconds, "steps_per_second": steps / seconds}


def problem_of(arguments: argparse.Namespace) -> tuple[jaxnn.Model, jaxnn.Batch, partial]:
    """The network, its batch, and the descent but for its length."""
    data_key, init_key, key, validation_key = jax.random.split(jax.random.key(arguments.seed), 4)
    batch = DATA[arguments.data](data_key, samples=arguments.samples)
    model = jaxnn.mlp((2, *arguments.hidden, 3))
    init = partial(model.init, **STARTS[arguments.start])
    networks = arguments.networks
    start = init(init_key)
    if networks is not None:
        start = jax.vmap(init)(jax.random.split(init_key, networks))
    validation = None
    if arguments.validation:
        validation = DATA[arguments.data](validation_key, samples=arguments.validation)
    train = partial(
        jaxnn.gradient_descent,
        key,
        model.value_and_grad,
        start,
        batch,
        optimizer=optimizer_of(arguments, arguments.epochs * steps_of(arguments, len(batch.x))),
        num_networks=networks,
        batch_size=arguments.batch_size,
        drop_remainder=not arguments.keep_remainder,
        tolerance=arguments.tolerance,
        target_loss=arguments.target_loss,
        validation_batch=validation,
        patience=arguments.patience,
    )
    return model, batch, train


def steps_of(arguments: argparse.Namespace, rows: int) -> int:
    """Steps of an epoch."""
    full, rest = divmod(rows, min(arguments.batch_size or rows, rows))
    return full + (arguments.keep_remainder and rest > 0)


def told(result: Any, accuracy: Any, pace: dict[str, float]) -> str:
    """The outcome in a line, or in one for each measure of many networks."""
    end = f"{np.sum(result.num_steps):,} steps, {pace['steps_per_second']:,.0f} a second"
    if np.ndim(result.loss) == 0:
        return f"{result.status}: loss {result.loss:.4f}, accuracy {accuracy:.3f}; {end}"
    words, counts = np.unique(result.status, return_counts=True)
    lines = [", ".join(f"{n} {word}" for word, n in zip(words, counts, strict=True)) + f"; {end}"]
    for name, values in {"loss": result.loss, "accuracy": accuracy}.items():
        low, middle, high = np.quantile(values, [0, 0.5, 1])
        lines.append(f"{name}: {low:.4f} to {high:.4f}, median {middle:.4f}")
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Trains and reports; returns the exit status."""
    arguments = parse(argv)
    model, batch, train = problem_of(arguments)
    result, pace = timed(train, arguments)
    accuracy: Any = np.asarray(
        model.accuracy(result.params, batch)
        if arguments.networks is None
        else jax.vmap(model.accuracy, (0, None))(result.params, batch)
    )
    print(told(result, accuracy, pace))
    sizes = "-".join(map(str, model.settings.sizes))
    if arguments.plot and np.any(result.num_steps):
        path = arguments.output / f"gradient-descent-{arguments.data}-{sizes}.png"
        draw(result, model, batch, f"{arguments.data}, {sizes}, {arguments.optimizer}", path)
        print(path)
    facts = {
        "loss": np.asarray(result.loss).tolist(),
        "accuracy": accuracy.tolist(),
        "num_steps": np.asarray(result.num_steps).tolist(),
        "num_evaluations": np.asarray(result.num_evaluations).tolist(),
        "status": np.asarray(result.status).tolist(),
    }
    write_json(arguments.json, facts | pace)
    finished(result)
    if arguments.animate:
        done = -(-result.num_steps // steps_of(arguments, len(batch.x)))  # if it stopped before
        film_regions(lambda epochs: train(num_epochs=epochs), model, batch, done, arguments.animate)
        print(arguments.animate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
