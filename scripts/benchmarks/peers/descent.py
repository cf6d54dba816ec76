"""Other ways to descend by plain SGD: a step is a gradient of all rows, or of a batch of them."""

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from shared.runs import finished
from shared.timing import Search

import jaxnn
from peers.search import jax_loss, start_of, torch_network

RATE = 0.1
Size = int | None
"""The rows of a step; None for all."""
RULES = {
    "SGD": jaxnn.optimizers.sgd(RATE),
    "momentum": jaxnn.optimizers.sgd(RATE, momentum=0.9),
    "Adam": jaxnn.optimizers.adam(0.01),
}


def epochs_of(steps: int, batch: jaxnn.Batch, batch_size: Size) -> int:
    """Return the epochs that a number of steps takes."""
    return max(steps // (1 if batch_size is None else len(batch.x) // batch_size), 1)


def torch_descent(
    compiles: bool, model: jaxnn.Model, batch: jaxnn.Batch, batch_size: Size = None, seed: int = 0
) -> Search:
    """Descend by torch's `optim.SGD` on `Linear` and `ReLU`, one thread."""
    torch: Any = import_module("torch")
    network, measure = torch_network(start_of(model, seed)), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    start = copy.deepcopy(network.state_dict())
    run = torch.compile(network) if compiles else network
    x = torch.tensor(np.array(batch.x))
    y = torch.tensor(np.array(batch.y), dtype=torch.int64)

    def take_step(rows: Any) -> Any:
        optimizer.zero_grad()
        loss = measure(run(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        return loss

    def search(steps: int) -> Any:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        network.load_state_dict(start)
        loss = torch.tensor(0.0)
        for _ in range(epochs_of(steps, batch, batch_size)):
            if batch_size is None:
                loss = take_step(slice(None))
                continue
            order = torch.randperm(len(x))
            for begin in range(0, len(x) - batch_size + 1, batch_size):
                loss = take_step(order[begin : begin + batch_size])
        return float(loss)

    return search


def optax_descent(
    model: jaxnn.Model, batch: jaxnn.Batch, batch_size: Size = None, seed: int = 0
) -> Search:
    """Descend by `optax.sgd` and `jax.value_and_grad` of matrix products, in a compiled loop."""
    optimizer = import_module("optax").sgd(RATE)
    start, loss_and_gradient = start_of(model, seed), jax.value_and_grad(jax_loss)
    x, y = jnp.asarray(batch.x), jnp.asarray(batch.y)

    def take_step(carry: Any, rows: jaxnn.Batch) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, gradient = loss_and_gradient(params, rows)
        updates, state = optimizer.update(gradient, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), loss

    def run_epoch(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        if batch_size is None:
            return take_step(carry, jaxnn.Batch(x, y))
        steps = len(x) // batch_size
        order = jax.random.permutation(key, len(x))[: steps * batch_size]
        order = order.reshape(steps, batch_size)
        carry, losses = jax.lax.scan(
            lambda c, i: take_step(c, jaxnn.Batch(x[i], y[i])), carry, order
        )
        return carry, losses[-1]

    @partial(jax.jit, static_argnums=0)
    def run(epochs: int) -> jax.Array:
        keys = jax.random.split(jax.random.key(seed), epochs)
        return jax.lax.scan(run_epoch, (start, optimizer.init(start)), keys)[1][-1]

    return lambda steps: float(run(epochs_of(steps, batch, batch_size)))


def sklearn_descent(
    model: jaxnn.Model, batch: jaxnn.Batch, batch_size: Size = None, seed: int = 0
) -> Search:
    """Descend by scikit-learn's `MLPClassifier`, solver "sgd", no momentum, no stop rule.

    It steps on the remainder of an epoch as well, which is not counted.
    """
    network: Any = import_module("sklearn.neural_network").MLPClassifier
    x, y = np.asarray(batch.x), np.asarray(batch.y)

    def search(steps: int) -> Any:
        epochs = epochs_of(steps, batch, batch_size)
        fitted = network(
            model.settings.sizes[1:-1], solver="sgd", momentum=0, learning_rate_init=RATE,
            batch_size=batch_size or len(x), max_iter=epochs, tol=0, n_iter_no_change=epochs + 1,
            alpha=0, random_state=seed,
        )  # fmt: skip
        return fitted.fit(x, y).loss_

    return search


def jaxnn_descent(
    by_hand: bool,
    networks: int | None,
    model: jaxnn.Model,
    batch: jaxnn.Batch,
    batch_size: Size = None,
    seed: int = 0,
    rule: str = "SGD",
) -> Search:
    """Descend by `jaxnn.gradient_descent` as users call it, with either gradient."""
    function = model.value_and_grad if by_hand else jax.value_and_grad(model.loss_reference)
    start = start_of(model, seed)
    if networks is not None:
        start = jax.vmap(model.init)(jax.random.split(jax.random.key(seed + 1), networks))
    given = jax.random.key(seed), function, start, batch

    def search(steps: int) -> Any:
        trained = jaxnn.gradient_descent(
            *given,
            num_epochs=epochs_of(steps // (networks or 1), batch, batch_size),
            optimizer=RULES[rule],
            batch_size=batch_size,
            num_networks=networks,
        )
        return np.min(finished(trained).loss)

    return search


NETWORKS = 1_000
PLAIN, ONE = "jaxnn, jax.value_and_grad", "jaxnn, by hand"
DESCENTS: dict[str, tuple[Callable[..., Search], float]] = {
    "torch eager": (partial(torch_descent, False), 0.1),
    "torch compiled": (partial(torch_descent, True), 0.1),
    "scikit-learn": (sklearn_descent, 0.1),
    "optax, jax.value_and_grad": (optax_descent, 1),
    PLAIN: (partial(jaxnn_descent, False, None), 1),
    ONE: (partial(jaxnn_descent, True, None), 1),
    f"{PLAIN}, {NETWORKS:,} networks": (partial(jaxnn_descent, False, NETWORKS), 20),
    f"{ONE}, {NETWORKS:,} networks": (partial(jaxnn_descent, True, NETWORKS), 50),
    f"{ONE}, momentum": (partial(jaxnn_descent, True, None, rule="momentum"), 1),
    f"{ONE}, Adam": (partial(jaxnn_descent, True, None, rule="Adam"), 1),
}
"""`prepare(model, batch, batch_size=None, seed=0)`, and how many times a tenth of `--steps` it
takes; slow ones take fewer."""
