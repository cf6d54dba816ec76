"""What is drawn, read back from matplotlib's artists: points, regions, lines, legends, limits."""

from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from layout import assert_clear, contrast, smallest_font
from matplotlib.colors import to_hex

import jaxnn.plotting
from jaxnn.batch import Batch

plotting: Any = jaxnn.plotting  # untyped: arguments that are refused, getters of many types
RNG = np.random.default_rng(11)
ROWS = RNG.normal((3.0, -40.0), (1.0, 5.0), (21, 2)).astype(np.float32)
LABELS = np.arange(21, dtype=np.int32) % 3
BATCH = Batch(x=ROWS, y=LABELS)
WEIGHTS = np.array([[-2.0, 0.1, 2.0], [0.1, 0.5, -0.2]])
BIASES = np.array([8.0, 22.0, -14.0])
STEPS = np.arange(1, 51)
CURVES = {"sgd": (STEPS, 1 / STEPS), "adam": (STEPS, 1e6 / STEPS)}
DRAW = {
    "data": lambda ax=None: plotting.data(BATCH, ax),
    "decision_regions": lambda ax=None: plotting.decision_regions(linear, BATCH, ax, resolution=9),
    "loss_curves": lambda ax=None: plotting.loss_curves(CURVES, ax, log_x=True, log_y=True),
    "smoothed": lambda ax=None: plotting.smoothed(
        STEPS, plotting.smoothed(1 / STEPS, ax, label="train"), label="test"
    ),
}


def linear(x):
    return x @ WEIGHTS + BIASES


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Start without figures, show none, and leave matplotlib's settings as they were."""
    plt.close("all")  # another file of the same process may have left one
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("show() was called"))
    settings = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == settings
    plt.close("all")


def legend_texts(ax):
    return [text.get_text() for text in (ax.get_legend() or ax.figure.legends[0]).get_texts()]


# Every picture


@pytest.mark.parametrize("name", DRAW)
def test_draws_into_the_axes_given_or_into_a_new_figure(name):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    assert DRAW[name](left) is left
    assert not right.has_data()
    assert_clear(figure)
    assert plt.get_fignums() == [1]
    ax = DRAW[name]()
    assert plt.get_fignums() == [1, 2]
    assert ax.figure is plt.figure(2)
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert_clear(ax.figure)
    assert len(legend_texts(ax)) > 1
    hides_no_point = name in ("data", "decision_regions")
    assert (left.get_legend() is None, ax.get_legend() is None) == (False, hides_no_point)
    with pytest.raises(TypeError, match="ax must be a matplotlib Axes or None; got a list"):
        DRAW[name]([1, 2])


def test_a_legend_needs_two_names():
    alone = Batch(x=ROWS, y=LABELS * 0)
    for ax in (plotting.data(alone), plotting.loss_curves({"sgd": (STEPS, STEPS)})):
        assert ax.get_legend() is None
    ax = plotting.smoothed(STEPS, label="train")
    assert ax.get_legend() is None
    assert legend_texts(plotting.smoothed(STEPS, ax, label="test")) == ["train", "test"]


# Sizes


@pytest.mark.parametrize(("width", "inches"), [("column", 3.5), ("page", 7.2), ("slide", 13.33)])
@pytest.mark.parametrize("name", DRAW)
def test_a_style_sets_width_and_fonts_for_a_block(width, inches, name):
    with plotting.style(width):
        figure = DRAW[name]().figure
        assert figure.get_figwidth() == inches
        assert_clear(figure)
        exponents = 0.7 if width != "slide" and name == "loss_curves" else 1
        assert smallest_font(figure) >= 10 * exponents


@pytest.mark.parametrize(
    ("width", "pixels"), [("column", 1_050), ("page", 2_160), ("slide", 1_919)]
)
def test_a_style_says_how_many_pixels_are_saved_and_is_gone_after_its_block(
    width, pixels, tmp_path
):
    before = dict(mpl.rcParams)
    with plotting.style(width):
        plt.figure().savefig(tmp_path / "a.png")
        assert dict(mpl.rcParams) != before
    assert dict(mpl.rcParams) == before
    assert plt.imread(tmp_path / "a.png").shape[1] == pixels


def test_a_style_can_decorate_and_fails_without_a_trace():
    @plotting.style("page")
    def draw():
        return plt.figure().get_figwidth()

    assert [draw(), draw()] == [7.2, 7.2]
    with pytest.raises(ZeroDivisionError), plotting.style("column"):
        _ = 1 / 0
    with pytest.raises(ValueError, match=r"width must be one of .*slide"), plotting.style("poster"):
        pass


@pytest.mark.parametrize("width", ["column", "slide"])
def test_one_shared_legend_stands_below_all_axes_and_names_each_curve_once(width):
    names = [f"a method, with scale {k}" for k in range(5)]
    with plotting.style(width):
        figure, axes = plt.subplots(2, 1)
        for ax, shown in zip(axes, (names[:3], names[1:]), strict=True):
            plotting.loss_curves(dict.fromkeys(shown, (STEPS, STEPS * 2)), ax)
        legend = plotting.shared_legend(figure)
        assert [text.get_text() for text in legend.get_texts()] == names
        assert all(ax.get_legend() is None for ax in axes)
        assert_clear(figure)
        assert legend._ncols == (1 if width == "column" else 3)
    assert plotting.shared_legend(plt.figure()) is None


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1.04, 1.1, "1.04 1.06 1.08 1.1"),
        (0.13, 0.16, "0.13 0.14 0.15 0.16"),
        (0.5, 3.5, "0.5 1 2"),
        (0.09, 1.3, "0.1 0.2 0.5 1"),
        (9, 3e4, "10 100 1,000 10,000"),
        (1e-6, 1e-2, *["$10^{-6}$ $10^{-5}$ $10^{-4}$ $10^{-3}$ $10^{-2}$"]),
        (1, 2e9, "$10^{0}$ $10^{2}$ $10^{4}$ $10^{6}$ $10^{8}$"),
        (1.2e5, 2.1e5, r"$1.5\cdot10^{5}$ $2\cdot10^{5}$"),
        (2e-6, 6e-5, r"$2\cdot10^{-6}$ $5\cdot10^{-6}$ $10^{-5}$ $2\cdot10^{-5}$ $5\cdot10^{-5}$"),
    ],
)
def test_logarithmic_axes_have_few_ticks(low, high, labels):
    ax = plotting.log_scale(plt.subplots()[1], "y")
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    ax.set_ylim(low, high)
    ax.figure.canvas.draw()
    shown = [label.get_text().replace(" ", "") for label in ax.get_yticklabels()]
    assert shown == labels.split()
    assert not len(ax.yaxis.get_minorticklocs())


@pytest.mark.parametrize(("low", "high"), [(1e-3, 0.07), (1e3, 3.1e4), (1, 2e5), (0.12, 1.4)])
@pytest.mark.parametrize("panels", [1, 3, 5])
def test_labels_of_narrow_logarithmic_axes_do_not_touch(low, high, panels):
    with plotting.style("slide"):
        figure, axes = plt.subplots(1, panels, squeeze=False)
        for ax in axes[0]:
            plotting.log_scale(ax).set_xlim(low, high)
        assert_clear(figure)
        assert len(axes[0, 0].get_xticks()) >= 2


def test_bars_begin_at_the_end_of_a_logarithmic_axis():
    ax = plotting.log_scale(plt.subplots()[1], "x")
    (bar,) = ax.barh([0], [100])
    ax.figure.canvas.draw()
    corners = bar.get_transform().transform_path(bar.get_path()).vertices
    assert np.isfinite(corners).all()
    assert corners[:, 0].min() <= ax.bbox.x0


# Data


@pytest.mark.parametrize("labels", [LABELS, np.eye(3)[LABELS], jnp.asarray(LABELS)])
def test_data_draws_the_points_of_each_class_in_its_color_and_marker(labels):
    ax = plotting.data(Batch(x=jnp.asarray(ROWS), y=labels))
    assert len(ax.collections) == 3
    for k, points in enumerate(ax.collections):
        np.testing.assert_array_equal(points.get_offsets(), ROWS[k == LABELS])
        assert to_hex(points.get_facecolor()[0]).upper() == plotting.COLORS[k]
    shapes = {points.get_paths()[0].vertices.tobytes() for points in ax.collections}
    assert len(shapes) == 3
    assert legend_texts(ax) == ["class 0", "class 1", "class 2"]
    assert ax.get_title() == "21 rows, 3 classes"


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((ROWS, LABELS), TypeError, r"batch must be a jaxnn.Batch\(x, y\); got a tuple"),
        (Batch(x=ROWS[0], y=LABELS), ValueError, r"batch.x .* \(rows, 2\); got shape \(2,\)"),
        (Batch(x=ROWS[:0], y=LABELS[:0]), ValueError, r"batch.x .* got shape \(0, 2\)"),
        (Batch(x=ROWS * np.nan, y=LABELS), ValueError, "batch.x must be finite; got nan"),
        (Batch(x=ROWS, y=LABELS[:-1]), ValueError, r"batch.y .* got int32 of shape \(20,\)"),
        (Batch(x=ROWS, y=LABELS - 1), ValueError, "batch.y must be classes 0 to 1; got -1"),
        (Batch(x=ROWS, y=np.array(["a"] * 21)), TypeError, "batch.y must be an array of real"),
    ],
)
def test_data_and_regions_refuse_batches_that_cannot_be_drawn(batch, error, message):
    with pytest.raises(error, match=message):
        plotting.data(batch)
    with pytest.raises(error, match=message):
        plotting.decision_regions(linear, batch)
    assert plt.get_fignums() == []


# Decision regions


def cell_centres(ax, resolution):
    left, right, bottom, top = ax.images[0].get_extent()
    shares = (np.arange(resolution) + 0.5) / resolution
    columns, rows = left + (right - left) * shares, bottom + (top - bottom) * shares
    return np.stack(np.meshgrid(columns, rows), axis=-1)


def test_regions_are_the_classes_that_a_linear_network_predicts():
    ax = plotting.decision_regions(linear, BATCH, resolution=40)
    expected = np.argmax(linear(np.float32(cell_centres(ax, 40))), axis=-1)
    assert set(expected.flat) == {0, 1, 2}
    np.testing.assert_array_equal(ax.images[0].get_array(), expected)
    assert ax.images[0].origin == "lower"
    hits = 100 * np.mean(np.argmax(linear(ROWS), axis=1) == LABELS)
    assert ax.get_title() == f"{hits:.1f} % of 21 rows right"


def test_regions_fill_the_view_below_boundaries_below_points_():
    ax = plotting.decision_regions(linear, BATCH, resolution=9)
    ax.figure.canvas.draw()
    image = ax.images[0]
    left, right, bottom, top = image.get_extent()
    assert (*ax.get_xlim(), *ax.get_ylim()) == (left, right, bottom, top)
    margin = np.ptp(ROWS, axis=0) / 50
    assert np.all([left, bottom] < ROWS.min(axis=0) - margin)
    assert np.all([right, top] > ROWS.max(axis=0) + margin)
    boundaries, points = ax.collections[3:], ax.collections[:3]
    assert boundaries
    assert all(image.zorder < line.zorder < points[0].zorder for line in boundaries)


def test_classes_stay_apart_on_a_grey_print():
    ax = plotting.decision_regions(lambda x: np.eye(8)[np.arange(len(x)) % 8], BATCH, resolution=20)
    colors = [ax.images[0].to_rgba(k)[:3] for k in range(8)]
    hatches = [None] * 3 + [a.hatches[0] for a in ax.collections if hasattr(a, "hatches")]
    for first, second in combinations(range(8), 2):
        apart = contrast(colors[first], colors[second])
        assert apart >= 1.5 or hatches[first] != hatches[second], (first, second)
    assert all(contrast(color, "0.25") >= 3 for color in colors)  # the boundaries


def test_lines_stand_out_from_white_paper():
    ax = plotting.loss_curves({str(k): (STEPS, STEPS + k) for k in range(8)})
    colors = [line.get_color() for line in ax.get_lines()]
    assert len(set(colors)) == 8
    grey = {(line._unscaled_dash_pattern, line.get_marker()) for line in ax.get_lines()}
    assert len(grey) == 8
    assert min(contrast(color, "white") for color in colors) >= 2.99


def test_boundary_is_where_two_scores_are_equal():
    two_classes = Batch(x=ROWS, y=LABELS % 2)
    ax = plotting.decision_regions(lambda x: x @ WEIGHTS[:, :2] + BIASES[:2], two_classes)
    (boundary,) = ax.collections[2:]
    points = np.concatenate([path.vertices for path in boundary.get_paths()])
    scores = points @ WEIGHTS[:, :2] + BIASES[:2]
    assert len(points) > 100
    np.testing.assert_allclose(scores[:, 0], scores[:, 1], atol=1e-4)
    ax = plotting.decision_regions(lambda x: jnp.zeros((len(x), 4)), BATCH, resolution=5)
    assert len(ax.collections) == 3  # one class everywhere: no boundary


def test_ties_go_to_the_lowest_class_and_nan_stays_white():
    resolution = 8

    def predict(x):
        left = np.where(x[:, 0] < 3, 1.0, 0.0)
        scores = np.stack([np.zeros(len(x)), left * 0, left], axis=1)
        return np.where(x[:, 1:] > -40, scores, np.nan)

    ax = plotting.decision_regions(predict, BATCH, resolution=resolution)
    x, y = np.moveaxis(cell_centres(ax, resolution), -1, 0)
    drawn = ax.images[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn), y <= -40)
    np.testing.assert_array_equal(drawn[y > -40], np.where(x < 3, 2, 0)[y > -40])
    ax.figure.canvas.draw()


# Loss curves


def test_curves_are_lines_of_different_color_and_dashes():
    curves = {"sgd": (STEPS, 1 / STEPS), "adam": (STEPS * 3, np.exp(-STEPS))}
    ax = plotting.loss_curves(curves, xlabel="epoch")
    first, second = ax.get_lines()
    assert first.get_drawstyle() == "default"
    np.testing.assert_array_equal(first.get_xydata(), np.stack([STEPS, 1 / STEPS], axis=1))
    np.testing.assert_array_equal(second.get_xydata(), np.stack([STEPS * 3, np.exp(-STEPS)], 1))
    assert first.get_color() != second.get_color()
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "--")
    assert legend_texts(ax) == ["sgd", "adam"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "linear")


def test_seeds_of_one_x_are_pale_and_their_median_strong():
    seeds = [(STEPS, RNG.random(50)) for _ in range(4)]
    ax = plotting.loss_curves({"search": seeds, "descent": (STEPS, 1 / STEPS)}, steps=True)
    *pale, median, other = ax.get_lines()
    assert other.get_drawstyle() == "steps-post"
    for line, (_, y) in zip(pale, seeds, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), y)
        assert line.get_alpha() < 0.5
        assert line.get_linewidth() < median.get_linewidth()
        assert line.get_color() == median.get_color() != other.get_color()
    ordered = np.sort([y for _, y in seeds], axis=0)
    np.testing.assert_allclose(median.get_ydata(), (ordered[1] + ordered[2]) / 2, rtol=1e-12)
    assert median.get_alpha() is None
    assert legend_texts(ax) == ["search", "descent"]


def test_values_without_a_logarithm_leave_gaps_and_an_empty_history_a_legend_entry():
    curves = {"sgd": (np.arange(4), [np.inf, 4.0, 0.0, 2.0]), "adam": [([], []), ([], [])]}
    ax = plotting.loss_curves(curves, log_x=True, log_y=True, reference=0.25)
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), [np.nan, 4, 0, 2])
    assert list(ax.get_lines()[-1].get_ydata()) == [0.25, 0.25]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    path = ax.transScale.transform_path(ax.get_lines()[0].get_path())
    assert np.isfinite(path.vertices).all(axis=1).tolist() == [False, True, False, True]
    ax.figure.canvas.draw()
    assert legend_texts(ax)[:2] == ["sgd", "adam"]


def train(name, **options):
    """A result on the loss (params - 0.5)^2, from 4 on."""
    key, start, target = jax.random.key(3), jnp.float32(4), jnp.float32(0.5)

    def loss_fn(params, batch):
        return (params - batch) ** 2

    if name == "random_search":
        return jaxnn.random_search(key, loss_fn, jax.random.normal, target, **options)
    if name == "perturbation_search":
        return jaxnn.perturbation_search(key, loss_fn, start, target, scale=0.1, **options)
    given = key, jax.value_and_grad(loss_fn), start, target
    return jaxnn.gradient_descent(*given, learning_rate=0.01, **options)


@pytest.mark.parametrize(
    ("name", "options", "end"),
    [
        ("random_search", {"num_candidates": 700}, 700),
        ("perturbation_search", {"num_steps": 400}, 401),
        ("perturbation_search", {"num_steps": 400, "num_chains": 2, "num_proposals": 3}, 1_201),
        ("gradient_descent", {"num_epochs": 500}, 1_501),
        ("gradient_descent", {"num_epochs": 0}, 1),
    ],
)
def test_a_result_is_drawn_as_its_loss_up_to_its_last_evaluation(name, options, end):
    result, chains = train(name, **options), options.get("num_chains", 1)
    history: Any = result.history
    losses = history.current_loss if name == "perturbation_search" else history.loss
    curves = plotting.curves_of(result)
    for (x, y), row in zip(curves, np.atleast_2d(losses), strict=True):
        expected = np.full(end + 1, np.nan)
        for evaluation, loss in zip(history.evaluations, row, strict=True):
            expected[int(evaluation) :] = loss
        np.testing.assert_array_equal(y, expected[x])
        assert (x[0], x[-1]) == (1, end)
        assert np.diff(x, prepend=1).max() <= 1 + end / 299
        rising = plotting.curves_of(result, log_x=True)[0][0]
        assert np.diff(np.log(rising[rising > 99])).max(initial=0) < np.log(end) / 299 + 0.01
    lines = plotting.loss_curves({"one": result, "more": [result, (STEPS, STEPS)]}).get_lines()
    assert len(lines) == 2 * chains + 1 + (chains > 1)
    for line, curve in zip(lines, curves, strict=False):
        np.testing.assert_array_equal(line.get_xydata(), np.stack(curve, axis=1))


# Moving averages


def naive_average(values, window):
    averages = []
    for centre in range(len(values)):
        near = [v for i, v in enumerate(values) if abs(i - centre) <= window // 2]
        finite = [v for v in near if np.isfinite(v)]
        averages.append(sum(finite) / len(finite) if finite else np.nan)
    return averages


@pytest.mark.parametrize("window", [1, 37, 101])
@pytest.mark.parametrize("broken", [False, True])
def test_average_is_that_of_a_plain_loop(window, broken):
    values = RNG.normal(3.0, 2.0, 38)
    if broken:
        values[[0, 20, 21, 22, 30]] = np.nan, np.inf, -np.inf, np.nan, 1e30
    raw, average = plotting.smoothed(values, window=window).get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), np.where(np.isfinite(values), values, np.nan))
    np.testing.assert_allclose(average.get_ydata(), naive_average(values, window), rtol=1e-12)
    np.testing.assert_array_equal(average.get_xdata(), np.arange(38))


# What is refused


def regions(predict):
    return plotting.decision_regions(predict, BATCH)


def curves_to(reference, **options):
    return plotting.loss_curves({"sgd": (STEPS, STEPS)}, reference=reference, **options)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: regions(lambda x: x[:, 0]), ValueError, r"of shape \(21, classes\).*\(21,\)"),
        (lambda: regions(lambda x: x), ValueError, r"at least 3 classes; got \(21, 2\)"),
        (lambda: regions(lambda x: "class 1"), TypeError, r"predict_fn\(x\) must be an array of"),
        (lambda: curves_to(np.nan), ValueError, "reference must be a finite number"),
        (lambda: curves_to(0.0, log_y=True), ValueError, "reference must be a finite number"),
        (lambda: plotting.curves_of(CURVES), TypeError, "that of a trainer; got a dict"),
        (lambda: plotting.smoothed(ROWS), ValueError, r"values .* \(steps,\); got shape \(21, 2\)"),
        (lambda: plotting.smoothed([]), ValueError, r"values .* got shape \(0,\)"),
        (lambda: plotting.smoothed(STEPS, window=0), ValueError, "window must be .* at least 1"),
        (lambda: plotting.smoothed(STEPS, window=4), ValueError, "window must be odd, to have"),
        *(
            (lambda curves=curves: plotting.loss_curves(curves), error, message)
            for curves, error, message in (
                ([(STEPS, STEPS)], TypeError, "curves must map labels to .* got a list"),
                ({"sgd": BATCH}, ValueError, r"curves\['sgd'\] must be .* a result .* got a Batch"),
                ({"sgd": []}, ValueError, "curves must hold at least one label"),
                ({"sgd": (STEPS,)}, ValueError, r"curves\['sgd'\] must be .* got a tuple of 1"),
                ({"sgd": [(ROWS, ROWS)]}, ValueError, r"curves\['sgd'\] .* got \(21, 2\), \(21, 2"),
                ({"sgd": (STEPS, ["a"] * 50)}, TypeError, r"curves\['sgd'\] y must be an array"),
            )
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, error, message):
    with pytest.raises(error, match=message):
        draw()
    assert plt.get_fignums() == []
