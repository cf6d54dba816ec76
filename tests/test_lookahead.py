"""Looking ahead: the same chain at every look-ahead, on every device, however it is cut."""

import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from chain_setups import (
    FAMILY,
    KEY,
    NETWORK,
    NOWHERE,
    ROUNDED,
    ROWS,
    STAIRS,
    START,
    WIDE,
    loss_fn,
    search,
    searched,
)
from programs import start_program
from tolerances import same

from jaxnn import moves, schedules
from jaxnn.chains import lookahead
from jaxnn.chains.lookahead import choose_lookahead
from jaxnn.run import checkpoint as checkpoints
from jaxnn.run import fingerprint, loop

EXHAUSTIVE = pytest.mark.exhaustive


def at_lookahead(monkeypatch, steps, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr(lookahead, "choose_lookahead", lambda *_: steps)
        return search(*arguments, **options)


@pytest.mark.parametrize(
    "name", ["strict", *(pytest.param(n, marks=EXHAUSTIVE) for n in FAMILY if n != "strict")]
)
def test_a_loss_that_rounds_has_the_same_bits_at_every_lookahead(monkeypatch, name):
    options = {**FAMILY[name], "num_chains": 3, "batch": ROUNDED}
    first, *others = (
        searched(name, 3, ROUNDED),
        *(at_lookahead(monkeypatch, n, **options) for n in (1, 64)),
    )
    assert first.num_accepted > 15
    assert all(same(first, other) for other in others)
    alone = searched(name, batch=ROUNDED)
    assert same(alone.history.proposed_loss, first.history.proposed_loss[0])


@pytest.mark.parametrize(
    ("block", "num_chains", "num_proposals", "accepted", "wanted"),
    [
        (None, 1, 1, 0.1, 64),  # somewhat less than it takes until a step is accepted
        (None, 1, 1, 0.11, 16),
        (None, 4, 2, 0.0, 8),
        (None, 1_000, 1, 0.0, 1),
        (32, 1, 1, 0.0, 32),  # a whole block, whatever is accepted
        (32, 1, 1, 0.9, 32),
        (2, 1, 3, 0.0, 1),
    ],
)
def test_a_window_is_a_block_or_follows_how_often_steps_are_accepted(
    block, num_chains, num_proposals, accepted, wanted
):
    problem: Any = SimpleNamespace(block=block, num_proposals=num_proposals)
    assert choose_lookahead(problem, num_chains, accepted) == wanted


def test_threads_share_the_chains_and_change_no_bit(monkeypatch):
    monkeypatch.setattr(lookahead, "num_threads", lambda _: 2)
    monkeypatch.setattr(lookahead, "MIN_CHAINS_IN_A_THREAD", 1)  # two and one of the three
    assert same(
        searched("strict", 3, ROUNDED), search(num_chains=3, batch=ROUNDED, **FAMILY["strict"])
    )


@pytest.mark.slow
def test_a_second_search_compiles_nothing(monkeypatch, compilations):
    used, advance = [], lookahead._advance_shards

    def spy(*arguments):
        used.append(arguments[-1])
        return advance(*arguments)

    monkeypatch.setattr(lookahead, "_advance_shards", spy)
    options = {"loss_fn": NETWORK.loss, "batch": ROWS, "params": NETWORK.init(KEY)}
    monkeypatch.setattr(lookahead, "STEPS_PER_CHUNK", 256)
    monkeypatch.setattr(lookahead, "STEPS_TO_JUDGE", 256)
    options |= {"metric_fn": None, "num_steps": 2_000}
    options |= {"temperature": schedules.linear(1.0, 1e-6, 1_000)}
    first = search(**options)
    assert set(used) == {16, 64}  # at first hot, later cold
    compilations.clear()
    assert same(first, search(**options))
    assert not compilations


@pytest.mark.parametrize(
    ("seconds", "growth", "records", "number"),
    [(0.0, 8, 2**18, 250), (1e9, 2.3, 2**18, 8), (1e9, 1e9, 2**18, 2), (1e9, 8, 7, 37)],
)
def test_the_result_does_not_depend_on_how_the_work_is_cut(
    monkeypatch, seconds, growth, records, number
):
    expected, piece, count = searched("metropolis"), lookahead.record, []

    def count_pieces(*arguments):
        count.append(arguments[0].accepted.shape[1])
        return piece(*arguments)

    monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", seconds)
    monkeypatch.setattr(loop, "LARGEST_GROWTH", growth)
    monkeypatch.setattr(lookahead, "RECORDS_PER_CHUNK", records)
    monkeypatch.setattr(lookahead, "record", count_pieces)
    assert same(search(**FAMILY["metropolis"]), expected)
    assert sum(count) == 250
    assert len([steps for steps in count if steps]) == number


SHARED: dict[str, dict[str, Any]] = {
    "own": {**FAMILY["strict"], "num_chains": 3, "batch": ROUNDED},
    "all": {**FAMILY["all"], "num_chains": 5, "batch": ROUNDED},
    "wide": {
        "loss_fn": WIDE.loss,
        "params": WIDE.init(jax.random.key(2), scale=0.5),
        "batch": ROWS,
        "metric_fn": None,
        "num_chains": 5,
    },
    "one chain": {"batch": ROUNDED},
}


def print_search(name):
    """What a search on all devices of this process found, and how many devices there are."""
    found = search(**SHARED[name], num_steps=100)._replace(status=0)
    sys.stdout.write(f"{len(jax.devices())} {fingerprint.fingerprint(found)}")


def test_several_devices_share_the_chains_and_change_no_bit():
    shared = search(**SHARED["own"], devices=jax.local_devices()[:1] * 2)
    assert same(shared, searched("strict", 3, ROUNDED))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "own" else EXHAUSTIVE) for n in SHARED]
)
def test_a_process_of_two_devices_finds_the_same_bits(name, capsys):
    command = f"import test_lookahead; test_lookahead.print_search({name!r})"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    running = start_program("-c", command, **flags)
    print_search(name)
    (one, first), (two, second) = capsys.readouterr().out.split(), running.communicate()[0].split()
    assert (one, two) == ("1", "2")
    assert first == second


class TestStopping:
    def test_a_target_ends_the_search_with_the_step_that_reaches_it(self):
        whole = search(num_chains=3)
        reached = np.any(whole.history.current_loss <= 60, axis=0)
        found = search(num_chains=3, target_loss=60)
        end = np.argmax(reached) + 1
        assert found.status == "reached"
        assert found.history.accepted.shape == (3, end)
        assert found.loss <= 60
        for name in ("current_loss", "current_metric"):
            kept = getattr(whole.history, name)[:, :end]
            np.testing.assert_array_equal(getattr(found.history, name), kept)
        assert np.all(found.state.step == end)

    def test_a_start_below_the_target_takes_no_step(self):
        found = search(target_loss=1e9)
        assert (found.status, found.num_evaluations) == ("reached", 1)

    def test_patience_ends_the_search_once_no_chain_has_got_better_for_so_long(self):
        options = {"num_chains": 3, "num_steps": 1_000, "scale": 0.05}
        whole = search(**options)
        best = np.atleast_2d(whole.history.best_loss)
        since, over = np.zeros(len(best), int), None
        before = np.full(len(best), float(loss_fn(START, STAIRS)))
        for step in range(1_000):
            since = np.where(best[:, step] < before, 0, since + 1)
            before = best[:, step]
            if over is None and np.all(since >= 30):
                over = step + 1
        found = search(**options, patience=30)
        assert over is not None
        assert found.status == "converged"
        assert found.history.accepted.shape[-1] == over

    def test_a_callback_and_the_clock_stop_it(self):
        seen = []

        def stop(progress):
            seen.append((progress.num_evaluations, progress.loss, progress.best_params()))
            raise StopIteration

        found = search(callback=stop)
        assert found.status == "stopped"
        assert same(seen, [(found.num_evaluations, found.loss, found.params)])
        assert search(max_seconds=1e-9).status == "stopped"

    def test_progress_has_no_best_params_while_no_loss_was_finite(self):
        seen = []
        search(batch=NOWHERE, num_steps=3, callback=lambda now: seen.append(now.best_params()))
        assert seen
        assert all(params is None for params in seen)


class TestCheckpoints:
    @pytest.mark.parametrize(("name", "num_chains"), [("strict", 3), ("all", 1)])
    def test_a_resumed_search_is_the_whole(self, name, num_chains, tmp_path):
        options = {**FAMILY[name], "num_chains": num_chains}
        for steps in (0, 40, 41, 250, 250):
            found = search(num_steps=steps, checkpoint=tmp_path / "chain.npz", **options)
        assert same(found, search(**options))

    def test_a_stopped_search_goes_on_also_after_an_error_in_a_callback(self, tmp_path):
        path = tmp_path / "chain.npz"
        for error in (StopIteration, KeyError):

            def fail(_, error=error):
                raise error("mine")

            try:
                assert search(checkpoint=path, callback=fail).status == "stopped"
            except KeyError:
                assert error is KeyError
        assert checkpoints.load(path)[1]["next"] > 1
        assert same(search(checkpoint=path), search())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scale": 0.2}, r"run: scale was 0\.3, is 0\.2; give the same again, or another file"),
            ({"key": jax.random.key(6)}, "key is another than when it was saved"),
            ({"num_chains": 2}, "num_chains was 1, is 2"),
            ({"temperature": 0.0}, "accepts_ties was False, is True"),
            ({"scale": moves.one_fifth(0.3)}, "one_fifth was False, is True"),
            ({"patience": 9}, "patience was None, is 9"),
        ],
    )
    def test_another_setting_is_refused_by_name(self, change, message, tmp_path):
        path = tmp_path / "chain.npz"
        search(num_steps=5, checkpoint=path)
        with pytest.raises(ValueError, match=message):
            search(**change, num_steps=5, checkpoint=path)

    def test_fewer_steps_than_it_holds_are_refused(self, tmp_path):
        search(num_steps=9, checkpoint=tmp_path / "chain.npz")
        with pytest.raises(ValueError, match="num_steps must be at least 9"):
            search(num_steps=8, checkpoint=tmp_path / "chain.npz")

    def test_params_that_cannot_be_saved_are_refused_before_the_work(self, tmp_path):
        def mean(params, batch):
            return jax.numpy.mean(params).astype(np.float32)

        start = jax.numpy.ones(3, jax.numpy.bfloat16)
        with pytest.raises(TypeError, match="got bfloat16: cast it"):
            search(mean, params=start, metric_fn=None, checkpoint=tmp_path / "chain.npz")
