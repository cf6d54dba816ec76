"""The unit draws: threefry word by word against JAX's own, and what becomes of the words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.extend.random import threefry_2x32
from keys import KEY_IMPLEMENTATIONS

from jaxnn.run.random import normals, threefry, uniforms

KEY = jax.random.key(5)
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
    longest = np.asarray(uniforms(KEY, 1_000))
    assert len(np.unique(longest)) == 1_000
    drawn = np.asarray(uniforms(KEY, count))
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
def test_normals_are_the_inverse_of_the_uniforms(key):
    u = np.asarray(uniforms(key, 10_001), np.float64)
    expected = np.sqrt(2) * scipy.special.erfinv(u)
    np.testing.assert_allclose(normals(key, 10_001), expected, rtol=1e-5)  # erf_inv, in the tails


def test_the_longest_normal_is_finite_and_as_stated():
    ends = np.array([2**-23 - 1, 1 - 2**-23], np.float32)
    longest = np.sqrt(2) * np.asarray(jax.lax.erf_inv(ends))
    assert longest[0] == -longest[1]
    assert 5.2 < longest[1] < 5.3
