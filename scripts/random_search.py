"""Random search over a small network's weights, from thousands to billions of candidates.

    python scripts/random_search.py --candidates 1e8 --scale 4 --thresholds 0.2 0.3 --plot
    python scripts/random_search.py --candidates 1e10 --checkpoint search.npz

With a checkpoint, the same command goes on where the last one ended. Machines that know nothing
of each other share the work by `--start`, and one of them puts it together:

    python scripts/random_search.py --start 5e9 --candidates 5e9 --checkpoint part-1.npz
    python scripts/random_search.py --merge part-0.npz part-1.npz --plot

Processes that can reach each other search together: the first address is that of process 0.

    python scripts/random_search.py --candidates 1e10 --distributed localhost:1234 2 0
    python scripts/random_search.py --candidates 1e10 --distributed localhost:1234 2 1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from command_line import add_limits, add_output, add_problem, command, count, parser_for, write_json
from problems import DATA
from resuming import finished

import jaxnn
from jaxnn.run import checkpoint as checkpoints

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__)
    add_problem(parser)
    add = parser.add_argument
    add("--candidates", type=count, default=1_000_000, help="how many to draw, as 1e9")
    add("--start", type=count, default=0, help="index of the first candidate")
    add("--scale", type=float, default=4.0, help="of the weights' unit draws")
    add("--distribution", choices=("normal", "uniform", "lecun", "he"), default="normal")
    add("--bias-scale", type=float, help="of the biases' unit draws; as the weights if not given")
    add("--top-k", type=int, default=10, help="how many of the best to list")
    add("--thresholds", type=float, nargs="*", default=[], help="losses to count at or below of")
    add_limits(parser, "candidate")
    add("--merge", type=Path, nargs="+", metavar="FILE", help="checkpoints to put together")
    add("--devices", type=int, help="how many devices to use; all if not given")
    add(
        "--distributed",
        nargs="*",
        metavar="PART",
        help="search with other processes: ADDRESS:PORT of the first, their number, the own "
        "index; nothing on clusters that JAX knows",
    )
    add("--verbose", action="store_true", help="print every improvement")
    add("--plot", action="store_true", help="draw the histogram and the best of n")
    add_output(parser)
    arguments = parser.parse_args(argv)
    if arguments.candidates < 1:
        parser.error(f"--candidates must be at least 1; got {arguments.candidates}")
    if arguments.distributed and len(arguments.distributed) != 3:
        parser.error("--distributed must be followed by ADDRESS:PORT, a number and an index")
    return arguments


def join_others(parts: Sequence[str] | None) -> None:
    """Meets the other processes, if there are any."""
    if parts:
        address, processes, own = parts
        jax.distributed.initialize(address, int(processes), int(own))
    elif parts is not None:
        jax.distributed.initialize()


def resumed_from(arguments: argparse.Namespace) -> int:
    """How many candidates the checkpoint holds already."""
    if arguments.checkpoint is None or not arguments.checkpoint.exists():
        return 0
    return checkpoints.load(arguments.checkpoint)[1].get("next", arguments.start) - arguments.start


def search(arguments: argparse.Namespace, given: Sequence[Any]) -> tuple[Any, float, float]:
    """Runs the search; returns result, seconds and candidates a second."""
    search = partial(
        jaxnn.random_search,
        *given,
        top_k=arguments.top_k,
        thresholds=sorted(arguments.thresholds),
    )
    before = resumed_from(arguments)
    finished(search(num_candidates=1))  # compiles, so that the seconds below are the search's own
    started = time.perf_counter()
    result = search(
        num_candidates=arguments.candidates,
        start=arguments.start,
        target_loss=arguments.target_loss,
        max_seconds=arguments.max_seconds,
        checkpoint=arguments.checkpoint,
        devices=jax.local_devices()[: arguments.devices],
        progress=True,
    )
    seconds = time.perf_counter() - started
    return result, seconds, (result.num_evaluations - before) / seconds


def facts(result: Any, accuracy: float | None, timing: dict[str, float]) -> dict[str, Any]:
    """What the JSON file says."""
    counts = result.counts
    return {
        "best_loss": result.loss if result.params is not None else None,
        "best_index": result.index,
        "accuracy": accuracy,
        "num_candidates": result.num_evaluations,
        **timing,
        "num_nonfinite": result.num_nonfinite,
        "status": result.status,
        "top": [{"index": int(i), "loss": float(x)} for i, x in zip(*result.top, strict=True)],
        "counts": [
            dict(zip(counts._fields, map(float, row), strict=True))
            for row in zip(*counts, strict=True)
        ],
    }


def spread(histogram: Any, together: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Edges and density of the positive losses over their logarithm, some bins put together."""
    positive = histogram.edges[:-1] > 0
    edges = np.append(histogram.edges[:-1][positive][::together], histogram.edges[-1])
    counts = np.add.reduceat(histogram.counts[positive], range(0, positive.sum(), together))
    return edges, counts / histogram.counts.sum() / np.diff(np.log(edges))


def draw(result: Any, path: Path) -> None:
    """The histogram of losses, and the expected best of n beside the trail of improvements."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    edges, density = spread(result.histogram)
    left.stairs(density, edges, fill=True, color="#56B4E9")
    left.set(xscale="log", yscale="log", xlabel="loss", ylabel="share of candidates, per e-fold")
    left.set_title("How losses are spread")
    draws = np.geomspace(1, result.num_evaluations, 200)
    right.plot(draws, jaxnn.expected_best(result.histogram, draws), color="#0072B2",
               label="expected best of n")  # fmt: skip
    met = [*result.history.evaluations, result.num_evaluations]
    losses = [*result.history.loss, result.loss]
    right.step(met, losses, "--", where="post", color="#D55E00", label="this search")
    right.set(xscale="log", yscale="log", xlabel="candidates", ylabel="lowest loss")
    right.set_title("What more candidates bring")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(result: Any, rate: float | None) -> None:
    """Prints what was found."""
    print(
        f"{result.status}: {result.num_evaluations:,} candidates, "
        f"{f'{rate:,.0f} a second, ' if rate else ''}{result.num_nonfinite:,} not finite"
    )
    for index, loss in zip(*result.top, strict=True):
        print(f"  candidate {index:>16,}  loss {loss:.6f}")
    for row in zip(*result.counts, strict=True):
        threshold, number, share, low, high = row
        print(
            f"  loss <= {threshold:g}: {number:,}, a share of {share:.3g} "
            f"(95 %: {low:.3g} to {high:.3g})"
        )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one search, or merges several, and reports; returns the exit status."""
    arguments = parse(argv)
    join_others(arguments.distributed)
    data_key, key = jax.random.split(jax.random.key(arguments.seed))
    batch = DATA[arguments.data](data_key, samples=arguments.samples)
    model = jaxnn.mlp((2, *arguments.hidden, 3))
    sample_fn = model.sampler(
        scale=arguments.scale,
        distribution=arguments.distribution,
        bias_scale=arguments.bias_scale,
    )
    if arguments.merge:
        result, rate, timing = jaxnn.merge_searches(arguments.merge, sample_fn), None, {}
    else:
        result, seconds, rate = search(arguments, (key, model.loss, sample_fn, batch))
        timing = {"seconds": seconds, "candidates_per_second": rate}
    if jax.process_index():
        finished(result)
        return 0
    if arguments.verbose:
        for index, loss in zip(result.history.index, result.history.loss, strict=True):
            accuracy = model.accuracy(jaxnn.candidate_params(key, sample_fn, int(index)), batch)
            print(f"iteration {index:>14,}  loss {loss:.6f}  accuracy {accuracy:.3f}")
    show(result, rate)
    found = result.params is not None
    if arguments.plot and found:
        path = arguments.output / f"random-search-{arguments.data}.png"
        draw(result, path)
        print(path)
    if arguments.json:
        accuracy = float(model.accuracy(result.params, batch)) if found else None
        write_json(arguments.json, facts(result, accuracy, timing))
    if not arguments.merge:
        finished(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
