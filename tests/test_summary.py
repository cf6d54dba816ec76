"""Results in a few lines: every status in words, many runs by their spread."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnn
from jaxnn.run.loop import ENDINGS, summary
from jaxnn.typing import Status


def test_every_status_has_words():
    assert set(ENDINGS) == set(get_args(Status))


@pytest.mark.parametrize("word", get_args(Status))
def test_one_run_is_told_line_by_line(word):
    details, notes = {"accepted": "7 of 9", "a longer name": "x"}, ["cold", "dark"]
    told = summary("a run", word, np.float32(0.25), 12_345, details=details, notes=notes)
    assert told.splitlines() == [
        "a run",
        f"  status         {ENDINGS[word]}",
        "  loss           0.25",
        "  evaluations    12,345",
        "  accepted       7 of 9",
        "  a longer name  x",
        "  note           cold",
        "  note           dark",
    ]


def test_many_runs_are_counted_by_status_and_told_by_lowest_and_median_loss():
    status = np.array(["diverged", "completed", "nonfinite", "completed", "converged"])
    losses = np.array([3.0, 1.0, np.inf, 2.0, 4.0])
    assert summary("runs", status, losses, np.full(5, 2_000)).splitlines() == [
        "runs",
        "  status       2 completed, 1 converged, 1 diverged, 1 nonfinite",
        "  loss         lowest 1, median 3",
        "  evaluations  10,000",
    ]


LINES = {
    "random": """\
random search
  status       completed, all of it was done
  loss         0
  evaluations  64
  candidate    0
  <= 0.5       64 candidates""",
    "perturbation": """\
perturbation search
  status       completed, all of it was done
  loss         1
  evaluations  33
  accepted     0 steps
  chains       3, median loss 1""",
}


def test_searches_print_as_a_few_lines():
    key = jax.random.key(0)
    found = jaxnn.random_search(
        key, lambda params, batch: 0 * params, jax.random.normal, None,
        num_candidates=64, thresholds=[0.5],
    )  # fmt: skip
    climbed = jaxnn.perturbation_search(
        key, lambda params, batch: 0 * params + 1, jnp.zeros(()), None,
        num_steps=10, scale=1.0, num_chains=3,
    )  # fmt: skip
    assert str(found) == LINES["random"]
    assert str(climbed) == LINES["perturbation"]
