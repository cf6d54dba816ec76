"""The scripts, called as functions: small runs, their files and their exit status."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import check_gradients
import compare
import compare_climbers
import descent_pictures
import equal_evaluations
import gradient_descent
import guess_and_check
import jax
import numpy as np
import perturbation_search
import pytest
import random_search
import reproduce_chapter
from layout import assert_fit_for_a_slide
from matplotlib.animation import FuncAnimation
from PIL import Image
from shared import cli, figures

import jaxnn

pytestmark = pytest.mark.slow
FOLDER = Path(check_gradients.__file__).parent
PATHS = {path.stem: path for path in sorted(FOLDER.rglob("*.py"))}
SCRIPTS = [name for name, path in PATHS.items() if "sys.exit(main())" in path.read_text()]


def error_of(capsys):
    """The line with an error that a script says on stderr, alone or before that of --help."""
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line]
    lines = [line for line in lines if "%|" not in line]  # progress bars
    assert len(lines) == 1 or lines[1:] == ["--help shows all options."]
    assert ": error: " in lines[0]
    return lines[0]


def status_of(main, arguments):
    try:
        return main(arguments)
    except SystemExit as refused:
        return refused.code


def test_there_are_scripts_and_each_begins_at_its_main():
    assert {"compare", "check_gradients", "benchmark", "own_model"} <= set(SCRIPTS)
    for name, path in PATHS.items():
        assert ("if __name__ ==" in path.read_text()) == (name in SCRIPTS)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if PATHS[name].parent != FOLDER])
def test_every_script_in_a_folder_runs_from_the_root(script):
    path = PATHS[script].relative_to(FOLDER.parent)
    told = subprocess.run([sys.executable, path, "--help"], cwd=FOLDER.parent, capture_output=True)
    assert told.returncode == 0, told.stderr
    assert f"python {path}".encode() in told.stdout


def test_every_help_text_is_a_sentence(capsys):
    for script in SCRIPTS:
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(script).parse(["--help"])
        helps = capsys.readouterr().out.split("options:")[1].split("\nexamples:")[0]
        assert helps.count(".") >= helps.count("\n  -") - 1, script


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_ends_with_examples_that_parse(script, capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(script).parse(["--help"])
    text = capsys.readouterr().out.split("\nexamples:\n")[1].replace("\\\n", "")
    examples = [shlex.split(line) for line in text.splitlines() if " scripts/" in line]
    name = PATHS[script].relative_to(FOLDER.parent)
    assert len(examples) >= (1 if script == "equal_evaluations" else 2)
    monkeypatch.chdir(tmp_path)
    Path("iris.csv").write_text("width,species")
    Path("my.py").write_text("loss = value_and_grad = sample = batch = print")
    for words in examples:
        begin = words.index("python")
        assert words[begin + 1] == str(name)
        importlib.import_module(script).parse(words[begin + 2 :])


ERRORS = [
    (KeyboardInterrupt(), 130, "interrupted"),
    (TypeError("loss_fn must\nbe callable"), 2, "error: loss_fn must be callable"),
    (FileNotFoundError(2, "No such file", "a.npz"), 2, "error: [Errno 2] No such file: 'a.npz'"),
    (MemoryError(), 2, "error: MemoryError"),
    (OverflowError("too large"), 2, "error: OverflowError: too large"),
    (jax.errors.JaxRuntimeError("OUT OF MEMORY"), 2, "error: JaxRuntimeError: OUT OF MEMORY"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_ends_an_error_with_a_line_and_a_status(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    for error, status, line in ERRORS:

        def fail(argv, error=error):
            raise error

        monkeypatch.setattr(module, "parse", fail)
        assert module.main([]) == status
        assert capsys.readouterr().err == f"{script}.py: {line}\n"


def test_a_bug_in_a_script_is_told_with_its_traceback_and_is_no_failed_check(monkeypatch, capsys):
    monkeypatch.setattr(compare, "parse", lambda argv: {}["seeds"])
    assert compare.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "compare.py: error: KeyError: 'seeds'"


BAD = """
random_search --scale 0                           | scale must be a finite number above 0
random_search --scale nan 1 --candidates 1000     | scale must be a finite number above 0
random_search --candidates 1e30                   | num_candidates must be at most
random_search --candidates 0                      | must be a whole number of at least 1; got 0
random_search --seed 99999999999999999999         | OverflowError
random_search --devices 0                         | devices must hold at least one device
random_search --merge junk.npz                    | cannot load junk.npz
random_search --checkpoint junk.npz               | cannot load junk.npz
random_search --scale 1 2 --save net.npz          | --save must come with one --scale
random_search --scale 1 2 --keep-below 0          | --keep-below must come with one --scale
random_search --json junk.npz/x.json              | argument --json: must be a folder to write to
random_search --json .                            | argument --json: must name a file
perturbation_search --temperature nan             | must be a finite number
perturbation_search --patience 0                  | patience must be an integer of at least 1
perturbation_search --restart                     | --restart needs --patience
perturbation_search --animate x.png               | must end in .gif or .mp4; got x.png
random_search --format bmp                        | invalid choice: 'bmp'
gradient_descent --batch-size -1                  | batch_size must be an integer of at least 1
gradient_descent --learning-rate nan              | must be a finite number above 0
gradient_descent --optimizer sgd --weight-decay 1 | --weight-decay is Adam's
gradient_descent --validation 0.25                | must be a whole number of rows, of at least 0
gradient_descent --min-delta 0.1                  | --min-delta needs --patience
check_gradients --depths 9                        | invalid choice: 9
check_gradients --plot v.png                      | --plot is for your own gradient
check_gradients --loss a:b --gradient a:b --params a:b --plot v.xyz | --plot must end in .png
check_gradients --samples 0                       | must be a whole number of at least 1; got 0
check_gradients --loss math:sin                   | --loss, --gradient and --params go together
check_gradients --report page.html                | --report is for your own gradient: give --loss
check_gradients --write-failing-case f.py         | --write-failing-case is for your own gradient
check_gradients --require-power 2                 | must be from 0 to 1; got 2
compare --seeds 0                                 | must be a whole number of at least 1; got 0
descent_pictures --learning-rates nan             | learning_rate must be a finite number above 0
perturbation_gradients --hidden -2                | must be an integer of at least 1; got -2
reproduce_chapter --output foreign                | chapter.json holds other settings
simplicity_bias --functions 1e12                  | max_outcomes must be at most
benchmark --seconds 0                             | --seconds must be above 0; got 0.0
benchmark --counts 9                              | must be a whole number of at least 10
check_machine --lengths 0                         | must be a whole number of at least 1
benchmark --nets 2                                | invalid layer_sizes value
gradient_descent --data none.csv                  | or a CSV file; there is no file none.csv
gradient_descent --data rows.csv                  | --target must name the column to predict
random_search --target kind                       | --target must name the column to predict
perturbation_search --data rows.csv --target size | must have a column 'size'; got columns 'a'
gradient_descent --data rows.csv --target kind --validation 4 | must be from 1 to 3; got 4
perturbation_search --data rows.csv --target kind --features a --animate a.gif | of two features
gradient_descent --data semi.csv --target c       | --delimiter ';' may separate them
gradient_descent --data rows.csv --target a       | or choose other columns by --features
random_search --save .                            | argument --save: must name a file
compare --data vertical                           | must be a CSV file; there is no file vertical
check_gradients --data rows.csv --target kind --features b kind | and not the target
"""


@pytest.mark.parametrize("line", BAD.strip().split("\n"))
def test_a_bad_argument_is_told_in_a_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.npz").write_text("junk")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "chapter.json").write_text("[]")
    (tmp_path / "rows.csv").write_text("a,b,kind\n1,2.5,x\n2,1.5,y\n4,0.5,x\n8,4.5,y\n")
    (tmp_path / "semi.csv").write_text("a;b;c\n1;2;3\n")
    command, message = (part.strip() for part in line.split("|"))
    script, *arguments = command.split()
    assert status_of(importlib.import_module(script).main, arguments) == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("script", "option", "amount"),
    [
        (random_search, "--candidates", "num_candidates"),
        (perturbation_search, "--steps", "num_steps"),
        (gradient_descent, "--epochs", "num_epochs"),
    ],
)
def test_what_an_interrupted_run_found_is_reported(
    script, option, amount, tmp_path, monkeypatch, capsys
):
    name = script.__name__
    train, path = getattr(jaxnn, name), tmp_path / "results.json"

    def interrupted(*arguments, **options):
        result = train(*arguments, **options)
        return result._replace(status="interrupted") if options[amount] > 1 else result

    monkeypatch.setattr(jaxnn, name, interrupted)
    film = [] if name == "random_search" else ["--animate", str(tmp_path / "never.gif")]
    assert script.main([option, "20", "--json", str(path), *film]) == 130
    out, err = capsys.readouterr()
    assert out.startswith("interrupted: ")
    assert err.endswith(f"{name}.py: interrupted\n")
    assert np.all(np.array(json.loads(path.read_text())["status"]) == "interrupted")
    assert not (tmp_path / "never.gif").exists()


@pytest.fixture
def saved(monkeypatch):
    """Names of the figures that a script saves, each found fit for a slide."""
    names = []

    @figures.slide
    def checked(figure, arguments, name):
        assert_fit_for_a_slide(figure)
        names.append(name)
        save(figure, arguments, name)

    save = figures.save
    for script in (check_gradients, compare, gradient_descent, perturbation_search, random_search):
        monkeypatch.setattr(script, "save", checked)
    return names


def size_of(picture):
    with Image.open(picture) as image:
        return image.size


def test_compare_writes_its_table_figures_and_improvements(tmp_path, monkeypatch, capsys, saved):
    monkeypatch.setattr(compare, "EXPERIMENTS", compare.EXPERIMENTS[:1])
    path = tmp_path / "comparison.json"
    small = ["--seeds", "2", "--candidates", "500", "--steps", "300", "--epochs", "200"]
    more = ["--output", str(tmp_path), "--json", str(path), "--verbose"]
    more += ["--format", "png", "svg", "pdf", "--dpi", "100"]
    assert compare.main([*small, *more]) == 0
    kinds = ("methods", "proposals", "regions")
    assert sorted(saved) == [f"{kind}-vertical-2-3-3" for kind in kinds]
    for picture in (tmp_path / name for name in saved):
        assert size_of(picture.with_suffix(".png"))[0] == 1333
        assert picture.with_suffix(".svg").read_text().startswith("<?xml")
        assert picture.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    rows = json.loads(path.read_text())
    assert [row["evaluations"] for row in rows] == [[500] * 2] * 2 + [[301] * 2] + [[601] * 2] * 2
    for row in rows:
        assert row["mean"]["loss"] == pytest.approx(sum(row["loss"]) / 2)
        assert row["sd"]["loss"] == pytest.approx(abs(row["loss"][0] - row["loss"][1]) / 2)
        assert all(0 <= share <= 1 for share in row["held_out_accuracy"])
    said = capsys.readouterr().out
    for block in said.split("\n\n"):
        words = [line.split() for line in block.split("\n")]
        losses = [float(line[3]) for line in words if line[2:3] == ["loss"]]
        assert losses == sorted(losses, reverse=True)
        assert "search" not in block.split("\n")[0] or len(losses) > 1
    assert "population Bayes value" in said


@pytest.mark.parametrize(
    ("ends", "panels"), [([1.0987, 0.2], 3), ([1.0987, 1e-4], 2), ([0.0, 1], 2)]
)
def test_methods_that_end_far_apart_or_at_a_constant_answer_are_told(ends, panels):
    runs = []
    for name, end in zip(("random search", "descent"), ends, strict=True):
        history = SimpleNamespace(evaluations=np.array([1, 50]), loss=np.array([2, end]))
        result = SimpleNamespace(history=history, num_evaluations=100, loss=end, status="completed")
        runs.append(compare.Run(compare.EXPERIMENTS[0], name, 0, result, 1.0, 0.5, 0.5, np.log(3)))
    assert len(compare.draw_methods(runs).axes) == panels
    note = compare.note_of([compare.summary([run]) for run in runs])
    assert ("vertical, random search: 1.099" in note) == (ends[0] > 1) == ("alike" in note)
    assert "descent:" not in note


@pytest.fixture
def rows(tmp_path):
    """A CSV file whose words a line tells apart, and whose numbers lie on a plane."""
    x = np.random.default_rng(2).normal(size=(80, 2)) * [3, 40] + [5, -100]
    on = np.where(x[:, 0] > 5, "big", "small")
    lines = [f"{a},{word},{b},{a - 0.1 * b}" for (a, b), word in zip(x, on, strict=True)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["a,size,b,sum", *lines]))
    return path


AMOUNTS = {"random_search": "--candidates", "perturbation_search": "--steps"}


@pytest.mark.parametrize("target", ["size", "sum"])
@pytest.mark.parametrize("script", [random_search, perturbation_search, gradient_descent])
def test_a_trainer_learns_a_csv_file_and_saves_the_network(script, target, rows, tmp_path, capsys):
    saved, told = tmp_path / "deep" / "net.npz", tmp_path / "told.json"
    options = ["--data", str(rows), "--target", target, "--features", "b", "a", "--standardise"]
    options += [AMOUNTS.get(script.__name__, "--epochs"), "2000", "--hidden", "4", "--plot"]
    options += ["--output", str(tmp_path), "--save", str(saved), "--json", str(told)]
    assert script.main([*options, *["--verbose"] * (script is not gradient_descent)]) == 0
    model, params, columns = jaxnn.load(saved)
    assert model.settings.sizes == (2, 4, 2 if target == "size" else 1)
    batch = jaxnn.datasets.load_csv(rows, target=target, columns=columns).batch
    predicted, y = np.asarray(model.predict(params, batch.x)), np.asarray(batch.y)
    if target == "size":
        assert columns.class_names.tolist() == ["big", "small"]
        score, name = np.mean(predicted == y), "accuracy"
        assert score > 0.8
    else:
        score, name = 1 - np.mean((predicted - y) ** 2) / np.var(y), "r2"
        assert score > 0.8 or script is random_search
    assert json.loads(told.read_text())[name] == pytest.approx(score, abs=1e-5)
    said = capsys.readouterr().out
    assert str(saved) in said
    assert script is gradient_descent or f"  {name} " in said
    assert [path.name for path in tmp_path.glob(f"{script.__name__.replace('_', '-')}-rows*.png")]


def test_rows_of_a_file_are_held_out_and_the_best_of_many_networks_is_saved(rows, tmp_path):
    saved, told = tmp_path / "net.npz", tmp_path / "told.json"
    rows.write_text(rows.read_text().replace(",", ";"))
    options = ["--data", str(rows), "--delimiter", ";", "--target", "size", "--standardise"]
    options += ["--networks", "3"]
    options += ["--epochs", "200", "--validation", "20", "--batch-size", "7", "--keep-remainder"]
    assert gradient_descent.main([*options, "--save", str(saved), "--json", str(told)]) == 0
    report = json.loads(told.read_text())
    assert report["num_steps"] == [200 * 9] * 3  # 60 rows are left
    assert min(report["validation_accuracy"]) > 0.7
    model, params, columns = jaxnn.load(saved)
    like = {"target": "size", "columns": columns, "delimiter": ";"}
    whole = model.accuracy(params, jaxnn.datasets.load_csv(rows, **like).batch)
    best = np.argmin(report["loss"])
    parts = 60 * report["accuracy"][best] + 20 * report["validation_accuracy"][best]
    assert whole == pytest.approx(parts / 80)


@pytest.mark.parametrize("target", ["size", pytest.param("sum", marks=pytest.mark.exhaustive)])
def test_compare_and_check_gradients_take_a_csv_file(target, rows, tmp_path, capsys):
    path, file = tmp_path / "a.json", ["--data", str(rows), "--target", target, "--standardise"]
    file += ["--features", "a", "b", *["sum"] * (target == "size")]
    small = ["--seeds", "1", "--candidates", "100", "--steps", "100", "--epochs", "50"]
    assert compare.main([*file, *small, "--output", str(tmp_path), "--json", str(path)]) == 0
    told, name = json.loads(path.read_text()), "accuracy" if target == "size" else "r2"
    assert [row["sizes"] for row in told] == [[3, 16, 2] if target == "size" else [2, 16, 1]] * 5
    assert all(len(row[f"held_out_{name}"]) == 1 for row in told)
    assert f" {name} " in capsys.readouterr().out
    more = ["--depths", "1", "--samples", "2", "--json", str(path)]
    assert check_gradients.main([*file, *more]) == 0
    losses = {row["network"]["loss"] for row in json.loads(path.read_text())}
    of_numbers = {"mean_squared_error", "mean_absolute_error", "huber"}
    assert losses == ({"categorical_crossentropy"} if target == "size" else of_numbers)


def test_a_gradient_of_ones_own_is_checked_on_a_csv_file(rows, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(OWN.replace("batch @ params", "batch.x @ params"))
    named = own(tmp_path / "mine.py")[:6]
    file = ["--data", str(rows), "--target", "size", "--features", "a", "b"]
    assert check_gradients.main([*named, *file]) == 0
    assert status_of(check_gradients.main, [*own(tmp_path / "mine.py"), *file]) == 2
    assert "--data and --batch exclude each other" in error_of(capsys)


@pytest.mark.exhaustive
def test_check_gradients_passes_and_writes_its_reports(tmp_path, capsys):
    path = tmp_path / "gradients.json"
    assert check_gradients.main(["--depths", "1", "--samples", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert len(rows) == 26
    assert all(row["passed"] for row in rows)
    said = capsys.readouterr().out
    assert "26 of 26 networks passed" in said
    assert "0.0e+00" not in said


SEARCH = ["--candidates", "3000", "--top-k", "3", "--thresholds", "0.9", "1.0"]


def found_by(folder, *arguments):
    path = folder / "results.json"
    assert random_search.main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_random_search_reports_what_the_library_finds(tmp_path, capsys, saved):
    told = found_by(tmp_path, *SEARCH, "--verbose", "--plot", "--output", str(tmp_path))
    data_key, key = jax.random.split(jax.random.key(0))
    batch, model = jaxnn.datasets.vertical(data_key, samples=100), jaxnn.mlp((2, 3, 3))
    given = key, model.loss, model.sampler(scale=4.0), batch
    found = jaxnn.random_search(*given, num_candidates=3_000, top_k=3, thresholds=[0.9, 1.0])
    assert (told["best_loss"], told["best_candidate"]) == (found.loss, found.candidate)
    assert (told["num_candidates"], told["num_nonfinite"]) == (3_000, 0)
    assert [row["num_below"] for row in told["counts"]] == found.counts.num_below.tolist()
    assert told["candidates_per_second"] == pytest.approx(3_000 / told["seconds"])
    assert saved == ["random-search-vertical"]
    assert size_of(tmp_path / "random-search-vertical.png")[0] == 1919
    assert capsys.readouterr().out.count("evaluations ") == len(found.history.loss)


def test_random_search_resumes_and_merges(tmp_path):
    whole = found_by(tmp_path, *SEARCH)
    parts = [str(tmp_path / name) for name in ("a.npz", "b.npz")]
    first = ["--candidates", "1000", *SEARCH[2:], "--checkpoint", parts[0]]
    found_by(tmp_path, *first)
    first[1] = "2000"
    assert found_by(tmp_path, *first)["num_candidates"] == 2_000
    second = ["--start", "2000", "--candidates", "1000", *SEARCH[2:], "--checkpoint", parts[1]]
    found_by(tmp_path, *second)
    merged = found_by(tmp_path, "--merge", *reversed(parts))
    same = {"best_loss", "best_candidate", "accuracy", "num_candidates", "counts", "top", "status"}
    assert {name: merged[name] for name in same} == {name: whole[name] for name in same}


def test_several_scales_give_a_table_and_a_figure(tmp_path, capsys, saved):
    rows = found_by(
        tmp_path, "--candidates", "20000", "--scale", "4", "0.05", "--output", str(tmp_path)
    )
    assert [row["scale"] for row in rows] == ["0.05", "4"]
    for row in rows:
        _, thousand, ten_thousand, best = row.values()
        assert thousand >= ten_thousand > 0.9 * best
    assert rows[0]["10,000"] > 1.09 > 0.5 > rows[1]["10,000"]
    assert saved == ["scales-vertical-2-3-3"]
    assert "20,000 drawn" in capsys.readouterr().out


def test_climbers_are_held_against_plain_hill_climbing_seed_by_seed():
    def runs(losses):
        return [compare_climbers.Climb(loss, 0.5, np.arange(2), np.ones(2)) for loss in losses]

    losses = np.linspace(1.0, 2.0, 20)
    better = losses - np.where(np.arange(20) % 4, 0.1, -0.2)
    row = compare_climbers.row_of("spiral", "annealing", runs(better), runs(losses))
    assert row["seeds won"] == 15
    assert row["margin"] == pytest.approx(0.1)
    assert (row["from"], row["to"]) == pytest.approx((0.1, 0.1))
    assert row["quartile"] < row["loss"] < row["third"]


def test_a_data_set_that_is_not_installed_is_said_to_be(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert compare_climbers.main(["--problems", "iris", "--output", str(tmp_path)]) == 0
    assert "iris: scikit-learn not installed" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_small_comparison_of_climbers_has_a_row_each_and_a_figure(tmp_path):
    path = tmp_path / "climbers.json"
    small = ["--problems", "vertical", "--evaluations", "10000", "--seeds", "6"]
    assert compare_climbers.main([*small, "--output", str(tmp_path), "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert len(rows) == 10
    assert all(0 < row["quartile"] <= row["loss"] <= row["third"] < np.log(3) for row in rows)
    assert rows[0]["margin"] == rows[0]["seeds won"] == 0
    assert (tmp_path / "climbers.png").stat().st_size > 10_000


CHAINS = ["--steps", "300", "--chains", "2", "--verbose"]
DESCENT = ["--epochs", "30", "--batch-size", "64", "--keep-remainder", "--max-norm", "1"]
DESCENT += ["--validation", "20", "--weight-decay", "0.001", "--warmup", "5"]


@pytest.mark.parametrize(
    ("script", "options", "counts"),
    [
        (gradient_descent, DESCENT, (150, 91)),
        (perturbation_search, [*CHAINS, "--temperature", "0.01"], (300, 602)),
        *(
            pytest.param(
                perturbation_search, CHAINS + kind, (300, 602), marks=pytest.mark.exhaustive
            )
            for kind in (["--one-fifth", "--one-coordinate"], ["--patience", "30", "--restart"])
        ),
    ],
)
def test_a_trainer_reports_draws_and_animates(
    script, options, counts, tmp_path, capsys, monkeypatch, saved
):
    monkeypatch.setattr(figures, "FRAMES", 3)
    path, film = tmp_path / "results.json", tmp_path / "film.gif"
    more = ["--plot", "--output", str(tmp_path), "--json", str(path), "--animate", str(film)]
    assert script.main([*options, *more]) == 0
    report = json.loads(path.read_text())
    assert (report["num_steps"], report["num_evaluations"]) == counts
    assert report["steps_per_second"] > 0
    assert 0 < report["accuracy"] <= 1
    (picture,) = tmp_path.glob("*-vertical-2-3-3.png")
    assert [picture.stem] == saved
    assert size_of(picture)[0] == size_of(film)[0] == 1919
    said = capsys.readouterr().out
    assert "completed: loss" in said
    if script is perturbation_search:
        assert report["best_loss"] == pytest.approx(min(report["loss_of_each_chain"]))
        assert 0 < report["num_accepted"] < 600
        assert said.count("  accuracy 0.") > 3
        assert " steps of 2 chains, " in said


def test_a_descent_is_drawn_over_epochs_with_that_of_the_lowest_validation_loss():
    keys, model = jax.random.split(jax.random.key(0), 4), jaxnn.mlp((2, 8, 3))
    batch, held_out = (jaxnn.datasets.spiral(key, samples=30) for key in keys[:2])
    given = keys[2], model.value_and_grad, model.init(keys[3], scale=1.0), batch
    options = {"validation_batch": held_out, "metric_fn": model.accuracy, "num_epochs": 200}
    adam = jaxnn.optimizers.adam(0.1)
    result = jaxnn.gradient_descent(*given, optimizer=adam, batch_size=40, **options)
    with jaxnn.plotting.style("slide"):
        figure: Any = gradient_descent.draw(result, model, batch, 3 * 80 / 90, "spiral")
    left, middle, _ = figure.axes
    steps, epochs, mark = (line.get_xdata() for line in left.lines)
    np.testing.assert_allclose(steps, np.arange(1, 401) / 2)
    np.testing.assert_allclose(epochs, np.arange(1, 201))
    history: Any = result.history
    best = 1 + np.argmin(history.validation_loss)
    np.testing.assert_allclose(mark, best)
    np.testing.assert_array_equal(middle.lines[1].get_ydata(), history.validation_metric)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:3] == ["training", "validation", f"lowest validation loss, epoch {best}"]
    assert [ax.get_ylabel() for ax in (left, middle)] == ["loss", "accuracy"]
    figures.plt.close(figure)


def test_a_descent_that_ends_above_its_lowest_loss_says_so(capsys):
    options = ["--learning-rate", "20", "--epochs", "200", "--optimizer", "sgd"]
    for more, is_said in ((options, True), (["--epochs", "20", "--schedule", "constant"], False)):
        assert gradient_descent.main(more) == 0
        assert ("lowest loss of a step" in capsys.readouterr().out) == is_said


@pytest.mark.exhaustive
def test_many_networks_are_told_in_quantiles(tmp_path, capsys):
    path = tmp_path / "many.json"
    options = ["--networks", "3", "--epochs", "20", "--samples", "10", "--json", str(path)]
    assert gradient_descent.main(options) == 0
    told = json.loads(path.read_text())
    assert told["num_steps"] == [20] * 3
    assert told["status"] == ["completed"] * 3
    assert f"median {np.median(told['loss']):.4f}" in capsys.readouterr().out


OWN = """
import sys
import jax, jax.numpy as jnp, numpy as np
def rows(): return jnp.arange(6.0).reshape(3, 2)
def sample(key): return jax.random.normal(key, (2,))
def loss(params, batch): return jnp.mean((batch @ params - 1) ** 2)
right = jax.value_and_grad(loss)
def half(params, batch):
    value, gradient = right(params, batch)
    return value, gradient / 2
def nothing(params, batch):
    value, gradient = right(params, batch)
    return value, gradient * jnp.nan
def broken(params, batch):
    return right(params, batch[1 / 0])
def leaves(*_): sys.exit(0)
def loss_in_numpy(params, batch): return np.mean(np.square(batch @ params - 1))
def numpy(params, batch):
    off = np.subtract(batch @ params, 1)
    return np.mean(off ** 2), 2 * batch.T @ off / len(off)
def wrong_in_numpy(params, batch): return numpy(params, batch)[0], -numpy(params, batch)[1]
def far(params, batch): return loss(params, batch) + jnp.sum(jnp.maximum(params - 9, 0))
def not_far(params, batch): return far(params, batch), right(params, batch)[1]
def writes(params, batch):
    params *= 2
    return np.sum(np.square(params)), params
"""


OWN_CLASS = """
from typing import NamedTuple
import jax, jax.numpy as jnp
class Params(NamedTuple):
    w: jax.Array
def rows(): return jnp.array([2.0, 3.0, 5.0])
def sample(key): return Params(jax.random.normal(key, (3,)))
def loss(params, batch):
    assert isinstance(params, Params)
    return jnp.sum(jnp.array([2.0, 3.0, 5.0]) * params.w) + jnp.sum(batch)
def turned(params, batch):
    value, gradient = jax.value_and_grad(loss)(params, batch)
    return value, Params(gradient.w[::-1])
"""


def own(path, **names):
    """The options that name the functions in a file."""
    given = {"loss": "loss", "gradient": "right", "params": "sample", "batch": "rows"} | names
    named = [(f"--{option}", f"{path}:{name}") for option, name in given.items() if name]
    return [part for pair in named for part in pair]


@pytest.mark.parametrize(
    ("gradient", "status", "loss"),
    [
        *[("right", 0, "loss"), ("half", 1, "loss"), ("nothing", 1, "loss")],
        *[("numpy", 0, "loss"), ("numpy", 0, "loss_in_numpy"), ("right", 0, "loss_in_numpy")],
        ("wrong_in_numpy", 1, "loss_in_numpy"),
    ],
)
def test_a_gradient_of_ones_own_is_checked(gradient, status, loss, tmp_path, capsys, saved):
    (tmp_path / "own.py").write_text(OWN)
    path, picture = tmp_path / "own.json", tmp_path / "v.png"
    named = own(tmp_path / "own.py", gradient=gradient, loss=loss)
    assert check_gradients.main([*named, "--json", str(path), "--plot", str(picture)]) == status

    def refuse(constant):
        raise AssertionError(constant)

    told = json.loads(path.read_text(), parse_constant=refuse)
    assert (told["passed"], told["num_samples"]) == (status == 0, 20)
    assert (told["worst"]["error"] is None) == (gradient == "nothing" or "numpy" in loss)
    said = capsys.readouterr().out
    assert ("2 times too small" in said) == (gradient == "half")
    assert ("of the wrong sign" in said) == (gradient == "wrong_in_numpy")
    assert ("JAX cannot trace value_and_grad_fn" in said) == ("numpy" in gradient)
    assert saved == ["v"]
    assert size_of(picture)[0] == 1919


def test_a_wrong_gradient_is_drawn_flat_and_its_leaf_is_named():
    def loss(params, batch):
        return jax.numpy.sum(params["w"] ** 2) + params["b"]

    def half(params, batch):
        return loss(params, batch), {"w": params["w"], "b": 1.0}

    given = jax.random.key(0), loss, half, {"w": np.ones(2), "b": 1.0}, None
    report, errors = jaxnn.check_gradients(*given), jaxnn.difference_errors(*given[1:])
    (ax,) = check_gradients.drawn(errors._replace(by_jax=None), report, "sample 2").axes
    assert ax.get_title() == "sample 2: wrong in params['w']"
    low, high = ax.get_ylim()
    assert low <= 1e-12 < errors.gradient.max() < 1 <= high


def told_by(program, **options):
    """The losses and the numbers of the gradients that a failing case prints, in pairs."""
    command = [sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert (done.returncode, done.stderr) == (1, "")
    pairs = re.findall(r"(\S+) under test, (\S+) by", done.stdout)
    return [tuple(map(float, pair)) for pair in pairs]


def test_a_wrong_gradient_is_written_as_a_page_and_as_a_program(tmp_path, capsys):
    """Neither needs any other file but the one with the functions."""
    (tmp_path / "own.py").write_text(OWN)
    page, program, path = tmp_path / "page.html", tmp_path / "failing.py", tmp_path / "own.json"
    options = ["--report", page, "--write-failing-case", program, "--json", path]
    named = own(tmp_path / "own.py", gradient="half")
    assert check_gradients.main([*named, *map(str, options)]) == 1
    said = capsys.readouterr().out
    assert "smallest case: params[0] is " in said
    assert f"{program} is a program that shows it" in said
    told = json.loads(path.read_text())
    assert told["power"] is None
    assert told["smallest"]["gradient"] == pytest.approx(told["smallest"]["expected"] / 2)
    assert told["smallest"]["script"] == program.read_text()
    _, (wrong, right) = told_by(program)
    assert (wrong, right) == pytest.approx((right / 2, told["smallest"]["expected"]))
    text = page.read_text()
    assert not re.search(r"<script|<link|<img|src=|href=.http|url\(http|@import", text)
    for said in (
        "failed",
        "1 of 1",
        "2 times too small",
        "names_in(",
        "<svg",
        "Coverage",
    ):
        assert said in text
    assert "planted" not in text


def test_a_failing_case_with_a_class_of_ones_own_runs_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()
    Path("my.py").write_text(OWN_CLASS)
    check_gradients.scope_of.cache_clear()  # Another test has run another file of this name.
    options = [*own("my.py", gradient="turned"), "--write-failing-case", "failing.py"]
    assert check_gradients.main(options) == 1
    assert "Params(w=" in Path("failing.py").read_text()
    losses, *gradients = told_by(tmp_path / "failing.py", cwd="elsewhere")
    assert losses[0] == losses[1]
    assert [wrong for wrong, _ in gradients] == [right for _, right in gradients[::-1]]
    assert gradients[0][0] != gradients[0][1]


def test_a_page_shows_the_smallest_case_of_a_sample_that_was_added(tmp_path):
    """No sample drawn reaches the branch that is wrong."""
    (tmp_path / "own.py").write_text(OWN)
    page = tmp_path / "page.html"
    named = own(tmp_path / "own.py", gradient="not_far", loss="far")
    assert check_gradients.main([*named, "--report", str(page)]) == 1
    assert check_gradients.main(named) == 0
    assert "maximum(params - 9, 0)" in page.read_text()


@pytest.mark.parametrize(
    ("loss", "required", "status", "said"),
    [
        ("loss", ["0", "0.5"], 0, "planted faults caught"),
        ("loss", ["1", "0.999"], 3, "% is too low: 99.9 % is required"),
        ("loss_in_numpy", ["0", "0.5"], 3, "that JAX cannot trace: 0 % is required"),
    ],
)
def test_too_little_coverage_or_power_has_a_status_of_its_own(
    loss, required, status, said, tmp_path, capsys
):
    (tmp_path / "own.py").write_text(OWN)
    page, path = tmp_path / "page.html", tmp_path / "own.json"
    named = own(tmp_path / "own.py", loss=loss)
    options = ["--require-coverage", required[0], "--require-power", required[1]]
    options += ["--json", str(path), "--report", str(page)]
    assert check_gradients.main([*named, *options]) == status
    assert said in capsys.readouterr().out
    told, text = json.loads(path.read_text()), page.read_text()
    caught = [each["is_caught"] for each in told["power"]["faults"]]
    assert told["power"]["share"] == pytest.approx(np.mean(caught))
    assert (told["coverage"] is None) == (loss == "loss_in_numpy")
    assert ("Not known of a loss that JAX cannot" in text) == (told["coverage"] is None)
    assert ("of <code>jax.grad</code> and" in text) == (told["coverage"] is not None)
    assert f"catches {sum(caught)} of {len(caught)}" in text
    assert ("passed" in text, "The smallest case" in text) == (True, False)


def test_the_librarys_gradients_are_certified(rows, tmp_path):
    path, options = tmp_path / "gradients.json", ["--samples", "2", "--certify"]
    file = ["--data", str(rows), "--target", "size", "--depths", "1", "--json", str(path)]
    assert check_gradients.main([*options, *file]) == 0
    (told,) = json.loads(path.read_text())
    assert told["coverage"]["share"] > 0.9
    assert 0.8 < told["power"]["share"] < 1


@pytest.mark.parametrize(
    ("names", "text", "message"),
    [
        ({"gradient": "broken"}, OWN, "own.py, line 15, in broken: ZeroDivisionError: division by"),
        ({"params": "leaves"}, OWN, "own.py, line 16, in leaves: SystemExit: 0"),
        ({"batch": None}, OWN, " 'DynamicJaxprTracer' (--batch is absent: batch is None)"),
        ({"gradient": "sample"}, OWN, "in sample: must take (params, batch)"),
        ({"gradient": "writes"}, OWN, "own.py, line 25, in writes: ValueError: output array is re"),
        ({"gradient": "loss"}, OWN, "error: value_and_grad_fn must return"),
        ({"loss": "lost"}, OWN, "there is no own.py:lost: own.py has no 'lost'"),
        ({}, "loss = undefined", "own.py, line 1, in <module>: NameError: name 'undefined'"),
        ({}, "\ndef loss(:", "own.py, line 2: invalid syntax"),
    ],
)
def test_a_fault_in_a_function_of_ones_own_is_told_with_its_place(
    names, text, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "own.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    check_gradients.scope_of.cache_clear()
    assert status_of(check_gradients.main, own("own.py", **names)) == 2
    assert message in error_of(capsys)


@pytest.mark.exhaustive
def test_descents_are_filmed_at_every_learning_rate(tmp_path):
    options = ["--steps", "1", "--learning-rates", "1.05", "--output", str(tmp_path)]
    path = tmp_path / "films.json"
    assert descent_pictures.main([*options, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["one-weight"][0] > 6
    for name in ("descent-one-weight.gif", "descent-two-weights.gif"):
        assert (tmp_path / name).read_bytes().startswith(b"GIF89a")
    assert size_of(tmp_path / "descent-two-weights.gif")[0] == 1919


def film_of(monkeypatch, make):
    """The film that `make()` would write."""
    films = []
    monkeypatch.setattr(figures, "save_film", lambda film, *_: films.append(film))
    films.append(make())
    (film,) = filter(None, films)
    film._fig.canvas.draw()  # which goes back to the first frame, once
    return film


def test_a_film_of_regions_tells_loss_and_accuracy_at_every_frame(tmp_path, monkeypatch):
    batch, model = jaxnn.datasets.vertical(jax.random.key(0), samples=10), jaxnn.mlp((2, 3, 3))
    params = model.init(jax.random.key(1))

    def train(steps):
        key, gradient = jax.random.key(2), model.value_and_grad
        return jaxnn.gradient_descent(
            key, gradient, params, batch, num_epochs=steps, learning_rate=1.0
        )

    given = train, model, batch, 200, tmp_path / "a.gif", "vertical, 2-3-3, rate 1"
    film = film_of(monkeypatch, lambda: figures.film_regions(*given))
    for number, steps in ((0, 0), (-1, 200)):
        count = list(film.new_frame_seq())[number]
        with jaxnn.plotting.style("slide"):
            film._func(count)
            assert_fit_for_a_slide(film._fig)
            assert film._fig.axes[1].lines[0].get_xdata()[-1] == steps
        found = train(steps)
        share = float(model.accuracy(found.params, batch))
        assert film._fig.get_suptitle() == f"vertical, 2-3-3, rate 1: step {steps}"
        titles = [ax.get_title() for ax in film._fig.axes]
        assert titles[:2] == [f"{100 * share:.1f} % of 30 rows right", f"loss {found.loss:.3f}"]


def test_a_descent_that_leaves_the_picture_is_said_to_and_minima_are_marked(monkeypatch):
    rates, batch = np.array([0.2, 1.05]), descent_pictures.plane(0)
    path = np.array([[[-1.0], [-1.0]], [[0.5], [4.5]], [[1.5], [90.0]], [[1.5], [-99.0]]])
    film = film_of(
        monkeypatch,
        lambda: descent_pictures.film(path, rates, descent_pictures.draw_curve, batch),
    )
    steady, wild = film._fig.axes
    with jaxnn.plotting.style("slide"):
        film._func(1)
        assert not any(ax.texts[-1].get_visible() for ax in (steady, wild))
        film._func(2)
        assert_fit_for_a_slide(film._fig)
    assert wild.texts[-1].get_visible()
    assert wild.texts[-1].get_text() == "left the picture\nat step 2"
    assert not steady.texts[-1].get_visible()
    assert wild.get_title().startswith("learning rate 1.05\nloss 7,")
    monkeypatch.setattr(descent_pictures, "MORE", 0)
    film._func(3)
    assert [len(ax.lines[-1].get_xdata()) for ax in (steady, wild)] == [4, 3]
    for weights in (1, 2):
        best = descent_pictures.minimum(batch, weights)
        nearby = best + np.array([[0.0] * weights, [0.01] * weights, [-0.01] * weights])
        assert descent_pictures.losses(nearby, batch).argmin() == 0


def test_films_are_mp4_where_ffmpeg_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.shutil, "which", lambda _: None)
    with pytest.raises(cli.argparse.ArgumentTypeError, match="mp4 needs ffmpeg, not found here"):
        cli.film_file(str(tmp_path / "a.mp4"))
    assert cli.film_file(str(tmp_path / "a.gif")).suffix == ".gif"
    monkeypatch.setattr(cli.shutil, "which", lambda _: "/usr/bin/ffmpeg")
    assert cli.film_file(str(tmp_path / "a.mp4")) == tmp_path / "a.mp4"
    written = []
    monkeypatch.setattr(
        FuncAnimation, "save", lambda _, path, writer, dpi: written.append((type(writer), dpi))
    )
    for suffix in (".gif", ".mp4"):
        film: Any = FuncAnimation(figures.plt.figure(), lambda _: [], frames=1)
        film._draw_was_started = True
        figures.save_film(film, tmp_path / f"a{suffix}")
    assert written == [(figures.PillowWriter, 144), (figures.FFMpegWriter, 144)]


def rows_of_libraries():
    """As many rows as the benchmark prints."""
    methods = equal_evaluations.METHODS.items()
    values = {"evaluations/s": 2e4, "slowest": 1e4, "fastest": 3e4, "loss": 1.0, "lowest": 0.9}
    return [
        {"data": data, "net": "2-3-3", "method": method, "library": name, "highest": 1.1} | values
        for data in equal_evaluations.PROBLEMS
        for method, (libraries, _) in methods
        for name in libraries
    ]


def kink_solutions(widths):
    """What 10,000 solutions of every width come to."""
    ends = {"acceptance_interval": [5e-5, 7e-5], "test_accuracy_interval": [0.98, 0.99]}
    piece = {"solutions": 10_000, "acceptance": 6e-5, "test_accuracy": 0.985, **ends}
    piece["map"] = np.eye(guess_and_check.SIDE).tolist()
    return {f"{m}, width {width}": piece for m in guess_and_check.METHODS for width in widths}


def climbs():
    names = compare_climbers.kinds(jaxnn.mlp((2, 3, 3)), 10_000)
    steps = np.arange(100, 10_000, 100)
    run = compare_climbers.Climb(0.5, 0.5, steps, 1 / steps)
    return {problem: {name: [run] for name in names} for problem in compare_climbers.PROBLEMS}


def chapter():
    arguments = reproduce_chapter.parse(["--full"])
    counts = [*arguments.counts, reproduce_chapter.LONG]
    names = [
        reproduce_chapter.random_name(data, scale, count)
        for data in reproduce_chapter.DATA_SETS
        for scale in arguments.scales
        for count in counts
    ]
    return {name: {"loss": [0.3, 0.5, 1.7]} for name in names}, arguments


WIDTHS = guess_and_check.parse([]).widths
LONG = {
    "equal_evaluations": lambda: equal_evaluations.draw(rows_of_libraries(), 10_240),
    "guess_and_check_maps": lambda: guess_and_check.draw_maps(kink_solutions(WIDTHS), WIDTHS),
    "guess_and_check_curves": lambda: guess_and_check.draw_curves(kink_solutions(WIDTHS), WIDTHS),
    "climbers": lambda: compare_climbers.draw(climbs()),
    "chapter": lambda: reproduce_chapter.draw(*chapter()),
}


@pytest.mark.parametrize("name", LONG)
def test_figures_of_long_runs_are_fit_for_a_slide(name):
    with jaxnn.plotting.style("slide"):
        assert_fit_for_a_slide(LONG[name]())
    figures.plt.close("all")
