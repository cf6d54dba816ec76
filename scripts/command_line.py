"""What the command lines of the scripts share."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from problems import DATA

Sizes = tuple[int, ...]


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
    return Path(text)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Options that say where results go."""
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the facts here")


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
