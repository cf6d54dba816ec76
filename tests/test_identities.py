"""Runs are told apart: by any change of their data, and by the first setting that differs."""

from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.tree_util import Partial

import jaxnn
from jaxnn.training import optimizers, schedules
from jaxnn.training.identities import fingerprint, identity, refuse_other

FACTS = {"trainer": "random_search", "next": 2**63, "scale": 0.05, "sizes": [2, 3, {"a": None}]}
any_array = hnp.arrays(
    st.sampled_from(["bool", "int8", "uint16", "int32", "uint64", "float16", "float32", "float64"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
TREE_FINGERPRINT = "e61046aa6feba50e9239c54c418b9b780336bf876147d4132b05487777b5f329"
TREE = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": [np.arange(3), np.asarray(True)]}


def test_a_fingerprint_is_for_ever():
    assert fingerprint(TREE) == TREE_FINGERPRINT


def test_the_same_values_have_one_fingerprint():
    tree = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.arange(3, dtype=np.int32)}
    same = [
        jax.tree.map(jnp.asarray, tree),
        dict(reversed(tree.items())),
        jax.tree.map(np.asfortranarray, tree),
        jax.tree.map(lambda a: a.astype(a.dtype.newbyteorder(">")), tree),
        jax.tree.map(lambda a: np.repeat(a, 2, axis=-1)[..., ::2], tree),
    ]
    assert {fingerprint(other) for other in same} == {fingerprint(tree)}


def test_any_change_changes_the_fingerprint():
    x, key = np.arange(6, dtype=np.float32), jax.random.key(0)
    changed = x.copy()
    changed[-1] = np.nextafter(changed[-1], 9)
    trees = [
        x, [x], [[x]], [x, x], {"a": x}, {"b": x}, {"a": {"a": x}}, {"a": x, "b": x}, [x, changed],
        [changed, x], {"a": x, "b": changed}, {"a": changed, "b": x}, changed, -x, x.reshape(2, 3),
        x.reshape(3, 2), x.reshape(1, 6), x.astype(np.float64), x.view(np.int32), x.view(np.uint32),
        x.astype(jnp.bfloat16), x.view(jnp.bfloat16), x.view(np.float16), x[:0],
        x[:0].reshape(0, 2),
        [x[:3], x[3:]], [x[:2], x[2:]], [], np.float32(0), np.zeros(1, np.float32),
        [np.zeros(1, np.float32), np.zeros(0, np.float32)], key, jax.random.key_data(key),
        jax.random.key(1), jax.random.split(key), jax.random.key(0, impl="philox4x32"),
    ]  # fmt: skip
    assert len({fingerprint(tree) for tree in trees}) == len(trees)


@given(array=any_array, data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_byte_counts(array, data):
    raw = bytearray(array.tobytes())
    again = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
    assert fingerprint([array]) == fingerprint([again])
    if raw:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1
        other = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
        assert fingerprint([array]) != fingerprint([other])


def test_a_partial_has_the_fingerprint_of_its_numbers():
    scaled = [fingerprint(Partial(lambda x, scale: x * scale, scale=0.5)) for _ in range(2)]
    assert scaled[0] == scaled[1] != fingerprint(Partial(max, scale=0.25))


def test_what_is_no_array_has_no_fingerprint():
    with pytest.raises(TypeError, match=r"tree\['a'\] must be an array; got a object"):
        fingerprint({"a": object()})
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(fingerprint)(np.zeros(3))


def test_facts_that_agree_pass():
    refuse_other("run.npz", FACTS, FACTS)
    refuse_other("run.npz", {**FACTS, "done": 7}, FACTS)
    refuse_other("run.npz", {}, {"threshold": None})
    refuse_other("run.npz", {}, {})


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        ({"n": 5}, {"n": 7}, "checkpoint run.npz was made with n=5; this run has 7"),
        ({"a": 1, "b": 2, "c": 3}, {"a": 1, "c": 4, "b": 3}, "with c=3; this run has 4"),
        ({}, {"n": 7}, "with n=None; this run has 7"),
        ({"n": 2**63}, {"n": 2**63 + 1}, "with n=9223372036854775808; this run has 9223372036854"),
        ({"key": "ab"}, {"key": "cd"}, "with key='ab'; this run has 'cd'"),
    ],
)
def test_the_first_fact_that_differs_is_named_with_both_values(saved, wanted, message):
    with pytest.raises(ValueError, match=message):
        refuse_other(Path("run.npz"), saved, wanted)


def scaled(rate):
    return lambda step: rate * step


FAST, SLOW = optimizers.adam, optimizers.sgd
FUNCTIONS = [
    SLOW(0.1, momentum=0.9),
    SLOW(0.1, momentum=0.9, nesterov=True),
    SLOW(0.1, momentum=0.8),
    FAST(schedules.cosine(0.1, 0.01, 10)),
    FAST(schedules.linear(0.1, 0.01, 10)),
    FAST(schedules.warm_up(schedules.linear(0.1, 0.01, 10), 3)),
    FAST(schedules.warm_up(schedules.cosine(0.1, 0.01, 10), 3)),
    optimizers.clipped(SLOW(0.1), 0.5),
    optimizers.with_l2_penalty(SLOW(0.1), 0.5),
    optimizers.clipped(FAST(0.1), 0.5),
    SLOW(scaled(0.1)),
    SLOW(scaled(0.2)),
]


def test_optimizers_that_differ_anywhere_inside_are_told_apart():
    names = [identity(cast(Partial, optimizer.update)) for optimizer in FUNCTIONS]
    assert len(set(names)) == len(names)
    again = SLOW(scaled(0.2)).update
    assert identity(cast(Partial, again)) == names[-1]


def test_a_function_that_calls_itself_has_a_name():
    def make(number):
        def again(x):
            return x if x < number else again(x - 1)

        return again

    assert identity(Partial(make(1))) == identity(Partial(make(1))) != identity(Partial(make(2)))


def test_what_jit_compiles_and_what_is_bound_to_it_count():
    def make(rate):
        return jax.jit(lambda x: rate * x)

    assert identity(Partial(make(1.0))) == identity(Partial(make(1.0)))
    assert identity(Partial(make(1.0))) != identity(Partial(make(2.0)))


def test_a_model_is_told_from_another_by_its_functions():
    losses = [jaxnn.mlp((2, 3, 3), hidden=hidden).loss for hidden in ("relu", "tanh")]
    assert identity(Partial(losses[0])) != identity(Partial(losses[1]))
    assert identity(Partial(losses[0])) == identity(Partial(jaxnn.mlp((2, 3, 3)).loss))
