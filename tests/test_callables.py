"""What the trainers ask of the functions and trees that they are given."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxnn.run import checks as callables

F32 = jnp.float32


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def scaled_sum(scale, x):
    return scale * jnp.sum(x)


def test_a_function_becomes_a_partial_and_a_partial_stays_itself():
    wrapped = callables.as_partial("loss_fn", scaled_sum)
    assert isinstance(wrapped, Partial)
    assert wrapped(np.float32(2), jnp.ones(3)) == 6
    assert callables.as_partial("loss_fn", wrapped) is wrapped
    same = callables.as_partial("loss_fn", scaled_sum)
    assert jax.tree.structure(wrapped) == jax.tree.structure(same)


@pytest.mark.parametrize("value", [None, 3, "tanh", jnp.ones(2)])
def test_what_cannot_be_called_is_refused_by_name(value):
    with pytest.raises(TypeError, match=f"loss_fn must be callable; got a {type(value).__name__}"):
        callables.as_partial("loss_fn", value)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad])
def test_tracers_are_refused_by_name(transform):
    message = "must be concrete; got a tracer: call this outside jit and vmap"
    with pytest.raises(TypeError, match=f"^scale {message}"):
        transform(lambda value: callables.check_concrete("scale", value))(1.0)
    with pytest.raises(TypeError, match=f"^sample_fn {message}"):
        transform(lambda value: callables.as_partial("sample_fn", Partial(scaled_sum, value)))(1.0)
    for value in (1.0, np.float32(1), jnp.ones(()), None, "word", Partial(scaled_sum, 2.0)):
        callables.check_concrete("scale", value)


def test_shapes_are_found_with_a_single_trace():
    traces = []

    def loss_fn(params, batch):
        traces.append(None)
        return jnp.sum(params) * batch

    for _ in range(3):
        found = callables.shapes_of("loss_fn", Partial(loss_fn), jnp.ones(2), F32(1))
        assert (found.shape, found.dtype) == ((), F32)
    assert len(traces) == 1


def test_an_error_of_the_functions_own_comes_through_with_its_name():
    def loss_fn(params):
        raise LookupError(f"no layer in {params.shape}")

    with pytest.raises(LookupError, match=r"no layer in \(2,\)") as raised:
        callables.shapes_of("loss_fn", Partial(loss_fn), jnp.ones(2))
    assert raised.value.__notes__[-1] == "This came from tracing loss_fn."


def test_validate_sees_the_batch_as_it_came_before_it_is_copied():
    seen = []

    def loss_fn(params, batch):
        raise AssertionError("as_batch does not call the function")

    vars(loss_fn)["validate"] = lambda params, batch: seen.append((params, batch))
    params, batch = object(), {"x": np.ones(2, np.float32)}
    callables.as_batch(batch, params, scaled_sum, loss_fn, None)
    assert len(seen) == 1
    assert seen[0][0] is params
    assert seen[0][1] is batch


def test_what_validate_raises_comes_through():
    def refuse(params, batch):
        raise ValueError("batch.x must be finite")

    def loss_fn(params, batch):
        return jnp.float32(0)

    vars(loss_fn)["validate"] = refuse
    with pytest.raises(ValueError, match=r"batch\.x must be finite"):
        callables.as_batch(np.ones(2), None, loss_fn)


@pytest.mark.parametrize("convert", [callables.as_params, lambda tree: callables.as_batch(tree, 0)])
def test_the_copy_shares_no_memory_with_the_callers_array(convert):
    data = np.zeros(4096 + 16, np.float32)
    aligned = data[(-data.ctypes.data % 64) // 4 :][:4096]
    copies = convert({"w": aligned, "b": data[1:3]})
    aligned += 1
    data[1:3] = 7
    assert not np.any(copies["w"])
    assert set(np.asarray(copies["b"]).tolist()) <= {0.0}


def test_params_become_float32_arrays_in_their_own_tree():
    got = callables.as_params({"w": np.ones((2, 3)), "b": [np.float64(4), None]})
    assert got["w"].dtype == got["b"][0].dtype == F32
    assert (got["w"].shape, got["b"][0].shape, got["b"][1]) == ((2, 3), (), None)
    assert isinstance(got["w"], jax.Array)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ValueError, "params must hold at least one array; got an empty tree"),
        (None, ValueError, "params must hold at least one array"),
        ({"w": np.ones(2, int)}, TypeError, "floats of one dtype; got int32 at params['w']"),
        ((np.ones(2, bool),), TypeError, "floats of one dtype; got bool at params[0]"),
        (
            {"a": np.ones(2, np.float32), "b": np.ones(2, np.float16)},
            TypeError,
            "floats of one dtype; got float16 at params['b']",
        ),
        ({"w": "abc"}, TypeError, "params['w'] must be an array of real numbers; got dtype <U3"),
        ({"w": np.ones(2, complex)}, TypeError, "params['w'] must be an array of real numbers"),
        (
            [np.array([1e300])],
            ValueError,
            "params[0] must fit float32; got magnitudes up to 1e+300",
        ),
    ],
)
def test_params_that_cannot_be_trained_are_refused_where_they_are(params, error, message):
    with pytest.raises(error, match=re.escape(message)):
        callables.as_params(params)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_a_float_scalar_passes(dtype):
    callables.check_scalar("loss_fn", shape(dtype=dtype))


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (shape(2), r"float32 of shape \(2,\)"),
        (shape(1), r"float32 of shape \(1,\)"),
        (shape(dtype=jnp.int32), r"int32 of shape \(\)"),
        (shape(dtype=jnp.bool), r"bool of shape \(\)"),
        (shape(dtype=jnp.complex64), r"complex64 of shape \(\)"),
        (None, "a NoneType"),
        ((shape(), shape()), "a tuple"),
        ({"loss": shape()}, "a dict"),
    ],
)
def test_anything_but_a_float_scalar_is_refused(result, got):
    with pytest.raises(TypeError, match=f"metric_fn must return a float scalar; got {got}"):
        callables.check_scalar("metric_fn", result)


PARAMS = {"w": shape(2, 3), "b": shape(3)}


def test_gradients_like_the_params_pass():
    callables.check_like_params("value_and_grad_fn", "gradients", dict(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"w": shape(2, 3)}, "gradients with the tree of params"),
        ([shape(3), shape(2, 3)], "gradients with the tree of params"),
        (shape(9), "gradients with the tree of params"),
        (
            PARAMS | {"w": shape(3, 2)},
            r"float32 of shape \(3, 2\) for params\['w'\], float32.*2, 3",
        ),
        (PARAMS | {"b": shape(1)}, r"float32 of shape \(1,\) for params\['b'\]"),
        (
            PARAMS | {"b": shape(3, dtype=jnp.bfloat16)},
            r"bfloat16 of shape \(3,\) for params\['b'\]",
        ),
    ],
)
def test_gradients_of_another_tree_shape_or_dtype_are_refused(gradients, message):
    with pytest.raises(TypeError, match=f"value_and_grad_fn must return.*{message}"):
        callables.check_like_params("value_and_grad_fn", "gradients", gradients, PARAMS)
