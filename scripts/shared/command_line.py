"""What the command lines of the scripts share.

Exit statuses: 0 for success, 1 for a check that failed, such as a wrong gradient, 2 for an error,
in one line on stderr, and 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from problems import DATA
from tqdm import tqdm

Sizes = tuple[int, ...]
EXPECTED = (
    TypeError, ValueError, OSError, MemoryError, ArithmeticError, ImportError, RuntimeError,
)  # fmt: skip
"""What bad arguments, missing files and small machines come to; anything else is a bug here."""


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """A script's `main(argv)` that returns an exit status, also after an error or Ctrl-C.

    An error is told in one line on stderr; one that no argument should cause, with its traceback.
    """
    script = Path(main.__code__.co_filename).name

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except KeyboardInterrupt:
            status, words = 130, "interrupted"
        except Exception as error:
            if not isinstance(error, EXPECTED):
                traceback.print_exc()
            status, words = 2, f"error: {in_one_line(error)}"
        # Not in the clauses above: they keep bars open that are drawn once more after a line.
        tqdm.write(f"{script}: {words}", file=sys.stderr)
        return status

    return run


def in_one_line(error: BaseException) -> str:
    """What an error says, with its name where that is not plain from the words."""
    words, name = " ".join(str(error).split()), type(error).__name__
    plain = type(error) in (TypeError, ValueError) or isinstance(error, OSError)
    return words if words and plain else f"{name}: {words}" if words else name


def parser_for(documentation: str | None) -> argparse.ArgumentParser:
    """A parser that tells the first line of a script's documentation, and every default."""
    return argparse.ArgumentParser(
        description=(documentation or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def add_problem(parser: argparse.ArgumentParser) -> None:
    """Options that say what is to be learnt, by which network."""
    add = parser.add_argument
    add("--data", choices=DATA, default="vertical")
    add("--samples", type=int, default=100, help="rows a class")
    add("--hidden", type=int, nargs="*", default=[3], help="units of each hidden layer")
    add("--seed", type=int, default=0, help="of data, start and search")


def add_limits(parser: argparse.ArgumentParser, unit: str) -> None:
    """Options that say when to end early, and where to go on from; `unit` is what is counted."""
    add = parser.add_argument
    add("--target-loss", type=float, help=f"stop at the first {unit} at or below")
    add("--max-seconds", type=float, help="stop when these are over")
    add("--checkpoint", type=Path, help="save here, and go on from here")


def film_file(text: str) -> Path:
    """The name of a GIF."""
    if not text.endswith(".gif"):
        raise argparse.ArgumentTypeError(f"must name a .gif file; got {text}")
    return new_file(text)


def new_file(text: str) -> Path:
    """The name of a file to write; refused at the start if that cannot be, not after the work."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must name a file; got the folder {text}")
    new_folder(str(Path(text).parent))
    return Path(text)


def new_folder(text: str) -> Path:
    """The name of a folder to write to, which is there or can be made."""
    whole = Path(text).absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise argparse.ArgumentTypeError(f"must be a folder to write to; got {text}")
    return Path(text)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Options that say where results go."""
    add = parser.add_argument
    add("--output", type=new_folder, default=Path("output"), help="folder for figures")
    add("--json", type=new_file, metavar="FILE", help="write the facts here")


def count(text: str) -> int:
    """A whole number, also written as 1e9."""
    number = float(text)
    if not 0 <= number < math.inf or number != int(number):
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more; got {text}")
    return int(number) if "e" in text.lower() else int(text)


def layer_sizes(text: str) -> Sizes:
    """Layer sizes written as 2-3-3."""
    sizes = tuple(int(size) for size in text.split("-"))
    if len(sizes) < 2 or min(sizes) < 1 or sizes[-1] < 2:
        raise ValueError(text)
    return sizes


def write_json(path: Path | None, facts: Any) -> None:
    """Writes facts to a file, if one was named; null for what is infinite or no number."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_finite(facts), indent=1, allow_nan=False))


def _finite(facts: Any) -> Any:
    if isinstance(facts, dict):
        return {name: _finite(fact) for name, fact in facts.items()}
    if isinstance(facts, (list, tuple)):
        return [_finite(fact) for fact in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts
