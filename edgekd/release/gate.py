"""The gate: a result against its budgets, as JSON and JUnit XML.

A rule passes only when the complete interval of its figure meets the budget. When
the interval contains the budget, or the figure rests on weaker evidence than required, or was not
measured, the rule is *not shown*, and what is not shown does not pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from xml.etree import ElementTree

from edgekd.config.budgets import GateConfig
from edgekd.config.loader import load_section, read_yaml
from edgekd.errors import InputError
from edgekd.measurement import (
    EVIDENCE_STRENGTH,
    OF_CONSTANT,
    Evidence,
    Measurement,
    bound_text,
    full_text,
    value_text,
)
from edgekd.release.result import PERCENTILES, Result
from edgekd.release.statistics import samples_to_show

Status = Literal["pass", "fail", "not shown"]

Side = Literal["at most", "at least", "more than"]


@dataclass(frozen=True)
class Verdict:
    """The gate's verdict on one rule."""

    rule: str
    """The budget's key, such as ``latency.p95_ms``."""
    status: Status
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

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verdict:
        """The inverse of :meth:`to_json`."""
        return cls(**{**value, "figure": Measurement.from_json(value["figure"])})


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Whether there are verdicts and each of them is a pass."""
    return bool(verdicts) and all(verdict.status == "pass" for verdict in verdicts)


def summary_line(verdicts: Sequence[Verdict]) -> str:
    """``PASSED: 5 of 5 rules`` or ``FAILED: 2 of 5 rules fail, 1 is not shown``."""
    failed = sum(verdict.status == "fail" for verdict in verdicts)
    open_ = sum(verdict.status == "not shown" for verdict in verdicts)
    if passed(verdicts):
        return f"PASSED: all {len(verdicts)} rules" if len(verdicts) > 1 else "PASSED: its one rule"
    parts = [f"{failed} fail" + ("s" if failed == 1 else "")] if failed else []
    parts += [f"{open_} {'is' if open_ == 1 else 'are'} not shown"] if open_ else []
    return f"FAILED: of {len(verdicts)} rules, {' and '.join(parts)}"


SHARES = ("accuracy", "agreement")
"""Metrics that count correct predictions."""

_LARGEST_SHARE = 10
"""A drop above ten times a constant's error is no limit: it was meant in another unit."""


class Limit(Protocol):
    """A number of a profile."""

    @property
    def value(self) -> float:
        """The number, in the unit of its key."""


class Limits(Protocol):
    """The budgets of one model on a device, each None when the profile leaves it out."""

    @property
    def latency_ms(self) -> Limit | None:
        """One query; bounds p95."""

    @property
    def memory_mb(self) -> Limit | None:
        """Peak of the process above an empty one."""

    @property
    def storage_mb(self) -> Limit | None:
        """The shipped file."""


class DeviceProfile(Protocol):
    """The part of a device profile that the gate reads."""

    @property
    def name(self) -> str:
        """The profile's name."""

    @property
    def budget(self) -> Limits:
        """Its limits."""


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
    implied: bool = False
    """Applied by default: it does not count as a configured rule."""


def example_budget(higher_is_better: bool) -> str:
    """A budget that fits the direction of the metric, as it is written in YAML."""
    bound = "max_drop: 0.01" if higher_is_better else "max: …"
    return f"gate: {{accuracy: {{{bound}}}}}"


def check_any_rule(
    budgets: GateConfig, profile: DeviceProfile | None, higher_is_better: bool = True
) -> None:
    """Refuse a gate without any budget, before time is spent on training.

    Raises:
        InputError: neither the budgets nor the profile bound anything.
    """
    given = budgets.model_dump(exclude={"evidence"}, exclude_none=True)
    if not given["accuracy"].get("beat_constant", True):
        del given["accuracy"]["beat_constant"]
    limits = profile.budget if profile else None
    bounded = any(getattr(limits, name, None) for name in ("latency_ms", "memory_mb", "storage_mb"))
    if not any(given.values()) and not bounded:
        raise InputError(
            "the gate has no rule, and a gate that checks nothing must not pass",
            where="gate",
            remedy=f"add a budget, for example {example_budget(higher_is_better)}",
        )


def check_direction(budgets: GateConfig, metric: str, higher_is_better: bool) -> None:
    """Refuse a budget of accuracy that contradicts the metric.

    Raises:
        InputError: a floor for a metric that is better when lower, or a ceiling for one that is
            better when higher; percents for an accuracy, which ranges from 0 to 1; a drop of an
            error in its own unit.
    """
    wrong, right = ("max", "min") if higher_is_better else ("min", "max")
    if getattr(budgets.accuracy, wrong) is not None:
        better = "higher" if higher_is_better else "lower"
        bound = "smallest" if higher_is_better else "largest"
        raise InputError(
            f"the budget contradicts the metric: {metric} is better when {better}",
            where=f"gate.accuracy.{wrong}",
            remedy=f"write accuracy.{right}: …, the {bound} {metric} that is allowed; or "
            "accuracy.max_drop: … against the teacher",
        )
    if not higher_is_better and (budgets.accuracy.max_drop or 0) > _LARGEST_SHARE:
        raise InputError(
            f"the budget is {budgets.accuracy.max_drop:g}, and a drop of {metric} is a share of "
            "the error of the best constant prediction: 0.01 is one hundredth of it",
            where="gate.accuracy.max_drop",
            remedy=f"write accuracy.max: … for a bound in the unit of {metric}",
        )
    for name, value in budgets.accuracy.model_dump(exclude_none=True).items():
        if metric == "accuracy" and value > 1:
            raise InputError(
                f"the budget is {value:g}, and an accuracy ranges from 0 to 1",
                where=f"gate.accuracy.{name}",
                remedy=f"write {value / 100:g} for {value:g} %",
            )


def rules_of(result: Result, budgets: GateConfig, profile: DeviceProfile | None) -> Iterator[Rule]:
    """The rules that budgets and profile make, in the order of the section's keys.

    A limit of the profile makes a rule only where ``budgets`` has none of the same key.
    """
    student, against = result.student, result.comparison
    accuracy, size, parameters = budgets.accuracy, budgets.size, budgets.parameters
    limits = profile.budget if profile else None
    origin = f"profile {profile.name}" if profile else ""

    if accuracy.min is not None:
        yield Rule("accuracy.min", accuracy.min, "at least", student.metric, True)
    if accuracy.max is not None:
        yield Rule("accuracy.max", accuracy.max, "at most", student.metric, True)
    if accuracy.max_drop is not None:
        yield Rule("accuracy.max_drop", accuracy.max_drop, "at most", _drop(result), True)
    if accuracy.min_gain is not None:
        gain = against.get("baseline_gain")
        yield Rule("accuracy.min_gain", accuracy.min_gain, "at least", gain, True)
    yield from _beat_constant(result, accuracy.beat_constant)
    if size.max_mb is not None:
        yield Rule("size.max_mb", size.max_mb, "at most", student.size_mb, False)
    elif limits and limits.storage_mb:
        storage = limits.storage_mb.value
        yield Rule("size.max_mb", storage, "at most", student.size_mb, False, origin)
    if size.min_ratio is not None:
        ratio = against.get("size_ratio")
        yield Rule("size.min_ratio", size.min_ratio, "at least", ratio, False)
    if parameters.max is not None:
        yield Rule("parameters.max", parameters.max, "at most", student.parameters, False)
    if parameters.max_ratio is not None:
        ratio = against.get("parameter_ratio")
        yield Rule("parameters.max_ratio", parameters.max_ratio, "at most", ratio, False)
    for key in PERCENTILES:
        figure, given = student.latency.get(key), getattr(budgets.latency, key)
        if given is not None:
            yield Rule(f"latency.{key}", given, "at most", figure, True)
        elif key == "p95_ms" and limits and limits.latency_ms:
            milliseconds = limits.latency_ms.value
            yield Rule("latency.p95_ms", milliseconds, "at most", figure, True, origin)
    if budgets.latency.min_speedup is not None:
        speedup, least = against.get("speedup"), budgets.latency.min_speedup
        yield Rule("latency.min_speedup", least, "at least", speedup, True)
    if budgets.memory.peak_mb is not None:
        peak = budgets.memory.peak_mb
        yield Rule("memory.peak_mb", peak, "at most", student.peak_memory_mb, True)
    elif limits and limits.memory_mb:
        peak = limits.memory_mb.value
        yield Rule("memory.peak_mb", peak, "at most", student.peak_memory_mb, True, origin)


def _drop(result: Result) -> Measurement | None:
    """The drop to the teacher: of an accuracy a difference, of an error a share."""
    if result.higher_is_better or "drop" not in result.comparison:
        return result.comparison.get("drop")
    note = "the result has no error of a constant prediction: run the benchmark stage again"
    return result.comparison.get("relative_drop") or Measurement(None, OF_CONSTANT, 0, note=note)


def _beat_constant(result: Result, asked: bool | None) -> Iterator[Rule]:
    """The rule that the student is better than a constant, where it is configured or the default.

    An accuracy near that of the most frequent class may be all that rare classes allow; an error
    that a constant also reaches means that the network has learned nothing.
    """
    gain = result.comparison.get("gain_over_constant")
    implied = asked is None
    if asked is False or (implied and (result.metric in SHARES or gain is None)):
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
        implied=implied,
    )


def load_budgets(path: Path) -> GateConfig:
    """Read the budgets of a file.

    A file with a ``gate`` key (a pipeline) is read for that section; any other is the section
    itself.

    Raises:
        InputError: the file cannot be read or a key is wrong; the error names its line.
    """
    key = "gate" if "gate" in read_yaml(path).content else None
    return load_section(path, GateConfig, key)


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
