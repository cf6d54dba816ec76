"""The step of a chain: what it says, and that perturbation search is its scan, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain_setups import (
    FAMILY,
    KEY,
    NETWORK,
    ROUNDED,
    ROWS,
    STAIRS,
    START,
    WIDE,
    chain_of,
    fresh,
    loss_fn,
    network_search,
    one_by_one,
    scan_of,
    search,
    searched,
)
from jax.flatten_util import ravel_pytree
from tolerances import same

from jaxnn import moves
from jaxnn.chains import chain_key, kernel, perturbation_kernel
from jaxnn.optim.schedules import as_schedule
from jaxnn.run.random import normals

EXHAUSTIVE, SLOW = pytest.mark.exhaustive, pytest.mark.slow


def assert_same_chain(found, scanned):
    (state, info), history, last = scanned, found.history, chain_of(found)
    assert 3 < found.num_accepted < 245
    for name in ("proposed_loss", "accepted", "scale"):
        np.testing.assert_array_equal(getattr(history, name), getattr(info, name), err_msg=name)
    for name in state._fields:
        assert same(getattr(last, name), getattr(state, name)), name
    np.testing.assert_array_equal(history.num_accepted, np.cumsum(info.accepted))
    if history.proposed_metric is not None:
        np.testing.assert_array_equal(history.proposed_metric, info.proposed_params["b"][:, 0])
    assert same(found.params, state.best_params)
    assert found.loss == state.best_loss == np.min(history.best_loss)
    assert history.current_loss[-1] == state.loss


QUICK = [pytest.param(n, marks=EXHAUSTIVE) if n == "restarts of two" else n for n in FAMILY]


@pytest.mark.parametrize("name", QUICK)
def test_the_search_is_the_scan_of_the_step(name):
    """With a loss of a user's own, which rounds differently with the number side by side."""
    assert_same_chain(searched(name, batch=ROUNDED), scan_of(name)(batch=ROUNDED))


@pytest.mark.parametrize("name", QUICK)
def test_every_step_follows_the_rules_in_plain_python(name):
    """Replayed from the recorded losses alone, with nothing of the kernel but its tags."""
    options = {"scale": 0.3, "temperature": None, "restart": None, **FAMILY[name]}
    state, info = scan_of(name)(batch=STAIRS)
    steps, scale, heat = np.arange(250), options["scale"], options["temperature"]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(chain_key(KEY, 0), steps)
    draw_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, kernel.METROPOLIS)
    draws = np.asarray(jax.vmap(jax.random.exponential)(draw_keys))
    adapts = isinstance(scale, kernel.OneFifth)
    initial = as_schedule("scale", scale.initial if adapts else scale)
    loss = best = since_restart = np.float32(loss_fn(START, STAIRS))
    exponent = since = 0
    for step in steps:
        expected = initial(np.float32(step)) * 2 ** (exponent / 4 if adapts else 0)
        assert info.scale[step] == pytest.approx(float(expected), rel=1e-6)
        proposed = info.proposed_loss[step]
        renewed = bool(options["restart"]) and since >= options["restart"].patience
        accepted = proposed < loss or renewed or (heat == 0.0 and proposed == loss)
        if heat:
            at = np.float32(as_schedule("temperature", heat)(np.float32(step)))
            accepted |= proposed - loss <= at * draws[step]
        assert info.accepted[step] == (accepted and np.isfinite(proposed))
        exponent = max(-200, min(200, exponent + (4 if proposed < loss and accepted else -1)))
        since += 1
        if info.accepted[step]:
            loss, exponent = proposed, 0 if renewed else exponent
            if renewed or loss < since_restart:
                since_restart, since = loss, 0
            best = min(best, loss)
    ties = info.proposed_loss == before(info.proposed_loss, info.accepted)
    assert heat != 0.0 or np.any(info.accepted & ties)
    counted = state.loss, state.best_loss, state.best_since_restart, state.steps_since_improvement
    assert counted == (loss, best, since_restart, since)
    assert (state.exponent, state.step) == (exponent, 250)
    assert state.num_accepted == np.sum(info.accepted)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (NETWORK, {"scale": 0.1}),
        pytest.param(WIDE, {"scale": 0.1}, marks=SLOW),
        *(
            pytest.param(*each, marks=EXHAUSTIVE)
            for each in [
                (NETWORK, {"scale": moves.one_fifth(0.2), "temperature": 0.02, "num_proposals": 2}),
                (NETWORK, {"scale": 0.3, "restart": moves.restart(NETWORK.sampler(scale=1.0), 20)}),
                (WIDE, {"scale": 0.1, "temperature": 0.001, "num_proposals": 3}),
            ]
        ),
    ],
)
def test_the_search_of_a_network_is_the_scan_of_the_step(model, options):
    params = model.init(jax.random.key(2), scale=0.5)
    plain = options == {"scale": 0.1}
    found = network_search(model) if plain else network_search.__wrapped__(model, **options)
    assert_same_chain(found, one_by_one(model.loss, **options)(params, ROWS))


@SLOW
def test_a_network_by_scalars_is_the_same_beside_other_chains():
    many, alone = network_search(NETWORK, 20), network_search(NETWORK)
    assert same(many.history.proposed_loss[0], alone.history.proposed_loss)


@EXHAUSTIVE
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("batch", [STAIRS, ROUNDED])
def test_every_chain_of_a_search_is_a_scan(name, batch):
    found = searched(name, 4, batch)
    for chain in range(4):
        state, info = scan_of(name)(batch=batch, chain=chain)
        assert same(chain_of(found, chain), state)
        assert same(found.history.proposed_loss[chain], info.proposed_loss)


@pytest.mark.parametrize(("name", "num_chains"), [("all", 1), ("strict", 3)])
def test_a_search_goes_on_as_a_scan_from_its_states(name, num_chains):
    options = {**FAMILY[name], "num_chains": num_chains}
    whole, part = (search(num_steps=steps, **options) for steps in (400, 150))
    assert same(part.state.params, part.state.best_params) == (name == "strict")
    for chain in range(num_chains):
        state, _ = scan_of(name)(chain=chain, state=chain_of(part, chain))
        assert same(state, chain_of(whole, chain))


# --- what a step says


def before(losses, taken):
    """The loss before each step, of the losses proposed and accepted."""
    current, values = float(loss_fn(START, STAIRS)), []
    for loss, accepted in zip(losses, taken, strict=True):
        values.append(current)
        current = loss if accepted else current
    return np.array(values)


def test_metropolis_accepts_a_rise_with_its_probability():
    """Four standard errors of the number of rises accepted."""
    history = search(**FAMILY["metropolis"], num_steps=4_000).history
    accepted = history.accepted
    rises = np.maximum(history.proposed_loss - before(history.proposed_loss, accepted), 0)
    assert np.all(accepted[rises == 0])
    chances = np.exp(-rises[rises > 0] / 20)
    error = np.sum(accepted[rises > 0]) - np.sum(chances)
    assert abs(error) < 4 * np.sqrt(np.sum(chances * (1 - chances)))


def test_a_chain_without_a_lower_loss_for_patience_steps_starts_anew():
    _, info = scan_of("restarts")()
    losses, since, restarts = info.proposed_loss, 0, 0
    lowest = before(losses, info.accepted)[0]
    for step, accepted in enumerate(info.accepted):
        if since >= 20:
            step_key = jax.random.fold_in(chain_key(KEY, 0), step)
            drawn = fresh(jax.random.fold_in(step_key, kernel.FRESH))
            proposal = jax.tree.map(lambda leaf, step=step: leaf[step], info.proposed_params)
            np.testing.assert_allclose(
                ravel_pytree(proposal)[0], ravel_pytree(drawn)[0], rtol=1e-6, atol=1e-6
            )
            assert accepted
            since, lowest, restarts = 0, losses[step], restarts + 1
        else:
            improved = accepted and losses[step] < lowest
            since, lowest = (0, losses[step]) if improved else (since + 1, lowest)
    assert restarts > 5


@pytest.mark.parametrize(("name", "size", "count"), [("strict", 0.1, 1), ("best of three", 0.3, 3)])
def test_a_proposal_adds_noise_of_the_steps_own_key_and_the_best_one_stands(name, size, count):
    """From a loss that nothing lowers, so that every proposal starts from the same params."""
    start = jax.tree.map(np.zeros_like, START)
    _, info = scan_of(name)(start)
    assert not np.any(info.accepted)
    for step in (0, 1, 39):
        key = jax.random.fold_in(chain_key(KEY, 0), step)
        keys = [key] if count == 1 else [jax.random.fold_in(key, n) for n in range(count)]
        unravel = ravel_pytree(jax.tree.map(jnp.asarray, start))[1]
        drawn = [unravel(size * normals(key, 6)) for key in keys]
        losses = [float(loss_fn(params, STAIRS)) for params in drawn]
        assert info.proposed_loss[step] == min(losses)
        proposal = jax.tree.map(lambda leaf, step=step: leaf[step], info.proposed_params)
        for a, b in zip(*map(jax.tree.leaves, (proposal, drawn[np.argmin(losses)])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", ["strict", "ties", "metropolis"])
def test_losses_that_are_not_finite_are_never_accepted(name):
    broken = STAIRS._replace(nan_above=np.float32(2.6), inf_above=np.float32(-0.8))
    options = {**FAMILY[name], "scale": 0.3}
    if name == "metropolis":
        options["temperature"] = 1e9
    found = search(batch=broken, **options)
    losses, bad = found.history.proposed_loss, np.isposinf(found.history.proposed_loss)
    assert 10 < np.sum(bad) < 240
    assert np.all(np.isfinite(losses) | bad)
    assert not np.any(found.history.accepted & bad)
    if name == "strict":
        found = search(**FAMILY["strict"], batch=broken)
        assert_same_chain(found, scan_of("strict")(batch=broken))


def test_step_and_init_map_over_chains_and_over_scales():
    """What the caller maps is what it is one at a time: this loss has no rounding."""

    def last(scale, chain):
        kernel = perturbation_kernel(loss_fn, scale=scale)
        key, state = chain_key(keys[chain], 0), kernel.init(START, STAIRS)
        return jax.lax.scan(lambda s, _: kernel.step(key, s, STAIRS), state, length=60)[0]

    scales, keys = jnp.array([0.1, 0.3], jnp.float32), jax.random.split(KEY)
    many = jax.jit(jax.vmap(last))(scales, jnp.arange(2))
    for place in (0, 1):
        one = chain_of(search(scale=float(scales[place]), key=keys[place], num_steps=60))
        assert one.num_accepted == many.num_accepted[place] > 0
        assert one.loss == many.loss[place]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"propose_fn": lambda k, p, s: p["w"]}, "propose_fn must return params with the tree"),
        ({"restart": moves.restart(lambda key: 0.0, 5)}, "sample_fn must return params with the"),
        ({"restart": 5}, r"restart must be jaxnn\.moves\.restart\(\.\.\.\); got a int"),
        ({"loss_fn": lambda p, b: p["b"]}, "loss_fn must return a float scalar"),
        ({"scale": "far"}, "scale must be"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, message):
    options = {"loss_fn": loss_fn, "scale": 0.3, **options}
    with pytest.raises(TypeError, match=message):
        perturbation_kernel(options.pop("loss_fn"), **options).init(START, STAIRS)


def test_integers_are_no_params():
    kernel = perturbation_kernel(lambda params, batch: jnp.sum(params) + 0.5, scale=0.3)
    with pytest.raises(TypeError, match="params must be floats of one dtype; got int32"):
        kernel.init(jnp.arange(3), None)
