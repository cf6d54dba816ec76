"""The course's cells find the known figures, and its notebook holds them with what they print."""

import base64
import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import make_notebook
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
SCRIPT = Path(make_notebook.__file__).with_name("course.py")
NOTEBOOK = json.loads(SCRIPT.with_suffix(".ipynb").read_text())
CELLS = make_notebook.cells_of(SCRIPT.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The names that the cells leave behind, and what each of them put out."""
    namespace = {"__name__": "__main__"}
    with plt.rc_context(), contextlib.chdir(tmp_path_factory.mktemp("course")):
        outputs = list(make_notebook.run_cells(CELLS, namespace))
    return namespace, outputs


@pytest.fixture(scope="module")
def names(run):
    return run[0]


EXACT = {
    "z": [[1], [8]],
    "relu": [[1], [8]],
    "sigmoid": [[0.73105858], [0.99966465]],
    "tanh": [[0.76159416], [0.99999977]],
    "softmax": [[1], [1]],
    "hidden_values": [[0.77816418, 0.83451912]],
    "answer": [[0.52647369, 0.47352631]],
    "first": 9,
    "second": 3,
    "squared_error": 18,
    "crossentropy": np.log(3),
    "one_hot": np.log(3),
    "worst": -np.log(1e-7),
    "guessing": 1 / 3,
    "one_slope": [-24],
    "error_before": [7],
    "three_slopes": [14, 28, 42],
    "error_after": [5.04],
    "through_1": [6, 6],
    "through_3": [18, 18],
    "through_negative": [0, 0],
    "relu_slopes": [0, 1],
}


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_figure_is_found(names, name):
    np.testing.assert_allclose(np.asarray(names[name], float), EXACT[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("params", "weights", "bias"),
    [
        (lambda names: names["gradient"], [-6, -4.26666667], -3.2),
        (lambda names: names["by_hand"], [1.6, 1.42666667], 0.32),
        (lambda names: names["whole"].params, [1.49966686, 1.49862483], 0.10270104),
    ],
    ids=["slopes", "step by hand", "100 steps"],
)
def test_the_regression_is_exact(names, params, weights, bias):
    (layer,) = params(names)
    np.testing.assert_allclose(layer.weights[:, 0], weights, rtol=2e-6)
    np.testing.assert_allclose(layer.biases, bias, rtol=2e-6)


def test_a_step_by_descent_is_the_step_by_hand(names):
    assert names["stepped"].params == pytest.approx(2.24)
    assert names["report"].passed


@pytest.mark.parametrize(
    ("name", "weight_error", "bias_error"),
    [
        ("rate 0.1", 0.01, 0.02),
        ("good start, rate 0.05", 0.01, 0.02),
        ("bad start, rate 0.05", 0.015, 0.03),
    ],
)
def test_descent_in_batches_converges(names, name, weight_error, bias_error):
    result = names["runs"][name]
    assert result.status == "converged"
    (layer,) = result.params
    np.testing.assert_allclose(layer.weights, 1.5, rtol=0, atol=weight_error)
    np.testing.assert_allclose(layer.biases, 0.1, rtol=0, atol=bias_error)


def test_descent_at_too_large_a_rate_diverges_with_its_last_finite_params(names):
    result = names["runs"]["rate 0.3"]
    assert result.status == "diverged"
    assert not np.isfinite(result.history.loss[-1])
    assert 1e6 < np.abs(result.params[0].weights).max() < np.inf


def test_the_film_shows_the_descent_in_closed_form(names):
    steps = np.arange(len(names["path"]))[:, None]
    path = 1.5 - 2.5 * (1 - 2 * np.array([0.2, 0.9, 1.05])) ** steps
    np.testing.assert_allclose(names["path"], path, rtol=0, atol=1e-5)


def test_random_search_falls_though_not_by_much(names):
    """Bounds: 72 seeds at scale 0.05, and 40 at each of the others, on data drawn anew."""
    assert 1.0945 < names["found"].loss < 1.0970
    bounds = {1: (0.54, 0.72), 2: (0.32, 0.52), 4: (0.20, 0.46), 8: (0.24, 0.65)}
    for scale, (low, high) in bounds.items():
        assert low < names["searches"][scale].loss < high
    assert min(names["lost"]) > 1.04


def test_perturbation_search_solves_vertical_data_and_is_stuck_on_the_spiral(names):
    model, climbed, stuck = names["model"], names["climbed"], names["stuck"]
    assert 0.1695 < climbed.loss < 0.1755
    assert 0.9265 < model.accuracy(climbed.params, names["vertical"]) < 0.9335
    assert 1.017 < stuck.loss < 1.080
    assert 0.35 < model.accuracy(stuck.params, names["spiral"]) < 0.46


def test_smaller_steps_still_help_a_little_where_the_search_is_stuck(names):
    """A local minimum has no gradient. Bounds: those that the cell prints."""
    stuck = names["stuck"]
    gradient = jax.grad(names["model"].loss_reference)(stuck.params, names["spiral"])
    assert np.linalg.norm(np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradient)])) > 0.005
    bounds = {0.05: (0, 0.01), 0.01: (0.1, 0.2), 0.005: (0.2, 0.4), 0.001: (0.3, 0.5)}
    for scale, (low, high) in bounds.items():
        assert low <= np.mean(names["tries"][scale] < stuck.loss) <= high
        assert 0 < stuck.loss - names["tries"][scale].min() < 0.001


def test_descent_gets_far_on_the_spiral(names):
    assert 0.56 < names["plain_accuracy"] < 0.85
    assert names["adam_accuracy"] > 0.88


def test_a_line_stands_for_each_improvement(names):
    """The first accepted proposal is that of a search that ends there."""
    lines, model, climbed = names["lines"], names["model"], names["climbed"]
    assert len(lines) == climbed.num_accepted
    losses = [line.loss for line in lines]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == climbed.loss
    short = names["climb"](names["vertical"], num_steps=lines[0].evaluations - 1)
    assert short.num_accepted == 1
    accuracy = float(model.accuracy(short.params, names["vertical"]))
    assert lines[0] == (short.num_evaluations, short.loss, accuracy)


# The notebook


def stored(kind):
    """The outputs of one kind that the notebook holds, a list a cell."""
    cells = [cell.get("outputs", []) for cell in NOTEBOOK["cells"]]
    return [[output for output in cell if output["output_type"] == kind] for cell in cells]


def test_the_notebook_has_the_cells_of_the_script():
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
    assert cells == CELLS
    assert sum(kind == "markdown" for kind, _ in cells) > 20


def test_the_notebook_holds_what_the_cells_print(run):
    """The fifth digit of a loss may differ by one, as machines round otherwise."""
    decimal = re.compile(r"\d+\.\d+")
    for printed, outputs in zip(run[1], stored("stream"), strict=True):
        text = "".join(line for output in outputs for line in output["text"])
        assert decimal.sub("#", printed.text) == decimal.sub("#", text)
        new, old = (np.array(decimal.findall(said), float) for said in (printed.text, text))
        np.testing.assert_allclose(new, old, rtol=0, atol=1.1e-5)


def test_the_notebook_shows_each_picture_and_is_small(run):
    heads, sizes = {"image/png": b"\x89PNG", "image/gif": b"GIF89a"}, []
    for shown, pictures in zip(run[1], stored("display_data"), strict=True):
        assert [list(bundle) for bundle in shown.pictures] == [
            list(picture["data"]) for picture in pictures
        ]
        for picture in pictures:
            ((kind, data),) = picture["data"].items()
            content = base64.b64decode(data)
            assert content.startswith(heads[kind])
            image = Image.open(io.BytesIO(content)).convert("RGB")
            assert image.getpixel((2, 2)) == (255, 255, 255)
            sizes.append(len(content))
    assert len(sizes) == 8
    assert max(sizes) <= 60_000
    assert SCRIPT.with_suffix(".ipynb").stat().st_size <= 600_000
    assert not plt.get_fignums()


def test_a_notebook_of_a_small_script(tmp_path, capsys):
    path = tmp_path / "small.py"
    path.write_text('"""Left out."""\n\n# %% [markdown]\n# # Title\n#\n# Text\n\n# %%\nprint(2)\n')
    assert make_notebook.main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path.with_suffix('.ipynb')}\n"
    prose, code = json.loads(path.with_suffix(".ipynb").read_text())["cells"]
    assert (prose["cell_type"], "".join(prose["source"])) == ("markdown", "# Title\n\nText")
    assert code["source"] == ["print(2)"]
    assert code["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["2\n"]}]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("a = 1\n1 / (a - 1)", "cell 3, line 2, 1 / (a - 1): ZeroDivisionError: division by zero"),
        ("first(2)", "cell 1, line 2, return [][x]: IndexError: list index out of range"),
        ("x = (", "cell 3, line 1, x = (: SyntaxError: '(' was never closed"),
    ],
)
def test_an_error_in_a_cell_is_told_with_cell_and_line(code, message, tmp_path, capsys):
    path = tmp_path / "small.py"
    before = "# %%\ndef first(x):\n    return [][x]\n# %% [markdown]\n# Text\n"
    path.write_text(f"{before}# %%\n{code}")
    assert make_notebook.main([str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not path.with_suffix(".ipynb").exists()


def test_the_course_says_what_it_is():
    told = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True)
    assert (told.returncode, told.stdout.startswith("Work through the course")) == (0, True)
