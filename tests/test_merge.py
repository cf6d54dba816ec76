"""One search however it is cut: by runs that merge, by devices, by processes, by a kill."""

import socket
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import end_at_random_moments, start_program
from scipy import stats
from search_setups import NETWORKS, digest, resumed, set_up, stop_after, whole

import jaxnn
from jaxnn.search import engine

ALL = range(200)


def run_parts(number, folder, cuts, **more):
    """Saves a set-up cut into runs; returns the checkpoints."""
    given, options = set_up(number)
    start, paths = options["start"], []
    for first, last in pairwise([0, *cuts, options["num_candidates"]]):
        part = {**options, "start": start + first, "num_candidates": last - first, **more}
        paths.append(Path(folder) / f"{first}.npz")
        jaxnn.random_search(*given, **part, checkpoint=paths[-1])
    return paths


def output_of(program, timeout):
    out, err = program.communicate(timeout=timeout)
    assert program.returncode == 0, err
    return [line.split() for line in out.splitlines() if line[0].isdigit()]


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_parts_in_any_order_are_the_whole(number, tmp_path):
    given, options = set_up(number)
    third = options["num_candidates"] // 3
    first, second, last = run_parts(number, tmp_path, [third, 2 * third + 1])
    assert digest(jaxnn.merge_searches([last, first, second], given[2])) == whole(number)
    assert jaxnn.merge_searches(first, given[2]).num_evaluations == third


def test_a_gap_is_left_out(tmp_path):
    given, options = set_up(0)
    first, _, last = run_parts(0, tmp_path, [1_000, 1_500], num_candidates=400)
    merged = jaxnn.merge_searches([last, first], given[2])
    options |= {"num_candidates": 400}
    options["start"], start = options["start"] + 1_500, options["start"]
    alone = [jaxnn.random_search(*given, **{**options, "start": start + i}) for i in (0, 1_500)]
    assert merged.num_evaluations == 800
    assert merged.loss == min(part.loss for part in alone)
    counts = np.sum([part.counts.num_below for part in alone], axis=0)
    assert merged.counts.num_below.tolist() == counts.tolist()
    is_late = merged.history.candidate >= start + 1_500
    expected = merged.history.candidate - start + 1 - 1_100 * is_late
    np.testing.assert_array_equal(merged.history.evaluations, expected)


def test_an_unfinished_part_makes_the_whole_unfinished(tmp_path, monkeypatch):
    given, _ = set_up(0)
    first, last = run_parts(0, tmp_path, [100])
    last.unlink()
    monkeypatch.setattr(engine, "LARGEST_CHUNK", 1)
    run_parts(0, tmp_path, [100], callback=stop_after(2, []))
    part = jaxnn.merge_searches(last, given[2])
    merged = jaxnn.merge_searches([first, last], given[2])
    assert merged.status == part.status == "stopped"
    assert merged.num_evaluations == 100 + part.num_evaluations < 1_000


def test_parts_that_all_end_with_a_hit_have_the_interval_of_all_hits(tmp_path):
    given, options = set_up(1)
    paths = run_parts(1, tmp_path, [1_000, 2_000], target_loss=options["thresholds"][1])
    merged = jaxnn.merge_searches(paths, given[2])
    assert (merged.status, merged.counts.num_below[1]) == ("reached", 3)
    misses = merged.num_evaluations - 3
    assert merged.counts.high[1] == pytest.approx(stats.beta.ppf(0.975, 3, misses))
    run_parts(1, tmp_path, [1_000])  # The first part goes on to its end, and has other hits.
    merged = jaxnn.merge_searches(paths[:1] + paths[2:], given[2])
    hits, misses = merged.counts.num_below[1], merged.num_evaluations - merged.counts.num_below[1]
    assert merged.counts.high[1] == pytest.approx(stats.beta.ppf(0.975, hits + 1, misses))


def test_overlaps_and_other_searches_are_refused_by_name(tmp_path):
    given, options = set_up(0)
    first, last = run_parts(0, tmp_path, [500])
    start = options["start"]
    options |= {"start": start + 10_000, "num_candidates": 10}
    others = [tmp_path / "other.npz", tmp_path / "key.npz"]
    jaxnn.random_search(*given, **{**options, "top_k": 6}, checkpoint=others[0])
    jaxnn.random_search(jax.random.key(99), *given[1:], **options, checkpoint=others[1])
    for message, paths in {
        f"must not overlap; got .*0.npz up to index {start + 499} and .*0.npz from {start}":
            [first, first],
        r"other.npz is of another run: top_k was 6, is 5": [first, others[0]],
        r"key.npz is of another run: key is another": [last, others[1]],
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            jaxnn.merge_searches(paths, given[2])
    with pytest.raises(ValueError, match=r"0.npz is of another run: .*sample_fn"):
        jaxnn.merge_searches([first], NETWORKS[0].sampler(scale=0.123))


def test_missing_files_none_and_other_files_are_refused(tmp_path):
    sampler = NETWORKS[0].sampler()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        jaxnn.merge_searches([tmp_path / "nowhere.npz"], sampler)
    with pytest.raises(ValueError, match="paths must name at least one"):
        jaxnn.merge_searches([], sampler)
    (tmp_path / "text.npz").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"cannot load .*text.npz"):
        jaxnn.merge_searches([tmp_path / "text.npz"], sampler)


@pytest.mark.exhaustive
@pytest.mark.parametrize("numbers", [[0], ALL])
def test_searches_whole_and_resumed_on_two_processes(numbers):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    given = [str(number) for number in numbers]
    both = [start_program("-m", "search_setups", i, *given, PORT=port) for i in "01"]
    expected = [[str(number), whole(number), whole(number)] for number in numbers]
    assert [output_of(each, timeout=1_800) for each in both] == [expected, expected]


@pytest.mark.exhaustive
@pytest.mark.parametrize("devices", [1, 8])
def test_200_searches_in_chunks_of_five_sizes_whole_and_resumed(devices, tmp_path):
    program = f"""
import jax, search_setups as here
assert len(jax.local_devices()) == {devices}
for number in range(200):
    digests = set()
    for tiles in (1, 2, 3, 7, 10**9):
        here.engine.LARGEST_CHUNK = tiles * 2**10
        digests |= {{here.whole(number), here.resumed(number, "{tmp_path}")}}
        (here.Path("{tmp_path}") / f"{{number}}.npz").unlink()
    print(number, *digests)
"""
    running = start_program("-c", program, JAX_NUM_CPU_DEVICES=str(devices))
    assert output_of(running, 3_000) == [[str(number), whole(number)] for number in ALL]


@pytest.mark.exhaustive
def test_killed_at_20_moments_and_resumed(tmp_path):
    """SIGKILL at random moments of a search that saves all the time."""
    path = tmp_path / "1.npz"
    program = f"""
import jaxnn, search_setups as here
from jaxnn.run import loop
here.engine.LARGEST_CHUNK, loop.SECONDS_BETWEEN_SAVES = 1, 0.0
given, options = here.set_up(1)
options["num_candidates"] = 3_000_000
print("ready", flush=True)
jaxnn.random_search(*given, **options, checkpoint={str(path)!r})
"""
    given, options = set_up(1)
    end_at_random_moments(program, path, 8.0)
    done = jaxnn.merge_searches(path, given[2])
    assert done.status in ("running", "stopped", "interrupted")
    more = {**options, "num_candidates": done.num_evaluations + 500}
    found = jaxnn.random_search(*given, **more, checkpoint=path)
    assert digest(found) == whole(1, num_candidates=done.num_evaluations + 500)


@pytest.mark.parametrize("number", [2])
def test_a_search_resumed_at_any_candidate_is_the_whole(number, tmp_path):
    assert resumed(number, tmp_path) == whole(number)
