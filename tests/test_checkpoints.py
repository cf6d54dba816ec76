"""Checkpoints: whole or absent after any fault, and refused, never believed, when damaged."""

import base64
import errno
import io
import json
import math
import os
import pickle
import resource
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxnn.run import checkpoint as checkpoints
from jaxnn.run import fingerprint
from jaxnn.run.checkpoint import (
    MAX_TEXT,
    LoadError,
    check_writable,
    load,
    save,
)

NUMBERS = [f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)]
NUMBERS.remove("float8")
SHAPES = [(), (0,), (1,), (3,), (2, 3), (0, 3), (3, 0, 2), (1,) * 20, (257, 129)]
SECONDS = 1.0
"""Most that a load may take of this thread's time, however bad the file."""

ARRAYS = {
    "weights": np.arange(6, dtype=np.float32).reshape(2, 3),
    "index": np.asarray(2**63 - 1),
    "is_done": np.zeros((0, 2), bool),
}
FACTS = {"trainer": "random_search", "next": 2**63, "scale": 0.05, "sizes": [2, 3, {"a": None}]}


def assert_same(got, wanted):
    (got_arrays, got_facts), (arrays, facts) = got, wanted
    assert got_facts == facts
    assert list(got_arrays) == list(arrays)
    for name, array in arrays.items():
        found = got_arrays[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.npz"


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def refusal(path):
    """The reason that `load` gives for not taking a file, in little time and memory; else None."""
    tracemalloc.reset_peak()
    before, started, refused = tracemalloc.get_traced_memory()[0], time.thread_time(), None
    try:
        load(path)
    except LoadError as error:
        refused = error
    assert time.thread_time() - started < SECONDS
    assert tracemalloc.get_traced_memory()[1] - before < 2 * path.stat().st_size + 2**23
    if refused is None:
        return None
    assert refused.__cause__ is not None
    assert str(refused).startswith(f"cannot load {path}: ")
    return str(refused).removeprefix(f"cannot load {path}: ")


# Round trips


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dtype_and_shape_comes_back(path, shape):
    rng = np.random.default_rng(0)
    count = math.prod(shape)
    arrays = {
        dtype: np.frombuffer(rng.bytes(count * np.dtype(dtype).itemsize), dtype).reshape(shape)
        for dtype in NUMBERS
    }
    arrays["bool"] = rng.integers(2, size=shape) == 1
    save(path, arrays, {})
    assert_same(load(path), (arrays, {}))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", fullmatch=True).filter(
    lambda name: name not in {"facts", "format", "sha256"}
)
any_array = hnp.arrays(
    st.sampled_from(["bool", *NUMBERS]), hnp.array_shapes(min_dims=0, min_side=0)
)


@given(
    arrays=st.dictionaries(names, any_array, max_size=4),
    facts=st.dictionaries(st.text(), json_values, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_saved_comes_back(arrays, facts):
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/run.npz", arrays, facts)
        assert_same(load(f"{folder}/run.npz"), (arrays, facts))
        assert os.listdir(folder) == ["run.npz"]


@pytest.mark.usefixtures("traced")
def test_a_large_array_comes_back_in_memory_of_its_own_size(path):
    arrays = {"losses": np.random.default_rng(0).normal(size=2**21)}
    save(path, arrays, FACTS)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    loaded = load(path)
    assert tracemalloc.get_traced_memory()[1] - before < 1.2 * path.stat().st_size
    assert_same(loaded, (arrays, FACTS))


def test_layouts_of_memory_do_not_matter(path):
    array = np.arange(24.0).reshape(4, 6)
    arrays = {"fortran": np.asfortranarray(array), "strided": array[::2, ::-3], "jax": jnp.ones(3)}
    arrays["fixed"] = np.broadcast_to(np.float32(1), (2, 2))
    save(path, arrays, {})
    assert_same(load(path), ({name: np.asarray(array) for name, array in arrays.items()}, {}))


def test_loaded_arrays_can_be_written_to(path):
    save(path, ARRAYS, FACTS)
    arrays, _ = load(path)
    arrays["weights"][0, 0] = 7


def test_paths_may_be_text_or_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("run", ARRAYS, FACTS)
    assert_same(load(Path("run")), (ARRAYS, FACTS))


def test_numpy_opens_a_checkpoint(path):
    save(path, ARRAYS, FACTS)
    with np.load(path) as file:
        assert set(file) == {*ARRAYS, "facts", "format", "sha256"}
        assert json.loads(file["facts"].tobytes()) == FACTS
        assert file["format"] == 1
        np.testing.assert_array_equal(file["weights"], ARRAYS["weights"])


def test_the_same_content_is_the_same_file(path, tmp_path):
    save(path, ARRAYS, FACTS)
    save(tmp_path / "again.npz", ARRAYS, FACTS)
    assert path.read_bytes() == (tmp_path / "again.npz").read_bytes()


def test_a_checkpoint_has_the_permissions_of_any_new_file(path, tmp_path):
    save(path, ARRAYS, FACTS)
    (tmp_path / "other").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_file_of_format_1_still_loads(path):
    path.write_bytes(zlib.decompress(base64.b85decode(FORMAT_1)))
    assert_same(load(path), (ARRAYS, FACTS))


# What is refused before anything is written


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, ">f4"),
        np.zeros(2, complex),
        np.zeros(2, object),
        np.zeros(2, "U3"),
        np.zeros(2, "M8[s]"),
        np.zeros(2, "f4,i4"),
        np.zeros(2, jnp.bfloat16),
        np.zeros(2, np.longdouble),
    ],
    ids=lambda array: str(array.dtype),
)
def test_other_dtypes_are_refused(path, array):
    with pytest.raises(TypeError, match=r"arrays\['odd'\] must be .* got dtype"):
        save(path, {"odd": array}, {})
    assert not path.exists()


@pytest.mark.parametrize(
    "name",
    ["", "../a", "a/b", "a b", ".a", "-a", "a" * 101, "ä", "a\n", "facts", "format", "sha256"],
)
def test_odd_names_are_refused(path, name):
    with pytest.raises(ValueError, match="arrays must have names of"):
        save(path, {name: np.zeros(2)}, {})
    assert not path.exists()


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ({"sizes": (2, 3)}, TypeError),
        ({"nested": {1: 2}}, TypeError),
        ({"array": np.zeros(2)}, TypeError),
        ({"scale": np.float32(1)}, TypeError),
        ({"loss": math.nan}, ValueError),
        ({"loss": math.inf}, ValueError),
        ({"long": "x" * MAX_TEXT}, ValueError),
    ],
    ids=str,
)
def test_facts_that_json_would_change_are_refused(path, facts, error):
    with pytest.raises(error):
        save(path, {}, facts)
    assert not path.exists()


def test_what_load_would_find_too_large_is_refused(path, monkeypatch):
    with pytest.raises(ValueError, match="at most"):
        save(path, {f"{number:0100}": np.zeros(0) for number in range(2_000)}, {})
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 20_000)
    with pytest.raises(ValueError, match=r"at most .* and 20000 bytes in all"):
        save(path, {"a": np.zeros(12_000, np.uint8)}, {})
    assert not path.exists()
    save(path, {"a": np.zeros(11_900, np.uint8)}, {})
    load(path)


@pytest.mark.parametrize("format_of_name", ["{:x}", "{:0100}"])
def test_the_most_that_save_takes_loads_in_time(path, format_of_name):
    facts = {"long": "x" * (MAX_TEXT - 12)}
    assert len(json.dumps(facts)) == MAX_TEXT
    own = ("facts", "format", "sha256")
    left, arrays = MAX_TEXT - sum(50 + len(name) for name in own), {}
    while left > 300:
        name = format_of_name.format(len(arrays))
        arrays[name], left = np.zeros(()), left - 50 - len(name)
    for letter, size in (("y", left // 2), ("z", left - left // 2)):
        arrays[letter * (size - 50)] = np.zeros(())
    save(path, arrays, facts)
    started = time.thread_time()
    assert_same(load(path), (arrays, facts))
    assert time.thread_time() - started < SECONDS
    with pytest.raises(ValueError, match="at most"):
        save(path, {**arrays, "y": np.zeros(())}, facts)


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
    arrays, facts = load(path)
    assert generation <= facts["generation"], "a checkpoint was lost"
    generation = facts["generation"]
    assert arrays["a"].shape == (facts["size"],) and arrays["b"].shape == (2, facts["size"])
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(4))
def test_many_kills_leave_a_whole_checkpoint(path, seed):
    saves, num_kills = kill(path, kills=50, seed=seed + 1)
    assert saves > 0
    assert num_kills >= 50


def no_space(*args, **kwargs):
    del args, kwargs
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_while_writing(monkeypatch):
    def write_some(file, array, **options):
        del array, options
        file.write(b"some")
        no_space()

    monkeypatch.setattr(checkpoints.npy, "write_array", write_some)


FAULTS = {
    "opening": lambda patch: patch.setattr(Path, "open", no_space),
    "writing": fail_while_writing,
    "closing the zip": lambda patch: patch.setattr(zipfile.ZipFile, "_write_end_record", no_space),
    "syncing": lambda patch: patch.setattr(os, "fsync", no_space),
    "renaming": lambda patch: patch.setattr(os, "replace", no_space),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_leaves_the_last_checkpoint_and_no_other_file(path, monkeypatch, fault):
    save(path, ARRAYS, FACTS)
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        with pytest.raises(OSError, match="No space left") as held:
            save(path, {"weights": np.zeros(9)}, {})
    assert (held.value.errno, held.value.filename) == (errno.ENOSPC, str(path))
    assert str(path) in str(held.value)
    assert os.listdir(path.parent) == ["run.npz"]
    assert_same(load(path), (ARRAYS, FACTS))


def test_a_file_that_outgrows_its_limit_leaves_the_last_checkpoint(path):
    """As on a full disk, the kernel itself stops the write."""
    save(path, ARRAYS, FACTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(OSError, match="File too large") as held:
            save(path, {"losses": np.zeros(MAX_TEXT)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert held.value.filename == str(path)
    assert os.listdir(path.parent) == ["run.npz"]
    assert_same(load(path), (ARRAYS, FACTS))


def test_a_directory_that_cannot_be_synced_is_an_error_with_the_new_file_whole(path, monkeypatch):
    save(path, {}, {})
    fsync, calls = os.fsync, []

    def fail_on_directory(descriptor):
        calls.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor) if not calls[-1] else no_space()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_on_directory)
        with pytest.raises(OSError, match="No space left"):
            save(path, ARRAYS, FACTS)
    assert calls == [False, True]
    assert os.listdir(path.parent) == ["run.npz"]
    assert_same(load(path), (ARRAYS, FACTS))


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
        save(path, ARRAYS, FACTS)
    assert events == ["file", "rename", "directory"]


def test_an_interrupt_leaves_no_other_file(path, monkeypatch):
    save(path, ARRAYS, FACTS)

    def interrupt(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(path, {}, {})
    assert os.listdir(path.parent) == ["run.npz"]
    assert_same(load(path), (ARRAYS, FACTS))


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
            arrays, facts = load(path)
            if arrays["a"].tolist() != [facts["value"]] * facts["size"]:
                failures.append(facts)

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


@pytest.mark.parametrize("function", [check_writable, lambda path: save(path, ARRAYS, FACTS)])
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


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_directory_that_takes_no_file_is_found_before_the_work(path, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number), args[0])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(OSError, match=os.strerror(number)) as held:
            check_writable(path)
    assert (held.value.errno, held.value.filename) == (number, str(path))


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
    save(path, ARRAYS, FACTS)
    before = path.stat()
    check_writable(path)
    assert os.listdir(path.parent) == ["run.npz"]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# Files that are damaged


def test_a_missing_file_is_missing(path):
    with pytest.raises(FileNotFoundError, match=str(path)):
        load(path)
    path.symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        load(path)


@pytest.mark.usefixtures("traced")
def test_no_part_of_a_file_loads(path):
    save(path, ARRAYS, FACTS)
    whole = path.read_bytes()
    cuts = {len(whole) * part // 16 for part in range(16)} | set(range(len(whole) - 99, len(whole)))
    for size in cuts:
        path.write_bytes(whole[:size])
        assert refusal(path)
        path.write_bytes(whole[size or 1 :])
        assert refusal(path)


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


def assert_refused_or_same(path, data):
    path.write_bytes(data)
    if refusal(path) is None:
        assert_same_up_to_order(load(path))


def assert_same_up_to_order(loaded):
    arrays, facts = loaded
    assert_same(({name: arrays[name] for name in ARRAYS}, facts), (ARRAYS, FACTS))
    assert len(arrays) == len(ARRAYS)


def fuzz(path, seed, count):
    save(path, ARRAYS, FACTS)
    whole, rng = path.read_bytes(), np.random.default_rng(seed)
    for _ in range(count):
        data = mutate(rng, whole)
        while rng.integers(4) == 0:
            data = mutate(rng, data)
        assert_refused_or_same(path, data)


@pytest.mark.usefixtures("traced")
def test_damaged_files_are_refused_or_the_same(path):
    fuzz(path, seed=0, count=400)


@pytest.mark.usefixtures("traced")
def test_one_flipped_bit_in_each_region_is_refused_or_the_same(path):
    save(path, ARRAYS, FACTS)
    whole = path.read_bytes()
    for place in range(0, len(whole), 11):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        assert_refused_or_same(path, bytes(data))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("traced")
def test_ten_thousand_damaged_files_are_refused_or_the_same(path):
    fuzz(path, seed=1, count=10_000)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("traced")
def test_every_flipped_bit_is_refused_or_the_same(path):
    save(path, ARRAYS, FACTS)
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        assert_refused_or_same(path, bytes(data))


# Files made to do harm


def npy_bytes(header, data=b"", version=(1, 0)):
    """An npy file with any header, true or not."""
    text = header if isinstance(header, bytes) else str(header).encode()
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text) + 1)
    return b"\x93NUMPY" + bytes(version) + length + text + b"\n" + data


def array_bytes(array, allow_pickle=False):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    """A zip of (name, bytes) pairs."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


def sealed(arrays):
    """Arrays by name with a checksum that is right: what a clever forger would write."""
    return {**arrays, "sha256": np.frombuffer(fingerprint.checksum(sorted(arrays.items())), "u1")}


def header(**changes):
    return {"descr": "<f4", "fortran_order": False, "shape": (3,), **changes}


class Harmful:
    """Leaves a mark when unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


MEMBERS = {
    "object dtype": npy_bytes(header(descr="|O", shape=(1,)), bytes(8)),
    "big-endian": npy_bytes(header(descr=">f4"), bytes(12)),
    "complex": npy_bytes(header(descr="<c8"), bytes(24)),
    "text": npy_bytes(header(descr="<U1"), bytes(12)),
    "void": npy_bytes(header(descr="|V4"), bytes(12)),
    "void of huge items": npy_bytes(header(descr="|V2000000000", shape=(0,))),
    "structured": npy_bytes(header(descr=[("a", "<f4")]), bytes(12)),
    "subarray": npy_bytes(header(descr=("<f4", (999_999_999,)), shape=(0,))),
    "unknown dtype": npy_bytes(header(descr="nonsense"), bytes(12)),
    "no dtype": npy_bytes(header(descr=None), bytes(24)),
    "Fortran order": npy_bytes(header(fortran_order=True, shape=(2, 2)), bytes(16)),
    "four terabytes": npy_bytes(header(shape=(10**12,)), bytes(12)),
    "a size that wraps": npy_bytes(header(shape=(2**32, 2**32)), bytes(12)),
    "a size that wraps to true": npy_bytes(header(shape=(2**62 + 3,)), bytes(12)),
    "negative shape": npy_bytes(header(shape=(-1, -3)), bytes(12)),
    "shape of bools": npy_bytes(header(shape=(True, 3)), bytes(12)),
    "shape of floats": npy_bytes(header(shape=(3.0,)), bytes(12)),
    "no tuple as shape": npy_bytes(header(shape=3), bytes(12)),
    "100 axes": npy_bytes(header(shape=(1,) * 100), bytes(4)),
    "huge empty": npy_bytes(header(shape=(0, 2**70))),
    "too few bytes": npy_bytes(header(shape=(4,)), bytes(12)),
    "too many bytes": npy_bytes(header(shape=(2,)), bytes(12)),
    "extra key": npy_bytes(header(more=1), bytes(12)),
    "code as header": npy_bytes(b"__import__('os').mkdir('harm')"),
    "deep header": npy_bytes(b"(" * 900),
    "deeper header": npy_bytes(b"-" * 60_000),
    "header of minus signs": npy_bytes(b"-" * 900 + b"1"),
    "long header": npy_bytes(f"{header()}{' ' * 60_000}", bytes(12)),
    "header that is not there": b"\x93NUMPY\x01\x00\xff\xff",
    "header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    "npy 2.0": npy_bytes(header(), bytes(12), version=(2, 0)),
    "npy 3.0": npy_bytes(header(), bytes(12), version=(3, 0)),
    "npy 9.0": npy_bytes(header(), bytes(12), version=(9, 0)),
    "Python 2 header": npy_bytes(str(header()).replace("3,", "3L,"), bytes(12)),
    "pickle": pickle.dumps([1, 2, 3]),
    "nothing": b"",
    "other array": array_bytes(np.ones(3, np.float32)),
}


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.usefixtures("traced")
def test_a_bad_member_is_refused(path, member):
    save(path, ARRAYS, FACTS)
    members = members_of(path)
    for name in members:
        write_zip(path, {**members, name: MEMBERS[member]}.items())
        assert refusal(path)
        assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("object dtype", "weights.npy has dtype object"),
        ("big-endian", "weights.npy has dtype >f4"),
        ("npy 2.0", "weights.npy has another npy version than 1.0"),
        ("four terabytes", "weights.npy has shape (1000000000000,) in its header, but 12 bytes"),
        ("negative shape", "weights.npy has shape (-1, -3) in its header, but 12 bytes"),
        ("other array", "its checksum is wrong: the file is damaged"),
    ],
)
@pytest.mark.usefixtures("traced")
def test_a_refusal_says_what_is_wrong(path, member, reason):
    save(path, ARRAYS, FACTS)
    write_zip(path, {**members_of(path), "weights.npy": MEMBERS[member]}.items())
    assert refusal(path) == reason


@pytest.mark.usefixtures("traced")
def test_no_pickle_is_opened(path, tmp_path):
    mark = tmp_path / "harm"
    pickled = array_bytes(np.asarray([Harmful(mark)], object), allow_pickle=True)
    save(path, ARRAYS, FACTS)
    write_zip(path, {**members_of(path), "weights.npy": pickled}.items())
    assert "dtype object" in str(refusal(path))
    path.write_bytes(pickle.dumps(Harmful(mark)))
    assert refusal(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda members: [*members, members[0]], "two members of one name"),
        (lambda members: [*members, ("facts.npy", b"")], "two members of one name"),
        (lambda members: members[1:], "checksum"),
        (lambda members: [*members, ("extra.npy", array_bytes(np.ones(2)))], "checksum"),
        (lambda members: [m for m in members if m[0] != "facts.npy"], "lacks .*facts"),
        (lambda members: [m for m in members if m[0] != "format.npy"], "lacks .*format"),
        (lambda members: [m for m in members if m[0] != "sha256.npy"], "lacks .*sha256"),
        (lambda members: [], "no plain zip"),
        (lambda members: [*members, ("../harm.npy", members[0][1])], "odd names"),
        (lambda members: [*members, ("/harm.npy", members[0][1])], "odd names"),
        (lambda members: [*members, ("a/b.npy", members[0][1])], "odd names"),
        (lambda members: [*members, ("harm.exe", members[0][1])], "odd names"),
        (lambda members: [*members, (".npy", members[0][1])], "odd names"),
        (lambda members: [*members, ("a" * 60_000 + ".npy", b"")], "odd names"),
        (lambda members: [*members, ("ä.npy", members[0][1])], "odd names"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.usefixtures("traced")
def test_another_list_of_members_is_refused(path, edit, reason):
    save(path, ARRAYS, FACTS)
    write_zip(path, edit(list(members_of(path).items())))
    with pytest.raises(LoadError, match=reason):
        load(path)
    assert refusal(path)


def test_the_order_of_members_and_their_dates_do_not_matter(path):
    save(path, ARRAYS, FACTS)
    write_zip(path, reversed(members_of(path).items()))
    assert_same_up_to_order(load(path))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.usefixtures("traced")
def test_a_zip_bomb_is_refused(path, compression):
    save(path, ARRAYS, FACTS)
    bomb = array_bytes(np.zeros(2**25, np.uint8))
    write_zip(path, {**members_of(path), "weights.npy": bomb}.items(), compression)
    assert path.stat().st_size < 2**18
    assert refusal(path) == "it is compressed"


@pytest.mark.usefixtures("traced")
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


@pytest.mark.usefixtures("traced")
def test_sizes_beyond_the_file_are_refused(path):
    save(path, ARRAYS, FACTS)
    data = bytearray(path.read_bytes())
    struct.pack_into("<II", data, data.find(b"PK\1\2") + 20, 2**32 - 2, 2**32 - 2)
    path.write_bytes(data)
    assert refusal(path) == "its members overlap"


@pytest.mark.usefixtures("traced")
def test_a_zip_with_a_million_members_is_refused_unread(path):
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", *[0] * 18) + b"a"
    entry = entry[:28] + b"\1\0" + entry[30:]
    count = 300_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(entry) * count, 0, 0)
    path.write_bytes(entry * count + end)
    assert refusal(path) == "its zip directory is too large"
    end64 = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entry) * count, 0
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(entry) * count, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0)
    path.write_bytes(entry * count + end64 + locator + end)
    assert refusal(path) == "it is no plain zip archive"
    path.write_bytes(entry * count + end[:-2] + b"\4\0more")
    assert refusal(path) == "it is no plain zip archive"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "[" * 9_999,
        '{"a": ' * 9_999,
        "[]",
        "1",
        '"text"',
        '{"a": NaN',
        '{"a": 1} 2',
        "9" * 9_999,
        "\xff",
        '{"a": ' + "9" * 9_999 + "}",
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.usefixtures("traced")
def test_facts_that_are_no_object_are_refused_though_sealed(path, text):
    members = {"facts": np.frombuffer(text.encode("latin-1"), np.uint8), "format": np.asarray(1)}
    checkpoints._write(path, sealed(members))
    assert refusal(path)


@pytest.mark.usefixtures("traced")
def test_long_facts_are_refused_unread_though_sealed(path):
    text = b'{"a": [' + b"{}," * 2**20 + b"1]}"
    members = {"facts": np.frombuffer(text, np.uint8), "format": np.asarray(1)}
    checkpoints._write(path, sealed(members))
    assert refusal(path) == "its facts are too long"
    save(path, {}, {"a": [{}] * (MAX_TEXT // 4 - 2)})
    assert refusal(path) is None


def test_a_newer_format_is_refused_by_its_number(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 2)
        save(path, ARRAYS, FACTS)
        load(path)
    with pytest.raises(LoadError, match="it has format 2; this version reads format 1"):
        load(path)


@pytest.mark.parametrize("data", [b"", b"\0" * 99, b"some text\n" * 99, b"PK\5\6" + bytes(18)])
@pytest.mark.usefixtures("traced")
def test_other_files_are_refused(path, data):
    path.write_bytes(data)
    assert refusal(path) == "it is no plain zip archive"


@pytest.mark.usefixtures("traced")
def test_files_that_numpy_makes_are_refused(path):
    path.write_bytes(array_bytes(np.zeros(99)))
    assert refusal(path) == "it is no plain zip archive"
    np.savez(path, **ARRAYS)
    assert "lacks" in str(refusal(path))
    np.savez_compressed(path, **ARRAYS)
    assert refusal(path)


@pytest.mark.usefixtures("traced")
def test_a_file_beyond_the_cap_is_refused_unread(path):
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


def test_a_link_to_a_checkpoint_loads(path, tmp_path):
    save(path, ARRAYS, FACTS)
    (tmp_path / "link").symlink_to(path)
    assert_same(load(tmp_path / "link"), (ARRAYS, FACTS))


FORMAT_1 = (
    "c-jl_W@Zs#fB;1X|CbC}Gk`1*<_6;O)XemZl48BQg38H$p}ql;j0|NA)#@p!#mPnLRtoAiX(sAA3hHV3MI}XvdGYy0"
    "DXAcFx5S*{RG@fqMq)uKkgs8+qhPG5qfo0rHsFFdvB4flH~<k4HvsVhhX520<Qu&{-vMNSFeeaa=B1=o;C6nd1yRnY"
    "%;{j~|A&BjROd1qvzIi0yaf&K%;NZz{Jd104z5WuB+9`CItoS<hBvB1XBE{bJp;0yLBlmIF&R&?s3|4RnT7^NIutsy"
    "S_x=HW?pKMl9hrI(6W^L-1y?u#G>R3B^?E&ywr*kpoFE7k+HG4k%6(9g{g_Txv7PL1yHg$IWZ>{C~Kf+U<%@9R;3mL"
    "xzV7+s-sY?lnCVHmFDEs#@3<+#*&TmSHTh)C|v^mnVVQL7*ZJ{)Qza_?Xj3Cxd6yo0Cg|WMk7-*iet~1(#TWb`tgP5"
    "+n3az??v}LDEofOTcPmTrH4)q69hkq@=ltO!E77g&B!FejJte-fd;V0kxDCcjp*e9LgPW?QUYBYdj3RcD_}&)t>_xj"
    "^9w?wBok8ZLDz<!vJl$Tn32;Nx<2$6M(Df7j2zzq-mGjOaW)_f0Qz7a3y22*Wt>7p"
)
