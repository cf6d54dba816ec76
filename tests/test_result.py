"""Intervals for counts under thresholds, and the expected best of several draws."""

import numpy as np
import pytest
from scipy import stats
from search_setups import COUNT, OPTIONS, sample_fn, search

import jaxnn
from jaxnn.search import Histogram
from jaxnn.search.engine import RunState
from jaxnn.search.result import _threshold_counts
from jaxnn.search.statistics import StatisticsConfig


def interval(num_below, num_evaluations, is_stop=False):
    """Low and high ends; where it is a stop, the threshold's own rule ended the search."""
    config = StatisticsConfig("float32", 1, [0.5], None, None)
    state = RunState({}, num_evaluations, stop_threshold=0.5 if is_stop else 0.25)
    counts = _threshold_counts(np.array([num_below]), num_evaluations, state, config)
    return counts.low[0], counts.high[0]


def test_counts_have_the_intervals_of_clopper_and_pearson():
    counts = search().counts
    assert counts.threshold.tolist() == OPTIONS["thresholds"]
    np.testing.assert_allclose(counts.share, counts.num_below / COUNT)
    for number, low, high in zip(counts.num_below, counts.low, counts.high, strict=True):
        expected = stats.binomtest(int(number), COUNT).proportion_ci(0.95, "exact")
        np.testing.assert_allclose([low, high], expected, rtol=1e-9)
    assert interval(0, COUNT) == (0, pytest.approx(3.689 / COUNT, rel=1e-2))  # -ln 0.025
    assert interval(7, 7)[1] == interval(1, 1, is_stop=True)[1] == 1


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("hits", [1, 5, 30])
def test_intervals_of_a_search_that_its_hits_ended_cover_95_percent(probability, hits):
    draws = hits + np.arange(40 * hits / probability).astype(int)
    chance = stats.nbinom.pmf(draws - hits, hits, probability)
    low, high = np.array([interval(hits, int(n), is_stop=True) for n in draws]).T
    assert np.sum(chance * (low > probability)) <= 0.025
    assert np.sum(chance * (high < probability)) <= 0.025
    assert np.sum(chance) > 1 - 1e-6
    # The ends for a fixed number of draws are wider, so they are not what is used here.
    assert np.all(high[1:] < [interval(hits, int(n))[1] for n in draws[1:]])


@pytest.mark.parametrize(
    "options",
    [
        {"target_loss": -2.0, "thresholds": [-2.0, -1.0]},
        {"collect": jaxnn.Collect(-2.0, 20, stop=True), "thresholds": [-2.0, -1.0]},
    ],
)
def test_a_search_that_ended_early_has_the_interval_of_its_own_rule(options, tmp_path):
    found = search(**options, checkpoint=tmp_path / "search.npz")
    hits, others = found.counts.num_below.tolist()
    n, (low, high) = found.num_evaluations, (found.counts.low, found.counts.high)
    assert (found.status, hits) == ("reached", 20 if "collect" in options else 1)
    np.testing.assert_allclose(
        low, stats.beta.ppf(0.025, [hits, others], [n + 1 - hits, n + 1 - others])
    )
    np.testing.assert_allclose(
        high, stats.beta.ppf(0.975, [hits, others + 1], [n - hits, n - others])
    )
    again = search(**options, checkpoint=tmp_path / "search.npz")
    merged = jaxnn.merge_searches(tmp_path / "search.npz", sample_fn)
    assert again.counts.high.tolist() == merged.counts.high.tolist() == high.tolist()
    # A search that goes on past the hit is one of a fixed number of candidates.
    options = {**options, "target_loss": None}
    if "collect" in options:
        options["collect"] = options["collect"]._replace(stop=False)
    longer = search(**options, checkpoint=tmp_path / "search.npz")
    assert (longer.status, longer.num_evaluations) == ("completed", COUNT)
    number = int(longer.counts.num_below[0])
    assert longer.counts.high[0] == pytest.approx(interval(number, COUNT)[1])


def test_a_result_prints_a_summary():
    lines = str(search()).splitlines()
    assert lines[0] == "random search"
    assert any("candidates" in line for line in lines)


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
