"""The optimizers against their formulas, written out again in NumPy float64."""

import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from tolerances import FORWARD, leaf_error

from jaxnn.optim import optimizers, schedules

STEPS = 7


def gradients(seed=3):
    """A few gradients of unequal leaves, some of them tiny, as float32 numbers."""
    rng = np.random.default_rng(seed)
    shapes = {"b": (), "w": (2, 3)}
    return [
        {
            k: (rng.normal(0.3, 10.0 ** rng.integers(-3, 2), s)).astype(np.float32)
            for k, s in shapes.items()
        }
        for _ in range(STEPS)
    ]


def by_formula(step):
    """Updates of every step, leaf by leaf, in float64."""
    series = gradients()
    updates = [{} for _ in series]
    for leaf in series[0]:
        state = None
        for t, gradient in enumerate(series, start=1):
            update, state = step(t, gradient[leaf].astype(np.float64), state)
            updates[t - 1][leaf] = update
    return updates


def by_optimizer(optimizer):
    params = {"b": jnp.ones(()), "w": jnp.ones((2, 3))}
    state, updates = optimizer.init(params), []
    update = jax.jit(lambda g, s: optimizer.update(g, s, params))
    for gradient in gradients():
        step, state = update(gradient, state)
        assert {leaf.dtype for leaf in jax.tree.leaves(step)} == {np.dtype("float32")}
        updates.append(step)
    return updates


def worst(got, expected):
    return max(leaf_error(a, b) for a, b in zip(got, expected, strict=True))


def sgd_step(rate, momentum=0.0, nesterov=False):
    def step(t, g, velocity):
        velocity = momentum * (0 if velocity is None else velocity) + g
        ahead = g + momentum * velocity if nesterov else velocity
        return -rate(t - 1) * ahead, velocity

    return step


def rmsprop_step(decay):
    def step(t, g, square):
        square = decay * (0 if square is None else square) + (1 - decay) * g**2
        return -0.1 * g / (np.sqrt(square) + 0.125), square

    return step


def adam_step(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """Params are ones throughout."""

    def step(t, g, moments):
        mean, variance = moments or (0.0, 0.0)
        mean = b1 * mean + (1 - b1) * g
        variance = b2 * variance + (1 - b2) * g**2
        ahead = mean / (1 - b1**t) / (np.sqrt(variance / (1 - b2**t)) + eps)
        return -rate * (ahead + weight_decay), (mean, variance)

    return step


ADAM = {"b1": 0.5, "b2": 0.75, "eps": 0.125}
FORMULAS = [
    (optimizers.sgd(1.7), sgd_step(lambda step: 1.7)),
    (optimizers.sgd(0.03, momentum=0.9), sgd_step(lambda step: 0.03, 0.9)),
    (optimizers.sgd(0.03, momentum=0.9, nesterov=True), sgd_step(lambda step: 0.03, 0.9, True)),
    (
        optimizers.sgd(schedules.inverse_time_decay(0.5, 0.25), momentum=0.5),
        sgd_step(lambda step: 0.5 / (1 + 0.25 * step), 0.5),
    ),
    (optimizers.rmsprop(0.1, decay=0.0, eps=0.125), rmsprop_step(0.0)),
    (optimizers.rmsprop(0.1, decay=0.75, eps=0.125), rmsprop_step(0.75)),
    (optimizers.adam(0.3, b2=0.0), adam_step(0.3, b2=0.0)),
    (optimizers.adam(0.25, **ADAM), adam_step(0.25, **ADAM)),
    (optimizers.adam(0.25, **ADAM, weight_decay=0.5), adam_step(0.25, **ADAM, weight_decay=0.5)),
    (optimizers.add_l2(optimizers.sgd(1.0), 0.25), lambda t, g, state: (-g - 0.5, state)),
]


@pytest.mark.parametrize(("optimizer", "step"), FORMULAS)
def test_updates_follow_the_formula_from_a_pickle_too(optimizer, step):
    """The pickle compiles nothing anew: it has the same structure."""
    again = pickle.loads(pickle.dumps(optimizer))
    assert jax.tree.structure(again) == jax.tree.structure(optimizer)
    assert worst(by_optimizer(again), by_formula(step)) <= FORWARD["float32"]


@pytest.mark.parametrize("settings", [{}, {"b1": 0.0}])
def test_adam_follows_its_formula_with_its_usual_decay(settings):
    """Within 2e-5: float32 rounds 0.999 by 1.3e-8, hence 1 - 0.999 by 1.3e-5 of itself."""
    got = by_optimizer(optimizers.adam(0.3, **settings))
    assert worst(got, by_formula(adam_step(0.3, **settings))) <= 2e-5


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e9])
def test_clipped_gradients_are_never_longer_and_keep_their_direction(max_norm):
    clip = optimizers.clip_by_global_norm(optimizers.sgd(1.0), max_norm)
    for gradient, step in zip(gradients(), by_optimizer(clip), strict=True):
        whole, kept = (
            np.concatenate([np.ravel(w) for w in tree.values()]) for tree in (gradient, step)
        )
        norm = np.linalg.norm(whole.astype(np.float64))
        np.testing.assert_allclose(kept, -whole * min(1, max_norm / norm), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_lengths_neither_overflow_nor_vanish(size):
    norm = optimizers.global_norm({"a": jnp.full(3, size), "b": jnp.full((), size)})
    assert float(norm) == pytest.approx(2 * size, rel=1e-6)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match="momentum must be given with nesterov"):
        optimizers.sgd(0.1, nesterov=True)


def test_a_learning_rate_may_be_traced():
    rates, steps = jnp.array([0.1, 0.2]), jnp.array([10.0, 20.0])
    swept = jax.vmap(lambda r: optimizers.adam(schedules.linear_warmup(r, 4)))(rates)
    updates = jax.vmap(lambda o, g: o.update(g, o.init(g), g)[0])(swept, steps)
    np.testing.assert_allclose(updates, -rates / 4, rtol=1e-6)


@pytest.mark.parametrize(
    "make", [optimizers.sgd, lambda rate: optimizers.adam(rate, b1=rate / 2, b2=rate / 3, eps=rate)]
)
def test_other_numbers_compile_nothing(make):
    traces = []

    @jax.jit
    def first_update(optimizer, params):
        traces.append(None)
        return optimizer.update(params, optimizer.init(params), params)[0]

    steps = [first_update(make(rate), jnp.array([1.0, -2.0])) for rate in (0.1, 0.2, 0.4)]
    assert len(traces) == 1
    assert len({tuple(step.tolist()) for step in steps}) == 3


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (optimizers.sgd, "learning_rate"),
        (lambda value: optimizers.sgd(0.1, momentum=value), "momentum"),
        (optimizers.adam, "learning_rate"),
        (lambda value: optimizers.adam(0.1, b1=value), "b1"),
        (lambda value: optimizers.adam(0.1, b2=value), "b2"),
        (lambda value: optimizers.adam(0.1, eps=value), "eps"),
        (lambda value: optimizers.adam(0.1, weight_decay=value), "weight_decay"),
        (optimizers.rmsprop, "learning_rate"),
        (lambda value: optimizers.rmsprop(0.1, decay=value), "decay"),
        (lambda value: optimizers.rmsprop(0.1, eps=value), "eps"),
        (lambda value: optimizers.clip_by_global_norm(optimizers.sgd(0.1), value), "max_norm"),
        (lambda value: optimizers.add_l2(optimizers.sgd(0.1), value), "strength"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(make, name):
    for value in (-0.1, float("nan"), float("inf"), 1e300):
        with pytest.raises(ValueError, match=f"^{name} must be a finite number"):
            make(value)
    for value in ("0.1", {}, True, [0.1], np.ones(2)):
        with pytest.raises(TypeError, match=f"^{name} must be a finite number"):
            make(value)


def test_decays_of_adam_are_below_one():
    for name, value in itertools.product(("b1", "b2"), (1.0, 1.5, 1 - 1e-9)):
        with pytest.raises(ValueError, match=f"{name} must be below 1"):
            optimizers.adam(0.1, **{name: value})


# --- extra arguments


TOLD = {"value": 1.0, "grad": 2.0, "value_fn": 3.0}


def plain(gradients, state, params):
    return "", state


def shortened(grad, value, value_fn):
    return "", value


def of_two(gradients, state, params=None, value=None, *, grad=0.0):
    return f"{value} {grad}", state


def of_any(updates, state, params=None, **extra):
    return " ".join(f"{name}={extra[name]}" for name in sorted(extra)), state


@pytest.mark.parametrize(
    ("update", "told"),
    [
        (plain, ""),
        (shortened, ""),
        (of_two, "1.0 2.0"),
        (of_any, "grad=2.0 value=1.0 value_fn=3.0"),
        (functools.partial(of_two, value=7), "7 2.0"),
        (functools.partial(of_any, value=7), "grad=2.0 value=7 value_fn=3.0"),
        (functools.partial(lambda table, g, s, p, value: (value, s), 5), 1.0),
        (Partial(of_two), "1.0 2.0"),
    ],
)
def test_an_update_is_told_what_it_takes_by_name_and_has_not_been_given(update, told):
    assert optimizers.call_update(update, 0.0, (), 0.0, **TOLD) == (told, ())


def test_changed_gradients_and_optimizers_of_each_pass_extra_arguments_on():
    def update(gradients, state, params, *, value, **extra):
        return jax.tree.map(lambda leaf: leaf * value, gradients), state

    own = optimizers.Optimizer(lambda params: (), update)
    for optimizer in (
        optimizers.add_l2(optimizers.clip_by_global_norm(own, 1.0), 0.5),
        optimizers.made_by(Partial(lambda w: optimizers.add_l2(own, w)), (0.5,)),
    ):
        found, _ = optimizer.update(jnp.zeros(1), (), jnp.ones(1), value=3.0, value_fn=None)
        assert found == 3.0


# --- one for each network


@pytest.mark.parametrize(
    ("make", "values", "error", "message"),
    [
        (optimizers.adam, (), ValueError, r"values must be arrays with a first axis.*shapes \[\]"),
        (optimizers.adam, ([],), ValueError, r"values must be .*shapes \[\(0,\)\]"),
        (optimizers.sgd, ([0.1], [1, 2]), ValueError, r"values must be .*\[\(1,\), \(2,\)\]"),
        (optimizers.adam, (["a"],), TypeError, r"values\[0\] must be an array of real numbers"),
        (optimizers.adam(0.1), ([0.1],), TypeError, "make must be callable; got a Optimizer"),
        (lambda rate: rate, ([0.1],), TypeError, "what make returns must have init and update"),
        (optimizers.adam, ([0.1, -0.2, 0.3],), ValueError, "learning_rate must be .* got -0.2"),
    ],
)
def test_each_refuses_by_name(make, values, error, message):
    with pytest.raises(error, match=f"^{message}"):
        optimizers.each(make, *values)


def test_each_stands_outside_of_what_wraps_an_optimizer():
    each = optimizers.each(optimizers.adam, [0.1, 0.2])
    with pytest.raises(TypeError, match=r"put each around the whole: each\(lambda rate"):
        optimizers.clip_by_global_norm(each, 1.0)  # pyright: ignore[reportArgumentType]
