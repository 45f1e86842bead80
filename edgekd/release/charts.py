"""The charts of a report: curves, latency histogram, scatter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from markupsafe import Markup

from edgekd.measurement import Measurement, display_scale, display_unit, full_text, number
from edgekd.release.plot import (
    BOTTOM,
    DASHES,
    HEIGHT,
    TOP,
    WIDTH,
    Axis,
    Key,
    Plot,
    axis_for,
    element,
    joined,
    linear_axis,
    shape,
)
from edgekd.release.report_tables import ROLES, warmup_text
from edgekd.release.result import Result

_DOTS = 80
"""Above this many epochs, dots would hide the line."""


@dataclass(frozen=True)
class Line:
    """One line: (epoch, value) pairs, and the epoch whose weights are used."""

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
    """Draw lines over the epoch; the best epoch has a ring, every epoch a tooltip.

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


_BINS = 48

_SHOWN = 0.995
"""Share of the queries that the axis covers; a stray one of a second would flatten the rest."""


def latency_histogram(
    title: str, series: str, samples_ms: Sequence[float], percentiles: Mapping[str, Measurement]
) -> Markup:
    """Draw how long the queries took.

    Args:
        title: the chart's.
        series: the CSS class that colours it.
        samples_ms: every query, in ms; at least two.
        percentiles: by name (``p50``); those without a value are left out.
    """
    samples = np.asarray(samples_ms, dtype=np.float64)
    marks = {name: f.value for name, f in percentiles.items() if f.value is not None}
    low, high = float(samples.min()), float(np.quantile(samples, _SHOWN))
    high = max([high, *marks.values()])
    if high <= low:
        high = low * 1.1 or 1.0
    counts, edges = np.histogram(samples, bins=_BINS, range=(low, high))
    shares = 100 * counts / len(samples)
    beyond = int(np.sum(samples > high))
    note = f"{len(samples):,} queries"
    if beyond:
        slowest = number(float(samples.max()), 3)
        note += f"; {beyond:,} above {number(high, 3)} ms are not drawn (slowest {slowest} ms)"
    plot = Plot(
        title,
        linear_axis([low, high], 0.03),
        linear_axis([0.0, float(shares.max())], 0.18),
        "latency of one query (ms)",
        "queries (%)",
        note,
    )
    floor = HEIGHT - BOTTOM
    bars = []
    for share, left, right in zip(shares, edges[:-1], edges[1:], strict=True):
        if share > 0:
            tip = f"{number(float(left), 3)} to {number(float(right), 3)} ms: {share:.1f} %"
            x, y = plot.x_at(float(left)), plot.y_at(float(share))
            width = max(plot.x_at(float(right)) - x - 0.6, 0.6)
            bars.append(
                element("rect", element("title", tip), x=x, y=y, width=width, height=floor - y)
            )
    plot.add(element("g", joined(bars), class_=f"bars {series}"))
    plot.add(*_percentile_marks(plot, percentiles, floor))
    return plot.render()


def _percentile_marks(
    plot: Plot, percentiles: Mapping[str, Measurement], floor: float
) -> list[Markup]:
    """A line per percentile; labels step down where they would overlap."""
    parts = []
    right_of_last, row = float("-inf"), 0
    for name, figure in percentiles.items():
        if figure.value is None:
            continue
        x = plot.x_at(figure.value)
        row = row + 1 if x < right_of_last + 30 else 0
        right_of_last = x
        y = TOP + 8 + 14 * row
        tip = element("title", f"{name}: {full_text(figure)}")
        parts.append(element("line", tip, class_="percentile", x1=x, x2=x, y1=y - 4, y2=floor))
        at_edge = x > WIDTH - 50
        parts.append(
            element(
                "text",
                name,
                class_="label",
                x=x - 4 if at_edge else x + 4,
                y=y + 4,
                text_anchor="end" if at_edge else "start",
            )
        )
    return parts


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
    x: Measurement
    y: Measurement
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
    """Labels next to the points, pushed apart where they would overlap."""
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


def _ends(figure: Measurement) -> tuple[float, float, float]:
    """Low end, value and high end in display units."""
    if figure.value is None:
        raise ValueError("a point needs a value")
    scale = display_scale(figure.unit)
    low, high = figure.interval or (figure.value, figure.value)
    return low * scale, figure.value * scale, high * scale


_SHAPES = {"teacher": "square", "baseline": "triangle", "student": "circle"}
_SAME_NETWORK = "not timed: the same network as the distilled student, drawn at its latency"


def charts_of(
    result: Result, histories: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[Markup]]:
    """The charts by section of the page; a section without data is empty."""
    return {
        "tradeoff": [chart for chart in (_against_latency(result), _against_size(result)) if chart],
        "training": list(_training(result, histories)),
        "latency": list(_latency(result)),
    }


def _metric_title(result: Result) -> str:
    unit = display_unit(result.student.metric.unit)
    # A metric whose unit is its own name ("mae") would be named twice.
    return f"{result.metric} ({unit})" if unit not in ("", result.metric) else result.metric


def _against_latency(result: Result) -> Markup | None:
    points = []
    for role, model in result.models.items():
        latency, note = model.latency.get("p50_ms"), ""
        if latency is None and role == "baseline":
            latency, note = result.student.latency.get("p50_ms"), _SAME_NETWORK
        if latency is not None and latency.value is not None and model.metric.value is not None:
            kind = _SHAPES[role]
            points.append(Point(f"s-{role}", kind, ROLES[role], latency, model.metric, note))
    if not points:
        return None
    note = "Bars are 95 % intervals."
    if any(point.note for point in points):
        note += f" Student alone: {_SAME_NETWORK}."
    title = f"{result.metric.capitalize()} against latency"
    return scatter(title, points, "latency p50 (ms)", _metric_title(result), note)


def _against_size(result: Result) -> Markup | None:
    points = [
        Point(f"s-{role}", _SHAPES[role], ROLES[role], model.size_mb, model.metric)
        for role, model in result.models.items()
        if model.size_mb and model.size_mb.value is not None and model.metric.value is not None
    ]
    if not points:
        return None
    title = f"{result.metric.capitalize()} against size"
    return scatter(title, points, "size (MB)", _metric_title(result), "Bars are 95 % intervals.")


def _training(result: Result, histories: Mapping[str, Mapping[str, Any]]) -> Iterator[Markup]:
    present = {role: histories[role] for role in ROLES if histories.get(role)}
    scale = display_scale(result.student.metric.unit)
    validation = [_line(role, history, "validation", scale) for role, history in present.items()]
    if any(line.points for line in validation):
        lines = [line for line in validation if line.points]
        better: Literal["higher", "lower"] = "higher" if result.higher_is_better else "lower"
        title = f"Validation {result.metric}"
        yield curves(title, lines, _metric_title(result), better=better)
    losses = [_line(role, history, "loss", 1.0) for role, history in present.items()]
    if any(line.points for line in losses):
        note = "Each training has its own objective: the levels do not compare, the shapes do."
        yield curves("Training loss", [line for line in losses if line.points], "loss", note)
    terms = _terms(histories.get("student") or {})
    if len(terms) > 1:
        note = "Each term before its weight."
        yield curves("Terms of the distillation loss", terms, "term", note)


def _line(role: str, history: Mapping[str, Any], key: str, scale: float) -> Line:
    rows = history.get("epochs", [])
    points = [(row["epoch"], row.get(key)) for row in rows]
    return Line(f"s-{role}", ROLES[role], _finite(points, scale), history.get("best_epoch"))


def _terms(history: Mapping[str, Any]) -> list[Line]:
    rows = history.get("epochs", [])
    names = dict.fromkeys(name for row in rows for name in row.get("terms", {}))
    lines = []
    for index, name in enumerate(names):
        points = [(row["epoch"], row.get("terms", {}).get(name)) for row in rows]
        lines.append(Line(f"t-{index % 5}", name.replace("_", " "), _finite(points, 1.0)))
    return [line for line in lines if line.points]


def _finite(points: list[tuple[Any, Any]], scale: float) -> tuple[tuple[float, float], ...]:
    return tuple(
        (float(x), float(y) * scale) for x, y in points if y is not None and math.isfinite(y)
    )


def _latency(result: Result) -> Iterator[Markup]:
    for role in ("student", "teacher"):
        model = result.models.get(role)
        if model is None or len(model.samples_ms) < 2:
            continue
        percentiles: dict[str, Measurement] = {
            key.removesuffix("_ms"): figure for key, figure in model.latency.items()
        }
        warmup = warmup_text(model)
        title = f"Latency, {ROLES[role]}" + (f" ({warmup})" if warmup else "")
        yield latency_histogram(title, f"s-{role}", model.samples_ms, percentiles)
