"""Coverage counts what NumPy counts, names the user's own lines, and knows what is no branch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxnn
from jaxnn.gradients.coverage import cover
from jaxnn.model.activations import HIDDEN_ACTIVATIONS

ROWS = 5
SAMPLES = np.random.default_rng(0).normal(size=(20, 3))
BATCH = np.random.default_rng(1).normal(size=(ROWS, 3))


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def at(function, line=1):
    """The place of a line of a function of this file, counted from its `def`."""
    name = function.__qualname__.rpartition("<locals>.")[2]
    return f"test_coverage.py:{function.__code__.co_firstlineno + line} ({name})"


def covered(loss, samples=SAMPLES, batch=BATCH, draw=None, limit=0):
    return cover(Partial(loss), samples, batch, draw, limit=limit)


def counts(loss, **options):
    return {branch[:2]: branch.counts for branch in covered(loss, **options)[0].branches}


def sides(first, second):
    return int(np.sum(first)), int(np.sum(second))


def pieces(params, batch):
    z = params[None] * batch
    a = jnp.maximum(z, 0.5)
    b = jnp.minimum(z, a / 2)
    c = jnp.where(z > 1, b, z)
    d = jnp.clip(z, -1, 2)
    e = jax.lax.clamp(-0.5, z, 0.25)
    f = jnp.abs(z) + z * jnp.sign(z - 1)
    g = z * (z < 0.3).astype(z.dtype)
    return jnp.sum(a + b + c + d + e + f + g) + jnp.sum(jnp.max(z, axis=0))


def test_counts_are_those_of_numpy_at_the_lines_of_the_user():
    z = SAMPLES[:, None] * BATCH
    a = np.maximum(z, 0.5)
    largest = np.argmax(z, axis=1)
    expected = {
        (at(pieces, 2), "max"): sides(z > 0.5, z < 0.5),
        (at(pieces, 3), "min"): sides(z < a / 2, z > a / 2),
        (at(pieces, 4), "where"): sides(z <= 1, z > 1),
        (at(pieces, 5), "clip low"): sides(z < -1, z > -1),
        (at(pieces, 5), "clip high"): sides(z > 2, z < 2),
        (at(pieces, 6), "clip low"): sides(z < -0.5, z > -0.5),
        (at(pieces, 6), "clip high"): sides(z > 0.25, z < 0.25),
        (at(pieces, 7), "abs"): sides(z < 0, z > 0),
        (at(pieces, 7), "sign"): sides(z < 1, z > 1),
        (at(pieces, 8), "mask"): sides(z >= 0.3, z < 0.3),
    } | {
        (at(pieces, 9), f"reduce_max at {place}"): sides(largest == place, largest != place)
        for place in range(ROWS)
    }
    assert counts(pieces) == expected
    visited = [count > 0 for both in expected.values() for count in both]
    assert covered(pieces)[0].share == np.mean(visited) < 1


def relu(z):
    return jnp.where(z > 0, z, 0)


def test_a_branch_visited_on_one_side_is_listed_with_its_line_until_a_sample_reaches_the_other():
    def loss(params, batch):
        return jnp.sum(relu(jnp.abs(params) + 1)) + jnp.sum(jnp.maximum(params, -4.0))

    only_counted, none = covered(loss)
    assert [branch[:2] for branch in only_counted.missed] == [
        (at(relu), "where"),
        (at(loss), "max"),
    ]
    assert (only_counted.share, len(none)) == (4 / 6, 0)
    coverage, added = covered(loss, limit=2_000)
    assert [branch[:2] for branch in coverage.missed] == [(at(relu), "where")]
    assert (coverage.share, coverage.num_samples) == (5 / 6, 20 + len(added))
    assert 0 < coverage.num_tried <= 2_000
    both = np.concatenate([SAMPLES, added])
    assert coverage.branches[-1].counts == sides(both > -4, both < -4)


def custom_relu(rule):
    def relu_with_a_rule(z):
        return jnp.where(z > 0, z, 0)

    function = rule(relu_with_a_rule)
    if rule is jax.custom_vjp:
        function.defvjp(lambda z: (relu(z), z), lambda z, slope: (slope * jnp.sign(relu(z)),))
    else:
        function.defjvp(lambda z, slope: (relu(*z), slope[0] * jnp.sign(relu(*z))))
    return function, relu_with_a_rule


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.custom_jvp, jax.custom_vjp])
def test_functions_that_a_loss_calls_are_looked_into_at_their_own_lines(wrap):
    function, inner = (wrap(relu), relu) if wrap in (jax.jit, jax.checkpoint) else custom_relu(wrap)
    found = counts(lambda params, batch: jnp.sum(function(params)))
    assert found == {(at(inner), "where"): sides(SAMPLES <= 0, SAMPLES > 0)}


def test_functions_of_jax_are_placed_where_they_are_called_and_named():
    def loss(params, batch):
        first = jax.nn.relu(params)
        return jnp.sum(first) + jnp.sum(jax.nn.relu(params - 1) + jax.nn.leaky_relu(params))

    assert counts(loss) == {
        (at(loss, 1), "max in relu"): sides(SAMPLES > 0, SAMPLES < 0),
        (at(loss, 2), "max in relu"): sides(SAMPLES > 1, SAMPLES < 1),
        (at(loss, 2), "where in leaky_relu"): sides(SAMPLES < 0, SAMPLES >= 0),
    }


def test_loops_count_every_turn_and_conds_what_they_ran():
    def loss(params, batch):
        def turn(carry, row):
            return jnp.maximum(carry, row), jnp.abs(row)

        highest, rows = jax.lax.scan(turn, params[0], batch[:, 0] + params[1], reverse=True)
        number = jnp.sum(params[2] > jnp.arange(2.0))
        halves = jax.lax.switch(number, [jnp.positive, jnp.negative, jnp.abs], params[0])
        unless = jax.lax.cond(params[0] > 5, lambda x: jnp.minimum(x, 7), jnp.sin, params[0])
        return highest + jnp.sum(rows) + halves + unless

    turn = next(each for each in loss.__code__.co_consts if hasattr(each, "co_firstlineno"))
    inside = f"test_coverage.py:{turn.co_firstlineno + 1} (turn)"
    rows = BATCH[None, ::-1, 0] + SAMPLES[:, 1:2]
    before = np.maximum.accumulate(np.concatenate([SAMPLES[:, :1], rows], axis=1), axis=1)[:, :-1]
    number = np.digitize(SAMPLES[:, 2], [0, 1])
    chosen = SAMPLES[number == 2, 0]
    expected = {
        (inside, "max"): sides(before > rows, before < rows),
        (inside, "abs"): sides(rows < 0, rows > 0),
        **{(at(loss, 6), f"cond at {n}"): sides(number == n, number != n) for n in range(3)},
        (at(loss, 6), "abs"): sides(chosen < 0, chosen > 0),
        (at(loss, 7), "cond"): (20, 0),
        (at(loss, 7).replace("(loss)", "(<lambda>)"), "min"): (0, 0),
    }
    assert counts(loss) == expected


def test_params_reach_what_a_loop_carries():
    def loss(params, batch):
        def turn(carry, row):
            return (carry[0], carry[0]), jnp.abs(carry[1] + row)

        return jnp.sum(jax.lax.scan(turn, (params[0], 0.0), batch[:, 0])[1])

    before = np.repeat(SAMPLES[:, :1], ROWS, axis=1) * (np.arange(ROWS) > 0)
    rows = before + BATCH[:, 0]
    assert list(counts(loss).values()) == [sides(rows < 0, rows > 0)]


def flat(params, batch):
    return jnp.mean(jnp.tanh(batch @ params) ** 2)


def of_the_batch(params, batch):
    return jnp.sum(jnp.where(batch > 0, params[None], params[None] ** 2)) + jnp.max(batch)


def unused(params, batch):
    _ = jnp.maximum(params, 0)
    return jnp.sum(params)


def stopped(params, batch):
    return jnp.sum(params * jax.lax.stop_gradient(jnp.abs(params)))


def smooth(params, batch):
    by_row = jax.nn.log_softmax(batch * params[None], axis=1) + jax.nn.softplus(params)[None]
    return jnp.sum(by_row) + jnp.sum(jnp.hypot(params, 1.0)) + jax.nn.logsumexp(params)


def padded(params, batch):
    clipped = jax.lax.clamp(-jnp.inf, params, jnp.inf)
    return jnp.sum(jnp.maximum(-jnp.inf, params) + jnp.minimum(params, jnp.inf) + clipped)


def guarded(params, batch):
    root = jnp.sqrt(params)
    return jnp.sum(jnp.where(jnp.isnan(root) | ~jnp.isfinite(params), params, 2 * params))


def of_nothing(params, batch):
    return jnp.max(params[:1]) + jnp.sum(params) + jnp.sum(jnp.maximum(params[3:], 0))


def of_complex_numbers(params, batch):
    return jnp.sum(jnp.abs(jnp.fft.fft(params)))


LOSSES = [flat, of_the_batch, unused, stopped, smooth, padded, guarded, of_nothing]
LOSSES += [of_complex_numbers]


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_no_branch(loss):
    coverage, added = covered(loss, limit=2_000)
    assert (coverage.branches, coverage.share, coverage.missed) == ((), 1, ())
    assert (len(added), coverage.num_tried, coverage.num_samples) == (0, 0, 20)


def test_what_chooses_in_other_ways_is_told_of_and_not_counted():
    def loss(params, batch):
        return jnp.sort(params)[0] + jnp.sort(batch)[0] + jnp.floor(params[0]) * params[0]

    found, _ = covered(loss, batch=BATCH[0])
    place = at(loss)
    assert sorted(found.uncounted) == [f"floor at {place}", f"sort at {place}"]
    assert covered(flat)[0].uncounted == ()


def test_a_tie_is_on_no_side():
    found = counts(lambda params, batch: jnp.sum(jnp.abs(0 * params) + jnp.maximum(params, params)))
    assert list(found.values()) == [(0, 0), (0, 0)]


def test_other_samples_are_drawn_first_and_then_aimed():
    def loss(params, batch):
        return jnp.sum(jnp.maximum(params, 50.0)) + jnp.sum(jnp.minimum(params, 2.5e4))

    def draw(number):
        asked.append(number)
        return np.full((number, 3), 60.0)

    asked = []
    coverage, added = covered(loss, draw=draw, limit=100)
    np.testing.assert_array_equal(added, [[60.0] * 3])
    assert (asked, coverage.num_tried) == ([50], 100)
    assert [branch.kind for branch in coverage.missed] == ["min"]
    moved = {"w": SAMPLES, "far": np.full((20, 1), 1e3)}
    coverage, added = cover(
        Partial(lambda params, batch: loss(params["w"] + params["far"], batch)), moved, None
    )
    assert coverage.share == 1
    assert np.min(added["w"] + added["far"]) < 50 < 2.5e4 < np.max(added["w"] + added["far"])


def test_one_leaf_alone_is_moved():
    def loss(params, batch):
        return jnp.sum(jnp.maximum(params["a"] / params["b"], 5.0))

    samples = {"a": np.abs(SAMPLES), "b": np.abs(SAMPLES) + 1}
    coverage, added = cover(Partial(loss), samples, None)
    assert (coverage.share, len(added["a"])) == (1, 1)
    assert np.max(samples["a"] / samples["b"]) < 5 < np.max(added["a"] / added["b"])


@pytest.mark.parametrize("limit", [3, 2_000])
def test_samples_without_finite_slopes_are_not_added(limit):
    def loss(params, batch):
        return jnp.sum(jnp.where(params > 5, jnp.inf * params, params))

    coverage, added = covered(loss, limit=limit)
    assert (coverage.share, len(added), coverage.num_samples) == (0.5, 0, 20)
    assert 0 < coverage.num_tried <= limit


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(name, marks=() if name in ("relu", "gelu") else pytest.mark.slow)
        for name in HIDDEN_ACTIVATIONS
    ],
)
def test_networks_of_jaxnn(hidden):
    batch = jaxnn.datasets.vertical(jax.random.key(0), samples=20, classes=3)
    model = jaxnn.mlp((2, 3, 3), hidden=hidden)
    samples = jax.jit(jax.vmap(model.sampler(scale=1.0)))(jax.random.split(jax.random.key(1), 40))
    samples, batch = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64 if leaf.dtype == np.float32 else None),
        (samples, batch),
    )
    coverage, added = cover(Partial(model.loss_reference), samples, batch)
    kinds = {
        "relu": ["where"],
        "leaky_relu": ["where in leaky_relu"],
        "elu": ["where in elu"] * 2,
        "gelu": ["max", "clip low", "clip high"],
    }
    assert [branch.kind for branch in coverage.branches] == kinds.get(hidden, [])
    assert coverage.share == 1
    assert (coverage.num_samples > 40) == (hidden == "gelu") == (len(added[0].biases) > 0)
    layer = samples[0]
    z = np.einsum("ri,siu->sru", batch.x, layer.weights) + layer.biases[:, None]
    if hidden in ("relu", "leaky_relu", "elu"):
        number = np.sum(z > 0)
        assert set(coverage.branches[0].counts) == {number, z.size - number}


def test_places_of_a_long_maximum_are_counted_together_from_the_16th_on():
    def loss(params, batch):
        return jnp.max(params), jnp.min(params.reshape(4, 5), axis=(0, 1))

    samples = np.random.default_rng(5).normal(size=(300, 20))
    found = counts(lambda *args: jnp.stack(loss(*args)).sum(), samples=samples)
    for name, at in (("reduce_max", np.argmax(samples, 1)), ("reduce_min", np.argmin(samples, 1))):
        places = np.bincount(np.minimum(at, 15))
        own = {kind: count for (_, kind), count in found.items() if name in kind}
        assert own == {f"{name} at {n}": (places[n], 300 - places[n]) for n in range(16)}


def test_nothing_is_compiled_twice(compilations):
    loss = Partial(lambda params, batch: jnp.sum(jnp.maximum(params, 0)))
    cover(loss, SAMPLES, None)
    before = [event for event, _ in compilations if "backend_compile" in event]
    cover(loss, -SAMPLES, None)
    assert [event for event, _ in compilations if "backend_compile" in event] == before
