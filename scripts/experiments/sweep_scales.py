"""The best loss of random search against the scale of the weights and the count of candidates.

One search a scale tells of every smaller count as well: the expected best of n candidates comes
from the histogram of all losses. All scales share one compilation.

    python scripts/sweep_scales.py --candidates 1e8 --scales 0.05 1 4 16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from command_line import add_output, add_problem, command, count, parser_for, write_json
from problems import DATA
from resuming import finished

import jaxnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add_problem(parser)
    add = parser.add_argument
    add("--candidates", type=count, default=10_000_000, help="how many to draw at each scale")
    add("--scales", type=float, nargs="+", default=[0.05, 0.5, 1, 2, 4, 8, 16])
    add("--distribution", choices=("normal", "uniform", "lecun", "he"), default="normal")
    add_output(parser)
    arguments = parser.parse_args(argv)
    if arguments.candidates < 1_000:
        parser.error(f"--candidates must be at least 1000; got {arguments.candidates}")
    return arguments


def counts_up_to(largest: int) -> list[int]:
    """Powers of ten from 1,000 on, each below the number drawn: the columns of the table."""
    return [10**power for power in range(3, len(str(largest))) if 10**power < largest]


def sweep(arguments: argparse.Namespace) -> dict[float, Any]:
    """A search at each scale: the same unit draws, scaled."""
    data_key, key = jax.random.split(jax.random.key(arguments.seed))
    batch = DATA[arguments.data](data_key, samples=arguments.samples)
    model = jaxnn.mlp((2, *arguments.hidden, 3))
    return {
        scale: finished(
            jaxnn.random_search(
                key,
                model.loss,
                model.sampler(scale=scale, distribution=arguments.distribution),
                batch,
                num_candidates=arguments.candidates,
                progress=True,
            )
        )
        for scale in sorted(arguments.scales)
    }


def rows_of(results: dict[float, Any], columns: Sequence[int]) -> list[dict[str, float]]:
    """A row a scale: the expected best of each count, and the best of the whole search."""
    return [
        {
            "scale": scale,
            **{
                f"{n:,}": float(value)
                for n, value in zip(
                    columns, jaxnn.expected_best(found.histogram, columns), strict=True
                )
            },
            f"{found.num_evaluations:,} drawn": found.loss,
        }
        for scale, found in results.items()
    ]


def show(rows: Sequence[dict[str, float]]) -> None:
    """Prints the table."""
    names = list(rows[0])
    widths = [max(8, len(name)) for name in names]
    print("  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True)))
    for row in rows:
        scale, *losses = row.values()
        cells = [f"{scale:g}", *(f"{loss:.3f}" for loss in losses)]
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def draw(results: dict[float, Any], title: str, path: Path) -> None:
    """The expected best of n against n, a line a scale."""
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(results)))
    for (scale, found), color in zip(results.items(), colors, strict=True):
        draws = np.geomspace(1, found.num_evaluations, 200)
        best = jaxnn.expected_best(found.histogram, draws)
        axes.plot(draws, best, color=color, label=f"{scale:g}")
    axes.set(xscale="log", yscale="log", xlabel="candidates", ylabel="expected lowest loss")
    axes.set_title(title)
    axes.legend(title="scale", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Sweeps, prints the table and draws the figure; returns the exit status."""
    arguments = parse(argv)
    results = sweep(arguments)
    rows = rows_of(results, counts_up_to(arguments.candidates))
    show(rows)
    sizes = "-".join(map(str, (2, *arguments.hidden, 3)))
    path = arguments.output / f"scales-{arguments.data}-{sizes}.png"
    draw(results, f"Random search on {arguments.data}, network {sizes}", path)
    print(path)
    write_json(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
