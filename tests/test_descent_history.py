"""A descent cut into chunks and runs: limits, faults and checkpoints change nothing of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import same

import jaxnn
from jaxnn.descent import history

KEY = jax.random.key(8)
MODEL = jaxnn.mlp((2, 4, 3))
BATCH = jaxnn.datasets.spiral(jax.random.key(1), samples=11)
VALIDATION = jaxnn.datasets.spiral(jax.random.key(2), samples=7)
START = MODEL.init(jax.random.key(3))
OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {"optimizer": jaxnn.optimizers.adam(jaxnn.schedules.cosine_decay(0.1, 0.01, 60))},
    "batches": {
        "optimizer": jaxnn.optimizers.sgd(0.1, momentum=0.9),
        "batch_size": 8,
        "drop_remainder": False,
        "validation_batch": VALIDATION,
    },
}


def descend(num_epochs=60, **options) -> Any:
    options = OPTIONS["whole"] | options
    return jaxnn.gradient_descent(
        KEY, MODEL.value_and_grad, START, BATCH, num_epochs=num_epochs, **options
    )


@functools.cache
def whole(name) -> Any:
    return descend(**OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_descent_is_the_whole(name, tmp_path):
    path, options = tmp_path / "descent.npz", OPTIONS[name]
    for count in (0, 13, 60, 60):
        found = descend(count, checkpoint=path, **options)
    assert same(found, whole(name))
    assert found.status == "completed"


def test_the_callback_is_told_of_the_work_the_loss_and_the_best_params():
    seen: list[Any] = []
    found = descend(1, callback=seen.append)
    assert seen[0][:2] == (found.num_evaluations - 1, float(found.history.loss[-1]))
    assert same(seen[0].best_params(), START)
    assert descend(max_seconds=1e-9).status == "stopped"


def test_the_best_params_so_far_are_those_that_a_descent_would_return():
    """At the end: the best on the validation batch, with the axes of the result."""

    def swinging(params, batch):
        return jnp.sum((params - batch) ** 2), 2 * (params - batch)

    seen: list[Any] = []
    found = jaxnn.gradient_descent(
        KEY, swinging, jnp.zeros((3, 1)), jnp.float32(3), num_epochs=20, learning_rate=0.1,
        num_networks=3, validation_batch=jnp.float32(1), callback=jaxnn.Every(10, seen.append),
    )  # fmt: skip
    assert [progress.num_evaluations for progress in seen] == [90, 180]
    assert same(seen[-1].best_params(), found.params)
    assert np.all(found.params < 1.5)  # and not where the descent went, to 3


def test_there_are_no_best_params_without_a_finite_loss():
    nowhere = jax.value_and_grad(lambda params, batch: jnp.log(params) * batch)
    seen: list[Any] = []
    options: dict[str, Any] = {"num_epochs": 2, "learning_rate": 0.1, "callback": seen.append}
    jaxnn.gradient_descent(KEY, nowhere, jnp.float32(-1), jnp.float32(1), **options)
    assert (seen[0].loss, seen[0].best_params()) == (np.inf, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": jaxnn.optimizers.adam(0.2)}, "optimizer computes something else"),
        ({"batch_size": 5}, "batch_size was None, is 5"),
        ({"tolerance": 1e-3}, "tolerance was 0.0, is 0.001"),
        ({"validation_batch": VALIDATION}, "validation_batch is another than when"),
        ({"num_epochs": 2}, "num_epochs must be at least 3"),
    ],
)
def test_another_setting_is_refused_by_name(change, message, tmp_path):
    path = tmp_path / "descent.npz"
    descend(3, checkpoint=path)
    with pytest.raises(ValueError, match=message):
        descend(**{"num_epochs": 3, "checkpoint": path, **change})


def test_keys_that_are_no_file_names_are_saved_as_well(tmp_path):
    def function(params, batch):
        return jax.value_and_grad(lambda p: jnp.sum((p["a/b c"] - batch) ** 2))(params)

    options = {"learning_rate": 0.1, "checkpoint": tmp_path / "descent.npz"}
    start, batch = {"a/b c": jnp.zeros(2)}, jnp.ones(2)
    for count in (3, 8):
        found = jaxnn.gradient_descent(KEY, function, start, batch, num_epochs=count, **options)
    np.testing.assert_allclose(found.params["a/b c"], 1 - 0.8**8, rtol=1e-6)


def test_chunks_of_any_size_give_the_same_bits(monkeypatch):
    expected = whole("batches")
    monkeypatch.setattr(history, "RECORDS_PER_CHUNK", 7)
    assert same(descend(**OPTIONS["batches"]), expected)
