"""A scatter plot of a few labelled points with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from edgekd.figure import Figure
from edgekd.release.charts.axis import axis_for, linear_axis
from edgekd.release.charts.plot import Plot, element, joined, shape
from edgekd.release.figure_text import display_scale, full_text

_LINE = 15
"""Height of a label: two labels on one side are at least this far apart."""
_GAP = 12


@dataclass(frozen=True)
class Point:
    """One point; both figures have a value."""

    series: str
    """The CSS class that colours it."""
    kind: str
    """The marker's shape."""
    label: str
    x: Figure
    y: Figure
    note: str = ""


def scatter(
    title: str, points: Sequence[Point], x_title: str, y_title: str, note: str = ""
) -> Markup:
    """Draw points, each labelled and with a tooltip; bars are the 95 % intervals.

    The horizontal axis is logarithmic where the points are far apart.
    """
    ends = [(_ends(point.x), _ends(point.y)) for point in points]
    plot = Plot(
        title,
        axis_for(value for x, _ in ends for value in x),
        linear_axis((value for _, y in ends for value in y), 0.12),
        x_title,
        y_title,
        note,
    )
    places = []
    for point, ((left, x, right), (low, y, high)) in zip(points, ends, strict=True):
        across, up = plot.x_at(x), plot.y_at(y)
        places.append((across, up))
        tip = f"{point.label}: {full_text(point.y)} at {full_text(point.x)}"
        tip += f"; {point.note}" if point.note else ""
        bars = [
            element("line", x1=plot.x_at(left), x2=plot.x_at(right), y1=up, y2=up),
            element("line", x1=across, x2=across, y1=plot.y_at(low), y2=plot.y_at(high)),
        ]
        marker = shape(point.kind, across, up, 6, tip)
        plot.add(element("g", joined([*bars, marker]), class_=f"point {point.series}"))
    plot.add(*_labels(plot, points, places))
    return plot.render()


def _labels(
    plot: Plot, points: Sequence[Point], places: Sequence[tuple[float, float]]
) -> list[Markup]:
    """Labels beside the points, pushed apart where they would overlap."""
    middle = (plot.x_at(plot.x.low) + plot.x_at(plot.x.high)) / 2
    parts = []
    for to_left in (False, True):
        side = [
            (up, across, point)
            for point, (across, up) in zip(points, places, strict=True)
            if (across > middle) is to_left
        ]
        lowest = float("-inf")
        for up, across, point in sorted(side, key=lambda entry: entry[0]):
            y = max(up, lowest + _LINE)
            lowest = y
            parts.append(
                element(
                    "text",
                    point.label,
                    class_=f"label {point.series}",
                    x=across - _GAP if to_left else across + _GAP,
                    y=y + 4,
                    text_anchor="end" if to_left else "start",
                )
            )
    return parts


def _ends(figure: Figure) -> tuple[float, float, float]:
    """Low end, value and high end in display units."""
    if figure.value is None:
        raise ValueError("a point needs a value")
    scale = display_scale(figure.unit)
    low, high = figure.interval or (figure.value, figure.value)
    return low * scale, figure.value * scale, high * scale
