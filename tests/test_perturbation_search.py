"""Perturbation search against a loop that walks one step at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from tolerances import FORWARD

import jaxnn
from jaxnn.chains import lookahead as climbing
from jaxnn.chains import perturbation_search as module
from jaxnn.run import loop
from jaxnn.run.random import normals

KEY = jax.random.key(77)
SCALE, STEPS = 0.3, 250
START = {
    "w": np.array([[2.5, -1.0], [0.5, 3.0]], np.float32),
    "b": np.array([1.5, -2.0], np.float32),
}
GOAL = {"at": np.array([0.5, -0.25], np.float32), "floor": np.float32(0)}


def bowl(params, batch):
    """A smooth loss, lowest at the goal; below `floor` in the first bias it is nan."""
    error = params["b"] - batch["at"]
    loss = jnp.sum(jnp.square(params["w"])) + jnp.sum(jnp.square(error))
    return jnp.where(params["b"][0] < batch["floor"], jnp.nan, loss)


def stairs(params, batch):
    """A loss that float32 holds exactly, whatever the order of its sums; it has many ties."""
    steps = jax.tree.map(lambda leaf: jnp.square(jnp.round(4 * leaf)), params)
    return jnp.sum(steps["w"]) + jnp.sum(steps["b"]) + 0 * batch["floor"]


def first_bias(params, batch):
    return params["b"][0] - batch["at"][0]


def climb(loss_fn=bowl, *, key=KEY, steps=STEPS, scale=SCALE, batch=GOAL, **options) -> Any:
    return jaxnn.perturbation_search(
        key, loss_fn, START, batch, num_steps=steps, scale=scale, **options
    )


def finite_or_inf(loss):
    return float(loss) if np.isfinite(loss) else np.inf


def by_loop(loss_fn, *, chain=0, steps=STEPS, scale=SCALE, batch=GOAL):
    """Proposed losses, current losses, accepted steps, proposed params and the last params."""
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, START))
    stream = jax.random.fold_in(jax.random.fold_in(KEY, module.TAG), chain)
    loss_fn = jax.jit(loss_fn)
    current = finite_or_inf(loss_fn(unravel(flat), batch))
    rows = []
    for step in range(steps):
        noise = normals(jax.random.fold_in(stream, step), flat.size)
        proposal = flat + np.float32(scale) * noise
        loss = finite_or_inf(loss_fn(unravel(proposal), batch))
        taken = loss < current
        if taken:
            flat, current = proposal, loss
        rows.append((loss, current, taken, unravel(proposal)["b"][0]))
    losses, currents, accepted, biases = (np.array(column) for column in zip(*rows, strict=True))
    return losses, currents, accepted, biases, unravel(flat)


def same(a, b):
    leaves = (jax.tree.leaves(a), jax.tree.leaves(b))
    return all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


def shapes_of(history):
    return [array.shape for array in history if array is not None]


def all_close(a, b, rtol=FORWARD["float32"]):
    return all(
        np.allclose(x, y, rtol, atol=1e-6)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- the chain and its history


@pytest.mark.parametrize(
    "floor", [-1e9, 1.45, 1.7, pytest.param(0.0, marks=pytest.mark.exhaustive)]
)
def test_the_chain_is_the_one_that_a_loop_walks(floor):
    """Floors that put no nan in its way, a few, many, and nan around the start."""
    batch = GOAL | {"floor": np.float32(floor)}
    losses, currents, accepted, biases, last = by_loop(bowl, batch=batch)
    result = climb(batch=batch, metric_fn=first_bias)
    history = result.history
    assert np.array_equal(history.accepted, accepted)
    assert 5 < result.num_accepted == accepted.sum() < 100
    np.testing.assert_allclose(history.proposed_loss, losses, rtol=FORWARD["float32"])
    np.testing.assert_allclose(history.current_loss, currents, rtol=FORWARD["float32"])
    np.testing.assert_allclose(history.proposed_metric, biases - 0.5, atol=1e-6)
    assert all_close(result.params, last)
    assert result.loss == history.current_loss[-1]


def test_a_loss_without_rounding_gives_the_loop_bit_for_bit():
    losses, currents, accepted, _, last = by_loop(stairs)
    history, result = climb(stairs).history, climb(stairs)
    assert np.array_equal(history.proposed_loss, losses)
    assert np.array_equal(history.current_loss, currents)
    assert np.array_equal(history.accepted, accepted)
    assert all_close(result.params, last)
    before = np.concatenate([[float(stairs(START, GOAL))], currents[:-1]])
    ties = losses == before
    assert ties.any(), "the loss must have ties for them to be refused"
    assert not history.accepted[ties].any()


def test_every_field_of_the_history_is_what_its_line_says():
    result = climb(metric_fn=first_bias)
    evaluations, proposed, current, best, accepted, count, scale, _, metric, _ = result.history
    start = float(jax.jit(bowl)(START, GOAL))
    before = np.concatenate([[start], current[:-1]]).astype(np.float32)
    assert np.array_equal(evaluations, np.arange(2, STEPS + 2))
    assert result.num_evaluations == evaluations[-1] == STEPS + 1
    assert np.array_equal(accepted, proposed < before)
    assert np.array_equal(current, np.where(accepted, proposed, before))
    assert np.array_equal(best, np.minimum.accumulate(np.minimum(current, np.float32(start))))
    assert np.isposinf(proposed).any(), "losses of nan stand as inf"
    assert np.array_equal(count, np.cumsum(accepted))
    assert np.all(scale == np.float32(SCALE))
    dtypes = [array.dtype for array in result.history if array is not None]
    assert dtypes == [np.int64, *[np.float32] * 3, np.bool_, np.int64, *[np.float32] * 2]
    assert metric.shape == (STEPS,)
    assert climb().history.proposed_metric is None


def test_the_metric_of_every_proposal_is_kept_and_changes_nothing():
    with_metric, without = climb(metric_fn=first_bias), climb()
    assert np.array_equal(with_metric.history.accepted, without.history.accepted)
    assert same(with_metric.params, without.params)
    assert len(np.unique(with_metric.history.proposed_metric)) > 0.9 * STEPS


def test_steps_are_normal_with_the_scale_as_standard_deviation():
    """5,000 steps that are never taken; bounds of four standard errors."""
    nowhere = GOAL | {"floor": np.float32(1e9)}
    result = climb(steps=5_000, batch=nowhere, metric_fn=first_bias)
    assert result.num_accepted == 0
    noise = (result.history.proposed_metric - (1.5 - 0.5)) / SCALE
    assert abs(noise.mean()) < 4 / np.sqrt(5_000)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / 5_000)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 4 / np.sqrt(5_000)


def test_more_steps_continue_the_same_chain():
    short, long = climb(steps=100), climb(steps=STEPS)
    for name in ("proposed_loss", "current_loss", "accepted"):
        assert np.array_equal(getattr(short.history, name), getattr(long.history, name)[:100])


@pytest.mark.parametrize(
    ("seconds", "growth", "records", "number"),
    [(0.0, 8, 2**18, STEPS), (1e9, 2.3, 2**18, 8), (1e9, 1e9, 2**18, 2), (1e9, 8, 7, 37)],
)
def test_the_result_does_not_depend_on_how_the_work_is_cut(
    monkeypatch, seconds, growth, records, number
):
    expected, compiled, sizes = climb(metric_fn=first_bias), climbing.climb, []

    def count_sizes(*arguments, **options):
        sizes.append(int(arguments[-1]))
        return compiled(*arguments, **options)

    monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", seconds)
    monkeypatch.setattr(loop, "LARGEST_GROWTH", growth)
    monkeypatch.setattr(climbing, "RECORDS_PER_CHUNK", records)
    vars(count_sizes)["eval_shape"] = compiled.eval_shape
    monkeypatch.setattr(climbing, "climb", count_sizes)
    assert same(climb(metric_fn=first_bias), expected)
    assert sum(sizes) == STEPS
    assert len([size for size in sizes if size]) == number


# --- several chains


def test_each_chain_is_the_same_however_many_there_are():
    """Bit for bit, since this loss has no rounding that could depend on the width."""
    many, alone = climb(stairs, num_chains=5), climb(stairs, num_chains=1)
    assert same(alone.chain_params, jax.tree.map(lambda leaf: leaf[:1], many.chain_params))
    assert np.array_equal(alone.chain_loss, many.chain_loss[:1])
    assert np.array_equal(alone.history.accepted, many.history.accepted[:1])
    assert np.array_equal(alone.history.proposed_loss, many.history.proposed_loss[:1])


@pytest.mark.parametrize("chain", [1, 4])
def test_every_chain_is_a_loop_with_a_key_of_its_own(chain):
    losses, _, accepted, _, last = by_loop(stairs, chain=chain)
    many = climb(stairs, num_chains=5)
    assert np.array_equal(many.history.accepted[chain], accepted)
    assert np.array_equal(many.history.proposed_loss[chain], losses)
    assert all_close(jax.tree.map(lambda leaf: leaf[chain], many.chain_params), last)


def test_the_best_chain_is_returned_and_every_chain_kept():
    result = climb(num_chains=5, metric_fn=first_bias)
    best = int(np.argmin(result.chain_loss))
    assert best > 0, "another chain than the first must win for this to show anything"
    assert result.loss == result.chain_loss[best]
    assert same(result.params, jax.tree.map(lambda leaf: leaf[best], result.chain_params))
    assert result.chain_loss.shape == (5,)
    assert len(set(result.chain_loss.tolist())) == 5
    assert jax.tree.map(np.shape, result.chain_params) == {"w": (5, 2, 2), "b": (5, 2)}
    assert result.num_evaluations == 5 * (STEPS + 1)
    assert result.num_accepted == result.history.accepted.sum()
    assert shapes_of(result.history) == [(STEPS,), *[(5, STEPS)] * 7]
    assert np.array_equal(result.history.current_loss[:, -1], result.chain_loss)


def test_one_chain_has_a_leading_axis_only_if_asked_for():
    plain, one = climb(metric_fn=first_bias), climb(metric_fn=first_bias, num_chains=1)
    assert one.history.proposed_loss.shape == (1, STEPS)
    assert plain.history.proposed_loss.shape == (STEPS,)
    assert same(plain.params, one.params)
    assert plain.chain_loss.shape == one.chain_loss.shape == (1,)
    assert plain.chain_params["b"].shape == (1, 2)
    assert np.array_equal(plain.history.proposed_metric, one.history.proposed_metric[0])


def test_no_steps_of_several_chains_return_the_start_with_empty_histories():
    result = climb(num_chains=3, steps=0, metric_fn=first_bias)
    assert same(result.params, START)
    assert (result.num_evaluations, result.num_accepted, result.status) == (3, 0, "completed")
    assert shapes_of(result.history) == [(0,), *[(3, 0)] * 7]


def test_chains_that_meet_nothing_finite_lose_to_one_that_does():
    """The start is nan; with these few steps only some chains find a way out."""
    batch = GOAL | {"floor": np.float32(1.5 + 2 * SCALE)}
    result = climb(num_chains=5, steps=30, batch=batch)
    assert np.isposinf(result.chain_loss).any()
    assert np.isfinite(result.chain_loss).any()
    assert np.isfinite(result.loss)
    assert result.status == "completed"


# --- precision and scale


def test_float64_params_climb_in_float64():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), (START, GOAL))
        result = jaxnn.perturbation_search(KEY, bowl, *wide, num_steps=50, scale=SCALE)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {np.dtype(np.float64)}
    assert result.history.proposed_loss.dtype == np.float64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_chains": 0}, ValueError, "num_chains must be an integer of at least 1; got 0"),
        ({"num_chains": -2}, ValueError, "num_chains must be an integer of at least 1; got -2"),
        ({"num_chains": 2.5}, TypeError, "num_chains must be an integer"),
        ({"num_chains": 2**31}, ValueError, "num_chains must be at most 2147483647"),
        ({"steps": 2**32}, ValueError, "num_steps must be at most 4294967295"),
        ({"metric_fn": 3}, TypeError, "metric_fn must be callable; got a int"),
        ({"metric_fn": lambda p, b: p["b"]}, TypeError, "metric_fn must return a float scalar"),
        ({"metric_fn": lambda p, b: 1 / 0}, ZeroDivisionError, "tracing metric_fn"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error) as raised:
        climb(**options)
    assert message in "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])


# --- the chapter's network and the figures it is known by

MODEL = jaxnn.mlp((2, 3, 3))


def climb_network(seed, batch) -> Any:
    init_key, search_key = jax.random.split(jax.random.key(seed))
    params = MODEL.init(init_key)
    return jaxnn.perturbation_search(
        search_key, MODEL.loss, params, batch, num_steps=10_000, scale=0.05
    )


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
    result = climb_network(seed, batch)
    assert result.loss == pytest.approx(float(MODEL.loss(result.params, batch)), rel=2e-6)
    share = float(MODEL.accuracy(result.params, batch))
    return loss[0] <= result.loss <= loss[1] and accuracy[0] - 5e-4 <= share <= accuracy[1] + 5e-4


@pytest.mark.parametrize("name", KNOWN)
def test_the_chapters_runs_end_where_they_are_known_to(name):
    assert is_as_known(name, 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KNOWN)
def test_nearly_all_of_60_runs_end_where_they_are_known_to(name):
    """Of new runs 2 x 2 in 31 are expected outside ranges of 30, so 9 in 60 are allowed."""
    outside = [seed for seed in range(60) if not is_as_known(name, seed)]
    assert len(outside) <= 9


@pytest.mark.exhaustive
def test_twenty_chains_of_the_network_are_their_loops():
    """20 chains of 500 steps, 10,000 losses, one at a time, up to near-ties of 2e-6."""
    reference = jax.jit(MODEL.loss_reference)
    for seed in range(20):
        init_key, search_key = jax.random.split(jax.random.key(40 + seed))
        batch, params = data("vertical", seed), MODEL.init(init_key)
        result: Any = jaxnn.perturbation_search(
            search_key, MODEL.loss, params, batch, num_steps=500, scale=0.05
        )
        stream = jax.random.fold_in(jax.random.fold_in(search_key, module.TAG), 0)
        flat, unravel = ravel_pytree(params)
        current = float(reference(params, batch))
        for step, accepted in enumerate(result.history.accepted):
            noise = normals(jax.random.fold_in(stream, step), flat.size)
            proposal = flat + np.float32(0.05) * noise
            loss = float(reference(unravel(proposal), batch))
            assert loss == pytest.approx(float(result.history.proposed_loss[step]), rel=2e-6)
            assert (loss < current) == accepted or loss == pytest.approx(current, rel=4e-6)
            if accepted:
                flat, current = proposal, loss
        assert all_close(result.params, unravel(flat))
