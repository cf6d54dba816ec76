"""Candidates by index: their params, their losses, and a user's own statistics of them."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_outcomes
from programs import start_program
from search_setups import BATCH, BUDGET, KEY, TILE, digest, loss_fn, same, sample_fn, search

import jaxnn
from jaxnn.run import loop
from jaxnn.search import Statistic, engine, evaluate, reduce

GIVEN = KEY, loss_fn, sample_fn, BATCH
NETWORK = jaxnn.mlp((2, 16, 3))


def network_losses(count, start=0, **options):
    batch = jaxnn.datasets.vertical(jax.random.key(1), samples=20)
    sampler = NETWORK.sampler(scale=4.0)
    return evaluate(KEY, NETWORK.loss, sampler, batch, start=start, count=count, **options)


# --- losses by index


@pytest.mark.parametrize("border", [3, 2**31, 2**32, 2**53, 2**53 + 2**32, 2**62, 2**63 - 3])
def test_losses_are_those_of_the_candidates_one_by_one(border):
    near = range(border - 3, border + 3)
    params = [jaxnn.candidate_params(KEY, sample_fn, i) for i in near]
    losses = evaluate(*GIVEN, start=border - 3, count=6)
    assert losses.dtype == np.float32
    np.testing.assert_array_equal(losses, [loss_fn(each, BATCH) for each in params])
    assert len(np.unique(params, axis=0)) == 6


def test_a_thousand_losses_are_those_of_the_candidates():
    params = jaxnn.candidate_params(KEY, sample_fn, np.arange(1_000))
    losses = evaluate(*GIVEN, count=1_000)
    np.testing.assert_array_equal(losses, [loss_fn(each, BATCH) for each in params])
    tiles = evaluate(*GIVEN, count=1_000, memory_budget=BUDGET)
    np.testing.assert_array_equal(tiles, losses)
    assert np.any(np.isnan(losses))
    assert np.any(np.isneginf(losses))
    assert len(np.unique(losses)) < 700  # There are ties.


def test_bits_of_a_networks_losses_do_not_depend_on_where_the_range_begins():
    losses = network_losses(5_000, start=2**32 - 2_000)
    for start, count in ((1, 1), (777, 4_096)):
        part = network_losses(count, start=2**32 - 2_000 + start)
        np.testing.assert_array_equal(part, losses[start : start + count])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, ValueError, "count must be"),
        ({"count": 2**30 + 1}, ValueError, "count must be"),
        ({"count": 5, "start": 2**63 - 4}, ValueError, "start .* must be at most 2\\*\\*63; got"),
        ({"count": 1, "start": -1}, ValueError, "start must be an integer of at least 0"),
        ({"count": 1, "start": True}, TypeError, "start must be an integer of at least 0"),
    ],
)
def test_ranges_that_are_none_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        evaluate(*GIVEN, **options)


# --- params by index


def test_candidates_are_independent_normals():
    """20,000 candidates of 2 normals; each bound is four standard errors."""
    drawn = np.asarray(jaxnn.candidate_params(KEY, sample_fn, np.arange(20_000)))
    assert np.max(np.abs(drawn.mean(axis=0))) < 4 / np.sqrt(20_000)
    assert np.max(np.abs(drawn.var(axis=0) - 1)) < 4 * np.sqrt(2 / 20_000)
    pairs = np.corrcoef(np.column_stack([drawn[:-1], drawn[1:]]).T) - np.eye(4)
    assert np.max(np.abs(pairs)) < 4 / np.sqrt(20_000)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_many_candidates_at_once_are_those_drawn_alone(dtype):
    sampler = NETWORK.sampler()
    indices = np.array([0, 7, 2**32 - 1, 2**32, 2**63 - 1], dtype)
    many = jaxnn.candidate_params(KEY, sampler, indices)
    for number, each in enumerate(indices):
        one = jaxnn.candidate_params(KEY, sampler, int(each))
        assert same(jax.tree.map(operator.itemgetter(number), many), one)
    few = jax.tree.map(lambda leaf: leaf[:2], many)
    assert same(jaxnn.candidate_params(KEY, sampler, [0, 7]), few)
    assert same(jaxnn.candidate_params(KEY, sampler, jnp.array([0, 7])), few)
    assert jaxnn.candidate_params(KEY, sample_fn, []).shape == (0, 2)


@pytest.mark.parametrize(
    ("candidate", "error"),
    [
        (-1, ValueError),
        (2**63, ValueError),
        (1.5, TypeError),
        (np.array([0, -1]), ValueError),
        (np.array([2**63], np.uint64), ValueError),
        (np.array([0.0]), TypeError),
        (np.zeros((2, 2), int), TypeError),
    ],
)
def test_what_is_no_candidate_is_refused(candidate, error):
    with pytest.raises(error, match=r"^candidate must be"):
        jaxnn.candidate_params(KEY, sample_fn, candidate)


def test_a_traced_candidate_is_refused():
    with pytest.raises(TypeError, match="candidate must be concrete"):
        jax.jit(lambda index: jaxnn.candidate_params(KEY, sample_fn, index))(3)


# --- samplers


def test_a_sampler_that_draws_the_same_from_every_key_is_refused():
    with pytest.raises(ValueError, match="sample_fn must draw from its key; got the same params"):
        jaxnn.random_search(
            KEY, loss_fn, lambda key: jnp.ones(2), BATCH, num_candidates=100, start=2**63 - 100
        )


def test_a_sampler_of_few_values_is_none_that_ignores_its_key():
    def bit(key):
        return jnp.where(jax.random.bernoulli(key), 1.0, 0.0)

    def itself(params, batch):
        return params

    for seed in range(20):
        key = jax.random.key(seed)
        assert jaxnn.random_search(key, itself, bit, None, num_candidates=50).loss == 0


@pytest.mark.parametrize(
    ("sampler", "error", "message"),
    [
        (lambda key: None, TypeError, "sample_fn must return params, a tree of arrays; got None"),
        (lambda key: [1, 2][3], IndexError, "tracing sample_fn"),
        (lambda key: jnp.ones((2, 5)), Exception, "tracing loss_fn"),
    ],
)
def test_samplers_that_draw_no_params_are_refused(sampler, error, message):
    with pytest.raises(error) as raised:
        jaxnn.random_search(KEY, loss_fn, sampler, BATCH, num_candidates=3)
    assert message in "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])


# --- a user's own statistics


def add_moments(state, tile):
    """Count, sum and sum of squares of the finite losses of a tile."""
    inside = tile.inside & jnp.isfinite(tile.value["loss"])
    loss = jnp.where(inside, tile.value["loss"], 0.0)
    count, total, squares = state
    count = count + jnp.sum(inside, dtype=jnp.uint32)
    return count, total + jnp.sum(loss), squares + jnp.sum(loss**2)


def merge_moments(first, second):
    return tuple(np.float64(a) + np.float64(b) for a, b in zip(first, second, strict=True))


def largest_norm(state, tile):
    return jnp.maximum(state, jnp.max(jnp.where(tile.inside, tile.value["norm"], -jnp.inf)))


def values(params, batch):
    return {"loss": loss_fn(params, batch), "norm": jnp.sum(params**2)}


OWN = {
    "moments": Statistic((np.uint32(0), np.float32(0), np.float32(0)), add_moments, merge_moments),
    "norm": Statistic(-np.inf, largest_norm, np.maximum),
}


@pytest.mark.parametrize("tiles", [1, 64])
def test_own_statistics_are_those_of_numpy(monkeypatch, tiles):
    monkeypatch.setattr(engine, "TILES_PER_CHUNK", tiles)
    given, count = (KEY, values, sample_fn, BATCH, OWN), 10 * TILE + 7
    states = reduce(*given, num_candidates=count, start=2**32 - 900, memory_budget=BUDGET)
    losses = evaluate(*GIVEN, start=2**32 - 900, count=count).astype(np.float64)
    losses = losses[np.isfinite(losses)]
    number, total, squares = states["moments"]
    assert number == len(losses) < count
    np.testing.assert_allclose(total / number, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(squares / number - (total / number) ** 2, losses.var(), rtol=1e-4)
    drawn = jaxnn.candidate_params(KEY, sample_fn, 2**32 - 900 + np.arange(count))
    np.testing.assert_allclose(states["norm"], np.max(np.sum(np.square(drawn), axis=1)), rtol=1e-6)
    again = reduce(*given, num_candidates=count, start=2**32 - 900, memory_budget=BUDGET)
    assert same(states, again)


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        ((0, 1, 2), "statistics must hold Statistics; got a tuple"),
        (Statistic(0, 3, max), r"statistics\['own'\].update must be callable"),  # pyright: ignore
        (Statistic(0, lambda state, tile: state.astype(float), max), "own"),
    ],
)
def test_what_is_no_statistic_is_refused(statistic, message):
    with pytest.raises(TypeError, match=message):
        reduce(*GIVEN, {"own": statistic}, num_candidates=10)


# --- tiles and devices


def test_tile_is_a_power_of_two_within_the_budget():
    given = loss_fn, jnp.zeros(2), jnp.zeros(2)
    for budget, platform, tile in (
        (BUDGET, "cpu", TILE), (BUDGET + 15, "cpu", TILE), (1, "cpu", 1),
        (None, "cpu", 2**14), (None, "gpu", 2**20),
    ):  # fmt: skip
        assert engine.tile_size(*given, budget, platform) == tile


@pytest.mark.parametrize(
    ("sizes", "tile"), [((2, 3, 3), 2**14), ((2, 16, 16, 3), 128), ((64, 32, 10), 64)]
)
def test_a_network_says_what_its_losses_need(sizes, tile):
    model = jaxnn.mlp(sizes)
    shapes = jax.eval_shape(model.sampler(), KEY)
    batch = jaxnn.Batch(jnp.zeros((300, sizes[0])), jnp.zeros(300, int))
    assert engine.tile_size(model.loss, shapes, batch, None, "cpu") == tile


def test_a_tile_that_does_not_fit_names_the_budget_and_keeps_the_checkpoint(monkeypatch, tmp_path):
    path, shard = tmp_path / "search.npz", engine._reduce_shard

    def starved(problem, updates, states, begin, size, **settings):
        if begin[1] >= 8 * TILE:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return shard(problem, updates, states, begin, size, **settings)

    monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", 1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_reduce_shard", starved)
        with pytest.raises(MemoryError, match="memory_budget"):
            search(checkpoint=path)
    assert same(search(checkpoint=path), search())


PROGRAM = """
import jax, numpy as np, search_setups as here, test_engine, test_outcomes
assert len(jax.local_devices()) == 8
one = jax.local_devices()[:1]
assert here.same(here.search(), here.search(devices=one))
assert here.same(test_outcomes.count(), test_outcomes.count(devices=one))
print(here.digest((here.search(), test_engine.network_losses(3_000), test_outcomes.count())))
"""


@pytest.mark.exhaustive
def test_eight_devices_give_the_same_bits_as_one():
    running = start_program("-c", PROGRAM, JAX_NUM_CPU_DEVICES="8")
    out, err = running.communicate(timeout=200)
    assert running.returncode == 0, err
    assert out.split() == [digest((search(), network_losses(3_000), test_outcomes.count()))]
