"""The border functions: what passes, in which form, and what is refused in which words."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.tree_util import Partial
from keys import KEY_IMPLEMENTATIONS

from jaxnn.run import checks

KEY = jax.random.key(3)


@pytest.mark.parametrize("implementation", KEY_IMPLEMENTATIONS)
def test_as_key_returns_a_typed_key_itself(implementation):
    key = jax.random.key(5, impl=implementation)
    assert checks.as_key("key", key) is key


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (None, TypeError, r"seed_key must be a single typed key.*got None"),
        (np.arange(2, dtype=np.uint32), TypeError, "seed_key must be.*dtype uint32"),
        (jax.random.PRNGKey(0), TypeError, r"seed_key must be.*dtype uint32 and shape \(2,\)"),
        (jax.random.split(KEY, 3), ValueError, r"seed_key must be.*keys of shape \(3,\)"),
        (jax.random.key(0, impl="rbg"), ValueError, "seed_key must be of.*threefry2x32.*got rbg"),
    ],
)
def test_as_key_refuses(key, error, message):
    with pytest.raises(error, match=message):
        checks.as_key("seed_key", key)


def test_as_key_refuses_a_tracer_unless_told_otherwise():
    with pytest.raises(TypeError, match="seed_key must be concrete; got a tracer"):
        jax.jit(lambda key: checks.as_key("seed_key", key))(KEY)
    same = jax.jit(lambda key: checks.as_key("seed_key", key, traced=True))(KEY)
    assert jnp.array_equal(jax.random.key_data(same), jax.random.key_data(KEY))
    with pytest.raises(ValueError, match=r"seed_key must be of.*got rbg"):
        jax.jit(lambda key: checks.as_key("seed_key", key, traced=True))(
            jax.random.key(0, impl="rbg")
        )


@pytest.mark.parametrize(
    "value",
    [
        *(3, np.int64(3), np.uint8(3), np.array(3), np.int32(3), jnp.int32(3)),
        *(3.0, np.float32(3), np.float16(3), np.longdouble(3), np.array(3.0), jnp.float32(3)),
    ],
)
def test_as_count_returns_a_python_int(value):
    count = checks.as_count("num_steps", value, minimum=3)
    assert type(count) is int
    assert count == 3


@pytest.mark.parametrize("value", [2**31, 2**53 + 1, 2**63])
def test_as_count_is_exact_up_to_its_maximum(value):
    assert checks.as_count("start", value) == value
    with pytest.raises(ValueError, match=f"start must be at most {value - 1}; got {value}"):
        checks.as_count("start", value, maximum=value - 1)


def test_as_count_takes_whole_floats_as_far_as_they_stand_for_one_integer_alone():
    assert checks.as_count("num_steps", 1e5) == 100_000
    assert checks.as_count("num_steps", 2.0**53) == 2**53
    assert checks.as_count("num_steps", np.float32(2**24)) == 2**24
    for rounded in (2.0**53 + 2, 1e17, np.float32(2**24 + 2), np.float16(2**11 + 2)):
        with pytest.raises(TypeError, match=r"^num_steps must be an integer.*; got "):
            checks.as_count("num_steps", rounded)
    with pytest.raises(ValueError, match=r"^num_steps must be at most 100; got 200$"):
        checks.as_count("num_steps", 200.0, maximum=100)


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (2, ValueError, "2"),
        (-1, ValueError, "-1"),
        (3.5, TypeError, r"3.5 \(float\)"),
        (1e300, TypeError, r"1e\+300 \(float\)"),
        (math.nan, TypeError, r"nan \(float\)"),
        (True, TypeError, r"True \(bool\)"),
        (np.True_, TypeError, "dtype bool"),
        ("3", TypeError, r"'3' \(str\)"),
        (None, TypeError, "None"),
        ([3], TypeError, "a list"),
        (np.array([3]), TypeError, r"dtype int64 and shape \(1,\)"),
        (3 + 0j, TypeError, "complex"),
    ],
)
def test_as_count_refuses(value, error, got):
    with pytest.raises(error, match=f"^num_steps must be an integer of at least 3; got .*{got}"):
        checks.as_count("num_steps", value, minimum=3)


@pytest.mark.parametrize("value", [0.25, np.float64(0.25), np.float32(0.25), jnp.float32(0.25)])
def test_as_real_returns_a_float32(value):
    number = checks.as_real("scale", value)
    assert type(number) is np.float32
    assert number == 0.25


def test_as_real_bounds():
    assert checks.as_real("noise", 0, inclusive=True) == 0
    assert checks.as_real("offset", -2.5, minimum=-math.inf) == -2.5
    with pytest.raises(
        ValueError, match=r"decay must be a finite number above 1 that fits float32; got 1\.0"
    ):
        checks.as_real("decay", 1.0, minimum=1.0)
    with pytest.raises(ValueError, match="decay must be a finite number of at least 1"):
        checks.as_real("decay", 0.5, minimum=1.0, inclusive=True)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-0.1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (1e39, ValueError),
        (1e-50, ValueError),
        (True, TypeError),
        ("0.1", TypeError),
        (0.1 + 0j, TypeError),
        ([0.1], TypeError),
        (jnp.ones((2, 3)), TypeError),
        (KEY, TypeError),
    ],
)
def test_as_real_refuses(value, error):
    with pytest.raises(error, match=r"^scale must be a finite number above 0.*; got "):
        checks.as_real("scale", value)


def test_as_real_passes_a_traced_number_but_no_traced_array():
    assert jax.jit(lambda scale: 2 * checks.as_real("scale", scale))(0.25) == 0.5
    assert jax.vmap(lambda scale: checks.as_real("scale", scale))(jnp.ones(3)).shape == (3,)
    with pytest.raises(TypeError, match=r"scale must be.*got a tracer of shape \(3,\)"):
        jax.jit(lambda scale: checks.as_real("scale", scale))(jnp.ones(3))


def test_as_choice():
    options = ("relu", "tanh")
    assert checks.as_choice("hidden", "tanh", options) == "tanh"
    with pytest.raises(ValueError, match="hidden must be one of 'relu', 'tanh'; got 'Relu'"):
        checks.as_choice("hidden", "Relu", options)
    with pytest.raises(TypeError, match="hidden must be one of 'relu', 'tanh'; got a function"):
        checks.as_choice("hidden", test_as_choice, options)


NATIVE = np.array([[1.5, -2.0], [3.25, 1e-3]])


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2", "<f4", ">u8", ">f2"])
def test_numbers_in_any_byte_order_are_the_same_numbers_in_the_machines_own(dtype):
    native = abs(NATIVE).astype(np.dtype(dtype).newbyteorder("="))
    got = checks.as_numpy("x", native.astype(dtype))
    assert got.dtype == native.dtype
    assert got.dtype.isnative
    np.testing.assert_array_equal(got, native)
    np.testing.assert_array_equal(
        checks.as_arrays("x", native.astype(dtype)), native.astype(np.float32)
    )


def test_a_long_double_becomes_a_float64_and_must_fit_it():
    got = checks.as_numpy("x", NATIVE.astype(np.longdouble))
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, NATIVE)
    assert checks.as_arrays("x", NATIVE.astype(np.longdouble)).dtype == jnp.float32
    if np.finfo(np.longdouble).maxexp > 1024:
        beyond = np.array([1, -(np.longdouble(1e300) ** 2)])
        with pytest.raises(
            ValueError, match=r"^x must fit float64; got magnitudes up to 1\.0*\d*e\+600$"
        ):
            checks.as_values("x", beyond)
    with pytest.raises(ValueError, match=r"^x must fit float32; got magnitudes up to 1e\+300$"):
        checks.as_values("x", np.array([1, np.longdouble(1e300)]))


def test_masked_entries_are_refused_and_a_mask_of_none_passes():
    masked = np.ma.masked_array(NATIVE, NATIVE < 0)
    with pytest.raises(ValueError, match=r"^x must have no masked entries; got 1$"):
        checks.as_numpy("x", masked)
    np.testing.assert_array_equal(checks.as_numpy("x", np.ma.masked_array(NATIVE)), NATIVE)


TEXT = np.array(["cat", "dog"])


def texts():
    yield from (TEXT, TEXT.tolist(), TEXT.astype(object), TEXT.astype("S"))
    yield np.array([None, "dog"], object)
    if pandas := pytest.importorskip("pandas"):
        yield from (pandas.Series(TEXT), pandas.Series(TEXT, dtype="category"))


def test_text_is_refused_with_the_line_that_turns_labels_into_classes():
    line = re.escape("`classes, y = np.unique(labels, return_inverse=True)`")
    message = rf"^y(\[0\])? must be .* real numbers; got dtype.*: {line}"
    for labels in texts():
        for border in (checks.as_numpy, checks.as_values, checks.as_arrays):
            with pytest.raises(TypeError, match=message):
                border("y", labels)
    classes, y = np.unique(TEXT, return_inverse=True)
    np.testing.assert_array_equal(classes[checks.as_arrays("y", y)], TEXT)


NO_NUMBERS = [
    ([[1.0, 2.0], [3.0]], ValueError, "ragged rows"),
    (np.array([1, "a", None], object), TypeError, "dtype object"),
    (np.array([[1.5, True]], object), TypeError, "dtype object: .astype(float) converts"),
    (scipy.sparse.eye(3), TypeError, "dtype object"),
    ("one", TypeError, "dtype <U3"),
    (np.ones(3, complex), TypeError, "dtype complex128"),
    (None, TypeError, "dtype object"),
    (np.array(["2026-10-01"], "datetime64[D]"), TypeError, "dtype datetime64"),
    (jnp.ones(3, jnp.bfloat16), TypeError, "dtype bfloat16"),
    (jax.random.split(KEY, 3), TypeError, "dtype key<fry>"),
]


@pytest.mark.parametrize(("value", "error", "got"), NO_NUMBERS)
@pytest.mark.parametrize("function", [checks.as_numpy, checks.as_values])
def test_arrays_without_real_numbers_are_refused(function, value, error, got):
    with pytest.raises(error, match=f"^x must be an array of .*numbers; got .*{re.escape(got)}"):
        function("x", value)


TOO_LARGE = [
    (np.array([[0.0, -1e300]]), "must fit float32; got magnitudes up to 1e[+]300"),
    (np.array([0, 2**40]), "must fit int32; got 0 to 1099511627776"),
    (np.array([2**32], np.uint64), "must fit uint32; got 4294967296"),
]


@pytest.mark.parametrize(("value", "message"), TOO_LARGE)
@pytest.mark.parametrize("function", [checks.as_values, checks.as_arrays])
def test_values_that_jax_would_lose_are_refused(function, value, message):
    with pytest.raises(ValueError, match="^x " + message):
        function("x", value)
    with jax.enable_x64(True):
        assert np.array_equal(function("x", value), value)


def test_as_values_keeps_data_nonfinite_numbers_and_tracers():
    array = np.array([1.5, np.nan, np.inf])
    assert checks.as_values("x", array) is array
    assert jax.jit(lambda x: checks.as_values("x", x) + 1)(np.float32(1)) == 2
    for value in (jnp.ones(2, jnp.complex64), jnp.ones(2, jnp.bfloat16), KEY):
        with pytest.raises(TypeError, match="x must be an array of real numbers; got dtype"):
            jax.jit(lambda x: checks.as_values("x", x))(value)


def test_as_arrays_narrows_to_the_default_widths_and_keeps_the_tree():
    tree = {"x": np.array([1.5, 2.5]), "y": (np.array([1, 2]), None, KEY), "z": 3.5}
    arrays = checks.as_arrays("batch", tree)
    assert jax.tree.structure(arrays) == jax.tree.structure(tree)
    assert arrays["x"].dtype == jnp.float32
    assert arrays["y"][0].dtype == jnp.int32
    assert arrays["y"][2] is KEY
    np.testing.assert_array_equal(arrays["x"], tree["x"])
    np.testing.assert_array_equal(arrays["y"][0], tree["y"][0])
    assert arrays["z"] == 3.5
    with jax.enable_x64(True):
        assert checks.as_arrays("batch", tree)["x"].dtype == jnp.float64


class Plain(NamedTuple):
    x: Any
    y: Any = None


@checks.array_record
class Rows(NamedTuple):
    x: Any
    y: Any = None


def test_a_list_is_an_array_in_a_field_of_a_record_and_a_container_elsewhere():
    lists = [[1.0, 2.0], [3.0, 4.0]]
    inside = checks.as_arrays("batch", {"rows": Rows(lists, (1, 0)), "plain": Plain(lists)})
    np.testing.assert_array_equal(inside["rows"].x, lists)
    np.testing.assert_array_equal(inside["rows"].y, [1, 0])
    assert inside["plain"].x == lists
    parts = checks.as_arrays("batch", Rows((np.ones(2), np.zeros((2, 3))), {"a": 1.5}))
    assert [part.shape for part in parts.x] == [(2,), (2, 3)]
    assert parts.y == {"a": 1.5}
    assert checks.as_arrays("batch", Rows((), None)) == Rows((), None)
    with pytest.raises(ValueError, match=r"^batch\['rows'\]\.x must be .*; got ragged rows"):
        checks.as_arrays("batch", {"rows": Rows([[1.0], [2.0, 3.0]])})
    with pytest.raises(TypeError, match=r"^batch\.y\['a'\] must be an array of real numbers"):
        checks.as_arrays("batch", Rows(1.0, {"a": "text"}))


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": [np.ones(2), np.array([1e300])]}, ValueError, r"batch\['a'\]\[1\] must fit float32"),
        ((np.ones(2), "text"), TypeError, r"batch\[1\] must be an array of real numbers"),
        ([np.array([2**31])], ValueError, r"batch\[0\] must fit int32; got 2147483648"),
    ],
)
def test_as_arrays_names_the_leaf(tree, error, message):
    with pytest.raises(error, match=message):
        checks.as_arrays("batch", tree)


F32 = jnp.float32


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def scaled_sum(scale, x):
    return scale * jnp.sum(x)


def test_a_function_becomes_a_partial_and_a_partial_stays_itself():
    wrapped = checks.as_partial("loss_fn", scaled_sum)
    assert isinstance(wrapped, Partial)
    assert wrapped(np.float32(2), jnp.ones(3)) == 6
    assert checks.as_partial("loss_fn", wrapped) is wrapped
    same = checks.as_partial("loss_fn", scaled_sum)
    assert jax.tree.structure(wrapped) == jax.tree.structure(same)


def test_params_become_float32_arrays_in_their_own_tree():
    got = checks.as_params({"w": np.ones((2, 3)), "b": [np.float64(4), None]})
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
        checks.as_params(params)


PARAMS = {"w": shape(2, 3), "b": shape(3)}


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"w": shape(2, 3)}, "gradients with the tree of params"),
        ([shape(3), shape(2, 3)], "gradients with the tree of params"),
        (
            PARAMS | {"w": shape(3, 2)},
            r"float32 of shape \(3, 2\) where params\['w'\] is float32.*2, 3",
        ),
        (PARAMS | {"b": shape(1)}, r"float32 of shape \(1,\) where params\['b'\]"),
        (
            PARAMS | {"b": shape(3, dtype=jnp.bfloat16)},
            r"bfloat16 of shape \(3,\) where params\['b'\]",
        ),
    ],
)
def test_gradients_of_another_tree_shape_or_dtype_are_refused(gradients, message):
    with pytest.raises(TypeError, match=f"value_and_grad_fn must return.*{message}"):
        checks.check_like("value_and_grad_fn", "gradients", gradients, PARAMS)
