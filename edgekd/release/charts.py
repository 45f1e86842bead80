"""The charts of the report as inline SVG: scatter plots, training curves, latency histograms.

Colours are CSS classes of the page, so that a chart is readable in light and in dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from edgekd.measurement import Measurement, display_scale, display_unit, full_text, number
from edgekd.release.report_tables import ROLES, warmup_text
from edgekd.release.result import ModelResult, Result

_WIDTH, _HEIGHT = 440, 270
_LEFT, _TOP = 58, 26
_EDGE, _FLOOR = _WIDTH - 12, _HEIGHT - 44
"""The right and the lower end of the plotted area."""
_NICE_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_LOG_RATIO = 6.0
"""From this ratio of largest to smallest on, a linear axis would crowd the small ones."""
_DASHES = (None, "7 4", "2 4", "10 4 2 4", "1 3")
"""Lines differ in dash as well as in colour, for those who do not see the colours."""
_MOST_DOTS = 80
"""Above this many epochs, dots would hide the line."""
_BINS = 48
_DRAWN = 0.995
"""Share of the queries that the axis covers; a stray one of a second would flatten the rest."""
_LABEL_HEIGHT, _LABEL_GAP = 15, 12
_SAME_NETWORK = "not timed: the same network as the distilled student, drawn at its latency"


def charts_of(
    result: Result, histories: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[Markup]]:
    """The charts by section of the page; a section without data is empty.

    Args:
        result: whose figures are drawn.
        histories: of the trainings, by role.
    """
    return {
        "tradeoff": [chart for chart in (_against_latency(result), _against_size(result)) if chart],
        "training": list(_training(result, histories)),
        "latency": [
            _histogram(role, result.models[role])
            for role in ("student", "teacher")
            if role in result.models and len(result.models[role].samples_ms) > 1
        ],
    }


@dataclass(frozen=True)
class Axis:
    """A range of data values, linear or logarithmic, with labelled ticks inside it."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def position(self, value: float) -> float:
        """Position of a value: 0 at ``low``, 1 at ``high``; values outside are clipped."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return min(max((value - low) / (high - low), 0.0), 1.0)


def linear_axis(values: Iterable[float], pad: float = 0.06, count: int = 5) -> Axis:
    """A linear axis around the values.

    Args:
        values: finite data values, at least one.
        pad: share of the range that is added on both sides.
        count: about how many ticks.
    """
    known = list(values)
    low, high = min(known), max(known)
    if low == high:
        low, high = (low - abs(low) * 0.1, low + abs(low) * 0.1) if low else (-1.0, 1.0)
    margin = (high - low) * pad
    # Padding must not suggest that negative times or sizes exist.
    low, high = low - margin if low < 0 or low - margin > 0 else 0.0, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice for nice in _NICE_STEPS if nice * power >= rough * (1 - 1e-9)) * power
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    if places and round(step * 10**places, 6) % 1:
        places += 1
    # Adding zero turns a negative zero into a plain one.
    marks = [round(index * step, 12) + 0.0 for index in range(first, last + 1)]
    return Axis(low, high, False, tuple((mark, f"{mark:,.{places}f}") for mark in marks))


def log_axis(values: Iterable[float], pad: float = 1.15) -> Axis:
    """A logarithmic axis around positive values, with ticks at 1, 2 and 5 of each decade.

    Args:
        values: finite positive data values, at least one.
        pad: the factor that is added on both sides.
    """
    known = list(values)
    low, high = min(known) / pad, max(known) * pad
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    marks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [
        (mark, f"{mark:,.{max(0, -math.floor(math.log10(mark) + 1e-9))}f}")
        for mark in marks
        if low <= mark <= high
    ]
    return Axis(low, high, True, tuple(ticks))


def axis_for(values: Iterable[float]) -> Axis:
    """Logarithmic where the values are positive and spread widely, else linear."""
    known = list(values)
    spread = min(known) > 0 and max(known) / min(known) >= _LOG_RATIO
    return log_axis(known, 1.3) if spread else linear_axis(known, 0.12)


def element(
    tag: str, *content: str | Markup, tip: str = "", **attributes: str | float | None
) -> Markup:
    """An SVG element with everything escaped.

    Args:
        tag: the element's name.
        content: texts, which are escaped, and elements.
        tip: its tooltip.
        attributes: ``class_`` for ``class``, ``_`` for ``-``; None leaves an attribute out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    title = Markup("<title>{}</title>").format(tip) if tip else ""
    inner = Markup("").join([title, *content])
    return Markup(f"<{tag}{written}>{inner}</{tag}>")


def _plain(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass
class Plot:
    """A chart being drawn. Data values are mapped by :meth:`x_at` and :meth:`y_at`."""

    title: str
    x: Axis
    y: Axis
    x_title: str
    y_title: str
    note: str = ""
    body: list[Markup] = field(default_factory=list)
    legend: list[Markup] = field(default_factory=list)

    def x_at(self, value: float) -> float:
        """The horizontal place of a value, in pixels."""
        return _LEFT + self.x.position(value) * (_EDGE - _LEFT)

    def y_at(self, value: float) -> float:
        """The vertical place of a value, in pixels."""
        return _FLOOR - self.y.position(value) * (_FLOOR - _TOP)

    def add(self, class_: str, *parts: Markup) -> None:
        """Draw a group of elements over what is there."""
        self.body.append(element("g", *parts, class_=class_))

    def add_key(self, class_: str, label: str, mark: Markup) -> None:
        """Add an entry to the legend."""
        swatch = element("svg", mark, viewBox="0 0 28 14", class_=class_, aria_hidden="true")
        self.legend.append(element("span", swatch, label, class_="key"))

    def render(self) -> Markup:
        """The chart as a ``<figure>`` with its title, SVG, legend and note."""
        svg = element(
            "svg",
            *self._frame(),
            *self.body,
            viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
            role="img",
            aria_label=f"{self.title}: {self.y_title} over {self.x_title}",
        )
        parts = [element("figcaption", self.title), svg]
        parts += [element("div", *self.legend, class_="legend")] if self.legend else []
        parts += [element("p", self.note, class_="note")] if self.note else []
        return element("figure", *parts, class_="chart")

    def _frame(self) -> Iterator[Markup]:
        for value, label in self.y.ticks:
            y = self.y_at(value)
            yield element("line", class_="grid", x1=_LEFT, x2=_EDGE, y1=y, y2=y)
            yield _text(label, "tick", _LEFT - 6, y + 4, "end")
        for value, label in self.x.ticks:
            x = self.x_at(value)
            yield element("line", class_="grid", x1=x, x2=x, y1=_TOP, y2=_FLOOR)
            yield _text(label, "tick", x, _FLOOR + 16, "middle")
        yield element("line", class_="axis", x1=_LEFT, x2=_EDGE, y1=_FLOOR, y2=_FLOOR)
        yield _text(self.x_title, "name", (_LEFT + _EDGE) / 2, _HEIGHT - 8, "middle")
        yield _text(self.y_title, "name", 4, 14)


def _text(text: str, class_: str, x: float, y: float, anchor: str | None = None) -> Markup:
    return element("text", text, class_=class_, x=x, y=y, text_anchor=anchor)


@dataclass(frozen=True)
class _Point:
    """One model in a scatter plot; both figures have a value."""

    role: str
    x: Measurement
    y: Measurement
    note: str = ""


def _against_latency(result: Result) -> Markup | None:
    points = []
    for role, model in result.models.items():
        latency, note = model.latency.get("p50_ms"), ""
        if latency is None and role == "baseline":
            latency, note = result.student.latency.get("p50_ms"), _SAME_NETWORK
        if latency is not None and latency.value is not None and model.metric.value is not None:
            points.append(_Point(role, latency, model.metric, note))
    note = f" Student alone: {_SAME_NETWORK}." if any(point.note for point in points) else ""
    return _scatter(result, points, "latency", "latency p50 (ms)", note)


def _against_size(result: Result) -> Markup | None:
    points = [
        _Point(role, model.size_mb, model.metric)
        for role, model in result.models.items()
        if model.size_mb and model.size_mb.value is not None and model.metric.value is not None
    ]
    return _scatter(result, points, "size", "size (MB)")


def _scatter(
    result: Result, points: Sequence[_Point], cost: str, x_title: str, note: str = ""
) -> Markup | None:
    """The metric over a cost; the horizontal axis is logarithmic where points are far apart."""
    if not points:
        return None
    ends = [(_ends(point.x), _ends(point.y)) for point in points]
    plot = Plot(
        f"{result.metric.capitalize()} against {cost}",
        axis_for(value for x, _ in ends for value in x),
        linear_axis((value for _, y in ends for value in y), 0.12),
        x_title,
        _metric_title(result),
        f"Bars are 95 % intervals.{note}",
    )
    places = []
    for point, ((left, x, right), (low, y, high)) in zip(points, ends, strict=True):
        across, up = plot.x_at(x), plot.y_at(y)
        places.append((up, across, point.role))
        tip = f"{ROLES[point.role]}: {full_text(point.y)} at {full_text(point.x)}"
        tip += f"; {point.note}" if point.note else ""
        plot.add(
            f"point s-{point.role}",
            element("line", x1=plot.x_at(left), x2=plot.x_at(right), y1=up, y2=up),
            element("line", x1=across, x2=across, y1=plot.y_at(low), y2=plot.y_at(high)),
            _marker(point.role, across, up, tip),
        )
    middle = (plot.x_at(plot.x.low) + plot.x_at(plot.x.high)) / 2
    for to_left in (False, True):
        # Labels next to the points, pushed apart where they would overlap.
        lowest = float("-inf")
        for up, across, role in sorted(place for place in places if (place[1] > middle) is to_left):
            lowest = max(up, lowest + _LABEL_HEIGHT)
            x, anchor = (across - _LABEL_GAP, "end") if to_left else (across + _LABEL_GAP, "start")
            plot.body.append(_text(ROLES[role], f"label s-{role}", x, lowest + 4, anchor))
    return plot.render()


def _marker(role: str, x: float, y: float, tip: str) -> Markup:
    """A square for the teacher, a triangle for the student alone, a circle for the distilled."""
    if role == "teacher":
        return element("rect", tip=tip, x=x - 5, y=y - 5, width=10, height=10)
    if role == "baseline":
        points = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y + 6:.1f} {x - 6:.1f},{y + 6:.1f}"
        return element("polygon", tip=tip, points=points)
    return element("circle", tip=tip, cx=x, cy=y, r=6)


def _ends(figure: Measurement) -> tuple[float, float, float]:
    """Low end, value and high end in display units."""
    if figure.value is None:
        raise ValueError("a point needs a value")
    scale = display_scale(figure.unit)
    low, high = figure.interval or (figure.value, figure.value)
    return low * scale, figure.value * scale, high * scale


def _metric_title(result: Result) -> str:
    unit = display_unit(result.student.metric.unit)
    # A metric whose unit is its own name ("mae") would be named twice.
    return f"{result.metric} ({unit})" if unit not in ("", result.metric) else result.metric


@dataclass(frozen=True)
class _Line:
    """(epoch, value) pairs with finite values, and the epoch whose weights are used."""

    series: str
    """The CSS class that colours it."""
    label: str
    points: tuple[tuple[float, float], ...]
    best: float | None = None


def _training(result: Result, histories: Mapping[str, Mapping[str, Any]]) -> Iterator[Markup]:
    present = {role: histories[role] for role in ROLES if histories.get(role)}

    def lines(key: str, scale: float) -> list[_Line]:
        rows = {role: history.get("epochs", []) for role, history in present.items()}
        found = [
            _Line(
                f"s-{role}",
                ROLES[role],
                _finite([(row["epoch"], row.get(key)) for row in rows[role]], scale),
                history.get("best_epoch"),
            )
            for role, history in present.items()
        ]
        return [line for line in found if line.points]

    if validation := lines("validation", display_scale(result.student.metric.unit)):
        values = [y for line in validation for _, y in line.points]
        # The worst sixth, the first epochs, is drawn at the edge: the differences that count
        # can then be seen.
        ordered = sorted(values, reverse=not result.higher_is_better)
        axis = linear_axis(ordered[len(ordered) // 6 :], 0.05)
        yield _curves(f"Validation {result.metric}", validation, _metric_title(result), axis=axis)
    if losses := lines("loss", 1.0):
        note = "Each training has its own objective: the levels do not compare, the shapes do."
        yield _curves("Training loss", losses, "loss", note)
    rows = (histories.get("student") or {}).get("epochs", [])
    names = dict.fromkeys(name for row in rows for name in row.get("terms", {}))
    terms = [
        _Line(
            f"t-{index % 5}",
            name.replace("_", " "),
            _finite([(row["epoch"], row.get("terms", {}).get(name)) for row in rows], 1.0),
        )
        for index, name in enumerate(names)
    ]
    if len(drawn := [line for line in terms if line.points]) > 1:
        note = "Each term before its weight."
        yield _curves("Terms of the distillation loss", drawn, "term", note)


def _finite(points: list[tuple[Any, Any]], scale: float) -> tuple[tuple[float, float], ...]:
    return tuple(
        (float(x), float(y) * scale) for x, y in points if y is not None and math.isfinite(y)
    )


def _curves(
    title: str, lines: Sequence[_Line], y_title: str, note: str = "", axis: Axis | None = None
) -> Markup:
    """Lines over the epoch; the best epoch has a ring, every epoch a tooltip."""
    epochs = [x for line in lines for x, _ in line.points]
    span = linear_axis(epochs, 0.02) if max(epochs) > min(epochs) else linear_axis([0, 2], 0)
    integers = tuple((mark, label) for mark, label in span.ticks if float(mark).is_integer())
    if axis is None:
        axis = axis_for(y for line in lines for _, y in line.points)
    plot = Plot(title, Axis(span.low, span.high, False, integers), axis, "epoch", y_title, note)
    for index, line in enumerate(lines):
        dash = _DASHES[index % len(_DASHES)]
        places = [(x, y, plot.x_at(x), plot.y_at(y)) for x, y in line.points]
        path = " ".join(f"{across:.1f},{up:.1f}" for _, _, across, up in places)
        parts = [element("polyline", points=path, stroke_dasharray=dash)]
        if len(places) <= _MOST_DOTS:
            parts += [
                element(
                    "circle",
                    tip=f"{line.label}, epoch {x:.0f}: {number(y)}",
                    cx=across,
                    cy=up,
                    r=2,
                )
                for x, y, across, up in places
            ]
        for x, y, across, up in places:
            if x == line.best:
                tip = f"{line.label}: best epoch {x:.0f} ({number(y)})"
                parts.append(element("circle", tip=tip, class_="best", cx=across, cy=up, r=6))
        plot.add(f"line {line.series}", *parts)
        swatch = element("line", x1=0, x2=28, y1=7, y2=7, stroke_dasharray=dash)
        plot.add_key(f"line {line.series}", line.label, swatch)
    if any(line.best is not None for line in lines):
        ring = element("circle", class_="best", cx=14, cy=7, r=5)
        plot.add_key("line neutral", "best epoch, whose weights are used", ring)
    return plot.render()


def _histogram(role: str, model: ModelResult) -> Markup:
    """How long the queries took, with the percentiles."""
    samples = np.asarray(model.samples_ms, dtype=np.float64)
    percentiles = {
        key.removesuffix("_ms"): (figure.value, full_text(figure))
        for key, figure in model.latency.items()
        if figure.value is not None
    }
    low = float(samples.min())
    high = max([float(np.quantile(samples, _DRAWN)), *(ms for ms, _ in percentiles.values())])
    if high <= low:
        high = low * 1.1 or 1.0
    counts, edges = np.histogram(samples, bins=_BINS, range=(low, high))
    shares = 100 * counts / len(samples)
    note = f"{len(samples):,} queries"
    ends = np.cumsum(model.queries_per_process)
    parts = np.split(samples, ends[:-1]) if len(ends) > 1 else []
    if parts:
        note += f" in {len(parts)} processes, the p50 of each marked below"
    if beyond := int(np.sum(samples > high)):
        slowest = number(float(samples.max()), 3)
        note += f"; {beyond:,} above {number(high, 3)} ms are not drawn (slowest {slowest} ms)"
    warmup = warmup_text(model)
    plot = Plot(
        f"Latency, {ROLES[role]}" + (f" ({warmup})" if warmup else ""),
        linear_axis([low, high], 0.03),
        linear_axis([0.0, float(shares.max())], 0.18),
        "latency of one query (ms)",
        "queries (%)",
        note,
    )
    bars = []
    for share, left, right in zip(map(float, shares), edges[:-1], edges[1:], strict=True):
        if share > 0:
            x, y = plot.x_at(float(left)), plot.y_at(share)
            tip = f"{number(float(left), 3)} to {number(float(right), 3)} ms: {share:.1f} %"
            width = max(plot.x_at(float(right)) - x - 0.6, 0.6)
            bars.append(element("rect", tip=tip, x=x, y=y, width=width, height=_FLOOR - y))
    plot.add(f"bars s-{role}", *bars)
    for index, part in enumerate(parts):
        p50 = float(np.median(part))
        x = plot.x_at(min(max(p50, low), high))
        tip = f"process {index + 1}: p50 {number(p50)} ms"
        parts_at = {"x1": x, "x2": x, "y1": _FLOOR, "y2": _FLOOR - 9}
        plot.body.append(element("line", tip=tip, class_="percentile", **parts_at))
    right_of_last, row = float("-inf"), 0
    for name, (ms, text) in percentiles.items():
        x = plot.x_at(ms)
        # Labels step down where they would overlap.
        row = row + 1 if x < right_of_last + 30 else 0
        right_of_last = x
        y = _TOP + 8 + 14 * row
        plot.body.append(
            element(
                "line", tip=f"{name}: {text}", class_="percentile", x1=x, x2=x, y1=y - 4, y2=_FLOOR
            )
        )
        at, anchor = (x - 4, "end") if x > _WIDTH - 50 else (x + 4, "start")
        plot.body.append(_text(name, "label", at, y + 4, anchor))
    return plot.render()
