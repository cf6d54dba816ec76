"""Seven data sets from CSV file to predictions, beside scikit-learn's networks of the same size."""

import csv
import functools
import json
import subprocess
import sys
import warnings
from typing import Any

import jax
import numpy as np
import pytest

import jaxnn

pytestmark = pytest.mark.slow
datasets: Any = pytest.importorskip("sklearn.datasets")
networks: Any = pytest.importorskip("sklearn.neural_network")

KINDS = ("iris", "wine", "digits", "breast_cancer", "moons")
NUMBERS = ("diabetes", "friedman1")
HIDDEN, SEEDS = 16, range(5)
READER = """
import json, sys, jaxnn
model, params, columns = jaxnn.load(sys.argv[1] + ".npz")
rows = jaxnn.datasets.load_csv(sys.argv[1] + "-test.csv", target=None, columns=columns).batch.x
print(json.dumps(model.predict(params, rows).ravel().tolist()))
"""


@functools.cache
def rows_of(name) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features, targets, which are words where they are kinds, and the names of the features."""
    if name == "moons":
        x, y = datasets.make_moons(400, noise=0.2, random_state=0)
        return x, np.array(["upper", "lower"])[y], ["x", "y"]
    if name == "friedman1":
        x, y = datasets.make_friedman1(400, noise=1.0, random_state=0)
        return x, y, [f"x{number}" for number in range(10)]
    found = getattr(datasets, f"load_{name}")()
    y = found.target.astype(float) if name in NUMBERS else found.target_names[found.target]
    return found.data, y, list(found.feature_names)


def write(path, name, places):
    """A CSV file of some of the rows."""
    x, y, names = rows_of(name)
    with path.open("w", newline="") as file:
        rows = zip(x[places].tolist(), y[places].tolist(), strict=True)
        csv.writer(file).writerows([[*names, "target"], *([*row, target] for row, target in rows)])


def by_jaxnn(path, name, seed, train) -> tuple[float, np.ndarray]:
    """Learn from three quarters of the rows of a file, validate on the others, save, predict."""
    x, _, names = rows_of(name)
    varying = [column for column, values in zip(names, x[train].T, strict=True) if values.std()]
    options: Any = {"target": "target", "standardise": True, "features": varying}
    batch, columns = jaxnn.datasets.load_csv(f"{path}-train.csv", **options)
    cut = len(batch.x) // 4
    held_out = jax.tree.map(lambda leaf: leaf[:cut], batch)
    rest = jax.tree.map(lambda leaf: leaf[cut:], batch)
    ends: Any = {"output": "identity", "loss": "mean_squared_error"} if name in NUMBERS else {}
    outputs = 1 if columns.class_names is None else len(columns.class_names)
    model = jaxnn.mlp((batch.x.shape[1], HIDDEN, outputs), **ends)
    trained = jaxnn.gradient_descent(
        jax.random.key(seed), model.value_and_grad,
        model.init(jax.random.key(seed), scale=1.0, distribution="he"), rest,
        optimizer=jaxnn.optimizers.adam(0.01), num_epochs=1_000, batch_size=32,
        validation_batch=held_out, patience=50,
    )  # fmt: skip
    jaxnn.save(f"{path}.npz", model, trained.params, columns)
    new = jaxnn.datasets.load_csv(f"{path}-test.csv", target="target", columns=columns).batch
    answers = np.asarray(model.predict(trained.params, new.x)).ravel()
    return score(name, answers, np.asarray(new.y).ravel()), answers


def by_sklearn(name, seed, train, test) -> float:
    x, y, _ = rows_of(name)
    mean, std = x[train].mean(axis=0), x[train].std(axis=0)
    x = (x - mean) / np.where(std > 0, std, 1)  # some pixels of digits are 0 in all rows
    kind = networks.MLPRegressor if name in NUMBERS else networks.MLPClassifier
    with warnings.catch_warnings(action="ignore"):  # Not all have converged by then.
        fitted = kind(hidden_layer_sizes=(HIDDEN,), max_iter=5_000, random_state=seed).fit(
            x[train], y[train]
        )
    return score(name, fitted.predict(x[test]), y[test])


def score(name, answers, targets) -> float:
    """Accuracy, or the share of the variance that is explained."""
    if name in NUMBERS:
        return 1 - np.mean((answers - targets) ** 2) / np.var(targets)
    return np.mean(answers == targets)


@pytest.mark.parametrize("name", KINDS + NUMBERS)
def test_a_file_is_learnt_as_well_as_by_scikit_learn_and_read_elsewhere(name, tmp_path):
    ours, theirs = [], []
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(len(rows_of(name)[0]))
        test, train = np.split(order, [len(order) // 4])
        write(tmp_path / f"{seed}-train.csv", name, train)
        write(tmp_path / f"{seed}-test.csv", name, test)
        ours.append(by_jaxnn(tmp_path / str(seed), name, seed, train))
        theirs.append(by_sklearn(name, seed, train, test))
    scores, answers = zip(*ours, strict=True)
    assert np.mean(scores) >= np.mean(theirs) - np.ptp(theirs), (scores, theirs)
    command = [sys.executable, "-c", READER, str(tmp_path / str(SEEDS[-1]))]
    told = subprocess.run(command, capture_output=True, check=True, text=True)
    np.testing.assert_allclose(json.loads(told.stdout), answers[-1], rtol=1e-6)
