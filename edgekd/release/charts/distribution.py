"""The distribution of a model's latency: a histogram with its percentiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from edgekd.figure import Figure
from edgekd.release.charts.axis import linear_axis
from edgekd.release.charts.plot import BOTTOM, HEIGHT, TOP, WIDTH, Plot, element, joined
from edgekd.release.figure_text import full_text, number

_BINS = 48
_SHOWN = 0.995
"""Share of the queries that the axis covers; a stray one of a second would flatten the rest."""


def latency_histogram(
    title: str, series: str, samples_ms: Sequence[float], percentiles: Mapping[str, Figure]
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


def _percentile_marks(plot: Plot, percentiles: Mapping[str, Figure], floor: float) -> list[Markup]:
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
