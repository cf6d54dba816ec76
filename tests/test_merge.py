"""One search however it is cut: by runs that merge, by devices, by processes, by a kill."""

import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import search_setups
from programs import start_program
from search_setups import digest, set_up, whole

import jaxnn
from jaxnn.run import checkpoint as checkpoints
from jaxnn.search import engine as searching

ALL = range(200)


def run_parts(number, folder, cuts, **more):
    """Saves a set-up cut into runs; returns the checkpoints."""
    given, options = set_up(number)
    start, stop = options["start"], options["start"] + options["num_candidates"]
    edges = [start, *(start + cut for cut in cuts), stop]
    paths = [Path(folder) / f"{i}.npz" for i in range(len(edges) - 1)]
    for path, first, last in zip(paths, edges[:-1], edges[1:], strict=True):
        part = {**options, "start": first, "num_candidates": last - first}
        jaxnn.random_search(*given, **{**part, **more}, checkpoint=path)
    return paths


def output_of(program, timeout):
    out, err = program.communicate(timeout=timeout)
    assert program.returncode == 0, err
    return out


def two_processes(numbers, timeout):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    numbers = [str(number) for number in numbers]
    both = [start_program("-m", "search_setups", i, *numbers, PORT=port) for i in "01"]
    return [
        [line.split() for line in output_of(program, timeout).splitlines() if line[0].isdigit()]
        for program in both
    ]


class TestMerging:
    @pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
    def test_parts_in_any_order_are_the_whole(self, number, tmp_path):
        given, options = set_up(number)
        third = options["num_candidates"] // 3
        first, second, last = run_parts(number, tmp_path, [third, 2 * third + 1])
        merged = jaxnn.merge_searches([last, first, second], given[2])
        assert digest(merged) == whole(number)

    def test_a_gap_is_left_out(self, tmp_path):
        given, options = set_up(0)
        first, middle, last = run_parts(0, tmp_path, [1_000, 1_500], num_candidates=400)
        assert Path(middle).exists()
        merged = jaxnn.merge_searches([last, first], given[2])
        alone = [
            jaxnn.random_search(
                *given, **{**options, "start": options["start"] + begin, "num_candidates": 400}
            )
            for begin in (0, 1_500)
        ]
        assert merged.num_evaluations == 800
        assert merged.loss == min(part.loss for part in alone)
        counts = np.sum([part.counts.count for part in alone], axis=0)
        assert merged.counts.count.tolist() == counts.tolist()
        second = merged.history.index >= options["start"] + 1_500
        expected = merged.history.index - options["start"] + 1 - 1_100 * second
        np.testing.assert_array_equal(merged.history.evaluations, expected)

    def test_an_unfinished_part_makes_the_whole_unfinished(self, tmp_path):
        def stop(_):
            raise StopIteration

        given, options = set_up(0)
        half = options["num_candidates"] // 2
        first, last = run_parts(0, tmp_path, [half])
        searching_on = {**options, "num_candidates": options["num_candidates"] - half}
        searching_on["start"] += half
        last.unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(searching, "LARGEST_CHUNK", 1)
            part = jaxnn.random_search(*given, **searching_on, checkpoint=last, callback=stop)
        merged = jaxnn.merge_searches([first, last], given[2])
        assert part.num_evaluations < searching_on["num_candidates"]
        assert merged.status == part.status == "stopped"
        assert merged.num_evaluations == half + part.num_evaluations

    @pytest.mark.exhaustive
    def test_one_file_is_its_own_result(self, tmp_path):
        given, _ = set_up(4)
        (path,) = run_parts(4, tmp_path, [])
        assert digest(jaxnn.merge_searches([path], given[2])) == whole(4)

    @pytest.mark.exhaustive
    def test_overlaps_and_other_searches_are_refused_by_name(self, tmp_path):
        given, options = set_up(0)
        first, last = run_parts(0, tmp_path, [500])
        start = options["start"]
        refused = {
            f"must not overlap; got .*0.npz up to index {start + 499} and .*0.npz from {start}": [
                first,
                first,
            ],
            r"other.npz was made with top_k=6; this run has 5": [first, tmp_path / "other.npz"],
            r"key.npz was made with key=": [last, tmp_path / "key.npz"],
        }
        other = {**options, "start": 10_000, "num_candidates": 10}
        jaxnn.random_search(*given, **{**other, "top_k": 6}, checkpoint=tmp_path / "other.npz")
        key = jax.random.key(99)
        jaxnn.random_search(key, *given[1:], **other, checkpoint=tmp_path / "key.npz")
        for message, paths in refused.items():
            with pytest.raises(ValueError, match=message):
                jaxnn.merge_searches(paths, given[2])
        with pytest.raises(ValueError, match=r"0.npz was made with sample_fn="):
            jaxnn.merge_searches([first], NETWORK.sampler(scale=0.123))

    def test_missing_files_none_and_other_files_are_refused(self, tmp_path):
        sample_fn = NETWORK.sampler()
        with pytest.raises(FileNotFoundError, match="nowhere"):
            jaxnn.merge_searches([tmp_path / "nowhere.npz"], sample_fn)
        with pytest.raises(ValueError, match="paths must name at least one"):
            jaxnn.merge_searches([], sample_fn)
        (tmp_path / "text.npz").write_text("no checkpoint")
        with pytest.raises(ValueError, match=r"cannot load .*text.npz"):
            jaxnn.merge_searches([tmp_path / "text.npz"], sample_fn)


NETWORK = search_setups.NETWORKS[0]


@pytest.mark.exhaustive
def test_two_processes_find_what_one_finds():
    for lines in two_processes([0], timeout=120):
        assert lines == [["0", whole(0), whole(0)]]


@pytest.mark.exhaustive
def test_200_searches_whole_and_resumed_on_two_processes():
    expected = [[str(number), whole(number), whole(number)] for number in ALL]
    for lines in two_processes(ALL, timeout=1_800):
        assert lines == expected


@pytest.mark.exhaustive
@pytest.mark.parametrize("devices", [1, 8])
def test_200_searches_in_chunks_of_five_sizes_whole_and_resumed(devices, tmp_path):
    program = f"""
import sys, jax, jaxnn, search_setups as here
assert len(jax.local_devices()) == {devices}
for number in range(200):
    digests = set()
    for tiles in (1, 2, 3, 7, 10**9):
        tile = 2**10
        here.searching.LARGEST_CHUNK = tiles * tile
        digests |= {{here.whole(number), here.resumed(number, "{tmp_path}/" )}}
        (here.Path("{tmp_path}") / f"{{number}}.npz").unlink()
    print(number, *digests)
"""
    expected = [f"{number} {whole(number)}" for number in ALL]
    environment = {"JAX_NUM_CPU_DEVICES": str(devices)}
    ran = output_of(start_program("-c", program, **environment), timeout=3_000)
    assert ran.splitlines() == expected


@pytest.mark.exhaustive
def test_killed_at_50_moments_and_resumed(tmp_path):
    """SIGKILL at random moments of a search that saves all the time."""
    program = f"""
import jaxnn, search_setups as here
from jaxnn.run import checkpoint as checkpoints, loop
from jaxnn.search import engine as searching
searching.LARGEST_CHUNK, loop.SECONDS_BETWEEN_SAVES = 1, 0.0
given, options = here.set_up(1)
options["num_candidates"] = 3_000_000
print("ready", flush=True)
jaxnn.random_search(*given, **options, checkpoint="{tmp_path}/search.npz")
"""
    path, rng = tmp_path / "search.npz", np.random.default_rng(0)
    given, options = set_up(1)
    reached = []
    for _ in range(50):
        running = start_program("-c", program)
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 4.0))
        running.send_signal(signal.SIGKILL)
        running.communicate()
        reached.append(0)
        if path.exists():
            reached[-1] = checkpoints.load(path)[1]["next"] - options["start"]
    assert reached == sorted(reached)
    assert len(set(reached)) > 20
    count = reached[-1] + 500
    more = {**options, "num_candidates": count}
    assert digest(jaxnn.random_search(*given, **more, checkpoint=path)) == whole(
        1, num_candidates=count
    )
