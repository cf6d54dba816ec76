"""The experiments behind the README: their parts, and small runs of each."""

import json

import equal_evaluations
import fast_population
import guess_and_check
import how_likely
import jax
import numpy as np
import own_model
import perturbation_gradients
import pytest
import reproduce_chapter
import simplicity_bias
from scipy import stats
from shared import intervals, problems, resuming


def test_the_kink_is_two_inverted_vs_a_margin_apart():
    train, test = problems.kink(16)
    assert (len(train.x), len(test.x)) == (11, 4)
    whole, rest = problems.kink(4_000)
    assert (len(whole.x), len(rest.x)) == (2_800, 1_200)
    for batch in (whole, rest):
        heights = np.where(batch.y == 1, 0.0, 0.25) - np.abs(batch.x[:, 0])
        np.testing.assert_allclose(batch.x[:, 1], heights, atol=1e-6)
        assert 0.4 < batch.y.mean() < 0.6
    np.testing.assert_array_equal(train.x, whole.x[:11])
    np.testing.assert_array_equal(test.y, rest.y[-4:])


class TestIntervals:
    def test_a_share_is_covered_as_often_as_it_says_or_more(self):
        share, draws = 0.07, 60
        hits = np.arange(draws + 1)
        found = (intervals.of_share(int(number), draws) for number in hits)
        covers = [low <= share <= high for low, high in found]
        assert 0.95 <= stats.binom.pmf(hits, draws, share)[covers].sum() < 0.99

    def test_the_ends_are_0_and_1(self):
        assert intervals.of_share(0, 10)[0] == 0
        assert intervals.of_share(10, 10)[1] == 1

    def test_means_are_covered(self):
        draws = np.random.default_rng(2).normal(0.3, 1.0, (2_000, 15))
        ends = np.array([intervals.of_mean(row) for row in draws])
        covered = np.mean((ends[:, 0] <= 0.3) & (ends[:, 1] >= 0.3))
        assert 0.935 < covered < 0.965
        assert np.isnan(intervals.of_mean([1.0])).all()


class TestResuming:
    def run(self, path, calls, settings=None, **pieces):
        names = ("one", "two")
        found = {name: lambda name=name: calls.append(name) or {"name": name} for name in names}
        return resuming.run_pieces(path, settings or {"seed": 0}, found | pieces)

    def test_what_is_done_is_not_done_again_also_after_a_fault(self, tmp_path):
        path, calls = tmp_path / "new" / "results.json", []
        with pytest.raises(ZeroDivisionError):
            self.run(path, calls, two=lambda: 1 // 0)
        first = self.run(path, calls)
        assert self.run(path, calls) == first
        assert calls == ["one", "two"]
        assert [piece["name"] for piece in first.values()] == ["one", "two"]

    def test_ctrl_c_says_how_to_go_on(self, tmp_path, capsys):
        def interrupt():
            raise KeyboardInterrupt

        with pytest.raises(SystemExit, match="130"):
            self.run(tmp_path / "results.json", [], two=interrupt)
        assert "the same command goes on" in capsys.readouterr().err
        assert (tmp_path / "results.json").is_file()

    def test_other_settings_are_refused(self, tmp_path):
        path = tmp_path / "results.json"
        self.run(path, [])
        with pytest.raises(ValueError, match="other settings"):
            self.run(path, [], {"seed": 1})
        for foreign in ("[]", "{}"):
            path.write_text(foreign)
            with pytest.raises(ValueError, match="other settings"):
                self.run(path, [])


class TestComplexity:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("0001101001000101", 6),  # Lempel and Ziv's own example
            ("0", 1),
            ("00000000", 2),
            ("01010101", 3),
            ("0110", 3),
        ],
    )
    def test_phrases(self, text, number):
        assert simplicity_bias.phrases(text) == number

    def test_a_constant_has_the_logarithm_of_its_length(self):
        assert simplicity_bias.complexity("1" * 128) == 7
        assert simplicity_bias.complexity("0" * 127 + "1") == 7 * (2 + 3) / 2

    @pytest.mark.parametrize(
        ("text", "name"),
        [("0" * 8, "constant 0"), ("0" + "1" * 7, "1, but 0 at the zero input"),
         ("00000001", "1 one"), ("01100001", "3 ones")],
    )  # fmt: skip
    def test_names(self, text, name):
        assert simplicity_bias.name_of(text) == name


@pytest.mark.parametrize(("error", "often"), [(0, 10), (1, 10), (15, 150)])
def test_a_frequent_function_is_seen_ten_times_as_often_as_counts_are_too_low(error, often, capsys):
    counts = [4 * often, 3 * often, often, often - 1]
    found = {"samples": 10**4, "distinct": 4, "seen_once": 0, "error": error, "count": counts}
    found |= {"rank": [1, 2, 3, 4], "complexity": [7.0] * 4, "first": ["0" * 128] * 4}
    simplicity_bias.show("no biases", found)
    assert f"ranks 3 to 3, seen {often} times or more" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_guesses_are_hits_and_their_acceptance_is_counted(tmp_path, capsys):
    options = ["--widths", "6", "--hits", "20", "--networks", "16", "--output", str(tmp_path)]
    assert guess_and_check.main(options) == 0
    found = json.loads((tmp_path / "guess-and-check.json").read_text())["pieces"]
    guessed = found["guess and check, width 6"]
    assert guessed["solutions"] == 20
    low, high = guessed["acceptance_interval"]
    assert low < 6.4e-5 < high  # 10,000 hits have 6.4e-5, an independent count 7.0e-5 +- 25 %
    assert np.shape(guessed["map"]) == (guess_and_check.SIDE,) * 2
    for name in ("curves", "maps"):
        assert (tmp_path / f"guess-and-check-{name}.png").is_file()
    assert f"{guessed['guesses']:,}" in capsys.readouterr().out


def test_the_known_probabilities_are_known():
    draws = np.random.default_rng(0).normal(size=(2, 1_000_000))
    share = np.mean(np.prod(draws, axis=0) ** 2 <= 1e-3)
    assert np.exp(how_likely.log_product(1e-3)) == pytest.approx(share, abs=4e-4)
    assert np.exp(how_likely.log_ball(2, 0.5)) == pytest.approx(np.pi / 16)
    assert np.exp(how_likely.log_ball(3, 1.0)) == pytest.approx(np.pi / 6)


@pytest.mark.slow
def test_rare_events_are_told_as_they_are(tmp_path, capsys, monkeypatch):
    parts = {"vertical": ("4.0",), "spiral": ("2-16-3",), "generalisation": ("11",)}
    for name, few in parts.items():
        answer, _, *told = how_likely.QUESTIONS[name]
        monkeypatch.setitem(how_likely.QUESTIONS, name, (answer, few, *told))
    monkeypatch.setattr(how_likely, "NETWORKS", 20)
    monkeypatch.setattr(how_likely, "SPIRAL_LOSSES", (1.2, 1.05))
    options = ["--particles", "100", "--candidates", "20000", "--max-seconds", "3000"]
    assert how_likely.main([*options, "--output", str(tmp_path)]) == 0
    found = {
        question: json.loads((tmp_path / f"how-likely-{question}.json").read_text())["pieces"]
        for question in how_likely.QUESTIONS
    }
    for piece in found["truths"].values():
        for power, known in zip(piece["at"].values(), piece["known"], strict=True):
            assert power[1] - 0.5 < known < power[2] + 0.5
    power, (count, low, high) = (found["vertical"]["4.0"][n]["0.5"] for n in ("at", "counts"))
    assert count > 0
    assert how_likely.agreement(power, low, high) == "yes"
    for piece in found["spiral"].values():
        assert piece["descent"]["loss"] <= 1.05
        assert -14 < piece["at"]["1.05"][0] < piece["at"]["1.2"][0] < -5
    for piece in found["generalisation"].values():
        assert piece["descended from he"]["number"] == how_likely.NETWORKS
        assert 0.8 < piece["random"]["mean"] <= 1
    printed = capsys.readouterr().out
    assert "square of a product" in printed
    assert all((tmp_path / f"how-likely-{question}.png").is_file() for question in found)


@pytest.mark.exhaustive
def test_functions_are_as_frequent_as_others_have_counted(tmp_path, capsys):
    """Of 10,000 draws: 6.5 % each and 8,375 functions; 36.7 %, 36.5 % and 2,614 functions."""
    assert simplicity_bias.main(["--samples", "10000", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "simplicity-bias.json").read_text())["pieces"]
    for fact, share, distinct in zip(found.values(), (0.065, 0.366), (8_375, 2_614), strict=True):
        assert np.array(fact["count"][:2]) / 10_000 == pytest.approx(share, abs=0.015)
        assert fact["distinct"] == pytest.approx(distinct, rel=0.03)
        assert fact["error"] == 0
    printed = capsys.readouterr().out
    assert "constant 0" in printed
    assert "times Zipf's law" in printed
    assert (tmp_path / "simplicity-bias.png").is_file()


@pytest.mark.exhaustive
def test_cosines_follow_the_law(tmp_path):
    options = ["--pairs", "1", "16", "--estimates", "300", "--output", str(tmp_path)]
    assert perturbation_gradients.main(options) == 0
    found = json.loads((tmp_path / "perturbation-gradients.json").read_text())["pieces"]
    assert len(found) == 6
    for fact in found.values():
        law = perturbation_gradients.predicted(fact["pairs"], fact["dimensions"])
        assert fact["root_mean_square"] == pytest.approx(law, abs=0.04)


@pytest.mark.exhaustive
def test_the_chapter_is_reproduced(tmp_path, capsys):
    options = ["--counts", "1e3", "1e4", "--scales", "0.05", "4", "--seeds", "2"]
    assert reproduce_chapter.main([*options, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "chapter.json").read_text())["pieces"]
    assert len(found) == 2 * (2 * 2 + 2 + 4)
    climbed = found["vertical | 2-3-3 | perturbation search | 10,000"]
    assert all(0.087 < loss < 0.214 for loss in climbed["loss"])
    lines = (tmp_path / "chapter-improvements.txt").read_text()
    assert lines.count("evaluations ") > 100
    assert "population Bayes value" in capsys.readouterr().out
    assert (tmp_path / "chapter-random-search.png").is_file()


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("default")
def test_libraries_are_compared_at_equal_evaluations(monkeypatch):
    monkeypatch.setattr(equal_evaluations, "PROBLEMS", {"vertical": (2, 3, 3)})
    monkeypatch.setattr(equal_evaluations, "WARM", 0.0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        pieces = equal_evaluations.pieces_of(2_048, 2)
        measured = {name: piece() for name, piece in pieces.items()}
    rows = equal_evaluations.compared(measured, 2)
    known = [row for row in rows if "loss" in row]
    assert {row["library"] for row in known} >= {"NumPy loop", "jaxnn", "jaxnn, by hand"}
    assert all(row["lowest"] <= row["loss"] <= row["highest"] < 1.2 for row in known)
    equal_evaluations.draw(rows, 2_048)


def test_paces_are_compared_within_a_turn(monkeypatch):
    """In the second turn all are twice as fast; missing libraries have a row that says so."""
    libraries = dict.fromkeys(("slow", "quick", "missing", "jaxnn", "jaxnn, other"))
    monkeypatch.setattr(equal_evaluations, "METHODS", {"random search": (libraries, 1)})
    monkeypatch.setattr(equal_evaluations, "PROBLEMS", {"vertical": (2, 3, 3)})
    paces = {"slow": 5.0, "quick": 30.0, "jaxnn": 20.0, "jaxnn, other": 10.0}
    turns = {
        f"vertical | random search | {seed}": {
            **{name: {"loss": pace * (3 - seed), "pace": pace * factor}
               for name, pace in paces.items()},
            "missing": None,
        }
        for seed, factor in ((0, 1), (1, 2))
    }  # fmt: skip
    rows = {row["library"]: row for row in equal_evaluations.compared(turns, 2)}
    assert {name: row.get("x jaxnn") for name, row in rows.items()} == {
        "slow": 0.25, "quick": 1.5, "missing": None, "jaxnn": 1.0, "jaxnn, other": 0.5,
    }  # fmt: skip
    assert rows["missing"]["evaluations/s"] == "not installed"
    assert (rows["slow"]["lowest"], rows["slow"]["loss"], rows["slow"]["highest"]) == (10, 12.5, 15)
    (sentence,) = equal_evaluations.faster(list(rows.values()))
    assert sentence.startswith("faster than jaxnn: quick, random search on vertical, 1.50 times")


@pytest.mark.exhaustive
@pytest.mark.parametrize("library", own_model.LIBRARIES)
@pytest.mark.filterwarnings("default")
def test_models_of_other_libraries_are_trained(library, capsys):
    pytest.importorskip(library)
    options = ["--candidates", "500", "--steps", "500", "--epochs", "2000"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert own_model.main(["--library", library, *options]) == 0
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[2] < losses[1] < losses[0] < 1.2
    assert losses[2] < 0.3


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("default")
def test_another_optimizer_comes_to_the_same_loss_with_either(capsys):
    pytest.importorskip("evosax")
    options = ["--population", "64", "--generations", "20", "--repeats", "1"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert fast_population.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = (float(line.split()[-1]) for line in lines[1:3])
    assert first == pytest.approx(second, abs=1e-3)
