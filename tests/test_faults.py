"""Signals at any moment, and disks that fill up, lose nothing of a run that has a checkpoint."""

import os
import signal
import warnings
from typing import Any

import chain_setups
import jax
import numpy as np
import pytest
import search_setups
from chain_setups import STAIRS
from programs import end_at_random_moments
from search_setups import TILE
from tolerances import same

import jaxnn
from jaxnn.chains import lookahead, perturbation_search
from jaxnn.descent import gradient_descent
from jaxnn.descent import history as descent_history
from jaxnn.run import checkpoint as checkpoints
from jaxnn.run import loop
from jaxnn.search import engine, random_search

KEY = jax.random.key(8)
MODEL = jaxnn.mlp((2, 2, 3))
BATCH = jaxnn.datasets.spiral(jax.random.key(1), samples=11)
START = MODEL.init(jax.random.key(3))


def search(count, **options) -> Any:
    return search_setups.search(num_candidates=TILE * count, **options)


def climb(count, **options) -> Any:
    finite = STAIRS._replace(nan_above=1e9, inf_above=1e9, nan_below=-1e9)
    options = {"num_chains": 3, "batch": jax.tree.map(np.float32, finite), **options}
    return chain_setups.search(num_steps=count, **options)


def descend(count, **options) -> Any:
    optimizer = jaxnn.optimizers.sgd(0.1, momentum=0.9)
    options = {"optimizer": optimizer, "batch_size": 8, "validation_batch": BATCH, **options}
    return jaxnn.gradient_descent(
        KEY, MODEL.value_and_grad, START, BATCH, num_epochs=count, **options
    )


RUNS = {"search": search, "climb": climb, "descend": descend}
every_run = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(autouse=True)
def handlers():
    """The handlers that Python starts with, also where the tests run in the background."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in defaults.items()}
    yield defaults
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(
    "signum", [pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive), signal.SIGTERM]
)
@every_run
def test_a_signal_ends_a_run_with_what_it_found_and_it_goes_on(name, signum, tmp_path, handlers):
    run, path, sent = RUNS[name], tmp_path / "run.npz", []

    def send(progress):
        if not sent:
            sent.append(progress)
            os.kill(os.getpid(), signum)

    first = run(400, checkpoint=path, callback=send)
    assert first.status == "interrupted"
    assert 0 < first.num_evaluations <= sent[0].num_evaluations + 2
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    assert same(run(400, checkpoint=path), run(400))


PROGRAM = """
import test_faults as here
here.save_all_the_time()
print("ready", flush=True)
here.RUNS[{name!r}](10**6, checkpoint={path!r})
"""


def save_all_the_time():
    """Small chunks, and a save after each."""
    engine.LARGEST_CHUNK, lookahead.STEPS_PER_CHUNK, descent_history.RECORDS_PER_CHUNK = (
        2**16,
        256,
        64,
    )
    loop.SECONDS_PER_CHUNK, loop.SECONDS_BETWEEN_SAVES = 0.01, 0.0


@pytest.mark.exhaustive
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@every_run
def test_ended_at_20_moments_it_resumes_to_the_same_bits(name, signum, tmp_path):
    path = tmp_path / "run.npz"
    program = PROGRAM.format(name=name, path=str(path))
    end_at_random_moments(program, path, 8.0, signum)
    done = checkpoints.load(path)[1]["next"]
    whole = (done // TILE if name == "search" else done) + 50
    assert same(RUNS[name](whole, checkpoint=path), RUNS[name](whole))


class Full:
    """A disk on which files whose names hold a word cannot be saved."""

    def __init__(self, monkeypatch, word):
        save = checkpoints.save
        self.word: str | None = word

        def save_or_not(path, *content):
            if self.word and self.word in path.name:
                raise OSError(28, "No space left on device", str(path))
            save(path, *content)

        monkeypatch.setattr(checkpoints, "save", save_or_not)


def test_a_history_that_cannot_be_saved_keeps_no_state_from_being_saved(tmp_path, monkeypatch):
    path, disk = tmp_path / "run.npz", Full(monkeypatch, "history")
    with pytest.warns(RuntimeWarning, match=r"checkpoint not saved: .*run\.history\.npz"):
        climb(100, checkpoint=path)
    disk.word = None
    climb(200, checkpoint=path)
    resumed, whole = climb(300, checkpoint=path), climb(300)
    assert same(resumed._replace(history=None, accepted_steps=None),
                whole._replace(history=None, accepted_steps=None))  # fmt: skip
    late = jax.tree.map(lambda leaf: leaf[..., 100:], whole.history)
    assert same(resumed.history, late)
    assert same(resumed.history.evaluations, whole.history.evaluations[100:])


def test_a_history_that_is_ahead_of_its_state_is_cut(tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    climb(100, checkpoint=path)
    disk = Full(monkeypatch, "run.npz")
    with pytest.warns(RuntimeWarning, match="checkpoint not saved"):
        climb(200, checkpoint=path)
    disk.word = None
    assert checkpoints.load(path)[1]["next"] == 100
    assert same(climb(300, checkpoint=path), climb(300))


@every_run
def test_a_signal_with_the_last_chunk_or_after_it_is_told(name, monkeypatch):
    run, ends = RUNS[name], {"search": "make_result", "climb": "finalize", "descend": "_result"}
    module = {"search": random_search, "climb": perturbation_search, "descend": gradient_descent}
    report = getattr(module[name], ends[name])

    def report_late(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return report(*arguments, **options)

    whole = run(20)
    monkeypatch.setattr(module[name], ends[name], report_late)
    late = run(20)
    assert (whole.status, late.status) == ("completed", "interrupted")
    assert same(late.params, whole.params)


def test_a_signal_in_the_chunk_that_reaches_the_target_is_told():
    def send(progress):
        os.kill(os.getpid(), signal.SIGINT)

    options = {"target_loss": -1.0}
    plain, found = search(400, **options), search(400, callback=send, **options)
    assert (plain.status, found.status) == ("reached", "interrupted")
    assert same(found.params, plain.params)


def test_warnings_that_are_errors_lose_no_result(tmp_path, monkeypatch):
    Full(monkeypatch, "run")
    with warnings.catch_warnings(action="error"):
        found = climb(20, checkpoint=tmp_path / "run.npz")
    assert same(found, climb(20))


def test_a_history_of_another_run_is_refused(tmp_path):
    climb(10, checkpoint=tmp_path / "a.npz")
    climb(10, checkpoint=tmp_path / "b.npz", scale=0.2)
    os.replace(tmp_path / "b.history.npz", tmp_path / "a.history.npz")
    with pytest.raises(ValueError, match=r"a\.history\.npz is of another run: scale was 0\.2, is"):
        climb(20, checkpoint=tmp_path / "a.npz")


def test_a_long_history_of_a_descent_is_thinned(tmp_path, monkeypatch):
    full = descend(60)
    monkeypatch.setattr(loop, "HISTORY_BYTES", 100 * (8 + 2 * 4))
    thin = descend(60)  # 240 steps, of which every fourth is recorded: one an epoch
    assert same(thin.params, full.params)
    assert (thin.num_steps, thin.num_evaluations) == (full.num_steps, full.num_evaluations)
    assert same(thin.history.loss, full.history.loss[3::4])
    assert same(thin.history.evaluations, full.history.evaluations[3::4])
    assert same(thin.history.validation_loss, full.history.validation_loss)
    assert same(thin.history.epoch_evaluations, full.history.evaluations[3::4])
    path = tmp_path / "run.npz"
    descend(10, checkpoint=path)
    descend(20, checkpoint=path)
    assert same(descend(60, checkpoint=path), thin)


def test_the_longest_settings_fit_a_checkpoint(tmp_path):
    path = tmp_path / "run.npz"
    edges = np.linspace(0.1, 9.7, 4096).astype(np.float32)
    options = {"thresholds": edges, "bins": edges, "checkpoint": path}
    with warnings.catch_warnings(action="error"):
        search(2, **options)
    assert same(search(4, **options), search(4, thresholds=edges, bins=edges))
