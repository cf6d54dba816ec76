"""Command lines of the scripts: options, tables, JSON files and errors.

A script exits with 0 after success, with 1 if a check failed (a wrong gradient, say), with 2 after
an error, told in one line on stderr, and with 130 after Ctrl-C. One that checks may exit with 3
where it found nothing wrong, but looked at less than was required.
"""

import argparse
import json
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from tqdm.auto import tqdm

from shared.problems import DATA

Sizes = tuple[int, ...]
EXPECTED = (
    TypeError, ValueError, OSError, MemoryError, ArithmeticError, ImportError, RuntimeError,
)  # fmt: skip
"""The errors of bad arguments, missing files and small machines. Any other error is a bug."""


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Make a script's `main(argv)` return an exit status, after an error or Ctrl-C as well."""
    script = Path(main.__code__.co_filename).name

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except KeyboardInterrupt:
            status, message = 130, "interrupted"
        except Exception as error:
            if not isinstance(error, EXPECTED):
                traceback.print_exc()
            status, message = 2, f"error: {in_one_line(error)}"
        # Written here because an except clause keeps progress bars alive, which redraw themselves.
        tqdm.write(f"{script}: {message}", file=sys.stderr)
        return status

    return run


def in_one_line(error: BaseException) -> str:
    """Return an error's message, with the error's name where the message does not imply it."""
    message, name = " ".join(str(error).split()), type(error).__name__
    is_plain = type(error) in (TypeError, ValueError) or isinstance(error, OSError)
    return message if message and is_plain else f"{name}: {message}" if message else name


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as written, and each default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Tells an error in two lines, without all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n--help shows all options.\n")


def parser_for(documentation: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a script's docstring around its options.

    Examples are lines that are indented; the options stand before the first of them.
    """
    description, _, examples = (documentation or "").partition("\n\n    ")
    epilog = f"examples:\n\n    {examples}".rstrip()
    return _Parser(description=description, epilog=epilog, formatter_class=_Help)


def add_problem(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the data and the network."""
    add_data(parser, f"The data set to learn: {', '.join(DATA)} or a CSV file.", "vertical")
    add = parser.add_argument
    add("--samples", type=int, default=100, help="Draw this many rows a class.")
    add("--hidden", type=int, nargs="*", default=[3], help="The units of each hidden layer.")
    add_seed(parser)


def add_data(parser: argparse.ArgumentParser, meaning: str, default: str | None = None) -> None:
    """Add the options that name a CSV file as data or, where there is a default, a data set."""
    names = () if default is None else tuple(DATA)

    def data_set(text: str) -> str:
        if text not in names and not Path(text).is_file():
            wanted = "".join(f"{name}, " for name in names) + "or " * bool(names) + "a CSV file"
            raise argparse.ArgumentTypeError(f"must be {wanted}; there is no file {text}")
        return text

    add = parser.add_argument
    add("--data", type=data_set, metavar="DATA", default=default, help=meaning)
    add("--target", metavar="COLUMN", help="The column of the CSV file to predict.")
    add("--features", nargs="+", metavar="COLUMN", help="The columns to learn from; all if absent.")
    add("--standardise", action="store_true", help="Standardise the features of the CSV file.")
    add("--delimiter", metavar="CHARACTER", default=",", help="What separates its columns.",
        type=lambda text: text.replace("\\t", "\t"))  # fmt: skip


def add_save(parser: argparse.ArgumentParser) -> None:
    """Add the option that saves the network."""
    parser.add_argument("--save", type=new_file, metavar="FILE.npz",
        help="Save the network to this file, for jaxnn.load.")  # fmt: skip


def title_of(data: str, sizes: Sequence[int]) -> str:
    """Return data and network in words."""
    return f"{Path(data).stem}, {join_sizes(sizes)}"


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add the seed."""
    parser.add_argument("--seed", type=int, default=0, help="The seed of everything drawn.")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that end a run early and save it."""
    add = parser.add_argument
    add("--target-loss", type=float, help="Stop at the first loss at or below this one.")
    add("--max-seconds", type=float, help="Stop after this many seconds.")
    add("--checkpoint", type=Path, help="Save to this file, and resume from it.")


def limits_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_limits` as those of a trainer, which is to show its progress."""
    names = ("target_loss", "max_seconds", "checkpoint")
    return {"progress": True} | {name: getattr(arguments, name) for name in names}


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add the option that prints what the book prints."""
    parser.add_argument("--verbose", action="store_true", help="Print a line at every improvement.")


def add_output(parser: argparse.ArgumentParser, json_file: bool = True) -> None:
    """Add the options that say where results go, and how figures are written."""
    add = parser.add_argument
    add("--output", type=new_folder, default=Path("output"), help="Write figures to this folder.")
    add("--format", nargs="+", choices=("png", "svg", "pdf"), default=["png"], dest="formats",
        help="Write each figure in these formats.")  # fmt: skip
    add("--dpi", type=at_least(20), default=144,
        help="Draw this many pixels an inch; figures are 13.33 inches wide.")  # fmt: skip
    if json_file:
        add("--json", type=new_file, metavar="FILE", help="Write the results to this file.")


def at_least(lowest: int, of: str = "") -> Callable[[str], int]:
    """Return a parser of whole numbers, also written as 1e9, of at least `lowest`."""

    def count(text: str) -> int:
        number = float(text)
        if not lowest <= number < math.inf or number != int(number):
            raise argparse.ArgumentTypeError(
                f"must be a whole number {of}of at least {lowest}; got {text}"
            )
        return int(number) if "e" in text.lower() else int(text)

    return count


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1; got {text}")
    return number


def film_suffix(text: str) -> str:
    """Parse the ending of a film's name."""
    if not text.endswith((".gif", ".mp4")):
        raise argparse.ArgumentTypeError(f"must end in .gif or .mp4; got {text}")
    if text.endswith(".mp4") and shutil.which("ffmpeg") is None:
        raise argparse.ArgumentTypeError("must end in .gif: .mp4 needs ffmpeg, not found here")
    return text


def film_file(text: str) -> Path:
    """Parse the name of a film to write."""
    return new_file(film_suffix(text))


def new_file(text: str) -> Path:
    """Parse the name of a file to write, and refuse it now rather than after the work."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must name a file; got the folder {text}")
    new_folder(str(Path(text).parent))
    return Path(text)


def new_folder(text: str) -> Path:
    """Parse the name of a folder to write to, which exists or can be made."""
    whole = Path(text).absolute()
    existing = next(path for path in (whole, *whole.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise argparse.ArgumentTypeError(f"must be a folder to write to; got {text}")
    return Path(text)


def layer_sizes(text: str) -> Sizes:
    """Parse layer sizes written as 2-3-3."""
    sizes = tuple(int(size) for size in text.split("-"))
    if len(sizes) < 2 or min(sizes) < 1 or sizes[-1] < 2:
        raise ValueError(text)
    return sizes


def join_sizes(sizes: Sequence[int]) -> str:
    """Write layer sizes as 2-3-3."""
    return "-".join(map(str, sizes))


def print_table(rows: Sequence[Mapping[str, Any]], markdown: bool = False) -> None:
    """Print rows under the names of their columns: text flushed left, numbers right."""
    header = list(max(rows, key=len))
    numeric = [any(isinstance(row.get(name), int | float) for row in rows) for name in header]
    lines = [header, *([_cell(row.get(name, "")) for name in header] for row in rows)]
    if markdown:
        lines.insert(1, ["---:" if is_number else "---" for is_number in numeric])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.rjust if is_number else str.ljust for is_number in numeric]
    for line in lines:
        columns = zip(pads, line, widths, strict=True)
        cells = [pad(cell, width) for pad, cell, width in columns]
        print(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if value >= 10 else 3}f}"


def write_json(path: Path | None, results: Any) -> None:
    """Write results, named tuples by the names, if a file was named; inf and NaN become null."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_finite(results), indent=1, allow_nan=False))


def _finite(results: Any) -> Any:
    if hasattr(results, "_asdict"):
        results = results._asdict()
    if isinstance(results, dict):
        return {name: _finite(value) for name, value in results.items()}
    if isinstance(results, list | tuple):
        return [_finite(value) for value in results]
    return None if isinstance(results, float) and not math.isfinite(results) else results
