"""Section ``gate``, and the budgets of a job: those of the section, else the profile's limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import model_validator

from edgekd.config.base import ConfigModel, PositiveFloat, PositiveInt
from edgekd.config.loader import load_section
from edgekd.config.profile import Profile
from edgekd.config.yaml_source import read_yaml
from edgekd.errors import InputError
from edgekd.measurement import Evidence


class AccuracyBudget(ConfigModel):
    """Section ``gate.accuracy``: the primary metric.

    Of an accuracy, drops and gains are differences (0.01 is one point). Of an error such as mae,
    ``max_drop`` is a share of the error of the best constant prediction, so that it means the
    same in euros and in metres.
    """

    min: float | None = None
    """Lower limit of a metric that is better when higher, such as accuracy."""
    max: float | None = None
    """Upper limit of a metric that is better when lower, such as mae."""
    max_drop: float | None = None
    """Largest loss of the student against the teacher."""
    min_gain: float | None = None
    """How much better than the same student trained without the teacher the distilled one must be
    shown to be, in the metric's unit; needs ``distill.baseline``.
    """
    beat_constant: bool | None = None
    """Whether the student must be shown to be better than the best constant prediction; left out,
    this is required for every task but classification.
    """


class SizeBudget(ConfigModel):
    """Section ``gate.size``: the shipped file, in MB of 10⁶ bytes."""

    max_mb: PositiveFloat | None = None
    """Largest size of the file."""
    min_ratio: PositiveFloat | None = None
    """How many times smaller than the teacher's file it must be."""


class ParameterBudget(ConfigModel):
    """Section ``gate.parameters``: parameters of the shipped model."""

    max: PositiveInt | None = None
    """Largest number of parameters."""
    max_ratio: PositiveFloat | None = None
    """Largest share of the teacher's number."""


class LatencyBudget(ConfigModel):
    """Section ``gate.latency``: percentiles of one query at the benchmark's batch size."""

    p50_ms: PositiveFloat | None = None
    """Median, in ms."""
    p90_ms: PositiveFloat | None = None
    """90th percentile, in ms."""
    p95_ms: PositiveFloat | None = None
    """95th percentile, in ms."""
    p99_ms: PositiveFloat | None = None
    """99th percentile, in ms; needs at least 662 queries to be stated."""
    min_speedup: PositiveFloat | None = None
    """How many times faster than the teacher, measured in interleaved rounds."""

    @model_validator(mode="after")
    def _ordered(self) -> LatencyBudget:
        given = [
            (key, value)
            for key in ("p50_ms", "p90_ms", "p95_ms", "p99_ms")
            if (value := getattr(self, key)) is not None
        ]
        for (low, low_ms), (high, high_ms) in pairwise(given):
            if low_ms > high_ms:
                raise ValueError(
                    f"the budget contradicts itself: {low} = {low_ms} ms is above "
                    f"{high} = {high_ms} ms, but a lower percentile is never slower"
                )
        return self


class MemoryBudget(ConfigModel):
    """Section ``gate.memory``."""

    peak_mb: PositiveFloat | None = None
    """Peak resident memory of the running process above an empty one, in MB of 10⁶ bytes."""


class GateConfig(ConfigModel):
    """Section ``gate``: the budgets. A section left out is not gated, except for the limits of the
    profile.
    """

    evidence: Evidence = "measured-on-target"
    """The weakest evidence that is accepted: ``measured-on-target``, ``measured-on-host`` or
    ``estimated``.
    """
    accuracy: AccuracyBudget = AccuracyBudget()
    """The primary metric."""
    size: SizeBudget = SizeBudget()
    """The shipped file."""
    parameters: ParameterBudget = ParameterBudget()
    """The shipped model's parameters."""
    latency: LatencyBudget = LatencyBudget()
    """Time of one query."""
    memory: MemoryBudget = MemoryBudget()
    """Peak memory of the running process."""


def load_budgets(path: Path) -> GateConfig:
    """Read the budgets of a file.

    A file with a ``gate`` key (a pipeline) is read for that section; any other is the section
    itself.

    Raises:
        InputError: the file cannot be read or a key is wrong; the error names its line.
    """
    return load_section(path, GateConfig, "gate" if "gate" in read_yaml(path).content else None)


_PROFILE_LIMITS = {
    "size.max_mb": "storage_mb",
    "latency.p95_ms": "latency_ms",
    "memory.peak_mb": "memory_mb",
}
"""Key of a budget → the profile's limit that holds where the section leaves it out."""

_LARGEST_SHARE = 10
"""A drop above ten times a constant's error is no limit: it was meant in another unit."""


@dataclass(frozen=True)
class Budgets:
    """Every budget of a job: that of the section ``gate``, else the profile's limit.

    The choice between engines, ``edgekd check``, the memory that TensorRT's builder may use and
    the gate all read this one object. ``budgets["latency.p95_ms"]`` is None where there is none.
    """

    values: Mapping[str, float | None]
    """By key, in the order of the section."""
    evidence: Evidence
    """The weakest evidence that is accepted."""
    beat_constant: bool | None
    """``accuracy.beat_constant``."""
    profile: str | None
    """The device's name."""
    limits: frozenset[str]
    """The keys whose value is the profile's limit."""

    @classmethod
    def resolve(cls, gate: GateConfig | None = None, profile: Profile | None = None) -> Budgets:
        """The budgets of a section and a device profile together."""
        sections = (gate or GateConfig()).model_dump()
        evidence, beat_constant = (
            sections.pop("evidence"),
            sections["accuracy"].pop("beat_constant"),
        )
        values = {
            f"{section}.{key}": value
            for section, budgets in sections.items()
            for key, value in budgets.items()
        }
        found = {
            key: getattr(profile.budget, name) if profile is not None else None
            for key, name in _PROFILE_LIMITS.items()
            if values[key] is None
        }
        limits = {key: limit.value for key, limit in found.items() if limit is not None}
        name = profile.name if profile is not None else None
        return cls(values | limits, evidence, beat_constant, name, frozenset(limits))

    def __getitem__(self, key: str) -> float | None:
        return self.values[key]

    @property
    def given(self) -> dict[str, float]:
        """The budgets that there are."""
        return {key: value for key, value in self.values.items() if value is not None}

    def origin(self, key: str) -> str:
        """Who set a budget: ``gate`` (the pipeline or budget file) or ``profile NAME``."""
        return f"profile {self.profile}" if key in self.limits else "gate"

    def require_any(self, higher_is_better: bool = True) -> None:
        """Refuse a gate without any rule, before time is spent on training.

        Raises:
            InputError: neither the section nor the profile bounds anything.
        """
        if not self.given and not self.beat_constant:
            example = "max_drop: 0.01" if higher_is_better else "max: …"
            raise InputError(
                "the gate has no rule, and a gate that checks nothing must not pass",
                where="gate" if self.profile is None else f"gate, profile {self.profile}",
                remedy=f"add a budget, for example gate: {{accuracy: {{{example}}}}}",
            )

    def check_metric(self, metric: str, higher_is_better: bool) -> None:
        """Refuse a budget of accuracy that contradicts the metric.

        Raises:
            InputError: a floor for a metric that is better when lower, or a ceiling for one that
                is better when higher; percents for an accuracy, which ranges from 0 to 1; a drop
                of an error in its own unit.
        """
        wrong, right = ("max", "min") if higher_is_better else ("min", "max")
        if self[f"accuracy.{wrong}"] is not None:
            better, bound = ("higher", "smallest") if higher_is_better else ("lower", "largest")
            raise InputError(
                f"the budget contradicts the metric: {metric} is better when {better}",
                where=f"gate.accuracy.{wrong}",
                remedy=f"write accuracy.{right}: …, the {bound} {metric} that is allowed; or "
                "accuracy.max_drop: … against the teacher",
            )
        drop = self["accuracy.max_drop"] or 0
        if not higher_is_better and drop > _LARGEST_SHARE:
            raise InputError(
                f"the budget is {drop:g}, and a drop of {metric} is a share of the error of the "
                "best constant prediction: 0.01 is one hundredth of it",
                where="gate.accuracy.max_drop",
                remedy=f"write accuracy.max: … for a bound in the unit of {metric}",
            )
        for key, value in self.given.items():
            if metric == "accuracy" and key.startswith("accuracy.") and value > 1:
                raise InputError(
                    f"the budget is {value:g}, and an accuracy ranges from 0 to 1",
                    where=f"gate.{key}",
                    remedy=f"write {value / 100:g} for {value:g} %",
                )
