"""The result from what was measured: the benchmark stage's, and a device's ``edgerun bench``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, Field

from edgekd.config.profile import Profile
from edgekd.errors import InputError
from edgekd.files import file_sha256
from edgekd.measurement import OF_CONSTANT, Evidence, Measurement, Number, drop_unit
from edgekd.release import statistics
from edgekd.release.result import ModelResult, Result, Steadiness, read_json_input, validate
from edgekd.release.statistics import Scores

MB = 1e6

BENCH_SCHEMA = "edgerun.bench/1"
_MEASURE_AGAIN = "measure again: python -m edgerun bench model.onnx --json bench.json"
_NOT_SCORED = (
    "bench.json times a model and does not score it: give the pipeline's result too, "
    "edgekd gate result.json --device bench.json"
)


class BenchPercentile(BaseModel):
    """A percentile of the latency, in ms; without a value where there are too few queries."""

    value: Number | None
    interval: tuple[Number, Number] | None
    n: int
    note: str


class BenchPercentiles(BaseModel):
    """The percentiles that a result states."""

    p50: BenchPercentile
    p90: BenchPercentile
    p95: BenchPercentile
    p99: BenchPercentile


class BenchMemory(BaseModel):
    """Peak memory in MB above an empty process; None where the system does not report it."""

    above_empty_mb: Number | None


class BenchCold(BaseModel):
    """A time of each process, in ms: the median and the range."""

    value: Annotated[Number, Field(ge=0)]
    range: tuple[Number, Number]
    n: Annotated[int, Field(ge=1)]

    def figure(self, evidence: Evidence) -> Measurement:
        """The same as a figure of a result, with the range as its interval."""
        note = f"median and range of {self.n} processes"
        return Measurement(self.value, "ms", self.n, self.range, evidence=evidence, note=note)


class BenchModel(BaseModel):
    """One model of a benchmark record. Records of edgekd 0.1 are of one process, which is not
    described.
    """

    path: str
    sha256: str
    size_bytes: int
    latency: BenchPercentiles
    memory: BenchMemory | None
    samples_ms: tuple[Annotated[Number, Field(ge=0)], ...]
    warmup: dict[str, Any]
    providers: dict[str, Any]
    threads: int | None
    queries_per_process: tuple[Annotated[int, Field(ge=1)], ...] = ()
    load: BenchCold | None = None
    first: BenchCold | None = None


class BenchSpeedup(BaseModel):
    """How many times slower the second model is, over the interleaved rounds."""

    ratio: Number
    interval: tuple[Number, Number] | None
    rounds: int


class BenchRecord(BaseModel):
    """What is read of a record of ``edgerun bench`` (``edgerun.bench/1``)."""

    models: Annotated[tuple[BenchModel, ...], Field(min_length=1)]
    comparison: BenchSpeedup | None
    environment: dict[str, Any]
    steadiness: Steadiness | None = None

    @classmethod
    def from_json(cls, value: Any, where: str) -> BenchRecord:
        """Validate the content of a record.

        Raises:
            InputError: a part is missing or is not what it should be.
        """
        return validate(cls, value, "the record of edgerun bench", where, _MEASURE_AGAIN)


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


def build_result(
    run: RunInfo,
    task: Scored,
    measured: Mapping[str, Measured],
    bench: Mapping[str, Any],
    constant: Scores | None = None,
) -> Result:
    """The result of a benchmark stage.

    Args:
        run: what was measured, where and with what.
        task: whose scores they are.
        measured: ``student``, and ``teacher`` and ``baseline`` if any.
        bench: the record of ``edgerun bench`` for the student, and the teacher if it was timed.
        constant: (N,) what a constant prediction scores on the same samples; None: not known.

    Raises:
        InputError: the record is damaged, or contradicts itself.
    """
    evidence = run.evidence
    record = BenchRecord.from_json(bench, f"target {run.target}")
    timed = dict(zip(("student", "teacher"), record.models, strict=False))
    content: dict[str, Any] = {
        **run.__dict__,
        "task": task.name,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "models": {
            role: _model(entry, timed.get(role), task.metric, evidence)
            for role, entry in measured.items()
        },
        "comparison": _comparison(measured, task, record, evidence, constant),
        "environment": record.environment,
        **({} if record.steadiness is None else {"steadiness": record.steadiness}),
    }
    if constant is not None:
        content["constant"] = statistics.mean_score(constant).figure(task.metric, evidence)
    where = f"task {task.name}, target {run.target}"
    return validate(Result, content, "the result", where, "check the task's scores and the target")


def _model(
    entry: Measured, timed: BenchModel | None, metric: str, evidence: Evidence
) -> ModelResult:
    return ModelResult(
        file=entry.file.name,
        sha256=file_sha256(entry.file),
        metric=statistics.mean_score(entry.scores).figure(metric, evidence),
        size_mb=Measurement(entry.file.stat().st_size / MB, "MB", evidence=evidence),
        parameters=Measurement(float(entry.parameters), "parameters", evidence=evidence),
        **({} if timed is None else _timing(timed, evidence)),
    )


def _timing(timed: BenchModel, evidence: Evidence) -> dict[str, Any]:
    """The fields of a model's result that are timed."""
    peak = None if timed.memory is None else timed.memory.above_empty_mb
    return {
        "latency": {
            f"{name}_ms": Measurement(
                found.value, "ms", found.n, found.interval, evidence=evidence, note=found.note
            )
            for name, found in timed.latency
        },
        "peak_memory_mb": Measurement(
            None if peak is None else max(peak, 0.0),
            "MB",
            evidence=evidence,
            note="peak memory cannot be read on this system"
            if peak is None
            else "above an empty process",
        ),
        "load_ms": timed.load and timed.load.figure(evidence),
        "first_ms": timed.first and timed.first.figure(evidence),
        "samples_ms": timed.samples_ms,
        "queries_per_process": timed.queries_per_process,
        "warmup": timed.warmup,
        "runtime": {"providers": timed.providers, "threads": timed.threads},
    }


def _comparison(
    measured: Mapping[str, Measured],
    task: Scored,
    record: BenchRecord,
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
    return figures | _speedup(record, evidence)


def _speedup(record: BenchRecord, evidence: Evidence) -> dict[str, Measurement]:
    """The ratio of two models that were timed interleaved; empty with a single model."""
    timing = record.comparison
    if timing is None:
        return {}
    return {
        "speedup": Measurement(timing.ratio, "×", timing.rounds, timing.interval, evidence=evidence)
    }


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


def read_bench(path: Path) -> BenchRecord | None:
    """The content of a file that ``edgerun bench --json`` wrote; None: it is something else.

    A missing file or invalid JSON is reported by the reader of results.

    Raises:
        InputError: it is such a record, and damaged.
    """
    try:
        content = read_json_input(path, "the record", _MEASURE_AGAIN)
    except InputError:
        return None
    if not isinstance(content, dict) or content.get("schema") != BENCH_SCHEMA:
        return None
    return BenchRecord.from_json(content, str(path))


def evidence_of_bench(
    bench: BenchRecord, profile: Profile | None, workstation: Mapping[str, Any] | None
) -> tuple[Evidence, str]:
    """How strong a bench.json is, and why where it is not the device's.

    Args:
        bench: its content.
        profile: the expected device; None: the measuring machine is the device.
        workstation: the ``environment`` of the workstation's result.
    """
    if profile is None or profile.kind == "host":
        return "measured-on-target", ""
    cpu = bench.environment.get("cpu")
    why = profile.mismatch(bench.environment)
    board = profile.kind in ("cpu-board", "jetson")
    if not why and not board and workstation and cpu is not None and workstation.get("cpu") == cpu:
        why = f"it was measured on the workstation's own {cpu}"
    return ("measured-on-host", why) if why else ("measured-on-target", "")


def result_of_bench(
    bench: BenchRecord, where: str, evidence: Evidence, lower_is_better: bool = False
) -> Result:
    """A result with the figures that a bench.json has: latency, memory and size.

    Args:
        bench: its content.
        where: its path, for errors.
        evidence: of its figures.
        lower_is_better: the direction of a metric that it does not have.

    Raises:
        InputError: it contradicts itself.
    """
    unknown = Measurement(None, "", 0, evidence=evidence, note=_NOT_SCORED)
    models = [
        ModelResult(
            file=row.path,
            metric=unknown,
            size_mb=Measurement(row.size_bytes / MB, "MB", evidence=evidence),
            **_timing(row, evidence),
        )
        for row in bench.models
    ]
    content = {
        "name": Path(bench.models[0].path).stem,
        "profile": str(bench.environment.get("device") or "device"),
        "target": "device",
        "evidence": evidence,
        "task": "unknown",
        "metric": "metric",
        "higher_is_better": not lower_is_better,
        "models": dict(zip(("student", "teacher"), models, strict=False)),
        "comparison": _speedup(bench, evidence),
        "environment": bench.environment,
        "steadiness": bench.steadiness,
        "versions": bench.environment.get("versions") or {},
        "fingerprints": {},
    }
    return validate(Result, content, "this bench.json", where, _MEASURE_AGAIN)


def with_bench(result: Result, bench: BenchRecord, where: str, evidence: Evidence) -> Result:
    """A result with the device's latency, memory and speed-up in place of the workstation's.

    Accuracy, size and parameters remain those of the result, with their own evidence.

    Args:
        result: the workstation's.
        bench: the content of the device's bench.json.
        where: its path, for errors.
        evidence: of the device's figures.

    Raises:
        InputError: the device measured another file, or its record contradicts itself.
    """
    student, measured = result.student, bench.models[0]
    size = student.size_mb.value if student.size_mb is not None else None
    expected = round((size or 0) * MB)
    same = (
        measured.sha256 == student.sha256
        if student.sha256
        else expected in (0, measured.size_bytes)
    )
    # An engine of TensorRT is rebuilt on the device.
    if not same and student.file.endswith(".onnx"):
        raise InputError(
            f"the device measured another file: {measured.size_bytes:,} bytes, the result's "
            f"student has {expected:,}",
            where=where,
            remedy="measure the model.onnx of this run's bundle",
        )
    models = {**result.models, "student": student.model_copy(update=_timing(measured, evidence))}
    if "teacher" in models:
        teacher = models["teacher"]
        fields = {"file", "sha256", "metric", "size_mb", "parameters"}
        timed = _timing(bench.models[1], evidence) if len(bench.models) > 1 else {}
        models["teacher"] = ModelResult(**{key: getattr(teacher, key) for key in fields}, **timed)
    content = {
        **dict(result),
        "models": models,
        "comparison": {**result.comparison, **_speedup(bench, evidence)},
        "environment": bench.environment,
        "steadiness": bench.steadiness,
    }
    return validate(Result, content, "this bench.json", where, _MEASURE_AGAIN)
