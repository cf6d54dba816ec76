"""Check jaxnn on an accelerator against the CPU of the same machine, then measure its pace.

The checks run first and in full. A candidate, a step or a gradient rounds differently on another
device, so two searches may differ where two losses are nearly equal: such near-ties are counted,
and any other difference fails. Then each row is measured after compilation, on as much work as its
share of `--seconds` allows. An error in one part is told in its row; the others still run. The exit
status is 1 if a check failed. JAX_PLATFORMS, if set, has to name cpu as well (`cuda,cpu`).

    PYTHONPATH=. python scripts/benchmarks/gpu.py --json gpu.json
    PYTHONPATH=. JAX_PLATFORMS=cpu python scripts/benchmarks/gpu.py --small
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from check_machine import relative_error
from peers.chains import jaxnn_chains
from peers.descent import jaxnn_descent
from peers.search import jaxnn_search, torch_search
from shared import cli
from shared.problems import DATA
from shared.runs import finished
from shared.timing import Search, machine, matrix_product, timed_call

import jaxnn

ROUNDING = 1e-4
"""The largest relative difference of losses and gradients; TF32 would exceed it."""
DESCENT_ROUNDING = 1e-3
"""The same after a whole descent, in which it adds up."""
NETS: dict[cli.Sizes, float] = {(2, 3, 3): 4.0, (2, 16, 16, 3): 1.0}
"""Networks that are checked, the first alone in a small run, and the scales of their searches."""
ROUNDS = 3
TORCH_BYTES = 2**29
"""For the largest array of a tile of torch's: many times the caches, a small part of the memory."""

Row = dict[str, Any]


def on_cpu(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns on the CPU, as NumPy arrays."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, function(*args))


def data(name: str = "vertical", seed: int = 0) -> jaxnn.Batch:
    """Return 300 rows of a data set, drawn on the CPU for every device."""
    return on_cpu(lambda: DATA[name](jax.random.key(seed), samples=100))


def starts_of(model: jaxnn.Model, number: int) -> Any:
    """Return params of many networks, with a leading axis, drawn on the CPU for every device."""
    init = partial(model.init, scale=1.0, distribution="he")
    return on_cpu(lambda: jax.vmap(init)(jax.random.split(jax.random.key(1), number)))


def check_searches(nets: Sequence[cli.Sizes], searches: int) -> Row:
    """Compare the winners of small random searches."""
    cpu, differ, errors = jax.devices("cpu")[:1], 0, []
    for sizes in nets:
        model = jaxnn.mlp(sizes)
        sample_fn = model.sampler(scale=NETS[sizes])
        for seed in range(searches // len(nets)):
            given = jax.random.key(seed), model.loss, sample_fn, data(seed=seed)
            search = partial(jaxnn.random_search, *given, num_candidates=2_000)
            found, expected = search(devices=jax.devices()[:1]), search(devices=cpu)
            differ += found.candidate != expected.candidate
            errors.append(abs(found.loss / expected.loss - 1))
    return {"cases": len(errors), "near-ties": differ, "error": np.max(errors), "allowed": ROUNDING}


def check_gradients(nets: Sequence[cli.Sizes]) -> Row:
    """Compare gradients by hand with those of `jax.grad` on the CPU."""
    errors = []
    for hidden, sizes in product(("relu", "tanh"), nets):
        model = jaxnn.mlp(sizes, hidden=hidden)
        params = jax.tree.map(lambda leaf: leaf[0], starts_of(model, 1))
        found = jax.jit(model.value_and_grad)(params, data("spiral"))
        automatic = jax.jit(jax.value_and_grad(model.loss_reference))
        errors.append(relative_error(found, on_cpu(automatic, params, data("spiral"))))
    return {"cases": len(errors), "near-ties": 0, "error": np.max(errors), "allowed": ROUNDING}


def check_chains(steps: int) -> Row:
    """Compare the accepted steps of chains up to the first near-tie of each."""
    model, chains = jaxnn.mlp((2, 3, 3)), 8
    params = jax.tree.map(lambda leaf: leaf[0], starts_of(model, 1))
    given = jax.random.key(0), model.loss, params, data()
    climb = partial(
        jaxnn.perturbation_search, *given, num_steps=steps, scale=0.05, num_chains=chains
    )
    found = climb(devices=jax.devices()[:1]).history
    expected = climb(devices=jax.devices("cpu")[:1]).history
    near_ties, errors = 0, []
    for chain in range(chains):
        differs = found.accepted[chain] != expected.accepted[chain]
        end = int(np.argmax(differs)) if differs.any() else steps
        pair = found.current_loss[chain, :end], expected.current_loss[chain, :end]
        errors += [relative_error(*pair)] if end else []
        if end < steps:  # one device accepted what the other did not: are both losses the same?
            near_ties += 1
            proposed = expected.proposed_loss[chain, end]
            current = expected.current_loss[chain, end - 1] if end else proposed
            errors.append(float(abs(proposed / current - 1)))
    return {"cases": chains, "near-ties": near_ties, "error": np.max(errors), "allowed": ROUNDING}


def check_descents(sizes: cli.Sizes) -> Row:
    """Compare the losses of one network and of several after a descent."""
    model, networks = jaxnn.mlp(sizes), 32
    starts, batch = starts_of(model, networks), data("spiral")
    options = {"num_epochs": 50, "learning_rate": 0.1}

    def descend(params: Any, **more: Any) -> Any:
        given = jax.random.key(0), model.value_and_grad, params, batch
        return finished(jaxnn.gradient_descent(*given, **options, **more)).loss

    many = partial(descend, starts, num_networks=networks)
    one = partial(descend, jax.tree.map(lambda leaf: leaf[0], starts))
    errors = [
        relative_error(many(devices=jax.devices()[:1]), many(devices=jax.devices("cpu")[:1])),
        relative_error(one(), on_cpu(one)),
    ]
    return {"cases": networks + 1, "near-ties": 0, "error": np.max(errors),
            "allowed": DESCENT_ROUNDING}  # fmt: skip


class Measurement(NamedTuple):
    """A row of the second table: `prepare()` returns what does `count` units of work at most."""

    name: str
    unit: str
    prepare: Callable[[], Search]
    least: int
    most: int = 10**9


def measurements(small: bool) -> list[Measurement]:
    """Return what is measured; the counts are limits, which a slow device does not reach."""
    side, many, thousand = (256, 64, 16) if small else (8_192, 100_000, 1_000)
    tiny, middle, batch = jaxnn.mlp((2, 3, 3)), jaxnn.mlp((2, 64, 3)), data()
    nets = (((2, 3, 3), 4.0, 2**16), ((2, 16, 16, 3), 2.0, 2**12), ((2, 64, 64, 3), 1.0, 2**10))
    kinds = {"": {}, ", early rejection": {"keep_below": 0.0}}
    statistics = {"top_k": 3, "thresholds": [0.3, 0.5], "collect": jaxnn.Collect(0.3)}

    def search(sizes: cli.Sizes, scale: float, least: int, kind: str, **more: Any) -> Measurement:
        prepare = partial(jaxnn_search, jaxnn.mlp(sizes), batch, scale=scale, **more)
        return Measurement(f"search {cli.join_sizes(sizes)}{kind}", "candidates", prepare, least)

    def by_torch(sizes: cli.Sizes) -> Measurement:
        tile = 2 ** (8 if small else int(math.log2(TORCH_BYTES / (4 * len(batch.y) * max(sizes)))))
        prepare = partial(torch_on_device, sizes, batch, tile)
        return Measurement(f"torch, {cli.join_sizes(sizes)}", "candidates", prepare, tile)

    def climb(chains: int | None) -> Callable[[], Search]:
        return partial(jaxnn_chains, chains, tiny, batch)

    def descend(networks: int, model: jaxnn.Model, rows: jaxnn.Batch) -> Measurement:
        name = f"{networks:,} networks, {cli.join_sizes(model.settings.sizes)}"
        prepare = partial(jaxnn_descent, True, networks, model, rows)
        return Measurement(name, "steps", prepare, networks, 10**8)

    return [
        *(
            Measurement(f"matmul {side}, float32, precision {precision}", "GFLOP",
                        partial(by_gflop, side, precision), math.ceil(2 * side**3 / 1e9))
            for precision in ("highest", "default")
        ),
        search(*nets[0], ", all statistics", **statistics),
        *(search(*net, kind, **options) for net in nets for kind, options in kinds.items()),
        Measurement("one chain, 2-3-3", "steps", climb(None), 1_000, 10**6),
        Measurement(f"{many:,} chains, 2-3-3", "steps", climb(many), many),
        *(descend(number, tiny, batch) for number in (thousand, many)),
        descend(thousand, middle, data("spiral")),
        *(by_torch(sizes) for sizes, *_ in nets if find_spec("torch")),
    ]  # fmt: skip


def torch_on_device(sizes: cli.Sizes, batch: jaxnn.Batch, tile: int) -> Search:
    """Return a search by torch on the kind of device that JAX uses: a CPU build of it fails."""
    torch: Any = import_module("torch")
    device = torch.device("cpu" if jax.default_backend() == "cpu" else "cuda")
    with device:
        search = torch_search(jaxnn.mlp(sizes), batch, tile, threads=torch.get_num_threads())

    def on_device(count: int) -> Any:
        with device:
            return search(count)

    return on_device


def by_gflop(side: int, precision: str) -> Search:
    """Return a function that multiplies matrices, `count` times 10^9 operations in all."""
    multiply, gflop = matrix_product(side, precision), 2 * side**3 / 1e9
    return lambda count: multiply(max(round(count / gflop), 1))


def check(name: str, compare: Callable[[], Row]) -> Row:
    """Return the row of a check: right, wrong, or an error."""
    started, row = time.perf_counter(), {"check": name, "result": ""}
    try:
        row |= compare()
        row["result"] = "right" if row["error"] <= row["allowed"] else "WRONG"
    except Exception as error:
        row["result"] = f"error: {cli.in_one_line(error)}"
    return {**row, "seconds": time.perf_counter() - started}


def measure(row: Measurement, seconds: float) -> Row:
    """Return the pace of a row: work grows till it lasts some seconds, then it is repeated."""
    told: Row = {"row": row.name, "unit": row.unit, "units/s": ""}
    deadline, count = time.perf_counter() + seconds, row.least
    paces, was_compiling = [], False
    try:
        if seconds <= 0:
            raise TimeoutError("no time is left of --seconds")
        jax.clear_caches()  # what the parts before have compiled counts for this row as well
        search = row.prepare()
        told["first call s"], told["compile s"] = timed_call(search, count)
        while True:
            taken, compiling = timed_call(search, count)
            if count < row.most and taken < seconds / 16 and time.perf_counter() < deadline:
                count = min(8 * count, row.most)
                continue
            if was_compiling:  # a pace after compilation takes its place
                paces = []
            was_compiling = compiling > 0
            if not was_compiling or not paces:
                paces.append(count / (taken - compiling))
            if len(paces) == ROUNDS or time.perf_counter() + taken > deadline:
                break
        pace = float(np.median(paces))
        told |= {"units/s": pace, "low": min(paces), "high": max(paces), "count": count,
                 "seconds": count / pace}  # fmt: skip
    except Exception as error:
        told["unit"] = f"error: {cli.in_one_line(error)}"
    return told


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.parser_for(__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=400.0, help="The seconds of all, the checks included.")
    add("--small", action="store_true", help="Make small checks and rows, for a trial on a CPU.")
    add("--json", type=cli.new_file, metavar="FILE", help="Write the results to this file.")
    add("--markdown", action="store_true", help="Print tables as Markdown.")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.seconds < math.inf:
        parser.error(f"--seconds must be above 0; got {arguments.seconds}")
    return arguments


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, and report."""
    arguments = parse(argv)
    deadline, small = time.perf_counter() + arguments.seconds, arguments.small
    report: dict[str, Any] = {"machine": machine(), "checks": [], "rows": []}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), flush=True)

    def tell(part: str, row: Row) -> None:
        report[part].append(row)
        print(" | ".join(map(str, row.values())), flush=True)
        cli.write_json(arguments.json, report)  # what is known stays, whatever ends the run

    nets = list(NETS)[:1] if small else list(NETS)
    checks = {
        "random searches": partial(check_searches, nets, 10 if small else 100),
        "gradients by hand": partial(check_gradients, nets),
        "chains": partial(check_chains, 200 if small else 2_000),
        "descents": partial(check_descents, nets[-1]),
    }
    for name, compare in checks.items():
        tell("checks", check(name, compare))
    rows = measurements(small)
    for number, row in enumerate(rows):
        tell("rows", measure(row, (deadline - time.perf_counter()) / (len(rows) - number)))
    for part in ("checks", "rows"):
        print()
        cli.print_table(report[part], arguments.markdown)
    return int(any(row["result"] != "right" for row in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
