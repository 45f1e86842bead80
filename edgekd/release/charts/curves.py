"""Lines over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from edgekd.release.charts.axis import Axis, axis_for, linear_axis
from edgekd.release.charts.plot import DASHES, Key, Plot, element, joined
from edgekd.release.figure_text import number

_DOTS = 80
"""Above this many epochs, dots would hide the line."""


@dataclass(frozen=True)
class Line:
    """One line: (epoch, value) pairs, and the epoch whose weights were kept."""

    series: str
    """The CSS class that colours it."""
    label: str
    points: tuple[tuple[float, float], ...]
    best: float | None = None


def curves(
    title: str,
    lines: Sequence[Line],
    y_title: str,
    note: str = "",
    better: Literal["higher", "lower"] | None = None,
) -> Markup:
    """Draw lines over the epoch; the kept epoch has a ring, every epoch a tooltip.

    Args:
        title: the chart's.
        lines: at least one, each of at least one point with finite values.
        y_title: what the values are, with their unit.
        note: a sentence below the chart.
        better: for a metric: the worst sixth of the values, the first epochs', is drawn at the
            edge, so that the differences which count can be seen.
    """
    epochs = [x for line in lines for x, _ in line.points]
    values = [y for line in lines for _, y in line.points]
    span = linear_axis(epochs, 0.02) if max(epochs) > min(epochs) else linear_axis([0, 2], 0)
    whole = tuple((mark, label) for mark, label in span.ticks if float(mark).is_integer())
    x_axis = type(span)(span.low, span.high, False, whole)
    plot = Plot(
        title,
        x_axis,
        _metric_axis(values, better) if better else axis_for(values),
        "epoch",
        y_title,
        note,
    )
    for index, line in enumerate(lines):
        dash = DASHES[index % len(DASHES)] or None
        path = " ".join(f"{plot.x_at(x):.1f},{plot.y_at(y):.1f}" for x, y in line.points)
        parts = [element("polyline", points=path, stroke_dasharray=dash)]
        if len(line.points) <= _DOTS:
            parts += [
                element(
                    "circle",
                    element("title", f"{line.label}, epoch {x:.0f}: {number(y)}"),
                    cx=plot.x_at(x),
                    cy=plot.y_at(y),
                    r=2,
                )
                for x, y in line.points
            ]
        kept = next(((x, y) for x, y in line.points if x == line.best), None)
        if kept is not None:
            tip = element("title", f"{line.label}: epoch {kept[0]:.0f} is kept ({number(kept[1])})")
            parts.append(
                element(
                    "circle", tip, class_="kept", cx=plot.x_at(kept[0]), cy=plot.y_at(kept[1]), r=6
                )
            )
        plot.add(element("g", joined(parts), class_=f"line {line.series}"))
        swatch = element("line", x1=0, x2=28, y1=7, y2=7, stroke_dasharray=dash)
        plot.keys.append(Key(f"line {line.series}", line.label, swatch))
    if any(line.best is not None for line in lines):
        ring = element("circle", class_="kept", cx=14, cy=7, r=5)
        plot.keys.append(Key("line neutral", "the epoch that is kept", ring))
    return plot.render()


def _metric_axis(values: Sequence[float], better: Literal["higher", "lower"]) -> Axis:
    ordered = sorted(values, reverse=better == "lower")
    return linear_axis(ordered[len(ordered) // 6 :], 0.05)
