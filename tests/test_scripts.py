"""The scripts, called as functions: small runs, their files and their exit status."""

import importlib
import json
import signal
import sys
from pathlib import Path

import check_gradients
import compare
import compare_climbers
import descent_pictures
import films
import gradient_descent
import jax
import numpy as np
import perturbation_search
import pytest
import random_search
import sweep_scales
from programs import start_program

import jaxnn

pytestmark = pytest.mark.slow
FOLDER = Path(check_gradients.__file__).parent
SCRIPTS = sorted(
    path.stem for path in FOLDER.glob("*.py") if "\n    sys.exit(main())\n" in path.read_text()
)


def error_of(capsys):
    """The one line that a script says on stderr, without the usage and bars before it."""
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line]
    assert not [line for line in lines if "Traceback" in line]
    assert sum(": error: " in line for line in lines) == 1
    return lines[-1]


def test_there_are_scripts_and_each_begins_at_its_main():
    assert {"compare", "check_gradients", "benchmark", "own_model"} <= set(SCRIPTS)
    for path in FOLDER.glob("*.py"):
        assert ("if __name__ ==" in path.read_text()) == (path.stem in SCRIPTS)


ERRORS = [
    (TypeError("loss_fn must\nbe callable"), "error: loss_fn must be callable"),
    (ValueError("scale must be above 0"), "error: scale must be above 0"),
    (FileNotFoundError(2, "No such file", "a.npz"), "error: [Errno 2] No such file: 'a.npz'"),
    (MemoryError(), "error: MemoryError"),
    (OverflowError("too large"), "error: OverflowError: too large"),
    (ModuleNotFoundError("No module named 'x'"), "error: ModuleNotFoundError: No module named 'x'"),
    (jax.errors.JaxRuntimeError("OUT OF MEMORY"), "error: JaxRuntimeError: OUT OF MEMORY"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_ends_an_error_with_a_line_and_status_2(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    for error, line in ERRORS:

        def fail(argv, error=error):
            raise error

        monkeypatch.setattr(module, "parse", fail)
        assert module.main([]) == 2
        assert capsys.readouterr().err == f"{script}.py: {line}\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_ends_ctrl_c_with_a_line_and_status_130(script, monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    module = importlib.import_module(script)
    monkeypatch.setattr(module, "parse", interrupt)
    assert module.main([]) == 130
    assert capsys.readouterr().err == f"{script}.py: interrupted\n"


def test_a_bug_in_a_script_is_told_with_its_traceback_and_is_no_failed_check(monkeypatch, capsys):
    monkeypatch.setattr(compare, "parse", lambda argv: {}["seeds"])
    assert compare.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "compare.py: error: KeyError: 'seeds'"


BAD = """
random_search --scale 0                           | scale must be a finite number above 0
random_search --thresholds nan                    | thresholds must be finite numbers
random_search --candidates 1e30                   | num_candidates must be at most
random_search --candidates 0                      | --candidates must be at least 1
random_search --start 1e19                        | start must be at most
random_search --top-k 0                           | top_k must be an integer of at least 1
random_search --hidden -1                         | must be an integer of at least 1; got -1
random_search --samples 0                         | samples must be an integer of at least 1
random_search --seed 99999999999999999999         | OverflowError
random_search --devices 0                         | devices must hold at least one device
random_search --merge missing.npz                 | No such file or directory: 'missing.npz'
random_search --merge junk.npz                    | cannot load junk.npz
random_search --checkpoint junk.npz               | cannot load junk.npz
random_search --checkpoint no/x.npz               | No such file or directory: 'no/x.npz'
random_search --distributed a b c                 | invalid literal for int
random_search --json junk.npz/x.json              | argument --json: must be a folder to write to
random_search --json .                            | argument --json: must name a file
random_search --output junk.npz                   | argument --output: must be a folder
perturbation_search --scale -1                    | scale must be a finite number above 0
perturbation_search --chains 0                    | num_chains must be an integer of at least 1
perturbation_search --temperature nan             | must be a finite number above 0
perturbation_search --patience 0                  | patience must be an integer of at least 1
perturbation_search --record-every 0              | record_every must be an integer of at least 1
perturbation_search --checkpoint junk.npz         | cannot load junk.npz
perturbation_search --animate x.png               | must name a .gif file
perturbation_search --animate junk.npz/x.gif      | must be a folder to write to
gradient_descent --batch-size -1                  | batch_size must be an integer of at least 1
gradient_descent --learning-rate nan              | must be a finite number above 0
gradient_descent --max-norm 0                     | max_norm must be a finite number above 0
gradient_descent --l2 -1                          | must be a finite number of at least 0
gradient_descent --checkpoint junk.npz            | cannot load junk.npz
gradient_descent --networks 0                     | --networks must be at least 1
check_gradients --samples 0                       | num_samples must be an integer of at least 1
check_gradients --tolerance 0                     | tolerance must be a finite number above 0
check_gradients --depths 9                        | invalid choice: 9
check_gradients --plot v.png                      | --plot is for your own gradient
check_gradients --loss x:y                        | --loss, --gradient and --params go together
compare --seeds 0                                 | --seeds must be at least 1
compare --json junk.npz/x.json                    | argument --json: must be a folder to write to
compare_climbers --problems nothing               | invalid choice: 'nothing'
descent_pictures --learning-rates nan             | learning_rate must be a finite number above 0
fast_population --hidden -1                       | must be an integer of at least 1; got -1
own_model --data nothing                          | invalid choice: 'nothing'
perturbation_gradients --hidden -2                | must be an integer of at least 1; got -2
reproduce_chapter --scales 0                      | scale must be a finite number above 0
reproduce_chapter --output foreign                | chapter.json is of other settings
simplicity_bias --functions 1e12                  | max_outcomes must be at most
sweep_scales --scales nan --candidates 1000       | scale must be a finite number above 0
guess_and_check --seed 99999999999999999999       | OverflowError
benchmark --seconds nan                           | --seconds must be above 0
benchmark --nets 2                                | invalid layer_sizes value
"""


@pytest.mark.parametrize("line", BAD.strip().split("\n"))
def test_a_bad_argument_is_told_in_a_line_and_ends_with_status_2(
    line, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.npz").write_text("junk")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "chapter.json").write_text("[]")
    command, message = (part.strip() for part in line.split("|"))
    script, *arguments = command.split()
    try:
        status = importlib.import_module(script).main(arguments)
    except SystemExit as refused:
        status = refused.code
    assert status == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    "script",
    [
        random_search,
        gradient_descent,
        pytest.param(perturbation_search, marks=pytest.mark.exhaustive),
    ],
)
def test_what_an_interrupted_run_found_is_reported_before_status_130(
    script, tmp_path, monkeypatch, capsys
):
    name = script.__name__
    work = {
        "random_search": ("--candidates", "num_candidates"),
        "perturbation_search": ("--steps", "num_steps"),
        "gradient_descent": ("--epochs", "num_epochs"),
    }
    option, amount = work[name]
    train, facts = getattr(jaxnn, name), tmp_path / "facts.json"

    def interrupted(*arguments, **options):
        result = train(*arguments, **options)
        return result._replace(status="interrupted") if options[amount] > 1 else result

    monkeypatch.setattr(jaxnn, name, interrupted)
    film = [] if name == "random_search" else ["--animate", str(tmp_path / "never.gif")]
    assert script.main([option, "20", "--json", str(facts), *film]) == 130
    out, err = capsys.readouterr()
    assert out.startswith("interrupted: ")
    assert err.endswith(f"{name}.py: interrupted\n")
    assert np.all(np.array(json.loads(facts.read_text())["status"]) == "interrupted")
    assert not (tmp_path / "never.gif").exists()


@pytest.mark.exhaustive
def test_ctrl_c_in_a_process_ends_with_a_line_and_status_130():
    running = start_program(str(FOLDER / "random_search.py"), "--candidates", "1e12")
    assert running.stderr is not None
    while "candidates/s" not in running.stderr.readline(200):
        pass
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert out.startswith("interrupted: ")
    assert err.endswith("random_search.py: interrupted\n")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A small comparison of one experiment: exit status, folder of figures and the facts."""
    folder = tmp_path_factory.mktemp("output")
    facts = folder / "comparison.json"
    small = ["--seeds", "2", "--candidates", "500", "--steps", "300", "--epochs", "200"]
    arguments = [*small, "--output", str(folder), "--json", str(facts), "--verbose"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "EXPERIMENTS", compare.EXPERIMENTS[:1])
        status = compare.main(arguments)
    return status, folder, json.loads(facts.read_text())


def test_compare_exits_with_0_and_writes_three_figures_an_experiment(comparison):
    status, folder, _ = comparison
    assert status == 0
    pictures = sorted(path.name for path in folder.glob("*.png"))
    kinds = ("methods", "proposals", "regions")
    assert pictures == [f"{kind}-vertical-2-3-3.png" for kind in kinds]


def test_compare_reports_the_work_and_the_spread_of_every_method(comparison):
    _, _, facts = comparison
    assert len(facts) == 5
    counts = {row["method"].split(",")[0]: row["evaluations"] for row in facts}
    assert counts == {
        "random search": [500, 500],
        "perturbation search": [301, 301],
        "gradient descent": [601, 601],
    }
    for row in facts:
        assert len(row["loss"]) == len(row["accuracy"]) == 2
        assert row["mean"]["loss"] == pytest.approx(sum(row["loss"]) / 2)
        assert row["sd"]["loss"] == pytest.approx(abs(row["loss"][0] - row["loss"][1]) / 2)
        assert all(0 <= share <= 1 for share in row["held_out_accuracy"])


def test_compare_verbose_prints_falling_losses(capsys):
    experiment = compare.EXPERIMENTS[0]
    arguments = compare.parse(["--candidates", "300", "--steps", "200", "--epochs", "2"])
    method = compare.methods(experiment, arguments)[2]
    compare.run(experiment, method, seed=0, verbose=True)
    lines = [line for line in capsys.readouterr().out.split("\n") if "iteration" in line]
    losses = [float(line.split()[3]) for line in lines]
    assert len(losses) > 3
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("option", ["--seeds", "--candidates", "--steps", "--epochs"])
def test_compare_refuses_a_count_of_0(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.parse([option, "0"])
    assert f"{option} must be at least 1; got 0" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_check_gradients_passes_and_writes_its_reports(tmp_path, capsys):
    facts = tmp_path / "gradients.json"
    assert check_gradients.main(["--depths", "1", "--samples", "2", "--json", str(facts)]) == 0
    rows = json.loads(facts.read_text())
    assert len(rows) == 7
    assert all(row["passed"] for row in rows)
    assert "7 of 7 networks passed" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_check_gradients_fails_and_names_the_leaf(monkeypatch, capsys):
    right = jaxnn.check_gradients

    def with_a_fault(key, loss_fn, value_and_grad_fn, *arguments, **options):
        def wrong(params, batch):
            loss, gradient = value_and_grad_fn(params, batch)
            (layer,) = gradient
            return loss, (layer._replace(biases=2 * layer.biases),)

        return right(key, loss_fn, wrong, *arguments, **options)

    monkeypatch.setattr(jaxnn, "check_gradients", with_a_fault)
    monkeypatch.setattr(check_gradients, "OUTPUT_LOSSES", list(check_gradients.OUTPUT_LOSSES)[:2])
    assert check_gradients.main(["--depths", "1", "--samples", "2"]) == 1
    output = capsys.readouterr().out
    wrong = [line for line in output.split("\n") if "WRONG" in line]
    assert len(wrong) == 2
    assert all(line.startswith("params[0].biases") and "2.0000" in line for line in wrong)
    assert "0 of 2 networks passed" in output


SEARCH = ["--candidates", "3000", "--top-k", "3", "--thresholds", "0.9", "1.0"]


def search_facts(folder, *arguments):
    facts = folder / "facts.json"
    assert random_search.main([*arguments, "--json", str(facts)]) == 0
    return json.loads(facts.read_text())


def test_random_search_reports_what_the_library_finds(tmp_path, capsys):
    facts = search_facts(tmp_path, *SEARCH, "--verbose", "--plot", "--output", str(tmp_path))
    data_key, key = jax.random.split(jax.random.key(0))
    batch, model = jaxnn.datasets.vertical(data_key, samples=100), jaxnn.mlp((2, 3, 3))
    given = key, model.loss, model.sampler(scale=4.0), batch
    found = jaxnn.random_search(*given, num_candidates=3_000, top_k=3, thresholds=[0.9, 1.0])
    assert (facts["best_loss"], facts["best_index"]) == (found.loss, found.index)
    assert facts["num_candidates"] == 3_000
    assert facts["num_nonfinite"] == 0
    assert [row["count"] for row in facts["counts"]] == found.counts.count.tolist()
    assert facts["candidates_per_second"] == pytest.approx(3_000 / facts["seconds"])
    assert (tmp_path / "random-search-vertical.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("iteration") == len(found.history.loss)


def test_random_search_resumes_and_merges(tmp_path):
    whole = search_facts(tmp_path, *SEARCH)
    parts = [str(tmp_path / name) for name in ("a.npz", "b.npz")]
    first = ["--candidates", "1000", *SEARCH[2:], "--checkpoint", parts[0]]
    search_facts(tmp_path, *first)
    first[1] = "2000"
    assert search_facts(tmp_path, *first)["num_candidates"] == 2_000
    second = ["--start", "2000", "--candidates", "1000", *SEARCH[2:], "--checkpoint", parts[1]]
    search_facts(tmp_path, *second)
    merged = search_facts(tmp_path, "--merge", *reversed(parts))
    same = {"best_loss", "best_index", "accuracy", "num_candidates", "counts", "top", "status"}
    assert {name: merged[name] for name in same} == {name: whole[name] for name in same}


def test_sweep_scales_writes_a_table_and_a_figure(tmp_path, capsys):
    facts = tmp_path / "sweep.json"
    small = ["--candidates", "20000", "--scales", "4", "0.05"]
    assert sweep_scales.main([*small, "--output", str(tmp_path), "--json", str(facts)]) == 0
    rows = json.loads(facts.read_text())
    assert [row["scale"] for row in rows] == [0.05, 4]
    for row in rows:
        _, thousand, ten_thousand, best = row.values()
        assert thousand >= ten_thousand > 0.9 * best
    assert rows[0]["10,000"] > 1.09 > 0.5 > rows[1]["10,000"]
    assert (tmp_path / "scales-vertical-2-3-3.png").stat().st_size > 10_000
    assert "20,000 drawn" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_perturbation_search_reports_draws_and_animates(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(films, "FRAMES", 3)
    facts, film = tmp_path / "chain.json", tmp_path / "climb.gif"
    small = ["--steps", "300", "--chains", "2", "--temperature", "0.01", "--verbose", "--plot"]
    more = ["--output", str(tmp_path), "--json", str(facts), "--animate", str(film)]
    assert perturbation_search.main([*small, *more]) == 0
    report = json.loads(facts.read_text())
    assert (report["num_steps"], report["num_evaluations"]) == (300, 602)
    assert report["best_loss"] == pytest.approx(min(report["chain_loss"]))
    assert 0 < report["num_accepted"] < 600
    assert 0 < report["accuracy"] <= 1
    assert report["steps_per_second"] > 0
    assert (tmp_path / "perturbation-search-vertical-2-3-3.png").stat().st_size > 10_000
    assert film.stat().st_size > 10_000
    assert capsys.readouterr().out.count("iteration") > 3


def test_a_thinned_search_prints_the_same_improvements_without_the_accuracies(capsys):
    lines = []
    for every in ("1", "20"):
        assert (
            perturbation_search.main(["--steps", "40", "--record-every", every, "--verbose"]) == 0
        )
        printed = capsys.readouterr().out.splitlines()
        lines.append([line for line in printed if line.startswith("iteration")])
    assert len(lines[0]) > 3
    assert [line.split("  accuracy")[0] for line in lines[0]] == lines[1]
    assert all("accuracy 0." in line for line in lines[0])


def test_climbers_are_held_against_plain_hill_climbing_seed_by_seed():
    def runs(losses):
        return [compare_climbers.Climb(loss, 0.5, np.arange(2), np.ones(2)) for loss in losses]

    plain = runs(np.linspace(1.0, 2.0, 20))
    better = runs([loss - (0.1 if number % 4 else -0.2) for number, loss in
                   enumerate(np.linspace(1.0, 2.0, 20))])  # fmt: skip
    row = compare_climbers.row_of("spiral", "annealing", better, plain)
    assert row["seeds won"] == 15
    assert row["margin"] == pytest.approx(0.1)
    assert (row["from"], row["to"]) == pytest.approx((0.1, 0.1))
    assert row["quartile"] < row["loss"] < row["third"]


def test_a_data_set_that_is_not_installed_is_said_to_be(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    arguments = ["--problems", "iris", "--output", str(tmp_path)]
    assert compare_climbers.main(arguments) == 0
    assert "iris: scikit-learn not installed" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_small_comparison_of_climbers_has_a_row_each_and_a_figure(tmp_path, capsys):
    facts = tmp_path / "climbers.json"
    small = ["--problems", "vertical", "--evaluations", "10000", "--seeds", "6"]
    assert compare_climbers.main([*small, "--output", str(tmp_path), "--json", str(facts)]) == 0
    rows = json.loads(facts.read_text())
    assert len(rows) == 10
    assert all(0 < row["quartile"] <= row["loss"] <= row["third"] < np.log(3) for row in rows)
    assert rows[0]["margin"] == rows[0]["seeds won"] == 0
    assert (tmp_path / "climbers.png").stat().st_size > 10_000
    assert "annealing" in capsys.readouterr().out


def test_gradient_descent_reports_draws_and_animates(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(films, "FRAMES", 3)
    facts, film = tmp_path / "descent.json", tmp_path / "descent.gif"
    small = ["--epochs", "30", "--batch-size", "64", "--keep-remainder", "--max-norm", "1"]
    small += ["--validation", "20", "--weight-decay", "0.001", "--warm-up", "5", "--plot"]
    more = ["--output", str(tmp_path), "--json", str(facts), "--animate", str(film)]
    assert gradient_descent.main([*small, *more]) == 0
    report = json.loads(facts.read_text())
    assert (report["num_steps"], report["num_evaluations"]) == (150, 91)
    assert 0 < report["loss"] < np.log(3) < 3 * report["accuracy"]
    assert report["steps_per_second"] > 0
    assert (tmp_path / "gradient-descent-vertical-2-3-3.png").stat().st_size > 10_000
    assert film.stat().st_size > 10_000
    assert "completed: loss" in capsys.readouterr().out


def test_weight_decay_without_adam_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        gradient_descent.parse(["--optimizer", "sgd", "--weight-decay", "0.1"])
    assert "--weight-decay is Adam's" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_many_networks_are_told_in_quantiles(tmp_path, capsys):
    facts = tmp_path / "many.json"
    options = ["--networks", "3", "--epochs", "20", "--samples", "10", "--json", str(facts)]
    assert gradient_descent.main(options) == 0
    told = json.loads(facts.read_text())
    assert told["num_steps"] == [20] * 3
    assert told["status"] == ["completed"] * 3
    middle = np.median(told["loss"])
    assert f"median {middle:.4f}" in capsys.readouterr().out


OWN = """
import sys
import jax, jax.numpy as jnp
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
def shapes(params, batch): return jnp.sum(batch @ batch), params
def leaves(*_): sys.exit(0)
def no_rows(): raise KeyError("rows")
"""


def own(path, **names):
    """The options that name the functions in a file."""
    given = {"loss": "loss", "gradient": "right", "params": "sample", "batch": "rows"} | names
    return [part for option, name in given.items() for part in (f"--{option}", f"{path}:{name}")]


@pytest.mark.parametrize(("gradient", "status"), [("right", 0), ("half", 1)])
def test_a_gradient_of_ones_own_is_checked(gradient, status, tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    facts, picture = tmp_path / "own.json", tmp_path / "v.png"
    named = own(tmp_path / "own.py", gradient=gradient)
    assert check_gradients.main([*named, "--json", str(facts), "--plot", str(picture)]) == status
    told = json.loads(facts.read_text())
    assert told["passed"] == (status == 0)
    assert told["num_samples"] == 20
    assert ("off by the factor 0.5" in capsys.readouterr().out) == (status == 1)
    assert picture.stat().st_size > 10_000


def test_a_report_of_what_is_not_finite_is_strict_json(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    facts = tmp_path / "own.json"
    named = own(tmp_path / "own.py", gradient="nothing")
    assert check_gradients.main([*named, "--json", str(facts)]) == 1

    def refuse(constant):
        raise AssertionError(constant)

    told = json.loads(facts.read_text(), parse_constant=refuse)
    assert told["worst"]["error"] is None
    assert told["leaves"][0]["gradient"] is None
    assert told["notes"] == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"gradient": "broken"}, "own.py, line 15, in broken: ZeroDivisionError: division by zero"),
        ({"loss": "broken"}, "own.py, line 15, in broken: ZeroDivisionError: division by zero"),
        ({"gradient": "shapes"}, "own.py, line 16, in shapes: TypeError: dot_general requires"),
        ({"params": "leaves"}, "own.py, line 17, in leaves: SystemExit: 0"),
        ({"batch": "no_rows"}, "own.py, line 18, in no_rows: KeyError: 'rows'"),
        (
            {"gradient": "sample"},
            "own.py, line 5, in sample: too many positional arguments for (params, batch)",
        ),
        ({"gradient": "loss"}, "error: value_and_grad_fn must return"),
        ({"loss": "lost"}, "own.py:lost: KeyError('lost')"),
    ],
)
def test_a_fault_in_a_function_of_ones_own_is_told_with_its_place(
    names, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    try:
        status = check_gradients.main(own("own.py", **names))
    except SystemExit as refused:
        status = refused.code
    assert status == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit(0)", "own.py, line 2, in <module>: SystemExit: 0"),
        ("loss = undefined", "own.py, line 1, in <module>: NameError: name 'undefined'"),
        ("import no_such_module", "own.py, line 1, in <module>: ModuleNotFoundError"),
        ("\ndef loss(:", "own.py, line 2: invalid syntax"),
    ],
)
def test_a_file_of_ones_own_that_does_not_run_is_told_with_the_line(
    text, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "own.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    check_gradients.scope_of.cache_clear()
    assert check_gradients.main(own("own.py")) == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "nowhere:loss", "--gradient", "a:b", "--params", "a:b"], "there is no nowhere"),
        (["--loss", "loss", "--gradient", "a:b", "--params", "a:b"], "must be module:name"),
        (["--loss", "math:sin"], "go together"),
        (["--plot", "v.png"], "--plot is for your own"),
    ],
)
def test_half_a_gradient_of_ones_own_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        check_gradients.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.exhaustive
def test_descents_are_filmed_at_every_learning_rate(tmp_path, capsys):
    options = ["--steps", "1", "--learning-rates", "1.05", "--output", str(tmp_path)]
    facts = tmp_path / "films.json"
    assert descent_pictures.main([*options, "--json", str(facts)]) == 0
    told = json.loads(facts.read_text())
    assert told["one weight"][0] > 6
    said = capsys.readouterr().out
    for name in ("descent-one-weight.gif", "descent-two-weights.gif"):
        assert (tmp_path / name).read_bytes().startswith(b"GIF89a")
        assert name in said
