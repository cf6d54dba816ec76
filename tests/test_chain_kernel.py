"""The step of a chain: what it says, and that perturbation search is its scan, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain_setups import (
    FAMILY,
    KEY,
    NETWORK,
    ROWS,
    SHIFT,
    START,
    WIDE,
    chain_of,
    first_bias,
    fresh,
    rounded,
    same,
    scan,
    search,
    stairs,
)
from jax.flatten_util import ravel_pytree

from jaxnn import moves
from jaxnn.chains import chain_key, kernel, perturbation_kernel
from jaxnn.run.random import normals


def assert_same_chain(loss_fn, options, **problem):
    found, (state, info) = (
        search(loss_fn, **problem, **options),
        scan(loss_fn, **problem, **options),
    )
    history, last = found.history, chain_of(found)
    assert 3 < found.num_accepted < 245
    for name in ("proposed_loss", "accepted", "scale"):
        np.testing.assert_array_equal(getattr(history, name), getattr(info, name), err_msg=name)
    for name in state._fields:
        assert same(getattr(last, name), getattr(state, name)), name
    np.testing.assert_array_equal(history.num_accepted, np.cumsum(info.accepted))
    assert same(found.params, state.best_params)
    assert found.loss == state.best_loss == np.min(history.best_loss)
    assert history.current_loss[-1] == state.loss


@pytest.mark.parametrize("name", FAMILY)
def test_the_search_is_the_scan_of_the_step(name):
    """With a loss of a user's own, which rounds differently with the number side by side."""
    scale = {} if name != "strict" else {"scale": 0.05}
    assert_same_chain(rounded, FAMILY[name] | scale)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (NETWORK, {"scale": 0.1}),
        (NETWORK, {"scale": moves.one_fifth(0.2), "temperature": 0.02, "num_proposals": 2}),
        (NETWORK, {"restart": moves.restart(NETWORK.sampler(scale=1.0), 20)}),
        (WIDE, {"scale": 0.1}),
        (WIDE, {"scale": 0.1, "temperature": 0.001, "num_proposals": 3}),
    ],
)
def test_the_search_of_a_network_is_the_scan_of_the_step(model, options):
    params = model.init(jax.random.key(2), scale=0.5)
    assert_same_chain(model.loss, options, params=params, batch=ROWS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("loss_fn", [stairs, rounded])
def test_every_chain_of_a_search_is_a_scan(name, loss_fn):
    found = search(loss_fn, num_chains=4, **FAMILY[name])
    for chain in range(4):
        state, info = scan(loss_fn, chain=chain, **FAMILY[name])
        assert same(chain_of(found, chain), state)
        assert same(found.history.proposed_loss[chain], info.proposed_loss)


def test_a_search_goes_on_as_a_scan_from_its_states():
    options = {"scale": moves.one_fifth(0.3), "temperature": 5.0}
    whole = search(num_chains=3, **options)
    part = search(num_chains=3, num_steps=150, **options)
    assert not same(part.state.params, part.state.best_params)
    for chain in (0, 2):
        state, _ = scan(num_steps=100, chain=chain, state=chain_of(part, chain), **options)
        assert same(state, chain_of(whole, chain))


# --- what a step says


def before(info):
    """The loss before each step of a scan."""
    losses = np.asarray(info.proposed_loss)
    current, values = float(stairs(START, SHIFT)), []
    for loss, accepted in zip(losses, info.accepted, strict=True):
        values.append(current)
        current = loss if accepted else current
    return losses, np.array(values)


def test_a_lower_loss_is_accepted_and_an_equal_one_at_temperature_0():
    for name, rule in (("strict", np.less), ("ties", np.less_equal)):
        _, info = scan(**FAMILY[name])
        losses, current = before(info)
        assert np.any(losses == current), "there must be ties for this to show anything"
        np.testing.assert_array_equal(info.accepted, rule(losses, current))


def test_metropolis_accepts_a_rise_with_its_probability():
    """Four standard errors of the number of rises accepted."""
    _, info = scan(temperature=20.0, num_steps=4_000)
    info = jax.tree.map(np.asarray, info)
    losses, current = before(info)
    rises = np.maximum(losses - current, 0)
    assert np.all(info.accepted[rises == 0])
    chances = np.exp(-rises[rises > 0] / 20)
    error = np.sum(info.accepted[rises > 0]) - np.sum(chances)
    assert abs(error) < 4 * np.sqrt(np.sum(chances * (1 - chances)))


def test_the_one_fifth_rule_doubles_on_success_and_shrinks_by_a_quarter_power_else():
    _, info = scan(scale=moves.one_fifth(2.0), temperature=20.0)
    losses, current = before(info)
    successes = info.accepted & (losses < current)
    assert np.any(info.accepted & ~successes), "a rise that is accepted is no success"
    exponents = np.cumsum(np.where(successes, 4, -1))
    expected = 2.0 * 2.0 ** (np.append(0, exponents[:-1]) / 4)
    np.testing.assert_allclose(info.scale, expected, rtol=1e-6)


def test_a_chain_without_a_lower_loss_for_patience_steps_starts_anew():
    _, info = scan(restart=moves.restart(fresh, 20), scale=0.01)
    _, current = before(info)
    losses, since, lowest, restarts = np.asarray(info.proposed_loss), 0, current[0], 0
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


@pytest.mark.parametrize("num_proposals", [1, 3])
def test_a_proposal_adds_noise_of_the_steps_own_key_and_the_best_one_stands(num_proposals):
    """From a loss that nothing lowers, so that every proposal starts from the same params."""
    start = jax.tree.map(np.zeros_like, START)
    _, info = scan(params=start, num_steps=40, num_proposals=num_proposals)
    assert not np.any(info.accepted)
    for step in (0, 1, 39):
        key = jax.random.fold_in(chain_key(KEY, 0), step)
        keys = [key] if num_proposals == 1 else [jax.random.fold_in(key, n) for n in range(3)]
        unravel = ravel_pytree(jax.tree.map(jnp.asarray, start))[1]
        drawn = [unravel(0.3 * normals(key, 6)) for key in keys]
        losses = [float(stairs(params, SHIFT)) for params in drawn]
        assert info.proposed_loss[step] == min(losses)
        proposal = jax.tree.map(lambda leaf, step=step: leaf[step], info.proposed_params)
        for a, b in zip(*map(jax.tree.leaves, (proposal, drawn[np.argmin(losses)])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("temperature", [None, 0.0, 1e9])
def test_losses_that_are_not_finite_are_never_accepted(temperature):
    def broken(params, batch):
        w = params["w"]
        bad = jnp.where(w[0, 0] > 2.6, jnp.nan, jnp.where(w[0, 1] < -1.2, -jnp.inf, 0.0))
        return stairs(params, batch) + bad

    _, info = scan(broken, temperature=temperature)
    bad = np.isposinf(info.proposed_loss)
    assert 10 < np.sum(bad) < 240
    assert np.all(np.isfinite(info.proposed_loss) | bad)
    assert not np.any(info.accepted & bad)


def test_step_and_init_map_over_chains_and_over_scales():
    """What the caller maps is what it is one at a time: this loss has no rounding."""

    def last(scale, chain):
        kernel = perturbation_kernel(stairs, scale=scale)
        key, state = chain_key(KEY, chain), kernel.init(START, SHIFT)
        return jax.lax.scan(lambda s, _: kernel.step(key, s, SHIFT), state, length=60)[0]

    scales = jnp.array([0.1, 0.3], jnp.float32)
    many = jax.jit(jax.vmap(last))(scales, jnp.arange(2))
    for place in (0, 1):
        one, _ = scan(scale=float(scales[place]), chain=place, num_steps=60)
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
    options = {"loss_fn": stairs, "scale": 0.3, **options}
    with pytest.raises(TypeError, match=message):
        perturbation_kernel(options.pop("loss_fn"), **options).init(START, SHIFT)


def test_the_metric_of_a_proposal_is_that_of_its_params():
    found, (_, info) = search(metric_fn=first_bias), scan()
    np.testing.assert_array_equal(found.history.proposed_metric, info.proposed_params["b"][:, 0])
