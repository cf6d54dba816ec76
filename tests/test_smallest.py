"""A wrong gradient shrinks to a case that one can follow by hand, and stays as wrong as it was."""

import contextlib
import io
import re
import runpy
import sys
from collections import namedtuple
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from keys import rng_of

import jaxnn
from jaxnn.gradients import check as gradient_check
from jaxnn.gradients.counterexample import Counterexample, script_of
from jaxnn.gradients.functions import NumpyFunction, Problem
from jaxnn.gradients.smallest import shrink

KEY = jax.random.key(5)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine finds the same as a quiet one."""
    monkeypatch.setattr(gradient_check, "shrink", partial(shrink, max_seconds=120))


def smallest(loss, by_hand, sampler, batch, **options) -> Any:
    report = jaxnn.check_gradients(KEY, loss, by_hand, sampler, batch, certify=True, **options)
    assert not report.passed
    return report.smallest


# --- mlrose's network, whose gradient takes the derivative of tanh at its output

SHAPES = {"w0": (4, 6), "b0": (6,), "w1": (6, 3), "b1": (3,)}
RNG = np.random.default_rng(2)
ROWS = {"x": RNG.normal(size=(12, 4)), "y": np.eye(3)[RNG.integers(0, 3, 12)]}


def sample(key):
    rng = rng_of(key)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def outputs(library, params, x):
    hidden = library.tanh(x @ params["w0"] + params["b0"][None])
    return hidden, hidden @ params["w1"] + params["b1"][None]


def loss_in(library, params, batch):
    z = outputs(library, params, batch["x"])[1]
    z = z - library.max(z, axis=1)[:, None]
    rows = library.log(library.sum(library.exp(z), axis=1)) - library.sum(z * batch["y"], axis=1)
    return library.mean(rows)


def mlrose_in(library, params, batch):
    x, y = batch["x"], batch["y"]
    hidden, z = outputs(library, params, x)
    p = library.exp(z - library.max(z, axis=1)[:, None])
    d1 = (p / library.sum(p, axis=1)[:, None] - y) / len(y)
    d0 = (d1 @ params["w1"].T) * (1 - library.tanh(hidden) ** 2)
    gradient = {"w0": x.T @ d0, "b0": library.sum(d0, axis=0), "w1": hidden.T @ d1}
    return loss_in(library, params, batch), gradient | {"b1": library.sum(d1, axis=0)}


def numpy_loss(params, batch):
    return loss_in(np, params, batch)


def jax_loss(params, batch):
    return loss_in(jnp, params, batch)


def numpy_mlrose(params, batch):
    return mlrose_in(np, params, batch)


def jax_mlrose(params, batch):
    return mlrose_in(jnp, params, batch)


X64 = 'jax.config.update("jax_enable_x64", True)'


def printed(script, status=1, **functions):
    """The losses, then the numbers under test and the right ones, as a script prints them.

    A script of its own would set x64 for good.
    """
    said, text = io.StringIO(), script.replace(X64, "")
    with contextlib.redirect_stdout(said), jax.enable_x64(True), pytest.raises(SystemExit) as end:
        exec(text, functions)
    assert end.value.code == status
    pairs = re.findall(r"(\S+) under test, (\S+) by", said.getvalue())
    return [tuple(map(float, pair)) for pair in pairs]


EXHAUSTIVE = pytest.param(jax_loss, jax_mlrose, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(("loss", "by_hand"), [(numpy_loss, numpy_mlrose), EXHAUSTIVE])
def test_mlroses_tanh_shrinks_to_one_row_and_one_unit_with_small_integers(loss, by_hand):
    case = smallest(loss, by_hand, sample, ROWS)
    params, batch = case.params, case.batch
    shapes = {name: leaf.shape for name, leaf in (params | batch).items()}
    assert shapes == {"w0": (1, 1), "b0": (1,), "w1": (1, 2), "b1": (2,), "x": (1, 1), "y": (1, 2)}
    numbers = np.concatenate([leaf.ravel() for leaf in (*params.values(), *batch.values())])
    assert set(numbers) <= {-1, 0, 1}
    assert np.sum(batch["y"]) == 1
    # By hand: the slope is (p - y) w1 (1 - a^2), of which mlrose takes tanh(a) for a.
    hidden, z = outputs(np, params, batch["x"])
    back = (np.exp(z) / np.sum(np.exp(z)) - batch["y"]) @ params["w1"].T
    inputs = batch["x"] if case.leaf == "params['w0']" else 1
    right, wrong = (float(np.sum(back * (1 - a**2) * inputs)) for a in (hidden, np.tanh(hidden)))
    assert case.expected == pytest.approx(right, rel=1e-5)
    assert case.gradient == pytest.approx(wrong, rel=1e-9)
    assert abs(wrong - right) > 0.02 * abs(right)
    assert case.leaf in ("params['w0']", "params['b0']")
    # The program says the same.
    assert f"from test_smallest import {by_hand.__name__} as value_and_grad_fn" in case.script
    assert len(case.script.splitlines()) <= 30
    losses, *gradients = printed(case.script)
    assert losses == pytest.approx([numpy_loss(params, batch)] * 2)
    assert gradients == [pytest.approx((wrong, right), rel=1e-5)]


# --- what shrinks, and what does not

NUM_ROWS = 14


def line(params, batch):
    return np.mean(np.square(batch["x"] @ params["w"] + params["b"] - batch["y"]))


def same(number):
    return number


def line_by_hand(rows, change, params, batch):
    """The gradient of `line`; `rows(number)` is what it divides by, `change` the fault."""
    off = batch["x"] @ params["w"] + params["b"] - batch["y"]
    slopes = 2 * off / rows(len(off))
    gradient = {"w": batch["x"].T @ slopes, "b": np.sum(slopes)}
    return line(params, batch), change(gradient, off, batch)


def line_sample(key):
    numbers = rng_of(key).standard_normal(4, np.float32)
    return {"w": numbers[:3], "b": numbers[3]}


def of_line(change, rows=same) -> Any:
    rng = np.random.default_rng(1)
    batch = {"x": rng.normal(size=(NUM_ROWS, 3)), "y": rng.normal(size=NUM_ROWS)}
    return smallest(line, partial(line_by_hand, rows, change), line_sample, batch)


def negative_weights(gradient, *_):
    return gradient | {"w": -gradient["w"]}


def test_rows_and_inputs_shrink_to_one():
    case = of_line(negative_weights)
    assert case.batch["x"].shape == (1, 1)
    assert case.gradient == pytest.approx(-case.expected)
    assert case.where() == str(case).splitlines()[0].removeprefix("smallest case: ")
    assert "value_and_grad_fn = ...  # Your own function goes here." in case.script


def test_what_was_right_stays_right_so_a_number_of_rows_in_the_code_stays():
    case = of_line(negative_weights, rows=lambda number: NUM_ROWS)
    assert case.leaf == "params['w']"
    assert case.batch["x"].shape == (NUM_ROWS, 1)
    assert case.gradient == pytest.approx(-case.expected)


def test_a_fault_of_many_rows_keeps_some():
    """The gradient reads four rows alone."""

    def four_rows(gradient, off, batch):
        return gradient | {"b": 2 * np.sum(off[:4]) / len(off)}

    assert 5 <= len(of_line(four_rows).batch["y"]) <= 9


def test_a_gradient_that_is_not_finite_stays_so_and_the_case_says_what_is_right():
    def nowhere(gradient, *_):
        return gradient | {"b": np.where(gradient["b"] > 1, np.nan, -gradient["b"])}

    case = of_line(nowhere)
    assert np.isnan(case.gradient)
    assert case.expected > 1


def test_losses_that_differ_shrink_too():
    def by_hand(params, batch):
        value, gradient = line_by_hand(same, lambda gradient, *_: gradient, params, batch)
        return value + 1, gradient

    rng = np.random.default_rng(1)
    batch = {"x": rng.normal(size=(9, 3)), "y": rng.normal(size=9)}
    case = smallest(line, by_hand, line_sample, batch)
    assert (case.leaf, case.coordinate, case.batch["x"].shape) == ("loss", (), (1, 1))
    assert case.gradient == pytest.approx(case.expected + 1)


def test_without_time_the_case_is_the_one_that_was_found(monkeypatch):
    monkeypatch.setattr(gradient_check, "shrink", partial(shrink, max_seconds=0))
    case = of_line(negative_weights)
    assert case.batch["x"].shape == (NUM_ROWS, 3)
    assert case.gradient == pytest.approx(-case.expected)
    off = line_by_hand(same, lambda gradient, *_: gradient, case.params, case.batch)[1]["w"]
    assert case.expected == pytest.approx(off[case.coordinate], rel=1e-6)


# --- axes of one length, classes and other data that obey something


def test_of_axes_of_one_length_those_shrink_that_can():
    """Hidden units and classes are 3 each, and the classes are written into the code."""

    def loss(params, batch):
        z = np.tanh(batch["x"] @ params["w0"]) @ params["w1"]
        return np.mean(np.log(np.sum(np.exp(z), axis=1)) - np.sum(z * np.eye(3)[batch["y"]], 1))

    def by_hand(params, batch):
        hidden = np.tanh(batch["x"] @ params["w0"])
        p = np.exp(hidden @ params["w1"])
        back = (p / np.sum(p, axis=1)[:, None] - np.eye(3)[batch["y"]]) / len(p)
        d0 = (back @ params["w1"].T) * (1 - hidden**2) / 2
        return loss(params, batch), {"w0": batch["x"].T @ d0, "w1": hidden.T @ back}

    def sampler(key):
        drawn = rng_of(key).normal(size=(5, 3))
        return {"w0": drawn[:2], "w1": drawn[2:]}

    rng = np.random.default_rng(4)
    case = smallest(
        loss, by_hand, sampler, {"x": rng.normal(size=(5, 2)), "y": rng.integers(0, 3, 5)}
    )
    assert {name: leaf.shape for name, leaf in case.params.items()} == {"w0": (1, 1), "w1": (1, 3)}
    assert case.batch["y"].tolist() in ([0], [1], [2])
    assert case.gradient == pytest.approx(case.expected / 2, rel=1e-5)
    assert f"np.array({case.batch['y'].tolist()}, 'int32')" in case.script


def test_numbers_keep_what_holds_for_the_data():
    """Positive in all samples, from 0 to 1, whole: no logarithm of 0 and no class of 0.37."""

    def loss(params, batch):
        return np.sum(batch["share"] * np.log(params)) + np.sum(batch["count"] * params)

    def by_hand(params, batch):
        return loss(params, batch), batch["share"] / params + 2 * batch["count"]

    def sampler(key):
        return rng_of(key).uniform(0.2, 1, 3)

    batch = {"share": np.array([0.3, 0.2, 0.9]), "count": np.array([3.0, 5.0, 2.0])}
    case = smallest(loss, by_hand, sampler, batch)
    assert case.params.shape == (1,)
    assert np.all(case.params > 0)
    assert np.all((case.batch["share"] > 0) & (case.batch["share"] <= 1))
    assert np.all((case.batch["count"] > 0) & (case.batch["count"] % 1 == 0))


def test_what_is_wrong_at_a_kink_alone_stays_at_it():
    def loss(params, batch):
        return jnp.sum(jnp.abs(params) * batch)

    def by_hand(params, batch):
        return loss(params, batch), jnp.where(params == 0, 2.0, jnp.sign(params)) * batch

    case = smallest(loss, by_hand, np.array([0.7, 0, -2], np.float32), np.full(3, 3, np.float32))
    (place,) = case.coordinate
    assert (case.params[place], case.gradient) == (0, 2 * case.batch[place])
    assert abs(case.expected) <= case.batch[place]


@pytest.mark.slow
def test_trees_of_classes_are_written_with_their_imports():
    def loss(params, batch):
        return jnp.sum(jnp.square(batch.x @ params[0].weights + params[0].biases[None] - batch.y))

    def by_hand(params, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        return value, jax.tree.map(jnp.negative, gradient)

    params = (jaxnn.Dense(jnp.ones((2, 1)), jnp.ones(1)),)
    batch = jaxnn.Batch(jnp.array([[2.0, 3], [4, 5]]), jnp.array([[1.0], [2]]))
    case = smallest(loss, by_hand, params, batch)
    assert isinstance(case.params[0], jaxnn.Dense)
    for name in ("Dense", "Batch"):
        assert f" import {name}\n" in case.script
    script = case.script.replace("loss_fn = ...", "loss_fn = own[0]")
    script = script.replace("grad_fn = ...", "grad_fn = own[1]")
    _, *told = printed(script, own=(loss, by_hand))
    assert pytest.approx((case.gradient, case.expected)) in told


# --- programs


MY = """
from typing import NamedTuple
import jax, jax.numpy as jnp
class Params(NamedTuple):
    w: jax.Array
class Outer:
    class Inner(NamedTuple):
        w: jax.Array
    def loss(params, batch): return loss(params, batch)
def loss(params, batch):
    assert isinstance(params, Params | Outer.Inner)
    return jnp.sum(jnp.square(params.w) * batch)
def numpy_loss(params, batch): return batch * float(sum(params.w)) ** 2
def by_hand(params, batch):
    return loss(params, batch), type(params)(params.w)
def right(params, batch):
    return jax.value_and_grad(loss)(params, batch)
"""


@pytest.fixture
def my(tmp_path, monkeypatch):
    """The working directory, with a file of functions."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(MY)
    return tmp_path


def named_in(path, *names, **options):
    """Functions and classes of a file, as the command line finds them."""
    scope = SimpleNamespace(**runpy.run_path(path, **options))
    return [attrgetter(name)(scope) for name in names]


def script_for(params, batch, loss, by_hand, at=(0,)):
    case = Counterexample(params, batch, "params.w", at, 0, 0, script="")
    is_numpy = loss.__name__ == "numpy_loss"
    checked = NumpyFunction("loss_fn", loss) if is_numpy else Partial(loss)
    return script_of(case, Problem(checked, Partial(by_hand), batch, (1e-9, 1e-5)))


def named_by(script, **scope):
    """The names that a script has before it computes anything."""
    exec(script.partition("loss, value_and_grad = ")[0].replace(X64, ""), scope)
    return scope


@pytest.mark.parametrize(
    ("run_name", "kind", "loss"),
    [
        (None, "Params", "Outer.loss"),
        (None, "Outer.Inner", "loss"),
        ("__main__", "Params", "loss"),
        ("__main__", "Outer.Inner", "Outer.loss"),
    ],
)
def test_the_program_of_a_file_runs_from_any_folder(run_name, kind, loss, my, monkeypatch):
    made, *functions = named_in("my.py", kind, loss, "by_hand", run_name=run_name)
    if run_name:
        monkeypatch.setitem(sys.modules, run_name, SimpleNamespace(**functions[1].__globals__))
    script = script_for(made(np.array([1.0, 2])), np.array(3.0), *functions)
    assert "from __main__" not in script
    assert str(my) not in script
    assert printed(script) == [(15, 15), (1, 6), (2, 12)]
    for place, folder in ((my, "/"), ("/", my), ("/", my / "below")):
        monkeypatch.chdir(place)
        names = named_by(script, __file__=f"{folder}/program.py")
        assert names["loss_fn"](names["params"], names["batch"]) == 15
        assert names["value_and_grad_fn"](names["params"], names["batch"])[0] == 15
    with pytest.raises(FileNotFoundError, match=r"my\.py"):
        named_by(script)


@pytest.mark.parametrize("is_right", [False, True])
def test_of_a_large_leaf_the_numbers_near_the_wrong_one_are_printed(is_right, my):
    """A program ends with 0 once the gradient is right."""
    made, *functions = named_in("my.py", "Params", "loss", "right" if is_right else "by_hand")
    params = made(np.arange(60.0).reshape(3, 20))
    script = script_for(params, np.array(3.0), *functions, at=(1, 15))
    factor = 6 if is_right else 1
    told = printed(script, status=not is_right)[1:]
    assert told == [(factor * number, 6 * number) for number in range(32, 48)]


def test_classes_within_others_of_a_module_are_imported(monkeypatch):
    module: Any = ModuleType("my_module")
    monkeypatch.setitem(sys.modules, "my_module", module)
    exec(MY, vars(module))
    params = module.Outer.Inner(np.array([1.0]))
    script = script_for(params, np.array(3.0), module.Outer.loss, module.by_hand)
    assert "from my_module import Outer\n" in script
    assert printed(script) == [(3, 3), (1, 6)]


def test_a_class_without_a_place_leaves_room_for_it():
    params = namedtuple("Params", "w")(np.ones(1))
    script = script_for(params, None, jax_loss, jax_mlrose)
    assert "Params = ...  # Your own class goes here." in script.splitlines()


def test_differences_give_every_number_of_the_leaf(my):
    """Each with the others as they were."""
    made, *functions = named_in("my.py", "Params", "numpy_loss", "by_hand")
    _, *told = printed(script_for(made(np.array([1.0, 2, 4])), np.array(3.0), *functions))
    assert told == [(number, pytest.approx(42, rel=1e-8)) for number in (1, 2, 4)]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_and_empty_arrays_are_written_as_they_are(impl):
    batch = {"key": jax.random.key(3, impl=impl), "rows": np.zeros((0, 2), np.int32)}
    script = script_for(namedtuple("Params", "w")(np.ones(1)), batch, jax_loss, jax_mlrose)
    (text,) = re.findall("^batch = (.*)", script, re.MULTILINE)
    written = eval(text, {"np": np, "jax": jax})
    assert written["key"] == batch["key"]
    assert (written["rows"].dtype, written["rows"].shape) == (np.int32, (0, 2))
