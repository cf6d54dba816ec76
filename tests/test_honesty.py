"""The loss that a trainer returns is the loss of the params that it returns."""

from typing import Any

import jax
import numpy as np
import pytest
import scipy.special
from test_mlp import numpy_loss, numpy_outputs

import jaxnn

OUTPUT_LOSSES = [
    ("softmax", "categorical_crossentropy"),
    ("sigmoid", "binary_crossentropy"),
    ("identity", "mean_squared_error"),
    ("tanh", "mean_squared_error"),
    ("softmax", "mean_squared_error"),
]


def problem(rng):
    """A network, rows for it, and their targets as numbers, one for each output."""
    output, loss = OUTPUT_LOSSES[rng.integers(len(OUTPUT_LOSSES))]
    hidden = ("relu", "tanh", "sigmoid", "identity")[rng.integers(4)]
    widths = [int(width) for width in rng.integers(1, 24, rng.integers(0, 3))]
    rows, classes = int(rng.integers(1, 60)), int(rng.integers(2, 6))
    sizes = (int(rng.integers(1, 5)), *widths, classes)
    model = jaxnn.mlp(sizes, hidden=hidden, output=output, loss=loss)
    x = rng.normal(size=(rows, sizes[0])).astype(np.float32)
    if loss == "categorical_crossentropy":
        y = rng.integers(0, classes, rows)
        if rng.random() < 0.3:
            y = rng.dirichlet(np.ones(classes), rows).astype(np.float32)
    elif loss == "binary_crossentropy":
        y = rng.integers(0, 2, (rows, classes))
    else:
        y = rng.normal(size=(rows, classes)).astype(np.float32)
    return model, jaxnn.Batch(x, y)


def loss_of(model, params, batch):
    """The loss in NumPy and float64, from the logits where probabilities would round to 0 or 1."""
    _, hidden, output, loss, _ = model.settings
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    if loss == "mean_squared_error":
        return numpy_loss(numpy_outputs(wide, np.float64(batch.x), hidden, output), batch.y, loss)
    logits, y = numpy_outputs(wide, np.float64(batch.x), hidden, "identity"), batch.y
    if loss == "binary_crossentropy":
        return np.mean(np.logaddexp(0, logits) - y * logits)
    weights = np.eye(model.settings.sizes[-1])[y] if y.ndim == 1 else np.asarray(y, np.float64)
    log_p = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
    return -np.mean(np.sum(weights * log_p, axis=1))


def runs(rng, key, model, batch):
    """A result of every trainer under settings drawn at random, with the params of each loss."""
    scale = float(rng.uniform(0.1, 2))
    sample_fn = model.sampler(scale=scale)
    options: dict[str, Any] = {"top_k": 5, "thresholds": (0.5, 1.0)}
    found = jaxnn.random_search(
        key, model.loss, sample_fn, batch, num_candidates=int(rng.integers(1, 3_000)), **options
    )
    yield found.loss, found.params
    for index, loss in zip(*found.top, strict=True):
        yield loss, jaxnn.candidate_params(key, sample_fn, int(index))
    options = {"num_chains": int(rng.integers(1, 5)), "num_proposals": int(rng.integers(1, 3))}
    if rng.random() < 0.5:
        options |= {"temperature": 0.05, "adapt_scale": True}
    if rng.random() < 0.5:
        options |= {"patience": 20, "restart_fn": sample_fn, "accept_ties": True}
    start = model.init(key, scale=scale)
    climbed = jaxnn.perturbation_search(
        key, model.loss, start, batch, num_steps=int(rng.integers(0, 200)), scale=0.2, **options
    )
    yield climbed.loss, climbed.params
    for chain, loss in enumerate(climbed.chain_loss):
        yield loss, jax.tree.map(lambda leaf, chain=chain: leaf[chain], climbed.chain_params)
    rates = (0.01, jaxnn.schedules.cosine_decay(0.1, 0.01, 20))
    optimizer = (jaxnn.optimizers.adam, jaxnn.optimizers.sgd)[rng.integers(2)](
        rates[rng.integers(2)]
    )
    options = {"batch_size": int(rng.integers(1, 40))} if rng.random() < 0.5 else {}
    if rng.random() < 0.5:
        options |= {"validation_batch": batch, "patience": 3}
    trained: Any = jaxnn.gradient_descent(
        key, model.value_and_grad, start, batch, optimizer=optimizer, num_epochs=20, **options
    )
    yield trained.loss, trained.params


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(200))
def test_the_loss_returned_is_that_of_the_params_returned(seed):
    rng = np.random.default_rng(seed)
    model, batch = problem(rng)
    pairs = list(runs(rng, jax.random.key(seed), model, batch))
    assert len(pairs) >= 4
    for loss, params in pairs:
        assert float(loss) == pytest.approx(loss_of(model, params, batch), rel=1e-5, abs=1e-6)
