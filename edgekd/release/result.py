"""A result file (``edgekd.result/1``): the measurements of the benchmark stage, read and
checked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.errors import InputError
from edgekd.measurement import EVIDENCE_STRENGTH, Measurement

SCHEMA = "edgekd.result/1"
PERCENTILES = ("p50_ms", "p90_ms", "p95_ms", "p99_ms")
COMPARISONS = (
    "drop",
    "relative_drop",
    "gain_over_constant",
    "speedup",
    "size_ratio",
    "parameter_ratio",
    "gap_closed",
    "baseline_gain",
)


@dataclass(frozen=True)
class ModelResult:
    """What was measured of one model. A figure that was not measured is None."""

    file: str
    metric: Measurement
    size_mb: Measurement | None = None
    parameters: Measurement | None = None
    latency: Mapping[str, Measurement] = field(default_factory=dict)
    peak_memory_mb: Measurement | None = None
    samples_ms: tuple[float, ...] = ()
    warmup: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)
    """Providers (requested, of the session, of the nodes) and threads it was timed with."""


@dataclass(frozen=True)
class Result:
    """A complete result file. ``models`` has ``student``, and ``teacher`` and ``baseline`` if
    any.
    """

    name: str
    profile: str
    target: str
    evidence: str
    task: str
    metric: str
    higher_is_better: bool
    models: Mapping[str, ModelResult]
    comparison: Mapping[str, Measurement]
    environment: Mapping[str, Any]
    versions: Mapping[str, str]
    fingerprints: Mapping[str, str]
    seed: int | None = None
    recipe: str | None = None
    """:func:`recipe_sha256` of the pipeline: the same for all seeds of one pipeline."""
    constant: Measurement | None = None
    """The metric of the best constant prediction of all samples but the test split."""

    @property
    def student(self) -> ModelResult:
        """The model that is shipped."""
        return self.models["student"]

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "result") -> Result:
        """Read the content of a result file.

        Raises:
            InputError: it is of another schema, lacks a part, or a part is not what it should be.
        """
        part = _Part(value, where, "")
        schema = value.get("schema") if isinstance(value, Mapping) else None
        if schema != SCHEMA:
            raise InputError(
                f"this is not a result file: its schema is {schema!r}, not {SCHEMA!r}",
                where=where,
                remedy="give the result.json of a benchmark stage",
            )
        task = part.mapping("task")
        models = part.mapping("models")
        comparison = part.mapping("comparison")
        seed = value.get("seed")
        return cls(
            name=part.text("name"),
            profile=part.text("profile"),
            target=part.text("target"),
            evidence=part.text("evidence"),
            task=task.text("name"),
            metric=task.text("metric"),
            higher_is_better=task.boolean("higher_is_better"),
            models={
                name: _model(models.mapping(name))
                for name in ("teacher", "baseline", "student")
                if name == "student" or name in models.value
            },
            comparison={
                name: comparison.figure(name) for name in COMPARISONS if name in comparison.value
            },
            environment=part.mapping("environment").value,
            versions=part.mapping("versions").value,
            fingerprints=part.mapping("fingerprints").value,
            seed=seed if isinstance(seed, int) else None,
            recipe=part.text("recipe") if "recipe" in value else None,
            constant=part.optional_figure("constant"),
        )


def read_result(path: Path) -> dict[str, Any]:
    """The content of a result file, validated by :meth:`Result.from_json`.

    Raises:
        InputError: the file is missing, is not JSON, or is not a complete result.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            "the result file does not exist",
            where=str(path),
            remedy="give the result.json of a benchmark stage",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the result file cannot be read: {error}", where=str(path)) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"this is not valid JSON: {error.msg}",
            where=f"{path}:{error.lineno}:{error.colno}",
            remedy="give the result.json of a benchmark stage",
        ) from error
    Result.from_json(value, str(path))
    checked: dict[str, Any] = value
    return checked


def recipe_sha256(pipeline: Mapping[str, Any]) -> str:
    """The hash of a pipeline's content without its seed and name: what seeds are compared within.

    Args:
        pipeline: the complete pipeline as JSON values.
    """
    kept = {key: value for key, value in pipeline.items() if key not in ("seed", "name")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _model(part: _Part) -> ModelResult:
    latency = part.mapping("latency") if "latency" in part.value else None
    samples = part.value.get("samples_ms") or ()
    return ModelResult(
        file=part.text("file"),
        metric=part.figure("metric"),
        size_mb=part.optional_figure("size_mb"),
        parameters=part.optional_figure("parameters"),
        latency={key: latency.figure(key) for key in PERCENTILES if key in latency.value}
        if latency
        else {},
        peak_memory_mb=part.optional_figure("peak_memory_mb"),
        samples_ms=tuple(map(float, samples)),
        warmup=part.value.get("warmup") or {},
        runtime=part.value.get("runtime") or {},
    )


class _Part:
    """A mapping inside a result file with its key, for errors."""

    def __init__(self, value: Any, where: str, key: str) -> None:
        self.where, self.key = where, key
        if not isinstance(value, Mapping):
            raise self._wrong(f"{key or 'the content'} is no mapping")
        self.value: Mapping[str, Any] = value

    def _wrong(self, what: str) -> InputError:
        return InputError(
            f"the result is damaged: {what}",
            where=self.where,
            remedy="run the benchmark stage again",
        )

    def _at(self, key: str) -> str:
        return f"{self.key}.{key}".lstrip(".")

    def _get(self, key: str) -> Any:
        if key not in self.value:
            raise self._wrong(f"{self._at(key)} is missing")
        return self.value[key]

    def mapping(self, key: str) -> _Part:
        return _Part(self._get(key), self.where, self._at(key))

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise self._wrong(f"{self._at(key)} is {value!r}, not a text")
        return value

    def boolean(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._wrong(f"{self._at(key)} is {value!r}, not true or false")
        return value

    def optional_figure(self, key: str) -> Measurement | None:
        return self.figure(key) if self.value.get(key) is not None else None

    def figure(self, key: str) -> Measurement:
        part = self.mapping(key)
        try:
            figure = Measurement.from_json(dict(part.value))
        except TypeError as error:
            raise self._wrong(f"{part.key} is not a figure ({error})") from error
        numbers = [*(figure.interval or ()), *([] if figure.value is None else [figure.value])]
        if figure.interval is not None and len(figure.interval) != 2:
            raise self._wrong(f"{part.key}.interval has not two ends")
        if not all(_is_number(number) for number in numbers):
            raise self._wrong(f"{part.key} contains something that is not a finite number")
        if figure.interval is not None and figure.interval[0] > figure.interval[1]:
            raise self._wrong(f"{part.key}.interval is turned round")
        if figure.evidence not in EVIDENCE_STRENGTH:
            raise self._wrong(f"{part.key}.evidence is {figure.evidence!r}")
        return figure


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
