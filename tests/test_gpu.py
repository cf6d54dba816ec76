"""The benchmark of accelerators, small and on a CPU: its checks catch faults, errors are rows."""

import json

import gpu
import pytest
from shared.timing import timed_call

pytestmark = pytest.mark.slow


def test_a_small_run_makes_every_check_even_without_time_for_rows(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert gpu.main(["--small", "--seconds", "0.01", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [row["result"] for row in report["checks"]] == ["right"] * 4
    assert [row["near-ties"] for row in report["checks"]] == [0] * 4
    assert len(report["rows"]) == len(gpu.measurements(small=True))
    assert all("no time is left" in row["unit"] for row in report["rows"])
    assert "random searches" in capsys.readouterr().out


@pytest.mark.parametrize("row", gpu.measurements(small=True), ids=lambda row: row.name)
def test_every_row_is_measured(row):
    told = gpu.measure(row, 0.2)
    assert told["unit"] == row.unit
    assert 0 < told["low"] <= told["units/s"] <= told["high"]
    assert (told["compile s"] > 0) == ("torch" not in row.name)
    assert told["compile s"] <= told["first call s"]
    assert row.least <= told["count"] <= row.most


def test_a_wrong_check_and_an_error_are_told_and_fail(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such device")

    wrong = {"cases": 1, "near-ties": 0, "error": float("nan"), "allowed": 1.0}
    monkeypatch.setattr(gpu, "check_searches", lambda *_: wrong)
    for name in ("check_gradients", "check_chains", "check_descents"):
        monkeypatch.setattr(gpu, name, broken)
    rows = [gpu.Measurement("broken", "steps", broken, 1, 1)]
    monkeypatch.setattr(gpu, "measurements", lambda small: rows)
    assert gpu.main(["--small"]) == 1
    output = capsys.readouterr().out
    assert output.count("error: RuntimeError: no such device") == 2 * 4
    assert output.count("WRONG") == 2


def test_nan_in_one_case_of_several_is_wrong(monkeypatch):
    errors = iter([0.0, float("nan")])
    monkeypatch.setattr(gpu, "relative_error", lambda *_: next(errors))
    row = gpu.check("gradients by hand", lambda: gpu.check_gradients([(2, 3, 3)]))
    assert (row["cases"], row["result"]) == (2, "WRONG")


def test_compilation_is_told_apart_from_the_run():
    search = gpu.by_gflop(33, "highest")
    seconds, compiling = timed_call(search, 1)
    assert 0 < compiling <= seconds
    assert timed_call(search, 1)[1] == 0
