"""Other ways to search at random: each draws whole candidates and keeps the best.

A search draws as many candidates as asked, a multiple of its tile. Losses and networks that the
other methods' peers use stand here as well.
"""

import math
import operator
import os
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from importlib import import_module
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from shared import cli
from shared.runs import finished
from shared.timing import Search, seconds_of

import jaxnn

ROWS, SCALE = 300, 0.05


def random_batch(sizes: cli.Sizes) -> jaxnn.Batch:
    """Draw rows and labels without a meaning."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, sizes[0])).astype(np.float32)
    return jaxnn.Batch(x, generator.integers(0, sizes[-1], ROWS, dtype=np.int32))


def repeated(step: Callable[[Any, int], Any], start: Any, tile: int) -> Search:
    """Return a search of steps `step(best, number)` -> best, each of one more tile."""

    def search(count: int) -> Any:
        best = start
        for number in range(count // tile):
            best = step(best, number)
        return jax.block_until_ready(best)

    return search


def forward(params: Any, x: Any, relu: Callable[[Any], Any]) -> Any:
    """Return the logits of one network as anyone would write them: matrix products."""
    *hidden, last = params
    for weights, biases in hidden:
        x = relu(x @ weights + biases.reshape(1, -1))
    return x @ last[0] + last[1].reshape(1, -1)


def numpy_loss(params: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Return the clipped cross-entropy of one network, step by step as in the book."""
    logits = forward(params, x, partial(np.maximum, 0))
    exponentials = np.exp(logits - np.max(logits, axis=1, keepdims=True))
    probabilities = exponentials / np.sum(exponentials, axis=1, keepdims=True)
    picked = np.clip(probabilities, 1e-7, 1 - 1e-7)[np.arange(len(y)), y]
    return float(np.mean(-np.log(picked)))


def numpy_search(model: jaxnn.Model, batch: jaxnn.Batch, tile: int, seed: int = 0) -> Search:
    """Search one candidate after the other in NumPy, in float64."""
    del tile
    x, y = np.asarray(batch.x, float), np.asarray(batch.y)
    pairs = list(pairwise(model.settings.sizes))

    def search(count: int) -> Any:
        draw, best = np.random.default_rng(seed).standard_normal, (math.inf, None)
        for _ in range(count):
            params = [(SCALE * draw(pair), SCALE * draw((1, pair[1]))) for pair in pairs]
            loss = numpy_loss(params, x, y)
            best = (loss, params) if loss < best[0] else best
        return best

    return search


def jax_loss(params: Any, batch: jaxnn.Batch) -> jax.Array:
    """Return the cross-entropy of one network."""
    logs = jax.nn.log_softmax(forward(params, batch.x, jax.nn.relu))
    return -jnp.mean(jnp.take_along_axis(logs, batch.y[:, None], axis=1))


def vmap_search(model: jaxnn.Model, batch: jaxnn.Batch, tile: int, seed: int = 0) -> Search:
    """Search by `jax.vmap` of drawing and loss, one compiled step a tile."""
    sample_fn = model.sampler(scale=SCALE)

    def step(best: Any, number: int) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), tile)
        params = jax.vmap(sample_fn)(keys)
        losses = jax.vmap(partial(jax_loss, batch=batch))(params)
        winner = jnp.argmin(losses)
        found = jax.tree.map(lambda leaf: leaf[winner], (losses, params))
        return jax.tree.map(partial(jnp.where, found[0] < best[0]), found, best)

    return repeated(jax.jit(step), (jnp.float32(jnp.inf), sample_fn(jax.random.key(0))), tile)


def evosax_search(model: jaxnn.Model, batch: jaxnn.Batch, tile: int, seed: int = 0) -> Search:
    """Search by evosax's `RandomSearch`, one compiled step a population."""
    evosax: Any = import_module("evosax.algorithms")
    key, sample_fn = jax.random.key(seed), model.sampler(scale=SCALE)
    strategy = evosax.RandomSearch(tile, sample_fn(key), sampling_fn=sample_fn)
    settings = strategy.default_params

    def step(state: Any, number: int) -> Any:
        ask_key, tell_key = jax.random.split(jax.random.fold_in(key, number))
        params, state = strategy.ask(ask_key, state, settings)
        losses = jax.vmap(partial(jax_loss, batch=batch))(params)
        return strategy.tell(tell_key, params, losses, state, settings)[0]

    run = repeated(jax.jit(step), strategy.init(key, sample_fn(key), settings), tile)
    return lambda count: run(count).best_fitness


def start_of(model: jaxnn.Model, seed: int) -> Any:
    """Return where every chain and every descent starts."""
    return model.init(jax.random.key(seed + 1))


def evosax_run(strategy: Any, losses_of: Callable[[Any], Any], start: Any, seed: int = 0) -> Search:
    """Return what runs a strategy of evosax from `start`, compiled as a scan of generations."""
    settings = strategy.default_params

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        ask_key, tell_key = jax.random.split(key)
        params, state = strategy.ask(ask_key, state, settings)
        return strategy.tell(tell_key, params, losses_of(params), state, settings)[0], None

    @partial(jax.jit, static_argnums=0)
    def run(generations: int) -> Any:
        init_key, key = jax.random.split(jax.random.key(seed))
        state = strategy.init(init_key, start, settings)
        state = state.replace(mean=ravel_pytree(start)[0])  # evosax leaves this to its user
        return jax.lax.scan(step, state, jax.random.split(key, generations))[0].best_fitness

    return lambda generations: jax.block_until_ready(run(generations))


def torch_network(params: Any) -> Any:
    """Return a `Sequential` of `Linear` and `ReLU` with these weights."""
    torch: Any = import_module("torch")
    layers: list[Any] = []
    for weights, biases in params:
        layer = torch.nn.Linear(*weights.shape)
        layer.weight.data, layer.bias.data = (
            torch.tensor(np.array(leaf)) for leaf in (weights.T, biases)
        )
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def torch_losses(params: Any, x: Any, y: Any) -> Any:
    """Return the cross-entropies of many networks; rows in the last axis are fastest."""
    torch: Any = import_module("torch")
    *hidden, last = params
    x, y = x.expand(len(last[0]), *x.shape), y.expand(len(last[0]), -1)
    for weights, biases in hidden:
        x = torch.baddbmm(biases.mT, weights.mT, x).relu_()
    logits = torch.baddbmm(last[1].mT, last[0].mT, x)
    return torch.nn.functional.cross_entropy(logits, y, reduction="none").mean(1)


def torch_search(
    model: jaxnn.Model, batch: jaxnn.Batch, tile: int, seed: int = 0, *, threads: int | None
) -> Search:
    """Search by `baddbmm` over a tile of networks, drawn by `randn`."""
    torch: Any = import_module("torch")
    x, y = torch.tensor(batch.x.T.copy()), torch.tensor(batch.y, dtype=torch.int64)
    shapes = [((tile, i, o), (tile, 1, o)) for i, o in pairwise(model.settings.sizes)]

    @torch.inference_mode()
    def step(best: Any, _: int) -> Any:
        torch.set_num_threads(threads)
        params = [[torch.randn(shape).mul_(SCALE) for shape in layer] for layer in shapes]
        loss, winner = torch_losses(params, x, y).min(0)
        if loss >= best[0]:
            return best
        return float(loss), [[leaf[winner].clone() for leaf in layer] for layer in params]

    def search(count: int) -> Any:
        torch.manual_seed(seed)
        return run(count)

    run = repeated(step, (math.inf, None), tile)
    return search


def jaxnn_search(
    model: jaxnn.Model,
    batch: jaxnn.Batch,
    tile: int = 1,
    seed: int = 0,
    scale: float = SCALE,
    **options: Any,
) -> Search:
    """Search by `jaxnn.random_search` as users call it: it chooses its tile."""
    del tile
    given = jax.random.key(seed), model.loss, model.sampler(scale=scale), batch
    search = partial(jaxnn.random_search, *given, **options)
    return lambda count: finished(search(num_candidates=count)).loss


def part_search(
    draws: bool, scores: bool, model: jaxnn.Model, batch: jaxnn.Batch, seed: int = 0
) -> Search:
    """Run parts of jaxnn's search alone: draw or not, score or not, and keep the lowest value.

    Without draws a candidate is one random number times fixed params; without losses its value is
    the sum of what was drawn, since the compiler would leave out draws that nobody uses.
    """
    draw = model.sampler(scale=SCALE)
    fixed = draw(jax.random.key(seed + 1))

    def one_number(key: jax.Array) -> Any:
        number = jax.random.uniform(key)
        return jax.tree.map(lambda leaf: number * leaf, fixed)

    def add_up(params: Any, _: Any) -> jax.Array:
        drawn = jax.lax.optimization_barrier(ravel_pytree(params)[0])
        # A sum over a short axis is slow on CPUs: it would take longer than the draws.
        return reduce(operator.add, drawn) if drawn.size <= 128 else jnp.sum(drawn)

    def keep_lowest(lowest: jax.Array, tile: jaxnn.search.Tile) -> jax.Array:
        return jnp.minimum(lowest, jnp.min(jnp.where(tile.inside, tile.value, jnp.inf)))

    value_fn, sample_fn = model.loss if scores else add_up, draw if draws else one_number
    statistics = {"lowest": jaxnn.search.Statistic(np.float32(np.inf), keep_lowest, np.minimum)}
    given = jax.random.key(seed), value_fn, sample_fn, batch, statistics
    return lambda count: jaxnn.search.reduce(*given, num_candidates=count)["lowest"]


PARTS = {
    "draw": partial(part_search, True, False),
    "loss": partial(part_search, False, True),
    "draw and loss": partial(part_search, True, True),
}
JAX_TILES, TORCH_TILES = (32, 128, 512, 2048), tuple(2**n for n in range(4, 12))
SEARCHES: dict[str, tuple[Callable[..., Search], Sequence[int]]] = {
    "NumPy loop": (numpy_search, [1]),
    "jax.vmap": (vmap_search, JAX_TILES),
    "evosax RandomSearch": (evosax_search, JAX_TILES),
    "torch baddbmm": (partial(torch_search, threads=os.cpu_count()), TORCH_TILES),
    "torch, 1 thread": (partial(torch_search, threads=1), TORCH_TILES),
    "jaxnn": (jaxnn_search, [2**11]),
}
"""Libraries, and the tiles to try: powers of two, as all counts, so that no tile is padded."""


@cache
def best_tile(name: str, sizes: cli.Sizes, seconds: float) -> tuple[int, float]:
    """Return the tile at which a library draws fastest, and its candidates a second there.

    A trial doubles its count until it lasts `seconds`; the shortest of three counts.
    """
    prepare, tiles = SEARCHES[name]
    given = jaxnn.mlp(sizes), random_batch(sizes)

    def rate(tile: int) -> float:
        search, count, shortest = prepare(*given, tile), tile, 0.0
        search(tile)  # compiles
        while shortest < seconds:
            count *= 2
            shortest = min(seconds_of(search, count) for _ in range(3))
        return count / shortest

    rates = {tile: rate(tile) for tile in tiles}
    tile = max(rates, key=lambda tile: rates[tile])
    return tile, rates[tile]
