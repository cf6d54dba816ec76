"""Search at random for the weights of a small network, from thousands to billions of candidates.

    python scripts/random_search.py --candidates 1e8 --scale 4 --thresholds 0.2 0.3 --plot
    python scripts/random_search.py --candidates 1e10 --checkpoint search.npz

Where only the best and the thresholds are asked for, --keep-below drops other candidates early.

    python scripts/random_search.py --candidates 1e9 --thresholds 0.2 0.3 --keep-below 0

A CSV file is learnt by its column of labels, and the network is saved with the names of classes.

    python scripts/random_search.py --data iris.csv --target species --standardise --save iris.npz

Several scales are compared: one search a scale tells the expected best of every smaller count.

    python scripts/random_search.py --candidates 1e7 --scale 0.05 0.5 1 2 4 8 16

With a checkpoint, the same command resumes where the last one ended. Machines that cannot reach
each other share the work by --start, and one of them merges it:

    python scripts/random_search.py --start 5e9 --candidates 5e9 --checkpoint part-1.npz
    python scripts/random_search.py --merge part-0.npz part-1.npz --plot

Processes that can reach each other search together; the address is that of process 0.

    python scripts/random_search.py --candidates 1e10 --distributed localhost:1234 2 0
    python scripts/random_search.py --candidates 1e10 --distributed localhost:1234 2 1
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from shared import cli
from shared.figures import BLUE, ORANGE, Figure, colors_of, panels, plt, save, slide
from shared.problems import problem_of, score_of
from shared.runs import done_before, finished, improvement_lines, timed

import jaxnn

BARS = 8
"""Bars of the histogram for each doubling of the loss."""
OF_ONE_SCALE = (
    "keep_below", "thresholds", "target_loss", "max_seconds", "checkpoint", "merge", "save",
    "distributed", "verbose",
)  # fmt: skip
"""Options that are refused with several scales, whose searches are compared alone."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    cli.add_problem(parser)
    add = parser.add_argument
    add("--candidates", type=cli.at_least(1), default=10**6, help="Draw this many, such as 1e9.")
    add("--start", type=cli.at_least(0), default=0, help="Begin with the candidate of this index.")
    add("--scale", type=float, nargs="+", default=[4.0], help="Multiply the unit draws by this.")
    add("--distribution", choices=("normal", "uniform", "lecun", "he"), default="normal",
        help="Draw weights from this distribution.")  # fmt: skip
    add("--bias-scale", type=float, help="Multiply the draws of biases by this; --scale if absent.")
    add("--top-k", type=int, default=10, help="List this many of the best candidates.")
    add("--thresholds", type=float, nargs="*", default=[], help="Count the losses up to each.")
    add("--keep-below", type=float, help="Drop candidates early whose loss is above this and "
        "above all thresholds, which is several times faster; leaves out --plot.")  # fmt: skip
    cli.add_limits(parser)
    cli.add_save(parser)
    add("--merge", type=Path, nargs="+", metavar="FILE", help="Merge these checkpoints instead.")
    add("--devices", type=int, help="Use this many devices; all if absent.")
    add("--distributed", nargs="*", metavar="PART", help="Search with other processes: give "
        "ADDRESS:PORT of the first, their number and the own index, or nothing on clusters that "
        "JAX knows.")  # fmt: skip
    cli.add_verbose(parser)
    add("--plot", action="store_true", help="Draw the histogram and the expected best of n.")
    cli.add_output(parser)
    arguments = parser.parse_args(argv)
    if arguments.keep_below is not None and arguments.plot:
        parser.error("--keep-below must come without --plot")
    given = [n for n in OF_ONE_SCALE if getattr(arguments, n) != parser.get_default(n)]
    if len(arguments.scale) > 1 and given:
        parser.error(f"--{given[0].replace('_', '-')} must come with one --scale")
    if arguments.distributed and len(arguments.distributed) != 3:
        parser.error("--distributed must be followed by ADDRESS:PORT, a number and an index")
    return arguments


def join_processes(parts: Sequence[str] | None) -> None:
    """Meet the other processes, if there are any."""
    if parts:
        address, processes, own = parts
        jax.distributed.initialize(address, int(processes), int(own))
    elif parts is not None:
        jax.distributed.initialize()


def search(
    arguments: argparse.Namespace, train: Callable[..., Any]
) -> tuple[Any, dict[str, float]]:
    """Run the search; return the result and its pace."""
    before, options = done_before(arguments.checkpoint), cli.limits_of(arguments)
    result, seconds = timed(train, "num_candidates", arguments.candidates, **options)
    rate = (result.num_evaluations - before) / seconds
    return result, {"seconds": seconds, "candidates_per_second": rate}


def report(result: Any) -> dict[str, Any]:
    """Return what the JSON file says of the result."""

    def records(columns: Any) -> list[Any]:
        return [*map(columns._make, zip(*(column.tolist() for column in columns), strict=True))]

    return {
        "best_loss": result.loss if result.params is not None else None,
        "best_candidate": result.candidate,
        "num_candidates": result.num_evaluations,
        "num_nonfinite": result.num_nonfinite,
        "status": result.status,
        "top": records(result.top),
        "counts": records(result.counts),
    }


@slide
def draw(result: Any, title: str) -> Figure:
    """Draw the histogram of losses, and the expected best of n beside this search's best."""
    figure, (left, right) = panels(2, 6)
    edges, counts = result.histogram.edges, result.histogram.counts
    seen = np.append(edges[:-1][(counts > 0) & (edges[:-1] > 0)], edges[-1])
    wanted = 2.0 ** np.arange(np.floor(np.log2(seen[0])), np.log2(seen[-2]) + 1, 1 / BARS)
    bars = np.unique(edges[np.searchsorted(edges[:-1], wanted)])
    shares = np.histogram(edges[:-1], bars, weights=counts / counts.sum())[0]
    lowest = shares[shares > 0].min() / 2
    left.stairs(np.maximum(shares, lowest), bars, fill=True, baseline=lowest, color="#56B4E9")
    jaxnn.plotting.log_scale(left)
    left.set(xlabel=f"loss, {BARS} bars for each doubling", ylabel="share of candidates in a bar")
    left.set_title("How losses are distributed")
    draws = np.geomspace(1, result.num_evaluations, 200)
    expected = jaxnn.expected_best(result.histogram, draws)
    right.plot(draws, expected, color=BLUE, label="expected best of n")
    evaluations = [*result.history.evaluations, result.num_evaluations]
    losses = [*result.history.loss, result.loss]
    right.step(evaluations, losses, "--", where="post", color=ORANGE, label="this search")
    jaxnn.plotting.log_scale(right)
    right.set(xlabel="candidates", ylabel="lowest loss", title="What more candidates bring")
    right.legend()
    figure.suptitle(f"{title}: {result.num_evaluations:,} candidates")
    return figure


def show(result: Any, rate: float | None) -> None:
    """Print what was found."""
    pace = "" if rate is None else f"{rate:,.0f} a second, "
    head = f"{result.status}: {result.num_evaluations:,} candidates, {pace}"
    unscored = result.num_nonfinite is None
    print(head + ("most dropped early" if unscored else f"{result.num_nonfinite:,} not finite"))
    for candidate, loss in zip(*result.top, strict=True):
        print(f"  candidate {candidate:>16,}  loss {loss:.6f}")
    for threshold, number, share, low, high in zip(*result.counts, strict=True):
        interval = f"95 %: {low:.3g} to {high:.3g}"
        print(f"  loss <= {threshold:g}: {number:,}, a share of {share:.3g} ({interval})")


@slide
def compare_scales(arguments: argparse.Namespace, title: str, train: Callable[..., Any]) -> None:
    """Search at each scale; print and draw the expected best of each count."""
    number, scales = arguments.candidates, sorted(arguments.scale)
    counts = [10**power for power in range(3, 20) if 10**power < number]
    draws = np.geomspace(1, number, 200)
    figure, axes = plt.subplots()
    rows = []
    dashes = ("-", "--", "-.", ":")
    for index, (scale, color) in enumerate(zip(scales, colors_of(len(scales)), strict=True)):
        found = finished(train(scale, num_candidates=number, progress=True))
        best = jaxnn.expected_best(found.histogram, counts).tolist()
        columns = {f"{count:,}": loss for count, loss in zip(counts, best, strict=True)}
        rows.append({"scale": f"{scale:g}", **columns, f"{number:,} drawn": found.loss})
        expected = jaxnn.expected_best(found.histogram, draws)
        axes.plot(draws, expected, dashes[index % 4], color=color, label=f"{scale:g}")
    cli.print_table(rows)
    cli.write_json(arguments.json, rows)
    jaxnn.plotting.log_scale(axes)
    axes.set(xlabel="candidates", ylabel="expected lowest loss")
    axes.set_title(f"Random search, {title}: {number:,} candidates a scale")
    axes.legend(title="scale", ncols=2)
    save(figure, arguments, f"scales-{title.replace(', ', '-')}")


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one search, or several, or merge several, and report."""
    arguments = parse(argv)
    join_processes(arguments.distributed)
    problem = problem_of(arguments, 1)
    model, batch, (key,), _ = problem
    sampler = partial(
        model.sampler, distribution=arguments.distribution, bias_scale=arguments.bias_scale
    )

    def train(scale: float, **options: Any) -> Any:
        where = {"start": arguments.start, "devices": jax.local_devices()[: arguments.devices]}
        given = key, model.loss, sampler(scale=scale), batch
        return jaxnn.random_search(*given, **where, **options)

    title = cli.title_of(arguments.data, model.settings.sizes)
    if len(arguments.scale) > 1:
        compare_scales(arguments, title, train)
        return
    sample_fn, (name, metric_fn) = sampler(scale=arguments.scale[0]), score_of(model)
    if arguments.merge:
        result, pace = jaxnn.merge_searches(arguments.merge, sample_fn), {}
    else:
        asked = {"top_k": arguments.top_k, "thresholds": sorted(arguments.thresholds)}
        asked |= {"keep_below": arguments.keep_below, "metric_fn": metric_fn}
        result, pace = search(arguments, partial(train, arguments.scale[0], **asked))
    if jax.process_index():  # The first process alone reports.
        finished(result)
        return
    if arguments.verbose:
        print(*improvement_lines(result, name), sep="\n")
    show(result, pace.get("candidates_per_second"))
    score = None
    if result.params is not None:
        score = float(metric_fn(result.params, batch))
        if arguments.plot:
            figure = draw(result, f"{title}, scale {arguments.scale[0]:g}")
            save(figure, arguments, f"random-search-{Path(arguments.data).stem}")
    problem.save(arguments.save, result.params)
    cli.write_json(arguments.json, report(result) | {name: score} | pace)
    if not arguments.merge:
        finished(result)


if __name__ == "__main__":
    sys.exit(main())
