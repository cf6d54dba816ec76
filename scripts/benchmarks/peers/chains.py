"""Other ways to run the chain of perturbation search: a step proposes, and accepts or not.

`seed` says where a chain starts and what it draws.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from shared.runs import finished
from shared.timing import Search

import jaxnn
from peers.search import evosax_run, jax_loss, jaxnn_search, numpy_loss, start_of, torch_network

STEP, CHAINS = 0.05, 1_024


def numpy_chain(model: jaxnn.Model, batch: jaxnn.Batch, seed: int = 0) -> Search:
    """Climb by the book's loop, in float64: nudge, score, keep or revert."""
    x, y = np.asarray(batch.x, float), np.asarray(batch.y)
    start = [(np.asarray(w, float), np.asarray(b, float)) for w, b in start_of(model, seed)]

    def search(steps: int) -> Any:
        draw = np.random.default_rng(seed).standard_normal
        best, lowest = start, numpy_loss(start, x, y)
        for _ in range(steps):
            params = [tuple(leaf + STEP * draw(leaf.shape) for leaf in layer) for layer in best]
            loss = numpy_loss(params, x, y)
            if loss < lowest:
                best, lowest = params, loss
        return lowest

    return search


def scanned_chain(model: jaxnn.Model, batch: jaxnn.Batch, seed: int = 0) -> Search:
    """Climb one step after the other in a compiled `lax.scan`, as anyone would write it."""
    start = start_of(model, seed)

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
        keys = jax.random.split(jax.random.key(seed), steps)
        return jax.lax.scan(step, (start, jax_loss(start, batch)), keys)[0][1]

    return lambda steps: jax.block_until_ready(run(steps))


def evosax_chain(model: jaxnn.Model, batch: jaxnn.Batch, seed: int = 0) -> Search:
    """Climb by evosax's `HillClimbing`, two proposals a generation (its least), in a scan."""
    evosax: Any = import_module("evosax.algorithms")
    start = start_of(model, seed)
    strategy = evosax.HillClimbing(2, start, std_schedule=lambda _: STEP)
    run = evosax_run(strategy, jax.vmap(partial(jax_loss, batch=batch)), start, seed)
    return lambda steps: run(steps // 2)


def nevergrad_chain(model: jaxnn.Model, batch: jaxnn.Batch, seed: int = 0) -> Search:
    """Climb by nevergrad's `OnePlusOne`, which adapts its step, from zeros; the loss is NumPy's."""
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
        optimizer.parametrization.random_state = np.random.RandomState(seed)
        return loss(optimizer.minimize(loss).value)

    return search


def pyperch_chain(model: jaxnn.Model, batch: jaxnn.Batch, seed: int = 0) -> Search:
    """Climb by pyperch's `RHC` on a torch network, one thread; it keeps ties as well."""
    torch, optim = import_module("torch"), import_module("pyperch.optim")
    network, x = torch_network(start_of(model, seed)), torch.tensor(np.array(batch.x))
    y = torch.tensor(np.array(batch.y), dtype=torch.int64)
    measure, start = torch.nn.CrossEntropyLoss(), copy.deepcopy(network.state_dict())

    def search(steps: int) -> Any:
        torch.set_num_threads(1)
        network.load_state_dict(start)
        optimizer = optim.RHC(network.parameters(), step_size=STEP, random_state=seed)
        with torch.no_grad():
            for _ in range(steps + 1):  # the first call scores the start
                optimizer.step(lambda: measure(network(x), y))
        return optimizer.best_loss

    return search


def mlrose_chain(model: jaxnn.Model, batch: jaxnn.Batch, seed: int = 0) -> Search:
    """Climb by mlrose-ky's `random_hill_climb`: one weight a step, and only inputs have biases."""
    mlrose: Any = import_module("mlrose_ky")
    fitness_of: Any = import_module("mlrose_ky.neural.fitness.network_weights").NetworkWeights
    features, *others = model.settings.sizes
    sizes = [features + 1, *others]  # its bias is an input of ones
    x, y = np.asarray(batch.x, float), np.eye(sizes[-1])[batch.y]
    fitness = fitness_of(x, y, sizes, mlrose.neural.activation.relu)
    size = sum(i * o for i, o in pairwise(sizes))
    start = 0.01 * np.random.default_rng(seed).standard_normal(size)

    def search(steps: int) -> Any:
        problem = mlrose.ContinuousOpt(size, fitness, maximize=False, step=STEP)
        return mlrose.random_hill_climb(
            problem, max_attempts=steps + 1, max_iters=steps, init_state=start, random_state=seed
        )[1]

    return search


def jaxnn_chains(
    num_chains: int | None, model: jaxnn.Model, batch: jaxnn.Batch, seed: int = 0
) -> Search:
    """Climb by `jaxnn.perturbation_search` as users call it."""
    given = jax.random.key(seed), model.loss, start_of(model, seed), batch
    options = {"scale": STEP, "num_chains": num_chains}

    def search(steps: int) -> Any:
        num_steps = max(steps // (num_chains or 1), 1)
        return finished(jaxnn.perturbation_search(*given, num_steps=num_steps, **options)).loss

    return search


CLIMBERS: dict[str, tuple[Callable[..., Search], float]] = {
    "NumPy loop": (numpy_chain, 0.1),
    "mlrose-ky": (mlrose_chain, 0.001),
    "pyperch RHC": (pyperch_chain, 0.01),
    "nevergrad OnePlusOne": (nevergrad_chain, 0.01),
    "lax.scan, one at a time": (scanned_chain, 1),
    "evosax HillClimbing": (evosax_chain, 1),
    "jaxnn, one chain": (partial(jaxnn_chains, None), 1),
    f"jaxnn, {CHAINS:,} chains": (partial(jaxnn_chains, CHAINS), 400),
    "jaxnn, random search": (jaxnn_search, 200),
}
"""`prepare(model, batch, seed=0)` and how many times `--steps` it takes; slow ones take fewer."""
