"""The README's code runs as written, prints what it says, and names files that exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each of the README's Python blocks prints, run one after the other."""
    namespace, outputs = {}, []
    for block in blocks("python"):
        output, folder = io.StringIO(), tmp_path_factory.mktemp("readme")
        with contextlib.redirect_stdout(output), contextlib.chdir(folder):
            exec(block, namespace)
        outputs.append(output.getvalue())
    return outputs


def test_the_contract_prints_what_the_readme_says(printed):
    expected, actual = blocks("text")[0].split("\n"), printed[0].split("\n")
    assert len(actual) == len(expected)
    for line, wanted in zip(actual[:3], expected[:3], strict=True):
        loss, accuracy, evaluations = line.split()
        # Another machine may round otherwise and so take another path to the same valley.
        assert float(loss) == pytest.approx(float(wanted.split()[0]), abs=0.01)
        assert float(accuracy) == pytest.approx(float(wanted.split()[1]), abs=0.02)
        assert evaluations == wanted.split()[2]
    assert [NUMBER.sub("#", line).split() for line in actual[3:]] == [
        NUMBER.sub("#", line).split() for line in expected[3:]
    ]


def test_the_long_search_tells_more_the_more_it_draws(printed):
    top, shares, bests = re.split(r"\n(?=\[)", printed[1].strip())
    assert top.startswith("Candidates(index=array([")
    below = [float(number) for number in NUMBER.findall(shares.split("]")[0])]
    assert 0 < below[0] < below[1] < 0.01
    expected = [float(number) for number in NUMBER.findall(bests)]
    assert 3 > expected[0] > expected[1] > expected[2] > 0.1


def test_the_family_of_climbers_solves_vertical_data(printed):
    best, *others = (float(number) for number in NUMBER.findall(printed[2]))
    assert 0.05 < best < 0.25
    assert len(others) == 3 * 8
    assert best == pytest.approx(min(others[:8]), rel=1e-6)


def test_the_long_descent_solves_vertical_data(printed):
    status, steps, loss = printed[3].split()
    assert status in ("completed", "converged")
    assert 500 < int(steps) <= 2_000
    assert 0.05 < float(loss) < 0.25


def test_the_sweep_finds_a_learning_rate(printed):
    rate, loss, statuses = printed[4].split()
    assert 0.1 < float(rate) < 10
    assert 0.05 < float(loss) < 0.25
    assert "completed" in statuses


def test_the_wrong_gradient_is_found_and_explained(printed):
    expected, actual = (NUMBER.sub("#", text) for text in (blocks("text")[-1], printed[5]))
    assert actual.split() == expected.split()


def test_the_model_of_ones_own_is_learnt(printed):
    climbed, trained = re.findall(r"\[(.*?)\]", printed[6])
    for found in (climbed, trained):
        slope = [float(number) for number in found.split(",")]
        assert slope == pytest.approx([1.0, -2.0], abs=0.05)


def test_every_file_that_the_readme_shows_or_runs_exists():
    shown = re.findall(r"\]\(([^)]+)\)", README)
    run = re.findall(r"(scripts/\w+\.py)", README)
    assert shown
    assert run
    for name in {*shown, *run}:
        assert (ROOT / name).is_file(), name
