"""Indices as two words, exact at every border, and the keys that follow from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keys import KEY_IMPLEMENTATIONS

from jaxnn.run import random as streams

BORDERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 - 1, 2**53 + 1, 2**63 - 4, 2**63 - 1)
KEY = jax.random.key(11)


def key_words(key):
    return np.asarray(jax.random.key_data(key)).tolist()


def key_of(high, low, stream=KEY):
    return key_words(streams.fold_index(stream, jnp.uint32(high), jnp.uint32(low)))


def threefry(key, counter):
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), in Python ints."""

    def rotate(word, by):
        return (word << by | word >> 32 - by) & 0xFFFFFFFF

    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    a, b = ((c + k) & 0xFFFFFFFF for c, k in zip(counter, key, strict=True))
    for group in range(5):
        for by in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            a = (a + b) & 0xFFFFFFFF
            b = rotate(b, by) ^ a
        a = (a + keys[(group + 1) % 3]) & 0xFFFFFFFF
        b = (b + keys[(group + 2) % 3] + group + 1) & 0xFFFFFFFF
    return [a, b]


def test_threefry_of_this_file_gives_the_published_answers():
    assert threefry((0, 0), (0, 0)) == [0x6B200159, 0x99BA4EFE]
    pi = (0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)
    assert threefry(*pi) == [0xC4923A9C, 0x483DF7A0]


@pytest.mark.parametrize("index", BORDERS)
def test_words_are_the_index_and_join_gives_it_back(index):
    high, low = streams.words(index)
    assert (high.dtype, low.dtype) == (np.uint32, np.uint32)
    assert int(high) * 2**32 + int(low) == index
    joined = streams.join(np.asarray(high), np.asarray(low))
    assert joined.dtype == np.uint64
    assert int(joined) == index


def test_join_takes_arrays():
    high, low = np.transpose([streams.words(index) for index in BORDERS])
    assert streams.join(high, low).tolist() == list(BORDERS)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 2**31 - 1, 2**32 - 1])
def test_add_carries_from_the_low_word_into_the_high_one(offset):
    high, low = np.transpose([streams.words(index) for index in BORDERS])
    total = jax.jit(streams.add)(high, low, jnp.uint32(offset))
    assert [word.dtype for word in total] == [jnp.uint32, jnp.uint32]
    assert streams.join(*map(np.asarray, total)).tolist() == [index + offset for index in BORDERS]


@pytest.mark.parametrize("index", BORDERS)
def test_the_key_of_an_index_folds_in_its_high_word_and_then_its_low_one(index):
    high, low = streams.words(index)
    assert key_of(high, low) == threefry(threefry(key_words(KEY), (0, int(high))), (0, int(low)))


def test_indices_that_share_a_word_have_keys_of_their_own():
    words = [(0, 1), (1, 0), (1, 1), (0, 2**31), (2**31, 0), (2**31 - 1, 1), (1, 2**31 - 1)]
    assert len({tuple(key_of(*pair)) for pair in words}) == len(words)


@pytest.mark.parametrize("implementation", KEY_IMPLEMENTATIONS)
def test_many_keys_at_once_are_those_of_a_loop(implementation):
    stream = jax.random.key(4, impl=implementation)
    high, low = np.transpose([streams.words(index) for index in BORDERS])
    at_once = jax.jit(jax.vmap(streams.fold_index, (None, 0, 0)))(stream, high, low)
    one_by_one = [key_of(*pair, stream) for pair in zip(high, low, strict=True)]
    assert key_words(at_once) == one_by_one
