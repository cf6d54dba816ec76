"""The code of README.md and scripts/README.md runs and prints what they say; links lead on.

Code that needs scikit-learn runs where that is installed.
"""

import contextlib
import io
import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "scripts" / "README.md"]
TEXTS = [page.read_text() for page in PAGES]
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


PYTHON = blocks("\n".join(TEXTS), "python")


def place_of(text):
    """The place of the one block of Python that has this text."""
    (place,) = [place for place, block in enumerate(PYTHON) if text in block]
    return place


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each Python block prints; the recipes go on from the code of README.md."""
    namespace, outputs, folder = {}, [], tmp_path_factory.mktemp("readme")
    for block in PYTHON:
        output = io.StringIO()
        if "from sklearn" in block and find_spec("sklearn") is None:
            block = ""
        with contextlib.redirect_stdout(output), contextlib.chdir(folder):
            exec(block, namespace)
        outputs.append(output.getvalue())
    return outputs


def numbers(text):
    return [float(number) for number in NUMBER.findall(text.replace(",", ""))]


def test_the_first_lines_print_what_the_readme_says(printed):
    expected, actual = (text.split("\n") for text in (blocks(TEXTS[0], "text")[0], printed[0]))
    assert len(actual) == len(expected)
    for line, wanted in zip(actual[:3], expected[:3], strict=True):
        # Another machine may round otherwise and so take another path to the same valley.
        assert numbers(line)[:2] == pytest.approx(numbers(wanted)[:2], abs=0.02)
        assert numbers(line)[2] == numbers(wanted)[2]
    assert numbers(actual[0])[1] > 0.9, "the random search that README.md shows succeeds"
    assert [NUMBER.sub("#", line).split() for line in actual[3:]] == [
        NUMBER.sub("#", line).split() for line in expected[3:]
    ]


def test_the_steps_print_what_the_readme_says(printed):
    assert printed[1] == blocks(TEXTS[0], "text")[1]


def test_the_recipes_of_searches_find_what_they_say(printed):
    top, shares, bests = re.split(r"\n(?=\[)", printed[place_of("found.top)")].strip())
    assert top.startswith("Candidates(candidate=[")
    below = numbers(shares.split("]")[0])
    assert 0 < below[0] < below[1] < 0.01
    assert 3 > numbers(bests)[0] > numbers(bests)[1] > numbers(bests)[2] > 0.1
    probability, ending, evidence = printed[place_of("log_evidence")].strip().split("\n")
    log_probability, low, high = numbers(probability)
    # Of a billion candidates 1,147 had a loss up to 0.2.
    assert low < log_probability < high
    assert abs(log_probability - math.log(1.147e-6)) < 0.8
    assert ending.startswith("reached")
    value, low, high = numbers(evidence)
    assert -13 < low < value < high < -10
    best, *others = numbers(printed[place_of("exponential_decay(0.02")])
    assert 0.05 < best < 0.25
    assert len(others) == 3 * 8
    assert best == pytest.approx(min(others[:8]), rel=1e-6)


def test_the_recipes_of_descents_solve_vertical_data(printed):
    status, steps, loss = printed[place_of("linear_warmup")].split()
    assert status in ("completed", "converged")
    assert 500 < int(steps) <= 2_000
    assert 0.05 < float(loss) < 0.25
    rate, loss, statuses = printed[place_of("swept")].split()
    assert 0.1 < float(rate) < 10
    assert 0.05 < float(loss) < 0.25
    assert "completed" in statuses


def test_dropout_and_batch_norm_learn_and_predict(printed):
    loss, fresh_loss = numbers(printed[place_of("with_key=True")])
    assert 0.05 < loss < 0.25
    assert 0.05 < fresh_loss < 0.35
    assert 0.85 < numbers(printed[place_of("def normalised")])[0] < 1


def test_loops_of_ones_own_find_what_the_trainers_find(printed):
    loss, best = numbers(printed[place_of("own_step")])
    assert 0.05 < best < 0.25
    assert best < loss < best + 0.1, "the rule accepts what is a little worse"
    counts = numbers(printed[place_of("jaxnn.search.Statistic(")])
    assert 100_000 > counts[0] > counts[1] > counts[2] > 0
    assert 0.9 < numbers(printed[place_of("descent_kernel(")])[0] < 1


def test_the_wrong_gradient_is_found_and_explained(printed):
    expected = [text for text in blocks(TEXTS[1], "text") if "FAILED" in text]
    assert len(expected) == 2
    names = "def value_and_grad(", "def numpy_value_and_grad("
    found = [printed[place_of(name)] for name in names]
    for text, wanted in zip(found, expected, strict=True):
        assert NUMBER.sub("#", text).split() == NUMBER.sub("#", wanted).split()
    (smallest,) = [text for text in blocks(TEXTS[1], "text") if text.startswith("smallest")]
    assert printed[place_of("certify=True")] == smallest


def test_the_model_of_ones_own_is_learnt(printed):
    for found in re.findall(r"\[(.*?)\]", printed[place_of('"slope"')]):
        assert numbers(found.replace(",", " ")) == pytest.approx([1.0, -2.0], abs=0.05)


def test_a_csv_file_becomes_a_network_that_numpy_reads(printed):
    told = blocks(TEXTS[1].split("# From a CSV file")[1], "text")
    assert printed[place_of("jaxnn.load(")] == told[0]
    assert printed[place_of("np.load(")] == told[1]


def test_folds_are_scored_by_scikit_learn(printed):
    pytest.importorskip("sklearn")
    matrix, report = printed[place_of("StratifiedKFold")].split("]]\n")
    assert sum(numbers(matrix)) == 6
    assert all(name in report for name in ("cat", "dog", "rabbit", "recall"))


def test_sets_of_scikit_learn_are_learnt_from_files(printed):
    pytest.importorskip("sklearn")
    found = [line.split() for line in printed[place_of("load_csv(f")].strip().split("\n")]
    assert [name for name, _ in found] == ["iris", "wine", "digits"]
    assert all(0.85 <= float(accuracy) <= 1 for _, accuracy in found)


@pytest.mark.parametrize("page", PAGES, ids=["root", "scripts"])
def test_every_file_and_heading_that_a_page_names_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings}
            assert anchor in slugs, link
    run = re.findall(r"(scripts/[\w/]+\.py)", text)
    assert run
    assert all((ROOT / name).is_file() for name in run)


def test_the_readme_fits_on_200_lines():
    assert TEXTS[0].count("\n") <= 200
