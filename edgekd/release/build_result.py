"""From what was measured to the result file: every figure with unit, n, interval and evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgekd.files import file_sha256
from edgekd.measurement import Evidence, Measurement
from edgekd.release import statistics
from edgekd.release.formatting import OF_CONSTANT, drop_unit
from edgekd.release.result import SCHEMA

MB = 1e6
Scores = npt.NDArray[np.float64]


class Scored(Protocol):
    """What of a task the result file states."""

    name: str
    metric: str
    higher_is_better: bool


@dataclass(frozen=True)
class Measured:
    """One model's file, its parameters and its score on each test sample, (N,)."""

    file: Path
    parameters: int
    scores: Scores


@dataclass(frozen=True)
class RunInfo:
    """What was measured: the job, where and with what."""

    name: str
    seed: int
    recipe: str
    profile: str
    target: str
    evidence: Evidence
    versions: Mapping[str, str]
    fingerprints: Mapping[str, str]


def evidence_of(profile: str, target: str) -> Evidence:
    """How strong a measurement is.

    This machine is the target itself only under the profile ``host``; under any other profile
    it is a substitute for the device.
    """
    on_target = target != "local" or profile == "host"
    return "measured-on-target" if on_target else "measured-on-host"


def build_result(
    origin: RunInfo,
    task: Scored,
    measured: Mapping[str, Measured],
    bench: Mapping[str, Any],
    constant: Scores | None = None,
) -> dict[str, Any]:
    """The content of a result file.

    Args:
        origin: what was measured, where and with what.
        task: whose scores they are.
        measured: ``student``, and ``teacher`` and ``baseline`` if any.
        bench: the record of ``edgerun bench`` for the student, and the teacher if it was timed.
        constant: (N,) what a constant prediction scores on the same samples; None: not known.

    Returns:
        JSON values of the schema ``edgekd.result/1``.
    """
    timed = dict(zip(("student", "teacher"), bench["models"], strict=False))
    models = {
        role: _model(entry, timed.get(role), task, origin.evidence)
        for role, entry in measured.items()
    }
    figures = _comparison(measured, task, bench, origin.evidence, constant)
    more: dict[str, Any] = {}
    if constant is not None:
        chance = statistics.mean_score(constant).figure(task.metric, origin.evidence)
        more["constant"] = chance.to_json()
    return {
        "schema": SCHEMA,
        "name": origin.name,
        "seed": origin.seed,
        "recipe": origin.recipe,
        "profile": origin.profile,
        "target": origin.target,
        "evidence": origin.evidence,
        "task": {
            "name": task.name,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
        },
        "models": models,
        **more,
        "comparison": {name: figure.to_json() for name, figure in figures.items()},
        "environment": bench["environment"],
        "versions": dict(origin.versions),
        "fingerprints": dict(origin.fingerprints),
    }


def _model(
    entry: Measured, timed: Mapping[str, Any] | None, task: Scored, evidence: Evidence
) -> dict[str, Any]:
    metric = statistics.mean_score(entry.scores).figure(task.metric, evidence)
    size = Measurement(entry.file.stat().st_size / MB, "MB", evidence=evidence)
    parameters = Measurement(float(entry.parameters), "parameters", evidence=evidence)
    row: dict[str, Any] = {
        "file": entry.file.name,
        "sha256": file_sha256(entry.file),
        "metric": metric.to_json(),
        "size_mb": size.to_json(),
        "parameters": parameters.to_json(),
    }
    return row if timed is None else row | timing_row(timed, evidence)


def timing_row(timed: Mapping[str, Any], evidence: Evidence) -> dict[str, Any]:
    """The timing of a model in a result, from its row of ``edgerun bench``."""
    latency, memory = timed["latency"], timed["memory"]
    row: dict[str, Any] = {}
    row["latency"] = {
        f"{name}_ms": Measurement(
            latency[name]["value"],
            "ms",
            latency[name]["n"],
            tuple(latency[name]["interval"]) if latency[name]["interval"] else None,
            evidence=evidence,
            note=latency[name]["note"],
        ).to_json()
        for name in ("p50", "p90", "p95", "p99")
    }
    row["peak_memory_mb"] = Measurement(
        memory["above_empty_mb"],
        "MB",
        evidence=evidence,
        note="above an empty process"
        if memory["above_empty_mb"] is not None
        else "peak memory cannot be read on this system",
    ).to_json()
    row["samples_ms"] = timed["samples_ms"]
    row["warmup"] = timed["warmup"]
    row["runtime"] = {"providers": timed["providers"], "threads": timed["threads"]}
    return row


def _comparison(
    measured: Mapping[str, Measured],
    task: Scored,
    bench: Mapping[str, Any],
    evidence: Evidence,
    constant: Scores | None,
) -> dict[str, Measurement]:
    student, teacher = measured["student"], measured.get("teacher")
    baseline = measured.get("baseline")
    figures: dict[str, Measurement] = {}
    sign = 1 if task.higher_is_better else -1
    unit = drop_unit(task.metric)
    if teacher is not None:
        # Scores are turned so that higher is better; a drop is then teacher minus student.
        drop = statistics.paired_difference(sign * teacher.scores, sign * student.scores)
        figures["drop"] = drop.figure(unit, evidence)
        if not task.higher_is_better and constant is not None and constant.mean() > 0:
            # An error is large or small only relative to a reference.
            share = _times(drop, 1 / float(constant.mean()))
            figures["relative_drop"] = share.figure(OF_CONSTANT, evidence)
        sizes = teacher.file.stat().st_size / student.file.stat().st_size
        figures["size_ratio"] = Measurement(sizes, "×", evidence=evidence)
        figures["parameter_ratio"] = Measurement(
            student.parameters / max(teacher.parameters, 1), "×", evidence=evidence
        )
    if constant is not None:
        over = statistics.paired_difference(sign * student.scores, sign * constant)
        figures["gain_over_constant"] = over.figure(unit, evidence)
    if baseline is not None:
        gain = statistics.paired_difference(sign * student.scores, sign * baseline.scores)
        figures["baseline_gain"] = gain.figure(unit, evidence)
    if teacher is not None and baseline is not None:
        gap = statistics.gap_closed(
            sign * teacher.scores, sign * baseline.scores, sign * student.scores
        )
        figures["gap_closed"] = gap.figure("of the gap", evidence)
    speedup = speedup_figure(bench, evidence)
    return figures if speedup is None else figures | {"speedup": speedup}


def speedup_figure(bench: Mapping[str, Any], evidence: Evidence) -> Measurement | None:
    """The ratio of two models that were timed interleaved; None with a single model."""
    timing = bench.get("comparison")
    if timing is None:
        return None
    ends = tuple(timing["interval"])
    return Measurement(timing["ratio"], "×", timing["rounds"], ends, evidence=evidence)


def _times(estimate: statistics.Estimate, factor: float) -> statistics.Estimate:
    """The estimate in a unit that is 1 / ``factor`` of its own; ``factor`` is above 0."""
    if estimate.value is None:
        return estimate
    ends = estimate.interval
    return replace(
        estimate,
        value=factor * estimate.value,
        interval=None if ends is None else (factor * ends[0], factor * ends[1]),
    )
