"""The report's tables and sentences: the content of page and summary, without markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from edgekd.measurement import (
    ABSENT,
    Measurement,
    display_unit,
    full_text,
    interval_text,
    metric_change,
    number,
    value_text,
)
from edgekd.release.gate import Verdict, passed
from edgekd.release.result import LATENCIES, ModelResult, Result

ROLES = {"teacher": "teacher", "baseline": "student alone", "student": "student distilled"}


@dataclass(frozen=True)
class Cell:
    """A figure in a table: its value, and below it the interval or why there is no value."""

    value: str
    detail: str = ""
    n: str = ""
    evidence: str = ""


@dataclass(frozen=True)
class TableRow:
    """A labelled row of cells."""

    label: str
    cells: tuple[Cell, ...]
    note: str = ""


@dataclass(frozen=True)
class KeyFigure:
    """One of the few figures at the top of the page."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class DistillationEffect:
    """The effect of distillation against the same student trained alone.

    ``outcome`` is ``inconclusive`` where the interval of the difference contains 0.
    """

    outcome: Literal["gained", "harmed", "inconclusive"]
    text: str


def cell(figure: Measurement | None, with_n: bool = False) -> Cell:
    """The cell of a figure."""
    if figure is None:
        return Cell(ABSENT)
    detail = interval_text(figure) if figure.value is not None else figure.note
    n = f"{figure.n:,}" if with_n else ""
    return Cell(value_text(figure), detail, n, figure.evidence)


def headline(result: Result) -> str:
    """One sentence: the student's gains and losses against the teacher and against itself
    without the teacher; a second one where distillation is not shown to have gained anything."""
    against, student = result.comparison, result.student
    speedup, size, drop = against.get("speedup"), against.get("size_ratio"), against.get("drop")
    parts = [text for text in (_times_faster(speedup), _times_smaller(size)) if text]
    text = f"The student reaches {value_text(student.metric)} {result.metric}"
    effect, gain = distillation_effect(result), against.get("baseline_gain")
    gained = effect is not None and effect.outcome == "gained"
    if gained:
        text += f", {full_text(gain)} better than the same student without the teacher"
    if drop and drop.value is not None:
        worse = "below" if drop.value >= 0 else "above"
        if not result.higher_is_better:
            worse = "worse than" if drop.value >= 0 else "better than"
        size_of = Measurement(abs(drop.value), drop.unit)
        text += f", {value_text(size_of)} {worse} the teacher"
    if parts:
        text += f", and is {' and '.join(parts)}"
    if effect is None or gained:
        return f"{text}."
    return f"{text}. {_capitalized(effect.text)}."


def distillation_effect(result: Result) -> DistillationEffect | None:
    """The gain of distillation over the same student alone; None without a baseline.

    Its text is ``distillation harmed by 34.40 points (30.54 to 38.17)`` or ``gained``; and where
    the interval of the difference contains 0, that neither is shown.
    """
    gain = result.comparison.get("baseline_gain")
    if gain is None or gain.value is None:
        return None
    low, high = gain.interval or (-math.inf, math.inf)
    if low <= 0 <= high:
        interval = interval_text(gain)
        change = value_text(gain, signed=True) + (f" ({interval})" if interval else "")
        text = f"what distillation changed is not shown: {change} against the student alone"
        return DistillationEffect("inconclusive", text)
    if gain.value >= 0:
        text = f"distillation gained {full_text(gain)} against the student alone"
        return DistillationEffect("gained", text)
    loss = replace(gain, value=-gain.value, interval=(-high, -low))
    text = f"distillation harmed by {full_text(loss)} against the student alone"
    return DistillationEffect("harmed", text)


def key_figures(result: Result) -> list[KeyFigure]:
    """The figures at the top: metric, latency, size, memory, and the gap closed."""
    student, against = result.student, result.comparison
    latency = student.latency.get("p95_ms")
    if latency is None or latency.value is None:
        name, latency = "p50", student.latency.get("p50_ms")
    else:
        name = "p95"
    found = [
        KeyFigure(result.metric, value_text(student.metric), _versus(result, "drop")),
        KeyFigure(f"latency {name}", value_text(latency), _versus(result, "speedup")),
        KeyFigure("size", value_text(student.size_mb), _versus(result, "size_ratio")),
        KeyFigure("peak memory", value_text(student.peak_memory_mb), "above an empty process"),
        _gap_key(against.get("gap_closed")),
    ]
    return [figure for figure in found if figure.value != ABSENT]


def comparison_remarks(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the comparison of both students on validation data.

    Args:
        comparison: the content of ``comparison.json``, or empty.
    """
    if not comparison:
        return []
    shown = comparison["outcome"] == "better"
    found = [] if shown else [f"On validation data {comparison['sentence']}."]
    if comparison["kept"] == "baseline":
        found.append(f"{_capitalized(comparison['kept_why'])}: no teacher trained it.")
    return found


def recipe_rows(recipes: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the race of ``distill.losses: auto``, the best recipe first.

    Args:
        recipes: the content of ``recipes.json``, or empty.
    """
    found = recipes.get("recipes", ())
    epochs = sorted({score["epochs"] for row in found for score in row["rungs"]})
    headings = [f"{count} epoch{'s' if count > 1 else ''}" for count in epochs]
    unit = recipes.get("metric", "")
    rows = []
    for row in found:
        scores = {score["epochs"]: score["score"] for score in row["rungs"]}
        cells = [value_text(Measurement(scores.get(count), unit)) for count in epochs]
        won = "chosen" if row["name"] == recipes["winner"] else ""
        rows.append([row["name"], *cells, row["failed"] or won])
    return headings, rows


def result_table(result: Result, alone: bool = False) -> tuple[list[str], list[TableRow]]:
    """Column headings and rows of the table teacher / student alone / student distilled.

    ``alone``: the shipped student is the one that was trained without the teacher.
    """
    roles = [role for role in ROLES if role in result.models]
    models = [result.models[role] for role in roles]
    metric_n = result.student.metric.n
    rows = [
        _row(f"{result.metric}", [m.metric for m in models], f"n = {metric_n:,} test samples"),
        _row("parameters", [m.parameters for m in models]),
        _row("size", [m.size_mb for m in models], "the file, 1 MB = 10⁶ bytes"),
    ]
    for key in LATENCIES:
        figures = [model.latency.get(key) for model in models]
        if any(figures):
            counts = {f.n for f in figures if f}
            note = f"n = {', '.join(f'{n:,}' for n in sorted(counts))} queries"
            if processes := len(result.student.queries_per_process):
                note += f" in {processes} processes"
            rows.append(_row(f"latency {key.removesuffix('_ms')}", figures, note))
    for label, key in (("opening", "load_ms"), ("first query", "first_ms")):
        if any(cold := [getattr(model, key) for model in models]):
            rows.append(_row(label, cold, "median and range of the processes"))
    memory = [model.peak_memory_mb for model in models]
    if any(memory):
        rows.append(_row("peak memory", memory, "above an empty process"))
    names = ROLES | ({"student": "student shipped (alone)"} if alone else {})
    return [names[role] for role in roles], rows


def comparison_rows(result: Result) -> list[TableRow]:
    """The paired comparisons, one figure each."""
    drop_of = "teacher minus student" if result.higher_is_better else "student minus teacher"
    labels = {
        "drop": ("drop to the teacher", f"{drop_of}, paired over the test samples"),
        "relative_drop": ("the same drop", "as a share of the error of the best constant"),
        "gain_over_constant": (
            "gain over a constant",
            "over the best constant prediction of all samples but the test split",
        ),
        "baseline_gain": ("gain over the student alone", "paired over the test samples"),
        "gap_closed": ("gap closed", "(distilled − alone) / (teacher − alone), bootstrap"),
        "speedup": ("speed-up", "teacher p50 / student p50, timed in alternation"),
        "size_ratio": ("times smaller", "teacher's file / student's file"),
        "parameter_ratio": ("parameters", "student's / teacher's"),
    }
    return [
        TableRow(label, (cell(result.comparison[key], with_n=True),), note)
        for key, (label, note) in labels.items()
        if key in result.comparison
    ]


def gate_rows(verdicts: Sequence[Verdict]) -> list[dict[str, str]]:
    """One row per rule, as text."""
    return [
        {
            "rule": verdict.rule,
            "status": verdict.status,
            "figure": full_text(verdict.figure),
            "budget": verdict.budget_text,
            "origin": "" if verdict.origin == "gate" else verdict.origin,
            "evidence": verdict.figure.evidence,
            "reason": verdict.reason if verdict.status == "inconclusive" else "",
        }
        for verdict in verdicts
    ]


def cautions(result: Result) -> list[str]:
    """Caveats that a reader must know before relying on the figures."""
    found = []
    if result.evidence != "measured-on-target":
        found.append(
            f"The figures are {result.evidence}: profile {result.profile}, measured on target "
            f"{result.target}. They are not the device's."
        )
    for role, model in result.models.items():
        if model.warmup.get("steady") is False:
            queries = model.warmup.get("queries", "?")
            found.append(
                f"The {ROLES[role]} never became steady within {queries} warm-up queries: its "
                "latency may change from run to run."
            )
    if result.steadiness is not None and not result.steadiness.steady:
        reasons = "; ".join(result.steadiness.reasons) or "no reason is recorded"
        found.append(f"The latencies are not steady: {reasons}.")
    found += constant_caution(result) + thread_caution(result)
    effect, gap = distillation_effect(result), result.comparison.get("gap_closed")
    if effect is not None and effect.outcome == "harmed":
        found.append(f"{_capitalized(effect.text)}: ship the student trained alone instead.")
    if gap is not None and gap.value is None and gap.note:
        found.append(f"Gap closed: {gap.note}.")
    throttling = _throttled(result.environment)
    if throttling:
        found.append(f"The device throttled while it was measured ({throttling}).")
    return found


def thread_caution(result: Result) -> list[str]:
    """One sentence where a model was timed with more threads than there are cores."""
    threads = result.student.runtime.get("threads")
    cores = result.environment.get("cpus_usable")
    remark = thread_remark(threads, cores)
    return [remark] if remark else []


def thread_remark(threads: Any, cores: Any) -> str:
    """A warning about more threads than cores; empty otherwise."""
    if not isinstance(threads, int) or not isinstance(cores, int) or threads <= cores:
        return ""
    return (
        f"Timed with {threads} threads on {cores} usable core{'s' if cores != 1 else ''}: threads "
        "wait for each other, and no percentile is steady. Measure on the device, or set "
        f"engines: [{{kind: onnxruntime, threads: {cores}}}]."
    )


def constant_caution(result: Result) -> list[str]:
    """One sentence where the student is not shown to be better than a constant; else nothing."""
    gain = result.comparison.get("gain_over_constant")
    if gain is None or gain.value is None or result.constant is None:
        return []
    if (gain.interval or (gain.value, gain.value))[0] > 0:
        return []
    how = "is not better" if gain.value <= 0 else "is not shown to be better"
    return [
        f"The student {how} than a constant: the {result.metric} of always giving one and the "
        f"same prediction is {value_text(result.constant)}, the student's is "
        f"{value_text(result.student.metric)}."
    ]


def parity_rows(reports: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per exported file, output and batch size."""
    return [
        {
            "model": ROLES.get(role, role),
            "output": str(row["output"]),
            "batch": str(row["batch_size"]),
            "samples": f"{row['samples']:,}",
            "absolute": _difference(row["max_absolute"]),
            "relative": _difference(row["max_relative"]),
            "agreement": ABSENT
            if row["argmax_agreement"] is None
            else f"{100 * row['argmax_agreement']:.2f} %",
        }
        for role, report in reports.items()
        for row in report["rows"]
    ]


def flat_rows(content: Any, key: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted key, text) rows; unreadable values are marked."""
    if isinstance(content, Mapping):
        return [
            row
            for name, value in content.items()
            for row in flat_rows(value, f"{key}.{name}".lstrip("."))
        ]
    if content is None:
        return [(key, "not available")]
    if isinstance(content, bool):
        return [(key, "yes" if content else "no")]
    if isinstance(content, int | float):
        return [(key, number(float(content), 6))]
    if isinstance(content, list | tuple):
        if all(isinstance(item, int | float) for item in content):
            return [(key, ", ".join(number(float(item), 5) for item in content) or "none")]
        if any(isinstance(item, Mapping | list) for item in content):
            return [r for i, item in enumerate(content) for r in flat_rows(item, f"{key}.{i}")]
        return [(key, ", ".join(map(str, content)) or "none")]
    return [(key, str(content))]


def run_rows(result: Result) -> list[dict[str, str]]:
    """One row per timed model: file, providers really used, threads and warm-up, as text."""
    rows = []
    for role, model in result.models.items():
        if not model.runtime and not model.warmup:
            continue
        providers = model.runtime.get("providers") or {}
        nodes = providers.get("nodes") or {}
        rows.append(
            {
                "model": ROLES[role],
                "file": model.file,
                "session": ", ".join(providers.get("session") or ()) or ABSENT,
                "nodes": ", ".join(f"{name}: {n}" for name, n in nodes.items()) or ABSENT,
                "threads": str(model.runtime.get("threads") or "the runtime's choice"),
                "warmup": warmup_text(model) or ABSENT,
            }
        )
    return rows


def verdict_word(verdicts: Sequence[Verdict]) -> str:
    """``PASS``, ``FAIL``, or that nothing was gated."""
    if not verdicts:
        return "NOT GATED"
    return "PASS" if passed(verdicts) else "FAIL"


def warmup_text(model: ModelResult) -> str:
    """``steady after 300 queries`` for a model's warm-up, empty when it is not known."""
    if "steady" not in model.warmup:
        return ""
    state = "steady after" if model.warmup["steady"] else "NOT steady after"
    return f"{state} {model.warmup.get('queries', '?')} warm-up queries"


def _row(label: str, figures: Sequence[Measurement | None], note: str = "") -> TableRow:
    return TableRow(label, tuple(cell(figure) for figure in figures), note)


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _versus(result: Result, key: str) -> str:
    figure = result.comparison.get(key)
    if figure is None or figure.value is None:
        return ""
    if key == "drop":
        change = Measurement(metric_change(figure.value, result.higher_is_better), figure.unit)
        return f"{value_text(change, signed=True)} to the teacher"
    text = _times_faster(figure) if key == "speedup" else _times_smaller(figure)
    return f"{text} than the teacher" if text else ""


def _times_faster(speedup: Measurement | None) -> str:
    """``9.6× faster`` or ``1.3× slower``."""
    return _times(speedup, "faster", "slower")


def _times_smaller(ratio: Measurement | None) -> str:
    return _times(ratio, "smaller", "larger")


def _times(ratio: Measurement | None, above: str, below: str) -> str:
    if ratio is None or not ratio.value or ratio.value <= 0:
        return ""
    if ratio.value >= 1:
        return f"{number(ratio.value, 3)}× {above}"
    return f"{number(1 / ratio.value, 3)}× {below}"


def _gap_key(gap: Measurement | None) -> KeyFigure:
    if gap is None or gap.value is None:
        return KeyFigure("gap closed", ABSENT, "")
    interval = interval_text(gap)
    detail = f"{interval} {display_unit(gap.unit)}" if interval else ""
    return KeyFigure("gap closed", value_text(gap, unit="%"), detail)


def _difference(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def _throttled(environment: Mapping[str, Any]) -> str:
    """The throttling that the environment reports."""
    return ", ".join(
        key
        for key, text in flat_rows(environment)
        if "throttl" in key and text not in ("not available", "no", "0", "none", "")
    )
