"""A network, its params and the meaning of its columns in one file, which NumPy reads too.

The file is that of `jaxnn.run.checkpoint`, whole or absent and without pickles: an npz with the
arrays `weights.0`, `biases.0`, `weights.1` and so on, `mean` and `std` if they are known, and
`metadata`, JSON text as uint8 with the arguments of `jaxnn.mlp` and the names of the columns.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxnn.model.layers import Dense, Params, check_params
from jaxnn.model.mlp import Model, mlp
from jaxnn.run import checkpoint
from jaxnn.run.checkpoint import LoadError, StrPath
from jaxnn.run.checks import check_concrete
from jaxnn.tables import Columns, check_columns

FORMAT = 1
"""Raised when a file says what an older jaxnn would misread."""

NOT_KNOWN = Columns()


class SavedModel(NamedTuple):
    """What `load` returns.

    Attributes:
        model: the network.
        params: its params, a tuple of `Dense`.
        columns: what its inputs and outputs mean, as far as that was saved.
    """

    model: Model
    params: Params
    columns: Columns


def save(path: StrPath, model: Model, params: Params, columns: Columns = NOT_KNOWN) -> None:
    """Write a network and its params to a file, in place of the one that may be there.

    The file is written whole or not at all: after a fault the old one is still there.

    Args:
        path: the file, such as `"iris.npz"`.
        model: a network of `jaxnn.mlp`.
        params: its params.
        columns: what its inputs and outputs mean, such as `load_csv` returns it.

    Returns:
        None.

    Raises:
        OSError: if the file cannot be written.
        TypeError: if the model is not one of `jaxnn.mlp`.
        ValueError: if params or columns do not fit the model.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> model, layer = mlp((2, 3), loss="mean_squared_error"), Dense(np.eye(2, 3), np.zeros(3))
        >>> with TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.npz", model, (layer,))
        ...     load(f"{folder}/a.npz").model
        mlp((2, 3), hidden='relu', output='softmax', loss='mean_squared_error')
    """
    if not isinstance(model, Model) or model != mlp(**model.settings._asdict()):
        came = "one with another function" if isinstance(model, Model) else type(model).__name__
        raise TypeError(
            f"model must be as jaxnn.mlp(...) returned it; got {came}: "
            "np.savez(path, *jax.tree.leaves(params)) saves the params of any model"
        )
    check_concrete("params", params)
    params = check_params("params", params, model.settings.shapes)
    arrays: dict[str, Any] = {
        f"{field}.{layer}": leaf
        for layer, dense in enumerate(params)
        for field, leaf in dense._asdict().items()
        if leaf is not None
    }
    metadata: dict[str, object] = {"model_format": FORMAT, "model": model.settings._asdict()}
    columns = _fitting(columns, model)
    if columns.mean is not None:
        arrays |= {"mean": columns.mean, "std": columns.std}
    words = None if columns.class_names is None else columns.class_names.tolist()
    metadata["columns"] = {"feature_names": columns.feature_names, "class_names": words}
    checkpoint.save(path, arrays, json.loads(json.dumps(metadata)))


def load(path: StrPath) -> SavedModel:
    """Return the network that `save` wrote to a file. Nothing in the file is run.

    Args:
        path: the file.

    Returns:
        A `SavedModel`: model, params and columns.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, a damaged one, or one of a newer format.

    Example:
        >>> load("no such file.npz")
        Traceback (most recent call last):
        ...
        FileNotFoundError: [Errno 2] No such file or directory: 'no such file.npz'
    """
    arrays, metadata = checkpoint.load(path)
    try:
        return _restored(arrays, metadata)
    except Exception as error:  # A file that others wrote may say anything.
        raise LoadError(f"cannot load {path}: {error}") from error


def _restored(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> SavedModel:
    if "model_format" not in metadata:
        raise ValueError("it is a checkpoint of a run, which goes to a trainer as checkpoint=...")
    if metadata["model_format"] > FORMAT:
        came = f"it has model format {metadata['model_format']}"
        raise ValueError(f"{came}; this version of jaxnn reads up to {FORMAT}: install a newer one")
    settings: dict[str, Any] = metadata["model"]
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    model = mlp(**settings)
    leaves: dict[str, Any] = {n: jnp.asarray(a) for n, a in arrays.items() if "." in n}
    params = tuple(
        Dense(leaves.pop(f"weights.{layer}", None), leaves.pop(f"biases.{layer}", None))
        for layer in range(len(model.settings.shapes))
    )
    if leaves:
        raise ValueError(f"it has arrays of another network: {sorted(leaves)}")
    params = check_params("params", params, model.settings.shapes)
    figures: dict[str, Any] = {field: arrays.get(field) for field in ("mean", "std")}
    columns = Columns(**metadata["columns"], **figures)
    return SavedModel(model, params, _fitting(columns, model))


def _fitting(columns: Columns, model: Model) -> Columns:
    """Return the columns; refuse those that do not fit the network's sizes."""
    features, *_, outputs = model.settings.sizes
    is_binary = model.settings.loss == "binary_crossentropy" and outputs == 1
    return check_columns("columns", columns, features, 2 if is_binary else outputs)
