"""Other ways to do random search: each draws whole weight sets and keeps the best.

A search draws as many candidates as asked, a multiple of its tile; `seed` says which.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from command_line import Sizes
from resuming import finished
from turns import Search

import jaxnn

ROWS, SCALE = 300, 0.05


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


def numpy_search(sizes: Sizes, batch: jaxnn.Batch, tile: int, seed: int = 0) -> Search:
    """One candidate after the other, float64."""
    del tile
    x, y = np.asarray(batch.x, float), np.asarray(batch.y)

    def search(count: int) -> Any:
        draw, best = np.random.default_rng(seed).standard_normal, (math.inf, None)
        for _ in range(count):
            params = [(SCALE * draw(pair), SCALE * draw((1, pair[1]))) for pair in pairwise(sizes)]
            loss = numpy_loss(params, x, y)
            best = (loss, params) if loss < best[0] else best
        return best

    return search


def jax_loss(params: Any, batch: jaxnn.Batch) -> jax.Array:
    """Cross-entropy of one weight set."""
    logs = jax.nn.log_softmax(forward(params, batch.x, jax.nn.relu))
    return -jnp.mean(jnp.take_along_axis(logs, batch.y[:, None], axis=1))


def vmap_search(sizes: Sizes, batch: jaxnn.Batch, tile: int, seed: int = 0) -> Search:
    """`jax.vmap` of drawing and loss, one compiled step a tile."""
    sample_fn = jaxnn.mlp(sizes).sampler(scale=SCALE)

    def step(best: Any, number: int) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), tile)
        params = jax.vmap(sample_fn)(keys)
        losses = jax.vmap(partial(jax_loss, batch=batch))(params)
        winner = jnp.argmin(losses)
        found = jax.tree.map(lambda leaf: leaf[winner], (losses, params))
        return jax.tree.map(partial(jnp.where, found[0] < best[0]), found, best)

    return repeated(jax.jit(step), (jnp.float32(jnp.inf), sample_fn(jax.random.key(0))), tile)


def evosax_search(sizes: Sizes, batch: jaxnn.Batch, tile: int, seed: int = 0) -> Search:
    """`RandomSearch` of evosax with that loss, one compiled step a population."""
    evosax: Any = import_module("evosax.algorithms")
    key, sample_fn = jax.random.key(seed), jaxnn.mlp(sizes).sampler(scale=SCALE)
    strategy = evosax.RandomSearch(tile, sample_fn(key), sampling_fn=sample_fn)
    settings = strategy.default_params

    def step(state: Any, number: int) -> Any:
        ask_key, tell_key = jax.random.split(jax.random.fold_in(key, number))
        params, state = strategy.ask(ask_key, state, settings)
        losses = jax.vmap(partial(jax_loss, batch=batch))(params)
        return strategy.tell(tell_key, params, losses, state, settings)[0]

    run = repeated(jax.jit(step), strategy.init(key, sample_fn(key), settings), tile)
    return lambda count: run(count).best_fitness


def torch_network(params: Any) -> Any:
    """A `Sequential` of `Linear` and `ReLU` with these weights."""
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
    """Cross-entropies of many weight sets; rows in the last axis, also of `x`, are fastest."""
    torch: Any = import_module("torch")
    *hidden, last = params
    x, y = x.expand(len(last[0]), *x.shape), y.expand(len(last[0]), -1)
    for weights, biases in hidden:
        x = torch.baddbmm(biases.mT, weights.mT, x).relu_()
    logits = torch.baddbmm(last[1].mT, last[0].mT, x)
    return torch.nn.functional.cross_entropy(logits, y, reduction="none").mean(1)


def torch_search(
    sizes: Sizes, batch: jaxnn.Batch, tile: int, seed: int = 0, *, threads: int | None
) -> Search:
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

    def search(count: int) -> Any:
        torch.manual_seed(seed)
        return run(count)

    run = repeated(step, (math.inf, None), tile)
    return search


def jaxnn_search(sizes: Sizes, batch: jaxnn.Batch, tile: int = 1, seed: int = 0) -> Search:
    """`jaxnn.random_search` as users call it: it chooses its tile and keeps all statistics."""
    del tile
    model = jaxnn.mlp(sizes)
    given = jax.random.key(seed), model.loss, model.sampler(scale=SCALE), batch
    return lambda count: finished(jaxnn.random_search(*given, num_candidates=count)).loss


JAX_TILES, TORCH_TILES = (32, 128, 512, 2048), tuple(2**n for n in range(4, 12))
PEERS: dict[str, tuple[Callable[..., Search], Sequence[int]]] = {
    "NumPy loop": (numpy_search, [1]),
    "jax.vmap": (vmap_search, JAX_TILES),
    "evosax RandomSearch": (evosax_search, JAX_TILES),
    "torch baddbmm": (partial(torch_search, threads=os.cpu_count()), TORCH_TILES),
    "torch, 1 thread": (partial(torch_search, threads=1), TORCH_TILES),
    "jaxnn": (jaxnn_search, [2**11]),
}
"""Ways to search and the tiles to try: powers of two, as all counts, so that no tile is padded."""
