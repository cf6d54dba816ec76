"""What is printed and what a notebook shows: short, whole, and true to the arrays."""

from functools import cache, partial
from html.parser import HTMLParser
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnn
from jaxnn.run.show import ENDINGS, FEW, Table, described, summary
from jaxnn.typing import Status

KEY = jax.random.key(0)
summary_of = partial(summary, hint="its history")


def test_every_status_has_words():
    assert set(ENDINGS) == set(get_args(Status))


def test_one_run_is_told_line_by_line():
    details, notes = {"accepted": "7 of 9", "a longer name": "x"}, ["cold", "dark"]
    told = summary_of("a run", "reached", np.float32(0.25), 12_345, details=details, notes=notes)
    assert str(told).splitlines() == [
        "a run",
        f"  status         {ENDINGS['reached']}",
        "  loss           0.25",
        "  evaluations    12,345",
        "  accepted       7 of 9",
        "  a longer name  x",
        "  note           cold",
        "  note           dark",
        "  look at        its history",
    ]


def test_many_runs_are_counted_by_status_and_told_by_lowest_and_median_loss():
    status = np.array(["diverged", "completed", "nonfinite", "completed", "converged"])
    losses = np.array([3.0, 1.0, np.inf, 2.0, 4.0])
    assert str(summary_of("runs", status, losses, np.full(5, 2_000))).splitlines() == [
        "runs",
        "  status       2 completed, 1 converged, 1 diverged, 1 nonfinite",
        "  loss         lowest 1, median 3",
        "  evaluations  10,000",
        "  look at      its history",
    ]


FLOOR, FLAT = 0.123456789, np.inf


def bowl(params, batch):
    """Flat where the batch is infinite."""
    return jnp.sum(jnp.square(params)) / batch + FLOOR


draw = partial(jax.random.normal, shape=(2,))


@cache
def search(divisor=1.0, thresholds=(0.5, 1.0, 3.0), num_candidates=640) -> Any:
    return jaxnn.random_search(
        KEY, bowl, draw, np.float32(divisor), num_candidates=num_candidates, top_k=3,
        thresholds=thresholds,
    )  # fmt: skip


@cache
def climb(divisor=1.0, **options: Any) -> Any:
    given = {"num_steps": 50, "scale": 0.5, "metric_fn": bowl, **options}
    return jaxnn.perturbation_search(KEY, bowl, np.ones(2), np.float32(divisor), **given)


slope_of_bowl = jax.value_and_grad(bowl)


@cache
def descend(divisor=1.0, **options: Any) -> Any:
    given = {"num_epochs": 50, "learning_rate": 0.1, **options}
    start = np.ones((2,) if "num_networks" not in given else (given["num_networks"], 2))
    return jaxnn.gradient_descent(KEY, slope_of_bowl, start, np.float32(divisor), **given)


RESULTS = {
    "search": search,
    "search of nothing finite": lambda: search(0.0),
    "search of much": lambda: search(1.0, tuple(np.linspace(0.01, 9, 40)), 64),
    "chain": climb,
    "chain that stays": lambda: climb(FLAT),
    "chains": lambda: climb(num_chains=3),
    "chain of no steps": lambda: climb(num_steps=0),
    "descent": descend,
    "descent that stays": lambda: descend(FLAT),
    "descents": lambda: descend(num_networks=3),
    "descent that diverges": lambda: descend(learning_rate=30.0, num_epochs=1_000),
}


each_result = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "chains" else n for n in RESULTS]
)


@each_result
def test_a_result_is_shown_in_at_most_8_lines_of_100_columns(name):
    result = RESULTS[name]()
    lines = str(result).splitlines()
    assert repr(result) == str(result)
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 100
    rows = dict(line.strip().split("  ", 1) for line in lines[1:])
    assert float(rows["loss"].split()[-1 if "lowest" not in rows["loss"] else 1].strip(",")) == (
        pytest.approx(float(np.min(result.loss)), rel=5e-6)
    )
    assert int(rows["evaluations"].replace(",", "")) == np.sum(result.num_evaluations)
    assert np.ndim(result.status) or rows["status"].strip() == ENDINGS[result.status]
    assert lines[-1].startswith("  look at")


def test_steps_that_did_nothing_are_said():
    assert "note         no step was accepted" in str(climb(FLAT))
    assert "note         no step changed the params" in str(descend(FLAT))
    for moved in (climb(), climb(FLAT, num_steps=0), descend(), search()):
        assert "  note  " not in str(moved)


def test_what_else_a_search_and_a_chain_found_is_told():
    found, climbed = search(), climb()
    drawn = jaxnn.candidate_params(KEY, draw, np.arange(640))
    losses = np.sum(np.square(np.asarray(drawn)), axis=1) + np.float32(FLOOR)
    below = {level: np.sum(losses <= level) for level in (0.5, 1, 3)}
    counts = ", ".join(f"{n} up to {level:g} ({n / 640:.3g})" for level, n in below.items())
    assert f"counts       {counts}\n" in str(found)
    assert f"candidate    {np.argmin(losses)}\n" in str(found)
    assert f"steps        50, accepted {np.sum(climbed.history.accepted)}\n" in str(climbed)
    assert f"metric       {climbed.history.current_metric[-1]:.6g} where" in str(climbed)


class Cells(HTMLParser):
    """The texts of a table's cells, row by row."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.is_cell = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.is_cell = tag == "td"
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.is_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self.is_cell = False


def cells(shown: Any):
    return Cells(shown._repr_html_()).rows


def test_a_notebook_shows_the_same_in_a_table():
    rows = cells(search())
    assert [name for name, _ in rows] == [
        *("status", "loss", "evaluations", "candidate", "counts", "look at")
    ]
    assert dict(rows)["evaluations"] == "640"
    assert cells(Table("<a>", [("b", "x < y & z")], ["<c>"])) == [["b", "x < y & z"]]
    batch = jaxnn.Batch(np.zeros((4, 2), np.float32), np.arange(4))
    assert cells(batch) == [
        ["x", "(4, 2) float32 0 to 0"],
        ["y", "[0, 1, 2, 3]"],
    ]
    report = jaxnn.check_gradients(KEY, bowl, slope_of_bowl, np.ones(2), np.float32(1))
    header, row = cells(report)
    assert (header[0], row[0], row[-1]) == ("leaf", "params", "ok")


# --- records


def test_arrays_are_told_by_shape_dtype_and_range():
    layer = jaxnn.Dense(jnp.linspace(-1, 2, 6).reshape(2, 3), jnp.ones(3))
    assert repr(layer) == "Dense(weights=(2, 3) float32 -1 to 2, biases=[1., 1., 1.])"
    assert repr((layer._replace(biases=None),)) == (
        "(Dense(weights=(2, 3) float32 -1 to 2, biases=None),)"
    )
    values = np.array([[1.0, np.nan, np.inf], [4.0, 5.0, -6.0]])
    told = {
        "(2, 3) float64 -6 to 5, 2 not finite": values,
        "(2, 3) float64, 6 not finite": np.nan * values,
        "(2, 3) bool 3 True": values > 1,
        "(0, 3) float64": np.zeros((0, 3)),
        "() key<fry>": KEY,
        "[0, 1, 2, 3, 4]": jnp.arange(FEW),
        "(6,) int32 0 to 5": jnp.arange(FEW + 1),
        "0.25": np.float32(0.25),
        "'a'": "a",
        "None": None,
        "{'w': (2, 2) float32 0 to 1}": {"w": jnp.eye(2)},
    }
    assert {described(value) for value in told.values()} == set(told)


def test_arrays_without_values_are_told_by_shape_and_dtype():
    seen = []

    def function(batch):
        seen.append(repr(batch))
        return batch.x

    deleted = jnp.ones((2, 2))
    deleted.delete()
    jax.jit(function)(jaxnn.Batch(jnp.ones((4, 2)), jnp.arange(9)))
    assert seen == ["Batch(x=(4, 2) float32, y=(9,) int32)"]
    assert described(deleted) == "(2, 2) float32"


@each_result
def test_histories_and_states_are_short(name):
    result = RESULTS[name]()
    records = [field for field in result if hasattr(field, "_fields")]
    assert len(records) >= 2
    for record in records:
        lines = repr(record).splitlines()
        assert lines[0].startswith(f"{type(record).__name__}(")
        assert len(lines) <= 8
        assert max(map(len, lines)) <= 100
        for field, value in record._asdict().items():
            is_shown = value is not None or field not in record._field_defaults
            assert (f"{field}=" in repr(record)) == is_shown
