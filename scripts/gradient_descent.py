"""Train a small network, or many, by gradient descent, with any optimizer and schedule.

Prints how it ended, the loss and the accuracy.

    python scripts/gradient_descent.py --data spiral --hidden 64 --epochs 1e4 --plot
    python scripts/gradient_descent.py --data spiral --hidden 64 --networks 20 --start small
    python scripts/gradient_descent.py --optimizer momentum --learning-rate 0.5 --batch-size 32
    python scripts/gradient_descent.py --validation 1000 --patience 200 --animate descent.gif
    python scripts/gradient_descent.py --data iris.csv --target species --standardise
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from shared import cli
from shared.figures import Figure, film_regions, panels, save, slide
from shared.problems import DATA, has_regions, problem_of, score_of, split
from shared.runs import done_before, finished, timed

import jaxnn

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": jaxnn.optimizers.sgd,
    "momentum": partial(jaxnn.optimizers.sgd, momentum=0.9),
    "nesterov": partial(jaxnn.optimizers.sgd, momentum=0.9, nesterov=True),
    "rmsprop": jaxnn.optimizers.rmsprop,
    "adam": jaxnn.optimizers.adam,
}
STARTS: dict[str, dict[str, Any]] = {"he": {"scale": 1.0, "distribution": "he"}, "small": {}}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    cli.add_problem(parser)
    add, number = parser.add_argument, cli.at_least(0)
    add("--epochs", type=number, default=10_000, help="The passes over the rows, such as 1e4.")
    add("--networks", type=cli.at_least(1), help="Train this many networks side by side.")
    add("--start", choices=STARTS, default="he", help='"small" is 0.01 times normals.')
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="The optimizer.")
    add("--learning-rate", type=float, default=0.05, help="The learning rate at the start.")
    add("--schedule", choices=("cosine", "constant", "inverse-time"), default="cosine",
        help="How the learning rate falls.")  # fmt: skip
    add("--decay", type=float, default=1e-3, help="The decay rate of the inverse-time schedule.")
    add("--warmup", type=number, default=0, help="Raise the rate over this many steps.")
    add("--batch-size", type=int, help="Take this many rows a step; all if absent.")
    add("--keep-remainder", action="store_true", help="Step on the rows left over in an epoch.")
    add("--weight-decay", type=float, default=0.0, help="The decoupled weight decay of Adam.")
    add("--l2", type=float, default=0.0, help="The strength of an L2 penalty.")
    add("--max-norm", type=float, help="Clip gradients to this norm.")
    add("--tolerance", type=float, default=0.0, help="Stop when losses differ by less than this.")
    add("--validation", type=cli.at_least(0, "of rows, "), default=0, metavar="ROWS",
        help="Validate on this many fresh rows a class, or on this many rows of a CSV file, which "
        "are held out.")  # fmt: skip
    add("--patience", type=number, help="Stop after this many epochs without a lower loss there.")
    add("--min-delta", type=float, default=0.0, help="Ask for a loss lower by more than this.")
    cli.add_limits(parser)
    cli.add_save(parser)
    add("--plot", action="store_true", help="Draw loss, accuracy and decision regions.")
    add("--animate", type=cli.film_file, metavar="FILE.gif",
        help="Film the decision regions; FILE.mp4 needs ffmpeg.")  # fmt: skip
    cli.add_output(parser)
    arguments = parser.parse_args(argv)
    if arguments.networks is not None and arguments.animate:
        parser.error("--animate films one network: leave out --networks")
    if arguments.patience and not arguments.validation:
        parser.error("--patience needs rows to validate on: give --validation")
    if arguments.min_delta and not arguments.patience:
        parser.error("--min-delta needs --patience")
    if arguments.keep_remainder and arguments.batch_size is None:
        parser.error("--keep-remainder needs --batch-size")
    if arguments.weight_decay and arguments.optimizer != "adam":
        parser.error("--weight-decay is Adam's: give --optimizer adam, or --l2")
    return arguments


def optimizer_of(arguments: argparse.Namespace, steps: int) -> Any:
    """Return the optimizer that the options describe, for that number of steps."""
    rate, schedules = arguments.learning_rate, jaxnn.schedules
    schedule = {
        "constant": schedules.constant(rate),
        "cosine": schedules.cosine_decay(rate, rate / 1_000, max(steps, 1)),
        "inverse-time": schedules.inverse_time_decay(rate, arguments.decay),
    }[arguments.schedule]
    if arguments.warmup:
        schedule = schedules.linear_warmup(schedule, arguments.warmup)
    decay = {"weight_decay": arguments.weight_decay} if arguments.weight_decay else {}
    optimizer = OPTIMIZERS[arguments.optimizer](schedule, **decay)
    if arguments.max_norm is not None:
        optimizer = jaxnn.optimizers.clip_by_global_norm(optimizer, arguments.max_norm)
    return jaxnn.optimizers.add_l2(optimizer, arguments.l2) if arguments.l2 else optimizer


def steps_of(arguments: argparse.Namespace, rows: int) -> int:
    """Return the steps of an epoch."""
    full, rest = divmod(rows, min(arguments.batch_size or rows, rows))
    return full + (arguments.keep_remainder and rest > 0)


def rows_of(
    arguments: argparse.Namespace, batch: jaxnn.Batch, key: jax.Array
) -> tuple[jaxnn.Batch, jaxnn.Batch | None]:
    """Return the rows to train on and those to validate on: fresh ones, or some of a file's."""
    if not arguments.validation:
        return batch, None
    if arguments.data in DATA:
        return batch, DATA[arguments.data](key, samples=arguments.validation)
    return split(key, batch, arguments.validation)


def descent_of(
    arguments: argparse.Namespace,
    model: jaxnn.Model,
    batch: jaxnn.Batch,
    validation: jaxnn.Batch | None,
    keys: jax.Array,
) -> partial:
    """Return the descent except for its length."""
    init_key, key = keys
    start = partial(model.init, **STARTS[arguments.start])
    if arguments.networks is not None:
        start, init_key = jax.vmap(start), jax.random.split(init_key, arguments.networks)
    return partial(
        jaxnn.gradient_descent,
        key,
        model.value_and_grad,
        start(init_key),
        batch,
        optimizer=optimizer_of(arguments, arguments.epochs * steps_of(arguments, len(batch.x))),
        num_networks=arguments.networks,
        batch_size=arguments.batch_size,
        drop_remainder=not arguments.keep_remainder,
        tolerance=arguments.tolerance,
        target_loss=arguments.target_loss,
        validation_batch=validation,
        patience=arguments.patience,
        min_delta=arguments.min_delta,
        metric_fn=score_of(model)[1] if arguments.plot or arguments.checkpoint else None,
    )


def best_of(result: Any) -> Any:
    """Return the params of the network with the lowest loss."""
    if np.ndim(result.loss) == 0:
        return result.params
    return jax.tree.map(lambda leaf: leaf[np.argmin(result.loss)], result.params)


@slide
def draw(result: Any, model: jaxnn.Model, batch: jaxnn.Batch, epoch: float, title: str) -> Figure:
    """Draw losses and scores over epochs, of `epoch` evaluations each, and the best's regions."""
    figure, (left, middle, *right) = panels(2 + has_regions(model), 6)
    history, score = result.history, score_of(model)[0]
    over, after = history.evaluations / epoch, history.epoch_evaluations / epoch
    losses, scores = {"training": (over, history.loss)}, {"training": (after, history.metric)}
    if history.validation_loss is not None:
        losses["validation"] = after, history.validation_loss
        scores["validation"] = after, history.validation_metric
    for ax, curves, name in ((left, losses, "loss"), (middle, scores, score)):
        rows = {label: [(x, y) for y in np.atleast_2d(ys)] for label, (x, ys) in curves.items()}
        jaxnn.plotting.loss_curves(rows, ax, xlabel="epoch", log_x=True, log_y=name == "loss")
        ax.set_ylabel(name)
    middle.set_ylim(bottom=max(middle.get_ylim()[0], -1))  # R2 begins anywhere below.
    held_out = losses.get("validation", (after, 0))[1]
    if np.ndim(held_out) == 1 and np.any(np.isfinite(held_out)):
        best = after[np.nanargmin(held_out)]
        label = f"lowest validation loss, epoch {best:,.0f}"
        for ax in (left, middle):
            ax.axvline(best, color="0.35", linestyle=":", label=label)
    if right:
        predict = partial(model.apply, best_of(result))
        jaxnn.plotting.decision_regions(predict, batch, right[0])
        right[0].set_title(f"regions at loss {np.min(result.loss):.3f}")
    jaxnn.plotting.shared_legend(figure)
    figure.suptitle(title)
    return figure


def outcome(result: Any, scores: dict[str, np.ndarray], seconds: float) -> str:
    """Return what came out: a line, or for many networks a line a measure."""
    end = f"{np.sum(result.num_steps):,} steps, {seconds:.2f} seconds"
    if np.ndim(result.loss) == 0:
        told = ", ".join(f"{name.replace('_', ' ')} {score:.3f}" for name, score in scores.items())
        lowest = np.nanmin(result.history.loss, initial=np.inf)
        if lowest < 0.99 * result.loss:
            told += f", lowest loss of a step {lowest:.4f}"
        return f"{result.status}: loss {result.loss:.4f}, {told}; {end}"
    words, counts = np.unique(result.status, return_counts=True)
    lines = [", ".join(f"{n} {word}" for word, n in zip(words, counts, strict=True)) + f"; {end}"]
    for name, values in {"loss": result.loss, **scores}.items():
        low, middle, high = np.quantile(values, [0, 0.5, 1])
        lines.append(f"{name.replace('_', ' ')}: {low:.4f} to {high:.4f}, median {middle:.4f}")
    return "\n".join(lines)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Train and report."""
    arguments = parse(argv)
    problem = problem_of(arguments, 3)
    model, keys = problem.model, problem.keys
    batch, validation = rows_of(arguments, problem.batch, keys[2])
    if arguments.animate and not has_regions(model):
        raise ValueError("--animate films the regions of classes of two features")
    train = descent_of(arguments, model, batch, validation, keys[:2])
    before = done_before(arguments.checkpoint)
    result, seconds = timed(train, "num_epochs", arguments.epochs, **cli.limits_of(arguments))
    name, metric_fn = score_of(model)
    if arguments.networks is not None:
        metric_fn = jax.vmap(metric_fn, in_axes=(0, None))
    scores = {name: np.asarray(metric_fn(result.params, batch))}
    if validation is not None:
        scores[f"validation_{name}"] = np.asarray(metric_fn(result.params, validation))
    print(outcome(result, scores, seconds))
    title = cli.title_of(arguments.data, model.settings.sizes)
    kind = f"{arguments.optimizer}, learning rate {arguments.learning_rate:g}"
    names = ("loss", "num_steps", "num_evaluations", "status")
    report = {name: np.asarray(getattr(result, name)).tolist() for name in names}
    report |= {name: score.tolist() for name, score in scores.items()} | {"seconds": seconds}
    if not before:
        report["steps_per_second"] = int(np.sum(result.num_steps)) / seconds
    problem.save(arguments.save, best_of(result))
    cli.write_json(arguments.json, report)
    if arguments.plot and np.any(result.num_steps):
        rows, size = len(batch.x), arguments.batch_size or len(batch.x)
        used = rows if arguments.keep_remainder else rows - rows % min(size, rows)
        figure = draw(result, model, batch, 3 * used / rows, f"{title}, {kind}")
        save(figure, arguments, f"gradient-descent-{title.replace(', ', '-')}")
    finished(result)
    if arguments.animate:
        epochs = -(-result.num_steps // steps_of(arguments, len(batch.x)))
        given = model, batch, epochs, arguments.animate, f"{title}, {kind}", arguments.dpi
        film_regions(lambda count: train(num_epochs=count), *given)


if __name__ == "__main__":
    sys.exit(main())
