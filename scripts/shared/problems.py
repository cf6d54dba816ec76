"""Data sets by name and CSV files, as the option `--data` has them, and two for experiments."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxnn
from jaxnn.typing import MetricFn

DATA: dict[str, Callable[..., jaxnn.Batch]] = {
    "vertical": jaxnn.datasets.vertical,
    "spiral": jaxnn.datasets.spiral,
    "nnfs-vertical": lambda key, samples: jaxnn.datasets.nnfs_vertical(0, samples),
    "nnfs-spiral": lambda key, samples: jaxnn.datasets.nnfs_spiral(0, samples),
}
"""`DATA[name](key, samples=...)` draws `samples` rows a class: three classes, two features."""


class Problem(NamedTuple):
    """What a script trains: a network, rows, further keys, and the meaning of a file's columns."""

    model: jaxnn.Model
    batch: jaxnn.Batch
    keys: jax.Array
    columns: jaxnn.Columns

    def save(self, path: Path | None, params: Any) -> None:
        """Save the network with these params, if there are any, to a file, if one was named."""
        if path is not None and params is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            jaxnn.save(path, self.model, params, self.columns)
            print(path)


def problem_of(arguments: Namespace, num_keys: int) -> Problem:
    """Return the network and the rows that `cli.add_problem` asks for, and more keys."""
    keys = jax.random.split(jax.random.key(arguments.seed), 1 + num_keys)
    table = csv_of(arguments)
    if table is not None:
        return Problem(model_of(arguments.hidden, table), table.batch, keys[1:], table.columns)
    batch = DATA[arguments.data](keys[0], samples=arguments.samples)
    return Problem(jaxnn.mlp((2, *arguments.hidden, 3)), batch, keys[1:], jaxnn.Columns())


def csv_of(arguments: Namespace) -> jaxnn.datasets.Table | None:
    """Return the rows of the CSV file that `cli.add_data` asks for, if it asks for one."""
    path = None if arguments.data in DATA else arguments.data
    if (path is not None) != (arguments.target is not None):
        raise ValueError(
            "--target must name the column to predict of a CSV file that --data names; got "
            f"--data {arguments.data} and --target {arguments.target}"
        )
    if path is None:
        return None
    names = ("target", "features", "standardise", "delimiter")
    try:
        return jaxnn.datasets.load_csv(path, **{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        told = str(error).replace("features=[...]", "--features")
        raise ValueError(told.replace("delimiter=", "--delimiter ")) from error


def model_of(hidden: Sequence[int], table: jaxnn.datasets.Table) -> jaxnn.Model:
    """Return a network for the rows of a file: a class, or a number."""
    features, classes = table.batch.x.shape[1], table.columns.class_names
    if classes is not None:
        return jaxnn.mlp((features, *hidden, len(classes)))
    return jaxnn.mlp((features, *hidden, 1), output="identity", loss="mean_squared_error")


def score_of(model: jaxnn.Model) -> tuple[str, MetricFn]:
    """Return the name of what tells how good predictions are, and its function."""
    if has_classes(model):
        return "accuracy", model.accuracy
    return "r2", lambda params, batch: jaxnn.metrics.r2(model.apply(params, batch.x), batch.y)


def has_classes(model: jaxnn.Model) -> bool:
    """Tell whether a network tells classes, or else predicts numbers."""
    return model.settings.loss == "categorical_crossentropy"


def has_regions(model: jaxnn.Model) -> bool:
    """Tell whether decision regions can be drawn: two features, and classes."""
    return has_classes(model) and model.settings.sizes[0] == 2


def split(key: jax.Array, batch: jaxnn.Batch, rows: int) -> tuple[jaxnn.Batch, jaxnn.Batch]:
    """Return all but `rows` rows of a batch, and these rows, in one random order."""
    number = len(batch.x)
    if not 0 < rows < number:
        raise ValueError(f"the rows held out must be from 1 to {number - 1}; got {rows}")
    order = jax.random.permutation(key, number)

    def rows_at(places: jax.Array) -> jaxnn.Batch:
        return jax.tree.map(lambda leaf: leaf[places], batch)

    return rows_at(order[rows:]), rows_at(order[:rows])


def from_sklearn(name: str, key: jax.Array, rows: int) -> jaxnn.Batch:
    """Draw `rows` rows of scikit-learn's "iris" or "digits" without repeats, standardised."""
    load: Any = getattr(import_module("sklearn.datasets"), f"load_{name}")
    x, y = load(return_X_y=True)
    deviation = np.std(x, axis=0)
    x = (x - np.mean(x, axis=0)) / np.where(deviation > 0, deviation, 1)
    chosen = np.asarray(jax.random.permutation(key, len(x)))[:rows]
    return jaxnn.Batch(x[chosen].astype(np.float32), y[chosen].astype(np.int32))


def kink(rows: int, margin: float = 0.25) -> tuple[jaxnn.Batch, jaxnn.Batch]:
    """Return the kink data of Chiang et al. (ICLR 2023): rows to train on, and rows to test on.

    Class 1 lies on y = -|x|, class 0 on y = margin - |x|, for x from -1 to 1: two inverted V's. As
    in the published code, 4,000 points have one fixed random order; the first 70 % of `rows` are
    for training, the last 30 % of `rows` for testing.
    """
    arm = np.linspace(-1, 0, 1_000)
    x, y = np.append(arm, arm + 1), np.append(arm, arm[::-1])
    points = np.concatenate([np.stack([x, y], axis=1), np.stack([x, y + margin], axis=1)])
    labels = np.repeat([1, 0], 2_000)
    order = np.random.default_rng(0).permutation(len(labels))
    whole = jaxnn.Batch(points[order].astype(np.float32), labels[order].astype(np.int32))
    cuts = slice(int(0.7 * rows)), slice(-int(0.3 * rows), None)
    train, test = (jaxnn.Batch(whole.x[cut], whole.y[cut]) for cut in cuts)
    return train, test
