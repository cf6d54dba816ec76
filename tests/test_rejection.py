"""Early rejection: what is left out changes nothing of what a search was asked for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from search_setups import set_up

import jaxnn
from jaxnn.run import loop
from jaxnn.run.random import normals
from jaxnn.search import evaluate, rejection
from jaxnn.typing import Traits, traits_of

KEY = jax.random.key(3)
ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(60, 2)), jnp.float32)


def absolute_error(params, batch):
    """The mean over the rows of their distances from a line; it is its own lower bound."""
    loss = jnp.mean(jnp.abs(batch[:, 1] - params[0] * batch[:, 0] - params[1]))
    return jnp.where(params[0] > 2.2, jnp.nan, jnp.where(params[0] < -2.4, jnp.inf, loss))


vars(absolute_error)["traits"] = Traits(lower_bound=absolute_error)


def draw(scale, key):
    return scale * normals(key, 2)


sample_fn = Partial(draw, np.float32(2))
OWN = (KEY, absolute_error, sample_fn, ROWS)
OPTIONS = {
    "num_candidates": 6_000,
    "memory_budget": 2**16,
    "top_k": 5,
    "thresholds": [0.9, 1.1],
    "collect": jaxnn.Collect(1.0, 50),
}
"""The same shapes wherever a test allows it, so that little is compiled."""
SCORED = []


def counting(is_dropped, score, states, size, tile, reduce_survivors=rejection.reduce_survivors):
    """`reduce_survivors` that notes how many candidates are scored at a time."""

    def counted(states, offset, inside):
        jax.debug.callback(lambda inside: SCORED.append(int(np.sum(inside))), inside)
        return score(states, offset, inside)

    return reduce_survivors(is_dropped, counted, states, size, tile)


@pytest.fixture
def short(monkeypatch):
    """Short chunks and few rows a block."""
    monkeypatch.setattr(rejection, "ROWS_PER_BLOCK", 8)
    monkeypatch.setattr(rejection, "reduce_survivors", counting)
    monkeypatch.setattr(loop, "SECONDS_PER_CHUNK", 1e-9)
    monkeypatch.setattr(loop, "LARGEST_GROWTH", 1e9)


@pytest.fixture
def eager(short, monkeypatch):
    """A bound that is always thought to be worth it."""
    monkeypatch.setattr(rejection, "WORTH", np.inf)


@pytest.fixture
def looked_at(monkeypatch):
    """The numbers of blocks that the chunks of the searches looked at."""
    numbers, choose = [], rejection.best_num_blocks

    def best_num_blocks(dropped, share):
        numbers.append(choose(dropped, share))
        return numbers[-1]

    monkeypatch.setattr(rejection, "best_num_blocks", best_num_blocks)
    return numbers


def check_same(found, whole, highest):
    """All but the losses above the highest that matters is the same, bit for bit."""
    given_up = {"histogram": None, "num_nonfinite": None}
    leaves, others = (jax.tree.leaves(each._replace(**given_up)) for each in (found, whole))
    for leaf, other in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert found.num_nonfinite is None
    assert found.histogram.highest == np.float32(highest)
    # Bins below the highest count the same; the one that holds it counts up to it.
    edges = found.histogram.edges[1:] <= found.histogram.highest
    for edge, counted in zip(
        found.histogram.edges[:-1][edges], found.histogram.counts, strict=False
    ):
        assert counted == whole.histogram.counts[np.searchsorted(whole.histogram.edges, edge)]
    if len(whole.counts.num_below):
        assert found.histogram.counts.sum() >= whole.counts.num_below[-1]


@pytest.mark.parametrize("keep_below", [0.0, 1.3])
def test_a_loss_of_ones_own_finds_the_same_with_and_without(eager, looked_at, keep_below):
    whole = jaxnn.random_search(*OWN, **OPTIONS)
    found = jaxnn.random_search(*OWN, **OPTIONS, keep_below=keep_below)
    check_same(found, whole, highest := max(keep_below, 1.1))
    losses = evaluate(*OWN, count=6_000, memory_budget=2**16)
    assert found.histogram.counts.sum() == np.sum(losses <= np.float32(highest)) > 0
    assert max(looked_at) >= 1
    assert whole.num_nonfinite  # NaN and inf were among them
    with pytest.raises(ValueError, match="histogram must count all losses; got one of a search"):
        jaxnn.expected_best(found.histogram, 10)


def test_few_candidates_are_scored(eager):
    options = {**OPTIONS, "thresholds": [-2.0, -1.0], "collect": jaxnn.Collect(-1.0, 50)}
    SCORED.clear()
    jaxnn.random_search(*OWN, **options, keep_below=0.0)
    jax.effects_barrier()
    assert 0 < sum(SCORED) < 3_000  # of 6,000


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(203))
def test_networks_find_the_same_with_and_without(eager, monkeypatch, number):
    monkeypatch.setattr(rejection, "WORTH", [np.inf, 0.8][number % 2])
    keep_below = float(np.random.default_rng(number).uniform(0, 2))
    given, options = set_up(number)
    whole = jaxnn.random_search(*given, **options)
    found = jaxnn.random_search(*given, **options, keep_below=keep_below)
    highest = max(keep_below, options["thresholds"][-1], options["collect"].threshold)
    check_same(found, whole, highest)


WIDE = [
    ((2, 40, 3), "softmax", "categorical_crossentropy"),
    ((2, 40, 2), "sigmoid", "binary_crossentropy"),
    ((2, 40, 2), "tanh", "mean_squared_error"),
]


def weighted():
    """A network and rows with weights, some of them a thousand times others."""
    model, rng = jaxnn.mlp((2, 3, 3)), np.random.default_rng(4)
    weights = rng.random(60) * 10.0 ** rng.integers(0, 4, 60)
    return model, jaxnn.Batch(np.asarray(ROWS), rng.integers(0, 3, 60), weights)


@pytest.mark.slow
def test_weights_leave_out_nothing_either(eager, looked_at):
    model, batch = weighted()
    given = KEY, model.loss, model.sampler(scale=4.0), batch
    whole = jaxnn.random_search(*given, num_candidates=6_000, top_k=5)
    found = jaxnn.random_search(*given, num_candidates=6_000, top_k=5, keep_below=0.0)
    check_same(found, whole, 0.0)
    assert max(looked_at) >= 1


def test_the_bound_of_rows_with_weights_is_the_mean_of_those_of_its_blocks():
    model, batch = weighted()
    traits, params = traits_of(model.loss), model.sampler(scale=4.0)(KEY)
    bound, scaled = traits.lower_bound or pytest.fail("no bound"), traits.bound_batch(batch)
    blocks = [jax.tree.map(lambda leaf, n=n: np.asarray(leaf)[n::4], scaled) for n in range(4)]
    bounds = sum(map(partial(jax.jit(bound), params), blocks)) / 4
    loss = model.loss(params, batch)
    assert loss - np.log(3) < bounds <= loss * (1 + 1e-6)


@pytest.mark.parametrize(
    ("sizes", "output", "loss"),
    [
        *(pytest.param(*each, marks=pytest.mark.slow) for each in WIDE[::2]),
        WIDE[1],
        ((2, 3, 3), *WIDE[0][1:]),
    ],
)
def test_the_bound_of_a_network_is_below_its_loss_and_not_far(sizes, output, loss):
    model, rng = jaxnn.mlp(sizes, output=output, loss=loss), np.random.default_rng(2)
    rows = rng.normal(size=(40, 2)).astype(np.float32)
    params = jax.jit(jax.vmap(model.sampler(scale=8.0)))(jax.random.split(KEY, 64))
    kinds = [rng.integers(0, 3, 40), rng.random((40, 3))]
    bound = traits_of(model.loss).lower_bound or pytest.fail("the loss has no bound")
    for targets in kinds if sizes[-1] == 3 else [rng.random((40, 2))]:
        batch = jaxnn.Batch(rows, targets)
        losses, bounds = jax.jit(
            lambda *given: [jax.vmap(f, (0, None))(*given) for f in (model.loss, bound)]
        )(params, batch)
        assert np.all(bounds >= 0)
        assert np.all(bounds <= losses * (1 + 1e-6))
        # What is left out is the log of a factor: of classes at most their number, of bits 2 each.
        factor = {"softmax": 3 if targets.ndim == 1 else 1, "sigmoid": 2, "tanh": 1}[output]
        assert np.all(losses - bounds <= np.log(factor) + 1e-6 * losses)


def test_a_resumed_search_is_the_whole_and_another_limit_is_refused(eager, tmp_path):
    path = tmp_path / "search.npz"
    whole = jaxnn.random_search(*OWN, **OPTIONS, keep_below=1.3)
    first = {**OPTIONS, "num_candidates": 2_500}
    jaxnn.random_search(*OWN, **first, keep_below=1.3, checkpoint=path)
    found = jaxnn.random_search(*OWN, **OPTIONS, keep_below=1.3, checkpoint=path)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(leaf, other)
    with pytest.raises(ValueError, match="keep_below"):
        jaxnn.random_search(*OWN, **OPTIONS, keep_below=1.4, checkpoint=path)


def test_losses_that_lie_close_together_are_all_scored(short, looked_at):
    narrow = Partial(draw, np.float32(1e-3))
    jaxnn.random_search(KEY, absolute_error, narrow, ROWS, **OPTIONS, keep_below=0.0)
    assert max(looked_at) == 0


@pytest.mark.parametrize(
    ("dropped", "number"), [([0.0, 0.9, 0.95], 2), ([0.9, 0.91, 0.92], 1), ([0.0, 0.1, 0.4], 0)]
)
def test_as_many_rows_come_first_as_make_the_least_work(dropped, number):
    assert rejection.best_num_blocks(np.array(dropped), 0.1) == number


def test_rows_are_looked_at_in_an_order_that_is_even():
    params, loss = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2,), ()))
    rows = jnp.arange(600.0).reshape(300, 2) // 2
    plan = rejection.as_rejection(absolute_error, params, rows, 0.0, loss)
    classes = np.asarray(plan.blocks)[0, :, 0] // 100
    assert np.ptp(np.bincount(classes.astype(int), minlength=3)) <= 2


def test_what_has_no_bound_or_no_rows_is_refused():
    def bare(params, batch):
        return absolute_error(params, batch)

    def paired(params, batch):
        return absolute_error(params, batch[0]) * batch[1]

    vars(paired)["traits"] = Traits(lower_bound=paired)
    with pytest.raises(ValueError, match="keep_below needs a loss_fn whose traits have a lower_bo"):
        jaxnn.random_search(KEY, bare, sample_fn, ROWS, num_candidates=10, keep_below=0.0)
    with pytest.raises(ValueError, match="keep_below needs a batch whose arrays all have the rows"):
        jaxnn.random_search(KEY, paired, sample_fn, (ROWS, 1.0), num_candidates=10, keep_below=0.0)
    vars(bare)["traits"] = Traits(lower_bound=lambda params, batch: params)
    with pytest.raises(TypeError, match=r"loss_fn.traits.lower_bound must return a .*scalar"):
        jaxnn.random_search(KEY, bare, sample_fn, ROWS, num_candidates=10, keep_below=0.0)
    vars(bare)["traits"] = Traits(lower_bound=lambda params, batch: jnp.float16(0))
    with pytest.raises(TypeError, match=r"must return float32, as loss_fn does; got float16"):
        jaxnn.random_search(KEY, bare, sample_fn, ROWS, num_candidates=10, keep_below=0.0)
    with pytest.raises(ValueError, match="keep_below must be"):
        jaxnn.random_search(*OWN, num_candidates=10, keep_below=np.nan)
