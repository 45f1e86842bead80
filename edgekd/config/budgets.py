"""Section ``gate``: the budgets that a release is held to."""

from __future__ import annotations

from itertools import pairwise

from pydantic import model_validator

from edgekd.config.section import Count, Positive, Section
from edgekd.figure import Evidence


class AccuracyBudget(Section):
    """The primary metric: an absolute bound, the largest drop below the teacher, the least gain.

    ``min`` is the floor of a metric that is better when higher (accuracy), ``max`` the ceiling
    of one that is better when lower (mae). ``max_drop`` of an accuracy is a difference (0.01 is
    one point); of an error it is a share of the error that the best constant answer has, so that
    it means the same in euros and in metres. ``min_gain`` is how much better than the same student
    without the teacher the distilled one must be shown to be (``distill.baseline``).
    ``beat_constant`` asks that the student be shown to be better than that constant; None asks it
    of every task but classification.
    """

    min: float | None = None
    max: float | None = None
    max_drop: float | None = None
    min_gain: float | None = None
    beat_constant: bool | None = None


class SizeBudget(Section):
    """The shipped file, in MB of 10⁶ bytes; ``min_ratio``: how many times below the teacher's."""

    max_mb: Positive | None = None
    min_ratio: Positive | None = None


class ParameterBudget(Section):
    """Parameters of the shipped model."""

    max: Count | None = None
    max_ratio: Positive | None = None


class LatencyBudget(Section):
    """Percentiles in ms of one query at the benchmark's batch size."""

    p50_ms: Positive | None = None
    p90_ms: Positive | None = None
    p95_ms: Positive | None = None
    p99_ms: Positive | None = None
    min_speedup: Positive | None = None

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


class MemoryBudget(Section):
    """Peak resident memory of the running process above an empty one, in MB of 10⁶ bytes."""

    peak_mb: Positive | None = None


class GateConfig(Section):
    """The budgets. A section left out is not gated, but for what the profile itself demands."""

    evidence: Evidence = "measured-on-target"
    accuracy: AccuracyBudget = AccuracyBudget()
    size: SizeBudget = SizeBudget()
    parameters: ParameterBudget = ParameterBudget()
    latency: LatencyBudget = LatencyBudget()
    memory: MemoryBudget = MemoryBudget()
