"""Checkpoints: files that are whole or absent, and that are checked before they are believed.

A checkpoint is an uncompressed npz, which `numpy.load` opens too. Besides the arrays it holds
`metadata`, JSON text as uint8; `format`, a number; and `sha256`, the checksum of all the rest.
A save writes a new file beside the old one, then renames it: after a kill, a crash or a full disk
the old checkpoint is still there. (A kill may leave a `.tmp` file, which nothing reads.) A load
runs no code from the file and reads at most 1 GiB.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

import jax
import numpy as np

from jaxnn.run.fingerprint import check_same_run, checksum
from jaxnn.typing import PyTree, Status

StrPath = str | os.PathLike[str]
Arrays = Mapping[str, np.ndarray]
Metadata = Mapping[str, object]

FORMAT = 2
OWN_MEMBERS = {"metadata", "format", "sha256"}
DTYPES = {np.dtype(f"<{kind}{size}") for kind in "iuf" for size in (2, 4, 8)}
DTYPES |= {np.dtype(np.bool_), np.dtype(np.int8), np.dtype(np.uint8)}
MAX_BYTES, MAX_TEXT = 2**30, 2**18
"""Bytes of a file, and of its metadata."""
HEADER = 2_000
"""Bytes that a member takes besides its array, at most."""


class LoadError(ValueError):
    """A file that is no checkpoint, a damaged one, or one of another format."""


class Saved(NamedTuple):
    """What a checkpoint holds: the arrays of the state, metadata, and the arrays of the history."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]
    history: dict[str, np.ndarray] | None = None


class Checkpoint(NamedTuple):
    """Where a run is saved, and the metadata that a run which goes on from it has to share.

    The history is saved in a file of its own, so that a history that cannot be saved never keeps
    the state from being saved: the run goes on from the state.

    Attributes:
        path: the file of the state.
        metadata: what has to be the same.
    """

    path: Path
    metadata: Metadata

    @property
    def history_path(self) -> Path:
        """The file of the history, beside that of the state."""
        path = Path(os.path.realpath(self.path))
        return path.with_name(f"{path.stem}.history{path.suffix}")

    def begin(
        self, arrays: Arrays, asked: tuple[str, int], *, origin: int = 0, has_history: bool = False
    ) -> Saved | None:
        """Return what was saved by a run of the same settings, or None.

        `arrays` are the state before the first step; `asked` is the argument that says how much
        to do, such as `("num_steps", 100)`, and `origin` what `next` in the metadata counts from.
        Refuses a checkpoint of another run, a damaged one, and one that has gone further than is
        asked for; and, before the work, a place or a state that cannot be saved.
        """
        _pack(arrays, self.metadata)
        check_writable(self.path)
        if has_history:
            check_writable(self.history_path)
        if not self.path.exists():
            return None
        saved = self._load(self.path)
        name, count = asked
        if (done := saved.metadata["next"] - origin) > count:
            raise ValueError(
                f"{name} must be at least {done}, which checkpoint {self.path} holds; got {count}"
            )
        return self._with_history(saved) if has_history else saved

    def save(
        self, arrays: Arrays, metadata: Metadata, history: Callable[[], Arrays] | None = None
    ) -> None:
        """Save; a full disk, or too little memory, is a warning and not the end of the run.

        The history goes first. If the program is killed between the two, the history holds more
        steps than the state has made, and these can be cut off.
        """
        if history is not None:
            self._save(self.history_path, history, metadata)
        self._save(self.path, lambda: arrays, metadata)

    def _with_history(self, saved: Saved) -> Saved:
        try:
            history = self._load(self.history_path)
        except (FileNotFoundError, LoadError) as error:
            _warn(f"the run goes on without its history: {error}")
            return saved
        if (steps := history.metadata["next"]) < saved.metadata["next"]:
            end = saved.metadata["next"]
            _warn(f"the history {self.history_path} ends at {steps}, before {end}")
        every = max(saved.metadata["record_every"], history.metadata["record_every"])
        return Saved(saved.arrays, {**saved.metadata, "record_every": every}, history.arrays)

    def _load(self, path: Path) -> Saved:
        saved = Saved(*load(path))
        check_same_run(path, saved.metadata, self.metadata)
        return saved

    def _save(self, path: Path, arrays: Callable[[], Arrays], metadata: Metadata) -> None:
        try:
            save(path, arrays(), {**self.metadata, **metadata})
        except (OSError, ValueError, MemoryError) as error:
            _warn(f"checkpoint not saved: {error}")


class SavedProgress(NamedTuple):
    """How far the run of a checkpoint came.

    Attributes:
        trainer: "random_search", "count_outcomes", "rare_event_search", "perturbation_search" or
            "gradient_descent".
        done: candidates, levels, steps of each chain, or epochs.
        status: why it ended; "running" if it still runs, or was killed.
    """

    trainer: str
    done: int
    status: Status


def saved_progress(path: StrPath) -> SavedProgress:
    """Return how far the run of a checkpoint came.

    Args:
        path: the file that a trainer was given as `checkpoint`.

    Returns:
        A `SavedProgress`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint, or a damaged one.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.npz", {}, {"trainer": "x", "next": 9, "status": "stopped"})
        ...     saved_progress(f"{folder}/a.npz")
        SavedProgress(trainer='x', done=9, status='stopped')
    """
    metadata = load(path)[1]
    done = metadata["next"] - metadata.get("start", 0)
    return SavedProgress(metadata["trainer"], done, metadata["status"])


def tree_to_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """Return every leaf under its number: a user's own keys may be no names for files.

    Example:
        >>> tree_to_arrays({"x": [1.0]})
        {'leaf.0': array(1.)}
    """
    return {f"leaf.{place}": np.asarray(leaf) for place, leaf in enumerate(jax.tree.leaves(tree))}


def arrays_to_tree(tree: PyTree, arrays: Arrays) -> PyTree:
    """Return a tree like this one, of the arrays that `tree_to_arrays` returned."""
    wanted = tree_to_arrays(tree)
    for name, leaf in wanted.items():
        found = arrays.get(name)
        if found is None or (found.dtype, found.ndim) != (leaf.dtype, leaf.ndim):
            raise ValueError(f"the checkpoint is of another run: it lacks {name} as {leaf.dtype}")
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in wanted])


def check_saveable(tree: PyTree) -> None:
    """Refuse a state that a checkpoint cannot hold, before the work and not after it."""
    for leaf in jax.tree.leaves(tree):
        if leaf.dtype not in DTYPES:
            raise TypeError(
                "params and what the optimizer remembers must be of NumPy's numbers to be saved; "
                f"got {leaf.dtype}: cast it, or leave checkpoint out"
            )


def save(path: StrPath, arrays: Arrays, metadata: Metadata) -> None:
    """Write a checkpoint, in place of the one that may be there, in one step.

    A link stays a link, and the file that it names keeps its mode. If several programs save to
    one path at once, the last to finish wins, and nothing is mixed. Arrays are of bool, or
    integers or floats of up to 64 bits; metadata are what JSON gives back as it was. An `OSError`
    names the path.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save(f"{folder}/run.npz", {"losses": np.zeros(3)}, {"step": 2**63})
        ...     load(f"{folder}/run.npz")
        ({'losses': array([0., 0., 0.])}, {'step': 9223372036854775808})
    """
    members = _pack(arrays, metadata)
    with _beside(Path(path)) as (temporary, target):
        _write(temporary, members)
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
        _sync_directory(target.parent)


def load(path: StrPath) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the metadata of a checkpoint, as they were saved.

    Raises:
        FileNotFoundError: if there is no such file.
        LoadError: if it is anything but a whole checkpoint; it names the file and the reason.
    """
    path = Path(path)
    try:
        _require(stat.S_ISREG(path.stat().st_mode), "it is not a regular file")
        with path.open("rb") as file:
            return _unpack(file)
    except FileNotFoundError:
        raise
    except Exception as error:  # Bad bytes make zipfile, numpy and json raise nearly anything.
        reason = str(error) or type(error).__name__
        raise LoadError(f"cannot load {path}: {reason}") from error


def dumps(arrays: Arrays, metadata: Metadata) -> bytes:
    """Return the bytes that `save` would write, for another process."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **_pack(arrays, metadata))
    return file.getvalue()


def loads(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the metadata that `dumps` took."""
    return _unpack(io.BytesIO(data))


def check_writable(path: StrPath) -> None:
    """Try whether a checkpoint can be saved here; what the file holds is left alone."""
    with _beside(Path(path)) as (temporary, _):
        _write(temporary, {})


def _pack(arrays: Arrays, metadata: Metadata) -> dict[str, np.ndarray]:
    """The members of a checkpoint; refuses what `load` would refuse."""
    members = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    for name, array in members.items():
        if array.dtype not in DTYPES:
            raise TypeError(
                f"arrays[{name!r}] must be of bool, or of little-endian integers or floats of up "
                f"to 64 bits; got dtype {array.dtype}"
            )
    text = json.dumps(dict(metadata), allow_nan=False)
    if json.loads(text) != dict(metadata):
        raise TypeError("metadata must be what JSON gives back: no tuples, and no keys but text")
    members["metadata"] = np.frombuffer(text.encode(), np.uint8)
    members["format"] = np.asarray(FORMAT)
    members["sha256"] = np.frombuffer(checksum(sorted(members.items())), np.uint8)
    size = sum(array.nbytes + HEADER for array in members.values())
    if len(text) > MAX_TEXT or size > MAX_BYTES:
        raise ValueError(
            f"a checkpoint must have at most {MAX_TEXT} bytes of metadata and {MAX_BYTES} bytes "
            f"in all; got {len(text)} and {size}"
        )
    return members


def _unpack(file: BinaryIO) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    size = file.seek(0, os.SEEK_END)
    _require(size <= MAX_BYTES, f"it has {size} bytes, over {MAX_BYTES}")
    _require(zipfile.is_zipfile(file), "it is no zip archive")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        infos = archive.zip.infolist()
        is_stored = all(info.compress_type == zipfile.ZIP_STORED for info in infos)
        _require(is_stored, "it is compressed")
        _require(sum(info.file_size for info in infos) <= size, "its members overlap")
        missing = sorted(OWN_MEMBERS - set(archive.files))
        _require(not missing, f"it lacks {missing}")
        members = {name: archive[name] for name in archive.files}
    expected, number = members.pop("sha256"), members["format"].item()
    _require(number == FORMAT, f"it has format {number}; this version reads format {FORMAT}")
    is_whole = checksum(sorted(members.items())) == expected.tobytes()
    _require(is_whole, "its checksum is wrong: the file is damaged")
    del members["format"]
    return members, json.loads(members.pop("metadata").tobytes())


@contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Path]]:
    """A new file name beside the file that `path` names, unused in the end, and that file.

    Errors name `path`. The new name is short, whatever the length of the old one.
    """
    target = Path(os.path.realpath(path))
    # A file from tempfile, and so the checkpoint, could be read by nobody but its owner.
    temporary = target.parent / f".{uuid4().hex}.tmp"
    try:
        if target.is_symlink():
            raise OSError(errno.ELOOP, "Too many levels of symbolic links")
        if path.exists() and not path.is_file():
            raise FileExistsError(errno.EEXIST, "Exists, and is not a regular file")
        yield temporary, target
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _write(path: Path, members: Arrays) -> None:
    with path.open("xb") as file:
        np.savez(file, allow_pickle=False, **members)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Makes a rename outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _warn(message: str) -> None:
    """Warns; a closed standard error, or warnings that are errors, must not end the run."""
    with suppress(Exception):
        warnings.warn(message, RuntimeWarning, stacklevel=5)
