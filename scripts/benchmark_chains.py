"""Measures steps a second of perturbation search, beside other ways to walk the same chain.

A step is one proposal: every weight moved by 0.05 times a normal, the cross-entropy of all 300
rows, and the verdict. All take turns; ratios are medians over rounds of the ratio in a round.

    python scripts/benchmark_chains.py
    python scripts/benchmark_chains.py --nets 2-3-3 --steps 1e5 --json chains.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark import (
    MISSING,
    Search,
    Sizes,
    as_sizes,
    jax_loss,
    machine,
    numpy_loss,
    table,
    take_turns,
    timed,
)
from jax.flatten_util import ravel_pytree
from random_search import count
from tqdm import tqdm

import jaxnn

STEP, CHAINS = 0.05, 1_024
DATA: dict[Sizes, Any] = {(2, 3, 3): jaxnn.datasets.vertical}
"""The data of a network; spiral for the others."""

Way = Callable[[jaxnn.Model, jaxnn.Batch], Search]


def start_of(model: jaxnn.Model) -> Any:
    """Where every chain starts."""
    return model.init(jax.random.key(1))


def numpy_chain(model: jaxnn.Model, batch: jaxnn.Batch) -> Search:
    """The chapter's loop: nudge, score, keep or revert; float64."""
    x, y = np.asarray(batch.x, float), np.asarray(batch.y)
    start = [(np.asarray(w, float), np.asarray(b, float)) for w, b in start_of(model)]

    def search(steps: int) -> Any:
        draw = np.random.default_rng(0).standard_normal
        best, lowest = start, numpy_loss(start, x, y)
        for _ in range(steps):
            params = [tuple(leaf + STEP * draw(leaf.shape) for leaf in layer) for layer in best]
            loss = numpy_loss(params, x, y)
            if loss < lowest:
                best, lowest = params, loss
        return lowest

    return search


def scanned_chain(model: jaxnn.Model, batch: jaxnn.Batch) -> Search:
    """One step after the other in a compiled `lax.scan`, as anyone would write it."""
    start = start_of(model)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, lowest = carry
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        pairs = zip(leaves, keys, strict=True)
        moved = [leaf + STEP * jax.random.normal(k, leaf.shape) for leaf, k in pairs]
        proposal = jax.tree.unflatten(tree, moved)
        loss = jax_loss(proposal, batch)
        chosen = jax.tree.map(partial(jnp.where, loss < lowest), (proposal, loss), carry)
        return chosen, loss

    @partial(jax.jit, static_argnums=0)
    def run(steps: int) -> Any:
        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (start, jax_loss(start, batch)), keys)

    return lambda steps: jax.block_until_ready(run(steps))


def evosax_chain(model: jaxnn.Model, batch: jaxnn.Batch) -> Search:
    """`HillClimbing` of evosax, two proposals a generation (its least), compiled as a scan."""
    evosax: Any = import_module("evosax.algorithms")
    start = start_of(model)
    strategy = evosax.HillClimbing(2, start, std_schedule=lambda _: STEP)
    settings = strategy.default_params

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        ask_key, tell_key = jax.random.split(key)
        params, state = strategy.ask(ask_key, state, settings)
        losses = jax.vmap(partial(jax_loss, batch=batch))(params)
        return strategy.tell(tell_key, params, losses, state, settings)[0], None

    @partial(jax.jit, static_argnums=0)
    def run(steps: int) -> Any:
        state = strategy.init(jax.random.key(0), start, settings)
        state = state.replace(mean=ravel_pytree(start)[0])  # which evosax leaves to its user
        return jax.lax.scan(step, state, jax.random.split(jax.random.key(1), steps // 2))[0]

    return lambda steps: jax.block_until_ready(run(steps))


def nevergrad_chain(model: jaxnn.Model, batch: jaxnn.Batch) -> Search:
    """`OnePlusOne` of nevergrad, which adapts its step; the loss is the NumPy one."""
    nevergrad: Any = import_module("nevergrad")
    x, y = np.asarray(batch.x, float), np.asarray(batch.y)
    shapes = [shape for i, o in pairwise(model.settings.sizes) for shape in ((i, o), (o,))]
    cuts = np.cumsum([math.prod(shape) for shape in shapes])[:-1]

    def loss(flat: np.ndarray) -> float:
        parts = np.split(flat, cuts)
        leaves = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return numpy_loss(list(zip(leaves[::2], leaves[1::2], strict=True)), x, y)

    def search(steps: int) -> Any:
        size = sum(math.prod(shape) for shape in shapes)
        optimizer = nevergrad.optimizers.OnePlusOne(parametrization=size, budget=steps)
        return optimizer.minimize(loss)

    return search


def jaxnn_chains(num_chains: int | None, model: jaxnn.Model, batch: jaxnn.Batch) -> Search:
    """`jaxnn.perturbation_search` as users call it; many chains keep every hundredth step."""
    given = jax.random.key(0), model.loss, start_of(model), batch
    options = {"scale": STEP, "num_chains": num_chains, "record_every": 100 if num_chains else 1}
    width = num_chains or 1
    return lambda steps: jaxnn.perturbation_search(
        *given, num_steps=max(steps // width, 1), **options
    )


def jaxnn_search(model: jaxnn.Model, batch: jaxnn.Batch) -> Search:
    """Random search: what many chains are held against."""
    given = jax.random.key(0), model.loss, model.sampler(scale=STEP), batch
    return lambda steps: jaxnn.random_search(*given, num_candidates=steps)


WAYS: dict[str, tuple[Way, float]] = {
    "NumPy loop": (numpy_chain, 0.1),
    "nevergrad OnePlusOne": (nevergrad_chain, 0.01),
    "lax.scan, one at a time": (scanned_chain, 1),
    "evosax HillClimbing": (evosax_chain, 1),
    "jaxnn, one chain": (partial(jaxnn_chains, None), 1),
    f"jaxnn, {CHAINS:,} chains": (partial(jaxnn_chains, CHAINS), 400),
    "jaxnn, random search": (jaxnn_search, 200),
}
"""Ways to search, and how many times `--steps` each takes; slow ones take fewer."""


def measure(sizes: Sizes, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network, a dict a way."""
    model = jaxnn.mlp(sizes)
    batch = DATA.get(sizes, jaxnn.datasets.spiral)(jax.random.key(0), samples=100)
    searches, seconds = {}, {}
    share = 1.0 if sizes == (2, 3, 3) else 0.1
    for name, (prepare, times) in WAYS.items():
        steps = max(int(arguments.steps * times * share), 2)
        try:
            searches[name] = prepare(model, batch), steps
        except ImportError:
            continue
        seconds[name] = timed(*searches[name])
    rates = take_turns(searches, arguments.repeats)
    rows: list[dict[str, Any]] = []
    for name in WAYS:
        net = "-".join(map(str, sizes))
        rows.append({"net": net, "library": name, "steps/s": MISSING})
        if name not in rates:
            continue
        rows[-1] |= {
            "steps/s": float(np.median(rates[name])),
            "spread %": 100 * float(np.ptp(rates[name]) / np.median(rates[name])),
            "x NumPy": float(np.median(rates[name] / rates["NumPy loop"])),
            "x scan": float(np.median(rates[name] / rates["lax.scan, one at a time"])),
            "x random search": float(np.median(rates[name] / rates["jaxnn, random search"])),
            "first call s": seconds[name],
        }
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    nets = [as_sizes(text) for text in ("2-3-3", "2-16-3", "2-64-3")]
    parser.add_argument("--nets", type=as_sizes, nargs="+", default=nets, help="such as 2-3-3")
    parser.add_argument("--steps", type=count, default=100_000, help="of one chain")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are over them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    arguments = parser.parse_args(argv)
    if arguments.steps < 100 or arguments.repeats < 1:
        parser.error("--steps must be at least 100 and --repeats at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    arguments = parse(argv)
    rows = [
        row for net in tqdm(arguments.nets, unit=" networks") for row in measure(net, arguments)
    ]
    print(", ".join(f"{name} {fact}" for name, fact in machine().items()))
    print(f"\n{table(rows, arguments.markdown)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rates": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
