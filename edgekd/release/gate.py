"""The gate: a result against its budgets, as JSON and JUnit XML.

A rule passes only when the complete interval of its figure meets the budget. When
the interval contains the budget, or the figure rests on weaker evidence than required, or was not
measured, the rule is *not shown*, and what is not shown does not pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from edgekd.config.budgets import GateConfig
from edgekd.errors import InputError
from edgekd.measurement import EVIDENCE_STRENGTH, Evidence, Measurement, bound_text, full_text
from edgekd.release.result import Result
from edgekd.release.rules import (
    DeviceProfile,
    Rule,
    Status,
    Verdict,
    check_direction,
    example_budget,
    passed,
    rules_of,
    summary_line,
)
from edgekd.release.statistics import samples_to_show

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(path: Path, name: str, verdicts: Sequence[Verdict]) -> None:
    """Write one test case per rule; *fail* and *not shown* are failures, distinguished by type.

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
            suite, "testcase", classname=f"edgekd.gate.{_text(name)}", name=verdict.rule, time="0"
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
    """Without the characters that XML 1.0 does not allow, not even escaped."""
    return _NOT_XML.sub("�", text)


__all__ = [
    "Verdict",
    "check_direction",
    "evaluate",
    "passed",
    "read_gate",
    "summary_line",
    "write_gate",
    "write_gate_json",
]

SCHEMA = "edgekd.gate/1"


def evaluate(
    result: Mapping[str, Any], budgets: GateConfig, profile: DeviceProfile | None = None
) -> list[Verdict]:
    """Judge a result.

    ``budgets.evidence`` is demanded of latency, memory and speed-up, and of accuracy too:
    reduced precision and other providers may give other predictions on the device. The size and
    the parameters of a file are the same on every machine.

    Args:
        result: the content of a result file.
        budgets: the pipeline's ``gate`` section or a budget file.
        profile: the device's limits, used for keys that ``budgets`` leaves out.

    Returns:
        One verdict per rule, in the order of the section's keys.

    Raises:
        InputError: the result is not complete, no rule is configured, or a rule
            contradicts the direction of the metric.
    """
    parsed = Result.from_json(result)
    check_direction(budgets, parsed.metric, parsed.higher_is_better)
    rules = list(rules_of(parsed, budgets, profile))
    if all(rule.implied for rule in rules):
        raise InputError(
            "the gate has no rule, and a gate that checks nothing must not pass",
            where="gate" if profile is None else f"gate, profile {profile.name}",
            remedy=f"add a budget, such as '{example_budget(parsed.higher_is_better)}'",
        )
    return [_judge(rule, budgets.evidence) for rule in rules]


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
    path = folder / "gate.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']!r}, not {SCHEMA!r}")
        return [Verdict.from_json(row) for row in content["verdicts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the gate file cannot be read: {error}",
            where=str(path),
            remedy="run the gate stage again",
        ) from error


def _judge(rule: Rule, required: Evidence) -> Verdict:
    figure = rule.figure or Measurement(None, _unit_of(rule.key), 0, note="it was not measured")
    status, reason = _status(rule, figure, required)
    if status != "pass" and rule.remark:
        reason = f"{reason}; {rule.remark}"
    return Verdict(rule.key, status, figure, rule.budget, reason, rule.side, rule.origin)


def _status(rule: Rule, figure: Measurement, required: Evidence) -> tuple[Status, str]:
    if figure.value is None:
        return "not shown", figure.note or "there are too few samples to state it"
    if rule.performance and EVIDENCE_STRENGTH[figure.evidence] < EVIDENCE_STRENGTH[required]:
        return "not shown", (
            f"its evidence is {figure.evidence}, and the gate requires {required}: measure on the "
            "device (edgekd gate result.json --device bench.json), or write evidence: "
            f"{figure.evidence} in the gate's section"
        )
    low, high = figure.interval or (figure.value, figure.value)
    text, budget = full_text(figure), bound_text(rule.budget, figure.unit)
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
    return "not shown", f"{text} does not exclude {budget}{_more(rule.key, figure, rule.budget)}"


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
