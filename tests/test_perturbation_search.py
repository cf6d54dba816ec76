"""Perturbation search as a user calls it: its result, its border, and what it is known to find."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain_setups import STAIRS, START, loss_fn, search
from tolerances import same

import jaxnn

STEPS = 250


def shapes_of(history):
    return [array.shape for array in history if array is not None]


def test_the_best_chain_is_returned_and_every_chain_kept():
    found = search(num_chains=3, key=jax.random.key(6))
    losses, proposed = found.state.best_loss, found.history.proposed_loss
    assert not np.array_equal(proposed[0], proposed[1])
    best = int(np.argmin(losses))
    assert best > 0, "another chain than the first must win for this to show anything"
    assert found.loss == losses[best] == float(loss_fn(found.params, STAIRS))
    assert same(found.params, jax.tree.map(lambda leaf: leaf[best], found.state.best_params))
    assert jax.tree.map(np.shape, found.state.best_params) == {"w": (3, 2, 2), "b": (3, 2)}
    assert found.num_evaluations == 3 * (STEPS + 1)
    assert found.num_accepted == found.history.accepted.sum() == found.state.num_accepted.sum()
    assert shapes_of(found.history) == [(STEPS,), *[(3, STEPS)] * 8]
    assert np.array_equal(found.history.current_loss[:, -1], found.state.loss)
    assert str(found).startswith("perturbation search of 3 chains\n")
    assert f"lowest {found.loss:.6g}, median {np.median(losses):.6g}\n" in str(found)


def test_the_best_is_returned_even_if_the_chain_is_elsewhere():
    found = search(temperature=60.0, num_steps=400)
    assert found.loss == found.history.best_loss[-1] < found.history.current_loss[-1]
    assert float(loss_fn(found.params, STAIRS)) == found.loss
    assert (
        float(loss_fn(jax.tree.map(lambda leaf: leaf[0], found.state.params), STAIRS)) > found.loss
    )


def test_one_chain_has_a_leading_axis_only_if_asked_for_and_in_the_state():
    plain, one = search(), search(num_chains=1)
    assert shapes_of(one.history) == [(STEPS,), *[(1, STEPS)] * 8]
    assert shapes_of(plain.history) == [(STEPS,)] * 9
    assert same(plain.state, one.state)
    assert plain.state.best_loss.shape == (1,)
    assert plain.state.best_params["b"].shape == (1, 2)
    assert np.array_equal(plain.history.proposed_metric, one.history.proposed_metric[0])


def test_no_steps_of_several_chains_return_the_start_with_empty_histories():
    found = search(num_chains=3, num_steps=0)
    assert same(found.params, START)
    assert (found.num_evaluations, found.num_accepted, found.status) == (3, 0, "completed")
    assert shapes_of(found.history) == [(0,), *[(3, 0)] * 8]


def test_chains_that_meet_nothing_finite_lose_to_one_that_does():
    """The start is nan; with these few steps only some chains find a way out."""
    walled = STAIRS._replace(nan_below=np.float32(2.1))
    found = search(batch=walled, num_chains=3, num_steps=30)
    assert np.isposinf(found.state.best_loss).any()
    assert np.isfinite(found.loss)
    assert found.status == "completed"


def test_float64_params_are_searched_in_float64():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), START)
        batch = jax.tree.map(np.float64, STAIRS)
        found = search(params=wide, batch=batch, num_steps=50)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype(np.float64)}
    assert found.history.proposed_loss.dtype == np.float64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_chains": 0}, ValueError, "num_chains must be an integer of at least 1; got 0"),
        ({"num_chains": 2.5}, TypeError, "num_chains must be an integer"),
        ({"num_chains": 2**31}, ValueError, "num_chains must be at most 2147483647"),
        ({"num_steps": 2**32}, ValueError, "num_steps must be at most 4294967295"),
        ({"num_proposals": 0}, ValueError, "num_proposals must be an integer of at least 1"),
        ({"metric_fn": 3}, TypeError, "metric_fn must be callable; got a int"),
        ({"metric_fn": lambda p, b: p["b"]}, TypeError, "metric_fn must return a float scalar"),
        ({"metric_fn": lambda p, b: 1 / 0}, ZeroDivisionError, "tracing metric_fn"),
        ({"scale": 0.0}, ValueError, "scale must be a finite number above 0"),
        ({"scale": lambda step: jnp.ones(2)}, TypeError, "scale must return a float scalar"),
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number above 0"),
        ({"temperature": np.nan}, ValueError, "temperature must be"),
        ({"temperature": False}, TypeError, "temperature must be"),
        ({"patience": 0}, ValueError, "patience must be an integer of at least 1"),
        ({"max_seconds": -1}, ValueError, "max_seconds must be"),
        ({"callback": 3}, TypeError, "callback must be callable"),
        ({"devices": []}, ValueError, "devices must hold at least one device"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error) as raised:
        search(**options)
    assert message in "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])


def test_a_scale_without_a_value_yet_is_refused():
    with pytest.raises(TypeError, match="scale must be concrete"):
        jax.jit(lambda scale: search(scale=scale).loss)(0.3)


# --- the course's network and the figures it is known by

MODEL = jaxnn.mlp((2, 3, 3))
KNOWN = {
    "vertical": ((0.087, 0.214), (0.907, 0.970)),
    "nnfs_vertical": ((0.170, 0.175), (0.927, 0.933)),
    "bands": ((1.02, 1.09), (0.37, 0.46)),
    "spiral": ((1.017, 1.080), (0.35, 0.46)),
}
"""Measured before, 10,000 steps: ranges of loss and accuracy over 30 to 60 chains."""


def data(name, seed):
    key = jax.random.key(seed)
    return {
        "vertical": lambda: jaxnn.datasets.vertical(key),
        "nnfs_vertical": jaxnn.datasets.nnfs_vertical,
        "bands": lambda: jaxnn.datasets.vertical(key, layout="bands"),
        "spiral": lambda: jaxnn.datasets.spiral(key),
    }[name]()


def is_as_known(name, seed):
    """Whether loss and accuracy of a run on data of its own are in their ranges."""
    batch, (loss, accuracy) = data(name, 500 + seed), KNOWN[name]
    init_key, key = jax.random.split(jax.random.key(seed))
    found: Any = jaxnn.perturbation_search(
        key, MODEL.loss, MODEL.init(init_key), batch, num_steps=10_000, scale=0.05
    )
    assert found.loss == pytest.approx(float(MODEL.loss(found.params, batch)), rel=2e-6)
    share = float(MODEL.accuracy(found.params, batch))
    return loss[0] <= found.loss <= loss[1] and accuracy[0] - 5e-4 <= share <= accuracy[1] + 5e-4


@pytest.mark.parametrize("name", ["vertical", "spiral"])
def test_the_courses_runs_end_where_they_are_known_to(name):
    assert is_as_known(name, 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KNOWN)
def test_nearly_all_of_60_runs_end_where_they_are_known_to(name):
    """Of new runs 2 x 2 in 31 are expected outside ranges of 30, so 9 in 60 are allowed."""
    outside = [seed for seed in range(60) if not is_as_known(name, seed)]
    assert len(outside) <= 9
