"""Probabilities far below what can be counted, held against those that can be computed."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import special, stats
from search_setups import stop_after
from tolerances import same

import jaxnn
from jaxnn.run import loop
from jaxnn.run.random import normals, uniforms
from jaxnn.search import rare_event_search as module
from jaxnn.search import splitting
from jaxnn.typing import Traits, UnitDraws

KEY = jax.random.key(2)


def sampler(distribution, size):
    """A sampler that names its unit draws, and makes params of them by a number of its own."""
    draw = jax.random.normal
    if distribution == "uniform":
        draw = Partial(jax.random.uniform, minval=-1.0)

    def sample_fn(key, scale):
        return scale * draw(key, (size,))

    unit = UnitDraws(distribution, size, lambda draws, scale: scale * draws)
    vars(sample_fn)["traits"] = Traits(unit_draws=unit)
    return Partial(sample_fn, scale=np.float32(1))


def squares(params):
    return jnp.sum(params**2)


def product(params):
    return (params[0] * params[1]) ** 2


def share_positive(params):
    """Ties: of 21 coins, how many show heads."""
    return jnp.mean(params > 0, dtype=jnp.float32)


def constant(params):
    return 0 * jnp.sum(params) + 1


def not_a_number(params):
    return jnp.nan * params[0]


def half_nan(params):
    return jnp.where(params[1] > 0, jnp.nan, jnp.where(params[2] > 1, -jnp.inf, squares(params)))


LOSSES = squares, product, share_positive, constant, not_a_number, half_nan


TRACED = []


def loss_fn(params, batch):
    """The loss whose number is the batch: one program for all of them."""
    TRACED.append(None)
    return jax.lax.switch(batch, LOSSES, params)


def coins(key):
    """The same by a plain function, which names no draws."""
    return jax.random.rademacher(key, (21,), jnp.float32)


def log_ball(size, radius):
    """ln of a ball's share of the cube from -1 to 1."""
    volume = size / 2 * math.log(math.pi) - special.gammaln(size / 2 + 1)
    return volume + size * math.log(radius) - size * math.log(2)


def log_normals(loss):
    return stats.chi2(21).logcdf(loss)


NORMAL_21 = sampler("normal", 21)
CUBE_10, CUBE_21 = sampler("uniform", 10), sampler("uniform", 21)
COINS = stats.binom(21, 0.5)
TRUTHS: dict[str, Any] = {
    "squares": (squares, NORMAL_21, [(2.86612, 1e-6), (0.700226, 1e-12), (0.118129, 1e-20),
                                     (0.0131218, 1e-30)]),
    "product": (product, NORMAL_21, [(1e-10, 8.040e-5), (1e-20, 1.537e-9), (1e-30, 2.270e-14)]),
    "ball in 10": (squares, CUBE_10, [(0.25, math.exp(log_ball(10, 0.5))),
                                      (0.0025, math.exp(log_ball(10, 0.05)))]),
    "ball in 21": (squares, CUBE_21, [(0.25, math.exp(log_ball(21, 0.5)))]),
    "ties": (share_positive, NORMAL_21, [(3 / 21, COINS.cdf(3)), (0.0, 0.5**21)]),
    "ties by redraws": (share_positive, coins, [(3 / 21, COINS.cdf(3))]),
}  # fmt: skip


def search(name="squares", last=0, key=KEY, loss_fn=loss_fn, **options):
    """A search of one of these, down to one of its losses."""
    loss, sample_fn, truths = TRUTHS[name]
    losses = [loss for loss, _ in truths[: last + 1]]
    settings: Any = {
        "target_loss": losses[-1],
        "levels": losses[:-1],
        "num_particles": 100,
        **options,
    }
    number = np.int32(LOSSES.index(loss))
    return jaxnn.rare_event_search(key, loss_fn, sample_fn, number, **settings | options)


def covered(name, searches, **options):
    """How many searches, of different keys, cover each truth by their intervals."""
    *_, truths = TRUTHS[name]
    hits = np.zeros(len(truths), int)
    for seed in range(searches):
        found = search(name, len(truths) - 1, jax.random.key(seed), **options)
        for place, (loss, truth) in enumerate(truths):
            at = found.curve.loss == np.float32(loss)  # not there if no run has come so far
            low, high = found.curve.low[at], found.curve.high[at]
            hits[place] += np.any((low <= math.log(truth)) & (math.log(truth) <= high))
    return hits


def check_coverage(name, searches=10, least=8, **options):
    hits = covered(name, searches, **options)
    assert np.all(hits >= least), hits


# --- the truths


def test_the_truths_are_right():
    losses, probabilities = zip(*TRUTHS["squares"][2], strict=True)
    np.testing.assert_allclose(log_normals(np.array(losses)), np.log(probabilities), rtol=1e-5)
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (100_000, 3))
    share = np.mean(np.sum(points**2, axis=1) < 0.81)
    assert share == pytest.approx(math.exp(log_ball(3, 0.9)), abs=0.006)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "num_moves"),
    [
        ("ties", 5),
        pytest.param("product", 5, marks=SLOW),
        *(pytest.param(name, 10, marks=SLOW) for name in TRUTHS if name not in ("ties", "product")),
    ],
)
def test_intervals_cover_the_truth(name, num_moves):
    check_coverage(name, num_moves=num_moves)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TRUTHS)
def test_intervals_cover_the_truth_about_as_often_as_they_say(name):
    hits = covered(name, 100, num_particles=300)
    assert np.all((hits >= 90) & (hits <= 99)), hits


@pytest.mark.parametrize(
    ("particles", "searches", "most"),
    [
        pytest.param(1_000, 8, 0.25, marks=SLOW),  # 0.16 by counting
        pytest.param(2_000, 16, 0.15, marks=pytest.mark.exhaustive),  # 0.11
    ],
)
def test_the_error_at_one_in_1e30_is_small(particles, searches, most):
    logs = [search(last=3, key=jax.random.key(seed), num_particles=particles).log_probability
            for seed in range(searches)]  # fmt: skip
    assert np.std(logs, ddof=1) <= most
    assert np.mean(logs) == pytest.approx(math.log(1e-30), abs=most)


# --- kernels that are wrong


def of_steps(size_after, problem, form, key, particle, level, num_moves):
    """Steps in place of slices, whose size follows from whether the one before was made."""

    def move(number, carry):
        (here, loss), size = carry
        fresh = splitting.draw(problem, form, jax.random.fold_in(key, number))
        there = jnp.sqrt(1 - size**2) * here + size * fresh
        found = splitting.loss_at(problem, there)
        is_made = found <= level
        chosen = jnp.where(is_made, there, here), jnp.where(is_made, found, loss)
        return splitting.Particles(*chosen), size_after(size, is_made)

    start = particle, jnp.float32(0.5)
    return *jax.lax.fori_loop(0, 10 * num_moves, move, start)[:1], 10 * num_moves, num_moves


WRONG = {
    "one step size": ("product", lambda size, is_made: size),
    "adapted while counting": (
        "product", lambda size, is_made: jnp.where(is_made, jnp.minimum(2 * size, 1.0), size / 2)
    ),
    "leaves the prior": ("squares", None),
}  # fmt: skip


@SLOW
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_does_not_cover_the_truth(wrong, monkeypatch):
    name, size_after = WRONG[wrong]
    if size_after is None:
        path = lambda *given: 0.98 * splitting.rotate(*given)  # noqa: E731
        kernel = splitting.KERNELS["normal"]._replace(path=path)
        monkeypatch.setitem(splitting.KERNELS, "normal", kernel)
    else:
        monkeypatch.setattr(splitting, "move_particle", partial(of_steps, size_after))
    loss, sample_fn, truths = TRUTHS[name]
    monkeypatch.setitem(TRUTHS, name, (loss, sample_fn, truths[1:2]))
    # Another function, for which nothing is compiled yet.
    another = lambda params, batch: loss(params)  # noqa: E731
    with pytest.raises(AssertionError):
        check_coverage(name, num_moves=5, loss_fn=another)


# --- what comes back


@pytest.fixture(scope="module")
def to_1e12():
    return search(last=1, num_runs=10, metric_fn=lambda params, batch: params[0])


def test_particles_at_a_level_are_the_prior_below_it(to_1e12):
    particles = to_1e12.particles
    assert particles.params.shape == (2 * 10 * 100, 21)
    np.testing.assert_array_equal(particles.metric, particles.params[:, 0])
    np.testing.assert_allclose(particles.loss, np.sum(particles.params**2, axis=1), rtol=1e-5)
    for level in np.array([2.86612, 0.700226], np.float32):
        mine = particles.level == level
        assert np.bincount(particles.run[mine]).tolist() == [100] * 10
        below = particles.loss[mine]
        assert np.all(below <= level)
        # Below a small loss the density of chi2(21) is nearly that of a power.
        shares = np.exp(log_normals(below) - log_normals(level))
        assert abs(np.mean(shares) - 0.5) < 0.06


def test_the_result_belongs_together():
    found = search("product", 2)
    for loss, truth in TRUTHS["product"][2]:
        (at,) = np.flatnonzero(found.curve.loss == np.float32(loss))
        width = found.curve.high[at] - found.curve.low[at]  # four deviations
        assert abs(found.curve.log_probability[at] - math.log(truth)) < width
    assert (found.status, found.level) == ("reached", np.float32(1e-30))
    assert found.loss <= found.level
    assert found.loss == pytest.approx(float(product(found.params)), rel=1e-5)
    assert np.all(np.diff(found.curve.loss) > 0)
    assert np.all(np.diff(found.curve.log_probability) >= 0)
    assert np.all(found.curve.high <= 0)
    assert found.curve.log_probability[0] == found.log_probability
    for run, levels in enumerate(found.history.level):
        mine = found.samples.run == run
        assert special.logsumexp(found.samples.log_weight[mine]) == pytest.approx(0, abs=1e-9)
        assert np.all(np.diff(levels) <= 0)
    assert found.num_evaluations > 4 * 100 * 5 * found.history.level.shape[1]
    lines = str(found)
    assert "10^-13." in lines
    assert "rare-event search" in lines
    assert len(lines.splitlines()) == 7 + len(found.notes)


@SLOW
def test_the_curve_goes_through_the_counts_of_plain_sampling():
    found = search(num_particles=1_000)
    drawn = stats.chi2(21).rvs(100_000, random_state=1)
    for place in range(0, len(found.curve.loss), 7):
        count = np.sum(drawn <= found.curve.loss[place])
        if count > 200:
            low, high = found.curve.low[place], found.curve.high[place]
            assert low - 0.2 < math.log(count / len(drawn)) < high + 0.2


def test_the_evidence_of_a_gaussian(to_1e12):
    betas = np.array([[0.0, 0.5], [2.0, 8.0]])
    value, low, high = jaxnn.log_evidence(to_1e12, betas)
    truth = -21 / 2 * np.log1p(2 * betas)
    assert value.shape == betas.shape
    assert value[0, 0] == pytest.approx(0, abs=1e-9)
    assert np.all((low - 1e-9 <= truth) & (truth <= high + 1e-9))
    assert np.all(high - low < 1.5)
    with pytest.raises(ValueError, match="beta must be numbers of at least 0"):
        jaxnn.log_evidence(to_1e12, -1.0)
    with pytest.raises(TypeError, match="result must be that of rare_event_search; got a int"):
        jaxnn.log_evidence(3, 1.0)  # pyright: ignore[reportArgumentType]


@SLOW
def test_more_than_a_thousand_decades_are_numbers():
    size, loss = 400, 9e-4
    terms = np.cumprod(loss / 2 / (size / 2 + np.arange(1, 9)))
    truth = size / 2 * math.log(loss / 2) - loss / 2 - special.gammaln(size / 2 + 1)
    truth += math.log1p(terms.sum())
    options: Any = {"max_levels": 4_000, "num_particles": 50, "num_moves": 3}
    given = KEY, loss_fn, sampler("normal", size), np.int32(0)
    found = jaxnn.rare_event_search(*given, target_loss=loss, **options)
    assert found.status == "reached"
    assert found.low < truth < found.high < -1_000 * math.log(10)


# --- how it ends


@pytest.mark.parametrize(
    ("loss", "options", "status", "level", "log_probability", "note"),
    [
        (constant, {}, "converged", 1.0, 0.0, "nothing lower"),
        (share_positive, {"target_loss": -1.0}, "converged", 0.0, 21 * math.log(0.5), "nothing"),
        (not_a_number, {}, "nonfinite", np.inf, 0.0, "not finite"),
        (half_nan, {"target_loss": 3.0}, "reached", 3.0, None, "not finite"),
        (squares, {"max_levels": 3}, "completed", None, 3 * math.log(0.5), None),
    ],
)  # fmt: skip
def test_numerical_outcomes_are_data(loss, options, status, level, log_probability, note):
    settings: Any = {"target_loss": 0.0, "num_particles": 100, **options}
    number = np.int32(LOSSES.index(loss))
    found = jaxnn.rare_event_search(KEY, loss_fn, NORMAL_21, number, **settings)
    assert found.status == status
    assert level in (None, found.level)
    if log_probability is not None:
        assert found.low - 0.05 <= log_probability <= found.high + 0.05
    assert note is None or note in str(found)
    assert (found.params is None) == (status == "nonfinite")
    if loss is half_nan:
        truth = math.log(0.5 * stats.norm.cdf(1)) + log_normals(3.0)
        assert abs(found.log_probability - truth) < 1.5


def test_particles_that_hardly_move_are_told_of():
    plain = lambda key: jax.random.normal(key, (2,))  # noqa: E731
    found = jaxnn.rare_event_search(KEY, lambda params, batch: product(params), plain, None,
                                    target_loss=1e-30, num_particles=50)  # fmt: skip
    assert "hardly move" in str(found)
    assert found.status == "converged"
    assert found.level > 1e-30


@SLOW
def test_redraws_do_not_come_as_far_and_say_so():
    found = search("ties by redraws", target_loss=0.0)
    assert found.status == "converged"
    assert any("do not believe what is below it" in note for note in found.notes)


@SLOW
def test_runs_that_disagree_are_told_of():
    def two_funnels(params, batch):
        wide, deep = jnp.sum((params - 0.5) ** 2), jnp.sum((params + 2) ** 2)
        return jnp.where(deep < 1, 1e-2 * deep, squares(params) + 0 * wide + 0.01)

    found = jaxnn.rare_event_search(KEY, two_funnels, sampler("normal", 3), None, num_moves=1,
                                    target_loss=1e-5, num_particles=30, num_runs=8)  # fmt: skip
    assert found.notes


def test_a_run_alone_says_so():
    assert "one run" in str(search(num_runs=1))


def test_callbacks_and_time_stop_it(monkeypatch):
    monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", 1e-9)
    found = search(callback=stop_after(3, seen := []))
    assert (found.status, found.history.level.shape) == ("stopped", (4, 3))
    assert seen[-1].loss == found.loss
    assert same(seen[-1].best_params(), found.params)
    assert seen[-1].num_evaluations == found.num_evaluations
    assert search(max_seconds=1e-6).history.level.shape == (4, 1)


# --- the same again


def test_a_resumed_search_equals_one_in_a_piece(tmp_path, monkeypatch):
    path, whole = tmp_path / "search.npz", search(last=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SECONDS_PER_CHUNK", 1e-9)
        part = search(last=1, checkpoint=path, callback=stop_after(22, []))
    assert part.status == "stopped"
    assert same(search(last=1, checkpoint=path), whole)
    monkeypatch.delattr(module, "run_at_once")
    with pytest.raises(NameError):
        search(last=1)
    monkeypatch.undo()
    assert same(search(last=1, checkpoint=path), whole)
    assert jaxnn.saved_progress(path).trainer == "rare_event_search"
    changes: Any = {"num_moves": 3, "levels": [1.0], "num_runs": 3, "num_particles": 99}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=name):
            search(last=1, checkpoint=path, **{name: value})
    with pytest.raises(ValueError, match="max_levels must be at least"):
        search(last=1, checkpoint=path, max_levels=5)


def test_devices_change_nothing_and_a_run_does_not_know_the_others():
    whole = search()
    assert same(search(devices=jax.devices() * 3), whole)
    two = search(num_runs=2)
    assert same(two.history, jax.tree.map(lambda leaf: leaf[:2, : two.history.level.shape[1]],
                                          whole.history))  # fmt: skip
    assert search(key=jax.random.key(3)).log_probability != whole.log_probability


def test_other_numbers_compile_nothing():
    search()
    before, twice = len(TRACED), Partial(NORMAL_21.func, scale=np.float32(2))
    options: Any = {"target_loss": 11.5, "levels": [20.0], "num_moves": 3, "num_particles": 100}
    found = jaxnn.rare_event_search(KEY, loss_fn, twice, np.int32(0), **options)
    assert found.log_probability == pytest.approx(log_normals(11.5 / 4), abs=2)
    assert len(TRACED) == before


# --- networks


@SLOW
def test_the_counts_of_a_billion_networks_are_covered():
    """The README's counts of 10^9 candidates: 1,147, 25,150 and 254,700 of them."""
    batch = jaxnn.datasets.vertical(jax.random.split(jax.random.key(0), 3)[0], samples=100)
    model = jaxnn.mlp((2, 3, 3))
    given = model.loss, model.sampler(scale=4.0), batch
    found = jaxnn.rare_event_search(KEY, *given, target_loss=0.2, levels=[0.3, 0.5])
    assert found.num_evaluations < 2e7
    for loss, share in ((0.2, 1.147e-6), (0.3, 2.515e-5), (0.5, 2.547e-4)):
        (at,) = np.flatnonzero(found.curve.loss == np.float32(loss))
        assert found.curve.low[at] < math.log(share) < found.curve.high[at]


@pytest.mark.exhaustive
def test_all_networks_of_two_weights_each_are_counted():
    """2-3-3 with weights +-3: all 2^21 are enumerated, and every level is held against them."""
    batch = jaxnn.datasets.vertical(jax.random.key(1), samples=20)
    model = jaxnn.mlp((2, 3, 3))
    unit: Any = model.sampler(scale=3.0)
    to_params = unit.func.to_params

    def signed(draws):
        return to_params(jnp.where(draws > 0, 1.0, -1.0), scale=3.0, bias_scale=None)

    def sample_fn(key):
        return signed(jax.random.normal(key, (21,)))

    vars(sample_fn)["traits"] = Traits(unit_draws=UnitDraws("normal", 21, signed))
    bits = lambda low: (np.arange(low, low + 2**15)[:, None] >> np.arange(21) & 1) * 2 - 1  # noqa: E731
    losses_of = jax.jit(jax.vmap(lambda draws: model.loss(signed(draws), batch)))
    losses = np.sort(np.concatenate(
        [losses_of(np.float32(bits(low))) for low in range(0, 2**21, 2**15)]))  # fmt: skip
    hits = []
    for seed in range(10):
        key, target = jax.random.key(seed), float(losses[20])
        found = jaxnn.rare_event_search(key, model.loss, sample_fn, batch, target_loss=target)
        # Networks with the same loss are told apart by rounding, which differs between programs.
        ends = [np.searchsorted(losses, found.curve.loss * each) for each in (1 - 1e-6, 1 + 1e-6)]
        least, most = np.log(np.maximum(ends, 0.5) / 2**21)
        hits.append((found.curve.low <= most) & (least <= found.curve.high))
    assert np.mean(np.concatenate(hits)) >= 0.9


# --- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_particles": 1}, ValueError, "num_particles must be an integer of at least 2; got 1"),
        ({"num_runs": 0}, ValueError, "num_runs must be an integer of at least 1"),
        ({"num_moves": 0}, ValueError, "num_moves must be"),
        ({"max_levels": 0}, ValueError, "max_levels must be"),
        ({"target_loss": np.nan}, ValueError, "target_loss must be"),
        ({"target_loss": None}, TypeError, "target_loss must be a number"),
        ({"levels": [1.0, 0.1]}, ValueError, "levels must be finite and above"),
        ({"metric_fn": lambda params, batch: params}, TypeError, "metric_fn must return a float"),
        ({"metric_fn": 3}, TypeError, "metric_fn must be callable"),
        ({"devices": []}, ValueError, "devices must hold at least one device"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        search(**options)


@pytest.mark.parametrize(
    ("sample_fn", "error", "message"),
    [
        (lambda key: jnp.ones(3), ValueError, "sample_fn must draw from its key"),
        (lambda key: jax.random.bits(key, (3,)), TypeError, "params must be floats"),
        (sampler("normal", 4), None, None),
    ],
)
def test_samplers_are_checked(sample_fn, error, message):
    def loss_fn(params, batch):
        return jnp.sum(jnp.asarray(params, jnp.float32)) + batch

    if error is None:
        wrong = UnitDraws("normal", 4, lambda draws, scale: draws[:3])
        vars(sample_fn.func)["traits"] = Traits(unit_draws=wrong)
        error, message = TypeError, "unit_draws.to_params must return params like"
    with pytest.raises(error, match=message):
        jaxnn.rare_event_search(KEY, loss_fn, sample_fn, jnp.float32(0), target_loss=-9.0)


@pytest.mark.parametrize("distribution", ["normal", "uniform", "lecun", "he"])
def test_samplers_of_models_name_their_draws(distribution):
    """The unit draws of a key, mapped, are the params of that key."""
    sample: Any = jaxnn.mlp((2, 3, 3)).sampler(scale=(2.0, 3.0), distribution=distribution)
    unit = sample.func.traits.unit_draws
    assert unit.size == 21
    flat = (uniforms if unit.distribution == "uniform" else normals)(KEY, 21)
    assert (unit.distribution == "uniform") == (distribution == "uniform")
    assert same(unit.to_params(flat, **sample.keywords), sample(KEY))
