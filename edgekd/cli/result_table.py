"""The result of a run as a table on the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from edgekd.pipeline.runner import RunOutcome
from edgekd.release.figure_text import full_text, value_text
from edgekd.release.gate import read_gate
from edgekd.release.report_tables import (
    constant_caution,
    distillation_effect,
    headline,
    thread_caution,
)
from edgekd.release.result import ModelResult, Result, read_result
from edgekd.release.verdict import passed

_ROLES = {"teacher": "teacher", "baseline": "student alone", "student": "student distilled"}
_COMPARISONS = (
    *("gap_closed", "drop", "relative_drop", "gain_over_constant", "speedup", "size_ratio"),
)
NEXT = (
    "next: 'edgekd init mine.yaml' writes a pipeline to edit for your own data (data) and teacher "
    "(teacher); the bundle's README.md says how to run it on the device"
)
_STATUS = {"pass": "green", "fail": "red", "not shown": "yellow"}


def print_result(console: Console, outcome: RunOutcome) -> None:
    """Print the models side by side, and the gate's verdicts when it was reached."""
    file = outcome.folder("benchmark") / "result.json"
    result = Result.from_json(read_result(file), str(file))
    console.print(_models(result))
    for name, figure in result.comparison.items():
        if name in _COMPARISONS and figure.value is not None:
            console.print(f"  {name.replace('_', ' ')}: {full_text(figure)}", highlight=False)
    gap = result.comparison.get("gap_closed")
    if gap is not None and gap.value is None:
        console.print(f"  gap closed: not defined: {gap.note}", highlight=False, soft_wrap=True)
    for line in constant_caution(result) + thread_caution(result):
        console.print(f"  [bold red]{line}[/]", highlight=False, soft_wrap=True)
    if "gate" not in outcome.artifacts:
        return
    verdicts = read_gate(outcome.folder("gate"))
    for verdict in verdicts:
        color = _STATUS[verdict.status]
        console.print(f"  [{color}]{verdict.status:9}[/] {verdict.rule}: ", end="", highlight=False)
        console.print(verdict.reason, markup=False, highlight=False, soft_wrap=True)
    verdict_text = "[bold green]passed" if passed(verdicts) else "[bold red]not passed"
    console.print(f"gate: {verdict_text}[/]", highlight=False)


def print_headline(console: Console, outcome: RunOutcome) -> None:
    """Print what was gained in one sentence, and after a gate that passed what to do next."""
    file = outcome.folder("benchmark") / "result.json"
    result = Result.from_json(read_result(file), str(file))
    harmed = distillation_effect(result).startswith("distillation harmed")
    style = "bold red" if harmed else "bold"
    console.print(headline(result), style=style, markup=False, highlight=False, soft_wrap=True)
    if "bundle" in outcome.artifacts and outcome.failure is None:
        console.print(NEXT, markup=False, highlight=False, soft_wrap=True)


def _models(result: Result) -> Table:
    """One column per model: three models fit on a terminal, six figures beside them do not."""
    shown = [
        (title, result.models[role]) for role, title in _ROLES.items() if role in result.models
    ]
    table = Table(title=f"{result.name} on {result.profile} ({result.evidence})")
    table.add_column("")
    for title, _ in shown:
        table.add_column(title, justify="right")
    rows: dict[str, Callable[[ModelResult], str]] = {
        result.metric: lambda model: full_text(model.metric),
        "parameters": lambda model: value_text(model.parameters),
        "size": lambda model: value_text(model.size_mb),
        "p50": lambda model: full_text(model.latency.get("p50_ms")),
        "p95": lambda model: full_text(model.latency.get("p95_ms")),
        "peak memory": lambda model: value_text(model.peak_memory_mb),
    }
    for name, text in rows.items():
        table.add_row(name, *(text(model) for _, model in shown))
    return table
