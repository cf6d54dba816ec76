"""What a network computes before it has learnt anything: mostly something simple.

Networks 7-40-40-1 (relu) with random weights answer all 128 inputs of 7 bits, so that each is one
of 2^128 Boolean functions. How often does a function come up, by its rank beside Zipf's law, and
by its Lempel-Ziv complexity? Ranks come from the same networks as shares: of functions that are
equally likely, the first is so by luck, while its interval is that of a function named beforehand.
After Valle-Perez, Camargo and Louis, "Deep learning generalizes
because the parameter-function map is biased towards simple functions", ICLR 2019, figure 1.

    python scripts/simplicity_bias.py
    python scripts/simplicity_bias.py --full
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from command_line import command, count, new_folder, parser_for
from intervals import of_share
from resuming import finished, run_pieces

import jaxnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BITS = 7
OFTEN = 10
"""How often a function must have been seen for its share to say much."""
INPUTS = np.array(list(itertools.product([0, 1], repeat=BITS)), np.float32)
BIAS_SCALES = {"no biases": 0.0, "biases N(0, 1)": 1.0}
COLORS = ("#0072B2", "#D55E00")
MOST_RANKS = 20_000
"""Functions whose complexity is looked at: all of the first ranks, ever fewer of the later."""
MODEL = jaxnn.mlp((BITS, 40, 40, 1), output="identity", loss="mean_squared_error")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--samples", type=count, default=1_000_000, help="networks to draw, of each kind")
    add("--full", action="store_true", help="10^9 networks of each kind; for a GPU")
    add("--functions", type=count, default=2**24, help="different ones to keep the counts of")
    add("--seed", type=int, default=0)
    add("--output", type=new_folder, default=Path("output"), help="folder for facts and figures")
    arguments = parser.parse_args(argv)
    if arguments.full:
        arguments.samples = 10**9
    if min(arguments.samples, arguments.functions) < 1_000:
        parser.error("--samples and --functions must be at least 1000")
    return arguments


def answers(params: Any, inputs: jax.Array) -> jax.Array:
    """The function that a network computes: a bit an input."""
    return MODEL.apply(params, inputs)[:, 0] > 0


def sample(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """How often each function came up."""
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
    finished(counted)
    number = len(counted.count)
    ranks = np.unique(np.geomspace(1, max(number, 1), MOST_RANKS).astype(int))[:number]
    chosen = np.unpackbits(counted.packed[ranks - 1], axis=1, count=counted.num_bits)
    texts = ["".join(map(str, bits)) for bits in chosen]
    return {
        "samples": counted.num_evaluations,
        "distinct": number,
        "seen_once": int(np.sum(counted.count == 1)),
        "error": counted.error,
        "rank": ranks.tolist(),
        "count": counted.count[ranks - 1].tolist(),
        "complexity": [complexity(text) for text in texts],
        "first": texts[:10],
    }


def complexity(text: str) -> float:
    """`log2 n` times the phrases of Lempel and Ziv (1976), the mean of both directions.

    A constant has `log2 n`.
    """
    length = math.log2(len(text))
    if len(set(text)) == 1:
        return length
    return length * (phrases(text) + phrases(text[::-1])) / 2


def phrases(text: str) -> int:
    """How many phrases text is cut into, each the shortest that has not come before.

    Lempel and Ziv, "On the complexity of finite sequences", 1976: their example,
    0001101001000101, has 6: 0, 001, 10, 100, 1000, 101.
    """
    number = begin = 0
    while begin < len(text):
        end = begin + 1
        while end <= len(text) and text[begin:end] in text[: end - 1]:
            end += 1
        number, begin = number + 1, end
    return number


def name_of(text: str) -> str:
    """A function in words, if it has any."""
    ones = text.count("1")
    if ones in (0, len(text)):
        return f"constant {text[0]}"
    if ones in (1, len(text) - 1) and text.count(text[0]) == 1:
        return f"{text[1]}, but {text[0]} at the zero input"
    return f"{ones} one{'s' if ones > 1 else ''}"


def show(kind: str, fact: dict[str, Any]) -> None:
    """Prints the most frequent functions."""
    total = fact["samples"]
    seen = f"{fact['distinct']:,} functions, {fact['seen_once']:,} of them seen once"
    if fact["error"]:
        seen = f"{fact['distinct']:,} functions kept; counts too low by at most {fact['error']:,}"
    print(f"\n{kind}: {total:,} networks, {seen}")
    print(
        f"{'rank':>5} {'share':>9}  {'95 % interval':20} {'Zipf':>9} {'complexity':>10}  function"
    )
    for rank, number, found, text in zip(
        fact["rank"], fact["count"], fact["complexity"], fact["first"], strict=False
    ):
        low, high = interval_of(number, fact)
        zipf = 1 / (rank * math.log(2) * len(text))
        interval = f"{low:.2e} to {high:.2e}"
        print(
            f"{rank:>5} {number / total:>9.2e}  {interval:20} {zipf:>9.2e} {found:>10.1f}  "
            f"{name_of(text)}"
        )

    ranks, counts = np.array(fact["rank"]), np.array(fact["count"])
    often = (counts >= OFTEN) & (ranks > 2)
    if often.any():
        times = counts[often] / total * ranks[often] * math.log(2) * len(INPUTS)
        print(
            f"ranks 3 to {ranks[often][-1]:,}, seen {OFTEN} times or more: between "
            f"{times.min():.2f} and {times.max():.2f} times Zipf's law"
        )


def interval_of(number: int, fact: dict[str, Any]) -> tuple[float, float]:
    """95 % interval of a function's share, whose count may be too low by the error."""
    low = of_share(number, fact["samples"])[0]
    return low, of_share(min(number + fact["error"], fact["samples"]), fact["samples"])[1]


def draw(facts: dict[str, dict[str, Any]]) -> Figure:
    """Probability against rank and against complexity; bands are 95 % intervals."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained")
    for (kind, fact), color, marker in zip(facts.items(), COLORS, "os", strict=False):
        ranks, counts = np.array(fact["rank"]), np.array(fact["count"])
        often = counts >= OFTEN
        intervals = np.reshape([interval_of(int(n), fact) for n in counts[often]], (-1, 2))
        left.plot(ranks[often], counts[often] / fact["samples"], color=color, label=kind)
        band = {"color": color, "alpha": 0.2, "linewidth": 0}
        left.fill_between(ranks[often], *intervals.T, **band)
        often = counts > 1
        right.scatter(
            np.array(fact["complexity"])[often],
            counts[often] / fact["samples"],
            s=9, color=color, marker=marker, alpha=0.4, linewidths=0, label=kind,
        )  # fmt: skip
    zipf = np.array([1, max([1, *(rank for line in left.lines for rank in line.get_xdata())])])
    left.plot(zipf, 1 / (zipf * math.log(2) * len(INPUTS)), "k--", label=r"1 / (rank ln $2^{128}$)")
    left.set(xscale="log", yscale="log", xlabel="rank", ylabel="share of networks")
    right.set(yscale="log", xlabel="Lempel-Ziv complexity, bits", ylabel="share of networks")
    left.set_title(f"functions seen {OFTEN} times or more; 95 % intervals", fontsize=10)
    right.set_title("functions seen more than once", fontsize=10)
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
    samples = next(iter(facts.values()))["samples"]
    figure.suptitle(f"Boolean functions of {samples:,} random networks 7-40-40-1")
    return figure


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Samples what is not sampled yet; prints the table and draws the figure."""
    arguments = parse(argv)
    settings = {name: getattr(arguments, name) for name in ("samples", "functions", "seed")}
    pieces = {kind: partial(sample, kind, arguments) for kind in BIAS_SCALES}
    facts = run_pieces(arguments.output / "simplicity-bias.json", settings, pieces)
    for kind, fact in facts.items():
        show(kind, fact)
    path = arguments.output / "simplicity-bias.png"
    draw(facts).savefig(path, dpi=110)
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
