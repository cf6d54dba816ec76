"""What users see: public names alone, one order of arguments, and docstrings that say it all."""

import inspect
import subprocess
import sys
from typing import Any

import pytest

import jaxnn

NAMESPACES = {
    name: thing for name in jaxnn.__all__ if inspect.ismodule(thing := getattr(jaxnn, name))
}
PUBLIC = {
    f"{place}{name}": getattr(module, name)
    for place, module in {"": jaxnn, **{f"{n}.": m for n, m in NAMESPACES.items()}}.items()
    for name in module.__all__
}
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}
RECORDS: dict[str, Any] = {
    name: thing for name, thing in PUBLIC.items() if hasattr(thing, "_fields")
}
TRAINERS = {
    "random_search": ("key", "loss_fn", "sample_fn", "batch"),
    "count_outcomes": ("key", "outcome_fn", "sample_fn", "batch"),
    "rare_event_search": ("key", "loss_fn", "sample_fn", "batch"),
    "perturbation_search": ("key", "loss_fn", "params", "batch"),
    "gradient_descent": ("key", "value_and_grad_fn", "params", "batch"),
    "check_gradients": ("key", "loss_fn", "value_and_grad_fn", "sampler", "batch"),
    "check_jacobian": ("key", "function", "jacobian_fn", "sampler", "batch"),
    "check_hvp": ("key", "loss_fn", "hvp_fn", "sampler", "batch"),
    "search.evaluate": ("key", "loss_fn", "sample_fn", "batch"),
    "search.reduce": ("key", "value_fn", "sample_fn", "batch"),
}
SHARED = {"max_seconds", "callback", "checkpoint", "progress"}
SHARED_BY_ALL_THREE = SHARED | {"target_loss", "devices"}


@pytest.mark.parametrize("module", [jaxnn, *NAMESPACES.values()], ids=lambda m: m.__name__)
def test_public_names_are_listed_once_and_exist(module):
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_package_shows_its_public_names_and_nothing_else():
    assert {name for name in dir(jaxnn) if not name.startswith("__")} == set(jaxnn.__all__)


@pytest.mark.parametrize("name", RECORDS)
def test_no_field_of_a_result_hides_a_method_of_tuples(name):
    assert not {"count", "index"} & set(RECORDS[name]._fields)


@pytest.mark.parametrize("name", TRAINERS)
def test_arguments_come_in_one_order_and_options_by_name(name):
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    placed = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    assert placed[: len(TRAINERS[name])] == TRAINERS[name]


def options_of(name):
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_trainers_share_their_options_and_have_few_of_their_own():
    for name in ("random_search", "rare_event_search", "perturbation_search", "gradient_descent"):
        assert options_of(name) >= SHARED_BY_ALL_THREE
    assert options_of("count_outcomes") >= SHARED
    assert len(options_of("perturbation_search")) <= 14


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_is_documented_by_a_summary_and_its_arguments(name):
    thing = PUBLIC[name]
    if not (inspect.isfunction(thing) or inspect.isclass(thing)):
        return
    text = inspect.getdoc(thing)
    assert text
    assert text.split("\n")[0].rstrip().endswith((".", ":")), text.split("\n")[0]
    if name in FUNCTIONS:
        assert "Example:" in text
        assert "Returns:" in text or text.startswith("Return ")
    if name in RECORDS:
        assert "Attributes:" in text
        missing = [field for field in RECORDS[name]._fields if field not in text]
        assert not missing


def test_importing_the_package_loads_no_matplotlib_and_leaves_jax_as_it_was():
    code = """
import sys, jax
before = dict(jax.config.values)
import jaxnn
assert "matplotlib" not in sys.modules, "matplotlib was imported"
assert dict(jax.config.values) == before, "jax.config was changed"
assert "plotting" in dir(jaxnn)
jaxnn.plotting
assert "matplotlib" in sys.modules
try:
    jaxnn.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError("no AttributeError")
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
