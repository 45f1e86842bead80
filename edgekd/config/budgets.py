"""Section ``gate``: the budgets that a release is checked against."""

from __future__ import annotations

from itertools import pairwise

from pydantic import model_validator

from edgekd.config.base import ConfigModel, PositiveFloat, PositiveInt
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
