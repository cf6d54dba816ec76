"""Runs are told apart: by any change of their data, and by the first setting that differs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.tree_util import Partial
from keys import KEY_IMPLEMENTATIONS
from kinds_of_callable import KINDS, body, closure, default, global_constant

import jaxnn
from jaxnn.optim import optimizers, schedules
from jaxnn.run.checks import as_partial
from jaxnn.run.fingerprint import check_same_run, fingerprint, function_metadata

HERE, KEY, MODEL = Path(__file__).parent, jax.random.key(0), jaxnn.mlp((2, 3, 3))
FAST, SLOW = optimizers.adam, optimizers.sgd
any_array = hnp.arrays(
    st.sampled_from(["bool", "int8", "uint16", "int32", "uint64", "float16", "float32", "float64"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
TREE = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": [np.arange(3), np.asarray(True)]}


def test_a_fingerprint_is_for_ever():
    known = "e61046aa6feba50e9239c54c418b9b780336bf876147d4132b05487777b5f329"
    assert fingerprint(TREE) == known


def test_the_same_values_have_one_fingerprint():
    tree = {**TREE, "y": np.arange(3, dtype=np.int32)}
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
    others = [jax.random.key(0, impl=name) for name in KEY_IMPLEMENTATIONS[1:]]
    changed = x.copy()
    changed[-1] = np.nextafter(changed[-1], 9)
    trees = [
        x, [x], [[x]], [x, x], {"a": x}, {"b": x}, {"a": {"a": x}}, {"a": x, "b": x}, [x, changed],
        [changed, x], {"a": x, "b": changed}, {"a": changed, "b": x}, changed, -x, x.reshape(2, 3),
        x.reshape(3, 2), x.reshape(1, 6), x.astype(np.float64), x.view(np.int32), x.view(np.uint32),
        x.astype(jnp.bfloat16), x.view(jnp.bfloat16), x.view(np.float16), x[:0],
        x[:0].reshape(0, 2), [x[:3], x[3:]],
        [x[:2], x[2:]], [], np.float32(0), np.zeros(1, np.float32),
        [np.zeros(1, np.float32), np.zeros(0, np.float32)], key, jax.random.key_data(key),
        jax.random.key(1), jax.random.split(key), *others,
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


def metadata(function: Any, axes: Any = (0, None)) -> dict[str, Any]:
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    return function_metadata("loss_fn", as_partial("loss_fn", function), shape, shape, axes=axes)


HELD = metadata(lambda params, batch, c=1.5: c * jnp.sum(params))


@pytest.mark.parametrize(
    ("saved", "wanted", "difference"),
    [
        ({"n": 5}, {"n": 7}, "n was 5, is 7"),
        ({"a": 1, "b": 2, "c": 3}, {"a": 1, "c": 4, "b": 3}, "c was 3, is 4"),
        ({}, {"n": 7}, "n was None, is 7"),
        ({"n": 2**63}, {"n": 2**63 + 1}, "n was 9223372036854775808, is 9223372036854775809"),
        ({"key": [0, 1]}, {"key": [0, 2]}, "key is another than when it was saved"),
        ({"batch": "a" * 64}, {"batch": "b" * 64}, "batch is another than when it was saved"),
        ({"jax": "0.1"}, {"jax": "0.2"}, "it was saved under jax 0.1, this is 0.2, which may"),
        ({"f": None}, {"f": HELD}, "f is another than when it was saved"),
        ({"bins": [0.5] * 99}, {"bins": None}, "bins is another than when it was saved"),
    ],
)
def test_the_first_difference_is_named_in_the_users_words(saved, wanted, difference):
    with pytest.raises(ValueError, match=r"^checkpoint run\.npz is of another run: ") as caught:
        check_same_run(Path("run.npz"), saved, wanted)
    assert f": {difference}" in str(caught.value)
    assert str(caught.value).endswith("; give the same again, or another file")


THREE = jnp.zeros(3)
PAIR, STEP = (THREE, THREE), jnp.float32(0)
GRADIENT = THREE, optimizers.sgd(0.5).init(THREE), THREE


@pytest.mark.parametrize(
    ("first", "second", "arguments", "difference"),
    [
        (default(1.5), default(2.5), PAIR, "c of loss_fn was 1.5, is 2.5"),
        (body(1), body(2), PAIR, "loss_fn computes something else than when it was saved"),
        (closure(np.zeros(3)), closure(np.ones(3)), PAIR, "loss_fn is another than when it was"),
        (schedules.constant(0.5), schedules.constant(0.25), [STEP], "loss_fn was 0.5, is 0.25"),
        (SLOW(0.5).update, SLOW(0.25).update, GRADIENT, "learning_rate of loss_fn was 0.5"),
        (MODEL.sampler(scale=4.0), MODEL.sampler(scale=2.0), [KEY], "scale of loss_fn was 4.0"),
    ],
)
def test_the_number_that_makes_the_difference_is_named(first, second, arguments, difference):
    was, now = (
        function_metadata("loss_fn", as_partial("loss_fn", function), *arguments)
        for function in (first, second)
    )
    with pytest.raises(ValueError, match="another run: ") as caught:
        check_same_run("run.npz", {"loss_fn": was}, {"loss_fn": now})
    assert f": {difference}" in str(caught.value)


IN_ANOTHER_PROCESS = """
import json
from keys import KEY_IMPLEMENTATIONS
from kinds_of_callable import KINDS
from test_fingerprint import metadata
print(json.dumps({name: metadata(make(1))["computes"] for name, make in KINDS.items()}))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_callable_computes_is_known_whatever_holds_its_number(kind):
    first, again, other = (metadata(KINDS[kind](c))["computes"] for c in (1, 1, 2))
    assert first == again != other


@pytest.mark.slow
def test_another_process_knows_what_every_kind_of_callable_computes():
    options: Any = {"capture_output": True, "text": True, "timeout": 120, "check": True}
    done = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS], cwd=HERE, **options)
    computes = {name: metadata(make(1))["computes"] for name, make in KINDS.items()}
    assert json.loads(done.stdout) == computes


def test_a_changed_global_is_seen_though_the_function_is_the_same_object():
    loss, computes = global_constant(1.0), []
    options: Any = {"num_steps": 20, "scale": 0.1}
    for scale in (1.0, 2.0):
        loss.__globals__["SCALE"] = scale
        computes.append(metadata(loss)["computes"])
        found = jaxnn.perturbation_search(KEY, loss, jnp.zeros(3), jnp.ones(3), **options)
        assert found.loss == pytest.approx(float(jnp.sum((found.params - scale) ** 2)))
    assert computes[0] != computes[1]


def test_prints_do_not_count_and_numbers_from_python_are_refused():
    def prints(params, batch):
        jax.debug.print("{}", params[0])
        return jnp.sum(params)

    def asks(params, batch):
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), jnp.float32), params[0])

    assert metadata(prints, None)["computes"] == metadata(prints, None)["computes"]
    with pytest.raises(TypeError, match="loss_fn must not call back into Python"):
        metadata(asks, None)


def scaled_rate(rate):
    return lambda step: rate * step


LINEAR, COSINE = schedules.linear(0.1, 0.01, 10), schedules.cosine_decay(0.1, 0.01, 10)
OPTIMIZERS = [
    SLOW(0.1, momentum=0.9), SLOW(0.1, momentum=0.9, nesterov=True), SLOW(0.1, momentum=0.8),
    FAST(COSINE), FAST(LINEAR), FAST(schedules.linear_warmup(LINEAR, 3)),
    FAST(schedules.linear_warmup(COSINE, 3)), optimizers.clip_by_global_norm(SLOW(0.1), 0.5),
    optimizers.add_l2(SLOW(0.1), 0.5), optimizers.clip_by_global_norm(FAST(0.1), 0.5),
    SLOW(scaled_rate(0.1)), SLOW(scaled_rate(0.2)),
]  # fmt: skip


def of_update(optimizer):
    update, start = optimizer.update, jnp.zeros(3)
    return function_metadata("optimizer", update, start, optimizer.init(start), start)["computes"]


def test_optimizers_that_differ_anywhere_inside_are_told_apart():
    names = [of_update(optimizer) for optimizer in OPTIMIZERS]
    assert len(set(names)) == len(names)
    assert of_update(SLOW(scaled_rate(0.2))) == names[-1]


def test_the_name_of_a_compiled_helper_does_not_count():
    def make(name, c=2.0):
        def helper(x):
            return c * x

        helper.__name__ = helper.__qualname__ = name
        compiled = jax.jit(helper)
        return lambda params, batch: jnp.sum(compiled(params) - compiled(batch))

    assert metadata(make("one"))["computes"] == metadata(make("other"))["computes"]
    assert metadata(make("one"))["computes"] != metadata(make("one", 3.0))["computes"]


def test_a_value_that_cannot_be_shown_ends_no_run():
    class Shy:
        def __repr__(self):
            raise RuntimeError("no")

    knot: list[Any] = []
    knot.append(knot)
    held = metadata(lambda params, batch, a=Shy(), b=knot, c=1.5: c * jnp.sum(params))  # noqa: B008
    assert held["settings"]["c"] == "1.5"
