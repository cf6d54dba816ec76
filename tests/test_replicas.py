"""Many descents side by side: each as it would be alone, whatever stands beside it."""

import functools
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from programs import start_program
from tolerances import assert_same, leaf_error

import jaxnn
from jaxnn import optimizers, schedules
from jaxnn.descent import history, replicas
from jaxnn.typing import Traits

KEY = jax.random.key(5)
MODEL = jaxnn.mlp((2, 2, 3))
BATCH = jaxnn.datasets.vertical(jax.random.key(1), samples=20)
VALIDATION = jaxnn.datasets.vertical(jax.random.key(9), samples=30)
NUM = 20  # more than a block, and not a whole number of them
STARTS = jax.jit(jax.vmap(MODEL.sampler(scale=1.0)))(jax.random.split(jax.random.key(2), NUM))


def descend(params, batch, **options: Any):
    return jaxnn.gradient_descent(KEY, MODEL.value_and_grad, params, batch, **options)


def of(tree, number):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[number], tree)


def alone(number, **options: Any):
    key = jax.random.fold_in(KEY, number)
    return jaxnn.gradient_descent(key, MODEL.value_and_grad, of(STARTS, number), BATCH, **options)


RATES = np.geomspace(0.01, 0.5, NUM)
PLANS: dict[str, dict[str, Any]] = {
    "batches": {"num_epochs": 12, "batch_size": 12},
    "remainder": {"num_epochs": 12, "batch_size": 7, "drop_remainder": False},
}
each_plan = pytest.mark.parametrize(
    "plan", ["batches", pytest.param("remainder", marks=pytest.mark.exhaustive)]
)


def with_cosine(rate):
    return optimizers.adam(schedules.cosine_decay(rate, 1e-3, 20))


@functools.cache
def many_of(count, plan):
    """The first of the networks, each at a rate of its own."""
    optimizer, starts = optimizers.each(with_cosine, RATES[:count]), of(STARTS, slice(count))
    return descend(starts, BATCH, num_networks=count, optimizer=optimizer, **PLANS[plan])


@pytest.fixture
def epoch_by_epoch(monkeypatch):
    """Chunks of one epoch, so that one program serves all numbers of networks."""
    monkeypatch.setattr(history, "MOST_RECORDS", 1)


@each_plan
def test_every_network_descends_as_it_would_alone(plan, epoch_by_epoch):
    many = many_of(NUM, plan)
    assert many.loss.shape == many.num_steps.shape == many.status.shape == (NUM,)
    for number in (0, 15, 16, NUM - 1):
        one = alone(number, optimizer=with_cosine(RATES[number]), **PLANS[plan])
        assert leaf_error(of(many.params, number), one.params) < 1e-4
        assert many.loss[number] == pytest.approx(one.loss, rel=1e-5)
        np.testing.assert_allclose(many.history.loss[number], one.history.loss, rtol=1e-4)
        np.testing.assert_array_equal(many.history.evaluations, one.history.evaluations)
        assert (many.num_evaluations[number], many.num_steps[number], many.status[number]) == (
            one.num_evaluations,
            one.num_steps,
            one.status,
        )


@each_plan
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.exhaustive), 17])
def test_a_network_comes_to_the_same_bits_however_many_there_are(count, plan, epoch_by_epoch):
    many, fewer = many_of(NUM, plan), many_of(count, plan)
    assert_same(fewer.params, of(many.params, slice(count)))
    np.testing.assert_array_equal(fewer.loss, many.loss[:count])
    np.testing.assert_array_equal(fewer.history.loss, many.history.loss[:count])


@pytest.mark.parametrize(
    ("count", "tile", "width"), [(1, 1024, 1024), (5_000, 1024, 4096), (100_000, 1024, 65_536)]
)
@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_gpu_gets_large_blocks_the_same_with_any_number_of_them(num_devices, count, tile, width):
    """A checkpoint knows the networks of a block."""
    devices: Any = [SimpleNamespace(platform="gpu")] * num_devices
    networks = replicas.Networks(count, devices)
    assert (networks.tile, networks.width) == (tile, width)


@pytest.mark.slow
def test_a_block_of_several_tiles_changes_no_bit(monkeypatch, epoch_by_epoch):
    monkeypatch.setattr(replicas, "ON_CPUS", (16, 1))
    places = np.resize(np.arange(NUM), 37)  # two tiles of 16 in a block, and two blocks
    assert replicas.Networks(len(places), jax.devices()).width == 32
    optimizer = optimizers.each(with_cosine, RATES[places])
    blocks = descend(
        of(STARTS, places), BATCH, num_networks=37, optimizer=optimizer, **PLANS["batches"]
    )
    many = many_of(NUM, "batches")
    for tree, other in ((blocks.params, many.params), (blocks.loss, many.loss)):
        assert_same(of(tree, slice(NUM)), other)
    np.testing.assert_array_equal(blocks.history.loss[:NUM], many.history.loss)


def bowl(params, batch):
    """The sum of squares and of the batch, and its gradient."""
    return jnp.sum(params**2) + jnp.sum(batch), 2 * params


vars(bowl)["traits"] = Traits(constant_loss=lambda batch: 6.0 + np.sum(batch))


def roll(starts, batch: Any = 0.0, **options: Any) -> Any:
    """Descends in a bowl, of as many networks as there are starts."""
    starts = np.asarray(starts, np.float32)
    return jaxnn.gradient_descent(KEY, bowl, starts, batch, num_networks=len(starts), **options)


def by_loss(rate):
    """Steps as long as the loss, measured again."""

    def update(gradients, state, params, *, value_fn):
        size = rate * value_fn(params)
        return jax.tree.map(lambda leaf: -size * leaf, gradients), state

    return optimizers.Optimizer(lambda params: (), update)


def test_an_optimizer_of_each_is_told_of_the_loss_of_its_own_network():
    rates, starts = np.array([0.1, 0.2, 0.05], np.float32), np.array([[1.0], [0.5], [2.0]])
    found = roll(starts, optimizer=optimizers.each(by_loss, rates), num_epochs=1)
    np.testing.assert_allclose(found.params, starts - 2 * rates[:, None] * starts**3, rtol=1e-6)


OPTAX = {
    "injected": lambda o: lambda rate: o.inject_hyperparams(o.adam)(learning_rate=rate),
    "lbfgs": lambda o: o.lbfgs,
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OPTAX)
@pytest.mark.filterwarnings("default")
def test_so_may_it_have_one_of_optax(name):
    make = OPTAX[name](pytest.importorskip("optax"))
    with jax.numpy_dtype_promotion("standard"):
        optimizer = optimizers.each(make, RATES)
        many = descend(STARTS, BATCH, optimizer=optimizer, num_epochs=9, num_networks=NUM)
        for number in (0, NUM - 1):
            one = alone(number, optimizer=make(RATES[number]), num_epochs=9)
            np.testing.assert_allclose(many.history.loss[number], one.history.loss, rtol=1e-3)


@pytest.mark.parametrize(
    "shape", [(3,), *(pytest.param(s, marks=pytest.mark.exhaustive) for s in ((3, 3), (1, 3)))]
)
def test_an_optimizer_with_an_array_as_long_as_there_are_networks_is_one(shape):
    table = 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    def update(table, gradients, state, params):
        return jax.tree.map(lambda leaf: -leaf / jnp.max(table), gradients), state

    optimizer = optimizers.Optimizer(lambda params: (), Partial(update, table))
    starts = np.array([[1.0], [2.0], [3.0]])
    found = roll(starts, optimizer=optimizer, num_epochs=1)
    np.testing.assert_allclose(found.params, starts * (1 - 2 / table.size), rtol=1e-6)


def test_each_network_stops_by_itself():
    """One converges at once, one reaches a target, one diverges, the others go on to the end."""
    trained = roll(
        [[0.0], [1.0], [1.0], [3.0], [4.0]], learning_rate=[0.1, 0.25, 1e30, 1e-6, 1e-6],
        num_epochs=50, target_loss=0.01,
    )  # fmt: skip
    assert trained.status.tolist() == ["reached", "reached", "diverged", *["completed"] * 2]
    assert trained.num_steps.tolist() == [1, 5, 2, 50, 50]
    steps = np.sum(np.isfinite(trained.history.loss), axis=1)
    np.testing.assert_array_equal(steps, [1, 5, 1, 50, 50])
    np.testing.assert_allclose(trained.params[:3, 0], [0.0, 0.0625, 1.0])
    np.testing.assert_allclose(trained.loss[:3], [0.0, 0.0625**2, 1.0], rtol=1e-6)
    assert trained.num_evaluations.tolist() == [4, 16, 7, 151, 151]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1.0, "num_epochs": 60, "validation_batch": VALIDATION, "patience": 4},
        {"learning_rate": 0.3, "tolerance": 2e-3, **PLANS["remainder"], "num_epochs": 80},
    ],
)
def test_what_ends_a_descent_is_each_networks_own(options):
    many = descend(STARTS, BATCH, num_networks=NUM, **options)
    assert len(np.unique(many.num_steps)) > 4
    for number in (int(np.argmin(many.num_steps)), int(np.argmax(many.num_steps)), 17):
        one, losses = alone(number, **options), many.history.validation_loss
        steps = one.num_steps
        assert (many.num_steps[number], many.status[number]) == (steps, one.status)
        assert leaf_error(of(many.params, number), one.params) < 1e-4
        assert many.loss[number] == pytest.approx(one.loss, rel=1e-4)
        if losses is not None:
            assert one.history.validation_loss is not None
            assert np.all(np.isnan(losses[number][steps:]))
            np.testing.assert_allclose(
                losses[number][:steps], one.history.validation_loss, rtol=1e-4
            )


@pytest.mark.exhaustive
def test_a_checkpoint_of_many_goes_on_to_the_same_bits(tmp_path):
    options: dict[str, Any] = {"batch_size": 8, "tolerance": 1e-3, "num_epochs": 15}
    rates: dict[str, Any] = {"learning_rate": np.geomspace(0.01, 3.0, NUM), "num_networks": NUM}
    saved = {**options, "checkpoint": tmp_path / "many.npz"}
    descend(STARTS, BATCH, **rates, **{**saved, "num_epochs": 6})
    resumed, whole = (descend(STARTS, BATCH, **rates, **each) for each in (saved, options))
    assert set(whole.status) == {"completed", "converged"}
    assert_same(resumed._replace(status=0), whole._replace(status=0))
    assert resumed.status.tolist() == whole.status.tolist()
    with pytest.raises(ValueError, match="optimizer"):
        descend(STARTS, BATCH, learning_rate=0.1, num_networks=NUM, **saved)
    with pytest.raises(ValueError, match="num_networks"):
        descend(of(STARTS, slice(3)), BATCH, learning_rate=0.1, num_networks=3, **saved)


@pytest.mark.slow
def test_a_second_sweep_compiles_nothing(caplog):
    starts, batch = np.ones((NUM, 1)), np.ones(8, np.float32)
    roll(starts, batch, learning_rate=np.full(NUM, 0.1), num_epochs=2)
    with jax.log_compiles():
        roll(starts, batch, learning_rate=np.geomspace(0.1, 1, NUM), num_epochs=3)
        each = optimizers.each(optimizers.sgd, np.geomspace(0.2, 2, NUM).tolist())
        roll(starts, batch, optimizer=each, num_epochs=3)
        assert [r for r in caplog.records if "Compiling" in r.getMessage()] == []
        roll(starts, batch[:5], learning_rate=0.1, num_epochs=1)
        assert [r for r in caplog.records if "Compiling" in r.getMessage()]


def test_a_descent_in_many_chunks_compiles_one_loop(caplog, tmp_path, epoch_by_epoch):
    saved = {"learning_rate": 0.1, "checkpoint": tmp_path / "run.npz"}
    with jax.log_compiles():
        for num_epochs in (4, 8):  # the second run goes on from the first
            roll(np.ones((NUM, 2)), np.ones(7, np.float32), num_epochs=num_epochs, **saved)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("Compiling jit(run_epochs)" in message for message in messages) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_networks": 3}, ValueError, "params must have a first axis of num_networks = 3"),
        ({"num_networks": 0}, ValueError, "num_networks must be an integer of at least 1"),
        ({"num_networks": 2.5}, TypeError, "num_networks must be an integer"),
        ({"learning_rate": np.ones(3)}, TypeError, "learning_rate must"),
        ({"num_networks": NUM, "learning_rate": [0.1, 0.2]}, ValueError, "one for each of the 20"),
        ({"num_networks": NUM, "learning_rate": np.zeros(NUM)}, ValueError, "learning_rate must"),
        ({"devices": jax.devices()}, ValueError, "num_networks must be given with devices"),
        ({"num_networks": NUM, "devices": []}, ValueError, "devices must hold at least one"),
        (
            {"num_networks": NUM, "optimizer": optimizers.each(optimizers.adam, RATES[1:])},
            ValueError,
            r"optimizer must have values for each of the 20 networks; got each\(...\) of 19",
        ),
        (
            {"optimizer": optimizers.each(optimizers.adam, RATES)},
            ValueError,
            r"num_networks must be given with optimizer=each\(...\), as num_networks=20",
        ),
    ],
)
def test_what_cannot_be_many_is_refused(options, error, message):
    rate = {} if "optimizer" in options else {"learning_rate": 0.1}
    with pytest.raises(error, match=message):
        descend(STARTS, BATCH, num_epochs=1, **{**rate, **options})


@pytest.mark.parametrize(
    "make",
    [
        optimizers.adam,
        lambda rate: optimizers.sgd(schedules.linear_warmup(rate, 5)),
        lambda rate: optimizers.clip_by_global_norm(optimizers.rmsprop(0.1), rate),
    ],
)
def test_optimizers_under_vmap_are_refused_with_the_line_that_works(make):
    swept = jax.vmap(make)(jnp.full(NUM, 0.1))
    for optimizer in (swept, optimizers.clip_by_global_norm(swept, 1.0)):
        with pytest.raises(ValueError, match=r"optimizer must .*each\(jaxnn.*adam, rates\)"):
            descend(STARTS, BATCH, num_epochs=1, num_networks=NUM, optimizer=optimizer)
        with pytest.raises(ValueError, match=r"optimizer must .*each\(jaxnn.*adam, rates\)"):
            descend(of(STARTS, 0), BATCH, num_epochs=1, optimizer=optimizer)


def test_the_summary_of_many_tells_how_they_are_spread():
    trained = roll(
        [[0.0], [1.0], [2.0], [3.0], [0.0]], np.float32(1), num_epochs=1_000, tolerance=1e-9,
        learning_rate=[0.1, 0.1, 1e30, 1e-6, 0.2],
    )  # fmt: skip
    assert trained.status.tolist() == [*["converged"] * 2, "diverged", "completed", "converged"]
    assert str(trained).splitlines() == [
        "gradient descent of 5 networks",
        "  status       3 converged, 1 completed, 1 diverged",
        "  loss         lowest 1, median 1",
        f"  evaluations  {np.sum(trained.num_evaluations):,}",
        f"  steps        {np.sum(trained.num_steps):,}",
        "  note         2 networks: no step changed the params (is the gradient 0, as of a dead"
        " network?)",
        "  note         1 networks: no better than the best constant answer, of loss 7",
        "  look at      result.params, result.history.loss",
    ]


def print_losses():
    losses = many_of(NUM, "batches").loss.astype(np.float32).tobytes().hex()
    sys.stdout.write(f"{len(jax.devices())} {losses}")


@pytest.mark.exhaustive
def test_on_two_devices_it_is_the_same_bits():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = ("-c", "import test_replicas; test_replicas.print_losses()")
    running = [start_program(*command, **environment) for environment in ({}, flags)]
    (one, first), (two, second) = (program.communicate()[0].split() for program in running)
    assert (one, two) == ("1", "2")
    assert first == second


def test_the_threads_work_in_the_callers_settings_of_jax():
    starts = np.linspace(-1, 1, 2 * 17).reshape(17, 2)
    with jax.enable_x64(True):
        trained = jaxnn.gradient_descent(
            KEY, bowl, starts, 0.0, num_networks=17, num_epochs=1, learning_rate=0.125
        )
    np.testing.assert_allclose(trained.params, starts * 0.75, rtol=1e-15)
    assert trained.params.dtype == np.float64
