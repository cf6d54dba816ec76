"""The exact chain for every depth of look-ahead, and its family against a loop of one step each."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxnn
from jaxnn.chains import history as chain_history
from jaxnn.chains import kernel as proposals
from jaxnn.chains import lookahead as climbing
from jaxnn.chains import lookahead as depths
from jaxnn.chains import perturbation_search
from jaxnn.run import checkpoint as checkpoints
from jaxnn.run.random import normals

EXHAUSTIVE = pytest.mark.exhaustive
KEY = jax.random.key(5)
START = {
    "w": np.array([[2.5, -1.0], [0.5, 3.0]], np.float32),
    "b": np.array([1.5, -2.0], np.float32),
}
SHIFT = np.float32(0)
DEPTHS = (1, 4, 64, None)


def stairs(params, batch):
    """A loss that float32 holds exactly, whatever the order of its sums; it has many ties."""
    steps = jax.tree.map(lambda leaf: jnp.square(jnp.round(4 * leaf)), params)
    return jnp.sum(steps["w"]) + jnp.sum(steps["b"]) + 0 * batch


def broken(params, batch):
    """The same, but nan in a part of the space and -inf in another."""
    w = params["w"]
    bad = jnp.where(w[0, 0] > 2.6, jnp.nan, jnp.where(w[0, 1] < -1.2, -jnp.inf, 0.0))
    return stairs(params, batch) + bad


def flat_loss(params, batch):
    return 0 * (params["b"][0] - batch)


def first_bias(params, batch):
    return params["b"][0] - batch


def fresh(key):
    drawn = 3 * normals(key, 6)
    return {"w": drawn[:4].reshape(2, 2), "b": drawn[4:]}


FAMILY: dict[str, dict[str, Any]] = {
    "strict": {},
    "ties": {"accept_ties": True},
    "adapt": {"adapt_scale": True, "scale": 2.0},
    "schedule": {"scale": jaxnn.schedules.exponential_decay(1.0, 0.05, 200)},
    "metropolis": {"temperature": jaxnn.schedules.linear(40.0, 0.5, 150)},
    "hot and adapting": {"temperature": 20.0, "adapt_scale": True},
    "best of three": {"num_proposals": 3},
    "restarts": {"patience": 20, "restart_fn": fresh},
    "restarts of two": {"patience": 15, "restart_fn": fresh, "num_proposals": 2, "scale": 0.01},
    "one coordinate": {"propose_fn": jaxnn.moves.one_coordinate},
    "all": {
        "temperature": 5.0,
        "adapt_scale": True,
        "num_proposals": 2,
        "patience": 25,
        "restart_fn": fresh,
        "propose_fn": jaxnn.moves.one_coordinate,
    },
}


def climb(loss_fn=stairs, *, key=KEY, num_steps=250, **options) -> Any:
    options = {"scale": 0.3, **options}
    return jaxnn.perturbation_search(key, loss_fn, START, SHIFT, num_steps=num_steps, **options)


def by_loop(loss_fn: Any, *, chain=0, num_steps=250, scale: Any = 0.3, num_proposals=1,
            propose_fn: Any = None, adapt_scale=False, accept_ties=False, temperature: Any = None,
            patience=0, restart_fn: Any = None):  # fmt: skip
    """One step at a time, as the family is defined: proposed losses, accepted, last and best."""
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, START))
    stream = jax.random.fold_in(jax.random.fold_in(KEY, perturbation_search.TAG), chain)
    loss_of = jax.jit(lambda flat: loss_fn(unravel(flat), SHIFT))
    scale_at: Any = scale if callable(scale) else lambda step: jnp.float32(scale)
    current = run = best = finite(loss_of(flat))
    exponent, vain, rows = 0, 0, []
    size: Any
    for step in range(num_steps):
        step_key = jax.random.fold_in(stream, step)
        size = (
            scale_at(step) * jnp.float32(2.0 ** (exponent / 4)) if adapt_scale else scale_at(step)
        )
        renewed = bool(restart_fn) and vain >= patience
        drawn: list[Any] = []
        for number in range(num_proposals):
            key = step_key if num_proposals == 1 else jax.random.fold_in(step_key, number)
            if renewed:
                moved = ravel_pytree(restart_fn(jax.random.fold_in(key, proposals.FRESH)))[0]
            elif propose_fn:
                moved = ravel_pytree(propose_fn(key, unravel(flat), size))[0]
            else:
                moved = flat + size * normals(key, flat.size)
            drawn.append((finite(loss_of(moved)), number, moved))
        loss, _, moved = min(drawn, key=lambda each: each[:2])
        taken = loss < current or renewed or (accept_ties and loss == current)
        if temperature is not None and not taken:
            heat: Any = temperature(step) if callable(temperature) else jnp.float32(temperature)
            u = 1 - jax.random.uniform(jax.random.fold_in(step_key, proposals.COIN))
            taken = np.exp(-(loss - current) / np.float64(heat)) >= u
        taken = bool(taken) and np.isfinite(loss)
        exponent = max(exponent + (4 if taken and loss < current else -1), -200)
        exponent = 0 if taken and renewed else exponent
        better = taken and (renewed or loss < run)
        vain = 0 if better else vain + 1
        if taken:
            flat, current = moved, loss
            run = loss if better else run
            best = min(best, loss)
        rows.append((loss, taken, current, best, size))
    return [np.array(column) for column in zip(*rows, strict=True)], unravel(flat)


def finite(loss: Any) -> float:
    return float(loss) if np.isfinite(loss) else np.inf


def same(one, other):
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(
        np.array_equal(a, b, equal_nan=True) if not isinstance(a, str) else a == b
        for a, b in zip(leaves, others, strict=True)
    )


QUICK = ("all",)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in FAMILY
    ],
)
@pytest.mark.exhaustive
def test_each_member_is_its_loop(name):
    (losses, accepted, current, best, scales), _ = by_loop(stairs, **FAMILY[name])
    history = climb(**FAMILY[name]).history
    np.testing.assert_array_equal(history.accepted, accepted)
    np.testing.assert_array_equal(history.proposed_loss, losses)
    np.testing.assert_array_equal(history.current_loss, current)
    np.testing.assert_array_equal(history.best_loss, best)
    np.testing.assert_allclose(history.scale, scales, rtol=1e-6)
    np.testing.assert_array_equal(history.num_accepted, np.cumsum(accepted))
    assert 3 < np.sum(accepted) < 245


def test_losses_that_are_not_finite_never_win():
    (losses, accepted, _, _, _), _ = by_loop(broken, accept_ties=True)
    history = climb(broken, accept_ties=True).history
    assert 10 < np.sum(np.isinf(losses)) < 240
    np.testing.assert_array_equal(history.accepted, accepted)
    np.testing.assert_array_equal(history.proposed_loss, losses)


@pytest.mark.parametrize("name", ["strict", pytest.param("all", marks=pytest.mark.exhaustive)])
def test_every_chain_is_a_loop_with_a_key_of_its_own(name):
    many = climb(num_chains=5, **FAMILY[name])
    for chain in (0, 3):
        (losses, accepted, *_), _ = by_loop(stairs, chain=chain, **FAMILY[name])
        np.testing.assert_array_equal(many.history.accepted[chain], accepted)
        np.testing.assert_array_equal(many.history.proposed_loss[chain], losses)
        assert many.chain_num_accepted[chain] == np.sum(accepted)


MODEL = jaxnn.mlp((2, 3, 3))
BATCH = jaxnn.datasets.vertical(jax.random.key(1), samples=10)


def deep(key, model, batch, depth, **options):
    params = model.init(jax.random.key(2))
    return jaxnn.perturbation_search(key, model.loss, params, batch, look_ahead=depth, **options)


@pytest.mark.parametrize(
    "name", ["hot and adapting", pytest.param("strict", marks=pytest.mark.exhaustive)]
)
@pytest.mark.exhaustive
def test_the_network_climbs_the_same_bits_at_every_depth(name):
    options = {"num_steps": 600, "scale": 0.2, "metric_fn": MODEL.accuracy, **FAMILY[name]}
    first, *others = (deep(KEY, MODEL, BATCH, depth, **options) for depth in (1, 64))
    assert first.num_accepted > 20
    assert all(same(first, other) for other in others)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(100))
def test_100_set_ups_at_four_depths(number):
    rng = np.random.default_rng(number)
    model = jaxnn.mlp([(2, 3, 3), (2, 12, 8, 3), (2, 5, 3)][number % 3])
    batch = jaxnn.datasets.spiral(jax.random.key(number), samples=int(rng.choice([10, 33])))
    restart = {"patience": 40, "restart_fn": model.sampler(scale=1.0)}
    members = [{}, {"adapt_scale": True}, {"temperature": 0.01}, {"num_proposals": 3}, restart]
    options = {
        "num_steps": int(rng.integers(1, 1_500)),
        "scale": float(rng.uniform(0.01, 0.5)),
        "num_chains": [None, 1, 3][number // 5 % 3],
        "state_metric_fn": model.accuracy,
        **members[number % 5],
    }
    first, *others = (deep(jax.random.key(number), model, batch, d, **options) for d in DEPTHS)
    assert all(same(first, other) for other in others)


def test_depth_follows_how_rare_acceptance_is():
    def wanted(share, width, block=None):
        return depths.best_depth(depths.Depths(None, width, block, share), 1_000)

    assert [wanted(share, 1) for share in (0.5, 0.05, 0.02, 0.01, 0.002)] == [16, 16, 16, 64, 128]
    assert [wanted(share, 1_024) for share in (0.5, 0.1, 0.01)] == [1, 4, 4]
    assert [wanted(share, 1, block=16) for share in (0.5, 0.01)] == [16, 64]
    assert wanted(0.01, 10_000) == 1


def test_a_depth_is_compiled_only_if_the_steps_left_pay_for_it():
    known = depths.learn(depths.Depths(None, 12, None), 4, 0.5, 1, 3.0)
    assert depths.best_depth(known._replace(share=0.002), 10**6) == 4  # not measured yet
    known = depths.learn(known, 4, 0.002, 1_000, 0.5)
    assert depths.best_depth(known, 12_000) == 4  # 6 s left, 3 s to compile
    assert depths.best_depth(known, 12_001) == 128
    known = depths.learn(known, 128, 0.002, 1_000, 4.0)
    assert depths.best_depth(known, 1) == 128
    assert depths.best_depth(known._replace(share=0.5), 1) == 4


WEIGHTS = jax.random.normal(jax.random.key(4), (6, 257))


def rounded(params, batch):
    """A loss whose sums, of a long matrix product, are taken in an order of the compiler's."""
    flat = ravel_pytree(params)[0]
    return jnp.mean(jnp.tanh(flat @ WEIGHTS) @ WEIGHTS.T) ** 2 + batch


@pytest.mark.exhaustive
def test_a_loss_of_ones_own_has_the_same_bits_at_every_depth_beside_any_chains():
    options = {"num_chains": 5, "num_steps": 400, "scale": 0.02}
    first, *others = (climb(rounded, look_ahead=depth, **options) for depth in (1, 7, 64))
    assert first.num_accepted > 50
    assert all(same(first, other) for other in others)
    alone = climb(rounded, **{**options, "num_chains": None})
    assert same(alone.history.proposed_loss, first.history.proposed_loss[0])


def test_a_schedule_of_ones_own_may_count_down():
    found = climb(num_steps=5, scale=lambda step: jnp.exp(-step) + jnp.maximum(2 - step, 0))
    steps = np.arange(5)
    wanted = np.exp(-steps) + np.maximum(2 - steps, 0)
    np.testing.assert_allclose(found.history.scale, wanted, rtol=1e-5)


@pytest.mark.exhaustive
def test_moves_of_ones_own_have_the_same_bits_at_every_depth():
    def propose(key, params, scale):
        moved = params[0].weights + scale * WEIGHTS[:2, :3] * jax.random.normal(key)
        return (params[0]._replace(weights=moved @ WEIGHTS[:3, :3]), *params[1:])

    options = {"num_steps": 300, "scale": 0.1, "propose_fn": propose, "temperature": 0.1}
    first, other = (deep(KEY, MODEL, BATCH, depth, metric_fn=MODEL.loss, **options)
                    for depth in (1, 64))  # fmt: skip
    assert same(first, other)


@pytest.mark.exhaustive
def test_what_is_kept_of_a_long_chain_is_every_kth_step():
    options = {**FAMILY["all"], "metric_fn": first_bias, "state_metric_fn": first_bias}
    every, seventh = climb(**options), climb(**options, record_every=7)
    for name, kept in zip(every.history._fields, seventh.history, strict=True):
        whole = getattr(every.history, name)
        np.testing.assert_array_equal(kept, whole[6::7], err_msg=name)
    assert same(every.accepted_steps, seventh.accepted_steps)
    assert same(every.params, seventh.params)


def test_accepted_steps_are_listed_with_their_losses():
    found = climb(num_chains=3, **FAMILY["metropolis"])
    chain, step, loss = found.accepted_steps
    assert len(step) == found.num_accepted
    assert np.all(np.diff(step) >= 0)
    assert np.all(found.history.accepted[chain, step])
    np.testing.assert_array_equal(loss, found.history.proposed_loss[chain, step])


def test_the_state_metric_is_that_of_where_the_chain_is():
    found = climb(state_metric_fn=first_bias, metric_fn=first_bias, **FAMILY["metropolis"])
    metric = found.history.proposed_metric
    expected, here = [], START["b"][0]
    for step, taken in enumerate(found.history.accepted):
        here = metric[step] if taken else here
        expected.append(here)
    np.testing.assert_array_equal(found.history.current_metric, expected)


def test_the_best_is_returned_even_if_the_chain_is_elsewhere():
    found = climb(temperature=60.0, num_steps=400)
    assert found.loss == found.history.best_loss[-1] < found.history.current_loss[-1]
    assert float(stairs(found.params, SHIFT)) == found.loss


class TestStopping:
    def test_a_target_ends_the_search_with_the_step_that_reaches_it(self):
        whole = climb(num_chains=3)
        reached = np.any(whole.history.current_loss <= 60, axis=0)
        found = climb(num_chains=3, target_loss=60)
        assert found.status == "reached"
        assert found.history.accepted.shape == (3, np.argmax(reached) + 1)
        assert found.loss <= 60
        np.testing.assert_array_equal(
            found.history.current_loss, whole.history.current_loss[:, : np.argmax(reached) + 1]
        )

    def test_a_start_below_the_target_takes_no_step(self):
        found = climb(target_loss=1e9)
        assert (found.status, found.num_evaluations) == ("reached", 1)

    @pytest.mark.parametrize("num_chains", [3, pytest.param(None, marks=pytest.mark.exhaustive)])
    def test_patience_ends_the_search_once_no_chain_has_got_better_for_so_long(self, num_chains):
        whole = climb(num_chains=num_chains, num_steps=1_000, scale=0.05)
        best = np.atleast_2d(whole.history.best_loss)
        vain, over = np.zeros(len(best), int), None
        before = np.full(len(best), finite(stairs(START, SHIFT)))
        for step in range(1_000):
            vain = np.where(best[:, step] < before, 0, vain + 1)
            before = best[:, step]
            if over is None and np.all(vain >= 30):
                over = step + 1
        found = climb(num_chains=num_chains, num_steps=1_000, scale=0.05, patience=30)
        assert over is not None
        assert found.status == "converged"
        assert found.history.accepted.shape[-1] == over

    def test_a_callback_and_the_clock_stop_it(self):
        seen = []

        def stop(progress):
            seen.append(progress)
            raise StopIteration

        found = climb(callback=stop)
        assert found.status == "stopped"
        assert seen == [(found.num_evaluations, found.loss)]
        assert climb(max_seconds=1e-9).status == "stopped"


def test_a_history_thinned_holds_nothing_but_itself():
    pieces = []

    def keep(*arguments):
        pieces.append(chain_history.pieces_of(*arguments))
        return pieces[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(climbing, "pieces_of", keep)
        climb(record_every=50)
    assert all(leaf.base is None for piece in pieces for leaf in jax.tree.leaves(piece[:4]))


def test_a_search_that_meets_nothing_finite_says_so():
    found = climb(lambda params, batch: jnp.nan * params["b"][0], patience=20)
    assert (found.status, found.loss, found.num_accepted) == ("nonfinite", np.inf, 0)
    assert same(found.params, START)


class TestCheckpoints:
    @pytest.mark.parametrize("name", [pytest.param("strict", marks=pytest.mark.exhaustive), "all"])
    def test_a_resumed_search_is_the_whole(self, name, tmp_path):
        options = {**FAMILY[name], "num_chains": 2, "record_every": 3, "metric_fn": first_bias}
        options["state_metric_fn"] = first_bias
        path = tmp_path / "chain.npz"
        for steps in (0, 40, 41, 250, 250):
            found = climb(num_steps=steps, checkpoint=path, **options)
        assert same(found, climb(**options))

    def test_a_stopped_search_goes_on(self, tmp_path):
        def stop(_):
            raise StopIteration

        path = tmp_path / "chain.npz"
        assert climb(checkpoint=path, callback=stop).status == "stopped"
        assert same(climb(checkpoint=path), climb())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scale": 0.2}, r"run: scale was 0\.3, is 0\.2; give the same again, or another file"),
            ({"key": jax.random.key(6)}, "key is another than when it was saved"),
            ({"record_every": 2}, "record_every must be None, or 1 as in the"),
            pytest.param({"num_chains": 2}, "num_chains was 1, is 2", marks=EXHAUSTIVE),
            pytest.param(
                {"accept_ties": True}, "accept_ties was False, is", marks=pytest.mark.exhaustive
            ),
            pytest.param(
                {"temperature": 1.0}, "temperature is another", marks=pytest.mark.exhaustive
            ),
            pytest.param(
                {"num_proposals": 2}, "num_proposals was 1, is 2", marks=pytest.mark.exhaustive
            ),
            pytest.param(
                {"loss_fn": broken}, "loss_fn computes something", marks=pytest.mark.exhaustive
            ),
        ],
    )
    def test_another_setting_is_refused_by_name(self, change, message, tmp_path):
        path = tmp_path / "chain.npz"
        climb(num_steps=5, checkpoint=path)
        with pytest.raises(ValueError, match=message):
            climb(**change, num_steps=5, checkpoint=path)

    def test_an_error_in_a_callback_loses_nothing(self, tmp_path):
        def fail(_):
            raise KeyError("mine")

        path = tmp_path / "chain.npz"
        with pytest.raises(KeyError, match="mine"):
            climb(checkpoint=path, callback=fail)
        assert checkpoints.load(path)[1]["next"] > 0
        assert same(climb(checkpoint=path), climb())

    def test_params_that_cannot_be_saved_are_refused_before_the_work(self, tmp_path):
        def mean(params, batch):
            return jnp.mean(params).astype(jnp.float32) + batch

        with pytest.raises(TypeError, match="params must be of a NumPy float"):
            jaxnn.perturbation_search(
                KEY,
                mean,
                jnp.ones(3, jnp.bfloat16),
                SHIFT,
                num_steps=3,
                scale=0.1,
                checkpoint=tmp_path / "chain.npz",
            )

    def test_fewer_steps_than_it_holds_are_refused(self, tmp_path):
        climb(num_steps=9, checkpoint=tmp_path / "chain.npz")
        with pytest.raises(ValueError, match="num_steps must be at least 9"):
            climb(num_steps=8, checkpoint=tmp_path / "chain.npz")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": 0.0}, ValueError, "scale must be a finite number above 0"),
        ({"scale": lambda step: jnp.ones(2)}, TypeError, "scale must return a float scalar"),
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number above 0"),
        ({"temperature": np.nan}, ValueError, "temperature must be"),
        ({"temperature": "hot"}, TypeError, "temperature must be"),
        ({"num_proposals": 0}, ValueError, "num_proposals must be an integer of at least 1"),
        ({"patience": 0}, ValueError, "patience must be an integer of at least 1"),
        ({"restart_fn": fresh}, ValueError, "patience must be given with restart_fn"),
        ({"patience": 5, "restart_fn": 3}, TypeError, "restart_fn must be callable"),
        ({"patience": 5, "restart_fn": lambda key: 0.0}, TypeError, "restart_fn must return"),
        ({"propose_fn": lambda k, p, s: p["w"]}, TypeError, "propose_fn must return params like"),
        ({"record_every": 0}, ValueError, "record_every must be an integer of at least 1"),
        ({"look_ahead": 0}, ValueError, "look_ahead must be an integer of at least 1"),
        ({"accept_ties": 1}, TypeError, "accept_ties must be True or False"),
        ({"adapt_scale": None}, TypeError, "adapt_scale must be True or False"),
        ({"max_seconds": -1}, ValueError, "max_seconds must be"),
        ({"callback": 3}, TypeError, "callback must be callable"),
        ({"state_metric_fn": lambda p, b: p}, TypeError, "state_metric_fn must return a float"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        climb(**options)


class TestTemperature:
    def test_it_accepts_the_share_asked_for(self):
        key, scale = jax.random.key(3), 0.3
        flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, START))
        keys = jax.random.split(jax.random.key(9), 4_000)
        moved = jax.vmap(lambda k: stairs(unravel(flat + scale * normals(k, 6)), SHIFT))(keys)
        rises = np.asarray(moved - stairs(START, SHIFT), np.float64)
        rises = rises[rises > 0]
        for share in (0.2, 0.8):
            heat = jaxnn.calibrated_temperature(
                key, stairs, START, SHIFT, scale=scale, acceptance=share, num_proposals=4_000
            )
            accepted = np.exp(-rises / heat)
            error = np.std(accepted) / np.sqrt(len(rises))
            assert abs(np.mean(accepted) - share) < 8 * error  # two samples, five errors each

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"acceptance": 1.0}, "acceptance must be below 1"), ({"scale": 0}, "scale must be")],
    )
    def test_bad_numbers_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            jaxnn.calibrated_temperature(KEY, stairs, START, SHIFT, **{"scale": 0.3, **options})

    def test_a_start_without_a_loss_is_refused(self):
        start = START | {"w": np.full((2, 2), np.inf, np.float32)}
        with pytest.raises(ValueError, match="params must have a finite loss"):
            jaxnn.calibrated_temperature(KEY, stairs, start, SHIFT, scale=0.3)

    def test_a_loss_that_cannot_get_worse_is_refused(self):
        with pytest.raises(ValueError, match="room to get worse"):
            jaxnn.calibrated_temperature(KEY, flat_loss, START, SHIFT, scale=0.3)


@pytest.mark.exhaustive
def test_one_coordinate_moves_one_number_by_the_scale_either_way_everywhere():
    keys = jax.random.split(KEY, 3_000)
    start = jax.tree.map(jnp.asarray, START)
    moved = jax.vmap(lambda key: jaxnn.moves.one_coordinate(key, start, jnp.float32(0.5)))(keys)
    steps = jax.tree.map(lambda a, b: np.reshape(a - b[None], (3_000, -1)), moved, start)
    flat = np.concatenate([steps["w"], steps["b"]], axis=1)
    assert np.all(np.count_nonzero(flat, axis=1) == 1)
    assert set(np.unique(np.abs(flat))) == {0.0, 0.5}
    expected = 3_000 / 12
    for place, sign in itertools.product(range(6), (-1, 1)):
        count = np.sum(flat[:, place] * sign > 0)
        assert abs(count - expected) < 5 * np.sqrt(expected)
