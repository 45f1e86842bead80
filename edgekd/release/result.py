"""The result file (``edgekd.result/1``): the measurements of the benchmark stage.

A result is validated whenever it is read or built: types, units and ranges, an interval that
contains its value, percentiles that are those of the raw samples.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from edgekd.errors import InputError
from edgekd.measurement import OF_CONSTANT, Evidence, Measurement, Number, drop_unit
from edgerun import files
from edgerun.percentiles import PERCENTILES

SCHEMA = "edgekd.result/1"
ROLES = ("teacher", "baseline", "student")
LATENCIES = {f"{name}_ms": share for name, share in PERCENTILES.items() if name != "p99_9"}
"""The percentiles of a result; the p99.9 of a benchmark's record is not in it."""
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
SHARES = ("accuracy", "agreement")
"""Metrics that count correct predictions, from 0 to 1."""
_ROUNDING = 1e-6
"""Samples are written with six decimals."""

Model = TypeVar("Model", bound=BaseModel)
Value = TypeVar("Value")


def _known(names: tuple[str, ...]) -> Callable[[Mapping[str, Value]], dict[str, Value]]:
    """Keep the entries of these names, in their order."""
    return lambda value: {name: value[name] for name in names if name in value}


class Steadiness(BaseModel):
    """Whether a measurement may be expected to repeat itself."""

    model_config = ConfigDict(frozen=True)

    steady: StrictBool
    """Whether the machine was left to it, and the figures of all processes were alike."""
    reasons: tuple[str, ...] = ()
    """Why they are not steady."""
    contention: dict[str, Any] = Field(default_factory=dict)
    """What other processes used meanwhile."""


class ModelResult(BaseModel):
    """What was measured of one model. A figure that was not measured is None."""

    model_config = ConfigDict(frozen=True)

    file: str
    """Name of the file."""
    sha256: str | None = None
    """Of the file; None in the first results of edgekd 0.1."""
    metric: Measurement
    """The task's metric on the test split."""
    size_mb: Measurement | None = None
    """Of the file, in MB of 10⁶ bytes."""
    parameters: Measurement | None = None
    """Number of parameters."""
    latency: Annotated[dict[str, Measurement], AfterValidator(_known(tuple(LATENCIES)))] = Field(
        default_factory=dict
    )
    """Percentiles of one query, by name (``p50_ms``)."""
    peak_memory_mb: Measurement | None = None
    """Peak of the process above an empty one, in MB."""
    samples_ms: tuple[Annotated[Number, Field(ge=0)], ...] = ()
    """The latency of every query, in ms, process by process."""
    queries_per_process: tuple[Annotated[StrictInt, Field(ge=1)], ...] = ()
    """How many of ``samples_ms`` are of each process; empty where there was one."""
    load_ms: Measurement | None = None
    """Of opening the file: the median of the processes, and their range."""
    first_ms: Measurement | None = None
    """Of the first query: the median of the processes, and their range."""
    warmup: dict[str, Any] = Field(default_factory=dict)
    """Number of warm-up queries, and whether the latency was steady after them."""
    runtime: dict[str, Any] = Field(default_factory=dict)
    """Providers (requested, of the session, of the nodes) and threads it was timed with."""


class Result(BaseModel):
    """A result file. ``models`` has ``student``, and ``teacher`` and ``baseline`` if any."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    name: str
    """Of the pipeline."""
    seed: StrictInt | None = None
    """Of the training."""
    recipe: str | None = None
    """:func:`recipe_sha256` of the pipeline: the same for all seeds of one pipeline."""
    profile: str
    """The device's name."""
    target: str
    """Where it was measured."""
    evidence: Evidence
    """How strong the figures are that depend on the machine."""
    task: str = Field(validation_alias=AliasPath("task", "name"))
    metric: str = Field(validation_alias=AliasPath("task", "metric"))
    higher_is_better: StrictBool = Field(validation_alias=AliasPath("task", "higher_is_better"))
    models: Annotated[dict[str, ModelResult], AfterValidator(_known(ROLES))]
    """By role: ``teacher``, ``baseline`` (the student alone) and ``student``."""
    constant: Measurement | None = None
    """The metric of the best constant prediction of all samples but the test split."""
    comparison: Annotated[dict[str, Measurement], AfterValidator(_known(COMPARISONS))]
    """The student against the others: ``drop``, ``speedup``, ``gap_closed`` and others."""
    environment: dict[str, Any]
    steadiness: Steadiness | None = None
    """Whether the latencies are steady; None in the results of edgekd 0.1."""
    versions: dict[str, Any]
    fingerprints: dict[str, Any]

    @property
    def student(self) -> ModelResult:
        """The model that is shipped."""
        return self.models["student"]

    @classmethod
    def from_json(cls, value: Any, where: str = "result") -> Result:
        """Validate the content of a result file.

        Raises:
            InputError: it is of another schema, lacks a part, or contradicts itself.
        """
        schema = value.get("schema") if isinstance(value, Mapping) else None
        if schema != SCHEMA:
            raise InputError(
                f"this is not a result file: its schema is {reprlib.repr(schema)}, not {SCHEMA!r}",
                where=where,
                remedy="give the result.json of a benchmark stage",
            )
        return validate(cls, value, "the result", where, "run the benchmark stage again")

    def to_json(self) -> dict[str, Any]:
        """The content of a result file; :meth:`from_json` reads it."""
        content = self.model_dump(mode="json", exclude_unset=True)
        task = {
            "name": content.pop("task"),
            "metric": content.pop("metric"),
            "higher_is_better": content.pop("higher_is_better"),
        }
        order = ("name", "seed", "recipe", "profile", "target", "evidence")
        head = {key: content.pop(key) for key in order if key in content}
        return {"schema": SCHEMA, **head, "task": task, **content}

    @model_validator(mode="after")
    def _consistent(self) -> Result:
        if "student" not in self.models:
            raise ValueError("models.student is missing")
        problems = [
            f"{key}{problem}"
            for key, figure, unit, low, high in self._expected()
            if figure is not None and (problem := _problem(key, figure, unit, low, high))
        ]
        for role, model in self.models.items():
            problems += _sample_problems(f"models.{role}", model)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _expected(self) -> Iterator[tuple[str, Measurement | None, str, float, float]]:
        """Every figure with its key, its unit, and its smallest and largest possible value."""
        metric, change = self.metric, drop_unit(self.metric)
        least, most = (0.0, 1.0) if metric in SHARES else (-math.inf, math.inf)
        yield "constant", self.constant, metric, least, most
        for role, model in self.models.items():
            at = f"models.{role}"
            yield f"{at}.metric", model.metric, metric, least, most
            yield f"{at}.size_mb", model.size_mb, "MB", 0, math.inf
            yield f"{at}.parameters", model.parameters, "parameters", 0, math.inf
            yield f"{at}.peak_memory_mb", model.peak_memory_mb, "MB", 0, math.inf
            yield f"{at}.load_ms", model.load_ms, "ms", 0, math.inf
            yield f"{at}.first_ms", model.first_ms, "ms", 0, math.inf
            for name, figure in model.latency.items():
                yield f"{at}.latency.{name}", figure, "ms", 0, math.inf
        against = self.comparison
        for name in ("drop", "gain_over_constant", "baseline_gain"):
            yield f"comparison.{name}", against.get(name), change, -most, most
        for name in ("speedup", "size_ratio", "parameter_ratio"):
            yield f"comparison.{name}", against.get(name), "×", 0, math.inf
        relative, gap = against.get("relative_drop"), against.get("gap_closed")
        yield "comparison.relative_drop", relative, OF_CONSTANT, -math.inf, math.inf
        yield "comparison.gap_closed", gap, "of the gap", -math.inf, math.inf


def _problem(key: str, figure: Measurement, unit: str, low: float, high: float) -> str:
    """What is wrong with a figure, to be added to its key; empty for a valid one."""
    value, interval = figure.value, figure.interval
    if interval is not None and interval[0] > interval[1]:
        return ".interval is turned round"
    if value is None:
        return "" if interval is None else " has an interval and no value"
    if figure.unit != unit:
        return f".unit is {figure.unit!r}, not {unit!r}"
    if figure.n < 1:
        return ".n is 0, and it has a value"
    if not low <= value <= high:
        return f" is {value:g}, which is not from {low:g} to {high:g}"
    if interval is None:
        return " has no interval" if ".latency." in key else ""
    slack = _ROUNDING * abs(value)
    inside = interval[0] - slack <= value <= interval[1] + slack
    # The percentile interval of a bootstrap need not contain the value.
    if not inside and key != "comparison.gap_closed":
        return f" is {value:g}, outside its interval {interval[0]:g} to {interval[1]:g}"
    return ""


def _sample_problems(key: str, model: ModelResult) -> Iterator[str]:
    """Percentiles that are not those of the raw samples."""
    samples, by_process = sorted(model.samples_ms), sum(model.queries_per_process)
    if by_process not in (0, len(samples)):
        yield f"{key}.queries_per_process are {by_process}, and samples_ms has {len(samples)}"
    for name, figure in model.latency.items():
        if not samples or figure.value is None:
            continue
        if figure.n != len(samples):
            yield f"{key}.latency.{name}.n is {figure.n}, and samples_ms has {len(samples)}"
            continue
        rank = math.ceil(LATENCIES[name] * len(samples)) - 1
        low, high = samples[max(rank - 1, 0)], samples[min(rank + 1, len(samples) - 1)]
        if not low - _ROUNDING <= figure.value <= high + _ROUNDING:
            yield f"{key}.latency.{name} is {figure.value:g}, and that of samples_ms {low:g}"


def validate(model: type[Model], value: Any, what: str, where: str, remedy: str) -> Model:
    """A value of a JSON file as a model.

    Args:
        model: the pydantic model.
        value: the content of the file.
        what: names the content in the error: ``the result``.
        where: the file, for the error.
        remedy: what to do about it.

    Raises:
        InputError: it does not fit; the error names each place.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = [_explain(details) for details in error.errors(include_url=False)]
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise InputError(
        f"{what} is damaged: {'; '.join(problems[:5])}{more}", where=where, remedy=remedy
    )


def _explain(details: ErrorDetails) -> str:
    """One error of pydantic with the place it is at."""
    location, kind = details["loc"], details["type"]
    key = ".".join(map(str, location)) or "the content"
    parent = ".".join(map(str, location[:-1]))
    if kind == "value_error":
        return f"{key}: {details['ctx']['error']}" if location else str(details["ctx"]["error"])
    if kind == "too_long" or (kind == "missing" and isinstance(location[-1], int)):
        return f"{key if kind == 'too_long' else parent} has not two ends"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "unexpected_keyword_argument":
        return f"{parent} is not a figure: it has the unknown key {location[-1]!r}"
    message = details["msg"].replace("a valid tuple", "a list")
    shown = reprlib.repr(details["input"])
    return f"{key} is {shown}: {message[0].lower()}{message[1:]}"


def read_json_input(path: Path, what: str, remedy: str) -> Any:
    """The content of a JSON file that someone else may have written.

    Args:
        path: the file.
        what: names the file in the error: ``the result file``.
        remedy: what to do about it.

    Raises:
        InputError: the file is missing, too large, cannot be read, or is not JSON.
    """
    try:
        return files.read_json(path, remedy, InputError)
    except FileNotFoundError as error:
        raise InputError(f"{what} does not exist", where=str(path), remedy=remedy) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"this is not valid JSON: {error.msg}",
            where=f"{path}:{error.lineno}:{error.colno}",
            remedy=remedy,
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{what} cannot be read: {error}", where=str(path), remedy=remedy
        ) from error


def read_result(path: Path) -> Result:
    """Read and validate a result file.

    Raises:
        InputError: the file is missing, is not JSON, or is not a valid result.
    """
    remedy = "give the result.json of a benchmark stage"
    return Result.from_json(read_json_input(path, "the result file", remedy), str(path))


def recipe_sha256(pipeline: Mapping[str, Any]) -> str:
    """The hash of a pipeline's content without its seed and name: what seeds are compared within.

    Args:
        pipeline: the complete pipeline as JSON values.
    """
    compared = {key: value for key, value in pipeline.items() if key not in ("seed", "name")}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()
