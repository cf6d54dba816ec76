"""Checkpoints: files that are whole or absent, and that are checked before they are believed.

A checkpoint is an uncompressed npz, which `numpy.load` opens too. Besides the arrays it holds
`facts`, JSON text as uint8; `format`, a number; and `sha256`, the checksum of all the rest.
A save writes beside the file, then renames: a kill, a crash or a full disk leaves the checkpoint
before it as it was. (A kill may also leave a `.tmp` file, which nothing reads.) A load runs no
code, and compares every size with the file's own before it allocates.

The leaves of a pytree are saved by number, since keys of a user's own may be no names for files.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import jax
import numpy as np
from numpy.lib import format as npy

from jaxnn.run.fingerprint import checksum

__all__ = [
    "LoadError",
    "check_fits",
    "check_saveable",
    "check_writable",
    "dumps",
    "load",
    "loads",
    "numbered_leaves",
    "save",
    "with_leaves",
]


StrPath = str | os.PathLike[str]

FORMAT = 1
OWN_MEMBERS = {"facts.npy", "format.npy", "sha256.npy"}
MEMBER = re.compile(r"\w[\w.-]{0,99}\.npy", re.ASCII)
DTYPES = {np.dtype(f"<{kind}{size}") for kind in "iuf" for size in (2, 4, 8)}
DTYPES |= {np.dtype(np.bool_), np.dtype(np.int8), np.dtype(np.uint8)}

MAX_BYTES = 2**30
MAX_TEXT = 2**18
"""Bytes of facts, and of the zip's directory: read into Python, each takes up about thirty."""
MAX_HEADER = 1_000
"""Characters before an array's data; a shape of 64 axes needs about 800."""


class LoadError(ValueError):
    """A file that is no checkpoint, a damaged one, or one of another format."""


def save(path: StrPath, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Writes a checkpoint, in place of the one that may be there, in one step.

    A link stays a link, and the file that it names keeps its mode. Several may save to one path
    at once: the last to finish wins, and nothing is mixed.

    Args:
        path: the file; its directory must exist.
        arrays: arrays of any shape by name; of bool, or integers or floats of up to 64 bits.
        facts: what JSON gives back as it was: text, bools, finite numbers, integers of any
            size, None, and lists and dicts of these.

    Raises:
        OSError: if the file cannot be written; it names the path.
        TypeError: if a dtype is not allowed, or JSON would change the facts.
        ValueError: if a name is not allowed, a fact not finite, or the whole too large.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save(f"{folder}/run.npz", {"losses": np.zeros(3)}, {"step": 2**63})
        ...     load(f"{folder}/run.npz")
        ({'losses': array([0., 0., 0.])}, {'step': 9223372036854775808})
    """
    members = _pack(arrays, facts)
    with _beside(Path(path)) as (temporary, target):
        _write(temporary, members)
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
        _sync_directory(target.parent)


def load(path: StrPath) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a checkpoint, even one that is damaged or made to do harm.

    Args:
        path: the file.

    Returns:
        The arrays and the facts, as they were saved.

    Raises:
        FileNotFoundError: if there is no such file.
        LoadError: if it is anything but a whole checkpoint; it names the file and the reason.

    Example:
        >>> load("/dev/null")
        Traceback (most recent call last):
        jaxnn.run.checkpoints.LoadError: cannot load /dev/null: it is not a regular file
    """
    try:
        return _unpack(_read(Path(path)))
    except FileNotFoundError:
        raise
    except Exception as error:  # Bad bytes make zipfile, numpy and json raise nearly anything.
        reason = str(error) or type(error).__name__
        raise LoadError(f"cannot load {os.fspath(path)}: {reason}") from error


def dumps(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> bytes:
    """The bytes that `save` would write, for another process.

    Raises:
        TypeError: as `save`.
        ValueError: as `save`.
    """
    file = io.BytesIO()
    _write_members(file, _pack(arrays, facts))
    return file.getvalue()


def loads(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the facts that `dumps` took.

    Raises:
        ValueError: if the bytes are no whole checkpoint.

    Example:
        >>> loads(dumps({"losses": np.zeros(1)}, {"step": 7}))
        ({'losses': array([0.])}, {'step': 7})
    """
    return _unpack(_read_members(io.BytesIO(data)))


def check_writable(path: StrPath) -> None:
    """Tries whether a checkpoint can be saved; for use before long work.

    Args:
        path: the file; what it holds is left alone.

    Raises:
        OSError: if the directory is missing or takes no file, or `path` is one itself.

    Example:
        >>> check_writable("no/such/directory/run.npz")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'no/such/directory/run.npz'
    """
    with _beside(Path(path)) as (temporary, _):
        _write(temporary, {})


def check_fits(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Refuses what `save` would refuse, without a file; for use before long work.

    Raises:
        TypeError: as `save`.
        ValueError: as `save`.
    """
    _pack(arrays, facts)


def _pack(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The members of a checkpoint; what passes here, `load` takes."""
    members = {name: _as_member(name, array) for name, array in arrays.items()}
    text = json.dumps(dict(facts), allow_nan=False)
    if json.loads(text) != dict(facts):
        raise TypeError("facts must be what JSON gives back: no tuples, and no keys but text")
    members["facts"] = np.frombuffer(text.encode(), np.uint8)
    members["format"] = np.asarray(FORMAT)
    members["sha256"] = np.frombuffer(checksum(sorted(members.items())), np.uint8)
    num_text = max(len(text), sum(len(name) + 50 for name in members))
    num_bytes = sum(array.nbytes + 2 * MAX_HEADER for array in members.values())
    if num_text > MAX_TEXT or num_bytes > MAX_BYTES:
        raise ValueError(
            f"a checkpoint must have at most {MAX_TEXT} bytes of facts, and of names, and "
            f"{MAX_BYTES} bytes in all; got {num_text} and {num_bytes}"
        )
    return members


def _as_member(name: str, array: np.ndarray) -> np.ndarray:
    if not MEMBER.fullmatch(f"{name}.npy") or f"{name}.npy" in OWN_MEMBERS:
        raise ValueError(
            "arrays must have names of up to 100 letters, digits and any of _.- other than "
            f"facts, format and sha256; got {name!r}"
        )
    array = np.asarray(array, order="C")
    if array.dtype not in DTYPES:
        raise TypeError(
            f"arrays[{name!r}] must be of bool, or of little-endian integers or floats of up to "
            f"64 bits; got dtype {array.dtype}"
        )
    return array


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


def _write(path: Path, members: Mapping[str, np.ndarray]) -> None:
    with path.open("xb") as file:
        _write_members(file, members)
        file.flush()
        os.fsync(file.fileno())


def _write_members(file: BinaryIO, members: Mapping[str, np.ndarray]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in members.items():
            with archive.open(f"{name}.npy", "w") as member:
                npy.write_array(member, array, version=(1, 0), allow_pickle=False)


def _sync_directory(path: Path) -> None:
    """Makes a rename outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, np.ndarray]:
    _require(stat.S_ISREG(path.stat().st_mode), "it is not a regular file")
    with path.open("rb") as file:
        return _read_members(file)


def _read_members(file: BinaryIO) -> dict[str, np.ndarray]:
    """All members of a file, once their names and sizes are such as `save` writes."""
    size = file.seek(0, os.SEEK_END)
    _require(size <= MAX_BYTES, f"it has {size} bytes, over {MAX_BYTES}")
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_members(members, size)
        return {member.filename[:-4]: _read_array(archive, member) for member in members}


def _check_directory(file: BinaryIO, file_size: int) -> None:
    """Bounds the zip's directory by the record at the end of the file, for zipfile does not."""
    file.seek(max(file_size - 42, 0))
    locator, end = file.read(20), file.read()
    is_plain = end[:4] == b"PK\5\6" and len(end) == 22 and not locator.startswith(b"PK\6\7")
    _require(is_plain, "it is no plain zip archive")
    _require(int.from_bytes(end[12:16], "little") <= MAX_TEXT, "its zip directory is too large")


def _check_members(members: list[zipfile.ZipInfo], file_size: int) -> None:
    names = [member.orig_filename for member in members]
    odd = [name[:100] for name in names if not MEMBER.fullmatch(name)]
    _require(not odd, f"it has members of odd names: {odd[:1]}")
    _require(len(names) == len(set(names)), "it has two members of one name")
    _require(OWN_MEMBERS.issubset(names), f"it lacks {sorted(OWN_MEMBERS.difference(names))}")
    is_stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    _require(is_stored, "it is compressed")
    _require(sum(member.file_size for member in members) <= file_size, "its members overlap")


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    name = member.filename
    with archive.open(member) as stream:
        _require(npy.read_magic(stream) == (1, 0), f"{name} has another npy version than 1.0")
        shape, _, dtype = npy.read_array_header_1_0(stream, max_header_size=MAX_HEADER)
        _require(dtype in DTYPES, f"{name} has dtype {dtype}")
        size = member.file_size - stream.tell()
        is_honest = math.prod(shape) * dtype.itemsize == size and min(shape, default=0) >= 0
        _require(is_honest, f"{name} has shape {shape} in its header, but {size} bytes")
        stream.seek(0)
        return npy.read_array(stream, allow_pickle=False, max_header_size=MAX_HEADER)


def _unpack(members: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    expected, number = members.pop("sha256"), members["format"].item()
    _require(number == FORMAT, f"it has format {number}; this version reads format {FORMAT}")
    is_whole = checksum(sorted(members.items())) == expected.tobytes()
    _require(is_whole, "its checksum is wrong: the file is damaged")
    text = members.pop("facts")
    _require(text.nbytes <= MAX_TEXT, "its facts are too long")
    facts = json.loads(text.tobytes())
    _require(isinstance(facts, dict), "its facts are no JSON object")
    del members["format"]
    return members, facts


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def numbered_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Every leaf, in the order of the tree: keys of a user's own may be no names for files.

    Example:
        >>> numbered_leaves({"x": [1.0]})
        {'leaf.0': array(1.)}
    """
    return {f"leaf.{place}": np.asarray(leaf) for place, leaf in enumerate(jax.tree.leaves(tree))}


def check_saveable(tree: Any) -> None:
    """Refuses a state that a checkpoint cannot hold, before the work rather than after it."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf.dtype, np.dtype) and leaf.dtype.kind in "biuf" and leaf.dtype.isbuiltin:
            continue
        raise TypeError(
            "params and what the optimizer remembers must be of NumPy's numbers to be saved; "
            f"got {leaf.dtype}: cast it, or leave checkpoint out"
        )


def with_leaves(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """A tree like this one, of the arrays that `numbered_leaves` told.

    Raises:
        ValueError: if an array is missing, or of another dtype or number of axes.
    """
    wanted = numbered_leaves(tree)
    for name, leaf in wanted.items():
        found = arrays.get(name)
        if found is None or (found.dtype, found.ndim) != (leaf.dtype, leaf.ndim):
            raise ValueError(f"the checkpoint is of another run: it lacks {name} as {leaf.dtype}")
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in wanted])
