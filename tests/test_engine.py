"""Candidates by index: their params, their losses, and a user's own statistics of them."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from search_setups import BATCH, BUDGET, COUNT, KEY, OWN, TILE, loss_fn, sample_fn, search
from tolerances import same

import jaxnn
from jaxnn.run import loop
from jaxnn.search import Statistic, engine, evaluate, reduce

# --- losses by index


@pytest.mark.parametrize("border", [3, 2**32, 2**53 + 2**32, 2**63 - 3])
def test_losses_are_those_of_the_candidates_one_by_one(border):
    near = range(border - 3, border + 3)
    params = [jaxnn.candidate_params(KEY, sample_fn, i) for i in near]
    losses = evaluate(*OWN, start=border - 3, count=6)
    assert losses.dtype == np.float32
    np.testing.assert_array_equal(losses, [jax.jit(loss_fn)(each, BATCH) for each in params])
    assert len(np.unique(params, axis=0)) == 6


def test_thousands_of_losses_are_those_of_the_candidates():
    params = jaxnn.candidate_params(KEY, sample_fn, np.arange(COUNT))
    losses = evaluate(*OWN, count=COUNT)
    np.testing.assert_array_equal(losses, jax.jit(jax.vmap(loss_fn, (0, None)))(params, BATCH))
    np.testing.assert_array_equal(evaluate(*OWN, count=COUNT, memory_budget=BUDGET), losses)
    assert np.any(np.isnan(losses))
    assert np.any(np.isneginf(losses))
    assert len(np.unique(losses)) < COUNT / 2  # There are ties.


def test_ranges_that_are_none_are_refused():
    for message, error, options in [
        ("count must be an integer of at least 1; got 0", ValueError, {"count": 0}),
        ("count must be .*; got 1073741825", ValueError, {"count": 2**30 + 1}),
        (
            r"start and count must .* at most 2\*\*63; got",
            ValueError,
            {"count": 5, "start": 2**63 - 4},
        ),
        ("start must be an integer of at least 0; got -1", ValueError, {"count": 1, "start": -1}),
        ("start must be an .*; got True", TypeError, {"count": 1, "start": True}),
    ]:
        with pytest.raises(error, match=f"^{message}"):
            evaluate(*OWN, **options)


# --- params by index


def test_candidates_are_independent_normals():
    """20,000 candidates of 2 normals; each bound is four standard errors."""
    drawn = np.asarray(jaxnn.candidate_params(KEY, sample_fn, np.arange(20_000)))
    assert np.max(np.abs(drawn.mean(axis=0))) < 4 / np.sqrt(20_000)
    assert np.max(np.abs(drawn.var(axis=0) - 1)) < 4 * np.sqrt(2 / 20_000)
    pairs = np.corrcoef(np.column_stack([drawn[:-1], drawn[1:]]).T) - np.eye(4)
    assert np.max(np.abs(pairs)) < 4 / np.sqrt(20_000)


def test_many_candidates_at_once_are_those_drawn_alone():
    def sampler(key):
        return {"a": sample_fn(key), "b": [jax.random.uniform(key)]}

    indices = [0, 7, 2**32 - 1, 2**32, 2**63 - 1]
    many = jaxnn.candidate_params(KEY, sampler, np.array(indices))
    for number, index in enumerate(indices):
        one = jaxnn.candidate_params(KEY, sampler, index)
        assert same(jax.tree.map(operator.itemgetter(number), many), one)
    assert same(jaxnn.candidate_params(KEY, sampler, np.array(indices, np.uint64)), many)
    assert same(jaxnn.candidate_params(KEY, sampler, 7.0), jaxnn.candidate_params(KEY, sampler, 7))
    few = jaxnn.candidate_params(KEY, sample_fn, [0, 7])
    assert same(jaxnn.candidate_params(KEY, sample_fn, jnp.array([0, 7])), few)
    assert jaxnn.candidate_params(KEY, sample_fn, []).shape == (0, 2)


@pytest.mark.parametrize(
    ("error", "candidates"),
    [
        (ValueError, [-1, 2**63, np.array([0, -1]), np.array([2**63], np.uint64)]),
        (TypeError, [1.5, True, np.array([0.0]), np.zeros((2, 2), int)]),
    ],
)
def test_what_is_no_candidate_is_refused(error, candidates):
    for candidate in candidates:
        with pytest.raises(error, match=r"^candidate must be"):
            jaxnn.candidate_params(KEY, sample_fn, candidate)


def test_a_traced_candidate_is_refused():
    with pytest.raises(TypeError, match="candidate must be concrete"):
        jax.jit(lambda index: jaxnn.candidate_params(KEY, sample_fn, index))(3)


# --- samplers


def test_a_sampler_that_draws_the_same_from_every_key_is_refused():
    with pytest.raises(ValueError, match="sample_fn must draw from its key; got the same params"):
        jaxnn.random_search(
            KEY, loss_fn, lambda key: jnp.ones(2), BATCH, num_candidates=9, start=2**63 - 9
        )


def test_a_sampler_of_few_values_is_none_that_ignores_its_key():
    def bit(key):
        return jnp.where(jax.random.bernoulli(key), 1.0, 0.0)

    def lowest(state, tile):
        return jnp.minimum(state, jnp.min(jnp.where(tile.inside, tile.value, 2)))

    given = lambda params, batch: params, bit, None, {"lowest": Statistic(2.0, lowest, min)}
    for key in jax.random.split(KEY, 8):
        assert reduce(key, *given, num_candidates=50)["lowest"] == 0


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


def values(params, batch):
    return {"loss": loss_fn(params, batch), "norm": jnp.sum(params**2)}


def add_up(state, tile):
    """Count and sum of the finite losses of a tile, and the largest norm of all params."""
    loss, norm = tile.value["loss"], jnp.where(tile.inside, tile.value["norm"], -jnp.inf)
    inside = tile.inside & jnp.isfinite(loss)
    count = state[0] + jnp.sum(inside, dtype=jnp.uint32)
    total = state[1] + jnp.sum(jnp.where(inside, loss, 0.0))
    return count, total, jnp.maximum(state[2], jnp.max(norm))


def merge_sums(first, second):
    count, total = np.int64(first[0]) + second[0], np.float64(first[1]) + np.float64(second[1])
    return count, total, np.maximum(first[2], second[2])


SUMS = Statistic((np.uint32(0), np.float32(0), np.float32(-np.inf)), add_up, merge_sums)


@pytest.mark.parametrize("tiles", [1, 64])
def test_own_statistics_are_those_of_numpy(monkeypatch, tiles):
    monkeypatch.setattr(engine, "TILES_PER_CHUNK", tiles)
    start, count = 2**32 - 900, 10 * TILE + 7
    given = KEY, values, sample_fn, BATCH, {"sums": SUMS}
    options: Any = {"num_candidates": count, "start": start, "memory_budget": BUDGET}
    states = reduce(*given, **options)
    losses = evaluate(*OWN, start=start, count=count).astype(np.float64)
    losses = losses[np.isfinite(losses)]
    number, total, norm = states["sums"]
    assert number == len(losses) < count
    np.testing.assert_allclose(total / number, np.mean(losses), rtol=1e-5)
    drawn = jaxnn.candidate_params(KEY, sample_fn, start + np.arange(count))
    np.testing.assert_allclose(norm, np.max(np.sum(np.square(drawn), axis=1)), rtol=1e-6)
    assert same(reduce(*given, **options), states)


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        ((0, 1, 2), r"statistics\['own'\] must be a Statistic; got a tuple"),
        (Statistic(0, 3, max), r"statistics\['own'\].update must be callable"),  # pyright: ignore
        (Statistic(0, max, 3), r"statistics\['own'\].merge must be callable"),  # pyright: ignore
        (
            Statistic(0, lambda state, tile: state.astype(float), max),
            r"statistics\['own'\].update must return a state like start; got float32 .*int32",
        ),
    ],
)
def test_what_is_no_statistic_is_refused(statistic, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        reduce(*OWN, {"own": statistic}, num_candidates=10)
    with pytest.raises(TypeError, match="statistics must map names to Statistics; got"):
        reduce(*OWN, statistic, num_candidates=10)  # pyright: ignore


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

    def starved(problem, rejection, updates, states, begin, size, **settings):
        if begin[1] >= 8 * TILE:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return shard(problem, rejection, updates, states, begin, size, **settings)

    monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", 1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_reduce_shard", starved)
        with pytest.raises(MemoryError, match="memory_budget"):
            search(checkpoint=path)
    assert same(search(checkpoint=path), search())
