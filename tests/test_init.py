"""Params drawn from one key: their distribution, their bits and their scales."""

import pickle
from itertools import cycle, product
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from keys import KEY_IMPLEMENTATIONS

from jaxnn.model.init import DISTRIBUTIONS, sampler
from jaxnn.model.layers import Dense, layer_shapes
from jaxnn.model.mlp import mlp
from jaxnn.search.random_search import random_search

SHAPES = layer_shapes((3, 5, 2))
BIG = (((200, 300), (300,)), ((50, 400), (400,)))
KEY = jax.random.key(11)
KEYS = {name: jax.random.key(12, impl=name) for name in KEY_IMPLEMENTATIONS}
UNITS = {
    "normal": scipy.stats.norm(),
    "uniform": scipy.stats.uniform(-1, 2),
    "lecun": scipy.stats.norm(),
    "he": scipy.stats.norm(),
}
GAINS = {"normal": lambda n: 1, "uniform": lambda n: 1, "lecun": lambda n: n**-0.5}
GAINS["he"] = lambda n: (2 / n) ** 0.5


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_a_draw_is_params_of_the_network():
    for hidden_biases in (True, False):
        params = mlp((3, 5, 2), hidden_biases=hidden_biases).sampler()(KEY)
        assert all(isinstance(layer, Dense) for layer in params)
        shapes = tuple((w.shape, None if b is None else b.shape) for w, b in params)
        assert shapes == layer_shapes((3, 5, 2), hidden_biases)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("distribution", "implementation"), list(zip(DISTRIBUTIONS, cycle(KEYS), strict=False))
)
def test_moments_and_shape_of_the_distribution(distribution, implementation):
    scales, unit = (0.3, 4.0), UNITS[distribution]
    draw = jax.jit(sampler(BIG, scale=scales, distribution=distribution))
    layers = draw(KEYS[implementation])
    for layer, scale, ((fan_in, _), _) in zip(layers, scales, BIG, strict=True):
        for leaf in layer:
            u = np.ravel(np.float64(leaf)) / (scale * GAINS[distribution](fan_in))
            kurtosis = unit.stats(moments="k") + 3
            five_errors = 5 * unit.std() / np.sqrt(u.size)
            assert abs(np.mean(u)) < five_errors
            five_errors = 5 * unit.var() * np.sqrt((kurtosis - 1) / u.size)
            assert abs(np.var(u) - unit.var()) < five_errors
            assert scipy.stats.kstest(u, unit.cdf).pvalue > 1e-6


def test_entries_keys_and_leaves_are_unrelated():
    keys = jax.random.split(KEY, 20_000)
    params = jax.jit(jax.vmap(sampler(SHAPES)))(keys)
    columns = np.concatenate(
        [np.reshape(leaf, (20_000, -1)) for leaf in jax.tree.leaves(params)], 1
    )
    correlations = np.corrcoef(columns.T) - np.eye(32)
    assert np.max(np.abs(correlations)) < 5.5 / np.sqrt(20_000)  # 496 pairs
    neighbours = np.corrcoef(columns[:-1, 0], columns[1:, 0])[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(20_000)


@pytest.mark.parametrize(
    ("distribution", "implementation"),
    [
        pytest.param(*case, marks=pytest.mark.exhaustive if number else ())
        for number, case in enumerate(product(DISTRIBUTIONS, KEYS))
    ],
)
def test_the_same_key_gives_the_same_bits_however_it_is_called(distribution, implementation):
    sample_fn = sampler(SHAPES, scale=0.05, distribution=distribution)
    keys = jax.random.split(KEYS[implementation], 3)
    eager = jax.tree.map(lambda *leaves: np.stack(leaves), *[sample_fn(key) for key in keys])
    assert len(np.unique(eager[0].weights)) == eager[0].weights.size
    ways = {
        "vmap": jax.vmap(sample_fn)(keys),
        "as argument": jax.jit(lambda draw, keys: jax.vmap(draw)(keys))(sample_fn, keys),
        "closed over": jax.jit(lambda keys: jax.lax.map(sample_fn, keys))(keys),
    }
    for params in ways.values():
        assert_same_bits(params, eager)
    with jax.enable_x64(True):
        assert_same_bits(jax.vmap(sample_fn)(keys), eager)


def test_scales_are_leaves_and_a_sweep_traces_once():
    traces = []

    @jax.jit
    def draw(sample_fn, key):
        traces.append(sample_fn)
        return sample_fn(key)

    model = mlp((3, 5, 2))
    unit = model.sampler(scale=1.0)(KEY)
    for scale in (0.05, 1, np.float64(3.5), jnp.float32(8.0)):
        first, last = draw(model.sampler(scale=scale, bias_scale=2 * scale), KEY)
        np.testing.assert_allclose(first.weights, np.float32(scale) * unit[0].weights, rtol=3e-7)
        np.testing.assert_allclose(last.biases, np.float32(2 * scale) * unit[1].biases, rtol=3e-7)
    assert len(traces) == 1
    for last in (2.0, 0.5):
        draw(mlp([3, 5, 2]).sampler(scale=[1.0, last], bias_scale=[0.0, last]), KEY)
        draw(model.sampler(distribution="he", scale=last), KEY)
    assert len(traces) == 3  # one number, one a layer, another distribution
    sweep = jax.vmap(lambda scale: sampler(SHAPES, scale=scale)(KEY))(jnp.array([0.5, 2.0]))
    assert_same_bits(jax.tree.map(lambda leaf: leaf[1], sweep), sampler(SHAPES, scale=2.0)(KEY))


def test_the_numbers_of_a_sampler_are_its_keywords_and_it_pickles():
    model = mlp((3, 5, 2))
    one = model.sampler(scale=4.0, distribution="he")
    assert (one.args, one.keywords) == ((), {"scale": 4.0, "bias_scale": None})
    several = model.sampler(scale=[0.5, 2], bias_scale=(0, 3.0), distribution="he")
    assert several.keywords == {"scale": (0.5, 2.0), "bias_scale": (0.0, 3.0)}
    assert several.func is one.func
    assert {type(leaf) for leaf in jax.tree.leaves((one, several))} == {np.float32}
    unpickled = pickle.loads(pickle.dumps(several))
    assert unpickled.func is several.func
    assert unpickled.keywords == several.keywords
    assert "'he'" in repr(one)


def test_the_sampler_itself_is_no_sample_fn():
    sentence = r"^sample_fn must be what model\.sampler\(scale=1\.0\) returns.*without its call"
    model, itself = mlp((3, 5, 2)), cast(Any, mlp((3, 5, 2)).sampler)
    for call in (
        lambda: itself(KEY),
        lambda: jax.vmap(itself)(jax.random.split(KEY)),
        lambda: random_search(KEY, model.loss, itself, None, num_candidates=1),
    ):
        with pytest.raises(TypeError, match=sentence):
            call()


@pytest.mark.parametrize("distribution", ["uniform", "he"])
def test_layer_scales_gains_and_bias_scales(distribution):
    one = sampler(SHAPES, distribution="uniform" if distribution == "uniform" else "normal")(KEY)
    scales, bias_scales = (0.5, 3.0), (0.0, 7.0)
    gains = [np.float32(GAINS[distribution](fan_in)) for fan_in in (3, 5)]
    options = {"scale": scales, "distribution": distribution}
    together = sampler(SHAPES, **options)(KEY)
    apart = sampler(SHAPES, **options, bias_scale=list(bias_scales))(KEY)
    for layer in range(2):
        factor = np.float32(scales[layer]) * gains[layer]
        assert_same_bits(together[layer], Dense(*(factor * leaf for leaf in one[layer])))
        expected = Dense(
            together[layer].weights, np.float32(bias_scales[layer]) * one[layer].biases
        )
        assert_same_bits(apart[layer], expected)
    assert not np.any(apart[0].biases)
    none = sampler(SHAPES, **options, bias_scale=0)(KEY)
    assert not any(np.any(layer.biases) for layer in none)


def test_init_draws_small_normal_weights_and_zero_biases():
    model = mlp((200, 300, 2))
    first, last = model.init(KEY)
    weights = np.float64(first.weights) / 0.01
    assert abs(np.mean(weights)) < 5 / np.sqrt(weights.size)
    assert abs(np.var(weights) - 1) < 5 * np.sqrt(2 / weights.size)
    assert scipy.stats.kstest(np.ravel(weights), "norm").pvalue > 1e-6
    assert not np.any(first.biases)
    assert not np.any(last.biases)
    with jax.enable_x64(True):
        assert_same_bits(model.init(KEY), (first, last))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "^scale must be a finite number above 0"),
        ({"scale": 1e39}, "^scale must be.*fits float32"),
        ({"scale": (1.0, 2.0, 3.0)}, "^scale must be one number or 2, one a layer"),
        ({"scale": (1.0, 0.0)}, r"^scale\[1\] must be a finite number above 0"),
        ({"bias_scale": -0.1}, "^bias_scale must be a finite number of at least 0"),
        ({"bias_scale": [1.0]}, "^bias_scale must be one number or 2"),
        ({"bias_scale": (1.0, None)}, r"^bias_scale\[1\] must be"),
        ({"distribution": "Normal"}, "^distribution must be one of 'normal', 'uniform'"),
        ({"distribution": None}, "^distribution must be one of"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        mlp((3, 5, 2)).sampler(**options)


@pytest.mark.parametrize("draw", [mlp((3, 5, 2)).init, mlp((3, 5, 2)).sampler()])
def test_bad_keys_are_refused(draw):
    with pytest.raises(TypeError, match=r"^key must be a single typed key.*got 7 \(int\)"):
        draw(7)
    with pytest.raises(ValueError, match=r"^key must be.*keys of shape \(2,\)"):
        draw(jax.random.split(KEY))
    with pytest.raises(ValueError, match=r"^key must be of.*got unsafe_rbg"):
        jax.vmap(draw)(jax.random.split(jax.random.key(7, impl="unsafe_rbg"), 3))
