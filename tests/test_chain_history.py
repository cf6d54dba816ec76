"""The history of a perturbation search: what each field says, and what is kept of it."""

import jax
import numpy as np
import pytest
from chain_setups import FAMILY, STAIRS, START, loss_fn, search, searched
from tolerances import same

from jaxnn.chains import history, lookahead
from jaxnn.run import loop

STEPS = 250


def test_every_field_of_the_history_is_what_its_line_says():
    found = search(batch=STAIRS._replace(nan_below=np.float32(1.4)))
    evaluations, proposed, current, best, accepted, count, scale, heat, metric, now = found.history
    start = float(loss_fn(START, STAIRS))
    before = np.concatenate([[start], current[:-1]]).astype(np.float32)
    assert np.array_equal(evaluations, np.arange(2, STEPS + 2))
    assert found.num_evaluations == evaluations[-1] == STEPS + 1
    assert np.array_equal(accepted, proposed < before)
    assert np.array_equal(current, np.where(accepted, proposed, before))
    assert np.array_equal(best, np.minimum.accumulate(np.minimum(current, np.float32(start))))
    assert np.isposinf(proposed).any(), "losses that are not finite are recorded as inf"
    assert np.array_equal(count, np.cumsum(accepted))
    assert np.all(scale == np.float32(0.3))
    assert heat is None
    here = np.array([START["b"][0], *metric])[np.maximum.accumulate(np.arange(1, 251) * accepted)]
    assert np.array_equal(now, here)
    dtypes = [array.dtype for array in found.history if array is not None]
    assert dtypes == [np.int64, *[np.float32] * 3, np.bool_, np.int64, *[np.float32] * 3]


def test_evaluations_temperature_and_scale_follow_their_options():
    steps, found = np.arange(STEPS), searched("best of three")
    assert np.array_equal(found.history.evaluations, 1 + 3 * (steps + 1))
    assert found.num_evaluations == 1 + 3 * STEPS
    annealed = searched("annealing").history
    for recorded, first, last in ((annealed.scale, 1.0, 0.05), (annealed.temperature, 40.0, 0.5)):
        expected = first * (last / first) ** np.minimum(steps / 150, 1)
        np.testing.assert_allclose(recorded, expected, rtol=1e-5)


def test_the_metric_changes_nothing():
    with_metric, without = searched("strict"), search(**FAMILY["strict"], metric_fn=None)
    assert same(with_metric.history[:8], without.history[:8])
    assert same(with_metric.state, without.state)
    assert without.history.proposed_metric is without.history.current_metric is None


def test_accepted_steps_are_listed_with_their_losses():
    found = searched("strict", 3)
    chain, step, loss = found.accepted_steps
    assert len(step) == found.num_accepted
    assert np.all(np.diff(step) >= 0)
    assert np.all(found.history.accepted[chain, step])
    np.testing.assert_array_equal(loss, found.history.proposed_loss[chain, step])


@pytest.mark.parametrize("resumed", [False, True])
def test_of_a_long_run_every_fourth_step_is_kept(monkeypatch, tmp_path, resumed):
    """A checkpoint of a shorter run, which kept every step, is thinned."""
    options, whole = FAMILY["all"], searched("all")
    path = {"checkpoint": tmp_path / "run.npz"} if resumed else {}
    if resumed:
        search(**options, num_steps=91, **path)
    pieces, record = [], lookahead.record

    def keep(*arguments):
        pieces.append(record(*arguments))
        return pieces[-1]

    monkeypatch.setattr(lookahead, "record", keep)
    monkeypatch.setattr(loop, "HISTORY_BYTES", 65 * 40)
    fourth = search(**options, **path)
    for name, kept in zip(whole.history._fields, fourth.history, strict=True):
        np.testing.assert_array_equal(kept, getattr(whole.history, name)[..., 3::4], err_msg=name)
    assert same(whole.accepted_steps, fourth.accepted_steps)
    assert same(whole.state, fourth.state)
    views = [leaf for piece, _ in pieces for leaf in jax.tree.leaves(piece)]
    assert all(leaf.base is None for leaf in views), "what was not kept must not stay in memory"


def test_more_accepted_steps_than_are_listed_are_cut(monkeypatch):
    whole = searched("strict", 3)
    monkeypatch.setattr(history, "MOST_ACCEPTED", 20)
    found = search(num_chains=3, **FAMILY["strict"])
    assert found.num_accepted == whole.num_accepted > 20
    assert same(found.accepted_steps, [column[:20] for column in whole.accepted_steps])
