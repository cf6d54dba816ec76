"""The check of a machine: it knows a right JAX, and each kind of a wrong one."""

import json
import re
import tomllib
from itertools import count
from pathlib import Path

import check_machine
import jax
import numpy as np
import pytest
from check_machine import FACTOR, Check
from tolerances import GRADIENT, leaf_error

import jaxnn

SMALL, ROWS = (2, 3, 3), (33, 64)


@pytest.mark.exhaustive
def test_this_machine_passes(tmp_path, capsys):
    assert check_machine.main(["--json", str(tmp_path / "machine.json")]) == 0
    assert json.loads((tmp_path / "machine.json").read_text())["passed"]
    assert "WRONG" not in capsys.readouterr().out


@pytest.mark.parametrize("hidden", [pytest.param("relu", marks=pytest.mark.slow), "tanh"])
def test_the_witness_is_right(hidden):
    model = jaxnn.mlp((2, 5, 4, 3), hidden=hidden)
    params = check_machine.draw_params(model.settings.sizes, seed=3)
    batch = check_machine.draw_batch(23, model.settings.sizes, hidden)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        expected, gradient = jax.value_and_grad(model.loss_reference)(params, batch)
    assert check_machine.loss_of(params, batch, hidden) == pytest.approx(float(expected), 1e-12)
    if hidden == "tanh":
        loss, by_hand = check_machine.loss_and_gradient_of(params, batch)
        assert loss == pytest.approx(float(expected), 1e-12)
        pairs = zip(jax.tree.leaves(by_hand), jax.tree.leaves(gradient), strict=True)
        assert max(leaf_error(*pair) for pair in pairs) < GRADIENT["float64"]


kinds = pytest.mark.parametrize(
    ("kind", "networks"), [("loss", 1), ("loss", 3), ("loss and gradient", 1)]
)


@kinds
def test_right_losses_pass(kind, networks):
    check = check_machine.check_network(kind, SMALL, networks, ROWS)
    assert check.passed
    assert 0 < check.measured < 2e-6
    assert re.fullmatch("at (33|64) rows", check.note)


@pytest.mark.parametrize("name", check_machine.SUMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_right_sums_pass(name, dtype):
    check = check_machine.check_sums(name, dtype, ROWS)
    assert check.passed
    assert check.measured < {"float32": 2e-6, "float64": 1e-13}[dtype]


def test_right_lanes_and_repeats_pass():
    assert check_machine.check_lanes(SMALL, ROWS).passed
    assert check_machine.check_repeats(SMALL, 3).passed


@pytest.mark.parametrize(("times", "passed"), [(4.2, True), (FACTOR**2, False)])
def test_a_loop_that_takes_the_square_of_its_length_fails(times, passed, monkeypatch):
    seconds = iter([1e-3, 1e-3 * times])
    monkeypatch.setattr(check_machine, "seconds_of", lambda run: next(seconds))
    check = check_machine.check_scan(100)
    assert (check.measured, check.passed) == (pytest.approx(times), passed)


def broken_model(monkeypatch, **functions):
    """Puts functions, made from those of the model, in the place of those of every model."""
    right = jaxnn.mlp

    def wrong(sizes, **settings):
        model = right(sizes, **settings)
        return model._replace(**{name: make(model) for name, make in functions.items()})

    monkeypatch.setattr(check_machine.jaxnn, "mlp", wrong)


def without_the_last_row(model):
    def loss_fn(params, batch):
        return model.loss(params, jaxnn.Batch(batch.x[:-1], batch.y[:-1]))

    return loss_fn


@kinds
def test_one_row_of_many_that_is_missed_is_found(kind, networks, monkeypatch):
    def with_gradient(model):
        gradient_fn = jax.grad(without_the_last_row(model))
        return lambda params, batch: (model.loss(params, batch), gradient_fn(params, batch))

    broken_model(monkeypatch, loss=without_the_last_row, value_and_grad=with_gradient)
    check = check_machine.check_network(kind, SMALL, networks, [2**16 + 1])
    assert not check.passed
    assert check.note == "at 65,537 rows"


def test_sums_of_which_the_last_row_is_another_fail(monkeypatch):
    """As jax 0.10.2 makes them: the last row of 2^14 + 1 is that of 16 rows before."""
    wrong = lambda matrix, x: check_machine.sums_at_once(matrix, x.at[-1].set(x[-17]))  # noqa: E731
    monkeypatch.setitem(check_machine.SUMS, "by row", wrong)
    check = check_machine.check_sums("by row", "float64", [2**14 + 1])
    assert not check.passed
    assert check.measured > 1e-4


def test_lanes_that_are_swapped_fail(monkeypatch):
    broken_model(monkeypatch, loss=lambda model: lambda p, b: model.loss(p, b) + p[0].biases[0])
    assert not check_machine.check_lanes(SMALL, ROWS).passed


def test_bits_that_change_are_counted(monkeypatch):
    calls = count()

    def make(model):
        return lambda *arguments: model.loss(*arguments) * (1 + 1e-6 * (next(calls) in (2, 5)))

    broken_model(monkeypatch, loss=make)
    check = check_machine.check_repeats(SMALL, 6)
    assert (check.measured, check.passed) == (2, False)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_fails(wrong):
    assert not check_machine.worst("loss", {1: 1e-9, 2: wrong, 3: 1e-8}, "rows").passed
    error = check_machine.relative_error((np.ones(3), np.array([1.0, wrong])), (np.ones(3), 2.0))
    assert not error < np.inf


def test_the_versions_with_known_faults_are_those_that_the_project_excludes():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    requirements = tomllib.loads(text)["project"]["dependencies"]
    for package in ("jax", "jaxlib"):
        (requirement,) = [r for r in requirements if re.match(rf"{package}\b", r)]
        assert set(re.findall(r"!=([\d.]+)", requirement)) == set(check_machine.KNOWN_FAULTS)


@pytest.mark.parametrize(
    ("versions", "passed"),
    [(["0.10.1", "0.10.1"], True), (["0.10.2", "0.10.2"], False), (["0.12.0.1", "0.10.2"], False)],
)
def test_a_version_with_a_known_fault_fails(versions, passed):
    check = check_machine.check_versions(versions)
    assert check.passed == passed
    fault = "0.10.2 computes wrong numbers on CPUs: jax-ml/jax issue 39103"
    assert check.note == ("" if passed else fault)


@pytest.mark.parametrize("measured", [0.5, 2.0, np.nan])
def test_the_table_the_results_and_the_status_agree(measured, monkeypatch, tmp_path, capsys):
    checks = [Check("sums", 1e-8, 2e-5, "at 7 rows"), Check("scan", measured, 1.0)]
    monkeypatch.setattr(check_machine, "plan", lambda *_: [lambda c=c: c for c in checks])
    path = tmp_path / "new" / "machine.json"
    passed = measured == 0.5
    assert check_machine.main(["--json", str(path)]) == (0 if passed else 1)
    results = json.loads(path.read_text())
    assert results["passed"] == passed
    assert results["machine"]["jax"] == jax.__version__
    assert [check["passed"] for check in results["checks"]] == [True, passed]
    lines = capsys.readouterr().out.split("\n")
    assert re.fullmatch(r"sums +1e-08 +2e-05 +ok +at 7 rows", lines[2])
    assert re.fullmatch(rf"scan +{measured:.2g} +1 +{'ok' if passed else 'WRONG'}", lines[3])
    assert lines[4].startswith(f"{1 + passed} of 2 checks passed")
