"""Measure the pace of the three methods beside other ways to do the same work.

Random search: everybody draws whole candidates (0.05 times normals), takes the cross-entropy of all
300 rows and keeps the best; a peer with a choice of tile runs at its best one. Perturbation search:
a step is one proposal that moves every weight by 0.05 times a normal. Gradient descent: a step is
the gradient of all 300 rows, or of 32 of them for 64-32-10, and plain SGD; many networks count the
steps of all.

All take turns, so that a change of the machine's pace affects all alike; ratios are medians over
rounds of the ratio within a round. "compile s" is what JAX traces, lowers and compiles in the first
call, and "again s" in a second one; both calls come before the rounds. The parts of a search are
measured alone (its draws, its losses), and the statistics as what they add to both.

    python scripts/benchmarks/benchmark.py
    python scripts/benchmarks/benchmark.py --quick
    python scripts/benchmarks/benchmark.py --only chains --rows "NumPy loop" "jaxnn, one chain"
    python scripts/benchmarks/benchmark.py --only search --nets 2-3-3 --counts 1e5 1e6 1e7 1e8
    python scripts/benchmarks/benchmark.py --only chains --nets 2-3-3 --json benchmark.json
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from peers.chains import CHAINS, CLIMBERS
from peers.descent import DESCENTS, NETWORKS, ONE
from peers.search import PARTS, ROWS, SEARCHES, best_tile, jaxnn_search, random_batch
from shared import cli
from shared.problems import DATA
from shared.timing import MISSING, Search, machine, matrix_product, take_turns, timed_call

import jaxnn

SGEMM_SIDE = 2048
QUICK = {"seconds": 0.2, "counts": [10**5, 10**6]}
NETS: dict[str, Sequence[cli.Sizes]] = {
    "search": ((2, 3, 3), (2, 16, 16, 3), (2, 64, 64, 3), (64, 32, 10)),
    "chains": ((2, 3, 3), (2, 16, 3), (2, 64, 3)),
    "descent": ((2, 3, 3), (2, 64, 3), (64, 32, 10)),
}
Rows = list[dict[str, Any]]


def measure(
    sizes: cli.Sizes,
    unit: str,
    searches: Mapping[str, tuple[Callable[[], Search], int]],
    against: Mapping[str, str],
    repeats: int,
) -> Rows:
    """Return a row a library, also for those that are not installed.

    Args:
        sizes: of the network.
        unit: what is counted: candidates or steps.
        searches: what prepares each library, and how many units it makes a turn.
        against: columns, and the library that each compares with.
        repeats: rounds.
    """
    ready, first_calls = {}, {}
    for name, (prepare, count) in searches.items():
        with suppress(ImportError):
            ready[name] = prepare(), count
            first, compiling = timed_call(*ready[name])
            again = timed_call(*ready[name])[1]
            first_calls[name] = {"first call s": first, "compile s": compiling, "again s": again}
    rates = take_turns(ready, repeats)
    peers = [name for name in rates if not name.startswith("jaxnn")]
    if peers:
        fastest = max(peers, key=lambda name: np.median(rates[name]))
        against = {**against, "x fastest peer": fastest}
    rows: Rows = []
    for name in searches:
        rows.append({"net": cli.join_sizes(sizes), "library": name, f"{unit}/s": MISSING})
        if name in rates:
            middle = float(np.median(rates[name]))
            rows[-1] |= {
                f"{unit}/s": middle,
                "low": float(np.min(rates[name])),
                "high": float(np.max(rates[name])),
                **{
                    column: float(np.median(rates[name] / rates[peer]))
                    for column, peer in against.items()
                    if peer in rates
                },
                **first_calls[name],
            }
    return rows


def measure_search(sizes: cli.Sizes, arguments: argparse.Namespace, peak: float) -> Rows:
    """Measure random search with one network."""
    searches, tiles, given = {}, {}, (jaxnn.mlp(sizes), random_batch(sizes))
    for name in chosen(SEARCHES, arguments):
        prepare, _ = SEARCHES[name]
        searches[name] = partial(prepare, *given, 1), 1  # if not installed
        with suppress(ImportError):
            tile, rate = best_tile(name, sizes, arguments.seconds / 8)
            count = max(2 ** round(math.log2(rate * arguments.seconds)), tile)
            searches[name] = partial(prepare, *given, tile), count
            tiles[name] = tile
    rows = measure(sizes, "candidates", searches, {"x NumPy": "NumPy loop"}, arguments.repeats)
    gflop = 2 * ROWS * sum(i * o for i, o in pairwise(sizes)) / 1e9
    for row in rows:
        if row["library"] in tiles:
            speed = gflop * row["candidates/s"]
            row |= {"GFLOP/s": speed, "% of sgemm": 100 * speed / peak}
            row["tile"] = tiles[row["library"]]
    return rows


def measure_parts(sizes: cli.Sizes, arguments: argparse.Namespace) -> Rows:
    """Return the share that each part has in the time of jaxnn's search with one network."""
    count = max(2 ** round(math.log2(best_tile("jaxnn", sizes, 0.05)[1] * arguments.seconds)), 1)
    turns = {}
    for name, prepare in {"whole": jaxnn_search, **PARTS}.items():
        turns[name] = prepare(jaxnn.mlp(sizes), random_batch(sizes)), count
        turns[name][0](count)  # compiles
    rates = take_turns(turns, arguments.repeats)
    shares = {name: 100 * rates["whole"] / rates[name] for name in PARTS}
    shares["statistics"] = 100 - shares.pop("draw and loss")
    return [
        {"net": cli.join_sizes(sizes), "part": name, "% of the search": float(np.median(share)),
         "low": float(share.min()), "high": float(share.max())}
        for name, share in shares.items()
    ]  # fmt: skip


def measure_counts(counts: Sequence[int], repeats: int) -> tuple[Rows, float]:
    """Return jaxnn's rates by count, and that at the largest as a share of that at a tenth."""
    sizes, tenth = (2, 3, 3), max(counts) // 10
    search = jaxnn_search(jaxnn.mlp(sizes), random_batch(sizes))
    search(2**15)
    rates = take_turns({count: (search, count) for count in sorted({*counts, tenth})}, repeats)
    medians = {count: float(np.median(rates[count])) for count in rates}
    rows = [{"count": n, "candidates/s": rate, "seconds": n / rate} for n, rate in medians.items()]
    return rows, float(np.median(rates[max(counts)] / rates[tenth]))


def sgemm_peaks(repeats: int) -> dict[str, float]:
    """Return the highest GFLOP/s of a large float32 matrix product, by library."""
    square = np.random.default_rng(0).normal(size=(SGEMM_SIDE, SGEMM_SIDE)).astype(np.float32)
    products = {"jax": matrix_product(SGEMM_SIDE)}
    with suppress(ImportError):
        tensor = import_module("torch").tensor(square)
        products["torch"] = lambda _: tensor @ tensor
    rates = take_turns({name: (product, 1) for name, product in products.items()}, repeats + 1)
    return {name: 2 * SGEMM_SIDE**3 * float(rate.max()) / 1e9 for name, rate in rates.items()}


def measure_chains(sizes: cli.Sizes, arguments: argparse.Namespace) -> Rows:
    """Measure perturbation search with one network: vertical data for 2-3-3, else the spiral."""
    is_small = sizes == (2, 3, 3)
    data = DATA["vertical" if is_small else "spiral"]
    batch = data(jax.random.key(0), samples=ROWS // 3)
    if (sizes[0], sizes[-1]) != (2, 3):
        batch = random_batch(sizes)
    searches = {}
    for name in chosen(CLIMBERS, arguments):
        prepare, times = CLIMBERS[name]
        unit = CHAINS if times > 1 else 2  # whole steps of all chains; whole generations
        steps = max(int(arguments.steps * times * (1 if is_small else 0.1)) // unit, 1) * unit
        searches[name] = partial(prepare, jaxnn.mlp(sizes), batch), steps
    against = {
        "x NumPy": "NumPy loop",
        "x scan": "lax.scan, one at a time",
        "x random search": "jaxnn, random search",
    }
    return measure(sizes, "steps", searches, against, arguments.repeats)


def measure_descent(sizes: cli.Sizes, arguments: argparse.Namespace) -> Rows:
    """Measure descent with one network, in mini-batches where there are more than 2 features."""
    batch, batch_size = random_batch(sizes), None if sizes[0] == 2 else 32
    searches = {}
    for name in chosen(DESCENTS, arguments):
        prepare, times = DESCENTS[name]
        unit = 9 * (NETWORKS if "networks" in name else 1)  # whole epochs of all networks
        steps = max(int(arguments.steps * times) // 10 // unit, 1) * unit
        searches[name] = partial(prepare, jaxnn.mlp(sizes), batch, batch_size), steps
    against = {
        "x torch eager": "torch eager",
        "x value_and_grad": "jaxnn, jax.value_and_grad",
        "x one network": ONE,
    }
    return measure(sizes, "steps", searches, against, arguments.repeats)


def chosen(names: Mapping[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Return the rows to measure: all, or those of `--rows`."""
    return [name for name in names if not arguments.rows or name in arguments.rows]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add = parser.add_argument
    add("--only", choices=NETS, help="Measure this method only.")
    add("--nets", type=cli.layer_sizes, nargs="+", help="Measure these networks, such as 2-3-3.")
    add("--rows", choices=[*SEARCHES, *CLIMBERS, *DESCENTS], nargs="+", metavar="NAME",
        help="Measure these rows only, such as jaxnn.")  # fmt: skip
    add("--quick", action="store_true", help="Measure all in some 5 minutes on two cores.")
    add("--seconds", type=float, default=1.0, help="The seconds of one timing of random search.")
    add("--steps", type=cli.at_least(100), default=100_000,
        help="The steps of one chain on 2-3-3; elsewhere a tenth.")  # fmt: skip
    add("--repeats", type=cli.at_least(1), default=5, help="Take this many rounds.")
    add("--counts", type=cli.at_least(10), nargs="*", default=[10**5, 10**6, 10**7],
        help="Measure jaxnn's random search on 2-3-3 at these counts.")  # fmt: skip
    add("--json", type=cli.new_file, metavar="FILE", help="Write the results to this file.")
    add("--markdown", action="store_true", help="Print tables as Markdown.")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    arguments = parser.parse_args(argv)
    if not 0 < arguments.seconds < math.inf:
        parser.error(f"--seconds must be above 0; got {arguments.seconds}")
    return arguments


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parse(argv)
    here = machine()
    print(", ".join(f"{name} {value}" for name, value in here.items()))
    settings = {name: getattr(arguments, name) for name in ("seconds", "steps", "repeats")}
    report: dict[str, Any] = {"machine": here, "settings": settings}
    measures = {"chains": measure_chains, "descent": measure_descent}
    for name in [arguments.only] if arguments.only else NETS:
        report[name] = results = {}
        if name == "search":
            results["sgemm_gflops"] = peaks = sgemm_peaks(arguments.repeats)
            print("sgemm:", ", ".join(f"{key} {peak:.1f} GFLOP/s" for key, peak in peaks.items()))
            measures[name] = partial(measure_search, peak=max(peaks.values()))
        nets = arguments.nets or NETS[name]
        bar = tqdm(nets, unit=" networks")
        results["rates"] = [row for net in bar for row in measures[name](net, arguments)]
        print()
        if results["rates"]:
            cli.print_table(results["rates"], arguments.markdown)
        if name != "search" or not chosen({"jaxnn": None}, arguments):
            continue
        results["parts"] = [row for net in nets for row in measure_parts(net, arguments)]
        print()
        cli.print_table(results["parts"], arguments.markdown)
        if arguments.counts:
            results["counts"], share = measure_counts(arguments.counts, arguments.repeats)
            results["share_of_rate_at_a_tenth"] = share
            print()
            cli.print_table(results["counts"], arguments.markdown)
            print(f"\nThe rate at the largest count is {share:.3f} of that at a tenth of it.")
    cli.write_json(arguments.json, report)


if __name__ == "__main__":
    sys.exit(main())
