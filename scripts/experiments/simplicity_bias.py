"""Count which Boolean functions random networks compute: mostly simple ones.

Networks 7-40-40-1 (relu) with random weights answer all 128 inputs of 7 bits, so each computes one
of 2^128 functions. How often is a function computed, by its rank beside Zipf's law and by its
Lempel-Ziv complexity? Ranks come from the same networks as shares: which of several equally likely
functions comes first is chance, while its interval is that of a function named beforehand. After
figure 1 of Valle-Perez, Camargo and Louis, "Deep learning generalizes because the
parameter-function map is biased towards simple functions", ICLR 2019.

    python scripts/experiments/simplicity_bias.py
    python scripts/experiments/simplicity_bias.py --full
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import cli
from shared.figures import BLUE, ORANGE, Figure, panels, save, slide
from shared.intervals import of_share
from shared.resuming import run_pieces
from shared.runs import finished

import jaxnn

BITS = 7
OFTEN = 10
"""How often a function must be seen for its share to say much."""
INPUTS = np.array(list(itertools.product([0, 1], repeat=BITS)), np.float32)
BIAS_SCALES = {"no biases": 0.0, "biases N(0, 1)": 1.0}
MOST_RANKS = 20_000
"""Functions whose complexity is measured: all of the first ranks, ever fewer of the later."""
MODEL = jaxnn.mlp((BITS, 40, 40, 1), output="identity", loss="mean_squared_error")
LOG_FUNCTIONS = math.log(2) * len(INPUTS)
"""The logarithm of the number of functions. Zipf's law: rank r has the share 1 / (r times this)."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add, some = parser.add_argument, cli.at_least(1_000)
    add("--samples", type=some, default=1_000_000, help="Draw this many networks of each kind.")
    add("--full", action="store_true", help="Draw 10^9 networks of each kind; for a GPU.")
    add("--functions", type=some, default=2**24, help="Count at most this many functions.")
    cli.add_seed(parser)
    cli.add_output(parser, json_file=False)
    arguments = parser.parse_args(argv)
    if arguments.full:
        arguments.samples = 10**9
    return arguments


def answers(params: Any, inputs: jax.Array) -> jax.Array:
    """Return the function that a network computes: a bit an input."""
    return MODEL.apply(params, inputs)[:, 0] > 0


def sample(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Count how often each function is computed."""
    name = f"{kind.split()[0]}-{arguments.samples}-{arguments.functions}-{arguments.seed}"
    counted = jaxnn.count_outcomes(
        jax.random.key(arguments.seed),
        answers,
        MODEL.sampler(distribution="lecun", bias_scale=BIAS_SCALES[kind]),
        INPUTS,
        num_candidates=arguments.samples,
        max_outcomes=arguments.functions,
        checkpoint=arguments.output / f"functions-{name}.npz",
        progress=True,
    )
    counts = finished(counted).counts
    ranks = np.unique(np.geomspace(1, max(len(counts), 1), MOST_RANKS).astype(int))[: len(counts)]
    chosen = np.unpackbits(counted.packed[ranks - 1], axis=1, count=counted.num_bits)
    texts = ["".join(map(str, bits)) for bits in chosen]
    return {
        "samples": counted.num_evaluations,
        "distinct": len(counts),
        "seen_once": int(np.sum(counts == 1)),
        "error": counted.error,
        "rank": ranks.tolist(),
        "count": counts[ranks - 1].tolist(),
        "complexity": [complexity(text) for text in texts],
        "first": texts[:10],
    }


def complexity(text: str) -> float:
    """Return `log2 n` times the number of phrases, the mean of both directions.

    A constant has `log2 n`.
    """
    length = math.log2(len(text))
    if len(set(text)) == 1:
        return length
    return length * (phrases(text) + phrases(text[::-1])) / 2


def phrases(text: str) -> int:
    """Return the number of phrases of a text, each the shortest that has not come before.

    Lempel and Ziv, "On the complexity of finite sequences", 1976. Their example, 0001101001000101,
    has 6: 0, 001, 10, 100, 1000, 101.
    """
    number = begin = 0
    while begin < len(text):
        end = begin + 1
        while end <= len(text) and text[begin:end] in text[: end - 1]:
            end += 1
        number, begin = number + 1, end
    return number


def name_of(text: str) -> str:
    """Describe a function in words."""
    ones = text.count("1")
    if ones in (0, len(text)):
        return f"constant {text[0]}"
    if ones in (1, len(text) - 1) and text.count(text[0]) == 1:
        return f"{text[1]}, but {text[0]} at the zero input"
    return f"{ones} one{'s' if ones > 1 else ''}"


def show(kind: str, found: dict[str, Any]) -> None:
    """Print the most frequent functions."""
    total = found["samples"]
    seen = f"{found['distinct']:,} functions, {found['seen_once']:,} of them seen once"
    if found["error"]:
        seen = f"{found['distinct']:,} functions kept; counts too low by at most {found['error']:,}"
    print(f"\n{kind}: {total:,} networks, {seen}")
    rows = []
    first = zip(found["rank"], found["count"], found["complexity"], found["first"], strict=False)
    for rank, number, bits, text in first:
        low, high = interval_of(number, found)
        rows.append({
            "rank": rank,
            "share": f"{number / total:.2e}",
            "95 % interval": f"{low:.2e} to {high:.2e}",
            "Zipf": f"{1 / (rank * LOG_FUNCTIONS):.2e}",
            "complexity": f"{bits:.1f}",
            "function": name_of(text),
        })  # fmt: skip
    cli.print_table(rows)
    ranks, counts = np.array(found["rank"]), np.array(found["count"])
    often = (counts >= often_of(found)) & (ranks > 2)
    if often.any():
        times = counts[often] / total * ranks[often] * LOG_FUNCTIONS
        seen = f"ranks 3 to {ranks[often][-1]:,}, seen {often_of(found)} times or more"
        print(f"{seen}: between {times.min():.2f} and {times.max():.2f} times Zipf's law")


def often_of(found: dict[str, Any]) -> int:
    """Return how often a function must be seen: ten times as often as a count may be too low."""
    return OFTEN * max(found["error"], 1)


def interval_of(number: int, found: dict[str, Any]) -> tuple[float, float]:
    """Return the 95 % interval of a function's share; its count may be too low by the error."""
    total = found["samples"]
    return of_share(number, total)[0], of_share(min(number + found["error"], total), total)[1]


@slide
def draw(found: dict[str, dict[str, Any]]) -> Figure:
    """Draw shares against rank and against complexity; bands are 95 % intervals."""
    figure, (left, right) = panels(2, 6)
    styles = zip((BLUE, ORANGE), "ox", ("-", "-."), strict=True)
    for (kind, piece), (color, marker, dash) in zip(found.items(), styles, strict=True):
        ranks, counts = np.array(piece["rank"]), np.array(piece["count"])
        bits, shares = np.array(piece["complexity"]), counts / piece["samples"]
        often, several = counts >= often_of(piece), counts > 1
        ends = np.reshape([interval_of(int(n), piece) for n in counts[often]], (-1, 2))
        left.plot(ranks[often], shares[often], dash, color=color, label=kind)
        low, high = ends.T
        left.fill_between(ranks[often], low, high, color=color, alpha=0.2, linewidth=0)
        style = {"s": 16, "color": color, "marker": marker, "alpha": 0.5, "linewidths": 1}
        right.scatter(bits[several], shares[several], label=kind, **style)
    zipf = np.array([1, left.dataLim.x1])
    left.plot(zipf, 1 / (zipf * LOG_FUNCTIONS), "k--", label=r"1 / (rank ln $2^{128}$)")
    jaxnn.plotting.log_scale(left)
    jaxnn.plotting.log_scale(right, "y")
    left.set(xlabel="rank", ylabel="share of networks")
    right.set(xlabel="Lempel-Ziv complexity, bits", ylabel="share of networks")
    left.set_title("functions seen often; 95 % intervals")
    right.set_title("functions seen more than once")
    for ax in (left, right):
        ax.legend()
        ax.grid(visible=True)
    samples = next(iter(found.values()))["samples"]
    figure.suptitle(f"Boolean functions of {samples:,} random networks 7-40-40-1")
    return figure


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Sample what is not sampled yet; print the table and draw the figure."""
    arguments = parse(argv)
    settings = {name: getattr(arguments, name) for name in ("samples", "functions", "seed")}
    pieces = {kind: partial(sample, kind, arguments) for kind in BIAS_SCALES}
    found = run_pieces(arguments.output / "simplicity-bias.json", settings, pieces)
    for kind, piece in found.items():
        show(kind, piece)
    save(draw(found), arguments, "simplicity-bias")


if __name__ == "__main__":
    sys.exit(main())
