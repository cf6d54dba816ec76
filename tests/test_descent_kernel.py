"""The driver is `scan(step)`, bit for bit; and `step` is what its docstring says."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_same

import jaxnn
from jaxnn import optimizers, schedules
from jaxnn.descent import Info, Kernel, State, descent_kernel, network_key

KEY = jax.random.key(7)
BATCH = jax.tree.map(jnp.asarray, jaxnn.datasets.vertical(jax.random.key(1), samples=20))
TINY, SMALL, WIDE = jaxnn.mlp((2, 3)), jaxnn.mlp((2, 3, 3)), jaxnn.mlp((2, 64, 3), hidden="tanh")
OPTIMIZERS = {
    "sgd": optimizers.sgd(0.5),
    "nesterov": optimizers.sgd(0.1, momentum=0.9, nesterov=True),
    "l2, momentum": optimizers.add_l2(optimizers.sgd(0.1, momentum=0.9), 0.01),
    "clip, rmsprop": optimizers.clip_by_global_norm(optimizers.rmsprop(0.01), 0.1),
    "cosine, adam": optimizers.adam(schedules.cosine_decay(0.1, 0.01, 20), weight_decay=0.01),
    "warmup": optimizers.sgd(schedules.linear_warmup(schedules.inverse_time_decay(0.5, 0.1), 9)),
    # What the quick tier has combined, each alone.
    "momentum": optimizers.sgd(0.1, momentum=0.9),
    "rmsprop": optimizers.rmsprop(0.01),
    "adam": optimizers.adam(0.05),
    "adamw": optimizers.adam(0.05, weight_decay=0.01),
    "clip": optimizers.clip_by_global_norm(optimizers.adam(0.05), 0.1),
    "l2": optimizers.add_l2(optimizers.sgd(0.5), 0.01),
    "cosine": optimizers.adam(schedules.cosine_decay(0.1, 0.01, 20)),
}
PLANS: dict[str, dict[str, Any]] = {
    "full": {},
    "batches": {"batch_size": 16},
    "remainder": {"batch_size": 16, "drop_remainder": False},
}


def start(model):
    return model.init(jax.random.key(3), scale=0.5)


def descend(model, optimizer, num_epochs, params=None, **options: Any) -> Any:
    params = start(model) if params is None else params
    return jaxnn.gradient_descent(
        KEY, model.value_and_grad, params, BATCH, num_epochs=num_epochs, optimizer=optimizer,
        **options,
    )  # fmt: skip


@functools.cache
def scan_of(model, length, vmapped, **plan: Any):
    """`scan(step)`, the numbers of the optimizer as arguments; of many where keys have an axis."""

    @jax.jit
    def run(optimizer, key, state, batch) -> tuple[State, Info]:
        step = descent_kernel(model.value_and_grad, optimizer, **plan).step
        step = jax.vmap(step, (0, 0, None)) if vmapped else step
        return jax.lax.scan(lambda state, _: step(key, state, batch), state, length=length)

    return run


def scan(model, optimizer, key, state, length, **plan: Any) -> tuple[State, Info]:
    return scan_of(model, int(length), key.ndim > 0, **plan)(optimizer, key, state, BATCH)


QUICK = dict.fromkeys(("nesterov", "l2, momentum", "clip, rmsprop"), ("full", TINY)) | {
    "sgd": ("full", WIDE), "cosine, adam": ("batches", SMALL), "warmup": ("remainder", SMALL)
}  # fmt: skip
CASES = [
    pytest.param(
        name, plan, model, id=f"{name}, {plan}, {size}",
        marks=[] if (plan, model) == QUICK.get(name) else pytest.mark.exhaustive,
    )
    for name in OPTIMIZERS for plan in PLANS
    for size, model in {"tiny": TINY, "small": SMALL, "wide": WIDE}.items()
]  # fmt: skip
"""Every part of an optimizer is in the quick tier, and all combinations in the exhaustive one."""


@pytest.mark.parametrize(("name", "plan", "model"), CASES)
def test_the_driver_is_the_scan_of_the_step_bit_for_bit(name, plan, model):
    """From the first state, and on from the state of a result."""
    optimizer, options, key = OPTIMIZERS[name], PLANS[plan], network_key(KEY)
    half, whole = (descend(model, optimizer, epochs, **options) for epochs in (6, 12))
    kernel = descent_kernel(model.value_and_grad, optimizer, **options)
    first = kernel.init(start(model), BATCH)
    state, infos = scan(model, optimizer, key, first, half.num_steps, **options)
    assert_same((state, infos.loss), (half.state, half.history.loss))
    assert_same(state.params, half.params)
    state, infos = scan(model, optimizer, key, half.state, half.num_steps, **options)
    assert_same((state, infos.loss), (whole.state, whole.history.loss[half.num_steps :]))
    assert_same(state.params, whole.params)


@pytest.mark.exhaustive
@pytest.mark.parametrize("plan", ["full", "batches"])
def test_several_networks_are_the_scan_under_vmap_to_rounding(plan):
    """A block is filled up to 16 networks, and a product over another width rounds differently."""
    optimizer, options, num = OPTIMIZERS["cosine, adam"], PLANS[plan], 5
    starts = jax.vmap(lambda key: SMALL.init(key, scale=0.5))(jax.random.split(KEY, num))
    whole = descend(SMALL, optimizer, 6, starts, num_networks=num, **options)
    kernel = descent_kernel(SMALL.value_and_grad, optimizer, **options)
    states = jax.vmap(kernel.init, (0, None))(starts, BATCH)
    keys = jax.vmap(network_key, (None, 0))(KEY, jnp.arange(num))
    state, infos = scan(SMALL, optimizer, keys, states, int(whole.num_steps[0]), **options)
    assert jax.tree.structure(state) == jax.tree.structure(whole.state)
    np.testing.assert_array_equal(state.step, whole.state.step)
    for got, expected in zip(jax.tree.leaves(state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(infos.loss.T, whole.history.loss, rtol=1e-5)


# --- a loss that takes a key


@jax.value_and_grad
def dropout(params, batch, key=None):
    """A network that drops half of its hidden units where it has a key."""
    first, second = params
    hidden = jnp.tanh(batch.x @ first.weights + first.biases[None, :])
    if key is not None:
        hidden = jnp.where(jax.random.bernoulli(key, 0.5, hidden.shape), 2 * hidden, 0)
    logits = hidden @ second.weights + second.biases[None, :]
    return jaxnn.losses.softmax_crossentropy(logits, batch.y)


def with_dropout(num_epochs, **options: Any) -> Any:
    options = {"optimizer": OPTIMIZERS["adam"], "with_key": True} | options
    given = KEY, options.pop("function", dropout), options.pop("params", start(SMALL)), BATCH
    return jaxnn.gradient_descent(*given, num_epochs=num_epochs, **options)


@pytest.mark.parametrize(
    "plan",
    ["batches", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("full", "remainder"))],
)
def test_with_a_key_too_the_driver_is_the_scan_and_goes_on_from_a_checkpoint(plan, tmp_path):
    options, key = PLANS[plan], network_key(KEY)
    whole = with_dropout(12, **options)

    @functools.partial(jax.jit, compiler_options=jaxnn.chains.COMPILER_OPTIONS)
    def scan(optimizer, state):
        step = descent_kernel(dropout, optimizer, with_key=True, **options).step
        walk = lambda state, _: step(key, state, BATCH)  # noqa: E731
        return jax.lax.scan(walk, state, length=whole.num_steps)

    kernel = descent_kernel(dropout, OPTIMIZERS["adam"], with_key=True, **options)
    state, infos = scan(OPTIMIZERS["adam"], kernel.init(start(SMALL), BATCH))
    assert_same((state, infos.loss), (whole.state, whole.history.loss))
    for num_epochs in (5, 12):
        resumed = with_dropout(num_epochs, checkpoint=tmp_path / "run.npz", **options)
    assert_same((resumed.params, resumed.history.loss), (whole.params, whole.history.loss))
    with pytest.raises(ValueError, match="with_key was True, is False"):
        with_dropout(12, checkpoint=tmp_path / "run.npz", with_key=False, **options)


@pytest.mark.parametrize("num_networks", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_the_key_of_a_step_is_made_of_the_networks_key_and_of_its_number(num_networks):
    """The slope is made of the key, and so every step tells which key it got."""

    def slope_of(key):
        return jax.random.key_data(key)[1].astype(jnp.float32) * 2.0**-32

    def drawn(params, batch, key=None):
        slope = 0.0 if key is None else slope_of(key)
        return jnp.where(params > -1e9, slope, 0.0), jnp.broadcast_to(slope, params.shape)

    params = jnp.zeros(() if num_networks is None else num_networks)
    options = {"num_networks": num_networks, "optimizer": optimizers.sgd(1.0)}
    result = with_dropout(4, function=drawn, params=params, **options)
    for network, losses in enumerate(np.atleast_2d(result.history.loss)):
        key = network_key(KEY, None if num_networks is None else network)
        key = jax.random.fold_in(key, 2**32 - 1)
        slopes = [float(slope_of(jax.random.fold_in(key, step))) for step in range(4)]
        assert losses.tolist() == slopes
        assert np.atleast_1d(result.params)[network] == pytest.approx(-sum(slopes), rel=1e-6)
    assert np.all(result.loss == 0), "the loss that is reported has no noise"


@pytest.mark.slow
def test_dropout_learns_and_is_reported_and_validated_without_noise():
    fresh = jaxnn.datasets.vertical(jax.random.key(5), samples=20)
    result = with_dropout(300, validation_batch=fresh, params=start(WIDE))
    assert 0.05 < result.loss < 0.25
    assert result.loss == pytest.approx(float(dropout(result.params, BATCH)[0]), rel=1e-6)
    best = np.nanmin(result.history.validation_loss)
    assert best == pytest.approx(float(dropout(result.params, fresh)[0]), rel=1e-6)


@pytest.mark.slow
def test_noise_is_no_convergence():
    """Two losses in a row may be close by chance, so that means of five epochs are compared."""

    def noisy(params, batch, key=None):
        return params + (0.0 if key is None else jax.random.normal(key)), jnp.ones(())

    options = {"function": noisy, "params": jnp.zeros(()), "optimizer": optimizers.sgd(1e-4)}
    losses = with_dropout(1_000, **options).history.loss
    close = np.abs(np.diff(losses)) < 0.02
    means = np.convolve(losses, np.full(5, 0.2), "valid")
    flat = np.abs(means[5:] - means[:-5]) < 5 * 0.02
    for unit, expected in (("step", np.argmax(close) + 2), ("epoch", np.argmax(flat) + 10)):
        result = with_dropout(1_000, tolerance=0.02, tolerance_unit=unit, **options)
        assert (result.status, result.num_steps) == ("converged", expected)


@pytest.mark.parametrize(
    "function",
    [
        SMALL.value_and_grad,
        lambda params, batch, key: SMALL.value_and_grad(params, batch),
    ],
    ids=["takes no key", "needs a key"],
)
def test_a_function_that_does_not_take_both_is_told_what_is_wanted(function):
    with pytest.raises(TypeError) as raised:
        with_dropout(1, function=function)
    assert "value_and_grad_fn(params, batch, key=None)" in "".join(raised.value.__notes__)


def test_the_kernel_trains_outside_of_jit_and_any_tree():
    function = jax.value_and_grad(lambda params, batch: jnp.sum((params["w"] - batch) ** 2))
    kernel = descent_kernel(function, optimizers.sgd(0.25))
    assert isinstance(kernel, Kernel)
    state = kernel.init({"w": np.zeros(2, np.float32)}, jnp.ones(2))
    for loss in (2.0, 0.5):
        state, info = kernel.step(network_key(KEY), state, jnp.ones(2))
        assert info.loss == loss
    assert (state.step, state.params["w"].tolist()) == (2, [0.75, 0.75])


@pytest.mark.parametrize(
    ("optimizer", "options", "error", "message"),
    [
        (3, {}, TypeError, "optimizer must have init and update"),
        (optimizers.sgd(0.1), {"batch_size": 0}, ValueError, "batch_size must be an integer"),
        (optimizers.sgd(0.1), {"drop_remainder": False}, ValueError, "batch_size must be given"),
    ],
)
def test_what_is_no_kernel_is_refused_by_name(optimizer, options, error, message):
    with pytest.raises(error, match=message):
        descent_kernel(SMALL.value_and_grad, optimizer, **options).init(start(SMALL), BATCH)


def test_arguments_of_another_kind_are_refused_by_name():
    optimizer, params = optimizers.sgd(0.1), start(SMALL)
    kernel = descent_kernel(SMALL.value_and_grad, optimizer, batch_size=16)
    wide: Any = start(WIDE)
    for message, call in {
        "value_and_grad_fn must be callable; got a int": lambda: descent_kernel(3, optimizer),  # pyright: ignore
        "key must be a single typed key": lambda: network_key(0),  # pyright: ignore
        "network must be an integer": lambda: network_key(KEY, "first"),  # pyright: ignore
        "key must be a single": lambda: kernel.step(0, kernel.init(params, BATCH), BATCH),  # pyright: ignore
        "params must be floats of one dtype; got int32": lambda: descent_kernel(
            jax.value_and_grad(lambda p, b: jnp.sum(p)), optimizer
        ).init(jnp.arange(3), BATCH),
        r"params\[0\].weights must be": lambda: kernel.init(wide, BATCH),
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call()


def test_rows_are_drawn_alike_whatever_jax_is_set_to_and_no_step_follows_the_largest_count():
    function = jax.value_and_grad(lambda params, rows: params * jnp.sum(rows))
    kernel, rows = descent_kernel(function, optimizers.sgd(0.5), 2), jnp.arange(16.0)
    key, state, step = network_key(KEY), kernel.init(jnp.float32(1), rows), jax.jit(kernel.step)
    expected = step(key, state, rows)
    with jax.threefry_partitionable(False):
        assert_same(step(key, state, rows), expected)
    last = state._replace(step=jnp.uint32(2**32 - 1))
    assert_same(step(key, last, rows)[0], last)
