"""What a search learns of its losses is what NumPy learns of all of them, bit for bit."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from search_setups import BATCH, KEY, loss_fn, sample_fn, search

import jaxnn
from jaxnn.search import evaluate

SPIRAL = jaxnn.datasets.spiral(jax.random.key(2), samples=15)


def network(sizes):
    model = jaxnn.mlp(sizes)
    return KEY, model.loss, model.sampler(scale=4.0), SPIRAL


def zeros(params, batch):
    return params[0] * batch


OWN = (KEY, loss_fn, sample_fn, BATCH)
CASES = {
    "ties and not finite": (OWN, {"thresholds": [-4.5, -1.0, 0.25], "top_k": 40}),
    "across 32 bits": (OWN, {"start": 2**32 - 900, "collect": jaxnn.Collect(-1.0, 30)}),
    "across 53 bits": (OWN, {"start": 2**53 - 900, "collect": jaxnn.Collect(-1.0, 10_000)}),
    "chosen bins": (OWN, {"bins": [-2.0, -0.5, 0.0, 1.5], "thresholds": [-1e30, 1e30]}),
    "top of all": (OWN, {"num_candidates": 20, "top_k": 30, "start": 2**63 - 20}),
    "target": (OWN, {"target_loss": -2.0, "thresholds": [-2.0]}),
    "full collection": (OWN, {"collect": jaxnn.Collect(-1.0, 30, stop=True)}),
    "target never met": (OWN, {"target_loss": -1e9}),
    "all tie, -0.0": ((KEY, zeros, sample_fn, jnp.float32(0)), {"start": 7, "top_k": 3}),
    "network": (network((2, 3, 3)), {"thresholds": [1.0, 2.0], "collect": jaxnn.Collect(1.5, 20)}),
    "rows of a network": (
        network((2, 64, 3)),
        {"num_candidates": 700, "collect": jaxnn.Collect(60.0, 20)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_search_is_a_reduction_of_its_losses(case):
    given, options = CASES[case]
    options = {"num_candidates": 3_000, **options}
    found = jaxnn.random_search(*given, **options)
    start, count = options.get("start", 0), options["num_candidates"]
    losses = evaluate(*given, start=start, count=count)
    if "target" in case or "full" in case:
        losses = losses[: end_of(losses, **options)]
    assert found.num_evaluations == len(losses)
    assert found.num_nonfinite == np.sum(~np.isfinite(losses))
    losses = np.where(np.isfinite(losses), losses, np.inf)
    check_candidates(found, losses, start, options)
    check_spread(found, losses[np.isfinite(losses)], options)


def end_of(losses, target_loss=-np.inf, collect=None, **_):
    """One past the candidate that ends the search."""
    threshold, limit = (collect.threshold, collect.limit) if collect else (target_loss, 1)
    hits = np.flatnonzero(np.isfinite(losses) & (losses <= threshold))
    return hits[limit - 1] + 1 if len(hits) >= limit else len(losses)


def check_candidates(found, losses, start, options):
    """The best, ties to the lowest index; the trail; the first at or below a threshold."""
    indices = start + np.arange(len(losses))
    order = np.argsort(losses, kind="stable")
    order = order[np.isfinite(losses[order])][: options.get("top_k", 1)]
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
    if collect := options.get("collect"):
        hits = np.flatnonzero(losses <= np.float32(collect.threshold))[: collect.limit]
        assert hits.size
    np.testing.assert_array_equal(found.collected.candidate, indices[hits])
    np.testing.assert_array_equal(found.collected.loss, losses[hits])


def check_spread(found, losses, options):
    thresholds = options.get("thresholds", [])
    below = [np.sum(losses <= np.float32(threshold)) for threshold in thresholds]
    assert found.counts.num_below.tolist() == below
    edges, counts = found.histogram
    assert counts.tolist() == [np.sum((losses >= a) & (losses < b)) for a, b in pairwise(edges)]
    assert counts.sum() == len(losses)
    if "bins" in options:
        assert edges.tolist() == [-np.inf, *options["bins"], np.inf]
        assert all(counts)
    else:
        low, high = edges[:-1], edges[1:]
        wide = (high - low) / np.maximum(np.abs(high), np.abs(low))
        assert np.all(wide[np.abs(low) > 1e-30] <= 1 / 512)


@pytest.mark.parametrize("count", [1, 100, 16_384, 16_389])
def test_losses_that_are_not_finite_are_counted_also_in_the_padded_tile(count):
    def nothing(params, batch):
        return batch / 0.0

    found = jaxnn.random_search(KEY, nothing, sample_fn, jnp.float32(0), num_candidates=count)
    assert (found.num_nonfinite, found.num_evaluations) == (count, count)
    assert (found.status, found.params, found.candidate) == ("nonfinite", None, None)
    assert (found.loss, len(found.history.loss), len(found.top.loss)) == (np.inf, 0, 0)
    assert found.histogram.counts.sum() == 0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_losses_of_half_precision_count_no_padding(dtype):
    def half(params, batch):
        return (params[0] * batch).astype(dtype)

    given = KEY, half, sample_fn, jnp.float32(0)
    found = jaxnn.random_search(*given, num_candidates=10, thresholds=[0.0])
    assert (found.candidate, found.counts.num_below.tolist()) == (0, [10])
    if dtype == jnp.float16:
        with pytest.raises(ValueError, match="thresholds must be finite"):
            jaxnn.random_search(*given, num_candidates=10, thresholds=[1e5])
        with pytest.raises(ValueError, match=r"collect.threshold must be finite"):
            jaxnn.random_search(*given, num_candidates=10, collect=jaxnn.Collect(1e5))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 2**24 + 1}, ValueError, "top_k"),
        ({"collect": (0.1, 5)}, TypeError, "collect"),
        ({"thresholds": [1.0, 0.5]}, ValueError, "thresholds"),
        ({"thresholds": ["a"]}, TypeError, "thresholds"),
        ({"thresholds": np.arange(5_000)}, ValueError, "thresholds must be at most 4096"),
        ({"bins": []}, ValueError, "bins"),
        ({"bins": [0.0, np.nan]}, ValueError, "bins"),
        ({"collect": jaxnn.Collect(np.nan)}, ValueError, r"collect\.threshold"),
        ({"collect": jaxnn.Collect(0.0, 0)}, ValueError, r"collect\.limit"),
        ({"devices": []}, ValueError, "devices"),
        ({"target_loss": np.nan}, ValueError, "target_loss"),
        ({"callback": 3}, TypeError, "callback"),
        ({"memory_budget": 0}, ValueError, "memory_budget"),
    ],
)
def test_bad_questions_are_refused_by_name(options, error, match):
    with pytest.raises(error, match=match):
        search(**options)
