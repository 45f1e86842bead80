"""Budgets as rules: pass, fail or inconclusive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from edgekd.config.budgets import GateConfig
from edgekd.config.loader import load_section
from edgekd.config.yaml_source import read_yaml
from edgekd.errors import InputError
from edgekd.measurement import OF_CONSTANT, Measurement, bound_text, value_text
from edgekd.release.result import PERCENTILES, Result

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
