"""Gradients written in NumPy: the right ones pass, and every planted fault is found and named."""

import re
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from keys import rng_of

import jaxnn
from jaxnn.gradients import functions

KEY = jax.random.key(4)
ROWS, NAMES = 7, ("b0", "b1", "b2", "w0", "w1", "w2")
RNG = np.random.default_rng(3)
DATA = {"x": RNG.normal(0.5, 1.0, (ROWS, 2)), "y": RNG.integers(0, 3, ROWS), "l2": np.array(0.05)}
SIZES = {"w0": (2, 4), "b0": (4,), "w1": (4, 4), "b1": (4,), "w2": (4, 3), "b2": (3,)}


def sample(key):
    rng = rng_of(key)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SIZES.items()}


def forward(params, x, maximum, tanh):
    h0 = x @ params["w0"] + params["b0"][None, :]
    h1 = maximum(h0, 0)
    h2 = tanh(h1 @ params["w1"] + params["b1"][None, :])
    return h0, h1, h2, h2 @ params["w2"] + params["b2"][None, :]


def loss_in(library, params, batch):
    """A network 2-4-4-3 with relu and tanh, its cross-entropy and a penalty on the weights."""
    z = forward(params, batch["x"], library.maximum, library.tanh)[-1]
    z = z - library.max(z, axis=1)[:, None]
    rows = library.log(library.sum(library.exp(z), axis=1)) - z[np.arange(ROWS), batch["y"]]
    squares = sum(library.sum(params[name] ** 2) for name in ("w0", "w1", "w2"))
    return library.mean(rows) + batch["l2"] * squares


LOSSES = {"numpy": partial(loss_in, np), "jax": partial(loss_in, jnp)}


def by_hand(fault, params, batch):
    x, y, l2 = batch["x"], batch["y"], 2 * batch["l2"]
    h0, h1, h2, z = forward(params, x, np.maximum, np.tanh)
    d2 = np.exp(z - z.max(axis=1, keepdims=True))
    d2 /= d2.sum(axis=1, keepdims=True)
    d2[np.arange(ROWS), y] -= 1
    d2 *= {"sign": -1 / ROWS, "no 1/N": 1, "1/N twice": ROWS**-2}.get(fault, 1 / ROWS)
    d1 = (d2 @ params["w2"].T) * (1 - (np.tanh(h2) if fault == "tanh" else h2) ** 2)
    d0 = d1 @ (params["w1"] if fault == "not transposed" else params["w1"].T)
    if fault != "relu":
        d0[h0 <= 0] = 0
    d2, d1, d0 = (0 * d if fault == "no data" else d for d in (d2, d1, d0))
    gradient = {"b0": d0.sum(0), "b1": d1.sum(0), "b2": d2.sum(0)}
    for name, inputs, d in (("w0", x, d0), ("w1", h1, d1), ("w2", h2, d2)):
        gradient[name] = inputs.T @ d + (0 if fault == "no penalty" else l2) * params[name]
    if fault == "transposed":
        gradient["w1"] = gradient["w1"].T
    if fault == "penalty once":
        gradient["w2"] -= l2 / 2 * params["w2"]
    if fault == "half a bias":
        gradient["b1"] /= 2
    if fault == "slightly":
        gradient["w1"][1, 2] += 1e-3
    return loss_in(np, params, batch), gradient


class Fault(NamedTuple):
    """A planted fault: the leaves that it reaches, and what is said of weights and of biases."""

    leaves: str
    weights: str
    biases: str = "no biases are wrong"


ALL = "b0 b1 b2 w0 w1 w2"
PENALTY = r"apart from a penalty, whose gradient is 0\.1 times the params: "
LEFT_OUT = " times the params: a penalty, left out, or its factor 2 forgotten$"
FAULTS = {
    "sign": Fault(ALL, PENALTY + "of the wrong sign$", "of the wrong sign$"),
    "no 1/N": Fault(ALL, PENALTY + r"7 times too large: 1/7 is missing \(7 rows\)", "^7 times"),
    "1/N twice": Fault(ALL, PENALTY + ".*1/7 is there twice", "^7 times too small: 1/7"),
    "no data": Fault(ALL, "^it is 0.1 times the params, as of a pen", "^it is 0: left out"),
    "no penalty": Fault("w0 w1 w2", r"^lacks 0\.1" + LEFT_OUT),
    "penalty once": Fault("w2", r"^lacks 0\.05" + LEFT_OUT),
    "transposed": Fault("w1", "^transposed$"),
    "not transposed": Fault("b0 w0", *2 * (r"^right where params\['w1'\] is symmetric",)),
    "relu": Fault("b0 w0", *2 * ("relu's derivative is not 0 for units that are off",)),
    "tanh": Fault("b0 b1 w0 w1", *2 * (r"right only as the params go to 0.*taken at its output",)),
    "half a bias": Fault("b1", "", "^2 times too small"),
    "slightly": Fault("w1", "^wrong in 1 of 16 coordinates, and right in the others$"),
}  # fmt: skip


@cache
def check(loss, fault="none") -> Any:
    given = KEY, LOSSES[loss], partial(by_hand, fault), sample, DATA
    return jaxnn.check_gradients(*given, num_samples=3)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_right_gradient_in_numpy_passes_and_the_report_says_who_spoke(loss):
    report, is_numpy = check(loss), loss == "numpy"
    assert report.passed, str(report)
    assert (report.num_samples, report.suggestions, report.value_error) == (3, (), 0)
    for leaf in report.leaves:
        assert np.isnan(leaf.error) if is_numpy else leaf.error < 1e-12
        assert leaf.difference_error < 1e-6
        assert leaf.ratio == pytest.approx(1, abs=1e-6)
    called = [
        re.match(r"JAX cannot trace (\w+), which is called in NumPy", n) for n in report.notes
    ]
    assert [each and each[1] for each in called] == ["loss_fn"] * is_numpy + ["value_and_grad_fn"]
    assert ("there is no jax.grad" in report.notes[0]) == is_numpy
    column = [row.split()[-5] for row in str(report).splitlines()[2:8]]
    assert (column == ["-"] * 6) == is_numpy
    assert "0.0e+00" not in str(report)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_numpy_is_found_and_named_in_the_leaves_it_reaches(name, loss):
    fault, report = FAULTS[name], check(loss, name)
    wrong = [f"params['{leaf}']" for leaf in fault.leaves.split()]
    assert [leaf.name for leaf in report.leaves if not leaf.passed] == wrong
    assert not report.passed
    assert report.worst.name in wrong
    said = {}
    for suggestion in report.suggestions:
        leaves, sentence = suggestion.split(": ", 1)
        said |= dict.fromkeys(leaves.split(", "), sentence)
    assert sorted(said) == wrong
    for leaf, sentence in said.items():
        expected = fault.weights if leaf.startswith("params['w") else fault.biases
        assert re.search(expected, sentence), (leaf, sentence)


def test_it_sees_the_samples_and_the_batch_that_jax_sees_in_float64():
    seen: list[Any] = []

    def watching(params, batch):
        seen.append((params, batch))
        return by_hand("none", params, batch)

    jaxnn.check_gradients(KEY, LOSSES["jax"], watching, sample, DATA, num_samples=3)
    arrays = [leaf for leaf in jax.tree.leaves(seen[-1]) if leaf.ndim]
    assert all(type(leaf) is np.ndarray and not leaf.flags.writeable for leaf in arrays)
    assert {leaf.dtype.kind for leaf in arrays} == {"f", "i"}
    assert {leaf.dtype.itemsize for leaf in arrays if leaf.dtype.kind == "f"} == {8}
    report = check("jax", "sign")
    drawn = sample(report.worst_key)
    place = report.worst.coordinate
    values = {name: np.float64(leaf) for name, leaf in drawn.items()}
    rounded = DATA | {name: np.float64(np.float32(DATA[name])) for name in ("x", "l2")}
    name = report.worst.name[8:10]
    assert by_hand("sign", values, rounded)[1][name][place] == report.worst.gradient


def test_kinks_and_slopes_beside_them_are_judged_by_the_differences():
    """Of |x| at 0 all slopes from -1 to 1 are right."""

    def absolute(params, batch):
        return np.sum(np.abs(params))

    def by_hand(slope, params, batch):
        return absolute(params, batch), np.array([slope, 1.0])

    for slope in (-1, 0, 0.3, 1, 1.1, -1.001):
        given = absolute, partial(by_hand, slope), np.array([0.0, 2.0]), None
        report = jaxnn.check_gradients(KEY, *given)
        assert report.passed == (abs(slope) <= 1)
        assert report.leaves[0].num_kinks == 1


def scaled(factor, params, batch):
    value, gradient = jax.value_and_grad(LOSSES["jax"])(params, batch)
    return value, jax.tree.map(lambda leaf: factor * leaf, gradient)


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_a_gradient_in_jax_is_checked_against_a_loss_in_numpy(factor):
    given = KEY, LOSSES["numpy"], Partial(scaled, np.float64(factor)), sample, DATA
    report = jaxnn.check_gradients(*given, num_samples=3)
    assert report.passed == (factor == 1)
    assert [note.split()[3] for note in report.notes] == ["loss_fn,"]


def square(params, batch):
    return np.sum(np.square(params))


def with_gradient(gradient):
    return lambda params, batch: (square(np.ones(2), batch), gradient(params))


def overwriting(params):
    params *= np.sign(params)
    return params


def out_of_range(params):
    params = 1 * params
    params[0] = params[1]
    return params[5]


def random_gradient(params):
    return np.add(params, np.random.default_rng().normal())


@pytest.mark.parametrize(
    ("gradient", "error", "message"),
    [
        (overwriting, ValueError, "output array is read-only"),
        (random_gradient, ValueError, "must return the same when it is called again"),
        (lambda params: 2 * params[None], TypeError, r"like params; got float64 of shape \(1, 2\)"),
        (lambda params: np.float32(2 * params), TypeError, "like params; got float32"),
        (lambda params: list(2 * params), TypeError, "with the tree of params"),
        (out_of_range, IndexError, "index 5 is out of bounds"),
    ],
)
def test_what_cannot_be_checked_is_refused_by_name(gradient, error, message):
    with pytest.raises(error, match=message) as raised:
        jaxnn.check_gradients(KEY, square, with_gradient(gradient), np.ones(2), None)
    said = [str(raised.value), *getattr(raised.value, "__notes__", [])]
    assert any("value_and_grad_fn" in line for line in said)


def test_an_error_of_a_function_in_jax_is_its_own_and_not_that_of_numpy():
    def loss(params, batch):
        return jnp.sum(params.at[0].set(0) @ jnp.ones(3))

    with pytest.raises(TypeError, match="dot_general requires contracting dimensions") as raised:
        jaxnn.check_gradients(KEY, loss, jax.value_and_grad(loss), np.ones(2), None)
    notes = raised.value.__notes__
    assert any(note.startswith("This came from tracing loss_fn, which was given") for note in notes)


def test_functions_that_trace_stay_in_jax():
    def of_operators(params, batch):
        return (params * params).sum()

    by_jax, _ = functions.traced_or_numpy("loss_fn", of_operators, np.ones(2), None)
    assert not isinstance(by_jax, functions.NumpyFunction)
