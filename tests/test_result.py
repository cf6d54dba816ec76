"""Intervals for counts under thresholds, and the expected best of several draws."""

import numpy as np
import pytest
from scipy import stats
from search_setups import COUNT, OPTIONS, sample_fn, search

import jaxnn
from jaxnn.search import Histogram
from jaxnn.search.result import interval


def test_counts_have_the_intervals_of_clopper_and_pearson():
    counts = search().counts
    assert counts.threshold.tolist() == OPTIONS["thresholds"]
    np.testing.assert_allclose(counts.share, counts.num_below / COUNT)
    for number, low, high in zip(counts.num_below, counts.low, counts.high, strict=True):
        expected = stats.binomtest(int(number), COUNT).proportion_ci(0.95, "exact")
        np.testing.assert_allclose([low, high], expected, rtol=1e-9)
    low, high = interval(np.array([0, 7, 1]), np.array([COUNT, 7, 1]), [False, False, True])
    assert (low[0], high[0]) == (0, pytest.approx(3.689 / COUNT, rel=1e-2))  # -ln 0.025
    assert high[1:].tolist() == [1, 1]


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("hits", [1, 5, 30])
def test_intervals_of_a_search_that_its_hits_ended_cover_95_percent(probability, hits):
    draws = hits + np.arange(40 * hits / probability).astype(int)
    chance = stats.nbinom.pmf(draws - hits, hits, probability)
    low, high = interval(hits, draws, True)
    assert np.sum(chance * (low > probability)) <= 0.025
    assert np.sum(chance * (high < probability)) <= 0.025
    assert np.sum(chance) > 1 - 1e-6
    # The ends for a fixed number of draws are wider, so they are not what is used here.
    assert np.all(high[1:] < interval(hits, draws[1:], False)[1])


@pytest.mark.parametrize(
    "options", [{"target_loss": -1.5}, {"collect": jaxnn.Collect(-1.5, 30, stop=True)}]
)
def test_a_search_that_ended_early_has_the_interval_of_its_own_rule(options, tmp_path):
    shared = {"thresholds": [-1.5, -1.0, 0.25], "checkpoint": tmp_path / "search.npz"}
    found = search(**options, **shared)
    hits, *others = found.counts.num_below.tolist()
    n, (low, high) = found.num_evaluations, found.counts[-2:]
    assert (found.status, hits) == ("reached", 30 if "collect" in options else 1)
    expected = stats.beta.ppf(0.025, found.counts.num_below, n + 1 - found.counts.num_below)
    np.testing.assert_allclose(low, expected)
    expected = stats.beta.ppf(0.975, [hits, *(k + 1 for k in others)], n - found.counts.num_below)
    np.testing.assert_allclose(high, expected)
    again = search(**options, **shared)
    merged = jaxnn.merge_searches(shared["checkpoint"], sample_fn)
    assert again.counts.high.tolist() == merged.counts.high.tolist() == high.tolist()
    # A search that goes on past the hit is one of a fixed number of candidates.
    longer = search(
        collect=options.get("collect", OPTIONS["collect"])._replace(stop=False), **shared
    )
    assert (longer.status, longer.num_evaluations) == ("completed", COUNT)
    expected = stats.binomtest(int(longer.counts.num_below[0]), COUNT).proportion_ci(0.95, "exact")
    assert longer.counts.high[0] == pytest.approx(expected.high)


def test_expected_best_is_the_mean_over_all_samples():
    values, draws = np.array([1.0, 2.0, 2.0, 5.0]), 2
    histogram = Histogram(np.array([0.5, 1.5, 2.5, 4.5, 5.5]), np.array([1, 2, 0, 1]))
    pairs = [min(a, b) for a in values for b in values]
    assert jaxnn.expected_best(histogram, draws) == pytest.approx(np.mean(pairs))
    assert jaxnn.expected_best(histogram, 1) == pytest.approx(values.mean())
    assert jaxnn.expected_best(histogram, [[1], [2]]).shape == (2, 1)


@pytest.mark.parametrize(("draws", "counts"), [(0, [1]), (1, [0])])
def test_expected_best_refuses_no_draws_and_no_losses(draws, counts):
    with pytest.raises(ValueError, match=r"num_draws|histogram"):
        jaxnn.expected_best(Histogram(np.array([0.0, 1.0]), np.array(counts)), draws)
