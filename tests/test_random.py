"""Indices as two words, exact at every border, the keys of them, and the draws of a key."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.extend.random import threefry_2x32
from keys import KEY_IMPLEMENTATIONS

from jaxnn.run import random
from jaxnn.run.random import normals, threefry, uniforms

BORDERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 - 1, 2**53 + 1, 2**63 - 4, 2**63 - 1)
KEY = jax.random.key(11)


def key_words(key):
    return np.asarray(jax.random.key_data(key)).tolist()


def key_of(high, low, stream=KEY):
    return key_words(random.fold_index(stream, jnp.uint32(high), jnp.uint32(low)))


@pytest.mark.parametrize("index", BORDERS)
def test_an_index_is_split_into_words_and_joined_again(index):
    high, low = random.split_index(index)
    assert (high.dtype, low.dtype) == (np.uint32, np.uint32)
    assert int(high) * 2**32 + int(low) == index
    joined = random.join_index(np.asarray(high), np.asarray(low))
    assert joined.dtype == np.uint64
    assert int(joined) == index


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 2**31 - 1, 2**32 - 1])
def test_a_shifted_index_carries_from_its_low_word_into_the_high_one(offset):
    high, low = np.transpose([random.split_index(index) for index in BORDERS])
    total = jax.jit(random.shift_index)(high, low, jnp.uint32(offset))
    assert [word.dtype for word in total] == [jnp.uint32, jnp.uint32]
    joined = random.join_index(*map(np.asarray, total))
    assert joined.tolist() == [index + offset for index in BORDERS]


@pytest.mark.parametrize("index", BORDERS)
def test_the_key_of_an_index_folds_in_its_high_word_and_then_its_low_one(index):
    high, low = random.split_index(index)
    data, zero = jax.random.key_data(KEY), np.uint32(0)
    for word in (high, low):
        data = threefry_2x32(data, jnp.array([zero, word]))
    assert key_of(high, low) == data.tolist()


def test_indices_that_share_a_word_have_keys_of_their_own():
    words = [(0, 1), (1, 0), (1, 1), (0, 2**31), (2**31, 0), (2**31 - 1, 1), (1, 2**31 - 1)]
    assert len({tuple(key_of(*pair)) for pair in words}) == len(words)


@pytest.mark.parametrize("implementation", KEY_IMPLEMENTATIONS)
def test_many_keys_at_once_are_those_of_a_loop(implementation):
    stream = jax.random.key(4, impl=implementation)
    high, low = np.transpose([random.split_index(index) for index in BORDERS])
    at_once = jax.jit(jax.vmap(random.fold_index, (None, 0, 0)))(stream, high, low)
    one_by_one = [key_of(*pair, stream) for pair in zip(high, low, strict=True)]
    assert key_words(at_once) == one_by_one
    by_jax = [
        jax.random.fold_in(jax.random.fold_in(stream, first), second)
        for first, second in zip(high, low, strict=True)
    ]
    assert one_by_one == list(map(key_words, by_jax))


KEYS = [jax.random.key(5, impl=name) for name in KEY_IMPLEMENTATIONS]


def test_threefry_against_the_authors_known_answers():
    answers = {  # Random123, kat_vectors: counter, key, result of threefry2x32 with 20 rounds
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000)): (0x6B200159, 0x99BA4EFE),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF)): (0x1CB996FC, 0xBB002BE7),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344)): (0xC4923A9C, 0x483DF7A0),
    }
    for (counter, key), answer in answers.items():
        counter, key = jnp.array(counter, "uint32"), jnp.array(key, "uint32")
        first, second = threefry((key[0], key[1]), (counter[0], counter[1]))
        assert (int(first), int(second)) == answer


def test_threefry_against_jax():
    words = np.random.default_rng(0).integers(0, 2**32, (4, 1_000), dtype=np.uint32)
    key, counter = (words[0], words[1]), (words[2], words[3])
    got = jax.jit(threefry)(key, counter)
    for i in range(0, 1_000, 97):
        expected = threefry_2x32(words[:2, i], words[2:, i])
        np.testing.assert_array_equal([got[0][i], got[1][i]], expected)


@pytest.mark.parametrize("count", [1, 2, 21, 22])
def test_both_words_of_each_block_are_used_and_none_twice(count):
    longest = np.asarray(uniforms(KEYS[0], 1_000))
    assert len(np.unique(longest)) == 1_000
    drawn = np.asarray(uniforms(KEYS[0], count))
    blocks = (count + 1) // 2
    np.testing.assert_array_equal(drawn[:blocks], longest[:blocks])
    np.testing.assert_array_equal(drawn[blocks:], longest[500 : 500 + count - blocks])


@pytest.mark.parametrize("key", KEYS)
def test_uniforms_are_odd_multiples_of_two_to_the_minus_23(key):
    drawn = np.asarray(uniforms(key, 100_001))
    assert (drawn.shape, drawn.dtype) == ((100_001,), np.float32)
    odd = drawn.astype(np.float64) * 2**23
    assert np.all(odd % 2 == 1)
    assert -(2**23) < odd.min() < -0.9999 * 2**23
    assert 0.9999 * 2**23 < odd.max() < 2**23
    share = np.mean((odd.astype(np.int64)[:, None] >> np.arange(1, 24)) & 1, axis=0)
    assert np.all(np.abs(share - 0.5) < 5 * 0.5 / np.sqrt(drawn.size))  # every bit is fair


@pytest.mark.parametrize("key", KEYS)
def test_normals_are_those_of_box_and_muller(key):
    u = np.asarray(uniforms(key, 20_002), np.float64)  # of the same words, halved and paired
    share, angle = (1 + u[:10_001]) / 2, np.pi * u[10_001:]
    radius = np.sqrt(-2 * np.log(share))
    expected = np.concatenate([radius * np.sin(angle), radius * np.cos(angle)])
    drawn = np.asarray(normals(key, 20_002), np.float64)
    assert np.all(np.abs(drawn - expected) < 1e-6 * np.tile(radius, 2))


def test_the_longest_normal_is_finite_and_as_stated():
    words = jnp.array([0, 2**32 - 1], jnp.uint32), jnp.array([2**31, 0], jnp.uint32)
    drawn = np.asarray(random._normal_pair(*words))
    assert np.all(np.isfinite(drawn))
    assert 5.76 < np.abs(drawn).max() < 5.77


def normals_of_keys(seed, num_keys, count):
    keys = jax.random.split(jax.random.key(seed), num_keys)
    return np.asarray(jax.jit(jax.vmap(lambda key: normals(key, count)))(keys))


QUICK, SLOW = [(1, 1), (21, 100), (129, 100)], [(2, 3), (128, 3), (371, 1)]


@pytest.mark.parametrize(
    ("count", "num_keys"),
    [
        *QUICK,
        *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW),
        *(
            pytest.param(*each, marks=pytest.mark.exhaustive)
            for each in itertools.product((1, 2, 21, 128, 129, 371), (1, 3, 100))
            if each not in QUICK + SLOW
        ),
    ],
)
def test_normals_are_the_same_bits_beside_any_others(count, num_keys):
    keys = jax.random.split(jax.random.key(9), num_keys)
    alone = np.stack([normals(key, count) for key in keys[:3]])
    np.testing.assert_array_equal(normals_of_keys(9, num_keys, count)[:3], alone)
    nested = jax.jit(jax.vmap(jax.vmap(lambda key: normals(key, count))))(keys[:, None])
    np.testing.assert_array_equal(nested[:3, 0], alone)


def test_normals_are_pinned():
    drawn = np.asarray(normals(jax.random.key(0), 5))
    pinned = [0.7792131, 1.649704, 0.1971028, 1.065453, -0.583695]
    np.testing.assert_allclose(drawn, pinned, rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "first"), [(12, [10, 0, 4, 11, 3]), (1_100, [873, 375, 491, 620, 699])]
)
def test_permutations_are_pinned(count, first):
    assert random.permutation(jax.random.key(0), count)[:5].tolist() == first


def check_moments(drawn):
    """The first four, and neighbours that are unrelated, each within 5 standard errors."""
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        error = np.sqrt(np.prod(np.arange(1, 2 * power, 2)) / drawn.size)
        assert abs(np.mean(drawn**power) - moment) < 5 * error
    pairs = drawn[: drawn.size // 2 * 2].reshape(-1, 2)
    assert abs(np.mean(pairs[:, 0] * pairs[:, 1])) < 5 / np.sqrt(len(pairs))


@pytest.mark.parametrize("count", [21, pytest.param(1_000, marks=pytest.mark.slow)])
def test_normals_are_normal(count):
    drawn = normals_of_keys(3, 1_000_000 // count, count).astype(np.float64)
    halves = drawn[:, : count // 2] * drawn[:, -(count // 2) :]  # both of each pair
    assert abs(halves.mean()) < 5 / np.sqrt(halves.size)
    check_moments(drawn.ravel())
    assert scipy.stats.kstest(drawn.ravel(), "norm").pvalue > 1e-4


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [20, 1_000])
def test_a_hundred_million_normals_are_normal_to_the_tails(count):
    drawn = normals_of_keys(4, 10**8 // count, count).ravel().astype(np.float64)
    check_moments(drawn)
    assert scipy.stats.kstest(drawn, "norm").pvalue > 1e-4
    for limit in (3, 4, 5, 5.3):
        expected = 2 * scipy.stats.norm.sf(limit) * drawn.size
        assert abs(np.sum(np.abs(drawn) > limit) - expected) < 5 * np.sqrt(expected) + 1


@pytest.mark.parametrize(
    "count",
    [
        *(1, 3, 1025, 2**16 + 1),
        pytest.param(1024, marks=pytest.mark.slow),
        *(pytest.param(count, marks=pytest.mark.exhaustive) for count in (2, 300, 5000)),
    ],
)
@pytest.mark.parametrize("key", KEYS, ids=KEY_IMPLEMENTATIONS)
def test_a_permutation_holds_every_place_once_alone_or_beside_others(key, count):
    alone = random.permutation(key, count)
    assert alone.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(alone), np.arange(count))
    if count <= 5000:
        beside = permutations(key, 3, count)
        for each, own in zip(jax.random.split(key, 3), beside, strict=True):
            np.testing.assert_array_equal(random.permutation(each, count), own)


def permutations(key, number, count):
    draw = jax.jit(jax.vmap(partial(random.permutation, count=count)))
    return np.asarray(draw(jax.random.split(key, number)))


@pytest.mark.parametrize("ties", [False, True])
def test_all_orders_of_four_are_as_frequent(ties, monkeypatch):
    words = random._from_words
    if ties:  # Of a ticket only the highest 3 bits are random: more than half of the draws tie.
        monkeypatch.setattr(random, "_from_words", lambda *a: words(*a) & np.uint32(0xE0000007))
    traced_anew: Any = random.permutation
    draw = jax.jit(jax.vmap(partial(traced_anew.__wrapped__, count=4)))
    orders = np.asarray(draw(jax.random.split(jax.random.key(3), 48_000)))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_every_place_meets_every_row_of_a_long_permutation():
    for count in (100, 1100):  # one round, and two
        orders = permutations(jax.random.key(8), 2_000, count)
        sums = np.sum(orders[:, ::2].astype(np.int64), axis=1)  # without replacement
        deviation = np.sqrt(count / 2 * (count / 2) * (count + 1) / 12)
        z = (sums - count / 2 * (count - 1) / 2) / deviation
        assert scipy.stats.kstest(z, "norm").pvalue > 1e-3
        table = np.stack([np.bincount(orders[:, place], minlength=count) for place in (0, 7, -1)])
        assert scipy.stats.chisquare(table.ravel()).pvalue > 1e-3
