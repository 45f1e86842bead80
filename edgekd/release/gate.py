"""The gate: a result against its budgets, as JSON and JUnit XML.

A rule passes only when the complete interval of its figure meets the budget. When
the interval contains the budget, or the figure rests on weaker evidence than required, or was not
measured, the rule is *inconclusive*, and an inconclusive rule does not pass. So is a rule on
latency where the measurement was not steady, unless the figure is far from the budget.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from xml.etree import ElementTree

from pydantic import BaseModel, BeforeValidator, Field

from edgekd.config.budgets import Budgets
from edgekd.errors import printable
from edgekd.measurement import (
    EVIDENCE_STRENGTH,
    OF_CONSTANT,
    Evidence,
    Measurement,
    bound_text,
    full_text,
    value_text,
)
from edgekd.release.result import LATENCIES, SHARES, Result, read_json_input, validate
from edgekd.release.statistics import samples_to_show

VerdictStatus = Literal["pass", "fail", "inconclusive"]

Side = Literal["at most", "at least", "more than"]


def _current_status(status: Any) -> Any:
    """A verdict as it is named since ``edgekd.gate/2``."""
    return "inconclusive" if status == "not shown" else status


@dataclass(frozen=True)
class Verdict:
    """The gate's verdict on one rule."""

    rule: str
    """The budget's key, such as ``latency.p95_ms``."""
    status: Annotated[VerdictStatus, BeforeValidator(_current_status)]
    figure: Measurement
    budget: float
    reason: str
    side: Side = "at most"
    """On which side of the budget the figure has to be."""
    origin: str = "gate"
    """Who set the budget: ``gate`` (the pipeline or budget file) or ``profile NAME``."""

    @property
    def budget_text(self) -> str:
        """The budget with its side and unit: ``at most 2 ms``."""
        return f"{self.side} {bound_text(self.budget, self.figure.unit)}"

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return asdict(self)


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Whether there are verdicts and each of them is a pass."""
    return bool(verdicts) and all(verdict.status == "pass" for verdict in verdicts)


def summary_line(verdicts: Sequence[Verdict]) -> str:
    """``PASSED: 5 of 5 rules`` or ``FAILED: 2 of 5 rules fail, 1 is inconclusive``."""
    failed = sum(verdict.status == "fail" for verdict in verdicts)
    open_ = sum(verdict.status == "inconclusive" for verdict in verdicts)
    if passed(verdicts):
        return f"PASSED: all {len(verdicts)} rules" if len(verdicts) > 1 else "PASSED: its one rule"
    parts = [f"{failed} fail" + ("s" if failed == 1 else "")] if failed else []
    parts += [f"{open_} {'is' if open_ == 1 else 'are'} inconclusive"] if open_ else []
    return f"FAILED: of {len(verdicts)} rules, {' and '.join(parts)}"


@dataclass(frozen=True)
class Rule:
    """One budget and the figure it bounds."""

    key: str
    """The budget's key, such as ``latency.p95_ms``."""
    budget: float
    side: Side
    figure: Measurement | None
    """None when the result has no such figure."""
    performance: bool
    """Whether the figure depends on where it was measured, so that its evidence counts."""
    origin: str = "gate"
    remark: str = ""
    """Added to the reason where the rule is not passed."""
    unsteady: str = ""
    """Why the figure may not be expected again, of a latency that is not steady."""


def rules_of(result: Result, budgets: Budgets) -> list[Rule]:
    """The rules that the budgets make, in the order of the section's keys."""
    student, against = result.student, result.comparison
    figures = {
        "accuracy.min": student.metric,
        "accuracy.max": student.metric,
        "accuracy.max_drop": _drop(result),
        "accuracy.min_gain": against.get("baseline_gain"),
        "size.max_mb": student.size_mb,
        "size.min_ratio": against.get("size_ratio"),
        "parameters.max": student.parameters,
        "parameters.max_ratio": against.get("parameter_ratio"),
        **{f"latency.{name}": student.latency.get(name) for name in LATENCIES},
        "latency.min_speedup": against.get("speedup"),
        "memory.peak_mb": student.peak_memory_mb,
    }
    rules = [
        Rule(
            key,
            budget,
            "at least" if key.partition(".")[2].startswith("min") else "at most",
            figures[key],
            performance=not key.startswith(("size.", "parameters.")),
            origin=budgets.origin(key),
            unsteady=_unsteady(result) if key.startswith("latency.") else "",
        )
        for key, budget in budgets.given.items()
    ]
    last = sum(rule.key.startswith("accuracy.") for rule in rules)
    return [*rules[:last], *_beat_constant(result, budgets.beat_constant), *rules[last:]]


def _unsteady(result: Result) -> str:
    state = result.steadiness
    if state is None or state.steady:
        return ""
    return "; ".join(state.reasons) or "no reason is recorded"


def _drop(result: Result) -> Measurement | None:
    """The drop to the teacher: of an accuracy a difference, of an error a share."""
    if result.higher_is_better or "drop" not in result.comparison:
        return result.comparison.get("drop")
    note = "the result has no error of a constant prediction: run the benchmark stage again"
    return result.comparison.get("relative_drop") or Measurement(None, OF_CONSTANT, 0, note=note)


def _beat_constant(result: Result, required: bool | None) -> Iterator[Rule]:
    """The rule that the student is better than a constant, where it is configured or the default.

    An accuracy near that of the most frequent class may be all that rare classes allow; an error
    that a constant also reaches means that the network has learned nothing.
    """
    gain = result.comparison.get("gain_over_constant")
    implied = required is None
    if required is False or (implied and (result.metric in SHARES or gain is None)):
        return
    constant = value_text(result.constant) if result.constant is not None else "an unknown figure"
    yield Rule(
        "accuracy.beat_constant",
        0.0,
        "more than",
        gain,
        performance=False,
        origin=f"task {result.task}" if implied else "gate",
        remark=f"the student's {result.metric} is {value_text(result.student.metric)}, and that of "
        f"the best constant prediction is {constant}: train it longer, check that it can "
        "learn targets of this range, or set gate.accuracy.beat_constant: false",
    )


_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(path: Path, name: str, verdicts: Sequence[Verdict]) -> None:
    """Write one test case per rule; *fail* and *inconclusive* are failures, distinguished by type.

    Args:
        path: the XML file.
        name: of the result, the suite's name.
        verdicts: of :func:`edgekd.release.gate.evaluate`.
    """
    failures = sum(verdict.status != "pass" for verdict in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "errors": "0"}
    root = ElementTree.Element("testsuites", {"name": "edgekd gate", **counts})
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": _text(name), "skipped": "0", **counts}
    )
    for verdict in verdicts:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"edgekd.gate.{_text(name)}",
            name=_text(verdict.rule),
            time="0",
        )
        message = f"{verdict.rule} ({verdict.budget_text}, {verdict.origin}): {verdict.reason}"
        if verdict.status == "pass":
            ElementTree.SubElement(case, "system-out").text = _text(message)
        else:
            ElementTree.SubElement(
                case, "failure", type=verdict.status, message=_text(message)
            ).text = _text(message)
    tree = ElementTree.ElementTree(root)
    ElementTree.indent(tree)
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _text(text: str) -> str:
    """As printable characters: those that XML 1.0 does not allow, not even escaped, and those that
    control a terminal appear as escapes such as ``\\x1b``.
    """
    return _NOT_XML.sub(lambda found: ascii(found[0])[1:-1], printable(text))


SCHEMA = "edgekd.gate/2"
WIDE_MARGIN = 1.5
"""An unsteady latency decides a rule only where its interval, wider by this factor on both sides,
does: runs of one file on a busy machine differ by up to half."""


def evaluate(result: Result, budgets: Budgets) -> list[Verdict]:
    """Check a result against budgets.

    ``budgets.evidence`` is required of latency, memory and speed-up, and of accuracy too:
    reduced precision and other providers may give other predictions on the device. The size and
    the parameters of a file are the same on every machine.

    Returns:
        One verdict per rule, in the order of the section's keys.

    Raises:
        InputError: there is no rule, or one contradicts the direction of the metric.
    """
    budgets.check_metric(result.metric, result.higher_is_better)
    budgets.require_any(result.higher_is_better)
    return [_verdict(rule, budgets.evidence) for rule in rules_of(result, budgets)]


def write_gate(folder: Path, name: str, verdicts: Sequence[Verdict]) -> None:
    """Write ``gate.json`` and ``gate.xml`` (JUnit) into a folder."""
    write_gate_json(folder / "gate.json", name, verdicts)
    write_junit(folder / "gate.xml", name, verdicts)


def write_gate_json(path: Path, name: str, verdicts: Sequence[Verdict]) -> None:
    """Write the verdicts as JSON."""
    content = {
        "schema": SCHEMA,
        "name": name,
        "passed": passed(verdicts),
        "verdicts": [verdict.to_json() for verdict in verdicts],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_gate(folder: Path) -> list[Verdict]:
    """The verdicts that :func:`write_gate` wrote into a folder.

    Raises:
        InputError: ``gate.json`` is missing or is not one.
    """
    path, remedy = folder / "gate.json", "run the gate stage again"
    content = read_json_input(path, "the gate file", remedy)
    return list(validate(_GateFile, content, "the gate file", str(path), remedy).verdicts)


class _GateFile(BaseModel):
    format: Literal["edgekd.gate/1", "edgekd.gate/2"] = Field(alias="schema")
    verdicts: tuple[Verdict, ...]


def _verdict(rule: Rule, required: Evidence) -> Verdict:
    figure = rule.figure or Measurement(None, _unit_of(rule.key), 0, note="it was not measured")
    status, reason = _status(rule, figure, required)
    if status != "pass" and rule.remark:
        reason = f"{reason}; {rule.remark}"
    return Verdict(rule.key, status, figure, rule.budget, reason, rule.side, rule.origin)


def _status(rule: Rule, figure: Measurement, required: Evidence) -> tuple[VerdictStatus, str]:
    if figure.value is None:
        return "inconclusive", figure.note or "there are too few samples to state it"
    if rule.performance and EVIDENCE_STRENGTH[figure.evidence] < EVIDENCE_STRENGTH[required]:
        return "inconclusive", (
            f"its evidence is {figure.evidence}, and the gate requires {required}: measure on the "
            "device (edgekd gate result.json --device bench.json), or write evidence: "
            f"{figure.evidence} in the gate's section"
        )
    if figure.interval is None and rule.key.startswith(("accuracy.", "latency.")):
        return "inconclusive", f"{full_text(figure)} has no interval (n = {figure.n:,})"
    low, high = figure.interval or (figure.value, figure.value)
    text, budget = full_text(figure), bound_text(rule.budget, figure.unit)
    if rule.unsteady and low / WIDE_MARGIN <= rule.budget <= high * WIDE_MARGIN:
        return "inconclusive", (
            f"it was not steady ({rule.unsteady}), and {text} is within {WIDE_MARGIN:g} times "
            f"{budget}: measure again when the machine is idle"
        )
    if rule.side == "at most":
        good, bad = high <= rule.budget, low > rule.budget
    elif rule.side == "at least":
        good, bad = low >= rule.budget, high < rule.budget
    else:
        good, bad = low > rule.budget, high <= rule.budget
    if good:
        return "pass", f"{text} is {rule.side} {budget}"
    if bad:
        return "fail", f"{text} is not {rule.side} {budget}"
    return "inconclusive", f"{text} does not exclude {budget}{_more(rule.key, figure, rule.budget)}"


def _more(rule: str, figure: Measurement, budget: float) -> str:
    """The number of samples that would decide it, for a figure whose interval contains the
    budget.
    """
    if figure.value is None or figure.interval is None:
        return ""
    section = rule.partition(".")[0]
    samples = "test samples" if section == "accuracy" else "queries"
    needed = samples_to_show(figure.n, figure.value, figure.interval, budget)
    if needed is None or needed > 1000 * figure.n:
        return f"; it lies at the budget, and no number of {samples} in reach would show it"
    # Two digits: the estimate is no better than that.
    more = float(f"{needed - figure.n:.1e}")
    return f"; about {more:,.0f} more {samples} would be needed (n = {figure.n:,})"


def _unit_of(rule: str) -> str:
    """The unit of a figure that is absent, for its budget's text."""
    units = {
        "accuracy.max_drop": "",
        "size.max_mb": "MB",
        "memory.peak_mb": "MB",
        "parameters.max": "parameters",
    }
    return units.get(rule, "ms" if rule.endswith("_ms") else "×")
