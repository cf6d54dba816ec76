"""One search however it is cut: by runs that merge, by devices, by processes, by a kill."""

import socket
from itertools import pairwise

import jax
import numpy as np
import pytest
from programs import start_program
from scipy import stats
from search_setups import COUNT, OPTIONS, OWN, sample_fn, search, stop_after, whole  # fmt: skip
from tolerances import same

import jaxnn
from jaxnn.search import engine, merge

ALL = range(200)
START = 2**32 - 2_000


def run_parts(folder, cuts, **more):
    """Saves the search from `START` on in runs that end at the cuts; returns the checkpoints."""
    paths = []
    for first, last in pairwise([0, *cuts, COUNT]):
        part = {"start": START + first, "num_candidates": last - first, **more}
        paths.append(folder / f"{first}.npz")
        search(**part, checkpoint=paths[-1])
    return paths


def output_of(program, timeout):
    out, err = program.communicate(timeout=timeout)
    assert program.returncode == 0, err
    return [line.split() for line in out.splitlines() if line[0].isdigit()]


def test_parts_in_any_order_are_the_whole(tmp_path):
    first, second, last = run_parts(tmp_path, [1_500, 3_001])
    assert same(jaxnn.merge_searches([last, first, second], sample_fn), search(start=START))
    assert jaxnn.merge_searches(first, sample_fn).num_evaluations == 1_500


def test_a_gap_is_left_out(tmp_path):
    first, _, last = run_parts(tmp_path, [1_000, 1_500], num_candidates=400)
    merged = jaxnn.merge_searches([last, first], sample_fn)
    alone = [search(start=START + i, num_candidates=400) for i in (0, 1_500)]
    assert merged.num_evaluations == 800
    assert merged.loss == min(part.loss for part in alone)
    counts = np.sum([part.counts.num_below for part in alone], axis=0)
    assert merged.counts.num_below.tolist() == counts.tolist()
    is_late = merged.history.candidate >= START + 1_500
    expected = merged.history.candidate - START + 1 - 1_100 * is_late
    np.testing.assert_array_equal(merged.history.evaluations, expected)


def test_an_unfinished_part_makes_the_whole_unfinished(tmp_path, monkeypatch):
    first, last = run_parts(tmp_path, [100])
    last.unlink()
    monkeypatch.setattr(engine, "LARGEST_CHUNK", 1)
    run_parts(tmp_path, [100], callback=stop_after(2, []))
    part = jaxnn.merge_searches(last, sample_fn)
    merged = jaxnn.merge_searches([first, last], sample_fn)
    assert merged.status == part.status == "stopped"
    assert merged.num_evaluations == 100 + part.num_evaluations < 1_000


def test_parts_that_all_end_with_a_hit_have_the_interval_of_all_hits(tmp_path):
    paths = run_parts(tmp_path, [1_000, 2_000], target_loss=OPTIONS["thresholds"][1])
    merged = jaxnn.merge_searches(paths, sample_fn)
    assert (merged.status, merged.counts.num_below[1]) == ("reached", 3)
    misses = merged.num_evaluations - 3
    assert merged.counts.high[1] == pytest.approx(stats.beta.ppf(0.975, 3, misses))
    run_parts(tmp_path, [1_000])  # The first part goes on to its end, and has other hits.
    merged = jaxnn.merge_searches(paths[:1] + paths[2:], sample_fn)
    hits, misses = merged.counts.num_below[1], merged.num_evaluations - merged.counts.num_below[1]
    assert merged.counts.high[1] == pytest.approx(stats.beta.ppf(0.975, hits + 1, misses))


def test_overlaps_and_other_searches_are_refused_by_name(tmp_path):
    first, last = run_parts(tmp_path, [500])
    others = [tmp_path / "other.npz", tmp_path / "key.npz"]
    search(start=0, num_candidates=10, thresholds=[0.0, 1.0, 2.0], checkpoint=others[0])
    options = {**OPTIONS, "num_candidates": 10, "checkpoint": others[1]}
    jaxnn.random_search(jax.random.key(99), *OWN[1:], **options)
    for message, paths in {
        f"must not overlap; got .*0.npz up to index {START + 499} and .*0.npz from {START}":
            [first, first],
        r"other.npz is of another run: thresholds was \[0.0, 1.0, 2.0\], is": [first, others[0]],
        r"key.npz is of another run: key is another": [last, others[1]],
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            jaxnn.merge_searches(paths, sample_fn)
    with pytest.raises(ValueError, match=r"0.npz is of another run: .*sample_fn"):
        jaxnn.merge_searches([first], lambda key: sample_fn(key) + 1.0)


def test_missing_files_none_and_other_files_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no checkpoint")
    for paths, error, message in (
        ([tmp_path / "nowhere.npz"], FileNotFoundError, "nowhere"),
        ([], ValueError, "paths must name at least one"),
        (tmp_path / "text.npz", ValueError, r"cannot load .*text.npz"),
    ):
        with pytest.raises(error, match=message):
            jaxnn.merge_searches(paths, sample_fn)


def test_several_devices_share_the_work_and_change_no_bit():
    assert same(search(devices=jax.local_devices()[:1] * 3), search())


def test_processes_search_a_part_each_and_return_the_whole(tmp_path, monkeypatch):
    """Here one after the other; the exhaustive tests have two that meet."""
    alone, found, messages = search(), None, []

    def gather(message):
        return messages.append(message) or messages

    monkeypatch.setattr(merge, "_gather", gather)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found = search(checkpoint=tmp_path / "search.npz")
    assert same(found, alone)
    assert {path.name for path in tmp_path.iterdir()} == {
        "search.0-of-2.npz", "search.1-of-2.npz",
    }  # fmt: skip


@pytest.mark.exhaustive
def test_searches_whole_and_resumed_on_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    given = [str(number) for number in ALL]
    both = [start_program("-m", "search_setups", i, *given, PORT=port) for i in "01"]
    expected = [[str(number), whole(number), whole(number)] for number in ALL]
    assert [output_of(each, timeout=1_800) for each in both] == [expected, expected]
