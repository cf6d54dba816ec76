"""Measures candidates a second of random search, beside other ways to do the same work.

Everybody draws whole weight sets (0.05 times normals), takes the cross-entropy of all 300 rows and
keeps the best; a peer with a choice of tile runs at its best one. All take turns, so that a change
of the machine's pace hits them alike; ratios are medians over rounds of the ratio within a round.

    python scripts/benchmark.py
    python scripts/benchmark.py --nets 2-3-3 --counts 1e5 1e6 1e7 1e8 --json benchmark.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib import import_module, metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxnn

ROWS, SCALE, SGEMM_SIDE = 300, 0.05, 2048
MISSING = "not installed"

Sizes = tuple[int, ...]
Search = Callable[[int], Any]
"""Draws as many candidates as asked, a multiple of the tile; returns the best when it has it."""


class Entry(NamedTuple):
    """A peer at one tile, warmed up, and a count that lasts about as long as wanted."""

    search: Search
    tile: int
    count: int
    rate: float
    compile_seconds: float


def random_batch(sizes: Sizes) -> jaxnn.Batch:
    """Rows and labels without a meaning."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, sizes[0])).astype(np.float32)
    return jaxnn.Batch(x, generator.integers(0, sizes[-1], ROWS, dtype=np.int32))


def repeated(step: Callable[[Any, int], Any], start: Any, tile: int) -> Search:
    """A search of steps `step(best, number)` -> best, each of which draws one more tile."""

    def search(count: int) -> Any:
        best = start
        for number in range(count // tile):
            best = step(best, number)
        return jax.block_until_ready(best)

    return search


def forward(params: Any, x: Any, relu: Callable[[Any], Any]) -> Any:
    """Logits of one weight set as anyone would write them: matrix products."""
    *hidden, last = params
    for weights, biases in hidden:
        x = relu(x @ weights + biases.reshape(1, -1))
    return x @ last[0] + last[1].reshape(1, -1)


def numpy_loss(params: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Clipped cross-entropy of one weight set, step by step as in the chapter."""
    logits = forward(params, x, partial(np.maximum, 0))
    exponentials = np.exp(logits - np.max(logits, axis=1, keepdims=True))
    probabilities = exponentials / np.sum(exponentials, axis=1, keepdims=True)
    picked = np.clip(probabilities, 1e-7, 1 - 1e-7)[np.arange(len(y)), y]
    return float(np.mean(-np.log(picked)))


def numpy_search(sizes: Sizes, batch: jaxnn.Batch, tile: int) -> Search:
    """One candidate after the other, float64."""
    draw = np.random.default_rng(0).standard_normal
    x, y = np.asarray(batch.x, float), np.asarray(batch.y)

    def step(best: Any, _: int) -> Any:
        params = [(SCALE * draw(pair), SCALE * draw((1, pair[1]))) for pair in pairwise(sizes)]
        loss = numpy_loss(params, x, y)
        return (loss, params) if loss < best[0] else best

    return repeated(step, (math.inf, None), tile)


def jax_loss(params: Any, batch: jaxnn.Batch) -> jax.Array:
    """Cross-entropy of one weight set."""
    logs = jax.nn.log_softmax(forward(params, batch.x, jax.nn.relu))
    return -jnp.mean(jnp.take_along_axis(logs, batch.y[:, None], axis=1))


def vmap_search(sizes: Sizes, batch: jaxnn.Batch, tile: int) -> Search:
    """`jax.vmap` of drawing and loss, one compiled step a tile."""
    sample_fn = jaxnn.mlp(sizes).sampler(scale=SCALE)

    def step(best: Any, number: int) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), tile)
        params = jax.vmap(sample_fn)(keys)
        losses = jax.vmap(partial(jax_loss, batch=batch))(params)
        winner = jnp.argmin(losses)
        found = jax.tree.map(lambda leaf: leaf[winner], (losses, params))
        return jax.tree.map(partial(jnp.where, found[0] < best[0]), found, best)

    return repeated(jax.jit(step), (jnp.float32(jnp.inf), sample_fn(jax.random.key(0))), tile)


def evosax_search(sizes: Sizes, batch: jaxnn.Batch, tile: int) -> Search:
    """`RandomSearch` of evosax with that loss, one compiled step a population."""
    evosax: Any = import_module("evosax.algorithms")
    key, sample_fn = jax.random.key(0), jaxnn.mlp(sizes).sampler(scale=SCALE)
    strategy = evosax.RandomSearch(tile, sample_fn(key), sampling_fn=sample_fn)
    settings = strategy.default_params

    def step(state: Any, number: int) -> Any:
        ask_key, tell_key = jax.random.split(jax.random.fold_in(key, number))
        params, state = strategy.ask(ask_key, state, settings)
        losses = jax.vmap(partial(jax_loss, batch=batch))(params)
        return strategy.tell(tell_key, params, losses, state, settings)[0]

    return repeated(jax.jit(step), strategy.init(key, sample_fn(key), settings), tile)


def torch_losses(params: Any, x: Any, y: Any) -> Any:
    """Cross-entropies of many weight sets; rows in the last axis, also of `x`, are fastest."""
    torch: Any = import_module("torch")
    *hidden, last = params
    x, y = x.expand(len(last[0]), *x.shape), y.expand(len(last[0]), -1)
    for weights, biases in hidden:
        x = torch.baddbmm(biases.mT, weights.mT, x).relu_()
    logits = torch.baddbmm(last[1].mT, last[0].mT, x)
    return torch.nn.functional.cross_entropy(logits, y, reduction="none").mean(1)


def torch_search(sizes: Sizes, batch: jaxnn.Batch, tile: int, threads: int | None) -> Search:
    """`baddbmm` over a tile of weight sets, drawn by `randn`, without gradients."""
    torch: Any = import_module("torch")
    x, y = torch.tensor(batch.x.T.copy()), torch.tensor(batch.y, dtype=torch.int64)
    shapes = [((tile, i, o), (tile, 1, o)) for i, o in pairwise(sizes)]

    @torch.inference_mode()
    def step(best: Any, _: int) -> Any:
        torch.set_num_threads(threads)
        params = [[torch.randn(shape).mul_(SCALE) for shape in layer] for layer in shapes]
        loss, winner = torch_losses(params, x, y).min(0)
        if loss >= best[0]:
            return best
        return float(loss), [[leaf[winner].clone() for leaf in layer] for layer in params]

    return repeated(step, (math.inf, None), tile)


def jaxnn_search(sizes: Sizes, batch: jaxnn.Batch, tile: int = 1) -> Search:
    """`jaxnn.random_search` as users call it: it chooses its tile and keeps all statistics."""
    del tile
    model = jaxnn.mlp(sizes)
    given = jax.random.key(0), model.loss, model.sampler(scale=SCALE), batch
    return lambda count: jaxnn.random_search(*given, num_candidates=count)


JAX_TILES, TORCH_TILES = (32, 128, 512, 2048), tuple(2**n for n in range(4, 12))
PEERS: dict[str, tuple[Callable[[Sizes, jaxnn.Batch, int], Search], Sequence[int]]] = {
    "NumPy loop": (numpy_search, [1]),
    "jax.vmap": (vmap_search, JAX_TILES),
    "evosax RandomSearch": (evosax_search, JAX_TILES),
    "torch baddbmm": (partial(torch_search, threads=os.cpu_count()), TORCH_TILES),
    "torch, 1 thread": (partial(torch_search, threads=1), TORCH_TILES),
    "jaxnn": (jaxnn_search, [2**11]),
}
"""Ways to search and the tiles to try: powers of two, as all counts, so that no tile is padded."""


def timed(search: Search, count: int) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    search(count)
    return time.perf_counter() - started


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


def take_turns(searches: Mapping[Any, tuple[Search, int]], repeats: int) -> dict[Any, np.ndarray]:
    """Candidates a second of every search in every round."""
    pairs = searches.values()
    rounds = [[count / timed(search, count) for search, count in pairs] for _ in range(repeats)]
    return dict(zip(searches, np.array(rounds).T, strict=True))


def measure(sizes: Sizes, arguments: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
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


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {package.name: package.version for package in metadata.distributions()}
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "CPU": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "jax backend": jax.default_backend(),
        "python": platform.python_version(),
        **{name: versions.get(name, MISSING) for name in ("numpy", "jax", "torch", "evosax")},
    }


def table(rows: Sequence[dict[str, Any]], markdown: bool) -> str:
    """Rows under the header of the longest; words flushed left, numbers right."""
    header = list(max(rows, key=len))

    def cell(value: Any) -> str:
        if isinstance(value, str):
            return value
        return f"{value:,.{0 if isinstance(value, int) or value >= 100 else 2}f}"

    lines = [header, *([cell(row.get(name, "")) for name in header] for row in rows)]
    if markdown:
        lines.insert(1, ["---" if name in ("net", "library") else "---:" for name in header])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.ljust if name in ("net", "library") else str.rjust for name in header]
    lines = [[p(c, w) for p, c, w in zip(pads, line, widths, strict=True)] for line in lines]
    return "\n".join(
        f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in lines
    )


def as_sizes(text: str) -> Sizes:
    """Layer sizes written as 2-3-3."""
    sizes = tuple(int(size) for size in text.split("-"))
    if len(sizes) < 2 or min(sizes) < 1 or sizes[-1] < 2:
        raise ValueError(text)
    return sizes


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    nets = [as_sizes(text) for text in ("2-3-3", "2-16-16-3", "2-64-64-3", "64-32-10")]
    parser.add_argument("--nets", type=as_sizes, nargs="+", default=nets, help="such as 2-3-3")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one timing, about")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are over them")
    parser.add_argument(
        "--counts", type=lambda text: int(float(text)), nargs="*", default=[10**5, 10**6, 10**7],
        help="of candidates of jaxnn on 2-3-3; none skips this part",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    arguments = parser.parse_args(argv)
    if arguments.seconds <= 0 or arguments.repeats < 1 or min(arguments.counts, default=10) < 10:
        parser.error("--seconds must be above 0, --repeats at least 1 and --counts at least 10")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    arguments = parse(argv)
    facts, peaks = machine(), sgemm_peaks(arguments.repeats)
    report: dict[str, Any] = {"machine": facts, "sgemm_gflops": peaks, "rates": []}
    report |= {"seconds": arguments.seconds, "repeats": arguments.repeats}
    for sizes in tqdm(arguments.nets, unit=" networks"):
        report["rates"] += measure(sizes, arguments, max(peaks.values()))
    print(", ".join(f"{name} {fact}" for name, fact in facts.items()))
    print("sgemm:", ", ".join(f"{name} {peak:.1f} GFLOP/s" for name, peak in peaks.items()))
    print(f"\n{table(report['rates'], arguments.markdown)}\n")
    if arguments.counts:
        report["counts"], share = measure_counts(arguments.counts, arguments.repeats)
        report["share_of_rate_at_a_tenth"] = share
        print(table(report["counts"], arguments.markdown))
        print(f"\nThe rate at the largest count is {share:.3f} of that at a tenth of it.")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
