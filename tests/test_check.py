"""The gradient check passes what is right, and names the leaf and the factor of what is wrong.

One network by hand, 2-4-4-3 with relu and tanh, carries every fault of the table `FAULTS`: a number
chooses which, so that all of them run the same compiled code.
"""

import copy
import functools
import pickle
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from output_losses import PAIRS
from tolerances import float32

import jaxnn
from jaxnn.gradients import check as gradient_check
from jaxnn.gradients.check import check_gradients
from jaxnn.gradients.functions import Problem
from jaxnn.gradients.leaves import judge
from jaxnn.gradients.witnesses import measure
from jaxnn.model.activations import HIDDEN_ACTIVATIONS

SLOW = pytest.mark.slow
KEY = jax.random.key(8)
ROWS = 7
SIZES = ((2, 4), (4, 4), (4, 3))
NAMES = [f"params['{kind}{layer}']" for kind in "bw" for layer in range(3)]


def data(dtype=np.float32):
    rng = np.random.default_rng(1)
    x, labels = rng.normal(0.5, 1.0, (ROWS, 2)).astype(dtype), rng.integers(0, 3, ROWS)
    return {"x": x, "y": np.eye(3, dtype=dtype)[labels]}


@jax.jit
def sample(key):
    normals = jax.random.normal(key, (47,))
    params, begin = {}, 0
    for i, (fan_in, fan_out) in enumerate(SIZES):
        middle, end = begin + fan_in * fan_out, begin + (fan_in + 1) * fan_out
        params[f"w{i}"] = normals[begin:middle].reshape(fan_in, fan_out)
        params[f"b{i}"], begin = normals[middle:end], end
    return params


def forward(params, x):
    h0 = x @ params["w0"] + params["b0"][None, :]
    h1 = jnp.where(h0 > 0, h0, 0)
    h2 = jnp.tanh(h1 @ params["w1"] + params["b1"][None, :])
    return h0, h1, h2, h2 @ params["w2"] + params["b2"][None, :]


def loss_fn(params, batch):
    z = forward(params, batch["x"])[-1]
    largest = jnp.max(z, axis=1)
    log_sum = jnp.log(jnp.sum(jnp.exp(z - largest[:, None]), axis=1)) + largest
    return jnp.mean(log_sum - jnp.sum(z * batch["y"], axis=1))


class Fault(NamedTuple):
    """A planted fault: the leaves that it reaches, what the suggestion says, the ratio of one."""

    leaves: str
    said: str
    ratio: float | None = None


ALL = "b0 b1 b2 w0 w1 w2"
FAULTS = {
    "relu lets everything through": Fault("b0 w0", "relu's derivative is not 0 for units that are"),
    "tanh differentiated at its output": Fault("b0 b1 w0 w1", "right only as the params go to 0"),
    "no 1/N": Fault(ALL, r"7 times too large: 1/7 is missing \(7 rows\): a sum in", ROWS),
    "wrong sign": Fault(ALL, "of the wrong sign", -1),
    "weight not transposed": Fault("b0 w0", r"right where params\['w1'\] is symmetric"),
    "hidden bias forgotten": Fault("b0", "it is 0: left out, or summed over the wrong axis", 0),
    "output bias of one row": Fault("b2", "it is that of the first row alone"),
    "half a weight gradient": Fault(
        "w2", r"2 times too small: 1/2 is there twice \(2 columns\)$", 0.5
    ),
    "nan in one coordinate": Fault("w0", "wrong in 1 of 8 coordinates"),
    "one coordinate off by a millionth": Fault("w0", "wrong in 1 of 8 coordinates"),
}
NUMBERS = {name: number for number, name in enumerate(("none", *FAULTS, "loss without its mean"))}


def by_hand(fault, params, batch):
    """Loss and gradient with the fault of that number."""

    def when(name, wrong, right):
        return jnp.where(fault == NUMBERS[name], wrong, right)

    x = batch["x"]
    h0, h1, h2, z = forward(params, x)
    p = jnp.exp(z - jnp.max(z, axis=1)[:, None])
    p = p / jnp.sum(p, axis=1)[:, None]
    d2 = (p - batch["y"]) / when("no 1/N", 1.0, float(ROWS))
    d2 = when("wrong sign", -d2, d2)
    back = d2 @ params["w2"].T
    slope = when("tanh differentiated at its output", 1 - jnp.tanh(h2) ** 2, 1 - h2**2)
    d1 = back * slope
    w1 = when("weight not transposed", params["w1"], params["w1"].T)
    d0 = (d1 @ w1) * when("relu lets everything through", 1.0, jnp.where(h0 > 0, 1.0, 0.0))
    b1 = jnp.sum(d1, axis=0)
    w0 = x.T @ d0
    corner = jnp.zeros_like(w0).at[1, 2].set(1)
    w0 = when("one coordinate off by a millionth", w0 + 1e-6 * jnp.max(jnp.abs(w0)) * corner, w0)
    w0 = when("nan in one coordinate", jnp.where(corner == 1, jnp.nan, w0), w0)
    gradient = {
        "w0": w0,
        "b0": when("hidden bias forgotten", jnp.zeros_like(params["b0"]), jnp.sum(d0, axis=0)),
        "w1": h1.T @ d1,
        "b1": b1,
        "w2": when("half a weight gradient", 0.5, 1.0) * (h2.T @ d2),
        "b2": when("output bias of one row", d2[0], jnp.sum(d2, axis=0)),
    }
    loss = loss_fn(params, batch)
    return when("loss without its mean", ROWS * loss, loss), gradient


@functools.cache
def check(fault="none", **options) -> Any:
    function = Partial(by_hand, np.int32(NUMBERS[fault]))
    return check_gradients(KEY, loss_fn, function, sample, data(), **options)


@functools.cache
def redrawn():
    """The losses and right gradients at all samples of `check`, drawn from its own stream."""

    def at(number):
        key = jax.random.fold_in(jax.random.fold_in(KEY, gradient_check.TAG), number)
        return jax.value_and_grad(loss_fn)(sample(key), data())

    return jax.jit(jax.vmap(at))(np.arange(20))


gradient_of = functools.cache(jax.value_and_grad)


def wrong_leaves(report):
    return [leaf.name for leaf in report.leaves if not leaf.passed]


# --- what is right


def test_a_right_gradient_passes_in_every_leaf_and_every_figure():
    report = check()
    assert report.passed
    assert report.leaves == check.__wrapped__().leaves
    assert [leaf.name for leaf in report.leaves] == NAMES
    assert [leaf.shape for leaf in report.leaves] == [(4,), (4,), (3,), *SIZES]
    assert (report.num_samples, report.suggestions, report.notes) == (20, (), ())
    assert report.value_error < 1e-15
    for leaf, slopes in zip(report.leaves, jax.tree.leaves(redrawn()[1]), strict=True):
        assert leaf.passed
        assert leaf.error < 1e-12
        assert leaf.difference_error < 1e-6
        assert leaf.ratio == pytest.approx(1, abs=1e-12)
        assert leaf.num_kinks == 0
        assert leaf.largest == pytest.approx(float(jnp.max(jnp.abs(slopes))), rel=1e-5)


def square(params, batch):
    return jnp.sum(jnp.square(params))


def batch_for(model):
    rng = np.random.default_rng(2)
    x = rng.normal(0.3, 1.0, (ROWS, 3)).astype(np.float32)
    targets = {
        "categorical_crossentropy": rng.integers(0, 2, ROWS),
        "binary_crossentropy": rng.integers(0, 2, (ROWS, 2)),
    }
    numbers = rng.normal(size=(ROWS, 2)).astype(np.float32)
    return jaxnn.Batch(x, targets.get(model.settings.loss, numbers))


def check_model(model, batch, **options) -> Any:
    functions = model.loss_reference, model.value_and_grad
    return check_gradients(KEY, *functions, model.sampler(scale=1.0), batch, **options)


@pytest.mark.parametrize(
    ("hidden", "output", "loss"),
    [
        ("leaky_relu", "identity", "mean_absolute_error"),
        pytest.param("gelu", "elu", "huber", marks=SLOW),
    ],
)
def test_kinks_of_activations_and_of_errors_pass(hidden, output, loss):
    model = jaxnn.mlp((3, 4, 2), hidden=hidden, output=output, loss=loss)
    draw = model.sampler(scale=1.0)

    def sampler(key):
        """In half of the samples all params are 0, and so is every pre-activation."""
        is_on = jax.random.bernoulli(key)
        return jax.tree.map(lambda leaf: jnp.where(is_on, leaf, 0), draw(key))

    batch = batch_for(model)
    batch = batch._replace(y=batch.y * (np.arange(ROWS) > 2)[:, None])
    functions = model.loss_reference, model.value_and_grad
    report = check_gradients(KEY, *functions, sampler, batch, num_samples=16)
    assert report.passed, str(report)
    assert (report.leaves[-1].num_kinks > 0) == (loss == "mean_absolute_error")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("output", "loss"), PAIRS)
def test_the_gradients_of_every_network_pass_on_200_samples_each(output, loss):
    """Each output with hidden activations and depths of 1 to 4: 14 x 22 networks."""
    for depth in range(1, 5):
        for hidden in HIDDEN_ACTIVATIONS if depth > 1 else ["relu"]:
            sizes = (3, *(5, 4, 6)[: depth - 1], 2)
            model = jaxnn.mlp(sizes, hidden=hidden, output=output, loss=loss)
            report = check_model(model, batch_for(model), num_samples=200)
            assert report.passed, (model, str(report))
            assert max(leaf.error for leaf in report.leaves) < 1e-12


# --- what is wrong


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_in_the_leaves_it_reaches_and_in_no_other(name):
    fault, report = FAULTS[name], check(name)
    wrong = [f"params['{leaf}']" for leaf in fault.leaves.split()]
    assert wrong_leaves(report) == wrong
    assert not report.passed
    assert report.value_error < 1e-15
    assert report.worst.name in wrong
    for leaf in report.leaves:
        if leaf.passed:
            assert leaf.ratio == pytest.approx(1, abs=1e-12)
        elif fault.ratio is not None:
            assert leaf.ratio == pytest.approx(fault.ratio, abs=1e-9)
        if "nan" in name and not leaf.passed:
            assert leaf.error == leaf.difference_error == np.inf
    # The differences find a fault alone, without `jax.grad`, unless they are too coarse for it.
    assert wrong_leaves(check(name, tolerance=1e30)) == ([] if "millionth" in name else wrong)
    (suggestion,) = report.suggestions
    leaves, sentence = suggestion.split(": ", 1)
    assert leaves == ", ".join(wrong)
    assert re.search(fault.said, sentence), sentence
    assert f"perhaps: {suggestion}" in str(report)
    if "millionth" in name:
        assert report.worst.error == pytest.approx(1e-6, rel=1e-3)
        assert report.worst.coordinate == (1, 2)


def test_a_loss_that_differs_fails_though_every_gradient_is_right():
    report = check("loss without its mean")
    assert not report.passed
    assert wrong_leaves(report) == []
    assert report.value_error == pytest.approx(ROWS - 1)
    (note,) = report.notes
    returned = re.search(r"returns (\S+) where loss_fn returns (\S+), in sample (\d+)", note)
    assert returned, note
    value = redrawn()[0][int(returned[3])]
    assert float(returned[2]) == pytest.approx(float(value), rel=1e-5)
    assert float(returned[1]) == pytest.approx(ROWS * float(value), rel=1e-5)
    assert note.startswith("the losses differ: ")
    assert note.endswith("; a factor of 7 in every sample")
    assert f"note: {note}" in str(report)


# --- what is small


def offset_bowl(params, batch):
    return batch["offset"] + batch["factor"] * jnp.sum(jnp.square(params))


def altered(change, params, batch):
    """The gradient times `factors`, and times `1 + error` like the loss, plus `noise`."""
    error, factors, noise = change
    value, gradient = jax.value_and_grad(offset_bowl)(params, batch)
    return value * (1 + error), gradient * factors * (1 + error) + noise


def check_bowl(offset, factor, start, error=0.0, factors=(1, 1, 1), noise=0.0) -> Any:
    """Of `offset + factor |params|^2`."""
    batch = {"offset": np.float32(offset), "factor": np.float32(factor)}
    by_hand = Partial(altered, tuple(map(np.float64, (error, factors, noise))))
    return check_gradients(KEY, offset_bowl, by_hand, np.float32(start) * np.ones(3), batch)


def test_rounding_noise_about_a_gradient_of_zero_is_no_error():
    report = check_bowl(1, 1, 0, noise=1e-17)
    assert report.passed, str(report)
    (leaf,) = report.leaves
    assert (leaf.largest, leaf.error, leaf.difference_error) == (0, 0, 0)
    assert (leaf.ratio, leaf.num_kinks) == (1, 0)


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e9])
def test_what_rounding_explains_is_shown_as_0_and_what_it_does_not_is_shown(factor):
    """Of a slope of 1.4 and a loss of 1.47 a few units in the last place are rounding."""
    for error, shown in ((4e-16, 0), (1e-12, 1e-12), (1e-8, 1e-8)):
        report = check_bowl(0, factor, 0.7, error)
        assert report.passed == (error < 1e-9)
        assert factor < 1 or report.value_error == pytest.approx(shown, rel=0.01)
        assert report.leaves[0].error == pytest.approx(shown, rel=0.01)


def test_a_large_loss_hides_no_fault_and_makes_none():
    """Of 1e8 the differences are off by some hundredths; the gradient by 1e-4."""
    for offset, factor in ((1e4, 1e-2), (-1e6, 1e-4), (0, 1e-9), (0, 1e9)):
        assert check_bowl(offset, factor, 0.7).passed
    report = check_bowl(1e8, 1, 0.7, factors=(1, 1.0001, 1))
    assert not report.passed
    assert report.leaves[0].num_kinks == 0


def fading(params, rate):
    return jnp.sum(jnp.exp(-rate * params))


@functools.cache
def with_rule(loss):
    """The loss with a derivative that is off by a factor, which comes first."""

    @jax.custom_jvp
    def ruled(factor, params, batch):
        return loss(params, batch)

    @ruled.defjvp
    def _(primals, tangents):
        factor, params, batch = primals
        value, slope = jax.jvp(lambda params: loss(params, batch), (params,), tangents[1:2])
        return value, factor * slope

    return ruled, lambda *given: jax.value_and_grad(ruled, 1)(*given)


def check_rule(factor, loss, params, batch) -> Any:
    """Of a loss, and its gradient, by a rule that is off by a factor."""
    ruled, by_hand = (Partial(function, np.float64(factor)) for function in with_rule(loss))
    return check_gradients(KEY, ruled, by_hand, params, batch)


SURE = jaxnn.mlp((4, 4))


def dense(weights):
    return (jaxnn.Dense(float32(weights), float32(np.zeros(4))),)


@pytest.mark.parametrize("size", [5, 15, 20, 25, 33, 40, 60])
def test_numbers_that_cancel_in_a_loss_make_no_fault_and_hide_none_that_can_be_seen(size):
    """Of a network that is sure of the right class, whose loss is what is left of logits."""
    numbers = np.eye(4, dtype=np.float32)
    given = dense(size * numbers), jaxnn.Batch(numbers, np.arange(4))
    report = check_gradients(KEY, SURE.loss_reference, SURE.value_and_grad, *given)
    assert report.passed, str(report)
    assert report.notes == ()
    if size <= 20:
        assert "contradict" in check_rule(2, SURE.loss_reference, *given).suggestions[0]


@pytest.mark.parametrize("rate", [5, 20, 60])
def test_a_wrong_rule_of_a_loss_that_is_small_by_itself_is_seen(rate):
    for factor in (1.0, 1.001):
        params = np.array([1, 0.7, 1.3], np.float32)
        report = check_rule(factor, fading, params, np.float32(rate))
        assert report.passed == (factor == 1), str(report)


# --- kinks

HINGE = (-0.1, -1e-6, 1 + 1e-6, 1.1)
RIGHT = dict.fromkeys(("relu", "abs", "tie", "curved"), (0, 0.5, 1)) | {"abs": (-1, 0, 0.3, 1)}
WRONG = {"relu": HINGE, "abs": (-1.1, 1.1), "tie": (-0.1, 1.1), "curved": HINGE}
KINDS = tuple(RIGHT)
AT_KINKS = {
    "relu": np.array([0, 1, -1], np.float32),
    "abs": np.array([2, 0], np.float32),
    "tie": np.array([3, 3], np.float32),
    "curved": np.array([0, 1], np.float32),
    "smooth": np.array([0.5, -0.5], np.float32),
}


def curved(x):
    """Of relu: over a step of h its slope falls by 60 h."""
    return jnp.maximum(x, 0) * jnp.exp(-30 * x)


def kinked(params, batch):
    del batch
    kinks = jnp.sum(jnp.maximum(params["relu"], 0)) + jnp.sum(jnp.abs(params["abs"]))
    kinks += jnp.maximum(*params["tie"]) + jnp.sum(curved(params["curved"]))
    return kinks + jnp.sum(jnp.exp(params["smooth"]))


def kinked_by_hand(slopes, factor, params, batch):
    """`slopes` are those at the kinks, of each kind; `factor` is off where it is smooth."""
    relu, around_0, tie, at_curve = slopes
    x = params["curved"]
    return kinked(params, batch), {
        "relu": jnp.where(params["relu"] == 0, relu, jnp.where(params["relu"] > 0, 1.0, 0.0)),
        "abs": jnp.where(params["abs"] == 0, around_0, jnp.sign(params["abs"])),
        "tie": jnp.stack([tie, 1 - tie]),
        "curved": jnp.where(x == 0, at_curve, (1 - 30 * x) * jnp.exp(-30 * x)),
        "smooth": factor * jnp.exp(params["smooth"]),
    }


def check_kinked(factor=1.0, options=None, **slopes) -> Any:
    chosen = np.array([slopes.get(kind, 0.5) for kind in KINDS], np.float64)
    by_hand = Partial(kinked_by_hand, chosen, np.float64(factor))
    return check_gradients(KEY, kinked, by_hand, AT_KINKS, None, **(options or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_between_both_sides_of_a_kink_are_right_and_no_others(kind):
    for slope in RIGHT[kind]:
        report = check_kinked(**{kind: slope})
        assert report.passed, (slope, str(report))
        kinks = {leaf.name: leaf.num_kinks for leaf in report.leaves}
        assert list(kinks.values()) == [1, 1, 1, 0, 2]  # abs, curved, relu, smooth, tie
        assert all(leaf.ratio == pytest.approx(1, abs=1e-12) for leaf in report.leaves)
    alone = {"tolerance": 1e30}  # the differences bracket the slopes without `jax.grad`
    assert check_kinked(options=alone, **{kind: RIGHT[kind][0]}).passed
    assert not check_kinked(options=alone, **{kind: WRONG[kind][-1]}).passed
    for slope in WRONG[kind]:
        assert wrong_leaves(check_kinked(**{kind: slope})) == [f"params['{kind}']"]


def test_another_slope_than_that_of_jax_grad_is_noted_and_its_own_is_not():
    own = jax.jit(jax.grad(kinked))(AT_KINKS, None)
    slopes = {kind: own[kind][0] for kind in KINDS} | {"abs": own["abs"][1]}
    assert check_kinked(**slopes).notes == ()
    slopes["relu"] = 1 - slopes["relu"] / 2
    (note,) = check_kinked(**slopes).notes
    assert note.startswith("params['relu'], 1 coordinate: at a kink the gradient is not that of")
    assert f"note: {note}" in str(check_kinked(**slopes))


@pytest.mark.parametrize("factor", [-1.0, 1 + 1e-8, 0.0])
def test_kinks_hide_no_fault_elsewhere(factor):
    report = check_kinked(factor)
    assert wrong_leaves(report) == ["params['smooth']"]
    if factor < 0:
        assert report.suggestions == ("params['smooth']: of the wrong sign",)
    (said,) = check_kinked(relu=1.1).suggestions
    assert "right close by: wrong at a kink alone" in said


def bent(params, batch):
    """Slopes of 0 and of 1 at either side of `batch[0]`, rounded off over `batch[1]`."""
    z = params - batch[0]
    return jnp.sum(jnp.where(batch[1] > 0, jnp.sqrt(z * z + batch[1] ** 2), jnp.abs(z)) + z) / 2


@functools.cache
def but_at_0(loss):
    """The loss with its gradient, except that `slope` is what is meant at exactly 0."""

    def by_hand(slope, params, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        return value, jnp.where(params == 0, slope, gradient)

    return by_hand


def check_at_0(loss, slope, batch=None) -> Any:
    params = np.array([0, 1, -1], np.float32)
    return check_gradients(KEY, loss, Partial(but_at_0(loss), np.float64(slope)), params, batch)


def check_bent(slope, kink=0.0, width=0.0) -> Any:
    return check_at_0(bent, slope, (np.float32(kink), np.float32(width)))


@pytest.mark.parametrize("kink", [5e-7, 1e-10])
def test_beside_a_kink_only_the_slope_of_ones_own_side_is_right(kink):
    """The differences reach over it, as they step by 1e-6."""
    assert check_bent(0.3).passed
    for place, own in ((kink, 0.0), (-kink, 1.0)):
        report = check_bent(own, kink=place)
        assert report.passed, str(report)
        assert report.leaves[0].num_kinks == 0
        assert not check_bent(0.3, kink=place).passed
        assert not check_bent(1 - own, kink=place).passed


@pytest.mark.parametrize("width", [1e-2, 1e-7, 1e-9])
def test_a_bend_however_sharp_is_no_kink(width):
    report = check_bent(0.5, width=width)
    assert report.passed, str(report)
    assert report.leaves[0].num_kinks == 0
    for slope in (0.5 + 1e-8, 0.3, 0, 1):
        assert not check_bent(slope, width=width).passed


def test_where_kinks_meet_the_slope_of_the_loss_is_right_and_that_of_jax_grad_is_not():
    """`relu(x) - relu(-x)` is x; a derivative of 0 at 0 in both makes 0 of it."""

    def line(params, batch):
        return jnp.sum(jax.nn.relu(params) - jax.nn.relu(-params))

    reports = [check_at_0(line, slope) for slope in (0, 0.5, 1)]
    assert [report.passed for report in reports] == [False, False, True]
    assert "jax.grad itself lies outside the finite differences" in reports[0].notes[0]
    assert "the finite differences contradict it" in reports[0].suggestions[0]


def hinges(params, batch):
    return jnp.sum(batch["c"] * jnp.maximum(batch["w"] @ params, 0))


def given_gradient(gradient, params, batch):
    return hinges(params, batch), gradient


def sides(params, w, c):
    """Slopes below and above, exact: a unit at 0 is on where its weight has the sign of the move.

    Returns `(2, params)`.
    """
    z, slopes = w @ params, c[:, None] * w
    below, above = ((z > 0)[:, None] | ((z == 0)[:, None] & (sign * w > 0)) for sign in (-1, 1))
    return np.stack([np.sum(slopes * below, axis=0), np.sum(slopes * above, axis=0)])


@pytest.mark.parametrize("cases", [40, pytest.param(2_000, marks=pytest.mark.exhaustive)])
def test_of_small_integers_the_slopes_that_pass_are_those_between_exact_sides(cases):
    """Many units are at 0 exactly, also several at once, of either sign."""
    rng, verdicts, kinks = np.random.default_rng(3), [], 0
    for _ in range(cases):
        params, w, c = (rng.integers(-2, 3, shape) for shape in (4, (6, 4), 6))
        low, high = np.sort(sides(params, w, c), axis=0)
        inside = low + rng.choice([0, 0.5, 1], 4) * (high - low)
        wrong = inside + np.where(np.arange(4) == rng.integers(4), rng.choice([-1e-3, 1e-3, 1]), 0)
        is_right = (low <= wrong) & (wrong <= high)
        batch = {"w": w.astype(np.float32), "c": c.astype(np.float32)}
        for gradient, right in ((inside, True), (wrong, bool(np.all(is_right)))):
            by_hand = Partial(given_gradient, gradient)
            report = check_gradients(KEY, hinges, by_hand, params.astype(np.float32), batch)
            assert report.passed == right, (params, w, c, gradient, str(report))
            assert report.leaves[0].num_kinks == np.sum(high > low)
            verdicts.append(right)
        kinks += np.sum(high > low)
    assert kinks > cases / 4
    assert cases / 4 < verdicts.count(False) < cases


# --- what is not finite


@functools.cache
def with_gradient(loss, gradient):
    """Loss and gradient of params alone; `gradient(params, slope)`."""
    return lambda slope, params, batch: (loss(params, batch), gradient(params, slope))


def check_at(params, loss, gradient, slope=0.0) -> Any:
    by_hand = Partial(with_gradient(loss, gradient), np.float64(slope))
    return check_gradients(KEY, loss, by_hand, np.array(params, np.float32), None)


def roots(params, batch):
    """The trap of `where`: a slope of NaN in the branch that is not taken."""
    return jnp.sum(jnp.where(params > 0, jnp.sqrt(params), 0))


def slope_of_roots(params, slope):
    return jnp.where(params > 0, 0.5 / jnp.sqrt(jnp.abs(params)), slope)


def norm(params, batch):
    return jnp.sqrt(jnp.sum(params**2))


def logarithms(params, batch):
    """The differences of log reach below 0."""
    return jnp.sum(jnp.log(params))


def exponentials(params, batch):
    return jnp.sum(jnp.exp(params))


def clipped(params, clip):
    return jnp.where(clip > 0, jnp.exp(jnp.minimum(params, clip)), jnp.exp(params))


@pytest.mark.parametrize(
    ("loss", "gradient", "params", "right", "wrong", "note"),
    [
        (roots, slope_of_roots, [-1, 4], [0], [1e-4, np.nan, np.inf], "the finite differences dec"),
        (norm, jnp.full_like, [0, 0], [-1, 0, 0.6, 1], [1.01], "the finite differences decide"),
        (logarithms, lambda p, e: (1 + e) / p, [1e-7, 4], [0], [1e-8], "jax.grad decides alone"),
        (exponentials, clipped, [800, 4], [0], [700], "nothing tells what is right"),
    ],
)
def test_what_is_finite_decides(loss, gradient, params, right, wrong, note):
    """Where nothing is finite, only a gradient that is not finite either passes."""
    for slope in right:
        report = check_at(params, loss, gradient, slope)
        assert report.passed, str(report)
        assert report.value_error == 0
        assert note in report.notes[-1]
    assert not any(check_at(params, loss, gradient, slope).passed for slope in wrong)


def test_a_fault_is_named_though_jax_grad_is_not_finite_elsewhere():
    report = check_at([-1, 4], roots, lambda params, slope: 2 * slope_of_roots(params, slope))
    assert not report.passed
    assert "2 times too large" in report.suggestions[0]
    assert check_at([-1, 4], roots, slope_of_roots).leaves[0].largest == 0.25
    assert check_at([0, 0], norm, jnp.full_like).leaves[0].num_kinks == 2


def test_a_leaf_of_which_nothing_could_be_judged_fails():
    report = check_at([800, 900], exponentials, clipped)
    assert wrong_leaves(report) == ["params"]
    assert report.leaves[0].error == np.inf


# --- samplers, batches and the table


@jax.tree_util.register_dataclass
@dataclass
class Line:
    """A model that is its own params, as an Equinox module is."""

    slope: Any
    height: Any

    def __call__(self, x):
        return self.slope * x + self.height


def test_a_model_that_can_be_called_is_params_and_a_partial_is_a_sampler():
    def loss(params, batch):
        return jnp.sum(params(batch) ** 2)

    x, line = np.arange(3, dtype=np.float32), Line(np.float32(2), np.ones(3, np.float32))
    functions = loss, jax.value_and_grad(loss)
    report = check_gradients(KEY, *functions, line, x)
    assert (report.passed, report.num_samples, report.worst_key) == (True, 1, None)
    assert [leaf.name for leaf in report.leaves] == ["params.slope", "params.height"]
    sampler = Partial(lambda scale, key: Line(scale, jax.random.normal(key, (3,))), jnp.ones(()))
    drawn = check_gradients(KEY, *functions, sampler, x, num_samples=1)
    assert drawn.passed
    assert drawn.worst_key is not None


def test_other_samples_data_and_numbers_compile_nothing():
    traces = []

    def counted(params, batch):
        traces.append(None)
        return offset_bowl(params, batch)

    def check_counted(start, offset, error, **options):
        batch = {"offset": np.float32(offset), "factor": np.float32(1)}
        by_hand = Partial(altered, tuple(map(np.float64, (error, 1, 0))))
        params = np.full(3, start, np.float32)
        check_gradients(KEY, counted, by_hand, params, batch, **options)

    check_counted(1, 1, 0)
    before = len(traces)
    check_counted(2, 3, 1e-8, tolerance=0.1)
    assert len(traces) == before


def test_the_table_has_a_row_a_leaf():
    title, header, *lines = str(check("half a weight gradient")).splitlines()
    rows = lines[: len(NAMES)]
    assert title.startswith("gradient check FAILED: 20 samples in float64, tolerance 1e-09")
    assert re.split(" {2,}", header.strip()) == [
        *("leaf", "shape", "largest", "vs jax.grad", "vs differences", "ratio", "kinks")
    ]
    assert [row.split()[0] for row in rows] == NAMES
    assert [row.split()[-1] for row in rows] == ["ok"] * 5 + ["WRONG"]
    assert "0.5000" in rows[-1]
    assert "(4, 3)" in rows[-1]
    assert len({len(row.removesuffix("  ok").removesuffix("  WRONG")) for row in rows}) == 1
    legend = " ".join(lines[len(NAMES) : lines.index("")])
    assert all(f"{column}: " in legend for column in ("largest", "vs", "ratio", "kinks"))
    assert "passed" in str(check()).splitlines()[0]


@pytest.mark.parametrize("of_numpy", [False, True])
def test_a_sampler_that_draws_elsewhere_than_from_its_key_is_refused(of_numpy):
    rng = np.random.default_rng(1)

    def sample_fn(key):
        drawn = jax.random.normal(key, (2,))
        return (np.asarray(drawn) if of_numpy else drawn) + np.float32(rng.normal())

    with pytest.raises(ValueError, match=r"^sampler must draw from its key; got other"):
        check_gradients(KEY, square, jax.value_and_grad(square), sample_fn, None)


def test_of_a_sampler_that_ignores_its_key_one_sample_is_checked_and_noted():
    functions, start = (square, gradient_of(square)), np.ones(2, np.float32)
    said = "sampler returns the same params for every key: one sample was checked"
    for sampler, notes in ((lambda key: start, (said,)), (start, ())):
        report = check_gradients(KEY, *functions, sampler, None)
        assert (report.passed, report.num_samples, report.notes) == (True, 1, notes)
    report = check_gradients(KEY, *functions, lambda key: start, None, num_samples=1)
    assert report.notes == ()


def of_rows(mean, params, batch):
    return mean(jnp.square(params - batch[0]) + batch[1])


def where_finite(numbers):
    return jnp.mean(jnp.where(jnp.isfinite(numbers), numbers, 0))


PLAIN, MASKED = (functools.partial(of_rows, mean) for mean in (jnp.mean, where_finite))


@pytest.mark.parametrize(
    ("offset", "said"), [(0, "got nan in batch[0] at [1, 0]"), (-np.inf, "-inf in batch[1]")]
)
def test_numbers_that_are_not_finite_are_refused_unless_the_loss_masks_them(offset, said):
    first = np.array([[1, 2], [3 if offset else np.nan, 3]], np.float32)
    given = np.ones((2, 2), np.float32), (first, np.float32(offset))
    with pytest.raises(ValueError, match="^batch must hold finite.*" + re.escape(said)):
        check_gradients(KEY, PLAIN, gradient_of(PLAIN), *given)
    assert check_gradients(KEY, MASKED, gradient_of(MASKED), *given).num_samples == 1


# --- coverage, power and the smallest case


def far_relu(params, batch):
    """A branch that no sample from 0 to 1 reaches."""
    return jnp.sum(params**2) + jnp.sum(jnp.maximum(params - batch, 0))


def without_relu(params, batch):
    return far_relu(params, batch), 2 * params


def three_uniforms(key):
    return jax.random.uniform(key, (3,))


def check_far(by_hand=None, loss=far_relu, sampler=None, **options) -> Any:
    """Of params from 0 to 1, and a branch at 5."""
    draw = three_uniforms if sampler is None else sampler
    by_hand = by_hand or gradient_of(loss)
    options = {"certify": True, "num_samples": 4} | options
    return check_gradients(KEY, loss, by_hand, draw, np.float32(5), **options)


def test_without_certify_nothing_more_is_reported():
    report = check_far(without_relu, certify=False)
    assert report.passed
    assert report[-5:] == (*(None,) * 4, "gradient")
    words = ("coverage", "power", "smallest", "symmetries")
    assert not any(word in str(report) for word in words)


def test_a_fault_behind_a_branch_is_found_by_samples_aimed_at_it():
    report = check_far(without_relu)
    assert not report.passed
    assert report.coverage.share == 1
    assert report.power is None
    assert report.num_samples > 4
    assert report.worst.sample >= 4
    assert report.worst_key is None
    (note,) = report.notes
    added = report.num_samples - 4
    assert note == f"{added} sample{'s' * (added > 1)} added to those drawn, to visit more branches"
    case = report.smallest
    assert case.params.shape == (1,)
    assert case.params[0] > case.batch
    assert case.gradient == pytest.approx(2 * case.params[0])
    assert case.expected == pytest.approx(2 * case.params[0] + 1)
    said = str(report).splitlines()
    assert "coverage: 100 % of the sides of its branches were visited" in said
    assert f"smallest case: {case.where()}" in said
    assert f"  params  [{case.params[0]:g}]" in said


def test_a_right_gradient_is_certified_with_what_the_check_would_have_missed():
    report = check_far()
    assert report.passed
    assert report.smallest is None
    assert report.coverage.share == 1
    rare = "twice as large in 1 of 1,000 samples"
    assert rare in report.power.missed
    line = next(line for line in str(report).splitlines() if line.startswith("power: "))
    caught = len(report.power.faults) - len(report.power.missed)
    assert 0.8 < report.power.share == caught / len(report.power.faults) < 1
    assert line.startswith(f"power: {caught} of {len(report.power.faults)} planted faults caught; ")
    assert rare in line
    # A check that sees less, with tolerances of a tenth, catches less, and says so.
    coarse = check_far(tolerance=0.1, difference_tolerance=0.1)
    assert "params: off by 0.0001" in coarse.power.missed
    assert coarse.power.share < report.power.share
    coarse = check_far(tolerance=3, difference_tolerance=3)
    assert len(coarse.power.missed) > 4
    assert f"; {len(coarse.power.missed) - 4} more" in str(coarse)


@SLOW
def test_a_branch_that_is_never_visited_is_told_with_its_place():
    def odd(params, batch):
        return jnp.sum(jnp.where(jnp.sum(params**2) < 0, params**3, params))

    report = check_far(loss=odd)
    assert report.passed
    assert report.coverage.share == 0.5
    (branch,) = report.coverage.missed
    said = f"sides of its branches were visited: {branch.place}, where, true never"
    assert f"coverage: 50 % of the {said}" in str(report).splitlines()
    assert branch.place.startswith("test_check.py:")


def test_a_loss_in_numpy_has_power_and_no_coverage():
    def in_numpy(params, batch):
        return np.sum(np.square(params)) + batch

    report = check_far(lambda params, batch: (in_numpy(params, batch), 2 * params), in_numpy)
    assert report.passed
    assert report.coverage is None
    missed = [fault.removesuffix(" samples") for fault in report.power.missed]
    assert missed == ["twice as large in 1 of 100", "twice as large in 1 of 1,000"]
    assert report.notes[-1] == "coverage is not known of a loss that JAX cannot trace"


def test_given_params_are_certified_alone_where_all_is_visited():
    report = check_far(sampler=np.array([1, 7, 2], np.float32))
    assert (report.passed, report.num_samples, report.worst_key) == (True, 1, None)
    assert report.coverage.share == 1


@SLOW
def test_symmetries_that_the_gradient_breaks_are_told_of():
    def loss(params, batch):
        return jax.nn.logsumexp(params) - params[1]  # as of a softmax: only differences count

    def by_hand(is_right, params, batch):
        return loss(params, batch), jnp.where(is_right, jax.grad(loss)(params, batch), params)

    for is_right in (True, False):
        report = check_far(Partial(by_hand, np.bool_(is_right)), loss)
        (symmetry,) = report.invariants
        assert symmetry.passed == report.passed == is_right
        told = f"symmetries: the gradient keeps {int(is_right)} of the loss's 1"
        assert told + f"; not: {symmetry.name}" * (not is_right) in str(report).splitlines()


def test_the_judge_of_planted_faults_judges_as_the_check_does():
    """At a kink as well: there any slope from 0 to 1 is right."""
    params = {"abs": np.array([[2.0, -1]]), "relu": np.array([[0.0, 1, -1]])}

    def loss(params, batch):
        return jnp.sum(jnp.maximum(params["relu"], 0)) + jnp.sum(jnp.abs(params["abs"]))

    with jax.enable_x64(True):
        functions = Partial(loss), Partial(jax.value_and_grad(loss))
        problem = Problem(*functions, None, (1e-9, 1e-5))
        values, _, _, losses = measure(problem, params)
        passes = judge(problem, losses, params)
        for slope in (0, 0.5, 1, -1e-6, 1 + 1e-6, np.nan):
            gradient = np.array([[1.0, -1, slope, 1, 0]])
            assert passes(np.arange(1), values, gradient) == (0 <= slope <= 1)
            assert not passes(np.arange(1), values + 1e-6, gradient)


def test_the_judge_takes_small_slopes_as_the_check_does_beside_large_ones():
    """An error in slopes of 1e-13 is none beside slopes of 1; alone they are judged."""
    params = np.array([[1.0, 2, 3], [1e-13, 2e-13, 3e-13]])
    with jax.enable_x64(True):
        loss = Partial(lambda params, batch: jnp.sum(params**2))
        by_hand = Partial(lambda params, batch: (loss(params, batch), 2 * params))
        for rows, passed in (([0, 1], True), ([1, 1], False)):
            some, last = params[rows], np.array([1])
            problem = Problem(loss, by_hand, None, (1e-9, 1e-5))
            values, _, _, losses = measure(problem, some)
            passes = judge(problem, losses, some)
            assert passes(last, values[last], 2 * some[last])
            assert passes(last, values[last], 4 * some[last]) == passed
            assert not passes(np.array([0]), values[:1], 4 * some[:1])


# --- what is refused


def in_float32(params, batch):
    return jnp.sum(jnp.square(params.astype(jnp.float32)))


def gradient(change):
    return {"value_and_grad_fn": lambda params, batch: (square(params, batch), change(2 * params))}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": 0}, TypeError, "key must be a single typed key"),
        ({"loss_fn": in_float32}, TypeError, "loss_fn must compute in the dtype.*float32"),
        (gradient(lambda g: g.astype(jnp.float32)), TypeError, ".* like params; got float32"),
        ({"value_and_grad_fn": square}, TypeError, r".* must return \(loss, gradients\)"),
        ({"sampler": None}, ValueError, "params must hold at least one array"),
        ({"sampler": np.zeros(0, np.float32)}, ValueError, "params must hold at least one number"),
        ({"tolerance": np.nan}, ValueError, "tolerance must be a finite number above 0"),
        ({"difference_tolerance": -1}, ValueError, "difference_tolerance must be a finite"),
    ],
)
def test_what_the_check_cannot_take_is_refused_by_name(options, error, message):
    functions = {"loss_fn": square, "value_and_grad_fn": jax.value_and_grad(square)}
    given: Any = {"key": KEY, **functions, "sampler": np.ones(2, np.float32), "batch": None}
    with pytest.raises(error, match=f"^{message}"):
        check_gradients(**(given | options))


def test_validate_of_both_functions_is_asked():
    batch = jaxnn.Batch(np.eye(4, dtype=np.float32), np.full(4, 7))
    pairs: Any = (SURE.loss_reference, square), (square, SURE.value_and_grad)
    for loss, by_hand in pairs:
        with pytest.raises(ValueError, match=r"batch\.y must be classes 0 to 3"):
            check_gradients(KEY, loss, by_hand, dense(np.eye(4)), batch)


def test_a_report_pickles_with_its_key():
    report = check("wrong sign")
    for again in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert again._replace(worst_key=None) == report._replace(worst_key=None)
        assert jnp.all(again.worst_key == report.worst_key)


def test_the_callers_arrays_and_settings_are_left_alone():
    batch = data()
    before = {name: leaf.tobytes() for name, leaf in batch.items()}
    for leaf in batch.values():
        leaf.flags.writeable = False
    check_gradients(KEY, loss_fn, Partial(by_hand, np.int32(NUMBERS["none"])), sample, batch)
    assert {name: leaf.tobytes() for name, leaf in batch.items()} == before
    assert not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    assert jnp.ones(()).dtype == np.float32


def nowhere(params, batch):
    return jnp.sqrt(params["a"] * batch) + jnp.sum(params["b"]) + jnp.sum(params["empty"])


def nowhere_by_hand(factor, params, batch):
    value, gradient = jax.value_and_grad(nowhere)(params, batch)
    return value, gradient | {"b": factor * gradient["b"]}


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, "a"), (0.5, "ab")])
def test_a_leaf_of_nan_fails_and_takes_no_other_with_it_nor_one_without_numbers(factor, wrong):
    shapes = {"a": (), "b": (2,), "empty": (0, 3)}
    start = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    by_hand = Partial(nowhere_by_hand, np.float64(factor))
    report = check_gradients(KEY, nowhere, by_hand, start, np.float32(0))
    assert report.value_error == 0
    assert [leaf.largest for leaf in report.leaves[1:]] == [1, 0]
    assert wrong_leaves(report) == [f"params['{name}']" for name in wrong]
