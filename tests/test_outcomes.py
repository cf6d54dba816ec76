"""Counts of outcomes, against NumPy on all of them; cut, resumed, and with too little room."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from search_setups import stop_after
from tolerances import same

import jaxnn
from jaxnn.run import loop
from jaxnn.search import outcomes

KEY = jax.random.key(3)
BATCH = jnp.array([0.3, -1.0, 0.1])
COUNT = 3_000


def outcome_fn(params, batch):
    return params > jnp.broadcast_to(batch, params.shape)


def sample_fn(key):
    drawn = jax.random.normal(key, (211,))
    return drawn[:210].reshape(70, 3) + 2.0 * drawn[210]


def few_bits(key):
    return jax.random.normal(key, (3,))


def count(sample=few_bits, **options: Any):
    given = {"num_candidates": COUNT, "memory_budget": 12 * 256, **options}
    return jaxnn.count_outcomes(KEY, outcome_fn, sample, BATCH, **given)


def by_hand(sample=few_bits, number=COUNT, start=0):
    drawn = jaxnn.candidate_params(KEY, sample, np.arange(start, start + number))
    bits = (np.asarray(drawn) > np.asarray(BATCH)).reshape(number, -1)
    return Counter(map(bytes, np.packbits(bits, axis=1))), bits.shape[1]


def as_counter(counted):
    bits = np.unpackbits(counted.packed, axis=1, count=counted.num_bits)
    rows = map(bytes, np.packbits(bits, axis=1))
    return Counter(dict(zip(rows, counted.counts.tolist(), strict=True)))


@pytest.fixture
def small_merges(monkeypatch):
    monkeypatch.setattr(outcomes, "SMALLEST_MERGE", 800)


@pytest.mark.parametrize("sample", [few_bits, sample_fn])
def test_counts_are_those_of_all_outcomes(sample, small_merges, monkeypatch):
    if sample is sample_fn:  # Wide outcomes are drawn few at a time.
        monkeypatch.setattr(outcomes, "LARGEST_CHUNK", 2**12)
    start, number = 2**32 - 300, COUNT if sample is few_bits else 700
    counted = count(sample, start=start, num_candidates=number)
    expected, num_bits = by_hand(sample, number, start)
    assert counted.num_bits == num_bits
    assert counted.packed.shape[1] == -(-num_bits // 64) * 8
    assert as_counter(counted) == expected
    assert (counted.error, counted.num_evaluations, counted.status) == (0, number, "completed")
    assert np.all(np.diff(counted.counts) <= 0)


@pytest.mark.parametrize("room", [3, 6])
def test_with_too_little_room_counts_are_too_low_by_at_most_the_error(room, small_merges):
    counted, (expected, _) = count(max_outcomes=room), by_hand()
    assert len(counted.counts) <= room < len(expected)
    assert 0 < counted.error <= COUNT / (room + 1)
    got = as_counter(counted)
    for outcome, number in expected.items():
        assert number - counted.error <= got[outcome] <= number


def test_counts_do_not_depend_on_how_the_work_is_cut(monkeypatch, small_merges):
    whole = count(max_outcomes=5)
    monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", 0.0)
    assert same(count(max_outcomes=5, devices=jax.local_devices()[:1] * 3), whole)


def test_debugging_infinities_breaks_no_count():
    expected = count(num_candidates=300)
    with jax.debug_infs(True):
        assert same(count(num_candidates=300), expected)


def test_a_checkpoint_goes_on_to_the_same_counts(tmp_path, small_merges):
    path = tmp_path / "counts.npz"
    options: dict[str, Any] = {"max_outcomes": 5, "checkpoint": path}
    assert count(num_candidates=1_050, **options).num_evaluations == 1_050
    assert same(count(**options), count(max_outcomes=5))
    with pytest.raises(ValueError, match="num_candidates must be at least 3000"):
        count(num_candidates=1_050, **options)
    with pytest.raises(ValueError, match="max_outcomes was 5, is 6"):
        count(**{**options, "max_outcomes": 6})
    with pytest.raises(ValueError, match="sample_fn computes something else"):
        count(sample_fn, **options)


def test_more_outcomes_than_a_checkpoint_holds_are_refused(tmp_path):
    path = tmp_path / "counts.npz"
    with pytest.raises(ValueError, match=r"max_outcomes must be at most \d+ with a checkpoint"):
        count(max_outcomes=2**26, checkpoint=path)
    assert not path.exists()


def test_time_that_is_over_and_a_callback_end_the_counting(monkeypatch):
    counted = count(num_candidates=10**9, max_seconds=1e-3)
    assert counted.status == "stopped"
    assert counted.counts.sum() == counted.num_evaluations < 10**9
    monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", 1e-9)
    counted = count(callback=stop_after(3, seen := []))
    assert (counted.status, counted.num_evaluations) == ("stopped", 3 * 64)
    assert [each.num_evaluations for each in seen] == [64, 128, 192]
    assert (np.isnan(seen[-1].loss), seen[-1].best_params()) == (True, None)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_candidates", 0, ValueError),
        ("max_outcomes", 0, ValueError),
        ("max_outcomes", 1.5, TypeError),
        ("start", -1, ValueError),
    ],
)
def test_what_cannot_be_counted_is_refused(name, value, error):
    with pytest.raises(error, match=f"{name} must be"):
        count(**{name: value})


@pytest.mark.parametrize("function", [lambda p, b: p, lambda p, b: (p > b, p), lambda p, b: []])
def test_outcomes_that_are_no_bools_are_refused(function):
    with pytest.raises(TypeError, match="outcome_fn must return an array of bools"):
        jaxnn.count_outcomes(KEY, function, few_bits, BATCH, num_candidates=10)


def test_a_second_count_compiles_nothing(caplog):
    count(num_candidates=1_000)
    with jax.log_compiles():
        count(num_candidates=2_000)
        assert [r for r in caplog.records if "Compiling" in r.getMessage()] == []
        count(memory_budget=12 * 512)
        assert [r for r in caplog.records if "Compiling" in r.getMessage()]
