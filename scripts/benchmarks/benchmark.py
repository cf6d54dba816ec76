"""Measures the three methods beside other ways to do the same work.

Random search: everybody draws whole weight sets (0.05 times normals), takes the cross-entropy of
all 300 rows and keeps the best; a peer with a choice of tile runs at its best one. Perturbation
search: a step is one proposal, every weight moved by 0.05 times a normal, and its verdict.
Gradient descent: a step is the gradient of all 300 rows, or of 32 of them for 64-32-10, and SGD;
of several networks every network's step counts. Last, all three at equal evaluations: what loss
does each library come to, and when?

All take turns, so that a change of the machine's pace hits them alike; ratios are medians over
rounds of the ratio within a round.

    python scripts/benchmark.py
    python scripts/benchmark.py --only search --nets 2-3-3 --counts 1e5 1e6 1e7 1e8
    python scripts/benchmark.py --only chains --nets 2-3-3 --json benchmark.json
    python scripts/benchmark.py --only losses --markdown --output output
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from chain_peers import CHAINS, WAYS
from command_line import Sizes, command, count, layer_sizes, new_file, new_folder, write_json
from descent_peers import DESCENTS, NETWORKS, ONE
from equal_evaluations import TILE, compared, draw_rows, faster, pieces_of
from problems import DATA
from resuming import run_pieces
from search_peers import PEERS, ROWS, jaxnn_search, random_batch
from tqdm import tqdm
from turns import MISSING, Search, machine, table, take_turns, timed

import jaxnn

SGEMM_SIDE = 2048
SEARCH_NETS = ((2, 3, 3), (2, 16, 16, 3), (2, 64, 64, 3), (64, 32, 10))
CHAIN_NETS = ((2, 3, 3), (2, 16, 3), (2, 64, 3))
DESCENT_NETS = ((2, 3, 3), (2, 64, 3), (64, 32, 10))


class Entry(NamedTuple):
    """A peer at one tile, warmed up, and a count that lasts about as long as wanted."""

    search: Search
    tile: int
    count: int
    rate: float
    compile_seconds: float


def try_tile(search: Search, tile: int, seconds: float) -> Entry:
    """Compiles, and doubles the count until it lasts so long; rate is the best of three."""
    first, count = timed(search, tile), tile
    steady = fastest = min(timed(search, tile) for _ in range(3))
    while fastest < seconds:
        count *= 2
        fastest = min(timed(search, count) for _ in range(3))
    return Entry(search, tile, count, count / fastest, max(first - steady, 0.0))


def choose(name: str, sizes: Sizes, seconds: float) -> Entry | None:
    """A peer at its best tile, by trials that last `seconds` in all; None if not installed."""
    prepare, tiles = PEERS[name]
    batch = random_batch(sizes)
    try:
        tried = [
            try_tile(prepare(sizes, batch, tile), tile, seconds / len(tiles)) for tile in tiles
        ]
    except ImportError:
        return None
    best = max(tried, key=lambda entry: entry.rate)
    return best._replace(count=max(2 ** round(math.log2(best.rate * seconds)), best.tile))


def measure_search(
    sizes: Sizes, arguments: argparse.Namespace, peak: float
) -> list[dict[str, Any]]:
    """The rows of one network, a dict a library."""
    entries = {name: choose(name, sizes, arguments.seconds) for name in PEERS}
    present = {name: entry for name, entry in entries.items() if entry}
    searches = {name: (entry.search, entry.count) for name, entry in present.items()}
    rates = take_turns(searches, arguments.repeats)
    fastest = max(rates.keys() - {"jaxnn"}, key=lambda name: np.median(rates[name]))
    gflop = 2 * ROWS * sum(i * o for i, o in pairwise(sizes)) / 1e9
    rows: list[dict[str, Any]] = []
    for name, entry in entries.items():
        rows.append({"net": "-".join(map(str, sizes)), "library": name, "candidates/s": MISSING})
        if entry is None:
            continue
        rate = float(np.median(rates[name]))
        rows[-1] |= {
            "candidates/s": rate,
            "spread %": 100 * float(np.ptp(rates[name])) / rate,
            "x NumPy": float(np.median(rates[name] / rates["NumPy loop"])),
            "x fastest peer": float(np.median(rates[name] / rates[fastest])),
            "GFLOP/s": gflop * rate,
            "% of sgemm": 100 * gflop * rate / peak,
            "compile s": entry.compile_seconds,
            "tile": entry.tile if len(PEERS[name][1]) > 1 else "",
        }
    return rows


def measure_counts(counts: Sequence[int], repeats: int) -> tuple[list[dict[str, Any]], float]:
    """Rates of jaxnn by count, and that at the largest as a share of that at a tenth of it."""
    sizes, tenth = (2, 3, 3), max(counts) // 10
    search = jaxnn_search(sizes, random_batch(sizes))
    search(2**15)
    rates = take_turns({count: (search, count) for count in sorted({*counts, tenth})}, repeats)
    medians = {count: float(np.median(rates[count])) for count in rates}
    rows = [{"count": n, "candidates/s": rate, "seconds": n / rate} for n, rate in medians.items()]
    return rows, float(np.median(rates[max(counts)] / rates[tenth]))


def sgemm_peaks(repeats: int) -> dict[str, float]:
    """Highest GFLOP/s of a large float32 matrix product, by library."""
    square = np.random.default_rng(0).normal(size=(SGEMM_SIDE, SGEMM_SIDE)).astype(np.float32)
    matmul, array = jax.jit(jnp.matmul), jnp.asarray(square)
    products: dict[str, Search] = {"jax": lambda _: jax.block_until_ready(matmul(array, array))}
    with suppress(ImportError):
        tensor = import_module("torch").tensor(square)
        products["torch"] = lambda _: tensor @ tensor
    rates = take_turns({name: (product, 1) for name, product in products.items()}, repeats + 1)
    return {name: 2 * SGEMM_SIDE**3 * float(rate.max()) / 1e9 for name, rate in rates.items()}


def measure_chains(sizes: Sizes, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network, a dict a way; vertical data for 2-3-3, else spiral."""
    model, data = jaxnn.mlp(sizes), "vertical" if sizes == (2, 3, 3) else "spiral"
    batch = DATA[data](jax.random.key(0), samples=ROWS // 3)
    if (sizes[0], sizes[-1]) != (2, 3):
        batch = random_batch(sizes)
    share = 1.0 if sizes == (2, 3, 3) else 0.1
    searches = {}
    for name, (prepare, times) in WAYS.items():
        unit = CHAINS if times > 1 else 2  # whole steps of all chains; whole generations
        steps = max(int(arguments.steps * times * share) // unit, 1) * unit
        searches[name] = partial(prepare, model, batch), steps
    against = {
        "x NumPy": "NumPy loop",
        "x scan": "lax.scan, one at a time",
        "x random search": "jaxnn, random search",
    }
    return rows_of(sizes, searches, against, arguments.repeats)


def measure_descent(sizes: Sizes, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network, a dict a way; mini-batches where there are more than 2 features."""
    model, batch = jaxnn.mlp(sizes), random_batch(sizes)
    batch_size = None if sizes[0] == 2 else 32
    searches = {}
    for name, (prepare, times) in DESCENTS.items():
        unit = 9 * (NETWORKS if "networks" in name else 1)  # whole epochs of all networks
        steps = max(int(arguments.steps * times) // 10 // unit, 1) * unit
        searches[name] = partial(prepare, model, batch, batch_size), steps
    against = {
        "x torch eager": "torch eager",
        "x value_and_grad": "jaxnn, jax.value_and_grad",
        "x one network": ONE,
    }
    return rows_of(sizes, searches, against, arguments.repeats)


def rows_of(
    sizes: Sizes,
    searches: Mapping[str, tuple[Callable[[], Search], int]],
    against: Mapping[str, str],
    repeats: int,
) -> list[dict[str, Any]]:
    """A row a way, also for those that are missing.

    Args:
        sizes: of the network.
        searches: what prepares each way, and its steps.
        against: columns, and the way that each compares with.
        repeats: rounds.
    """
    ready, seconds = {}, {}
    for name, (prepare, steps) in searches.items():
        with suppress(ImportError):
            ready[name] = prepare(), steps
            seconds[name] = timed(*ready[name])
    rates = take_turns(ready, repeats)
    rows: list[dict[str, Any]] = []
    for name in searches:
        rows.append({"net": "-".join(map(str, sizes)), "library": name, "steps/s": MISSING})
        if name not in rates:
            continue
        rows[-1] |= {
            "steps/s": float(np.median(rates[name])),
            "spread %": 100 * float(np.ptp(rates[name]) / np.median(rates[name])),
            **{
                column: float(np.median(rates[name] / rates[peer]))
                for column, peer in against.items()
                if peer in rates
            },
            "first call s": seconds[name],
        }
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--only", choices=("search", "chains", "descent", "losses"), help="one of the parts")
    add("--nets", type=layer_sizes, nargs="+", help="such as 2-3-3; by default those of the README")
    add("--seconds", type=float, default=1.0, help="of one timing of random search, about")
    add("--steps", type=count, default=100_000, help="of one chain on 2-3-3; a tenth elsewhere")
    add("--repeats", type=int, default=5, help="rounds; medians are over them")
    add("--counts", type=count, nargs="*", default=[10**5, 10**6, 10**7],
        help="of candidates of jaxnn on 2-3-3; none skips this part")  # fmt: skip
    add("--evaluations", type=count, default=5 * TILE, help="of each library, for its loss")
    add("--seeds", type=count, default=3, help="of each library, for its loss")
    add(
        "--output",
        type=new_folder,
        default=Path("output"),
        help="folder for losses and their figure",
    )
    add("--json", type=new_file, metavar="FILE", help="write all figures here")
    add("--markdown", action="store_true", help="print tables as Markdown")
    arguments = parser.parse_args(argv)
    if (
        not 0 < arguments.seconds < math.inf
        or arguments.repeats < 1
        or min(arguments.counts, default=10) < 10
    ):
        parser.error("--seconds must be above 0, --repeats at least 1 and --counts at least 10")
    if arguments.steps < 100:
        parser.error(f"--steps must be at least 100; got {arguments.steps}")
    if arguments.evaluations < TILE or arguments.seeds < 1:
        parser.error(f"--evaluations must be at least {TILE} and --seeds at least 1")
    return arguments


def report_search(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints random search."""
    peaks = sgemm_peaks(arguments.repeats)
    nets = tqdm(arguments.nets or SEARCH_NETS, unit=" networks")
    rows = [row for net in nets for row in measure_search(net, arguments, max(peaks.values()))]
    print("sgemm:", ", ".join(f"{name} {peak:.1f} GFLOP/s" for name, peak in peaks.items()))
    print(f"\n{table(rows, arguments.markdown)}\n")
    report: dict[str, Any] = {"sgemm_gflops": peaks, "rates": rows}
    if arguments.counts:
        report["counts"], share = measure_counts(arguments.counts, arguments.repeats)
        report["share_of_rate_at_a_tenth"] = share
        print(table(report["counts"], arguments.markdown))
        print(f"\nThe rate at the largest count is {share:.3f} of that at a tenth of it.\n")
    return report


def report_rows(
    measure: Callable[[Sizes, argparse.Namespace], list[dict[str, Any]]],
    default: Sequence[Sizes],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Measures and prints one of the other methods."""
    nets = tqdm(arguments.nets or default, unit=" networks")
    rows = [row for net in nets for row in measure(net, arguments)]
    print(f"{table(rows, arguments.markdown)}\n")
    return {"rates": rows}


def report_losses(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints and draws what libraries come to at equal evaluations."""
    evaluations = arguments.evaluations // TILE * TILE
    facts = {name: fact for name, fact in machine().items() if name != "date"}
    settings = {"evaluations": evaluations, "seeds": arguments.seeds, "machine": facts}
    pieces = pieces_of(evaluations, arguments.seeds)
    found = run_pieces(arguments.output / "equal-evaluations.json", settings, pieces)
    rows = compared(found, arguments.seeds)
    print(f"{evaluations:,} evaluations each, {arguments.seeds} seeds: medians, ranges of losses")
    print(f"{table(rows, arguments.markdown)}\n")
    print("\n".join(faster(rows)) or "nobody is faster than jaxnn")
    path = arguments.output / "equal-evaluations.png"
    draw_rows(rows, evaluations).savefig(path, dpi=110)
    print(path)
    return {"evaluations": evaluations, "rows": rows}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    arguments = parse(argv)
    facts = machine()
    print(", ".join(f"{name} {fact}" for name, fact in facts.items()))
    parts = {
        "search": report_search,
        "chains": partial(report_rows, measure_chains, CHAIN_NETS),
        "descent": partial(report_rows, measure_descent, DESCENT_NETS),
        "losses": report_losses,
    }
    chosen = [arguments.only] if arguments.only else list(parts)
    settings = {"seconds": arguments.seconds, "steps": arguments.steps}
    report = {"machine": facts, "settings": {**settings, "repeats": arguments.repeats}}
    for name in chosen:
        report[name] = parts[name](arguments)
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
