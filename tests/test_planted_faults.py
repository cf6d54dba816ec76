"""Sixty planted faults are caught, in their leaves; right gradients pass, at kinks too."""

import functools
import re
from typing import Any

import gradient_checkers
import jax
import pytest
from planted_faults import FAULTS, PROBLEMS

import jaxnn

KEY = jax.random.key(5)
POINTS = 100
QUICK = {("linear", "last_row_left_out"), ("linear", "bias_forgotten"), ("linear", "no_mean")}
UNNAMED = {
    ("huber", "not_clipped"), ("huber", "sign_of_lines_lost"), ("absolute", "sign_lost"),
    ("layer norm", "gain_forgotten"), ("layer norm", "mean_taken_as_constant"),
    ("layer norm", "deviation_taken_as_constant"), ("convolution", "input_shifted"),
    ("convolution", "last_place_left_out"), ("recurrent", "state_off_by_one"),
}  # fmt: skip
"""The faults of which the suggestions do not say the kind: 9 of 60."""


@functools.cache
def check(name, fault=None) -> Any:
    problem = PROBLEMS[name]
    functions = problem.loss, problem.value_and_grad(fault)
    return jaxnn.check_gradients(KEY, *functions, problem.sample, problem.batch, num_samples=POINTS)


def test_there_are_sixty_faults_in_twelve_gradients():
    assert (len(FAULTS), len(set(FAULTS)), len(PROBLEMS)) == (60, 60, 12)
    assert {len(problem.faults) for problem in PROBLEMS.values()} == {5}
    assert set(FAULTS) >= UNNAMED


@pytest.mark.parametrize(
    ("name", "fault"),
    [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in FAULTS],
)
def test_a_planted_fault_is_caught_in_its_leaves_and_its_kind_is_named(name, fault):
    report, (leaves, said) = check(name, fault), PROBLEMS[name].faults[fault]
    wrong = {leaf.name for leaf in report.leaves if not leaf.passed}
    assert wrong == {f"params['{leaf}']" for leaf in leaves.split()}
    assert not report.passed
    is_named = re.search(said, " ".join(report.suggestions)) is not None
    assert is_named == ((name, fault) not in UNNAMED), report.suggestions


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "linear" else pytest.mark.slow) for n in PROBLEMS]
)
def test_the_gradients_without_a_fault_are_right(name):
    assert check(name).passed, str(check(name))


@pytest.mark.slow
def test_500_right_gradients_raise_no_alarm_at_kinks_either():
    kinks = 0
    for problem, params in gradient_checkers.right_cases(500):
        functions = problem.loss, problem.value_and_grad()
        report = jaxnn.check_gradients(KEY, *functions, params, problem.batch)
        assert report.passed, str(report)
        kinks += any(leaf.num_kinks for leaf in report.leaves)
    assert kinks > 30


@pytest.mark.slow
@pytest.mark.parametrize("name", gradient_checkers.CHECKERS)
def test_every_checker_passes_what_is_right_and_refuses_a_wrong_sign(name):
    if "torch" in name:
        pytest.importorskip("torch")
    checker, problem = gradient_checkers.CHECKERS[name], PROBLEMS["linear"]
    with jax.enable_x64(True):
        assert checker(problem, None, 3) is None
        refusal = checker(problem, "sign", 3)
    assert refusal is not None
    assert set(refusal.leaves) <= {"params['b']", "params['w']"}
    assert bool(refusal.leaves) == name.startswith(("jaxnn", "torch"))


@pytest.mark.slow
def test_the_table_says_what_is_missing_and_counts_the_rest(capsys, monkeypatch):
    monkeypatch.setattr(gradient_checkers, "FAULTS", FAULTS[:2])
    monkeypatch.setattr(gradient_checkers, "find_spec", lambda name: None)
    assert gradient_checkers.main(["--points", "2", "--right", "3"]) == 0
    rows = {line[:27].strip(): line[27:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["jaxnn check_gradients"][:5] == ["2", "2", "2", "2", "0"]
    assert rows["torch gradcheck"] == ["not", "installed"]
