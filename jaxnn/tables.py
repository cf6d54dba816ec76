"""CSV files as batches: some columns are features, one is the target.

`Columns` says what the columns of a batch mean. It is read with the rows and saved beside a
network, so that rows which come later are treated as those that the network was trained on.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TextIO, runtime_checkable

import jax.numpy as jnp
import numpy as np

from jaxnn.batch import Batch
from jaxnn.run.checkpoint import StrPath
from jaxnn.run.checks import as_choice, as_flag

Kind = Literal["classes", "numbers"]
KINDS: tuple[str, ...] = ("classes", "numbers")
MISSING = {"", "?", "na", "n/a", "nan", "null"}
"""What a field says, in any case, where its value is missing."""
MAX_CLASSES = 32
"""A target with more values than this is taken as classes only where the caller says so."""


class Columns(NamedTuple):
    """What the columns of a batch mean; None where that is not known.

    `class_names[model.predict(params, x)]` are the predictions in words. Features that were
    standardised are `(raw - mean) / std`.

    Attributes:
        feature_names: the names of the columns of x, in order.
        class_names: an array of text; the name of class `k` is at place `k`.
        mean: of each feature before it was standardised, `(features,)` float64.
        std: the standard deviation of each, `(features,)` float64.
    """

    feature_names: Sequence[str] | None = None
    class_names: Any = None
    mean: Any = None
    std: Any = None


class Table(NamedTuple):
    """What `load_csv` returns.

    Attributes:
        batch: x `(rows, features)` float32. y is classes `(rows,)` int32, numbers `(rows, 1)`
            float32, or None without a target.
        columns: what the columns mean.
    """

    batch: Batch
    columns: Columns


@runtime_checkable
class Frame(Protocol):
    """A table that can be written as CSV, such as a frame of pandas."""

    def to_csv(self, *, index: bool, sep: str) -> str:
        """Return the text of the file."""
        ...


class _Rows(NamedTuple):
    """The fields of a file as text; row `i` below the header begins at line `lines[i]`."""

    path: Path | str
    header: list[str]
    fields: list[list[str]]
    lines: list[int]


def load_csv(
    path: StrPath | Frame,
    *,
    target: str | None,
    kind: Kind | None = None,
    features: Sequence[str] | None = None,
    standardise: bool = False,
    columns: Columns | None = None,
    delimiter: str = ",",
) -> Table:
    r"""Read a CSV file whose first line names the columns, or a pandas frame.

    Words and whole numbers in the target are classes, in sorted order; numbers with a decimal
    point are values to predict. Where that is wrong, `kind` says what is right: whole numbers as
    `"numbers"` are values of a regression, or the 0 and 1 that a sigmoid output wants.

    Args:
        path: a file in UTF-8; or a frame, of pandas for one, which is read as the file that it
            would write, without its index.
        target: the name of the column to predict; None where the file has none.
        kind: `"classes"` or `"numbers"`, what the target is.
        features: the names of the columns of x, in order; all but the target if absent.
        standardise: True gives each feature mean 0 and standard deviation 1 over these rows.
        columns: those of other rows, as `load_csv` or `jaxnn.load` returned them. These rows get
            the same features, the same standardisation and the same classes.
        delimiter: what separates the fields of a line.

    Returns:
        A `Table`: batch and columns.

    Raises:
        OSError: if the file cannot be read.
        TypeError: if an argument is of another kind.
        ValueError: if it is no CSV file, lacks a column, or has a field that is missing or has
            no meaning; the message names line and column.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "pets.csv")
        ...     written = path.write_text("weight,species\n4.5,cat\n30,dog\n3.5,cat\n")
        ...     (x, y, _), columns = load_csv(path, target="species")
        >>> y.tolist(), columns.class_names.tolist(), columns.feature_names
        ([0, 1, 0], ['cat', 'dog'], ('weight',))
    """
    if not (target is None or isinstance(target, str)):
        raise TypeError(f"target must be the name of a column, or None; got {target!r}")
    if kind is not None:
        as_choice("kind", kind, KINDS)
    if not (isinstance(delimiter, str) and len(delimiter) == 1 and delimiter not in '"\r\n'):
        raise ValueError(f"delimiter must be one character, and no quote; got {delimiter!r}")
    is_own = as_flag("standardise", standardise) or features is not None or kind is not None
    if columns is not None and is_own:
        raise ValueError("columns must come without standardise, features and kind; got both")
    rows = _read(path, delimiter)
    if columns is not None:
        columns = check_columns("columns", columns)
        if columns.feature_names is None:
            raise ValueError("columns must have feature_names, to find the same features; got None")
        names = _feature_names(rows, target, columns.feature_names)
        known = check_columns("columns", columns, len(names))
        kind = "numbers" if known.class_names is None else "classes"
    else:
        names, known = _feature_names(rows, target, features), Columns()
    x = np.stack([_numbers(rows, name) for name in names], axis=1)
    if standardise:
        _refuse_constant(rows, names, x)
        known = Columns(mean=x.mean(axis=0), std=x.std(axis=0))
    if known.mean is not None:
        x = (x - known.mean) / known.std
    y, classes = None, known.class_names
    if target is not None:
        y, classes = _targets(rows, target, kind, classes)
    batch = Batch(jnp.asarray(x, jnp.float32), None if y is None else jnp.asarray(y))
    return Table(batch, Columns(names, classes, known.mean, known.std))


def check_columns(
    name: str, columns: object, features: int | None = None, classes: int | None = None
) -> Columns:
    """Return columns with names as text and figures as float64; refuse those of other rows."""
    if not isinstance(columns, Columns):
        raise TypeError(f"{name} must be a jaxnn.Columns; got a {type(columns).__name__}")
    names, words, mean, std = columns
    found = Columns(
        None if names is None else tuple(map(str, names)),
        None if words is None else np.array([str(word) for word in words]),
        None if mean is None else np.asarray(mean, np.float64),
        None if std is None else np.asarray(std, np.float64),
    )
    if (found.mean is None) != (found.std is None):
        raise ValueError(f"{name} must have both of mean and std, or neither")
    for field, value in found._asdict().items():
        wanted = classes if field == "class_names" else features
        if value is not None and wanted is not None and np.shape(value) != (wanted,):
            raise ValueError(f"{name}.{field} must have {wanted} entries; got {len(value)}")
    if found.std is not None and not np.all((found.std > 0) & (found.std < np.inf)):
        raise ValueError(f"{name}.std must be finite and above 0; got {found.std}")
    if found.mean is not None and not np.all(np.isfinite(found.mean)):
        raise ValueError(f"{name}.mean must be finite; got {found.mean}")
    return found


def _read(source: StrPath | Frame, delimiter: str) -> _Rows:
    fields, lines, start = [], [], 1
    path = "the frame" if isinstance(source, Frame) else _as_path(source)
    try:
        with _opened(source, delimiter) as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for row in reader:
                texts = [text.strip() for text in row]
                if len(texts) > 1 or any(texts) or row == [""]:  # a blank line is []
                    fields.append(texts)
                    lines.append(start)
                start = reader.line_num + 1
    except UnicodeDecodeError:
        raise ValueError(f"{path} must be a CSV file, text in UTF-8; got other bytes") from None
    except csv.Error as error:
        wanted = f"must be fields separated by {delimiter!r}; got {error}"
        mend = "mend its quotes, or give another delimiter"
        raise ValueError(f"{path}, line {start} {wanted}: {mend}") from None
    if len(fields) < 2:
        wanted = "a line that names the columns, and rows below it"
        raise ValueError(f"{path} must have {wanted}; got {len(fields)} lines")
    header = fields[0]
    if all(np.isfinite(_number(text)) for text in header):
        raise ValueError(f"{path}, line {lines[0]} must name the columns; got numbers: {header}")
    for line, row in zip(lines, fields, strict=True):
        if len(row) != len(header):
            wanted = f"{len(header)} fields, as the line that names the columns"
            raise ValueError(f"{path}, line {line} must have {wanted}; got {len(row)}")
    return _Rows(path, header, fields[1:], lines[1:])


def _as_path(source: object) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"path must name a file or be a frame; got a {type(source).__name__}")
    return Path(source)


def _opened(source: StrPath | Frame, delimiter: str) -> TextIO:
    if isinstance(source, Frame):
        return io.StringIO(source.to_csv(index=False, sep=delimiter))
    return Path(source).open(newline="", encoding="utf-8-sig")


def _feature_names(
    rows: _Rows, target: str | None, wanted: Sequence[str] | None
) -> tuple[str, ...]:
    if isinstance(wanted, str):
        raise TypeError(f"features must be a sequence of names of columns; got {wanted!r}")
    if target is not None:
        _place(rows, target)
    if wanted is None:
        wanted = [name for name in rows.header if name != target]
    names = tuple(wanted)
    if not names or target in names:
        raise ValueError(f"features must be at least one column, and not the target; got {names}")
    if "" in names:
        raise ValueError(
            f"{rows.path}, line 1 must name every column; got no name for column "
            f"{rows.header.index('') + 1}: if it numbers the rows, choose others by features=[...]"
        )
    return names


def _place(rows: _Rows, name: str) -> int:
    """Return the place of a column."""
    places = [place for place, found in enumerate(rows.header) if found == name]
    if len(places) > 1:
        raise ValueError(f"{rows.path} must have one column {name!r}; got {len(places)}")
    if not places:
        others = [mark for mark in ",;\t|" if len(rows.header) == 1 and mark in rows.header[0]]
        hint = f": delimiter={others[0]!r} may separate them" if others else ""
        came = f"got columns {_listed(rows.header)}{hint}"
        raise ValueError(f"{rows.path} must have a column {name!r}; {came}")
    return places[0]


def _listed(names: Sequence[str] | np.ndarray) -> str:
    return ", ".join(map(repr, map(str, names[:10]))) + ", ..." * (len(names) > 10)


def _number(text: str) -> float:
    """Return what a field says, NaN if that is no number."""
    try:
        return float(text) if "_" not in text else np.nan
    except ValueError:
        return np.nan


def _numbers(
    rows: _Rows, name: str, otherwise: str = "choose other columns by features=[...]"
) -> np.ndarray:
    """Return a column as finite numbers that fit float32."""
    place = _place(rows, name)
    values = np.array([_number(row[place]) for row in rows.fields])
    bad = ~(abs(values) <= np.finfo(np.float32).max)
    if bad.any():
        raise _refusal(rows, name, int(bad.argmax()), "a finite number of float32", otherwise)
    return values


def _refusal(rows: _Rows, name: str, row: int, wanted: str, otherwise: str) -> ValueError:
    """Return the error of one field: where it is, and what to do."""
    text = rows.fields[row][_place(rows, name)]
    is_missing = text.lower() in MISSING
    mend = "fill it in or remove the line" if is_missing else f"correct it, or {otherwise}"
    where = f"{rows.path}, line {rows.lines[row]}, column {name!r}"
    return ValueError(f"{where} must be {wanted}; got {text!r}: {mend}")


def _refuse_constant(rows: _Rows, names: tuple[str, ...], x: np.ndarray) -> None:
    """Refuse columns whose standard deviation is 0."""
    # Squares may underflow.
    is_constant = (x.min(axis=0) == x.max(axis=0)) | (x.std(axis=0) == 0)
    if is_constant.any():
        first, *others = np.array(names)[is_constant].tolist()
        also = f" (the same goes for {', '.join(map(repr, others))})" if others else ""
        raise ValueError(
            f"{rows.path}, column {first!r} must vary to be standardised; got "
            f"{x[0, is_constant][0]:g} in all {len(x)} rows: leave it out by features=[...]{also}"
        )


def _targets(
    rows: _Rows, name: str, kind: str | None, known: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the targets, and the names of their classes if they are classes."""
    place = _place(rows, name)
    labels = [row[place] for row in rows.fields]
    is_number = [np.isfinite(_number(label)) for label in labels]
    if kind is None:
        if any(is_number) and not all(is_number):
            bad = is_number.index(False)
            raise _refusal(rows, name, bad, "a number, as others", "say kind='classes'")
        is_whole = all(label.lstrip("+-").isdecimal() for label in labels)
        kind = "classes" if is_whole or not all(is_number) else "numbers"
        if kind == "classes" and (number := len(set(labels))) > MAX_CLASSES:
            raise ValueError(
                f"kind must be 'classes' or 'numbers', as column {name!r} of {rows.path} has "
                f"{number} different values; got None"
            )
    if kind == "numbers":
        return _numbers(rows, name, "say kind='classes'").astype(np.float32)[:, None], None
    return _classes(rows, name, labels, known)


def _classes(
    rows: _Rows, name: str, labels: list[str], known: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as places in their sorted names, or in the names that are known."""
    wanted, otherwise = "a label", "leave it"
    if known is None:
        is_number = all(np.isfinite(_number(label)) for label in labels)
        order = sorted(set(labels), key=lambda label: (_number(label) if is_number else 0, label))
        if len(order) < 2:
            came = f"got {order[0]!r} in all rows"
            raise ValueError(f"{rows.path}, column {name!r} must have at least 2 classes; {came}")
        known = np.array(order)
    else:
        wanted, otherwise = f"one of the classes {_listed(known)}", "train on its class too"
    places = {str(label): place for place, label in enumerate(known)}
    for row, label in enumerate(labels):
        if label not in places or label.lower() in MISSING:
            raise _refusal(rows, name, row, wanted, otherwise)
    return np.array([places[label] for label in labels], np.int32), known
