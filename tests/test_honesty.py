"""The loss that a trainer returns is the loss of the params that it returns."""

from typing import Any

import jax
import numpy as np
import pytest

import jaxnn

HIDDEN = ("relu", "tanh", "sigmoid", "identity")
OUTPUT_LOSSES = [
    ("softmax", "categorical_crossentropy"),
    ("sigmoid", "binary_crossentropy"),
    ("identity", "mean_squared_error"),
    ("softmax", "mean_squared_error"),
]


def problem(rng):
    """A network and rows for it, with classes or soft labels, bits or numbers as targets."""
    output, loss = OUTPUT_LOSSES[rng.integers(4)]
    rows, classes = int(rng.integers(1, 60)), int(rng.integers(2, 6))
    sizes = (int(rng.integers(1, 5)), *map(int, rng.integers(1, 24, rng.integers(0, 3))), classes)
    model = jaxnn.mlp(sizes, hidden=HIDDEN[rng.integers(4)], output=output, loss=loss)
    y = {
        "categorical_crossentropy": (
            rng.integers(0, classes, rows),
            rng.dirichlet(np.ones(classes), rows).astype(np.float32),
        )[rng.integers(2)],
        "binary_crossentropy": rng.integers(0, 2, (rows, classes)),
        "mean_squared_error": rng.normal(size=(rows, classes)).astype(np.float32),
    }[loss]
    return model, jaxnn.Batch(rng.normal(size=(rows, sizes[0])).astype(np.float32), y)


def runs(rng, key, model, batch):
    """A result of every trainer under settings drawn at random, with the params of each loss."""
    sample_fn, count = model.sampler(scale=float(rng.uniform(0.1, 2))), int(rng.integers(1, 3_000))
    found: Any = jaxnn.random_search(
        key, model.loss, sample_fn, batch, num_candidates=count, top_k=min(count, 5)
    )
    yield found
    for candidate, loss in zip(*found.top, strict=True):
        params = jaxnn.candidate_params(key, sample_fn, int(candidate))
        yield found._replace(loss=loss, params=params)
    options: dict[str, Any] = {"num_chains": int(rng.integers(1, 5))}
    options |= {"temperature": 0.05} if rng.random() < 0.5 else {"num_proposals": 2}
    start, steps = model.init(key, scale=0.5), int(rng.integers(0, 200))
    yield jaxnn.perturbation_search(
        key, model.loss, start, batch, num_steps=steps, scale=0.2, **options
    )
    optimizer = (jaxnn.optimizers.adam, jaxnn.optimizers.sgd)[rng.integers(2)](0.01)
    options = {"batch_size": int(rng.integers(1, 40))} if rng.random() < 0.5 else {}
    options |= {"validation_batch": batch, "patience": 3} if rng.random() < 0.5 else {}
    yield jaxnn.gradient_descent(
        key, model.value_and_grad, start, batch, optimizer=optimizer, num_epochs=20, **options
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(100))
def test_the_loss_returned_is_that_of_the_params_returned(seed):
    rng = np.random.default_rng(seed)
    model, batch = problem(rng)
    for result in runs(rng, jax.random.key(seed), model, batch):
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), result.params)
            expected = float(model.loss_reference(wide, batch))
        assert float(result.loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)
