"""The benchmarks: everybody does the same work, and a tiny run reports all of it."""

import json
import sys

import benchmark
import equal_evaluations
import jax
import numpy as np
import peers.chains
import peers.descent
import peers.search as peer
import pytest

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
    for name, (prepare, tiles) in peer.SEARCHES.items():
        monkeypatch.setitem(peer.SEARCHES, name, (prepare, tiles[:1]))
    for name, (prepare, times) in benchmark.CLIMBERS.items():
        monkeypatch.setitem(benchmark.CLIMBERS, name, (prepare, min(times, 1)))
    peer.best_tile.cache_clear()
    return benchmark


@pytest.fixture
def lenient():
    """Other libraries promote types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def split_missing(rows, unit):
    missing = [row["library"] for row in rows if row[f"{unit}/s"] == "not installed"]
    return missing, [row for row in rows if row["library"] not in missing]


def test_a_tiny_run_of_random_search_reports_every_library_and_count(small, tmp_path, capsys):
    path = tmp_path / "benchmark.json"
    arguments = ["--only", "search", "--seconds", "0.01", "--repeats", "2", "--markdown",
                 "--nets", "2-3-3", "4-3", "--counts", "1e4", "200"]  # fmt: skip
    assert small.main([*arguments, "--json", str(path)]) == 0
    whole, output = json.loads(path.read_text()), capsys.readouterr().out
    report = whole["search"]
    assert [row["net"] for row in report["rates"]] == ["2-3-3"] * 6 + ["4-3"] * 6
    assert [row["library"] for row in report["rates"]] == [*peer.SEARCHES] * 2
    assert [row["count"] for row in report["counts"]] == [200, 1_000, 10_000]
    assert report["share_of_rate_at_a_tenth"] > 0
    assert list(report["sgemm_gflops"]) == ["jax"]
    assert whole["machine"]["jax"] == jax.__version__
    missing, present = split_missing(report["rates"], "candidates")
    assert missing == ["evosax RandomSearch", "torch baddbmm", "torch, 1 thread"] * 2
    assert all(row["candidates/s"] > 0 for row in present)
    assert all(row["x NumPy"] == 1 for row in present if row["library"] == "NumPy loop")
    assert sum(row["x fastest peer"] == 1 for row in present if row["library"] != "jaxnn") == 2
    lines = [line for line in output.split("\n") if line.startswith("|")]
    assert len(lines) == (2 + 12) + (2 + 6) + (2 + 3)
    assert [row["part"] for row in report["parts"]] == ["draw", "loss", "statistics"] * 2
    assert all(row["low"] <= row["candidates/s"] <= row["high"] for row in present)
    assert all(0 <= row["compile s"] <= row["first call s"] for row in present)
    assert set(lines[1]) <= set("|-: ")


def test_rows_are_chosen_by_name_and_quick_gives_way_to_what_is_asked(small, tmp_path):
    assert small.parse(["--quick", "--steps", "500"]).steps == 500
    assert small.parse(["--quick"]).seconds == small.QUICK["seconds"] < small.parse([]).seconds
    path, row = tmp_path / "one.json", "jaxnn, by hand, Adam"
    arguments = ["--rows", row, "--nets", "2-3-3", "--steps", "900", "--json", str(path)]
    assert small.main(arguments) == 0
    report = json.loads(path.read_text())
    assert [row["library"] for name in small.NETS for row in report[name]["rates"]] == [row]
    assert report["descent"]["rates"][0]["again s"] == 0


@pytest.mark.parametrize(
    ("method", "networks", "ways", "absent"),
    [
        ("chains", 1, peers.chains.CLIMBERS,
         {"nevergrad OnePlusOne", "evosax HillClimbing", "pyperch RHC", "mlrose-ky"}),
        ("descent", 3, peers.descent.DESCENTS,
         {"torch eager", "torch compiled", "scikit-learn", "optax, jax.value_and_grad"}),
    ],
)  # fmt: skip
def test_a_tiny_run_reports_every_way(method, networks, ways, absent, small, tmp_path):
    path = tmp_path / "steps.json"
    nets = ["--nets", "2-3-3"] if networks == 1 else []
    arguments = ["--only", method, "--steps", "900", "--repeats", "1", "--json", str(path)]
    assert small.main([*arguments, *nets]) == 0
    rows = json.loads(path.read_text())[method]["rates"]
    assert [row["library"] for row in rows] == [*ways] * networks
    missing, present = split_missing(rows, "steps")
    assert set(missing) == absent
    assert all(row["steps/s"] > 0 for row in present)


@pytest.mark.filterwarnings("default")
def test_the_losses_of_peers_are_those_of_the_model():
    model, batch = jaxnn.mlp(SIZES), peer.random_batch(SIZES)
    params = jax.vmap(model.sampler(scale=0.2))(jax.random.split(jax.random.key(0), 8))
    wanted = np.asarray(jax.vmap(model.loss_reference, in_axes=(0, None))(params, batch))
    for i, loss in enumerate(wanted):
        one = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params)
        x, y = np.asarray(batch.x), np.asarray(batch.y)
        assert peer.numpy_loss(one, x, y) == pytest.approx(loss, rel=1e-5)
        assert peer.jax_loss(one, batch) == pytest.approx(loss, rel=1e-5)
    torch = pytest.importorskip("torch")
    tensors = [(torch.tensor(np.array(w)), torch.tensor(np.array(b))[:, None]) for w, b in params]
    x, y = torch.tensor(batch.x.T.copy()), torch.tensor(batch.y, dtype=torch.int64)
    assert peer.torch_losses(tensors, x, y).numpy() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["NumPy loop", "jax.vmap", "torch baddbmm", "torch, 1 thread"])
@pytest.mark.filterwarnings("default")
def test_peers_keep_the_best_of_what_they_draw(name):
    batch = peer.random_batch(SIZES)
    try:
        search = peer.SEARCHES[name][0](jaxnn.mlp(SIZES), batch, 16)
    except ImportError:
        pytest.skip(f"{name} is not installed")
    (few, _), (many, params) = search(16), search(64)
    assert many <= few
    arrays = jax.tree.map(np.float32, params)
    loss = peer.numpy_loss(arrays, np.asarray(batch.x), np.asarray(batch.y))
    assert loss == pytest.approx(float(many), rel=1e-5)


@pytest.mark.parametrize("name", peers.descent.DESCENTS)
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("lenient")
def test_everybody_descends_to_the_same_loss(name):
    """From one start, except scikit-learn and many networks; SGD at 0.1 or not, 900 full steps."""
    model = jaxnn.mlp((2, 3, 3))
    batch = jaxnn.datasets.vertical(jax.random.key(0), samples=20)
    prepare, _ = peers.descent.DESCENTS[name]
    try:
        found = float(prepare(model, batch, None)(900))
    except ImportError:
        pytest.skip(f"{name} is not installed")
    if name == "scikit-learn" or any(word in name for word in ("networks", "momentum", "Adam")):
        assert found < np.log(3) + 0.01
    else:
        by_hand, _ = peers.descent.DESCENTS["jaxnn, by hand"]
        assert found == pytest.approx(float(by_hand(model, batch, None)(900)), abs=2e-3)


@pytest.mark.parametrize(
    ("method", "name"),
    [(method, name) for method, (names, _) in equal_evaluations.METHODS.items() for name in names],
)
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("lenient")
def test_a_second_call_does_the_same_work_again(method, name):
    model, batch = jaxnn.mlp((2, 3, 3)), jaxnn.datasets.vertical(jax.random.key(0), samples=20)
    prepare = equal_evaluations.METHODS[method][0][name]
    try:
        search = prepare(model, batch, seed=3)
        first, second = (equal_evaluations.loss_of(search(2_048)) for _ in range(2))
    except ImportError:
        pytest.skip(f"{name} is not installed")
    assert first == pytest.approx(second, rel=1e-6)
    assert first < np.log(3) + 0.01
