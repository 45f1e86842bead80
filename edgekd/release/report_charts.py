"""The charts of the report, from the result and the training histories."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from markupsafe import Markup

from edgekd.measurement import Measurement, display_scale, display_unit
from edgekd.release.charts import Line, Point, curves, latency_histogram, scatter
from edgekd.release.report_tables import ROLES, warmup_text
from edgekd.release.result import Result

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
