"""Checkpoints: whole or absent after any fault, and refused when damaged."""

import errno
import io
import json
import math
import os
import pickle
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxnn.run import checkpoint
from jaxnn.run.checkpoint import MAX_TEXT, Checkpoint, LoadError, check_writable, load, save

NUMBERS = [f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)]
NUMBERS.remove("float8")
ARRAYS = {
    "weights": np.arange(6, dtype=np.float32).reshape(2, 3),
    "index": np.asarray(2**63 - 1),
    "is_done": np.zeros((0, 2), bool),
}
METADATA = {"trainer": "search", "next": 2**63, "scale": 0.05, "sizes": [2, 3, {"a": None}]}


def assert_same(got, wanted):
    (got_arrays, got_metadata), (arrays, metadata) = got, wanted
    assert got_metadata == metadata
    assert set(got_arrays) == set(arrays)
    for name, array in arrays.items():
        found = got_arrays[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.npz"


@pytest.fixture
def saved(path):
    save(path, ARRAYS, METADATA)
    return path


def refusal(path):
    """The reason that `load` gives for not taking a file; None if it takes it."""
    refused = None
    try:
        load(path)
    except LoadError as error:
        refused = error
    if refused is None:
        return None
    assert refused.__cause__ is not None
    assert str(refused).startswith(f"cannot load {path}: ")
    return str(refused).removeprefix(f"cannot load {path}: ")


# Round trips

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
any_array = hnp.arrays(
    st.sampled_from(["bool", *NUMBERS]), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)
)


@given(
    arrays=st.dictionaries(st.from_regex(r"[a-z][a-z0-9_.]{2,30}", fullmatch=True), any_array),
    metadata=st.dictionaries(st.text(), json_values, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_saved_comes_back(arrays, metadata):
    arrays = {f"of.{name}": array for name, array in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/run.npz", arrays, metadata)
        assert_same(load(f"{folder}/run.npz"), (arrays, metadata))
        assert os.listdir(folder) == ["run.npz"]


def test_layouts_of_memory_do_not_matter_and_loaded_arrays_can_be_written_to(path):
    array = np.arange(24.0).reshape(4, 6)
    arrays = {"fortran": np.asfortranarray(array), "strided": array[::2, ::-3], "jax": jnp.ones(3)}
    arrays["fixed"] = np.broadcast_to(np.float32(1), (2, 2))
    save(path, arrays, {})
    loaded = load(path)
    assert_same(loaded, ({name: np.asarray(array) for name, array in arrays.items()}, {}))
    loaded[0]["fixed"][0, 0] = 7


def test_a_large_array_comes_back_in_memory_of_its_own_size(path):
    save(path, {"losses": np.random.default_rng(0).normal(size=2**21)}, METADATA)
    tracemalloc.start()
    load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * path.stat().st_size


def test_numpy_opens_a_checkpoint(saved):
    with np.load(saved) as file:
        assert set(file) == {*ARRAYS, "metadata", "format", "sha256"}
        assert json.loads(file["metadata"].tobytes()) == METADATA
        np.testing.assert_array_equal(file["weights"], ARRAYS["weights"])


def test_paths_may_be_text_or_relative_and_modes_and_links_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("run", ARRAYS, METADATA)
    Path("other").touch()
    assert Path("run").stat().st_mode == Path("other").stat().st_mode
    Path("run").chmod(0o600)
    Path("link").symlink_to("run")
    save("link", {}, METADATA)
    assert Path("link").is_symlink()
    assert stat.S_IMODE(Path("run").stat().st_mode) == 0o600
    assert_same(load(Path("link")), ({}, METADATA))


# What is refused before anything is written


@pytest.mark.parametrize("dtype", [">f4", complex, object, "U3", "M8[s]", "f4,i4", jnp.bfloat16])
def test_other_dtypes_are_refused(path, dtype):
    with pytest.raises(TypeError, match=r"arrays\['odd'\] must be .* got dtype"):
        save(path, {"odd": np.zeros(2, dtype)}, {})
    assert not path.exists()


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"sizes": (2, 3)}, TypeError),
        ({"nested": {1: 2}}, TypeError),
        ({"scale": np.float32(1)}, TypeError),
        ({"loss": math.nan}, ValueError),
        ({"long": "x" * MAX_TEXT}, ValueError),
    ],
    ids=["tuple", "key", "scalar", "nan", "long"],
)
def test_metadata_that_json_would_change_is_refused(path, metadata, error):
    with pytest.raises(error):
        save(path, {}, metadata)
    assert not path.exists()


def test_what_load_would_find_too_large_is_refused(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_BYTES", 20_000)
    with pytest.raises(ValueError, match=r"at most .* and 20000 bytes in all"):
        save(path, {"a": np.zeros(12_000, np.uint8)}, {})
    assert not path.exists()
    save(path, {"a": np.zeros(11_000, np.uint8)}, {})
    load(path)


# Faults while saving

DRIVER = """
import os, random, signal, sys, time
import numpy as np
from jaxnn.run.checkpoint import load, save

path, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)
generation = torn = num_kills = 0

def write_on_forever(generation):
    while True:
        generation += 1
        size = 1 + generation * 7919 % 60_000
        arrays = {"a": np.full(size, generation), "b": np.full((2, size), generation, np.float32)}
        save(path, arrays, {"generation": generation, "size": size})

save(path, {"a": np.zeros(1, int), "b": np.zeros((2, 1), np.float32)}, {"generation": 0, "size": 1})
started = time.perf_counter()
for _ in range(10):
    save(path + ".other", {"a": np.zeros((2, 60_000))}, {})
seconds_per_save = (time.perf_counter() - started) / 10
while torn < kills:
    child, num_kills = os.fork(), num_kills + 1
    if not child:
        write_on_forever(generation)
    time.sleep(draw.uniform(0.0, 5 * seconds_per_save))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child failed by itself"
    left = [name for name in os.listdir(os.path.dirname(path)) if name.endswith(".tmp")]
    torn += len(left)
    for name in left:
        os.unlink(os.path.join(os.path.dirname(path), name))
    arrays, metadata = load(path)
    assert generation <= metadata["generation"], "a checkpoint was lost"
    generation = metadata["generation"]
    assert arrays["a"].shape == (metadata["size"],) and arrays["b"].shape == (2, metadata["size"])
    assert all((array == generation).all() for array in arrays.values()), "a mix of two"
print(generation, num_kills)
"""


def kill(path, kills, seed):
    """Kills a process that saves on and on, so many times in a save; returns saves and kills."""
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(path), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return map(int, done.stdout.split())


def test_a_kill_in_the_middle_of_a_save_leaves_a_whole_checkpoint(path):
    saves, num_kills = kill(path, kills=12, seed=0)
    assert saves > 0
    assert num_kills >= 12


def no_space(*args, **kwargs):
    del args, kwargs
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS = {
    "opening": (Path, "open"),
    "writing": (np.lib.format, "write_array"),
    "closing the zip": (zipfile.ZipFile, "_write_end_record"),
    "syncing": (os, "fsync"),
    "renaming": (os, "replace"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_leaves_the_last_checkpoint_and_no_other_file(saved, monkeypatch, fault):
    with monkeypatch.context() as patch:
        patch.setattr(*FAULTS[fault], no_space)
        with pytest.raises(OSError, match="No space left") as held:
            save(saved, {"weights": np.zeros(9)}, {})
    assert (held.value.errno, held.value.filename) == (errno.ENOSPC, str(saved))
    assert os.listdir(saved.parent) == ["run.npz"]
    assert_same(load(saved), (ARRAYS, METADATA))


def test_the_file_is_synced_before_it_is_renamed_and_the_directory_after(path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def log_fsync(descriptor):
        events.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def log_replace(source, target):
        load(source)
        events.append("rename")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", log_fsync)
        patch.setattr(os, "replace", log_replace)
        save(path, ARRAYS, METADATA)
    assert events == ["file", "rename", "directory"]


def test_an_interrupt_leaves_no_other_file(saved, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(saved, {}, {})
    assert os.listdir(saved.parent) == ["run.npz"]
    assert_same(load(saved), (ARRAYS, METADATA))


def test_savers_at_once_leave_one_of_their_checkpoints_whole(path):
    """While a reader looks on, and finds a whole one each time."""
    save(path, {"a": np.zeros(1)}, {"size": 1, "value": 0})
    saving, failures = threading.Event(), []
    saving.set()

    def write(value, size):
        for _ in range(40):
            save(path, {"a": np.full(size, float(value))}, {"size": size, "value": value})

    def read():
        while saving.is_set():
            arrays, metadata = load(path)
            if arrays["a"].tolist() != [metadata["value"]] * metadata["size"]:
                failures.append(metadata)

    reader = threading.Thread(target=read)
    savers = [threading.Thread(target=write, args=(n, 100 + 999 * n)) for n in range(3)]
    for thread in [reader, *savers]:
        thread.start()
    for thread in savers:
        thread.join()
    saving.clear()
    reader.join()
    assert failures == []
    assert os.listdir(path.parent) == ["run.npz"]
    assert load(path)[1]["size"] > 1


@pytest.mark.parametrize("function", [check_writable, lambda path: save(path, ARRAYS, METADATA)])
@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("{}/no/run.npz", FileNotFoundError),
        ("{}/file/run.npz", NotADirectoryError),
        ("{}", FileExistsError),
        ("{}/fifo", FileExistsError),
        (".", FileExistsError),
        ("..", FileExistsError),
        ("/", FileExistsError),
        ("/proc/run.npz", OSError),
        ("{}/" + "a" * 300, OSError),
    ],
)
def test_bad_places_are_errors_that_name_them(tmp_path, function, place, error):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    path = place.format(tmp_path)
    with pytest.raises(error) as held:
        function(path)
    assert held.value.filename == path
    assert set(os.listdir(tmp_path)) == {"file", "fifo"}
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_disk_that_is_full_at_the_start_is_found_before_the_work(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            check_writable(path)
    assert os.listdir(path.parent) == []


def test_a_place_that_can_be_written_is_left_as_it_was(path):
    check_writable(path)
    check_writable(str(path))
    assert os.listdir(path.parent) == []
    save(path, ARRAYS, METADATA)
    before = path.stat()
    check_writable(path)
    assert os.listdir(path.parent) == ["run.npz"]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# Files that are damaged, or no checkpoints


def test_a_missing_file_is_missing(path):
    with pytest.raises(FileNotFoundError, match=str(path)):
        load(path)
    path.symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        load(path)


def test_no_part_of_a_file_loads(saved):
    whole = saved.read_bytes()
    cuts = {len(whole) * part // 16 for part in range(16)} | set(range(len(whole) - 30, len(whole)))
    for size in cuts:
        saved.write_bytes(whole[:size])
        assert refusal(saved)
        saved.write_bytes(whole[size or 1 :])
        assert refusal(saved)


def mutate(rng, data):
    """Damages a file in one of the ways that disks, networks and people do."""
    data, place = bytearray(data), int(rng.integers(len(data)))
    other, size = int(rng.integers(len(data))), int(rng.integers(1, 65))
    match int(rng.integers(8)):
        case 0 | 1 | 2:
            data[place] ^= 1 << int(rng.integers(8))
        case 3:
            data[place : place + size] = rng.bytes(len(data[place : place + size]))
        case 4:
            data[place : place + size] = bytes(len(data[place : place + size]))
        case 5:
            word = struct.pack("<I", int(rng.choice([0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1])))
            data[place : place + 4] = word[: len(data) - place]
        case 6:
            del data[place : place + size]
        case 7:
            data[place:place] = data[other : other + size]
    return bytes(data)


def fuzz(path, seed, count):
    whole, rng = path.read_bytes(), np.random.default_rng(seed)
    for _ in range(count):
        data = mutate(rng, whole)
        while rng.integers(4) == 0:
            data = mutate(rng, data)
        path.write_bytes(data)
        if refusal(path) is None:
            assert_same(load(path), (ARRAYS, METADATA))


def test_damaged_files_are_refused_or_the_same(saved):
    fuzz(saved, seed=0, count=400)


class Harmful:
    """Leaves a mark when unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def array_bytes(array, allow_pickle=False):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def rewrite(path, compression=zipfile.ZIP_STORED, **changes):
    """Writes the file anew with other bytes in place of some members, or without them."""
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {**members, **changes}.items():
            if data is not None:
                archive.writestr(f"{name}.npy", data)


def test_no_pickle_is_opened(saved, tmp_path):
    mark = tmp_path / "harm"
    pickled = array_bytes(np.asarray([Harmful(mark)], object), allow_pickle=True)
    rewrite(saved, weights=pickled)
    assert "allow_pickle=False" in str(refusal(saved))
    saved.write_bytes(pickle.dumps(Harmful(mark)))
    assert refusal(saved) == "it is no zip archive"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": None}, "its checksum is wrong: the file is damaged"),
        ({"weights": array_bytes(np.ones(3))}, "its checksum is wrong: the file is damaged"),
        ({"extra": array_bytes(np.ones(2))}, "its checksum is wrong: the file is damaged"),
        ({"metadata": None}, "it lacks ['metadata']"),
        ({"format": None}, "it lacks ['format']"),
        ({"sha256": None}, "it lacks ['sha256']"),
        ({"format": array_bytes(np.asarray(1))}, "it has format 1; this version reads format 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_list_of_members_is_refused(saved, changes, reason):
    rewrite(saved, **changes)
    assert refusal(saved) == reason


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_bomb_is_refused(saved, compression):
    rewrite(saved, compression, weights=array_bytes(np.zeros(2**25, np.uint8)))
    assert saved.stat().st_size < 2**18
    assert refusal(saved) == "it is compressed"


def test_members_that_share_their_bytes_are_refused(path):
    """A bomb without compression: many entries of the directory, one block of data."""
    save(path, {f"a{number}": np.zeros(99) for number in range(9)}, {})
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\1\2")
    while place >= 0:
        struct.pack_into("<II", data, place + 20, 7_000, 7_000)
        place = data.find(b"PK\1\2", place + 4)
    path.write_bytes(data)
    assert refusal(path) == "its members overlap"


@pytest.mark.parametrize("data", [b"", b"\0" * 99, b"some text\n" * 99, array_bytes(np.zeros(9))])
def test_other_files_are_refused(path, data):
    path.write_bytes(data)
    assert refusal(path) == "it is no zip archive"


def test_archives_of_numpy_and_files_beyond_the_cap_are_refused(path):
    np.savez(path, **ARRAYS)
    assert "lacks" in str(refusal(path))
    with path.open("wb") as file:
        file.truncate(2**40)
    assert refusal(path) == f"it has {2**40} bytes, over {2**30}"


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    os.mkfifo(tmp_path / "fifo")
    for path in [tmp_path / "a", tmp_path / "fifo", tmp_path, "/dev/zero", "", "a\0b"]:
        with pytest.raises(LoadError, match="cannot load"):
            load(path)


# A run's checkpoint

RUN = Checkpoint(Path(), {"trainer": "search", "key": [0, 7]})


def begin(checkpoint, count=9, **options):
    return checkpoint.begin(ARRAYS, ("num_steps", count), **options)


def test_a_run_goes_on_from_what_it_saved_and_from_nothing_else(path):
    run = RUN._replace(path=path)
    assert begin(run) is None
    run.save(ARRAYS, {"next": 7})
    found = begin(run)
    assert found is not None
    assert_same(found[:2], (ARRAYS, {**RUN.metadata, "next": 7}))
    assert begin(run, 2, origin=5) is not None
    with pytest.raises(ValueError, match=r"must be at least 7, which checkpoint .* holds; got 6"):
        begin(run, 6)
    with pytest.raises(ValueError, match="of another run: key is another"):
        begin(run._replace(metadata={**RUN.metadata, "key": [0, 8]}))
    with pytest.raises(FileNotFoundError):
        begin(run._replace(path=path.parent / "no" / "run.npz"))


def test_a_history_is_saved_beside_the_state_and_first(path, monkeypatch):
    run, names = RUN._replace(path=path), []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(b.name), replace(a, b)))
    run.save(ARRAYS, {"next": 7, "record_every": 2}, lambda: {"loss": np.ones(3)})
    assert names == ["run.history.npz", "run.npz"]
    found = begin(run, has_history=True)
    assert found is not None
    assert found.history is not None
    assert found.history["loss"].tolist() == [1, 1, 1]


def test_a_history_that_is_missing_or_damaged_is_told_and_the_state_goes_on(path):
    run = RUN._replace(path=path)
    run.save(ARRAYS, {"next": 7, "record_every": 2}, lambda: {"loss": np.ones(3)})
    run.history_path.write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match="the run goes on without its history: cannot load"):
        found = begin(run, has_history=True)
    assert found is not None
    assert found.history is None
    run.history_path.unlink()
    with pytest.warns(RuntimeWarning, match="without its history"):
        begin(run, has_history=True)


def test_what_cannot_be_saved_is_a_warning_and_keeps_the_last_checkpoint(path, monkeypatch):
    run = RUN._replace(path=path)
    run.save(ARRAYS, {"next": 7})
    monkeypatch.setattr(os, "replace", no_space)
    with pytest.warns(RuntimeWarning, match="checkpoint not saved: .*No space left"):
        run.save({}, {"next": 8})
    assert_same(load(path), (ARRAYS, {**RUN.metadata, "next": 7}))
