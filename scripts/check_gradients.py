r"""Check gradients against `jax.grad` and finite differences: the library's, or your own.

Exits with status 0 if all gradients are right, with 1 if one is wrong, with 2 if they could not be
checked, and with 3 if all are right, but coverage or power are below what is required. Name your
own functions, in JAX or in NumPy, as `module:function` or `file.py:function`. Params and batch are
named the same way: a function without arguments is called, and a function of a key,
`sample_fn(key)`, draws params.

    python scripts/check_gradients.py
    python scripts/check_gradients.py --depths 1 2 3 4 5 --samples 100 --json gradients.json
    python scripts/check_gradients.py --loss my.py:loss --gradient my.py:value_and_grad \
        --params my.py:sample --batch my.py:batch --samples 10000 --plot gradients.png

With --certify the report also tells which branches of the loss were visited, which planted faults
the check would have caught and, of a wrong gradient, the smallest case. In continuous integration:

    python scripts/check_gradients.py --loss my.py:loss --gradient my.py:value_and_grad \
        --params my.py:sample --batch my.py:batch --report gradients.html \
        --write-failing-case failing.py --require-coverage 1 --require-power 0.95

With a CSV file the rows are those of the file, for the library's networks or for your gradient.

    python scripts/check_gradients.py --data iris.csv --target species
"""

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
import numpy as np
from shared import cli
from shared.figures import Figure, plt, save, slide
from shared.gradient_page import page_of
from shared.problems import csv_of, model_of
from tqdm.auto import tqdm

import jaxnn
from jaxnn.gradients.check import is_sampler
from jaxnn.model.activations import HIDDEN_ACTIVATIONS
from jaxnn.model.losses import ERROR_LOSSES, OUTPUT_LOSSES

FEATURES, OUTPUTS, ROWS = 3, 2, 7
WIDTHS = (5, 4, 6, 3)


def networks(
    depths: Sequence[int], table: jaxnn.datasets.Table | None = None
) -> Iterator[jaxnn.Model]:
    """Yield networks with every pair of output and loss, and with every hidden activation.

    One layer has no hidden activation to vary; others vary it for one pair of each loss. A file's
    rows have either classes or numbers as targets, and the losses of those.
    """
    features, outputs, pairs = FEATURES, OUTPUTS, list(OUTPUT_LOSSES)
    if table is not None:
        features, outputs = model_of((), table).settings.sizes
        if table.columns.class_names is None:
            pairs = [p for p in pairs if p[1] in ERROR_LOSSES and p[0] != "softmax"]
        else:
            pairs = [("softmax", "categorical_crossentropy")]
    seen = set()
    for output, loss in pairs:
        for depth in depths:
            sizes = (features, *WIDTHS[: depth - 1], outputs)
            varies = depth > 1 and loss not in seen
            for hidden in HIDDEN_ACTIVATIONS if varies else ["tanh"]:
                yield jaxnn.mlp(sizes, hidden=hidden, output=output, loss=loss)
        seen.add(loss)


def random_batch(loss: str, seed: int, weighted: bool) -> jaxnn.Batch:
    """Draw rows with targets that the loss allows, and with weights."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(ROWS, FEATURES)).astype(np.float32)
    y = generator.normal(size=(ROWS, OUTPUTS)).astype(np.float32)
    if loss == "categorical_crossentropy":
        y = generator.integers(0, OUTPUTS, ROWS)
    elif loss == "binary_crossentropy":
        y = generator.integers(0, 2, (ROWS, OUTPUTS))
    return jaxnn.Batch(x, y, generator.random(ROWS) if weighted else None)


def check(arguments: argparse.Namespace, *given: Any) -> jaxnn.GradientReport:
    """Check one gradient: a loss, its gradient, params or their sampler, and a batch."""
    return jaxnn.check_gradients(
        jax.random.key(arguments.seed),
        *given,
        num_samples=arguments.samples,
        tolerance=arguments.tolerance,
        certify=arguments.certify,
    )


def status_of(arguments: argparse.Namespace, reports: Sequence[jaxnn.GradientReport]) -> int:
    """Return the exit status, and print what is below what is required."""
    if not all(report.passed for report in reports):
        return 1
    status = 0
    for name in ("coverage", "power"):
        required = getattr(arguments, f"require_{name}")
        found = [getattr(report, name) for report in reports]
        shares = [-1.0 if each is None else each.share for each in found]
        lowest = min(shares, default=1.0)
        if required is not None and lowest < required:
            share = (
                f"of {100 * lowest:.3g} % is too low"
                if lowest >= 0
                else "is not known of a loss that JAX cannot trace"
            )
            print(f"{name} {share}: {100 * required:.3g} % is required")
            status = 3
    return status


def as_dict(report: jaxnn.GradientReport) -> dict[str, Any]:
    """Return what the JSON file says of a report."""
    facts, worst_key = report._asdict(), report.worst_key
    facts["worst_key"] = None if worst_key is None else jax.random.key_data(worst_key).tolist()
    for name in ("coverage", "power"):
        part = facts[name]
        facts[name] = part and {"share": part.share} | part._asdict()
    if report.smallest is not None:  # Its trees may be of any class; its script has the numbers.
        rest = report.smallest._asdict().items()
        facts["smallest"] = {name: fact for name, fact in rest if name not in ("params", "batch")}
    return facts


@cache
def scope_of(place: str) -> dict[str, Any]:
    """Return the names in a file, or in a module, which may be in the working folder."""
    is_file = place.endswith(".py")
    sys.path.append(str(Path(place).resolve().parent if is_file else Path.cwd()))
    return runpy.run_path(place) if is_file else vars(import_module(place))


def file_of(place: str) -> Path | None:
    """Return the file that a place is in, if there is one."""
    spec = None if place.endswith(".py") else find_spec(place)
    name = place if place.endswith(".py") else spec and spec.origin
    return Path(name).resolve() if name else None


@contextmanager
def blamed(*places: str, hint: str = "") -> Iterator[None]:
    """Turn an error in the user's own files into a `ValueError` that says where it arose."""
    try:
        yield
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        own = {file_of(place) for place in places}
        lines = traceback.extract_tb(error.__traceback__)
        lines = [line for line in lines if Path(line.filename).resolve() in own]
        if not lines:
            raise
        where = f"{lines[-1].filename}, line {lines[-1].lineno}, in {lines[-1].name}"
        raise ValueError(f"{where}: {type(error).__name__}: {error}{hint}") from error


def named(text: str, called: bool) -> Any:
    """Return what `module:name` or `file.py:name` names, called if asked for and possible."""
    place, _, name = text.partition(":")
    if not name:
        raise argparse.ArgumentTypeError(f"must be module:name or file.py:name; got {text}")
    try:
        with blamed(place):
            value = scope_of(place)[name]
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"there is no {text}: {place} has no {name!r}") from error
    except (ImportError, OSError) as error:
        raise argparse.ArgumentTypeError(f"there is no {text}: {error!r}") from error
    with blamed(place):
        return value() if called and callable(value) and takes(value) else value


def takes(function: Callable[..., Any], *arguments: Any) -> bool:
    """Tell whether a function can be called with these arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


def refuse_other_arguments(function: Any) -> None:
    """Refuse a function that does not take params and batch, and say where it is."""
    if callable(function) and not takes(function, "params", "batch"):
        where, code = str(function), getattr(inspect.unwrap(function), "__code__", None)
        if code is not None:
            where = f"{code.co_filename}, line {code.co_firstlineno}, in {code.co_name}"
        raise ValueError(f"{where}: must take (params, batch)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add, most = parser.add_argument, len(WIDTHS) + 1
    add("--depths", type=int, nargs="+", default=[1, 2, 3], choices=range(1, most + 1),
        help="Check networks of these numbers of layers.")  # fmt: skip
    add("--samples", type=cli.at_least(1), default=20, help="Draw this many params a network.")
    cli.add_data(parser, "Check on the rows of this CSV file.")
    cli.add_seed(parser)
    add("--tolerance", type=float, default=1e-9, help="The relative tolerance against jax.grad.")
    add("--verbose", action="store_true", help="Print the table of every network.")
    add("--json", type=cli.new_file, metavar="FILE", help="Write the reports to this file.")
    add("--certify", action="store_true",
        help="Report coverage, power and the smallest case as well.")  # fmt: skip
    for name, what in (("coverage", "sides of branches"), ("power", "planted faults")):
        add(f"--require-{name}", type=cli.share, metavar="SHARE",
            help=f"Exit with 3 below this share of {what}, from 0 to 1.")  # fmt: skip
    own = parser.add_argument_group("your own gradient")
    names = {
        "loss": "loss(params, batch), which JAX can differentiate, or in NumPy.",
        "gradient": "gradient(params, batch) -> (loss, gradient): what is checked, also in NumPy.",
        "params": "A tree of arrays, or sample_fn(key).",
        "batch": "What both functions take as their batch; None if absent.",
    }
    for name, meaning in names.items():
        own.add_argument(f"--{name}", metavar="PLACE:NAME", help=meaning)
    own.add_argument("--plot", type=cli.new_file, metavar="FILE",
        help="Draw the error against the step of the differences.")  # fmt: skip
    own.add_argument("--report", type=cli.new_file, metavar="FILE.html",
        help="Write all that was found to this page, which needs no other file.")  # fmt: skip
    own.add_argument("--write-failing-case", type=cli.new_file, metavar="FILE.py",
        help="Write the smallest case in which the gradient is wrong as a program.")  # fmt: skip
    arguments = parser.parse_args(argv)
    implying = ("report", "write_failing_case", "require_coverage", "require_power")
    arguments.certify |= any(getattr(arguments, name) is not None for name in implying)
    given = [name for name in names if getattr(arguments, name) is not None]
    if given and not {"loss", "gradient", "params"} <= set(given):
        parser.error("--loss, --gradient and --params go together")
    for name in ("plot", "report", "write_failing_case"):
        if getattr(arguments, name) and not given:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} is for your own gradient: give --loss, --gradient and --params")
    if arguments.plot and arguments.plot.suffix not in ("", ".png", ".svg", ".pdf"):
        parser.error(f"--plot must end in .png, .svg or .pdf; got {arguments.plot}")
    if arguments.data and arguments.batch:
        parser.error("--data and --batch exclude each other")
    arguments.places = [getattr(arguments, name).partition(":")[0] for name in given]
    arguments.named = {name: getattr(arguments, name) for name in given}
    try:
        for name in given:
            setattr(arguments, name, named(getattr(arguments, name), name in ("params", "batch")))
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return arguments


def check_own(arguments: argparse.Namespace) -> int:
    """Check the user's own functions; return the exit status."""
    functions = arguments.loss, arguments.gradient
    for function in functions:
        refuse_other_arguments(function)
    params, table = arguments.params, csv_of(arguments)
    batch = arguments.batch if table is None else table.batch
    hint = " (--batch is absent: batch is None)" if batch is None else ""
    with blamed(*arguments.places, hint=hint):
        report = check(arguments, *functions, params, batch)
    program = arguments.write_failing_case or "--write-failing-case FILE.py"
    word = "is" if arguments.write_failing_case else "writes"
    print(str(report).replace("print(report.smallest.script) is", f"{program} {word}"))
    cli.write_json(arguments.json, as_dict(report))
    if arguments.write_failing_case and report.smallest is not None:
        arguments.write_failing_case.write_text(report.smallest.script, encoding="utf-8")
        print(arguments.write_failing_case)
    if arguments.plot or arguments.report:
        place, params, batch = shown(arguments, report, params, batch)
        errors = jaxnn.difference_errors(*functions, params, batch)
        if arguments.report:
            files = [path for path in map(file_of, arguments.places) if path is not None]
            figure = drawn(errors, report, place)
            page = page_of(report, arguments.named, files, figure)
            arguments.report.write_text(page, encoding="utf-8")
            print(arguments.report)
        if arguments.plot:
            path, kind = arguments.plot, arguments.plot.suffix[1:] or "png"
            folder = argparse.Namespace(output=path.parent, formats=[kind], dpi=144)
            save(drawn(errors, report, place), folder, path.stem)
    return status_of(arguments, [report])


def shown(
    arguments: argparse.Namespace, report: jaxnn.GradientReport, params: Any, batch: Any
) -> tuple[str, Any, Any]:
    """Return where the errors are drawn, in words, and the params and the batch there."""
    if not is_sampler(params):
        return "the params given", params, batch
    if report.worst_key is not None:
        return f"sample {report.worst.sample}", params(report.worst_key), batch
    if report.smallest is not None:  # The worst sample is one that was added to those drawn.
        return "the smallest case", report.smallest.params, report.smallest.batch
    return "one more sample", params(jax.random.key(arguments.seed)), batch


@slide
def drawn(errors: jaxnn.DifferenceErrors, report: jaxnn.GradientReport, place: str) -> Figure:
    """Draw the errors: a V for a right gradient, a flat line for a wrong one."""
    curves = {"gradient checked": errors.gradient, "jax.grad": errors.by_jax}
    figure, ax = plt.subplots()
    curves = {
        name: (errors.step, np.maximum(curve, 1e-17))
        for name, curve in curves.items()
        if curve is not None
    }
    label = "step of the central difference, relative to the largest parameter"
    jaxnn.plotting.loss_curves(curves, ax, xlabel=label, log_x=True, log_y=True)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 1e-12), max(high, 2))  # A flat line has to look flat.
    ax.set_ylabel(
        "largest distance from the difference,\nrelative to all leaves (table: to its own)"
    )
    ax.set_title(f"{place}: " + ("right" if report.passed else f"wrong in {report.worst.name}"))
    return figure


def check_all(arguments: argparse.Namespace) -> int:
    """Check the library's gradients; return the exit status."""
    reports, results, table = [], [], csv_of(arguments)
    models = list(networks(arguments.depths, table))
    for number, model in enumerate(tqdm(models, unit=" networks")):
        drawn = random_batch(model.settings.loss, arguments.seed, weighted=number % 2 == 1)
        batch = table.batch if table else drawn
        functions = model.loss_reference, model.value_and_grad
        report = check(arguments, *functions, model.sampler(scale=1.0), batch)
        if arguments.verbose or not report.passed:
            tqdm.write(f"\n{model}\n{report}")
        reports.append(report)
        results.append({"network": model.settings} | as_dict(report))
    cli.write_json(arguments.json, results)
    passed = sum(report.passed for report in reports)
    leaves = [leaf for report in reports for leaf in report.leaves]
    largest = np.nanmax([(leaf.error, leaf.difference_error) for leaf in leaves], axis=0)
    errors = [f"{error:.1e}" if error else "0 (beyond rounding)" for error in largest]
    print(
        f"{passed} of {len(reports)} networks passed; largest relative error {errors[0]} against "
        f"jax.grad, {errors[1]} against finite differences"
    )
    return status_of(arguments, reports)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; return the exit status."""
    arguments = parse(argv)
    return check_all(arguments) if arguments.loss is None else check_own(arguments)


if __name__ == "__main__":
    sys.exit(main())
