r"""Checks gradients against `jax.grad` and finite differences: all of the library's, or your own.

Exits with status 1 if any gradient is wrong, and with 2 after an error. Your own functions are
named as `module:function` or `file.py:function`; params and batch as well, where a function of no
argument is called, and one of a key, `sample_fn(key)`, draws params.

    python scripts/check_gradients.py
    python scripts/check_gradients.py --depths 1 2 3 4 5 --samples 100 --json gradients.json
    python scripts/check_gradients.py --loss my.py:loss --gradient my.py:value_and_grad \
        --params my.py:sample --batch my.py:batch --samples 10000 --plot gradients.png
"""

from __future__ import annotations

import argparse
import inspect
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from command_line import command, count, new_file, parser_for, write_json
from tqdm import tqdm

import jaxnn
from jaxnn.model.activations import HIDDEN_ACTIVATIONS
from jaxnn.model.losses import OUTPUT_LOSSES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEATURES, OUTPUTS, ROWS = 3, 2, 7
WIDTHS = (5, 4, 6, 3)


def networks(depths: Sequence[int]) -> Iterator[jaxnn.Model]:
    """Every network of the product; a single layer has no hidden activation to vary."""
    for output, loss in OUTPUT_LOSSES:
        for depth in depths:
            sizes = (FEATURES, *WIDTHS[: depth - 1], OUTPUTS)
            for hidden in HIDDEN_ACTIVATIONS if depth > 1 else HIDDEN_ACTIVATIONS[:1]:
                yield jaxnn.mlp(sizes, hidden=hidden, output=output, loss=loss)


def random_batch(loss: str, seed: int) -> jaxnn.Batch:
    """Rows with targets that the loss can mean."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(ROWS, FEATURES)).astype(np.float32)
    if loss == "categorical_crossentropy":
        return jaxnn.Batch(x, generator.integers(0, OUTPUTS, ROWS))
    if loss == "binary_crossentropy":
        return jaxnn.Batch(x, generator.integers(0, 2, (ROWS, OUTPUTS)))
    return jaxnn.Batch(x, generator.normal(size=(ROWS, OUTPUTS)).astype(np.float32))


def check(model: jaxnn.Model, arguments: argparse.Namespace) -> jaxnn.GradientReport:
    """The report of one network."""
    return jaxnn.check_gradients(
        jax.random.key(arguments.seed),
        model.loss_reference,
        model.value_and_grad,
        model.sampler(scale=1.0),
        random_batch(model.settings.loss, arguments.seed),
        num_samples=arguments.samples,
        tolerance=arguments.tolerance,
    )


def facts(report: jaxnn.GradientReport) -> dict[str, Any]:
    """What the JSON file says of a report."""
    worst_key = report.worst_key
    return report._asdict() | {
        "leaves": [leaf._asdict() for leaf in report.leaves],
        "worst": report.worst._asdict(),
        "worst_key": None if worst_key is None else jax.random.key_data(worst_key).tolist(),
    }


@cache
def scope_of(place: str) -> dict[str, Any]:
    """The names of a file, or of a module, also of one in the working folder."""
    if place.endswith(".py"):
        sys.path.append(str(Path(place).resolve().parent))
        return runpy.run_path(place)
    sys.path.append(str(Path.cwd()))
    return vars(import_module(place))


def file_of(place: str) -> Path | None:
    """The file that a place is in, if there is one."""
    spec = None if place.endswith(".py") else find_spec(place)
    name = place if place.endswith(".py") else spec and spec.origin
    return Path(name).resolve() if name else None


@contextmanager
def blamed(*places: str) -> Iterator[None]:
    """Makes an error in the user's own files a `ValueError` that says where it came from."""
    try:
        yield
    except (Exception, SystemExit) as error:
        own = {file_of(place) for place in places}
        lines = traceback.extract_tb(error.__traceback__)
        lines = [line for line in lines if Path(line.filename).resolve() in own]
        if isinstance(error, SyntaxError):
            raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
        if not lines:
            raise
        where = f"{lines[-1].filename}, line {lines[-1].lineno}, in {lines[-1].name}"
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error


def named(text: str, called: bool) -> Any:
    """What `module:name` or `file.py:name` names; its result, if that is wanted and it can be."""
    place, _, name = text.partition(":")
    if not name:
        raise argparse.ArgumentTypeError(f"must be module:name or file.py:name; got {text}")
    try:
        with blamed(place):
            value = scope_of(place)[name]
    except (ImportError, OSError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"there is no {text}: {error!r}") from error
    with blamed(place):
        return value() if called and callable(value) and not needs(value) else value


def needs(function: Callable[..., Any]) -> bool:
    """Whether a function has to be given anything."""
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty and p.kind in positional for p in parameters)


def refuse_other_arguments(function: Any) -> None:
    """Refuses a function that does not take params and batch, with its place."""
    try:
        inspect.signature(function).bind("params", "batch")
    except TypeError as error:
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is None:
            raise
        where = f"{code.co_filename}, line {code.co_firstlineno}, in {code.co_name}"
        raise ValueError(f"{where}: {error} for (params, batch)") from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add, most = parser.add_argument, len(WIDTHS) + 1
    add("--depths", type=int, nargs="+", default=[1, 2, 3], choices=range(1, most + 1),
        help="numbers of layers of the library's networks")  # fmt: skip
    add("--samples", type=count, default=20, help="parameter sets a network, as 1e4")
    add("--seed", type=int, default=0, help="of the data and the parameter sets")
    add("--tolerance", type=float, default=1e-9, help="against jax.grad, relative")
    add("--verbose", action="store_true", help="print every network's table")
    add("--json", type=new_file, metavar="FILE", help="write the reports here")
    own = parser.add_argument_group("your own gradient")
    names = {
        "loss": "loss(params, batch), differentiable by JAX",
        "gradient": "(params, batch) -> loss and gradient: what is checked",
        "params": "a tree of arrays, or sample_fn(key)",
        "batch": "what both functions take as batch; None if not given",
    }
    for name, meaning in names.items():
        own.add_argument(f"--{name}", metavar="PLACE:NAME", help=meaning)
    own.add_argument("--plot", type=new_file, metavar="FILE", help="error against difference step")
    arguments = parser.parse_args(argv)
    given = [name for name in names if getattr(arguments, name) is not None]
    if given and not {"loss", "gradient", "params"} <= set(given):
        parser.error("--loss, --gradient and --params go together")
    if arguments.plot and not given:
        parser.error("--plot is for your own gradient: give --loss, --gradient and --params")
    arguments.places = [getattr(arguments, name).partition(":")[0] for name in given]
    try:
        for name in given:
            setattr(arguments, name, named(getattr(arguments, name), name in ("params", "batch")))
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return arguments


def check_own(arguments: argparse.Namespace) -> int:
    """The report on the user's own functions; returns the exit status."""
    functions = arguments.loss, arguments.gradient
    for function in filter(callable, functions):
        refuse_other_arguments(function)
    with blamed(*arguments.places):
        report = jaxnn.check_gradients(
            jax.random.key(arguments.seed),
            *functions,
            arguments.params,
            arguments.batch,
            num_samples=arguments.samples,
            tolerance=arguments.tolerance,
        )
    print(report)
    write_json(arguments.json, facts(report))
    if arguments.plot:
        params = arguments.params
        if report.worst_key is not None:
            params = params(report.worst_key)
        draw(jaxnn.difference_errors(*functions, params, arguments.batch), report, arguments.plot)
        print(arguments.plot)
    return 0 if report.passed else 1


def draw(errors: jaxnn.DifferenceErrors, report: jaxnn.GradientReport, path: Path) -> None:
    """The V: which side is wrong, the gradient or the differences."""
    curves = {"gradient checked": errors.gradient, "jax.grad": errors.by_jax}
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    jaxnn.plotting.loss_curves(
        {name: (errors.step, np.maximum(curve, 1e-17)) for name, curve in curves.items()},
        ax,
        xlabel="step of the central difference, relative to the largest parameter",
        log_x=True,
        log_y=True,
    )
    ax.set_ylabel("largest distance from the difference, relative")
    word = "right" if report.passed else "wrong: a flat line never meets the differences"
    ax.set_title(f"parameter set {report.worst.sample}: {word}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def check_all(arguments: argparse.Namespace) -> int:
    """The reports on the library's own gradients; returns the exit status."""
    models = list(networks(arguments.depths))
    reports = []
    for model in tqdm(models, unit=" networks"):
        reports.append(check(model, arguments))
        if arguments.verbose or not reports[-1].passed:
            tqdm.write(f"\n{model}\n{reports[-1]}")
    pairs = zip(models, reports, strict=True)
    write_json(
        arguments.json,
        [{"network": model.settings._asdict()} | facts(report) for model, report in pairs],
    )
    failed = sum(not report.passed for report in reports)
    leaves = [leaf for report in reports for leaf in report.leaves]
    print(
        f"{len(models) - failed} of {len(models)} networks passed; largest relative error "
        f"{max(leaf.error for leaf in leaves):.1e} against jax.grad, "
        f"{max(leaf.difference_error for leaf in leaves):.1e} against finite differences"
    )
    return 1 if failed else 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks; returns the exit status."""
    arguments = parse(argv)
    return check_all(arguments) if arguments.loss is None else check_own(arguments)


if __name__ == "__main__":
    sys.exit(main())
