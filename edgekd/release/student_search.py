"""The report's section about the search for the student: its tables, sentences and charts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from edgekd.measurement import (
    ABSENT,
    Measurement,
    display_scale,
    display_unit,
    full_text,
    number,
    value_text,
)
from edgekd.release.charts import Axis, Plot, axis_for, element, linear_axis

SEARCH, SCHEMA = "search.json", "edgekd/search/1"
"""The file in the student stage's artifact, and the schema that it states."""

STATUS = {
    "winner": "selected",
    "finalist": "trained to the last round",
    "dropped": "dropped in the race",
    "failed": "failed",
    "infeasible": "breaks a limit",
    "predicted-infeasible": "breaks a limit (predicted)",
    "not-measured": "not measured",
    "feasible": "holds all limits",
    "proposed": "may hold all limits",
}
"""What a candidate's status means."""

_LIVE = ("winner", "finalist", "dropped", "feasible", "proposed")
_COSTS = {"latency": ("latency", "ms"), "memory": ("memory", "MB"), "size": ("size", "MB")}
"""The title and the unit of an objective that is a cost."""


@dataclass(frozen=True)
class CandidateRow:
    """One candidate as texts; predicted and measured figures with their range."""

    name: str
    origin: str
    parameters: str
    predicted_latency: str
    measured_latency: str
    predicted_memory: str
    measured_memory: str
    size: str
    metric: str
    status: str
    reason: str
    selected: bool


@dataclass(frozen=True)
class SearchSection:
    """The content of the section, without markup besides that of its charts.

    Attributes:
        limits: key, limit and origin of each.
        rungs: the epochs of each round of the race, and for each trained candidate its metric
            after each of them.
    """

    why: str
    percentile: str
    metric: str
    limits: list[tuple[str, str, str]]
    margin: str
    rows: list[CandidateRow]
    rungs: tuple[list[int], list[tuple[str, list[str]]]]
    predictions: str
    assistant: str
    charts: list[Markup]


def search_section(search: Mapping[str, Any]) -> SearchSection:
    """The section of a ``search.json``.

    Args:
        search: the file's content.
    """
    percentile = latency_percentile(search["limits"])
    assistant = search.get("assistant") or {}
    return SearchSection(
        why=search.get("why") or "",
        percentile=percentile,
        metric=search["metric"],
        limits=[
            (key, number(entry["limit"]), entry["origin"])
            for key, entry in search["limits"].items()
        ],
        margin=f"{100 * search['margin']:.0f} %",
        rows=candidate_table(search),
        rungs=_rungs(search),
        predictions=predictions_text(search.get("cost_model") or {}),
        assistant=assistant.get("text", ""),
        charts=list(_charts(search, percentile)),
    )


def latency_percentile(limits: Mapping[str, Any]) -> str:
    """The percentile that is shown: that of the first limit of a latency, else the median."""
    keys = (key.partition("latency.p")[2].partition("_")[0] for key in limits)
    return next((f"p{key}" for key in keys if key), "p50")


def predictions_text(model: Mapping[str, Any]) -> str:
    """How well the costs were predicted; empty without a measurement."""
    shares = [
        f"{100 * error:.0f} % for {what}"
        for what in ("latency", "memory")
        if (error := model.get(f"{what}_error")) is not None
    ]
    if not shares:
        return ""
    return (
        f"Median error of a prediction, each candidate left out in turn of "
        f"{model['measured']}: {' and '.join(shares)}."
    )


def candidate_table(search: Mapping[str, Any]) -> list[CandidateRow]:
    """One row per candidate, the selected one first, then those that were trained longest."""
    order = [*_LIVE, *STATUS]
    percentile = latency_percentile(search["limits"])

    def rank(entry: Mapping[str, Any]) -> tuple[int, int, float]:
        rungs = entry.get("rungs") or []
        sign = 1 if search["higher_is_better"] else -1
        last = sign * rungs[-1]["values"].get("accuracy", 0.0) if rungs else 0.0
        return order.index(entry["status"]), -len(rungs), -last

    return [
        _row(entry, search["metric"], percentile)
        for entry in sorted(search["candidates"], key=rank)
    ]


def _row(entry: Mapping[str, Any], metric: str, percentile: str) -> CandidateRow:
    predicted, measured = entry.get("predicted") or {}, entry.get("measured") or {}
    rungs = entry.get("rungs") or []
    size = measured.get("size_mb", predicted.get("size_mb"))
    return CandidateRow(
        name=entry["name"],
        origin=entry["origin"].replace("_", " "),
        parameters=f"{entry['parameters']:,}" if entry.get("parameters") is not None else ABSENT,
        predicted_latency=range_text(predicted.get("latency_ms", {}).get(percentile), "ms"),
        measured_latency=range_text(measured.get("latency_ms", {}).get(percentile), "ms"),
        predicted_memory=range_text(predicted.get("memory_mb"), "MB"),
        measured_memory=range_text(measured.get("memory_mb"), "MB"),
        size=value_text(Measurement(size, "MB")),
        metric=_metric_text(rungs[-1], metric) if rungs else ABSENT,
        status=STATUS[entry["status"]],
        reason=entry.get("reason") or "",
        selected=entry["status"] == "winner",
    )


def range_text(figure: Mapping[str, float] | None, unit: str) -> str:
    """``0.31 ms (0.28 to 0.35)`` of a value with its low and high end; a dash without one."""
    if not figure:
        return ABSENT
    low, high = figure["low"], figure["high"]
    interval = (low, high) if low < high else None
    return full_text(Measurement(figure["value"], unit, interval=interval))


def _metric_text(rung: Mapping[str, Any], metric: str) -> str:
    return value_text(Measurement(rung["values"].get("accuracy"), metric))


def _rungs(search: Mapping[str, Any]) -> tuple[list[int], list[tuple[str, list[str]]]]:
    raced = [entry for entry in search["candidates"] if entry.get("rungs")]
    epochs = sorted({rung["epochs"] for entry in raced for rung in entry["rungs"]})
    rows = []
    for entry in sorted(raced, key=lambda entry: -len(entry["rungs"])):
        found = {rung["epochs"]: _metric_text(rung, search["metric"]) for rung in entry["rungs"]}
        rows.append((entry["name"], [found.get(count, ABSENT) for count in epochs]))
    return epochs, rows


def _charts(search: Mapping[str, Any], percentile: str) -> Iterator[Markup]:
    costs = [name for name in search["objectives"] if name in _COSTS] or ["latency"]
    for cost in costs:
        if chart := _front(search, cost, percentile):
            yield chart
    for cost in ("latency", "memory"):
        if chart := _predicted(search, cost, percentile):
            yield chart


def _cost(figures: Mapping[str, Any] | None, cost: str, percentile: str) -> Mapping[str, float]:
    """Value, low and high end of one cost; empty where it is unknown."""
    if not figures:
        return {}
    title, unit = _COSTS[cost]
    found = figures.get(f"{title}_{unit.lower()}")
    if cost == "latency":
        found = (found or {}).get(percentile)
    if isinstance(found, Mapping):
        return found
    return {} if found is None else dict.fromkeys(("value", "low", "high"), float(found))


def _front(search: Mapping[str, Any], cost: str, percentile: str) -> Markup | None:
    """The metric over a cost of every trained candidate, with the Pareto front as a line."""
    scale = display_scale(search["metric"])
    points = [
        (figure["value"], entry["rungs"][-1]["values"]["accuracy"] * scale, entry)
        for entry in search["candidates"]
        if entry.get("rungs") and (figure := _cost(entry.get("measured"), cost, percentile))
    ]
    if len(points) < 2:
        return None
    title, unit = _COSTS[cost]
    label = f"{title} {percentile}" if cost == "latency" else title
    shown = display_unit(search["metric"])
    plot = Plot(
        f"Candidates: {search['metric']} against {title}",
        axis_for(x for x, _, _ in points),
        linear_axis((y for _, y, _ in points), 0.12),
        f"{label} ({unit}), measured",
        f"validation {search['metric']}" + (f" ({shown})" if shown != search["metric"] else ""),
        "After each candidate's last round; those that were dropped had fewer epochs.",
    )
    front = sorted((x, y) for x, y, entry in points if entry.get("front"))
    if len(front) > 1:
        path = " ".join(f"{plot.x_at(x):.1f},{plot.y_at(y):.1f}" for x, y in front)
        plot.add("line t-0", element("polyline", points=path, stroke_dasharray="7 4"))
    keys = {}
    for x, y, entry in points:
        class_, key, radius = _look(entry)
        keys[key] = class_
        epochs = entry["rungs"][-1]["epochs"]
        tip = f"{entry['name']}: {_metric_text(entry['rungs'][-1], search['metric'])} after "
        tip += f"{epochs} epoch(s), {number(x)} {unit}"
        plot.add(class_, element("circle", tip=tip, cx=plot.x_at(x), cy=plot.y_at(y), r=radius))
    for key, class_ in keys.items():
        plot.add_key(class_, key, element("circle", cx=14, cy=7, r=5))
    return plot.render()


def _look(entry: Mapping[str, Any]) -> tuple[str, str, int]:
    """The CSS class, the legend's text and the radius of a candidate's point."""
    if entry["status"] == "winner":
        return "point s-student", "selected", 7
    if entry.get("front"):
        return "point t-0", "on the Pareto front", 5
    return "point neutral", "others", 4


def _predicted(search: Mapping[str, Any], cost: str, percentile: str) -> Markup | None:
    """Predicted over measured, on equal axes with the diagonal; bars are the predicted ranges."""
    points = []
    for entry in search["candidates"]:
        measured = _cost(entry.get("measured"), cost, percentile)
        predicted = _cost(entry.get("predicted"), cost, percentile)
        if measured and predicted:
            points.append((measured["value"], predicted, entry["name"]))
    if not points:
        return None
    title, unit = _COSTS[cost]
    ends = [value for x, p, _ in points for value in (x, p["low"], p["value"], p["high"])]
    axis: Axis = axis_for(value for value in ends if value > 0)
    plot = Plot(
        f"Predicted against measured {title}",
        axis,
        axis,
        f"measured ({unit})",
        f"predicted ({unit})",
        "Before the candidate itself was measured; on the line the prediction is exact.",
    )
    diagonal: Sequence[float] = (axis.low, axis.high)
    path = " ".join(f"{plot.x_at(value):.1f},{plot.y_at(value):.1f}" for value in diagonal)
    plot.add("line neutral", element("polyline", points=path, stroke_dasharray="2 4"))
    for x, figure, name in points:
        across = plot.x_at(x)
        tip = f"{name}: measured {number(x)} {unit}, predicted {range_text(figure, unit)}"
        low, high = plot.y_at(figure["low"]), plot.y_at(figure["high"])
        plot.add(
            "point t-0",
            element("line", x1=across, x2=across, y1=low, y2=high),
            element("circle", tip=tip, cx=across, cy=plot.y_at(figure["value"]), r=4),
        )
    return plot.render()
