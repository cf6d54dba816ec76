"""Uniform and normal numbers and permutations, drawn at the pace that the trainers ask for.

Candidates are drawn by index, each from its own key. Indices go to 2^63: inside compiled code
an index is two uint32 words, `high` and `low`; outside it is a Python int.

`jax.random.bits` runs threefry as a rolled loop on CPUs, which writes its state to memory in each
round, and throws away one of the two words that each block yields. Here the rounds are written out,
so XLA keeps them in registers, and both words are used.

Normals are pairs by Box and Muller, with polynomials for sine and cosine: inversion by XLA's
`erf_inv` takes twice as long. Under `vmap` over keys, few numbers a key are drawn with the keys in
the last axis, so that they fill the vectors, and many with the numbers there.

Measured on 2 cores with AVX-512 (jax 0.10.1, drawing included, vertical data), in million
candidates a second, by inversion and by pairs: random search of 2-3-3 in full 6.5 and 8.7, with
early rejection 11.0 and 20.9; of 2-64-64-3 0.070 and 0.086, and 0.131 and 0.162. Slower: 21 numbers
a key with the numbers last (7.7 and 7.1), 371 numbers with the keys last (by a tenth), and each
word of all keys as a vector of its own, written out (half the pace, a minute of compilation).

References: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (threefry); Box
and Muller, "A note on the generation of random normal deviates", Ann. Math. Stat. 1958.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxnn.typing import PyTree

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)
MAX_KEYS_LAST = 128
"""More numbers than this fill vectors by themselves."""
MAX_TICKETS = 2**16
"""Tickets of more places than this have too few random bits."""

# Minimax on 0 to 1/2, as polynomials of t^2: sin(pi t) / t and cos(pi t), to 3e-10.
SINE = (3.1415927, -5.1677127, 2.5501633, -0.5992522, 0.08205045, -0.00702846)
COSINE = (1.0, -4.934802, 4.0587091, -1.3352121, 0.23493753, -0.02439668)

Pair = tuple[jax.Array, jax.Array]


@partial(jax.jit, static_argnames="count", inline=True)
def normals(key: jax.Array, count: int) -> jax.Array:
    """Standard normal draws, `(count,)`, float32, by Box and Muller; none is beyond +-5.77."""
    return _from_words(_normal_pair, key, count)


@partial(jax.jit, static_argnames="count", inline=True)
def uniforms(key: jax.Array, count: int) -> jax.Array:
    """Uniform draws between -1 and 1, `(count,)`, float32: the odd multiples of 2^-23."""
    return _from_words(lambda first, second: (_signed(first), _signed(second)), key, count)


@partial(jax.jit, static_argnames="count", inline=True)
def permutation(key: jax.Array, count: int) -> jax.Array:
    """The numbers below `count` in a random order, int32.

    `jax.random.permutation` sorts pairs, which takes XLA on CPUs six times as long as to sort
    numbers. So random bits and a place are packed into one word, a ticket. Equal random bits
    leave the order to the places: these are scrambled first by bits that all share, so it is a
    fair coin that decides, and more than 1,024 tickets are sorted twice.
    """
    if count > MAX_TICKETS:
        return jax.random.permutation(key, count).astype(jnp.int32)
    rounds, low = 1 + (count > 1024), np.uint32(2 ** max(count - 1, 1).bit_length() - 1)
    words = _from_words(lambda first, second: (first, second), key, 1 + rounds * count)
    places = jnp.arange(count, dtype=jnp.uint32)
    order, scramble = places, words[0] & low
    for tickets in words[1:].reshape(rounds, count):
        tickets = jnp.sort((tickets & ~low) | (places ^ scramble))
        order = order[(tickets & low) ^ scramble]
    return order.astype(jnp.int32)


def fold_in(key: jax.Array, number: jax.Array) -> jax.Array:
    """Return `jax.random.fold_in(key, number)`; the number must be uint32.

    As one program with the draws it compiles sooner.
    """
    if not _is_threefry(key):
        return jax.random.fold_in(key, number)
    first, second = jax.random.key_data(key)
    words = threefry((first, second), (jnp.zeros_like(number), number))
    # Behind a barrier, or XLA writes the rounds out again for each number drawn from the key.
    words = jax.lax.optimization_barrier(jnp.stack(words))
    return jax.random.wrap_key_data(words, impl="threefry2x32")


@partial(jax.jit, inline=True)
def threefry(key: Pair, counter: Pair) -> Pair:
    """Return two random words, or arrays of them, by Threefry-2x32 with 20 rounds."""
    schedule = (*key, key[0] ^ key[1] ^ PARITY)
    first, second = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            first = first + second
            second = first ^ (second << distance | second >> (32 - distance))
        first = first + schedule[(group + 1) % 3]
        second = second + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return first, second


def fold_index(stream: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    """The key of one index: `fold_in(fold_in(stream, high), low)`."""
    return fold_in(fold_in(stream, high), low)


def draw_candidate(sample: Partial, stream: jax.Array, high: jax.Array, low: jax.Array) -> PyTree:
    """Return what is drawn from the key of an index."""
    return sample(fold_index(stream, high, low))


draw_candidates = jax.vmap(draw_candidate, (None, None, 0, 0))
"""The same of many indices, side by side."""


def split_index(index: int) -> tuple[np.uint32, np.uint32]:
    """The high and the low 32 bits of an index."""
    return np.uint32(index >> 32), np.uint32(index & 0xFFFFFFFF)


def join_index(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The uint64 index, or indices, of two uint32 words."""
    return np.asarray(high, np.uint64) << np.uint64(32) | np.asarray(low, np.uint64)


def shift_index(high: jax.Array, low: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The words of `index + offset`; all uint32, the carry included."""
    sums = low + offset
    return high + (sums < low).astype(jnp.uint32), sums


def _from_words(transform: Callable[..., Pair], key: jax.Array, count: int) -> jax.Array:
    """Return `count` numbers: what `transform` makes of both words of each block."""
    half = (count + 1) // 2
    if not _is_threefry(key):
        bits = jax.random.bits(key, (2, half), jnp.uint32)
        return jnp.concatenate(transform(bits[0], bits[1]))[:count]

    def numbers(first: jax.Array, second: jax.Array, *shape: int) -> Pair:
        counter = jnp.arange(half, dtype=jnp.uint32).reshape(shape)
        return transform(*threefry((first, second), (jnp.zeros_like(counter), counter)))

    @jax.custom_batching.custom_vmap
    def draw(words: jax.Array) -> jax.Array:
        return jnp.concatenate(numbers(words[0], words[1], half))[:count]

    @draw.def_vmap
    def rule(size: int, mapped: list[bool], words: jax.Array) -> tuple[jax.Array, bool]:
        del size, mapped
        if count > MAX_KEYS_LAST:
            first, second = numbers(words[:, :1], words[:, 1:], 1, half)
            return jnp.concatenate([first, second], axis=1)[:, :count], True
        first, second = numbers(words[None, :, 0], words[None, :, 1], half, 1)
        return jnp.concatenate([first, second])[:count].T, True

    return draw(jax.random.key_data(key))


def _is_threefry(key: jax.Array) -> bool:
    return str(jax.random.key_impl(key)) == "threefry2x32"


def _normal_pair(first: jax.Array, second: jax.Array) -> Pair:
    """Two independent normals of two words: a radius, and an angle of pi times -1 to 1."""
    radius = jnp.sqrt(-2 * jnp.log(_positive(first)))
    half = _signed(second) * np.float32(0.5)
    sine, cosine = half * _polynomial(SINE, half * half), _polynomial(COSINE, half * half)
    return radius * (2 * sine * cosine), radius * (cosine * cosine - sine * sine)


def _signed(word: jax.Array) -> jax.Array:
    odd = 2 * (word >> 9).astype(jnp.int32) + (1 - 2**23)
    return odd.astype(jnp.float32) * np.float32(2**-23)


def _positive(word: jax.Array) -> jax.Array:
    """Between 0 and 1, an odd multiple of 2^-24."""
    odd = 2 * (word >> 9).astype(jnp.int32) + 1
    return odd.astype(jnp.float32) * np.float32(2**-24)


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + np.float32(coefficient)
    return total
