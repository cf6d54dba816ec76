"""Pictures of data, decision regions and learning curves, for a lecture or a paper.

Every function draws into the axes that it is given, or into those of a new figure if `ax` is
None, and returns them; showing and saving is the caller's. Colours are those of Okabe and Ito,
which colour-blind readers tell apart; classes differ by marker and by the luminance of their
regions as well, curves by dashes, so that a grey print can be read. Sizes are those of
`matplotlib.rcParams`; `with jaxnn.plotting.style("slide"):` sets them for a slide or a paper.
An argument of the wrong kind, `ax` among them, raises `TypeError` before anything is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from jaxnn.batch import Batch, check_targets
from jaxnn.run.checks import as_choice, as_count, as_numpy, as_real
from jaxnn.typing import PyTree

__all__ = [
    "curves_of", "data", "decision_regions", "log_scale", "loss_curves", "shared_legend",
    "smoothed", "style",
]  # fmt: skip

COLORS = ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (4, 2, 1, 2, 1, 2)))
LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Of red, green and blue light, as WCAG 2 has them."""
REGIONS, HATCHES = (0.3, 0.8, 0.5), (None, "//", "..", "xx")
"""Luminances of the regions of three classes; the next three have the same, and a hatch."""
DARK = 0.3
"""The largest luminance of a line, whose contrast with white is then at least 3."""
STYLES = {"column": (3.5, 2.6, 10, 300), "page": (7.2, 3.6, 10, 300), "slide": (13.33, 6, 15, 144)}
"""Width and height in inches, font size in points, dots an inch."""

Curve = tuple[ArrayLike, ArrayLike]


class Trained(Protocol):
    """The result of a trainer, as far as its losses go."""

    @property
    def num_evaluations(self) -> Any: ...
    @property
    def history(self) -> Any: ...


Style = dict[str, Any]  # keywords of a function of matplotlib
PredictFn = Callable[[np.ndarray], ArrayLike]


@contextmanager
def style(width: Literal["column", "page", "slide"]) -> Iterator[None]:
    """Return a context, or decorator, with the sizes of matplotlib for a paper or a slide.

    No text is smaller than 10 points, the exponents on a slide included. `rcParams` are as they
    were after the block. Save the figure inside it: matplotlib makes ticks when it draws.

    Args:
        width: of the figure: "column" (3.5 inches), "page" of two columns (7.2) or "slide" (13.33).

    Yields:
        Nothing.

    Raises:
        ValueError: if the width is none of these.

    Example:
        >>> with style("slide"):
        ...     print(plt.figure().get_figwidth())
        13.33
    """
    wide, high, points, dpi = STYLES[as_choice("width", width, tuple(STYLES))]
    look: Any = {
        "figure.titlesize": points, "axes.titlesize": points, "axes.labelsize": points,
        "xtick.labelsize": points, "ytick.labelsize": points,
        "figure.figsize": (wide, high), "figure.constrained_layout.use": True, "font.size": points,
        "legend.fontsize": points, "legend.title_fontsize": points, "savefig.dpi": dpi,
        "lines.linewidth": 0.15 * points, "lines.markersize": 0.35 * points,
        "errorbar.capsize": 3, "grid.alpha": 0.3, "legend.framealpha": 0.85, "pdf.fonttype": 42,
    }  # fmt: skip
    with plt.rc_context(look):
        yield


def data(batch: Batch, ax: Axes | None = None) -> Axes:
    """Draw points of two features, a colour and a marker a class.

    The legend of a new figure stands below the axes, where it hides no point; `shared_legend` puts
    one there in other figures.

    Args:
        batch: `x` finite, shape `(rows, 2)`; `y` integer classes `(rows,)` or one-hot rows.
        ax: where to draw.

    Returns:
        The axes.

    Raises:
        ValueError: if `x` or `y` has another shape, or values that are no points or no classes.

    Example:
        >>> data(Batch(x=np.eye(2), y=np.array([0, 1]))).get_title()
        '2 rows, 2 classes'
    """
    x, labels = _points(batch)
    is_new, ax = ax is None, _axes(ax)
    classes = np.unique(labels)
    for k in classes:
        style: Style = {
            "color": COLORS[k % len(COLORS)],
            "marker": MARKERS[k % len(MARKERS)],
        }
        rows = x[labels == k]
        style |= {"edgecolors": "black", "linewidths": 0.6}
        size = plt.rcParams["lines.markersize"] ** 2
        ax.scatter(*rows.T, s=size, label=f"class {k}", **style)
    title = f"{len(x)} rows, {len(classes)} class{'es' * (len(classes) > 1)}"
    _labelled(ax, xlabel="first feature", ylabel="second feature", title=title)
    if is_new:
        shared_legend(plt.gcf())
    return ax


def decision_regions(
    predict_fn: PredictFn,
    batch: Batch,
    ax: Axes | None = None,
    *,
    resolution: int = 300,
) -> Axes:
    """Draw the class predicted at each point of the plane, with the data on top.

    Regions of the first three classes differ in luminance, by a contrast of at least 1.5; those of
    the next three have the same luminances and a hatch.
    Ties go to the lowest class, as in `metrics.accuracy`; where a prediction is NaN it is white.

    Args:
        predict_fn: inputs `(rows, 2)`, float32, to probabilities or logits `(rows, classes)`.
        batch: the data, as for `data`.
        ax: where to draw.
        resolution: number of points along each side of the picture.

    Returns:
        The axes.

    Raises:
        ValueError: if the batch, the predictions' shape or the resolution does not fit.

    Example:
        >>> decision_regions(lambda x: x, Batch(x=np.eye(2), y=np.array([0, 1]))).get_title()
        '100.0 % of 2 rows right'
    """
    x, labels = _points(batch)
    resolution = as_count("resolution", resolution, minimum=2)
    hits = _winners(_scores(predict_fn, x, labels.max() + 1)) == labels
    ax = data(batch, ax)
    extent = *ax.get_xlim(), *ax.get_ylim()
    shares = (np.arange(resolution) + 0.5) / resolution
    columns, rows = (low + (high - low) * shares for low, high in (extent[:2], extent[2:]))
    plane = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
    scores = _scores(predict_fn, plane, labels.max() + 1).reshape(resolution, resolution, -1)
    winners, classes = np.ma.masked_less(_winners(scores), 0), scores.shape[-1]
    cycle = [(COLORS[k % len(COLORS)], REGIONS[k % len(REGIONS)]) for k in range(classes)]
    colors = ListedColormap([_with_luminance(*each) for each in cycle])
    look: Style = {"cmap": colors, "vmin": -0.5, "vmax": classes - 0.5}
    look |= {"origin": "lower", "extent": extent, "aspect": ax.get_aspect(), "zorder": 0}
    ax.imshow(winners, interpolation="nearest", **look)
    for k in set(range(len(REGIONS), classes)) & set(winners.compressed().tolist()):
        hatch = [HATCHES[k // len(REGIONS) % len(HATCHES)]]
        inside = {"levels": [0.5, 1.5], "colors": "none", "hatches": hatch, "zorder": 0.2}
        ax.contourf(columns, rows, (winners == k).filled(False), **inside)
    _boundaries(ax, columns, rows, scores)
    ax.set_title(f"{100 * np.mean(hits):.1f} % of {len(x)} rows right")
    return ax


def loss_curves(
    curves: Mapping[str, Curve | Trained | list[Any]],
    ax: Axes | None = None,
    *,
    xlabel: str = "loss evaluations",
    log_x: bool = False,
    log_y: bool = False,
    reference: float | None = None,
    reference_label: str = "reference",
    steps: bool = False,
) -> Axes:
    """Draw losses of several methods in one picture, a colour and a dash style a method.

    Several curves of one method, as from several seeds, are thin and pale, with their median on
    top where all share the same x. Values that are not finite, or not positive on a logarithmic
    scale, leave gaps.

    Args:
        curves: a label to a tuple `(x, y)` of arrays `(points,)`, to the result of a trainer,
            drawn as `curves_of` has it, or to a list of such tuples and results.
        ax: where to draw.
        xlabel: what x counts.
        log_x: whether x is on a logarithmic scale.
        log_y: whether y is.
        reference: a loss to compare with, drawn as a dashed horizontal line.
        reference_label: its name in the legend.
        steps: whether a value holds until the next one, as the best loss so far does.

    Returns:
        The axes.

    Raises:
        TypeError: if `curves` maps no labels.
        ValueError: if there is no curve, x and y differ in shape, or the reference has no place.

    Example:
        >>> loss_curves({"sgd": ([1, 2], [0.7, 0.6])}).get_legend_handles_labels()[1]
        ['sgd']
    """
    groups = _groups(curves, log_x)
    if reference is not None:
        as_real("reference", reference, minimum=0.0 if log_y else -math.inf)
    ax = _axes(ax)
    for letter in "x" * log_x + "y" * log_y:
        _log_scale(ax, letter, "mask")
    drawstyle = {"drawstyle": "steps-post" if steps else "default"}
    for index, (label, group) in enumerate(groups.items()):
        _draw(ax, label, group, _line_style(index) | drawstyle)
    if reference is not None:
        style: Style = {"color": "0.35", "linestyle": (0, (8, 3)), "lw": _line_width(0.7)}
        ax.axhline(float(reference), label=reference_label, **style)
    return _labelled(ax, xlabel=xlabel, ylabel="loss")


def curves_of(result: Trained, *, log_x: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the loss of a trainer's result against evaluations, a curve a chain or network.

    For a search it is the best loss so far; for a descent, the loss before the current step. It is
    NaN before the first record, and after a network has stopped.

    Args:
        result: of `random_search`, `perturbation_search` or `gradient_descent`.
        log_x: whether the numbers of evaluations, at most 300 up to the last one, are spread evenly
            on a logarithmic axis. They are the same for all results of one length.

    Returns:
        Tuples of evaluations of the chain or network, int64, and losses, both `(points,)`.

    Raises:
        TypeError: if `result` is something else.

    Example:
        >>> import jax, jaxnn
        >>> given = jax.random.key(0), lambda x, y: (x - y) ** 2, jax.random.normal, 1.0
        >>> found = jaxnn.random_search(*given, num_candidates=50)
        >>> ((evaluations, losses),) = curves_of(found)
        >>> int(evaluations[-1]), bool(losses[-1] == found.loss)
        (50, True)
    """
    if not _is_result(result):
        raise TypeError(f"result must be that of a trainer; got a {type(result).__name__}")
    history = result.history
    is_chain = hasattr(history, "best_loss")
    losses = np.atleast_2d(history.best_loss if is_chain else history.loss)
    end = np.max(result.num_evaluations) // (len(losses) if is_chain else 1)
    spread = np.geomspace if log_x else np.linspace
    grid = np.unique(spread(1, end, 300).astype(np.int64))
    last = np.searchsorted(history.evaluations, grid, side="right")
    return [(grid, np.append(np.nan, row)[last]) for row in losses]


def smoothed(
    values: ArrayLike,
    ax: Axes | None = None,
    *,
    window: int = 101,
    label: str | None = None,
    ylabel: str = "accuracy",
    xlabel: str = "step",
) -> Axes:
    """Draw a noisy series, pale, and its centred moving average; each call takes another colour.

    Towards both ends the average is over as much of the window as there is. Values that are not
    finite are left out of it.

    Args:
        values: shape `(steps,)`.
        ax: where to draw.
        window: number of values to average, odd.
        label: the average's name in the legend, which two names make; no legend if None.
        ylabel: what the values are.
        xlabel: what their places count, from 0.

    Returns:
        The axes.

    Raises:
        ValueError: if `values` is empty or not one-dimensional, or `window` even or below 1.

    Example:
        >>> smoothed([0, 1, 5], window=3).get_lines()[1].get_ydata().tolist()
        [0.5, 2.0, 3.0]
    """
    raw = _finite(as_numpy("values", values))
    if raw.ndim != 1 or not raw.size:
        raise ValueError(f"values must be numbers of shape (steps,); got shape {raw.shape}")
    window = as_count("window", window, minimum=1)
    if window % 2 == 0:
        raise ValueError(f"window must be odd, to have a centre; got {window}")
    ax = _axes(ax)
    style = _line_style(len(ax.get_lines()) // 2)
    ax.plot(raw, color=style["color"], lw=_line_width(0.4), alpha=0.3, zorder=1.5)
    ax.plot(_moving_average(raw, window // 2), label=label, **style)
    title = f"Moving average of {window} (raw values pale)"
    return _labelled(ax, xlabel=xlabel, ylabel=ylabel, title=title)


def log_scale(ax: Axes, axis: Literal["x", "y", "both"] = "both") -> Axes:
    """Make axes logarithmic, with few ticks: whole decades, or 1, 2 and 5, or even steps.

    Args:
        ax: the axes.
        axis: which of the two.

    Returns:
        The axes.

    Raises:
        ValueError: if `axis` is another word.

    Example:
        >>> log_scale(plt.subplots()[1], "x").get_xscale()
        'log'
    """
    as_choice("axis", axis, ("x", "y", "both"))
    for letter in "xy" if axis == "both" else axis:
        _log_scale(ax, letter, "clip")
    return ax


def shared_legend(figure: Figure) -> Legend | None:
    """Put one legend below all axes in place of those inside them, with every name once.

    The figure gets a constrained layout, which keeps the legend clear of the axes.

    Args:
        figure: with labelled artists.

    Returns:
        The legend; None if there are fewer than two names.

    Example:
        >>> ax = loss_curves({"sgd": ([1, 2], [7, 6]), "adam": ([1, 2], [7, 5])})
        >>> [text.get_text() for text in shared_legend(ax.figure).get_texts()]
        ['sgd', 'adam']
    """
    handles: dict[str, Any] = {}
    for ax in figure.axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        if legend := ax.get_legend():
            legend.remove()
    if len(handles) < 2:
        return None
    figure.set_layout_engine("constrained")
    place: Style = {"loc": "outside lower center", "frameon": False}
    for columns in (math.ceil(len(handles) / rows) for rows in range(1, len(handles) + 1)):
        legend = figure.legend(handles.values(), handles.keys(), ncols=columns, **place)
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            return legend
        legend.remove()
    return None


def _log_scale(ax: Axes, letter: str, nonpositive: str) -> None:
    getattr(ax, f"set_{letter}scale")("log", nonpositive=nonpositive)
    axis = getattr(ax, f"{letter}axis")
    axis.set_major_locator(_LogLocator())
    axis.set_major_formatter(_LogFormatter())
    axis.set_minor_locator(NullLocator())


class _LogLocator(LogLocator):
    """As many ticks as have room, seven at most."""

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        low, high = sorted((vmin, vmax))
        axis: Any = self.axis
        room = min(7, max(3, int(0.75 * axis.get_tick_space())))
        if math.log10(high / low) < 0.8:
            even = MaxNLocator(min(4, room), steps=[1, 2, 5, 10])
            return _inside(even.tick_values(low, high), low, high)
        powers = np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = _inside(np.outer(10.0**powers, (1, 2, 5)), low, high)
        step = 1
        while len(ticks) > room:
            ticks = _inside(10.0 ** powers[powers % step == 0], low, high)
            step += 1
        return ticks


def _inside(ticks: ArrayLike, low: float, high: float) -> np.ndarray:
    flat = np.ravel(ticks)
    return flat[(flat >= low * (1 - 1e-9)) & (flat <= high * (1 + 1e-9))]


class _LogFormatter(Formatter):
    """Plain numbers where all are short, powers of ten otherwise."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:,.6g}"

    def format_ticks(self, values: ArrayLike) -> list[str]:
        numbers = np.asarray(values)
        if np.all((numbers >= 1e-3) & (numbers <= 1e5)):
            return [self(number) for number in numbers]
        parts = [f"{number:.2e}".split("e") for number in numbers]
        factors = ["" if float(a) == 1 else rf"{float(a):g} \cdot " for a, _ in parts]
        return [f"${a}10^{{{int(n)}}}$" for a, (_, n) in zip(factors, parts, strict=True)]


def _axes(ax: Axes | None) -> Axes:
    if ax is None:
        return plt.subplots(layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be a matplotlib Axes or None; got a {type(ax).__name__}")
    return ax


def _labelled(ax: Axes, **labels: str) -> Axes:
    """Label the axes, with a legend inside, where it covers least, if there are two names."""
    ax.set(**labels)
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(loc="best", framealpha=0.85)
    return ax


def _linear(color: str) -> np.ndarray:
    """Red, green and blue as shares of light."""
    channels = np.array(to_rgb(color))
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def _with_luminance(color: str, luminance: float) -> str:
    """Mix a color with white, or with black, to a relative luminance as WCAG defines it."""
    light = _linear(color)
    own = light @ LUMINANCE
    if own > luminance:
        light = light * luminance / own
    else:
        light = light + (1 - light) * (luminance - own) / (1 - own)
    channels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return to_hex(channels.tolist())


def _points(batch: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """Inputs `(rows, 2)` and integer classes `(rows,)` of a batch that can be drawn."""
    if not isinstance(batch, Batch):
        raise TypeError(f"batch must be a jaxnn.Batch(x, y); got a {type(batch).__name__}")
    x = as_numpy("batch.x", batch.x)
    if x.ndim != 2 or x.shape[1] != 2 or not len(x):
        raise ValueError(f"batch.x must be numbers of shape (rows, 2); got shape {x.shape}")
    if not np.all(finite := np.isfinite(x)):
        raise ValueError(f"batch.x must be finite; got {x[~finite][0]}")
    y = as_numpy("batch.y", batch.y)
    largest = int(y.max(initial=0)) if y.dtype.kind in "iu" else 0
    classes = y.shape[1] if y.ndim == 2 else largest + 1
    check_targets("batch.y", y, "categorical_crossentropy", len(x), classes)
    return x, (y if y.ndim == 1 else np.argmax(y, axis=1)).astype(np.int64)


def _scores(predict_fn: PredictFn, x: np.ndarray, at_least: int) -> np.ndarray:
    scores = as_numpy("predict_fn(x)", predict_fn(x.astype(np.float32)))
    if scores.ndim != 2 or len(scores) != len(x) or scores.shape[1] < max(2, at_least):
        wanted = f"({len(x)}, classes), with at least {max(2, at_least)} classes"
        raise ValueError(f"predict_fn(x) must be of shape {wanted}; got {scores.shape}")
    return scores.astype(np.float64)


def _winners(scores: np.ndarray) -> np.ndarray:
    """The class of the largest score, -1 where a score is NaN."""
    return np.where(np.isnan(scores).any(axis=-1), -1, np.argmax(scores, axis=-1))


def _boundaries(ax: Axes, columns: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
    """A thin line around each class, where its score crosses the best of the others."""
    winners = _winners(scores)
    # Each boundary lies between two classes: those around all but the last are all there are.
    for k in range(scores.shape[-1] - 1):
        with np.errstate(invalid="ignore"):
            margin = scores[..., k] - np.delete(scores, k, axis=-1).max(axis=-1)
        # A tie belongs to the lowest class, so the line goes around it, not through it.
        inside = np.where(winners == k, 1, -1) * np.maximum(np.abs(margin), 1e-30)
        if np.any(inside > 0) and np.any(inside < 0):
            line = {"colors": "0.25", "linewidths": 0.8, "linestyles": "solid", "zorder": 0.5}
            ax.contour(columns, rows, inside, levels=[0.0], **line)


def _is_result(part: object) -> bool:
    return hasattr(getattr(part, "history", None), "evaluations")


def _groups(curves: object, log_x: bool) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    if not isinstance(curves, Mapping):
        came = type(curves).__name__
        raise TypeError(f"curves must map labels to (x, y) or results; got a {came}")
    groups = {}
    for label, group in curves.items():
        parts = group if isinstance(group, list) else [group]
        each = [curves_of(p, log_x=log_x) if _is_result(p) else [p] for p in parts]
        groups[label] = [_curve(f"curves[{label!r}]", pair) for pairs in each for pair in pairs]
    if not groups or not all(groups.values()):
        raise ValueError("curves must hold at least one label, and each label at least one (x, y)")
    return groups


def _curve(name: str, pair: object) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(pair, tuple) or len(pair) != 2:
        came = f"a {type(pair).__name__}"
        came = f"{came} of {len(pair)}" if isinstance(pair, tuple) else came
        raise ValueError(f"{name} must be a tuple (x, y), a result or a list of them; got {came}")
    x, y = as_numpy(f"{name} x", pair[0]), as_numpy(f"{name} y", pair[1])
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"{name} must be x and y of one shape (points,); got {x.shape}, {y.shape}")
    return x.astype(np.float64), y.astype(np.float64)


def _draw(ax: Axes, label: str, group: list, style: Style) -> None:
    """Draw one line for one curve; for several, thin ones, and their median if x is shared."""
    x = group[0][0]
    shared = all(np.array_equal(x, other, equal_nan=True) for other, _ in group)
    thin: Style = style | {"lw": _line_width(0.5)}
    thin |= {"linestyle": "-", "alpha": 0.35} if shared else {}
    if len(group) > 1:
        lines = [ax.plot(*map(_finite, pair), **thin)[0] for pair in group]
        if not shared:
            lines[0].set_label(label)
    if shared:
        with np.errstate(invalid="ignore"):
            median = np.median([y for _, y in group], axis=0)
        ax.plot(_finite(x), _finite(median), label=label, **style)


def _line_style(index: int) -> Style:
    color = COLORS[index % len(COLORS)]
    color = _with_luminance(color, min(float(_linear(color) @ LUMINANCE), DARK))
    style: Style = {"color": color, "linestyle": DASHES[index % len(DASHES)]}
    turn = index // len(DASHES)
    return style | (
        {"marker": MARKERS[(turn - 1) % len(MARKERS)], "markevery": 0.1} if turn else {}
    )


def _line_width(times: float) -> float:
    return times * plt.rcParams["lines.linewidth"]


def _finite(values: PyTree) -> np.ndarray:
    """As float64, with NaN, which matplotlib leaves out, for all that is not finite."""
    return np.where(np.isfinite(values), values, np.nan).astype(np.float64)


def _moving_average(values: np.ndarray, half: int) -> np.ndarray:
    """Mean of the finite values at most `half` places away; NaN where there is none."""
    half = min(half, len(values) - 1)
    inside, kernel = slice(half, half + len(values)), np.ones(2 * half + 1)
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), kernel)[inside]
    counts = np.convolve(finite.astype(np.float64), kernel)[inside]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
