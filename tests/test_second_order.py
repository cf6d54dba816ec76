"""Jacobians and Hessian-vector products by hand: right ones pass, wrong ones are named."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from keys import rng_of

import jaxnn

KEY = jax.random.key(6)
X = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)


def wrong_of(report):
    return [leaf.name for leaf in report.leaves if not leaf.passed]


# --- Jacobians


def sample(key):
    drawn = rng_of(key).normal(size=(3, 3))
    return {"w": drawn[:2], "b": drawn[2]}


def outputs(params, batch, library=jnp):
    """Three outputs: means over the rows, so that none depends on the weights of another."""
    return library.mean(library.tanh(batch @ params["w"] + params["b"][None, :]), axis=0)


def jacobian(params, batch, library=jnp, wrong_output=None):
    """The Jacobian, (3, 2, 3) and (3, 3); the wrong output lacks tanh'."""
    slopes = 1 - library.tanh(batch @ params["w"] + params["b"][None, :]) ** 2
    if wrong_output is not None:
        slopes = library.where(library.arange(3)[None, :] == wrong_output, 1, slopes)
    eye = library.eye(3, dtype=slopes.dtype)
    w = (batch.T @ slopes / len(batch))[None, :, :] * eye[:, None, :]
    return {"w": w, "b": eye * library.mean(slopes, axis=0)[None, :]}


def outputs_in_place(params, batch):
    z = batch @ params["w"]
    z += params["b"]
    return np.mean(np.tanh(z, out=z), axis=0)


def jacobian_in_place(params, batch):
    """It fills arrays of NumPy's own dtype, as one writes it there."""
    slopes = 1 - np.tanh(batch @ params["w"] + params["b"]) ** 2
    filled = {"w": np.zeros((3, 2, 3)), "b": np.eye(3)}
    for number in range(3):
        filled["w"][number, :, number] = batch.T @ slopes[:, number] / len(batch)
        filled["b"][number] *= np.mean(slopes[:, number])
    return filled


NUMPY = outputs_in_place, jacobian_in_place


@pytest.mark.parametrize(
    "functions", [pytest.param((outputs, jacobian), marks=pytest.mark.slow), NUMPY]
)
def test_a_right_jacobian_passes_with_leaves_for_each_output(functions):
    function, by_hand = functions
    report: Any = jaxnn.check_jacobian(KEY, function, by_hand, sample, X, num_samples=3)
    assert report.passed, str(report)
    names = [f"params['output[{number}]']['{leaf}']" for number in range(3) for leaf in "bw"]
    assert [leaf.name for leaf in report.leaves] == names
    assert [leaf.shape for leaf in report.leaves] == [(3,), (2, 3)] * 3
    assert str(report).startswith("Jacobian check passed: 3 samples in float64")
    assert "vs jax.grad" not in str(report)
    assert any("trace function," in note for note in report.notes) == (functions is NUMPY)


def test_a_wrong_row_of_a_jacobian_is_named_and_can_be_had_again():
    wrong = partial(jacobian, wrong_output=1)
    report: Any = jaxnn.check_jacobian(KEY, outputs, wrong, sample, X, num_samples=3)
    assert wrong_of(report) == ["params['output[1]']['b']", "params['output[1]']['w']"]
    assert "tanh' is 1 - tanh(z)^2" in " ".join(report.suggestions)
    leaf, at = report.worst.name[-3], (1, *report.worst.coordinate)
    again = sample(report.worst_key)
    told = report.worst.expected, report.worst.gradient
    slopes = [float(jacobian(again, X, np, output)[leaf][at]) for output in (None, 1)]
    assert told == pytest.approx(slopes, rel=1e-5)


def squares(params, batch):
    return params**2


def squares_set(params, batch):
    """The same, of JAX arrays alone."""
    return params.at[:].set(params**2)


def slopes_set(params, batch):
    return jnp.zeros((2, 2), params.dtype).at[(0, 1), (0, 1)].set(2 * params)


def squares_in_place(params, batch):
    out = params.copy()
    out[:] = params**2
    return out


def slopes_in_place(params, batch):
    out = np.eye(2)
    out *= 2 * params
    return out


@pytest.mark.parametrize(
    ("function", "by_hand"),
    [
        pytest.param(squares_set, slopes_in_place, marks=pytest.mark.slow),
        (squares_in_place, slopes_set),
    ],
)
def test_one_in_numpy_the_other_in_jax_and_a_sampler_of_either(function, by_hand):
    def numpy_sampler(key):
        return np.asarray(normal(key))

    normal = partial(jax.random.normal, shape=(2,))
    reports: Any = [
        jaxnn.check_jacobian(KEY, function, by_hand, sampler, None, num_samples=3)
        for sampler in (normal, numpy_sampler)
    ]
    assert reports[0].passed, str(reports[0])
    assert str(reports[0]) == str(reports[1])
    wrong: Any = jaxnn.check_jacobian(
        KEY, function, lambda *both: by_hand(*both) * np.array([[1, 0.5]]), numpy_sampler, None,
        num_samples=3,
    )  # fmt: skip
    assert wrong_of(wrong) == ["params['output[1]']"]
    assert wrong.leaves[1].ratio == pytest.approx(0.5)
    expected = 2 * numpy_sampler(wrong.worst_key)[1]
    assert wrong.worst.expected == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_many_outputs_are_named_in_order():
    start = np.arange(1, 13, dtype=np.float32)

    def by_hand(error, params, batch):
        return 2 * jnp.diag(params) + jnp.zeros((12, 12)).at[10, 3].set(error)

    for error, wrong in ((0.0, []), (0.01, ["params['output[10]']"])):
        report: Any = jaxnn.check_jacobian(KEY, squares, partial(by_hand, error), start, None)
        assert [leaf.name for leaf in report.leaves][1:12:9] == [
            "params['output[01]']", "params['output[10]']"
        ]  # fmt: skip
        assert wrong_of(report) == wrong
    assert report.worst.coordinate == (3,)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        pytest.param(
            lambda params, batch: params[:, None] * params[None, :],
            "params['output[1, 0]']",
            marks=pytest.mark.slow,
        ),
        (lambda params, batch: jnp.prod(params), "params['output']"),
    ],
)
def test_outputs_of_any_shape_are_named_by_their_place(function, name):
    start = np.array([2, 3], np.float32)
    right = jax.jacobian(function)
    assert jaxnn.check_jacobian(KEY, function, right, start, None).passed
    off = np.zeros(right(start, None).shape, np.float32)
    off.reshape(-1, 2)[-1 if off.ndim == 1 else 2, 1] = 1

    def wrong(params, batch):
        return right(params, batch) + off.astype(params.dtype)

    report: Any = jaxnn.check_jacobian(KEY, function, wrong, start, None)
    assert wrong_of(report) == [name]


@pytest.mark.parametrize(
    ("function", "jacobian_fn", "message"),
    [
        (lambda params, batch: (params, params), jax.jacobian(squares), "function must return an"),
        (lambda params, batch: params > 0, squares, "function must .*; got bool of shape"),
        (lambda params, batch: np.float32(params), squares, "function must .*; got float32 of"),
        (
            squares,
            squares,
            r"jacobian_fn must return a Jacobian like jax.jacobian\(function\); got float64 of "
            r"shape \(2,\) where jax.jacobian\(function\) is float64 of shape \(2, 2\)$",
        ),
        (squares, lambda params, batch: [params], "jacobian_fn must return a Jacobian with the tr"),
    ],
)
def test_what_is_no_jacobian_is_refused_by_name(function, jacobian_fn, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        jaxnn.check_jacobian(KEY, function, jacobian_fn, np.ones(2, np.float32), None)


@pytest.mark.slow
def test_a_leaf_without_numbers_has_a_jacobian_without_numbers():
    def first(params, batch):
        return params[0] ** 2

    start = [np.ones(2, np.float32), np.zeros(0, np.float32)]
    report: Any = jaxnn.check_jacobian(KEY, first, jax.jacobian(first), start, None)
    assert report.passed
    assert [leaf.shape for leaf in report.leaves] == [(2,), (0,)] * 2


def test_a_function_without_outputs_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^function must return at least one number; got .*0"):
        jaxnn.check_jacobian(KEY, lambda p, batch: p[:0], squares, np.ones(2, np.float32), None)


@pytest.mark.parametrize("check", [jaxnn.check_jacobian, jaxnn.check_hvp])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        (0, "key must be a single typed key"),
        (1, "(function|loss_fn) must be callable"),
        (2, "(jacobian|hvp)_fn must be callable"),
    ],
)
def test_what_no_check_takes_is_refused_by_name(check, place, message):
    given: list[Any] = [KEY, squares, squares, np.ones(2, np.float32), None]
    with pytest.raises(TypeError, match=rf"^certify must be left out of {check.__name__}:"):
        check(*given, certify=True)
    given[place] = None
    with pytest.raises(TypeError, match=f"^{message}"):
        check(*given)


# --- Hessian-vector products

MATRIX = np.random.default_rng(2).normal(size=(3, 3)).astype(np.float32)


def bilinear(params, batch):
    return params["a"] @ batch @ params["b"] + jnp.sum(params["b"] ** 3)


def product(wrong, params, v, batch):
    """Of the blocks 0, M; M^T, 6 b; the wrong one has M for M^T."""
    below = jnp.where(wrong, batch, batch.T)
    return {"a": batch @ v["b"], "b": below @ v["a"] + 6 * params["b"] * v["b"]}


def vectors(key):
    a, b = rng_of(key).normal(size=(2, 3))
    return {"a": a, "b": b}


def test_a_right_product_passes_and_a_wrong_block_of_the_hessian_is_found_in_its_leaf():
    reports: Any = [
        jaxnn.check_hvp(KEY, bilinear, Partial(product, wrong), vectors, MATRIX, num_samples=5)
        for wrong in (np.bool_(False), np.bool_(True))
    ]
    right, wrong = reports
    assert right.passed, str(right)
    assert max(leaf.error for leaf in right.leaves) < 1e-12
    assert wrong_of(wrong) == ["params['b']"]
    assert (wrong.num_samples, wrong.value_error) == (5, 0)
    assert str(wrong).startswith("Hessian-vector product check FAILED: 5 samples")
    assert re.search(r" vs jax +vs differences ", str(wrong))


def test_of_a_product_no_hint_speaks_of_outputs():
    """A term is left out in every leaf, `0.2 * direction`."""

    def without_penalty(params, v, batch):
        return jax.tree.map(lambda leaf, v: leaf - 0.2 * v, product(False, params, v, batch), v)

    report: Any = jaxnn.check_hvp(KEY, bilinear, without_penalty, vectors, MATRIX, num_samples=5)
    assert wrong_of(report) == ["params['a']", "params['b']"]
    assert report.suggestions
    assert "outputs" not in str(report.suggestions)


def test_a_product_in_numpy_may_work_in_place():
    def in_place(params, v, batch):
        out = v.copy()
        out *= 12 * params**2
        return out

    def quartic(params, batch):
        return jnp.sum(params**4)

    report: Any = jaxnn.check_hvp(KEY, quartic, in_place, np.array([1.0, -2, 0.5]), None)
    assert report.passed, str(report)
    assert report.leaves[0].error < 1e-12


def forward_over_reverse(loss, factor, params, v, batch):
    product = jax.jvp(lambda p: jax.grad(loss)(p, batch), (params,), (v,))[1]
    return jax.tree.map(lambda leaf: factor * leaf, product)


@pytest.mark.slow
def test_the_product_of_a_network_passes_and_its_factor_is_named():
    model = jaxnn.mlp((2, 3, 3), hidden="tanh")
    batch = jaxnn.Batch(X, np.array([0, 1, 2, 1, 0]))
    for factor in (1.0, 0.5):
        by_hand = partial(forward_over_reverse, model.loss_reference, factor)
        report: Any = jaxnn.check_hvp(
            KEY, model.loss_reference, by_hand, model.sampler(scale=1.0), batch
        )
        assert report.passed == (factor == 1)
    assert all("2 times too small" in suggestion for suggestion in report.suggestions)


def test_what_is_no_product_is_refused_by_name():
    start = np.ones(3, np.float32)
    with pytest.raises(TypeError, match=r"^hvp_fn must return a product like params; got"):
        jaxnn.check_hvp(KEY, squares, lambda params, v, batch: v[:2], start, None)
    with pytest.raises(TypeError, match=r"^hvp_fn must return a product with the tree of params"):
        jaxnn.check_hvp(KEY, squares, lambda params, v, batch: (v,), start, None)
    in_numpy = lambda params, batch: np.sum(np.asarray(params) ** 2)  # noqa: E731
    with pytest.raises(TypeError, match="loss_fn must be a function that JAX can trace; got one"):
        jaxnn.check_hvp(KEY, in_numpy, lambda params, v, batch: 2 * v, start, None)
