"""The benchmark: everybody does the same work, and a tiny run reports all of it."""

import json
import sys

import benchmark
import chain_peers
import descent_peers
import equal_evaluations
import jax
import numpy as np
import pytest
import search_peers

import jaxnn

pytestmark = pytest.mark.exhaustive
SIZES = (2, 5, 4, 3)
OPTIONAL = ("torch", "evosax", "evosax.algorithms", "nevergrad", "pyperch", "mlrose_ky", "optax",
            "sklearn.neural_network")  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """The benchmark with one small tile a peer, and without the optional ones."""
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(benchmark, "SGEMM_SIDE", 32)
    peers = {name: (prepare, tiles[:1]) for name, (prepare, tiles) in benchmark.PEERS.items()}
    monkeypatch.setattr(benchmark, "PEERS", peers)
    ways = {name: (prepare, min(times, 1)) for name, (prepare, times) in benchmark.WAYS.items()}
    monkeypatch.setattr(benchmark, "WAYS", ways)
    return benchmark


QUICK = ["--only", "search", "--seconds", "0.01", "--repeats", "2"]
NETS = ["--nets", "2-3-3", "4-3"]
COUNTS = ["--counts", "1e4", "200"]


def test_a_tiny_run_reports_every_library_and_every_count(small, tmp_path, capsys):
    facts = tmp_path / "benchmark.json"
    assert small.main([*QUICK, *NETS, *COUNTS, "--json", str(facts)]) == 0
    whole, output = json.loads(facts.read_text()), capsys.readouterr().out
    report = whole["search"]
    assert [row["net"] for row in report["rates"]] == ["2-3-3"] * 6 + ["4-3"] * 6
    assert [row["library"] for row in report["rates"]] == [*small.PEERS] * 2
    assert [row["count"] for row in report["counts"]] == [200, 1_000, 10_000]
    assert report["share_of_rate_at_a_tenth"] > 0
    assert list(report["sgemm_gflops"]) == ["jax"]
    assert whole["machine"]["jax"] == jax.__version__
    assert all(row["library"] in output for row in report["rates"])


def test_missing_peers_are_named_and_the_ratios_are_of_those_present(small, tmp_path, capsys):
    facts = tmp_path / "benchmark.json"
    small.main([*QUICK, *NETS, *COUNTS, "--json", str(facts)])
    rows = json.loads(facts.read_text())["search"]["rates"]
    missing = [row for row in rows if row["candidates/s"] == "not installed"]
    assert {row["library"] for row in missing} == {
        "evosax RandomSearch", "torch baddbmm", "torch, 1 thread",
    }  # fmt: skip
    assert capsys.readouterr().out.count("not installed") >= len(missing) == 6
    present = [row for row in rows if row not in missing]
    assert all(row["candidates/s"] > 0 for row in present)
    assert all(row["x NumPy"] == 1 for row in present if row["library"] == "NumPy loop")
    assert sum(row["x fastest peer"] == 1 for row in present if row["library"] != "jaxnn") == 2


def test_markdown_prints_tables(small, capsys):
    assert small.main([*QUICK, "--nets", "2-3-3", "--counts", "--markdown"]) == 0
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("|")]
    assert len(lines) == 2 + len(small.PEERS)
    assert len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) <= set("|-: ")


def draws():
    """Weight sets side by side, their batch, and the losses that the model gives them."""
    model, batch = jaxnn.mlp(SIZES), search_peers.random_batch(SIZES)
    keys = jax.random.split(jax.random.key(0), 8)
    params = jax.vmap(model.sampler(scale=0.2))(keys)
    wanted = jax.vmap(model.loss_reference, in_axes=(0, None))(params, batch)
    return params, batch, np.asarray(wanted)


def test_the_losses_of_numpy_and_jax_are_those_of_the_model():
    params, batch, wanted = draws()
    for i, loss in enumerate(wanted):
        one = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params)
        assert search_peers.numpy_loss(
            one, np.asarray(batch.x), np.asarray(batch.y)
        ) == pytest.approx(loss, rel=1e-5)
        assert search_peers.jax_loss(one, batch) == pytest.approx(loss, rel=1e-5)


@pytest.mark.filterwarnings("default")
def test_the_losses_of_torch_are_those_of_the_model():
    torch = pytest.importorskip("torch")
    params, batch, wanted = draws()
    tensors = [(torch.tensor(np.array(w)), torch.tensor(np.array(b))[:, None]) for w, b in params]
    x, y = torch.tensor(batch.x.T.copy()), torch.tensor(batch.y, dtype=torch.int64)
    assert search_peers.torch_losses(tensors, x, y).numpy() == pytest.approx(wanted, rel=1e-5)


def test_numpy_and_vmap_keep_the_best_of_what_they_draw():
    batch = search_peers.random_batch(SIZES)
    for prepare, tile in ((search_peers.numpy_search, 1), (search_peers.vmap_search, 16)):
        search = prepare(SIZES, batch, tile)
        few, _ = search(16)
        many, params = search(64)
        assert many <= few
        assert search_peers.jax_loss(jax.tree.map(np.float32, params), batch) == pytest.approx(
            float(many), rel=1e-5
        )


@pytest.mark.parametrize("name", ["torch baddbmm", "torch, 1 thread"])
@pytest.mark.filterwarnings("default")
def test_torch_keeps_the_best_of_what_it_draws(name):
    pytest.importorskip("torch")
    batch = search_peers.random_batch(SIZES)
    prepare, _ = search_peers.PEERS[name]
    loss, params = prepare(SIZES, batch, 16)(64)
    arrays = jax.tree.map(np.asarray, params)
    assert search_peers.numpy_loss(
        arrays, np.asarray(batch.x), np.asarray(batch.y)
    ) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [["--nets", "3"], ["--nets", "2-0-3"], ["--nets", "a-3"], ["--seconds", "0"],
     ["--repeats", "0"], ["--counts", "9"], ["--steps", "99"]],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_a_tiny_run_reports_every_way_to_climb(small, tmp_path, capsys):
    facts = tmp_path / "chains.json"
    arguments = ["--only", "chains", "--nets", "2-3-3", "--steps", "100", "--repeats", "1"]
    assert small.main([*arguments, "--json", str(facts)]) == 0
    rows = json.loads(facts.read_text())["chains"]["rates"]
    assert [row["library"] for row in rows] == list(small.WAYS)
    missing = {row["library"] for row in rows if row["steps/s"] == "not installed"}
    assert missing == {"nevergrad OnePlusOne", "evosax HillClimbing", "pyperch RHC", "mlrose-ky"}
    assert all(row["steps/s"] > 0 for row in rows if row["library"] not in missing)
    assert capsys.readouterr().out.count("not installed") >= 4


@pytest.mark.parametrize("name", ["pyperch RHC", "mlrose-ky", "nevergrad OnePlusOne"])
@pytest.mark.filterwarnings("default")
def test_other_libraries_climb_the_loss_that_the_model_has(name):
    model = jaxnn.mlp((2, 3, 3))
    batch = jaxnn.datasets.vertical(jax.random.key(0), samples=20)
    prepare, _ = chain_peers.WAYS[name]
    try:
        search = prepare(model, batch)
    except ImportError:
        pytest.skip(f"{name} is not installed")
    assert float(search(200)) < np.log(3) + 0.01


def test_a_tiny_run_reports_every_way_to_descend(small, tmp_path):
    facts = tmp_path / "descent.json"
    arguments = ["--only", "descent", "--steps", "900", "--repeats", "1", "--json", str(facts)]
    assert small.main(arguments) == 0
    rows = json.loads(facts.read_text())["descent"]["rates"]
    assert [row["library"] for row in rows] == [*benchmark.DESCENTS] * 3
    missing = {row["library"] for row in rows if row["steps/s"] == "not installed"}
    assert missing == {
        "torch eager", "torch compiled", "scikit-learn", "optax, jax.value_and_grad",
    }  # fmt: skip
    assert all(row["steps/s"] > 0 for row in rows if row["library"] not in missing)


@pytest.mark.parametrize("name", descent_peers.DESCENTS)
@pytest.mark.filterwarnings("default")
def test_everybody_descends_to_the_same_loss(name):
    """From one start, except scikit-learn and many networks; SGD at 0.1, 900 full steps."""
    model = jaxnn.mlp((2, 3, 3))
    batch = jaxnn.datasets.vertical(jax.random.key(0), samples=20)
    prepare, _ = descent_peers.DESCENTS[name]
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found = float(prepare(model, batch, None)(900))
    except ImportError:
        pytest.skip(f"{name} is not installed")
    if name == "scikit-learn" or "networks" in name:
        assert found < np.log(3) + 0.01
    else:
        by_hand, _ = descent_peers.DESCENTS["jaxnn, by hand"]
        assert found == pytest.approx(float(by_hand(model, batch, None)(900)), abs=2e-3)


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method, (names, _) in equal_evaluations.METHODS.items() for name in names],
)
@pytest.mark.filterwarnings("default")
def test_a_second_call_does_the_same_work_again(method, name):
    model, batch = jaxnn.mlp((2, 3, 3)), jaxnn.datasets.vertical(jax.random.key(0), samples=20)
    prepare = equal_evaluations.METHODS[method][0][name]
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            search = prepare(model, batch, 3)
            first, second = (equal_evaluations.loss_of(search(2_048)) for _ in range(2))
    except ImportError:
        pytest.skip(f"{name} is not installed")
    assert first == pytest.approx(second, rel=1e-6)
