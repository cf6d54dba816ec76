"""Results in a few lines: every status in words, many runs by their spread."""

from typing import get_args

import numpy as np
import pytest

from jaxnn.run.pacing import Status
from jaxnn.run.summary import ENDINGS, summary


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
