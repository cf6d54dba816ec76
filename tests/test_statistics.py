"""What a search learns of its losses, against NumPy on all of them; cut, stopped and resumed."""

import functools
import os
import subprocess
import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxnn
from jaxnn.run import checkpoint, loop
from jaxnn.search import engine as folding
from jaxnn.search import engine as searching
from jaxnn.search import engine as tiles
from jaxnn.search.result import Histogram

KEY = jax.random.key(11)
BATCH = jnp.array([0.3, -1.2])
COUNT = 5_000
TILE = 256
BUDGET = 4 * 2 * 2 * TILE
"""The budget at which this loss has tiles of 256."""

OPTIONS = {
    "num_candidates": COUNT,
    "memory_budget": BUDGET,
    "top_k": 40,
    "thresholds": [-4.5, -1.0, 0.25],
    "collect": jaxnn.Collect(-1.0, 30),
}
"""The same shapes wherever a test allows it, so that little is compiled."""


def loss_fn(params, batch):
    """Negative, not finite and tied losses are all among these."""
    loss = jnp.sum(params * batch) + jnp.abs(params[0])
    loss = jnp.where(params[1] > 2.0, jnp.nan, jnp.where(params[1] < -2.2, -jnp.inf, loss))
    return jnp.round(loss * 64) / 64


def scaled_loss(params, batch, a):
    return a * loss_fn(params, batch)


def sample_fn(key):
    return jax.random.normal(key, (2,), jnp.float32)


@pytest.fixture(scope="module")
def losses():
    """The losses of all candidates, each from its own reconstruction."""
    one = [loss_fn(jaxnn.candidate_params(KEY, sample_fn, i), BATCH) for i in range(COUNT)]
    return np.array(one)


def search(**options):
    return jaxnn.random_search(KEY, loss_fn, sample_fn, BATCH, **{**OPTIONS, **options})


def same(one, other):
    """Whether two results agree to the bit, whatever way they were reached."""
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(
        np.array_equal(a, b, equal_nan=True) if not isinstance(a, str) else a == b
        for a, b in zip(leaves, others, strict=True)
    )


def test_top_k_are_the_lowest_losses_with_ties_to_the_lowest_index(losses):
    finite = np.where(np.isfinite(losses), losses, np.inf)
    order = np.argsort(finite, kind="stable")[:40]
    found = search(top_k=40)
    np.testing.assert_array_equal(found.top.index, order)
    np.testing.assert_array_equal(found.top.loss, losses[order])
    assert (found.index, found.loss) == (order[0], losses[order[0]])
    assert len(np.unique(found.top.loss)) < 40  # there are ties to order


def test_top_k_beyond_the_finite_losses_lists_those_there_are(losses):
    first = np.flatnonzero(~np.isfinite(losses))[0]
    found = search(start=int(first) - 3, num_candidates=5)
    here = np.arange(first - 3, first + 2)
    finite = here[np.isfinite(losses[here])]
    assert len(finite) < 5
    assert sorted(found.top.index) == finite.tolist()


def test_not_finite_losses_are_counted_and_appear_nowhere_else(losses):
    found = search(thresholds=[-1e30, 0.0, 1e30])
    assert found.num_nonfinite == np.sum(~np.isfinite(losses)) > 50
    assert found.counts.count.tolist()[::2] == [0, np.sum(np.isfinite(losses))]
    assert found.histogram.counts.sum() == np.sum(np.isfinite(losses))


def test_automatic_bins_hold_what_numpy_counts_between_their_edges(losses):
    edges, counts = search().histogram
    assert np.all(np.diff(edges) > 0)
    expected, _ = np.histogram(losses[np.isfinite(losses)], edges)
    # NumPy's last bin alone is closed above; nothing lies on that edge.
    np.testing.assert_array_equal(counts, expected)
    wide = (edges[1:] - edges[:-1]) / np.maximum(np.abs(edges[1:]), np.abs(edges[:-1]))
    assert np.max(wide[np.abs(edges[:-1]) > 1e-30]) <= 1 / 512


def test_chosen_bins_have_one_below_and_one_above(losses):
    bins = [-2.0, -0.5, 0.0, 1.5]
    edges, counts = search(bins=bins).histogram
    assert edges.tolist() == [-np.inf, *bins, np.inf]
    finite = losses[np.isfinite(losses)]
    expected = [np.sum((finite >= a) & (finite < b)) for a, b in pairwise(edges)]
    assert counts.tolist() == expected
    assert all(expected)


def test_counts_under_thresholds_and_their_intervals(losses):
    counts = search().counts
    assert counts.threshold.tolist() == OPTIONS["thresholds"]
    finite = np.where(np.isfinite(losses), losses, np.inf)
    assert counts.count.tolist() == [np.sum(finite <= t) for t in OPTIONS["thresholds"]]
    np.testing.assert_allclose(counts.share, counts.count / COUNT)
    for row in zip(counts.count, counts.low, counts.high, strict=True):
        interval = stats.binomtest(int(row[0]), COUNT).proportion_ci(0.95, "exact")
        np.testing.assert_allclose(row[1:], interval, rtol=1e-9)


def test_no_hit_gives_an_upper_bound():
    counts = search(thresholds=[-1e6, 0.0, 1.0]).counts
    assert counts.count[0] == counts.low[0] == 0
    assert counts.high[0] == pytest.approx(3.689 / COUNT, rel=1e-2)  # -ln 0.025


def test_collects_the_first_candidates_at_or_below(losses):
    hits = np.flatnonzero(np.isfinite(losses) & (losses <= -1.0))
    for limit in (7, 30, 10_000):
        collected = search(collect=jaxnn.Collect(-1.0, limit)).collected
        np.testing.assert_array_equal(collected.index, hits[:limit])
        np.testing.assert_array_equal(collected.loss, losses[hits[:limit]])


def test_the_trail_is_that_of_a_loop(losses):
    best, trail = np.inf, []
    for index, loss in enumerate(losses):
        if np.isfinite(loss) and loss < best:
            best = loss
            trail.append((index, loss))
    history = search().history
    assert list(zip(history.index, history.loss, strict=True)) == trail
    np.testing.assert_array_equal(history.evaluations, history.index + 1)


class TestStopping:
    def test_a_target_ends_the_search_with_the_candidate_that_reaches_it(self, losses):
        first = int(np.flatnonzero(np.isfinite(losses) & (losses <= -2.0))[0])
        found = search(target_loss=-2.0)
        assert (found.status, found.num_evaluations, found.index) == ("reached", first + 1, first)
        assert same(found._replace(status=""), search(num_candidates=first + 1)._replace(status=""))

    def test_a_full_collection_ends_the_search_if_asked(self, losses):
        hits = np.flatnonzero(np.isfinite(losses) & (losses <= -1.0))
        found = search(collect=jaxnn.Collect(-1.0, 30, stop=True))
        assert (found.status, found.num_evaluations) == ("reached", hits[29] + 1)
        assert found.histogram.counts.sum() + found.num_nonfinite == found.num_evaluations

    def test_an_unreached_target_changes_nothing(self):
        assert same(search(target_loss=-1e9), search())

    def test_a_callback_sees_progress_and_stops_the_search(self, monkeypatch):
        monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", 1e-9)
        seen = []

        def callback(progress):
            seen.append(progress)
            if len(seen) == 3:
                raise StopIteration

        found = search(callback=callback)
        assert (found.status, found.num_evaluations) == ("stopped", 3 * TILE)
        assert [each.num_evaluations for each in seen] == [TILE, 2 * TILE, 3 * TILE]
        assert seen[-1].loss == found.loss

    def test_time_that_is_over_stops_the_search(self, monkeypatch):
        monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", 1e-9)
        found = search(max_seconds=1e-6)
        assert (found.status, found.num_evaluations) == ("stopped", TILE)


class TestCuts:
    @pytest.mark.parametrize("seconds", [1e-9, 1e-3, 10.0])
    def test_chunks_of_any_length_give_the_same_bits(self, seconds, monkeypatch):
        whole = search()
        monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", seconds)
        assert same(search(), whole)

    def test_a_tile_that_does_not_fit_names_the_budget_and_keeps_the_checkpoint(
        self, monkeypatch, tmp_path
    ):
        path = tmp_path / "search.npz"
        fold = folding.reduce_range

        def starved(engine, statistics, begin, end, **settings):
            if begin >= 8 * TILE:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return fold(engine, statistics, begin, end, **settings)

        monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", 1e-9)
        with monkeypatch.context() as patch:
            patch.setattr(searching, "reduce_range", starved)
            with pytest.raises(MemoryError, match="memory_budget"):
                search(checkpoint=path)
        assert same(search(checkpoint=path), search())


class TestResuming:
    def stop_after(self, chunks):
        seen = []

        def callback(progress):
            seen.append(progress)
            if len(seen) == chunks:
                raise StopIteration

        return callback

    def test_a_resumed_search_equals_one_in_a_piece(self, tmp_path, monkeypatch):
        path, whole = tmp_path / "search.npz", search()
        with monkeypatch.context() as patch:
            patch.setattr(loop, "SECONDS_PER_CHUNK", 1e-9)
            part = search(checkpoint=path, callback=self.stop_after(5))
        assert part.num_evaluations == 5 * TILE
        assert same(search(checkpoint=path), whole)
        # All of it is there already: the file alone gives the result.
        assert same(search(checkpoint=path), whole)

    def test_a_longer_search_goes_on_from_a_shorter_one(self, tmp_path):
        path = tmp_path / "search.npz"
        search(num_candidates=1_000, checkpoint=path)
        assert same(search(checkpoint=path), search())

    def test_a_shorter_search_is_refused(self, tmp_path):
        path = tmp_path / "search.npz"
        search(checkpoint=path)
        with pytest.raises(ValueError, match="num_candidates must be at least 5000"):
            search(num_candidates=100, checkpoint=path)

    def test_a_search_stopped_before_its_first_chunk_begins_again(self, tmp_path, monkeypatch):
        path, options = tmp_path / "search.npz", {"collect": jaxnn.Collect(-1.0, 30, stop=True)}

        def interrupt(*arguments, **settings):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(searching, "reduce_range", interrupt)
            with pytest.raises(KeyboardInterrupt):
                search(checkpoint=path, **options)
        assert same(search(checkpoint=path, **options), search(**options))

    def test_networks_and_samplers_of_other_settings_are_refused(self, tmp_path):
        path, batch = tmp_path / "search.npz", jaxnn.Batch(np.ones((4, 2)), np.zeros(4, np.int32))
        relu, tanh = (jaxnn.mlp((2, 3, 2), hidden=name) for name in ("relu", "tanh"))
        options = {"num_candidates": 50, "checkpoint": path}
        jaxnn.random_search(KEY, relu.loss, relu.sampler(), batch, **options)
        with pytest.raises(ValueError, match=r"loss_fn .*relu.*tanh"):
            jaxnn.random_search(KEY, tanh.loss, relu.sampler(), batch, **options)
        other = relu.sampler(distribution="uniform")
        with pytest.raises(ValueError, match=r"sample_fn .*normal.*uniform"):
            jaxnn.random_search(KEY, relu.loss, other, batch, **options)

    def test_numbers_bound_to_a_function_are_part_of_it(self, tmp_path):
        options = {"num_candidates": 50, "checkpoint": tmp_path / "search.npz"}
        once, twice = (functools.partial(scaled_loss, a=a) for a in (1, 2))
        jaxnn.random_search(KEY, once, sample_fn, BATCH, **options)
        with pytest.raises(ValueError, match="a of loss_fn was 1, is 2"):
            jaxnn.random_search(KEY, twice, sample_fn, BATCH, **options)

    def test_a_full_disk_warns_and_loses_nothing(self, tmp_path, monkeypatch):
        def full(*arguments):
            raise OSError(28, "No space left on device", str(tmp_path / "search.npz"))

        monkeypatch.setattr(checkpoint, "save", full)
        with pytest.warns(RuntimeWarning, match="checkpoint not saved: .*search.npz"):
            found = search(checkpoint=tmp_path / "search.npz")
        assert same(found, search())

    def test_a_reached_target_stays_reached(self, tmp_path):
        path = tmp_path / "search.npz"
        found = search(target_loss=-2.0, checkpoint=path)
        assert same(search(target_loss=-2.0, checkpoint=path), found)

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"start": 1}, "start"),
            ({"memory_budget": 2 * BUDGET}, "tile"),
            ({"top_k": 2}, "top_k was 40, is 2"),
            ({"thresholds": [0.5]}, r"thresholds was \[-4.5, -1.0, 0.25\], is \[0.5\]"),
            ({"bins": [0.5]}, r"bins was None, is \[0.5\]"),
            ({"collect": None}, r"collect was \[-1.0, 30\], is None"),
        ],
    )
    def test_another_setting_is_refused_by_name(self, change, field, tmp_path):
        path = tmp_path / "search.npz"
        search(num_candidates=300, checkpoint=path)
        with pytest.raises(ValueError, match=field):
            search(checkpoint=path, **change)

    def test_other_data_keys_and_functions_are_refused_by_name(self, tmp_path):
        path = tmp_path / "search.npz"
        search(num_candidates=300, checkpoint=path)
        options = {**OPTIONS, "checkpoint": path}
        for field, arguments in {
            "batch": (KEY, loss_fn, sample_fn, BATCH + 1),
            "key": (jax.random.key(12), loss_fn, sample_fn, BATCH),
            "loss_fn": (KEY, lambda p, b: jnp.sum(p * b), sample_fn, BATCH),
            "sample_fn": (KEY, loss_fn, lambda key: jax.random.uniform(key, (2,)), BATCH),
        }.items():
            with pytest.raises(ValueError, match=field):
                jaxnn.random_search(*arguments, **options)

    def test_a_missing_folder_is_refused_before_the_search(self, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            search(checkpoint=tmp_path / "nowhere" / "search.npz")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 2**24 + 1}, ValueError, "top_k"),
        ({"devices": []}, ValueError, "devices"),
        ({"collect": (0.1, 5)}, TypeError, "collect"),
        ({"thresholds": [1.0, 0.5]}, ValueError, "thresholds"),
        ({"thresholds": ["a"]}, TypeError, "thresholds"),
        ({"bins": []}, ValueError, "bins"),
        ({"bins": [0.0, np.nan]}, ValueError, "bins"),
        ({"collect": jaxnn.Collect(np.nan)}, ValueError, r"collect\.threshold"),
        ({"collect": jaxnn.Collect(0.0, 0)}, ValueError, r"collect\.limit"),
        ({"target_loss": np.nan}, ValueError, "target_loss"),
        ({"max_seconds": 0}, ValueError, "max_seconds"),
        ({"callback": 3}, TypeError, "callback"),
        ({"memory_budget": 0}, ValueError, "memory_budget"),
        ({"memory_budget": 1e9 + 0.5}, TypeError, "memory_budget"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, match):
    with pytest.raises(error, match=match):
        search(**options)


def test_negative_zero_ties_with_zero_and_a_half_precision_threshold_counts_no_padding():
    def zeros(params, batch):
        return (params[0] * batch).astype(jnp.float16)

    found = jaxnn.random_search(
        KEY, zeros, sample_fn, jnp.float32(0), num_candidates=10, thresholds=[0.0]
    )
    assert (found.index, found.counts.count.tolist()) == (0, [10])
    with pytest.raises(ValueError, match="thresholds"):
        jaxnn.random_search(
            KEY, zeros, sample_fn, jnp.float32(0), num_candidates=10, thresholds=[1e5]
        )


def test_expected_best_is_the_mean_over_all_samples():
    values, draws = np.array([1.0, 2.0, 2.0, 5.0]), 2
    edges = np.array([0.5, 1.5, 2.5, 4.5, 5.5])
    histogram = Histogram(edges, np.array([1, 2, 0, 1]))
    pairs = [min(a, b) for a in values for b in values]
    assert jaxnn.expected_best(histogram, draws) == pytest.approx(np.mean(pairs))
    assert jaxnn.expected_best(histogram, 1) == pytest.approx(values.mean())
    assert jaxnn.expected_best(histogram, [[1], [2]]).shape == (2, 1)


@pytest.mark.parametrize(("draws", "counts"), [(0, [1]), (1, [0])])
def test_expected_best_refuses_no_draws_and_no_losses(draws, counts):
    with pytest.raises(ValueError, match=r"num_draws|histogram"):
        jaxnn.expected_best(Histogram(np.array([0.0, 1.0]), np.array(counts)), draws)


@pytest.mark.exhaustive
def test_eight_devices_give_the_same_bits_as_one():
    program = """
import jax, numpy as np, jaxnn
import test_statistics as here
assert len(jax.local_devices()) == 8
many = here.search()
one = here.search(devices=jax.local_devices()[:1])
assert here.same(many, one)
print(one.index, one.loss, one.histogram.counts.sum())
"""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    whole = search()
    assert run.stdout.split() == [
        str(whole.index),
        str(whole.loss),
        str(whole.histogram.counts.sum()),
    ]


@pytest.mark.parametrize("border", [2**31, 2**32, 2**53])
def test_counts_are_exact_across_borders_of_words_and_floats(border):
    start = border - 300
    found = search(start=start, num_candidates=600)
    assert found.histogram.counts.sum() + found.num_nonfinite == 600
    hits = [
        start + i
        for i in range(600)
        if -np.inf < loss_fn(jaxnn.candidate_params(KEY, sample_fn, start + i), BATCH) <= -1.0
    ]
    assert len(hits) > 30
    assert found.collected.index.tolist() == hits[:30]
    second = search(start=border, num_candidates=300)
    later = found.top.index[found.top.index >= border]
    assert second.top.index[: len(later)].tolist() == later.tolist()


def test_tile_is_a_power_of_two_within_the_budget():
    given = loss_fn, jnp.zeros(2), jnp.zeros(2)
    assert tiles.tile_size(*given, BUDGET, "cpu") == TILE
    assert tiles.tile_size(*given, BUDGET + 15, "cpu") == TILE
    assert tiles.tile_size(*given, 1, "cpu") == 1
    assert tiles.tile_size(*given, None, "cpu") == 2**14
    assert tiles.tile_size(*given, None, "gpu") == 2**20


@pytest.mark.parametrize(
    ("sizes", "tile"), [((2, 3, 3), 2**14), ((2, 16, 16, 3), 128), ((64, 32, 10), 64)]
)
def test_a_network_says_what_its_losses_need(sizes, tile):
    model = jaxnn.mlp(sizes)
    shapes = jax.eval_shape(model.sampler(), KEY)
    batch = jaxnn.Batch(jnp.zeros((300, sizes[0])), jnp.zeros(300, int))
    assert tiles.tile_size(model.loss, shapes, batch, None, "cpu") == tile
