"""What can be measured of a figure: fonts, contrasts, and boxes that must not overlap."""

from itertools import combinations, pairwise
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

SUPERSCRIPT = 0.7
"""Matplotlib's mathematical text shrinks exponents to this share."""


def luminance(color: Any) -> float:
    """Relative luminance by the formula of WCAG 2.2."""

    def light(share: float) -> float:
        return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4

    red, green, blue = map(light, to_rgb(color))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: Any, second: Any) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def smallest_font(figure: Figure) -> float:
    """In points, exponents included."""
    figure.canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    sizes: list[float] = [
        float(text.get_fontsize()) * (SUPERSCRIPT if "^" in text.get_text() else 1)
        for text in texts
    ]
    return min(sizes)


def overlaps(first: Any, second: Any) -> bool:
    """Whether boxes share more than a pixel."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return width > 1 and height > 1


def assert_clear(figure: Figure) -> None:
    """Assert that nothing hides under a neighbour and that all is inside the figure."""
    figure.canvas.draw()
    boxes = {ax: ax.get_tightbbox() for ax in figure.axes}
    for (one, box), (other, far) in combinations(boxes.items(), 2):
        are_twins = one.bbox.bounds == other.bbox.bounds
        assert are_twins or not overlaps(box, far), (one, other)
    for legend in figure.legends:
        for ax, box in boxes.items():
            assert not overlaps(legend.get_window_extent(), box), (legend, ax)
    shown = [*boxes.values(), *(legend.get_window_extent() for legend in figure.legends)]
    for box in shown:
        assert min(box.x0, box.y0) >= -1, box
        assert box.x1 <= figure.bbox.x1 + 1, box
        assert box.y1 <= figure.bbox.y1 + 1, box
    for ax in figure.axes:
        if legend := ax.get_legend():
            inside, whole = legend.get_window_extent(), ax.get_window_extent()
            assert whole.x0 <= inside.x0, legend
            assert inside.x1 <= whole.x1, legend
        for axis in (ax.xaxis, ax.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            for left, right in pairwise(labels):
                boxes_of = left.get_window_extent(), right.get_window_extent()
                assert not overlaps(*boxes_of), (left, right)


def assert_fit_for_a_slide(figure: Figure) -> None:
    assert figure.get_figwidth() == 13.33
    assert smallest_font(figure) >= 10
    assert_clear(figure)
