"""The frame of a plot: axes, ticks, legend, SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)

_LOG_RATIO = 6.0
"""From this ratio of largest to smallest on, a linear axis would crowd the small ones."""


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
            low, high = math.log(low), math.log(high)
            value = math.log(max(value, self.low))
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
    padded = low - margin if low < 0 or low - margin > 0 else 0.0
    low, high = padded, high + margin
    step = _nice_step((high - low) / count)
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
    inside = [mark for mark in marks if low <= mark <= high]
    return Axis(low, high, True, tuple((mark, _plain(mark)) for mark in inside))


def axis_for(values: Iterable[float]) -> Axis:
    """Logarithmic where the values are positive and spread widely, else linear."""
    known = list(values)
    spread = min(known) > 0 and max(known) / min(known) >= _LOG_RATIO
    return log_axis(known, 1.3) if spread else linear_axis(known, 0.12)


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(nice for nice in _NICE if nice * power >= rough * (1 - 1e-9)) * power


def _plain(value: float) -> str:
    """A tick of a logarithmic axis without an exponent."""
    places = max(0, -math.floor(math.log10(value) + 1e-9))
    return f"{value:,.{places}f}"


WIDTH, HEIGHT = 440, 270

LEFT, RIGHT, TOP, BOTTOM = 58, 12, 26, 44

DASHES = ("", "7 4", "2 4", "10 4 2 4", "1 3")
"""Lines differ in dash as well as in colour, for those who do not see the colours."""


def element(tag: str, text: str | Markup = "", **attributes: str | float | None) -> Markup:
    """An SVG element with everything escaped; ``_`` in attribute names becomes ``-``.

    Args:
        tag: the element's name.
        text: its content; a plain string is escaped.
        attributes: ``class_`` for ``class``; None leaves an attribute out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{written}>{escape(text)}</{tag}>")


def joined(parts: Sequence[Markup]) -> Markup:
    """Elements one after the other."""
    return Markup("").join(parts)


@dataclass(frozen=True)
class Key:
    """An entry of a legend: the series' class, its name, and its mark (a shape or a dash)."""

    series: str
    label: str
    mark: Markup


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
    keys: list[Key] = field(default_factory=list)

    def x_at(self, value: float) -> float:
        """The horizontal place of a value."""
        return LEFT + self.x.position(value) * (WIDTH - LEFT - RIGHT)

    def y_at(self, value: float) -> float:
        """The vertical place of a value."""
        return HEIGHT - BOTTOM - self.y.position(value) * (HEIGHT - TOP - BOTTOM)

    def add(self, *parts: Markup) -> None:
        """Draw elements over what is there."""
        self.body.extend(parts)

    def render(self) -> Markup:
        """The chart as a ``<figure>`` with its title, SVG, legend and note."""
        svg = element(
            "svg",
            joined([*self._frame(), *self.body]),
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=f"{self.title}: {self.y_title} over {self.x_title}",
        )
        legend = joined([_key(key) for key in self.keys])
        parts = [element("figcaption", self.title), svg]
        parts += [element("div", legend, class_="legend")] if self.keys else []
        parts += [element("p", self.note, class_="note")] if self.note else []
        return element("figure", joined(parts), class_="chart")

    def _frame(self) -> list[Markup]:
        right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for value, label in self.y.ticks:
            y = self.y_at(value)
            parts.append(element("line", class_="grid", x1=LEFT, x2=right, y1=y, y2=y))
            parts.append(
                element("text", label, class_="tick", x=LEFT - 6, y=y + 4, text_anchor="end")
            )
        for value, label in self.x.ticks:
            x = self.x_at(value)
            parts.append(element("line", class_="grid", x1=x, x2=x, y1=TOP, y2=floor))
            parts.append(
                element("text", label, class_="tick", x=x, y=floor + 16, text_anchor="middle")
            )
        parts.append(element("line", class_="axis", x1=LEFT, x2=right, y1=floor, y2=floor))
        middle = (LEFT + right) / 2
        parts.append(
            element(
                "text", self.x_title, class_="name", x=middle, y=HEIGHT - 8, text_anchor="middle"
            )
        )
        parts.append(element("text", self.y_title, class_="name", x=4, y=14))
        return parts


def shape(kind: str, x: float, y: float, size: float = 6, title: str = "") -> Markup:
    """A marker: ``square``, ``triangle`` or a circle, with a tooltip."""
    tip = element("title", title) if title else Markup("")
    if kind == "square":
        box = 2 * size - 2
        return element("rect", tip, x=x - box / 2, y=y - box / 2, width=box, height=box)
    if kind == "triangle":
        points = (
            f"{x:.1f},{y - size:.1f} {x + size:.1f},{y + size:.1f} {x - size:.1f},{y + size:.1f}"
        )
        return element("polygon", tip, points=points)
    return element("circle", tip, cx=x, cy=y, r=size)


def _key(key: Key) -> Markup:
    mark = element("svg", key.mark, viewBox="0 0 28 14", class_=key.series, aria_hidden="true")
    return element("span", mark + escape(key.label), class_="key")


def _number(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
