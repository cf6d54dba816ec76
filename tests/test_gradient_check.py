"""The gradient check passes what is right, and names the leaf and the factor of what is wrong.

One network by hand, 2-4-4-3 with relu and tanh, carries every fault: a number chooses which, so
that all of them run the same compiled code.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxnn
from jaxnn import gradient_check, gradient_witnesses
from jaxnn.gradient_check import check_gradients
from jaxnn.model.activations import HIDDEN_ACTIVATIONS
from jaxnn.model.heads import HEADS

KEY = jax.random.key(8)
ROWS = 7
SIZES = ((2, 4), (4, 4), (4, 3))
NAMES = [f"params['{kind}{layer}']" for kind in "bw" for layer in range(3)]


def data(dtype=np.float32):
    rng = np.random.default_rng(1)
    x, labels = rng.normal(0.5, 1.0, (ROWS, 2)).astype(dtype), rng.integers(0, 3, ROWS)
    return {"x": x, "y": np.eye(3, dtype=dtype)[labels]}


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


FAULTS = (
    "none",
    "relu lets everything through",
    "tanh differentiated at its output",
    "no 1/N",
    "wrong sign",
    "weight not transposed",
    "hidden bias forgotten",
    "output bias of one row",
    "half a weight gradient",
    "one coordinate off by a millionth",
    "nan in one coordinate",
    "loss without its mean",
)


def by_hand(fault, params, batch):
    """Loss and gradient with the fault of that number."""

    def when(name, wrong, right):
        return jnp.where(fault == FAULTS.index(name), wrong, right)

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


def check(fault="none", **options) -> Any:
    function = Partial(by_hand, np.int32(FAULTS.index(fault)))
    return check_gradients(KEY, loss_fn, function, sample, data(), **options)


def wrong_leaves(report):
    return [leaf.name for leaf in report.leaves if not leaf.passed]


# --- what is right


def test_a_right_gradient_passes_in_every_leaf_and_every_figure():
    report = check()
    assert report.passed
    assert [leaf.name for leaf in report.leaves] == NAMES
    assert [leaf.shape for leaf in report.leaves] == [(4,), (4,), (3,), *SIZES]
    assert report.num_samples == 20
    assert report.value_error < 1e-15
    for leaf in report.leaves:
        assert leaf.passed
        assert leaf.error < 1e-12
        assert leaf.difference_error < 1e-6
        assert leaf.ratio == pytest.approx(1, abs=1e-12)
        assert leaf.num_kinks == 0
        assert 1e-3 < leaf.largest < 10


def square(params, batch):
    return jnp.sum(jnp.square(params))


def two_normals(key):
    return jax.random.normal(key, (2,))


@pytest.mark.parametrize("number", [1, 3])
def test_so_many_samples_are_drawn_as_asked_for_and_largest_is_of_all_of_them(number):
    """Redrawn here: the keys are split from the check's own stream; the slope of x^2 is 2x."""
    stream = jax.random.fold_in(KEY, gradient_check.TAG)
    drawn = np.stack([two_normals(key) for key in jax.random.split(stream, number)])
    function = jax.value_and_grad(square)
    report = check_gradients(KEY, square, function, two_normals, None, num_samples=number)
    assert report.num_samples == number
    (leaf,) = report.leaves
    assert leaf.largest == pytest.approx(2 * float(np.max(np.abs(drawn))), rel=1e-6)
    assert (leaf.name, leaf.shape) == ("params", (2,))


def batch_for(model):
    rng = np.random.default_rng(2)
    x = rng.normal(0.3, 1.0, (ROWS, 3)).astype(np.float32)
    targets = {
        "categorical_crossentropy": rng.integers(0, 2, ROWS),
        "binary_crossentropy": rng.integers(0, 2, (ROWS, 2)),
        "mean_squared_error": rng.normal(size=(ROWS, 2)).astype(np.float32),
    }
    return jaxnn.Batch(x, targets[model.settings.loss])


def check_network(model, **options):
    return check_gradients(
        KEY,
        model.loss_reference,
        model.value_and_grad,
        model.sampler(scale=1.0),
        batch_for(model),
        **options,
    )


@pytest.mark.exhaustive
def test_the_gradients_of_a_network_pass():
    model = jaxnn.mlp(
        (3, 5, 2),
        hidden="tanh",
        output="sigmoid",
        loss="binary_crossentropy",
        hidden_biases=False,
    )
    report = check_network(model)
    assert report.passed, str(report)
    assert max(leaf.error for leaf in report.leaves) < 1e-12


@pytest.mark.exhaustive
@pytest.mark.parametrize(("output", "loss"), HEADS)
def test_the_gradients_of_every_network_pass_on_200_samples_each(output, loss):
    """Each head with hidden activations and depths of 1 to 4: 7 x 13 networks, 18,200 samples."""
    failed, count = [], 0
    for depth in range(1, 5):
        for hidden in HIDDEN_ACTIVATIONS[: 4 if depth > 1 else 1]:
            sizes = (3, *(5, 4, 6)[: depth - 1], 2)
            model = jaxnn.mlp(sizes, hidden=hidden, output=output, loss=loss)
            report = check_network(model, num_samples=200)
            count += 1
            if not report.passed or max(leaf.error for leaf in report.leaves) > 1e-12:
                failed.append((model, str(report)))
    assert count == 13
    assert failed == []


# --- what is wrong

BROKEN = {
    "relu lets everything through": ["b0", "w0"],
    "tanh differentiated at its output": ["b0", "b1", "w0", "w1"],
    "no 1/N": ["b0", "b1", "b2", "w0", "w1", "w2"],
    "wrong sign": ["b0", "b1", "b2", "w0", "w1", "w2"],
    "weight not transposed": ["b0", "w0"],
    "hidden bias forgotten": ["b0"],
    "output bias of one row": ["b2"],
    "half a weight gradient": ["w2"],
    "one coordinate off by a millionth": ["w0"],
    "nan in one coordinate": ["w0"],
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_fails_in_the_leaves_it_reaches_and_in_no_other(fault):
    report = check(fault)
    assert not report.passed
    assert wrong_leaves(report) == [f"params['{name}']" for name in BROKEN[fault]]
    assert report.value_error < 1e-15
    right = [leaf for leaf in report.leaves if leaf.passed]
    assert all(leaf.ratio == pytest.approx(1, abs=1e-12) for leaf in right)


@pytest.mark.parametrize("fault", sorted(set(BROKEN) - {"one coordinate off by a millionth"}))
def test_finite_differences_find_the_fault_without_jax_grad(fault):
    """With `jax.grad` never consulted, the other witness alone fails the same leaves."""
    report = check(fault, tolerance=1e30)
    assert wrong_leaves(report) == [f"params['{name}']" for name in BROKEN[fault]]


def test_jax_grad_finds_what_finite_differences_are_too_coarse_for():
    fault = "one coordinate off by a millionth"
    assert check(fault, tolerance=1e30).passed
    report = check(fault, difference_tolerance=1e30)
    assert wrong_leaves(report) == ["params['w0']"]
    (leaf,) = [leaf for leaf in report.leaves if not leaf.passed]
    assert leaf.error == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("fault", "name", "ratio"),
    [
        ("no 1/N", "w1", ROWS),
        ("wrong sign", "b2", -1),
        ("hidden bias forgotten", "b0", 0),
        ("half a weight gradient", "w2", 0.5),
    ],
)
def test_the_ratio_is_the_factor_of_the_fault(fault, name, ratio):
    leaves = {leaf.name: leaf for leaf in check(fault).leaves}
    assert leaves[f"params['{name}']"].ratio == pytest.approx(ratio, abs=1e-9)


def test_a_nan_is_infinitely_wrong():
    (leaf,) = [leaf for leaf in check("nan in one coordinate").leaves if not leaf.passed]
    assert leaf.error == leaf.difference_error == np.inf


def test_a_loss_that_differs_fails_though_every_gradient_is_right():
    report = check("loss without its mean")
    assert not report.passed
    assert wrong_leaves(report) == []
    assert report.value_error == pytest.approx(ROWS - 1)


def test_a_leaf_whose_true_gradient_is_nan_fails_and_takes_no_other_with_it():
    def nowhere(params, batch):
        return jnp.sqrt(params["a"] * batch) + jnp.sum(params["b"])

    start = {"a": np.float32(1), "b": np.ones(2, np.float32)}
    report = check_gradients(KEY, nowhere, jax.value_and_grad(nowhere), start, np.float32(0))
    assert report.value_error == 0
    assert wrong_leaves(report) == ["params['a']"]

    def half_of_b(params, batch):
        value, gradient = jax.value_and_grad(nowhere)(params, batch)
        return value, gradient | {"b": 0.5 * gradient["b"]}

    report = check_gradients(KEY, nowhere, half_of_b, start, np.float32(0))
    assert wrong_leaves(report) == ["params['a']", "params['b']"]


# --- what is small


def offset_bowl(params, batch):
    return batch["offset"] + batch["factor"] * jnp.sum(jnp.square(params))


def check_bowl(offset, factor, start, by_hand=None) -> Any:
    """Of `offset + factor |params|^2`."""
    batch = {"offset": np.float32(offset), "factor": np.float32(factor)}
    by_hand = by_hand or jax.value_and_grad(offset_bowl)
    return check_gradients(KEY, offset_bowl, by_hand, np.float32(start) * np.ones(3), batch)


def with_noise(params, batch):
    value, gradient = jax.value_and_grad(offset_bowl)(params, batch)
    return value, gradient + 1e-17


def test_rounding_noise_about_a_gradient_of_zero_is_no_error():
    report = check_bowl(1, 1, 0, with_noise)
    assert report.passed, str(report)
    assert report.leaves[0].largest == 0
    # Where all gradients vanish the error is in units of ROUNDING times the loss.
    assert 0 < report.leaves[0].error * gradient_witnesses.ROUNDING < 1e-16


@pytest.mark.parametrize(("offset", "factor"), [(1e4, 1e-2), (-1e6, 1e-4), (0, 1e-9), (0, 1e9)])
def test_small_gradients_of_large_losses_and_losses_of_any_unit_pass(offset, factor):
    report = check_bowl(offset, factor, 0.7)
    assert report.passed, str(report)


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e9])
def test_a_loss_of_another_unit_is_checked_as_sharply(factor):
    def doubled(params, batch):
        value, gradient = jax.value_and_grad(offset_bowl)(params, batch)
        return value, gradient * (1 + 1e-8)

    report = check_bowl(0, factor, 0.7, doubled)
    assert not report.passed
    assert report.leaves[0].error == pytest.approx(1e-8, rel=1e-4)


# --- kinks


def hinge(params, batch):
    return jnp.sum(jnp.abs(params["w"]) * batch) + jnp.sum(jnp.square(params["v"]))


def hinge_by_hand(slope, params, batch):
    """`slope` is what is meant at exactly 0."""
    sign = jnp.where(params["w"] == 0, slope, jnp.sign(params["w"]))
    return hinge(params, batch), {"w": sign * batch, "v": 2 * params["v"]}


CORNERS = {"v": np.array([1.0, -2.0], np.float32), "w": np.array([0, 1.5, 0, -2], np.float32)}


def check_hinge(slope, **options) -> Any:
    by_hand = Partial(hinge_by_hand, np.float64(slope))
    return check_gradients(KEY, hinge, by_hand, CORNERS, np.float32(3), **options)


def test_kinks_are_counted_and_any_slope_between_their_sides_passes_the_differences():
    """At 0 the slopes of 3|x| lie between -3 and 3; `jax.grad` of |x| has 0 there."""
    for slope in (-1.0, -0.25, 0.0, 1.0):
        v, w = check_hinge(slope, tolerance=1e30).leaves
        assert (v.num_kinks, w.num_kinks) == (0, 2)
        assert v.passed
        assert w.passed
    v, w = check_hinge(1.5, tolerance=1e30).leaves
    assert v.passed
    assert not w.passed
    assert w.difference_error == pytest.approx(0.5, rel=1e-3)


def test_the_convention_at_a_kink_is_still_that_of_jax_grad():
    convention = float(jax.grad(jnp.abs)(0.0))
    assert check_hinge(convention).passed
    assert wrong_leaves(check_hinge(-convention or 0.5)) == ["params['w']"]


def test_relu_at_exactly_zero_passes_with_its_kinks_counted():
    model = jaxnn.mlp((2, 3, 3))
    zero = jax.tree.map(jnp.zeros_like, model.init(KEY))
    ones = jnp.ones_like(zero[1].weights)
    params = (zero[0], zero[1]._replace(weights=ones * jnp.arange(3.0)[None, :]))
    x, y = jaxnn.datasets.nnfs_vertical(samples=3)
    batch = jaxnn.Batch(x[1:], y[1:])
    report = check_gradients(KEY, model.loss_reference, model.value_and_grad, params, batch)
    assert report.passed, str(report)
    assert [leaf.num_kinks > 0 for leaf in report.leaves] == [True, True, False, False]


# --- samplers, batches and the table


def test_params_in_place_of_a_sampler_are_checked_once():
    report = check_hinge(0.0, num_samples=50)
    assert (report.num_samples, report.passed) == (1, check_hinge(0.0).passed)


def test_the_same_key_checks_the_same_samples_and_another_others():
    assert check().leaves == check().leaves
    function = Partial(by_hand, np.int32(0))
    other = check_gradients(jax.random.key(9), loss_fn, function, sample, data())
    assert other.leaves[0].largest != check().leaves[0].largest


def test_other_samples_data_and_numbers_compile_nothing():
    traces = []

    def counted(params, batch):
        traces.append(None)
        return hinge(params, batch)

    gradient = Partial(hinge_by_hand, np.float64(0))
    check_gradients(KEY, counted, gradient, CORNERS, np.float32(3))
    before = len(traces)
    other = jax.tree.map(lambda leaf: leaf + 1, CORNERS)
    check_gradients(KEY, counted, gradient, other, np.float32(2), tolerance=0.1)
    check_gradients(KEY, counted, Partial(hinge_by_hand, np.float64(1)), other, np.float32(5))
    assert len(traces) == before


def test_the_callers_arrays_and_settings_are_left_alone():
    batch = data()
    before = {name: leaf.tobytes() for name, leaf in batch.items()}
    for leaf in batch.values():
        leaf.flags.writeable = False
    check_gradients(KEY, loss_fn, Partial(by_hand, np.int32(0)), sample, batch)
    assert {name: leaf.tobytes() for name, leaf in batch.items()} == before
    assert not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    assert jnp.ones(()).dtype == np.float32


def test_the_table_has_a_row_a_leaf():
    report = check("half a weight gradient")
    title, header, *lines = str(report).splitlines()
    rows = lines[: lines.index("")]
    assert "FAILED" in title
    assert "20 parameter sets in float64" in title
    assert header.split() == [
        "leaf",
        "shape",
        "largest",
        "vs",
        "jax.grad",
        "vs",
        "differences",
        "ratio",
        "kinks",
    ]
    assert [row.split()[0] for row in rows] == NAMES
    assert [row.split()[-1] for row in rows] == ["ok"] * 5 + ["WRONG"]
    assert "0.5000" in rows[-1]
    assert "(4, 3)" in rows[-1]
    assert len({len(row.removesuffix("  ok").removesuffix("  WRONG")) for row in rows}) == 1
    assert "passed" in str(check()).splitlines()[0]


def test_a_leaf_without_numbers_is_no_obstacle():
    params = {"empty": np.zeros((0, 3), np.float32), "w": np.ones(2, np.float32)}

    def loss(params, batch):
        return jnp.sum(jnp.square(params["w"])) + jnp.sum(params["empty"])

    report = check_gradients(KEY, loss, jax.value_and_grad(loss), params, None)
    assert report.passed
    assert [leaf.largest for leaf in report.leaves] == [0, 2]


# --- what is refused


def in_float32(params, batch):
    return jnp.sum(jnp.square(params.astype(jnp.float32)))


def gradients_as(change):
    return lambda params, batch: (square(params, batch), change(2 * params))


BAD_FUNCTIONS = [
    (in_float32, jax.value_and_grad(in_float32), "loss_fn must compute in the dtype.*float32"),
    (lambda p, b: p, jax.value_and_grad(square), "loss_fn must return a float scalar"),
    (None, jax.value_and_grad(square), "loss_fn must be callable"),
    (square, None, "value_and_grad_fn must be callable"),
    (square, square, r"value_and_grad_fn must return \(loss, gradients\)"),
    (square, lambda p, b: (p, p), "value_and_grad_fn must return a float scalar"),
    (square, gradients_as(lambda g: {"w": g}), "gradients with the tree of params"),
    (square, gradients_as(lambda g: g[:, None]), r"gradients like params.*\(2, 1\)"),
    (square, gradients_as(lambda g: g[:1]), r"gradients like params.*\(1,\)"),
    (square, gradients_as(lambda g: g.astype(jnp.float32)), "gradients like params; got float32"),
]


@pytest.mark.parametrize(("loss", "gradient", "message"), BAD_FUNCTIONS)
def test_functions_of_another_kind_are_refused(loss, gradient, message):
    with pytest.raises(TypeError, match=message):
        check_gradients(KEY, loss, gradient, np.ones(2, np.float32), None)


class Bad(NamedTuple):
    options: dict[str, Any]
    error: type[Exception]
    message: str


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        Bad({"key": 0}, TypeError, "^key must be a single typed key"),
        Bad({"key": jax.random.key(0, impl="rbg")}, ValueError, "^key must be of implementation"),
        Bad({"num_samples": 0}, ValueError, "^num_samples must be an integer of at least 1"),
        Bad({"num_samples": 2.0}, TypeError, "^num_samples must be an integer"),
        Bad({"tolerance": 0}, ValueError, "^tolerance must be a finite number above 0"),
        Bad({"tolerance": np.nan}, ValueError, "^tolerance must be a finite number above 0"),
        Bad({"difference_tolerance": -1}, ValueError, "^difference_tolerance must be a finite"),
        Bad({"sampler": None}, ValueError, "^params must hold at least one array"),
        Bad({"sampler": np.ones(2, int)}, TypeError, "^params must be floats of one dtype"),
        Bad({"sampler": lambda key: jnp.arange(3)}, TypeError, "^params must be floats"),
        Bad({"batch": "rows"}, TypeError, "^batch must be an array of real numbers"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(options, error, message):
    given: Any = {
        "key": KEY,
        "loss_fn": square,
        "value_and_grad_fn": jax.value_and_grad(square),
        "sampler": np.ones(2, np.float32),
        "batch": None,
    }
    with pytest.raises(error, match=message):
        check_gradients(**(given | options))


def test_validate_of_both_functions_is_asked():
    model = jaxnn.mlp((3, 5, 2))
    batch = batch_for(model)._replace(y=np.full(ROWS, 7))
    functions = (model.loss_reference, model.value_and_grad)
    with pytest.raises(ValueError, match=r"batch\.y must be classes 0 to 1"):
        check_gradients(KEY, *functions, model.sampler(scale=1.0), batch)
