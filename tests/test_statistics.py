"""What a search learns of its losses is what NumPy learns of all of them, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from search_setups import BUDGET, KEY, NETWORKS, OPTIONS, OWN, loss_fn, sample_fn, search

import jaxnn
from jaxnn.search import evaluate
from jaxnn.search.statistics import Tile, as_config, statistics_of


def network(model):
    """A loss that rounds, so that its bits depend on the width of a tile."""
    batch = jaxnn.datasets.vertical(jax.random.key(2))
    return KEY, model.loss, model.sampler(scale=4.0), batch


STOPPING = jaxnn.Collect(-1.0, 30, stop=True)
EXHAUSTIVE = pytest.mark.exhaustive
CASES = {  # The first ones share a program.
    "ties and not finite": (OWN, {}, ()),
    "across 32 bits": (OWN, {"start": 2**32 - 900, "collect": jaxnn.Collect(-2.0, 30)}, ()),
    "across 53 bits, target": (OWN, {"start": 2**53 - 900, "target_loss": -4.0}, ()),
    "full collection": (OWN, {"collect": STOPPING, "target_loss": -1e9}, ()),
    "the last 20": (OWN, {"num_candidates": 20, "start": 2**63 - 20}, ()),
    "chosen bins": (OWN, {"bins": [-2.0, -0.5, 0.0, 1.5], "thresholds": [-1e30, 1e30]}, ()),
    "network": (network(NETWORKS[0]), {"collect": jaxnn.Collect(1.5, 30)}, ()),
    "rows of a network": (
        network(jaxnn.mlp((2, 64, 3))),
        {"num_candidates": 700, "collect": jaxnn.Collect(60.0, 30)},
        EXHAUSTIVE,
    ),
}


@pytest.mark.parametrize(
    ("given", "options"),
    [pytest.param(*given, marks=marks, id=name) for name, (*given, marks) in CASES.items()],
)
def test_a_search_is_a_reduction_of_its_losses(given, options):
    options = {**OPTIONS, **options}
    found = jaxnn.random_search(*given, **options)
    start, count = options.get("start", 0), options["num_candidates"]
    budget = None if loss_fn in given else BUDGET  # This loss is the same in tiles of any width.
    losses = evaluate(*given, start=start, count=count, memory_budget=budget)
    part = evaluate(*given, start=start + 17, count=count - 19, memory_budget=budget)
    np.testing.assert_array_equal(part, losses[17:-2])
    losses = losses[: end_of(losses, **options)]
    assert found.num_evaluations == len(losses)
    assert (found.status == "reached") == (len(losses) < count)
    assert found.num_nonfinite == np.sum(~np.isfinite(losses))
    losses = np.where(np.isfinite(losses), losses, np.inf)
    check_candidates(found, losses, start, options)
    check_spread(found, losses[np.isfinite(losses)], options)


def end_of(losses, target_loss=-np.inf, collect=None, **_):
    """One past the candidate that ends the search."""
    threshold, limit = (target_loss, 1)
    if collect and collect.stop:
        threshold, limit = collect.threshold, collect.limit
    hits = np.flatnonzero(np.isfinite(losses) & (losses <= threshold))
    return hits[limit - 1] + 1 if len(hits) >= limit else len(losses)


def check_candidates(found, losses, start, options):
    """The best, ties to the lowest index; the trail; the first at or below a threshold."""
    indices = start + np.arange(len(losses))
    order = np.argsort(losses, kind="stable")
    order = order[np.isfinite(losses[order])][: options["top_k"]]
    np.testing.assert_array_equal(found.top.candidate, indices[order])
    np.testing.assert_array_equal(found.top.loss, losses[order])
    assert (found.candidate, found.loss) == (indices[order[0]], losses[order[0]])
    assert type(found.candidate) is int
    before = np.minimum.accumulate(np.append(np.inf, losses))[:-1]
    trail = np.flatnonzero(losses < before)
    np.testing.assert_array_equal(found.history.candidate, indices[trail])
    np.testing.assert_array_equal(found.history.loss, losses[trail])
    np.testing.assert_array_equal(found.history.evaluations, trail + 1)
    hits = np.zeros(0, int)
    if collect := options["collect"]:
        hits = np.flatnonzero(losses <= np.float32(collect.threshold))[: collect.limit]
        assert hits.size
    np.testing.assert_array_equal(found.collected.candidate, indices[hits])
    np.testing.assert_array_equal(found.collected.loss, losses[hits])


def check_spread(found, losses, options):
    below = [np.sum(losses <= np.float32(threshold)) for threshold in options["thresholds"]]
    assert found.counts.num_below.tolist() == below
    edges, counts, _ = found.histogram
    places = np.searchsorted(edges, losses, side="right") - 1
    assert np.all((losses >= edges[places]) & (losses < edges[places + 1]))
    np.testing.assert_array_equal(counts, np.bincount(places, minlength=len(edges) - 1))
    assert counts.sum() == len(losses)
    if "bins" in options:
        assert edges.tolist() == [-np.inf, *options["bins"], np.inf]
        assert all(counts)
    else:
        low, high = edges[:-1], edges[1:]
        wide = (high - low) / np.maximum(np.abs(high), np.abs(low))
        assert np.all(wide[np.abs(low) > 1e-30] <= 1 / 512)


def nothing(params, batch):
    return batch / 0.0


@pytest.mark.parametrize("count", [1, 16_389])
def test_losses_that_are_not_finite_are_counted_also_in_the_padded_tile(count):
    seen, given = [], (KEY, nothing, sample_fn, jnp.float32(0))
    found = jaxnn.random_search(*given, num_candidates=count, callback=seen.append)
    assert (found.num_nonfinite, found.num_evaluations) == (count, count)
    assert (found.status, found.params, found.candidate) == ("nonfinite", None, None)
    assert (found.loss, len(found.history.loss), len(found.top.loss)) == (np.inf, 0, 0)
    assert found.histogram.counts.sum() == 0
    assert (seen[-1].loss, seen[-1].best_params()) == (np.inf, None)


@pytest.mark.parametrize(
    "dtype", [jnp.float16, pytest.param(jnp.bfloat16, marks=pytest.mark.exhaustive)]
)
def test_losses_of_half_precision_count_no_padding_and_minus_0_ties(dtype):
    def half(params, batch):
        return (params[0] * batch).astype(dtype)

    given = KEY, half, sample_fn, jnp.float32(0)
    found = jaxnn.random_search(*given, num_candidates=10, thresholds=[0.0], top_k=3)
    assert found.counts.num_below.tolist() == [10]
    assert found.top.candidate.tolist() == [0, 1, 2]
    assert found.history.candidate.tolist() == [0]
    if dtype == jnp.float16:
        with pytest.raises(ValueError, match="thresholds must be finite"):
            jaxnn.random_search(*given, num_candidates=10, thresholds=[1e5])
        with pytest.raises(ValueError, match=r"collect.threshold must be finite"):
            jaxnn.random_search(*given, num_candidates=10, collect=jaxnn.Collect(1e5))


def test_of_more_improvements_than_there_is_room_for_the_last_one_is_known():
    falling = -jnp.arange(600, dtype=jnp.float32)
    config = as_config(np.dtype(np.float32), 1, [], None, None, None)
    start, update, _ = statistics_of(config)["improvements"]
    places = jnp.arange(600, dtype=jnp.uint32)
    tile = Tile(jnp.zeros_like(places), places, jnp.ones(600, bool), falling)
    table = jax.jit(update)(start, tile)
    assert table.low.tolist() == [*range(255), 599]
    assert table.loss.tolist() == falling[table.low].tolist()


NAN, MANY = float("nan"), np.arange(5_000)
BAD_VALUES = {
    "top_k": [0, 2**24 + 1],
    "thresholds": [[1.0, 0.5], MANY],
    "bins": [[], [0.0, NAN]],
    "collect": [jaxnn.Collect(NAN), jaxnn.Collect(0.0, 0)],
    "devices": [[]],
    "target_loss": [NAN],
    "memory_budget": [0],
}
BAD_TYPES = {"collect": [(0.1, 5)], "thresholds": [["a"]], "callback": [3]}


@pytest.mark.parametrize(("error", "bad"), [(ValueError, BAD_VALUES), (TypeError, BAD_TYPES)])
def test_bad_questions_are_refused_by_name(error, bad):
    for name, value in [(name, value) for name, values in bad.items() for value in values]:
        with pytest.raises(error, match=f"^{name}"):
            search(**{name: value})
