"""Moves, scales and restarts of chains, and the temperature at which annealing starts."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain_setups import KEY, STAIRS, START, loss_fn
from jax.flatten_util import ravel_pytree

import jaxnn
from jaxnn import moves
from jaxnn.run.random import normals


def draw(key: jax.Array) -> Any:
    return jax.random.normal(key, (2,))


WRONG: Any = 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: moves.one_fifth(0.0), ValueError, "initial must be a finite number above 0"),
        (lambda: moves.one_fifth(float("nan")), ValueError, "initial must be"),
        (lambda: moves.restart(WRONG, 5), TypeError, "sample_fn must be callable; got a int"),
        (lambda: moves.restart(draw, 0), ValueError, "patience must be an integer of at least 1"),
        (lambda: moves.restart(draw, 2**32), ValueError, "patience must be at most 4294967295"),
    ],
)
def test_bad_options_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


class TestTemperature:
    def test_it_accepts_the_share_asked_for(self):
        key, scale = jax.random.key(3), 0.3
        flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, START))
        keys = jax.random.split(jax.random.key(9), 4_000)
        move = jax.vmap(lambda k: loss_fn(unravel(flat + scale * normals(k, 6)), STAIRS))
        moved = jax.jit(move)(keys)
        rises = np.asarray(moved - loss_fn(START, STAIRS), np.float64)
        rises = rises[rises > 0]
        for share in (0.2, 0.8):
            heat = jaxnn.calibrated_temperature(
                key, loss_fn, START, STAIRS, scale=scale, acceptance=share, num_proposals=4_000
            )
            accepted = np.exp(-rises / heat)
            error = np.std(accepted) / np.sqrt(len(rises))
            assert abs(np.mean(accepted) - share) < 8 * error  # two samples, five errors each

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"acceptance": 1.0}, "acceptance must be below 1"),
            ({"scale": 0}, "scale must be"),
            ({"loss_fn": lambda p, b: jnp.nan * p["b"][0]}, "params must have a finite loss"),
            ({"loss_fn": lambda p, b: 0 * p["b"][0]}, "room to get worse"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, options, message):
        options = {"loss_fn": loss_fn, "scale": 0.3, **options}
        with pytest.raises(ValueError, match=message):
            jaxnn.calibrated_temperature(KEY, options.pop("loss_fn"), START, STAIRS, **options)


def test_one_coordinate_moves_one_number_by_the_scale_either_way_everywhere():
    keys = jax.random.split(KEY, 3_000)
    move = jax.vmap(lambda key: moves.one_coordinate(key, START, jnp.float32(0.5)))
    moved = jax.jit(move)(keys)
    steps = jax.tree.map(lambda a, b: np.reshape(np.asarray(a) - b, (3_000, -1)), moved, START)
    flat = np.concatenate([steps["w"], steps["b"]], axis=1)
    assert np.all(np.count_nonzero(flat, axis=1) == 1)
    assert set(np.unique(np.abs(flat))) == {0.0, 0.5}
    expected = 3_000 / 12
    for place, sign in itertools.product(range(6), (-1, 1)):
        count = np.sum(flat[:, place] * sign > 0)
        assert abs(count - expected) < 5 * np.sqrt(expected)
