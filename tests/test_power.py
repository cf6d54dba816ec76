"""Every planted fault is what its words say, and is caught exactly if the judge objects to it."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.special import expit

import jaxnn
from jaxnn.gradients.functions import NumpyFunction
from jaxnn.gradients.power import RARE, power
from jaxnn.model.activations import HIDDEN_ACTIVATIONS

P = np.random.default_rng(0).uniform(0.2, 2.0, (20, 3)) * [1, -1, 1]
B = np.random.default_rng(1).normal(size=(3, 3))
Q = P[:, :1]


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def in_program(gradient, samples=P, batch=B):
    """The gradients of every fault of the program, by name, and the faults without effect."""

    def by_hand(params, batch):
        return jnp.sum(jnp.exp(params)), gradient(params, batch)

    def passes(rows, values, gradients):
        np.testing.assert_allclose(values, np.sum(np.exp(samples[rows]), axis=1), rtol=1e-14)
        changed = right.copy()
        changed[rows] = gradients
        return calls.append(changed) or True

    right, calls = np.asarray(jax.jit(jax.vmap(gradient, (0, None)))(samples, batch)), []
    found = power(Partial(by_hand), samples, batch, passes)
    faults = [fault for fault in found.missed if " at " in fault]
    without_effect = [fault for fault in found.without_effect if " at " in fault]
    return dict(zip(faults, calls[len(calls) - len(faults) :], strict=True)), without_effect


MOVED = B[0] + (1 + np.abs(B[0])) / 10
CASES = {
    "mul": (lambda p, b: p * b[0], {"/ for *": P / B[0]}),
    "div": (lambda p, b: p / b[0], {"* for /": P * B[0]}),
    "add": (lambda p, b: p + b[0], {"- for +": P - B[0]}),
    "sub": (
        lambda p, b: p - b[0],
        {"+ for -": P + B[0], "- the other way round": B[0] - P},
    ),
    "neg": (lambda p, b: -p, {"- left out": P}),
    "abs": (lambda p, b: jnp.abs(p), {"| | left out": P}),
    "square": (lambda p, b: jnp.square(p), {"^2 left out": P}),
    "exp": (lambda p, b: jnp.exp(p), {"expm1 for exp": np.expm1(P)}),
    "log": (lambda p, b: jnp.log(p[:1]), {"log1p for log": np.log1p(Q)}),
    "log1p": (lambda p, b: jnp.log1p(p[:1]), {"log for log1p": np.log(Q)}),
    "tanh": (lambda p, b: jnp.tanh(p), {"sigmoid for tanh": expit(P)}),
    "sigmoid": (lambda p, b: jax.nn.sigmoid(p), {"tanh for sigmoid": np.tanh(P)}),
    "sin": (lambda p, b: jnp.sin(p), {"cos for sin": np.cos(P)}),
    "cos": (lambda p, b: jnp.cos(p), {"sin for cos": np.sin(P)}),
    "max": (
        lambda p, b: jnp.maximum(p, 0.5),
        {"min for max": np.minimum(P, 0.5), "bound moved": np.maximum(P, 0.65)},
    ),
    "min": (
        lambda p, b: jnp.minimum(p, b[0]),
        {"max for min": np.maximum(P, B[0]), "bound moved": np.minimum(P, MOVED)},
    ),
    "gt": (
        lambda p, b: jnp.where(p > 0.5, p, 1),
        {"< for >": np.where(P < 0.5, P, 1), "bound moved": np.where(P > 0.65, P, 1)},
    ),
    "le": (
        lambda p, b: jnp.where(p <= 0.5, p, 1),
        {"> for <=": np.where(P > 0.5, P, 1), "bound moved": np.where(P <= 0.65, P, 1)},
    ),
    "activation": (
        lambda p, b: jnp.square(jnp.tanh(p)),
        {
            "sigmoid for tanh": expit(P) ** 2,
            "^2 left out": np.tanh(P),
            "input of tanh for its output": P**2,
        },
    ),
    "sum": (
        lambda p, b: jnp.sum(p[None] * b, axis=0),
        {
            "/ for *": np.sum(P[:, None] / B, axis=1),
            "first term of a sum left out": np.sum(P[:, None] * B[1:], axis=1),
        },
    ),
    "product": (
        lambda p, b: b.T @ p,
        {"first term of a sum left out": P[:, 1:] @ B[1:], "transposed": P @ B.T},
    ),
}
"""A gradient in one operation, and what its faults have to be."""


def test_a_fault_of_a_program_is_what_its_words_say_and_changes_nothing_else():
    def gradient(p, b):
        return jnp.concatenate([function(p, b) for function, _ in CASES.values()])

    faults, without_effect = in_program(gradient)
    right, end = np.asarray(jax.jit(jax.vmap(gradient, (0, None)))(P, B)), 0
    expected = {}
    for function, of_case in CASES.values():
        begin, end = end, end + len(function(P[0], B))
        place = f"test_power.py:{function.__code__.co_firstlineno} (<lambda>)"
        for fault, changed in of_case.items():
            expected[f"{fault} at {place}"] = right.copy()
            expected[f"{fault} at {place}"][:, begin:end] = changed
    assert list(faults) == list(expected)
    for fault, gradients in faults.items():
        np.testing.assert_allclose(gradients, expected[fault], rtol=1e-12, err_msg=fault)
    assert [fault.partition(" at ")[0] for fault in without_effect] == [">= for >", "< for <="]


def simple(params, batch):
    return jnp.sum(jnp.cos(params)), -jnp.sin(params)


def judge(by_hand, samples, batch):
    """Passes what agrees with `jax.grad` of the value, relative to the largest slope."""
    of_value = jax.value_and_grad(lambda *args: by_hand(*args)[0])
    values, gradients = jax.jit(jax.vmap(of_value, (0, None)))(samples, batch)
    leaves = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(gradients)]
    gradients = np.concatenate(leaves, axis=1)

    def passes(rows, its_values, its_gradients):
        size = 1e-9 * np.max(np.abs(gradients[rows]), axis=1, keepdims=True)
        off = np.abs(its_gradients - gradients[rows])
        return bool(np.all(off <= size)) and np.allclose(its_values, values[rows], 1e-9, 0)

    return passes


def test_faults_of_the_arrays_of_a_numpy_gradient():
    def by_hand(params, batch):
        w, b = params["w"], params["b"]
        return np.sum(w**2) + np.sum(b**2), {"w": 2 * w, "b": 2 * b}

    def passes(rows, values, gradients):
        np.testing.assert_allclose(values, np.sum(flat[rows] ** 2, axis=1), rtol=1e-14)
        calls.append((rows, gradients))
        return True

    samples, calls, expected = {"b": P[:9], "w": P[:18, :2].reshape(9, 2, 2)}, [], {}
    flat = np.concatenate([samples["b"], samples["w"].reshape(9, 4)], axis=1)
    found = power(NumpyFunction("by_hand", by_hand), samples, np.zeros((7, 2)), passes)
    for name, leaf in samples.items():
        last = 1 + 1e-4 * (np.arange(leaf[0].size) == leaf[0].size - 1).reshape(leaf[0].shape)
        changes = {
            "wrong sign": -leaf,
            "twice as large": 2 * leaf,
            "left out": 0 * leaf,
            "off by 0.0001": leaf * 1.0001,
            "last coordinate off by 0.0001": leaf * last,
            "of the sample before": leaf[[8, 0, 1, 2, 3, 4, 5, 6, 7]],
            "1/7 of it": leaf / 7,
        } | ({"transposed": leaf.transpose(0, 2, 1)} if name == "w" else {})
        for fault, changed in changes.items():
            new = samples | {name: changed}
            whole = 2 * np.concatenate([new["b"], new["w"].reshape(9, 4)], axis=1)
            expected[f"params['{name}']: {fault}"] = whole
    assert found.missed[:-3] == tuple(expected)
    assert found.without_effect == ()
    for (rows, gradients), whole in zip(calls, expected.values(), strict=False):
        np.testing.assert_allclose(gradients, whole[rows], rtol=1e-14)


def test_numbers_that_are_not_finite_and_leaves_without_numbers():
    def by_hand(params, batch):
        return np.float64(np.inf), {"a": params["a"] * [np.inf, np.nan, 1], "b": params["b"]}

    def passes(rows, values, gradients):
        return bool(np.all(np.isnan(gradients[:, 1]) & np.isinf(gradients[:, 0])))

    samples = {"a": P[:1], "b": P[:1, :0]}
    found = power(NumpyFunction("by_hand", by_hand), samples, np.zeros((1, 0)), passes)
    of_a = dict(found.faults)
    assert not of_a["params['a']: wrong sign"]
    assert of_a["params['a']: left out"]
    assert set(found.without_effect) >= {
        "params['a']: of the sample before",
        "params['b']: last coordinate off by 0.0001",
    }


def test_a_fault_in_few_params_is_caught_if_a_sample_is_among_them():
    samples = np.random.default_rng(3).normal(size=(5_000, 2))
    hashes = np.array([zlib.crc32(row) for row in samples])
    by_hand, passes = Partial(simple), judge(simple, samples, None)

    def missed(places):
        return power(
            by_hand, samples[places], None, lambda rows, *of: passes(places[rows], *of)
        ).missed

    rare, twenty = np.flatnonzero(hashes % 1_000 == 0), np.arange(20)
    assert len(rare) > 1
    assert np.all(hashes[:20] % 100 != 0)
    assert missed(twenty) == (f"{RARE} 100 samples", f"{RARE} 1,000 samples")
    assert missed(np.append(twenty, rare[-1])) == ()
    assert missed(np.arange(5_000)) == ()


def relu_net(params, batch):
    z = batch @ params
    loss = jnp.sum(jnp.where(z > 0, z, 0))
    slope = (z > 0).astype(z.dtype)
    return loss, batch.T @ slope


def test_too_few_samples_miss_what_they_do_not_visit():
    samples, batch = np.abs(P), np.abs(B)
    line = relu_net.__code__.co_firstlineno + 3
    moved = f"bound moved at test_power.py:{line} (relu_net)"
    all_on = power(Partial(relu_net), samples, batch, judge(relu_net, samples, batch))
    assert moved in all_on.without_effect
    both = np.concatenate([samples, samples * [1, -1, -1]])
    visited = power(Partial(relu_net), both, batch, judge(relu_net, both, batch))
    assert moved in [fault for fault, is_caught in visited.faults if is_caught]


@pytest.mark.parametrize(("place", "is_seen"), [(0, True), (1_000, False), (-1, True)])
def test_faults_of_a_program_are_looked_for_at_both_ends_of_many_samples(place, is_seen):
    def clipped(params, batch):
        return jax.lax.clamp(-9.0, params, 2.95)

    samples = np.ones((2_000, 1))
    samples[place] = 3
    faults, without_effect = in_program(clipped, samples)
    assert ["bound moved" in fault for fault in faults] == [True] * is_seen
    assert ["bound moved" in fault for fault in without_effect] == [True] * (2 - is_seen)


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "tanh" else pytest.mark.exhaustive)
        for name in HIDDEN_ACTIVATIONS
    ],
)
def test_networks_of_jaxnn(hidden):
    batch = jaxnn.datasets.vertical(jax.random.key(0), samples=5, classes=3)
    model = jaxnn.mlp((2, 3, 3), hidden=hidden)
    samples = jax.vmap(model.sampler(scale=1.0))(jax.random.split(jax.random.key(1), 20))
    samples, batch = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64 if leaf.dtype == np.float32 else None),
        (samples, batch),
    )
    passes = judge(lambda *args: (model.loss_reference(*args),), samples, batch)
    found = power(Partial(model.value_and_grad), samples, batch, passes)
    assert all(fault.startswith(RARE) for fault in found.missed)
    assert len(found.faults) > 60
    # The largest logit, or the smallest, is subtracted: the softmax is the same.
    assert any("min for max at losses.py" in fault for fault in found.without_effect)


def test_programs_in_programs_and_loops_that_might_never_end():
    def loops(params, batch):
        def turn(carry, row):
            return carry * row, carry

        last, _ = jax.lax.scan(turn, params, batch)
        return jax.lax.cond(params[0] > 1, jnp.exp, jax.jit(jnp.tanh), last)

    def endless(params, batch):
        return jax.lax.while_loop(lambda x: jnp.any(x > 1), lambda x: x / 2, jnp.exp(params))

    faults, none = in_program(loops, P, B + 2)
    scaled = P / np.prod(B + 2, axis=0)
    expected = np.where(P[:, :1] > 1, np.exp(scaled), np.tanh(scaled))
    by_name = {fault.partition(" at ")[0]: gradients for fault, gradients in faults.items()}
    assert {"/ for *", "sigmoid for tanh", "expm1 for exp"} < set(by_name)
    assert [fault.partition(" at ")[0] for fault in none] == [">= for >"]
    np.testing.assert_allclose(by_name["/ for *"], expected, rtol=1e-12)
    assert in_program(endless) == ({}, [])


def test_all_faults_of_a_program_are_compiled_together_and_once(compilations):
    passes, by_hand = judge(simple, P, B), Partial(simple)
    power(by_hand, P, B, passes)
    before = len([event for event, _ in compilations if "backend_compile" in event])
    assert before > 0
    power(by_hand, -P, B, passes)
    after = len([event for event, _ in compilations if "backend_compile" in event])
    assert before == after
