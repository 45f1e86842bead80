"""The model of a pipeline file, with its data and benchmark sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from edgekd.config.base import ConfigModel, PositiveFloat, PositiveInt
from edgekd.config.budgets import GateConfig
from edgekd.config.engines import (
    EngineConfig,
    ExportConfig,
    OnnxRuntimeConfig,
    QuantizeConfig,
    expand_engine,
)
from edgekd.config.networks import StudentConfig, TeacherConfig
from edgekd.config.training import DistillConfig, LossTerm


class DataConfig(ConfigModel):
    """Section ``data``: where samples come from and how they are split.

    The test split is never used to choose anything.
    """

    source: str
    """``digits``, ``fashion-mnist``, ``npz``, ``image-folder`` (one folder per class), or
    ``package.module:name``: a function that returns ``{"train": {"image": …, "label": …}, "test":
    {…}}``.
    """
    path: str | None = None
    """File or folder of the source, relative to the pipeline file."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the source, and ``normalize: false``, which leaves floats as they are;
    ``layout``, which declares the axes of the inputs where they are ambiguous: ``nchw`` or
    ``nhwc`` (images), ``nhw`` (grey images), ``nct`` or ``ntc`` (signals: channels, time), ``nt``
    (one channel), ``nf`` (features), or a mapping by input name. ``image-folder`` takes ``mode:
    L`` (grey) and ``splits``: the folder of each split, or false when the folders are classes.
    """
    targets: tuple[str, ...] | None = None
    """Names of the target arrays, where they are not the task's defaults."""
    classes: Literal["observed"] | tuple[int | str, ...] | dict[int | str, str] | None = None
    """The values of the labels, numbers or text, in the order of the classes; a mapping
    ``{1: cat, 2: dog}`` names them. ``observed`` takes all that occur, in order.
    """
    label_format: Literal["index", "one-hot", "probabilities"] | None = None
    """Form of the labels where it is ambiguous: ``index`` (each number is a class),
    ``one-hot``, or ``probabilities`` (the largest of each row is the class).
    """
    unlabelled: int | str = -1
    """The value that marks unlabelled samples."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction split off the training split for validation, stratified where there are labels;
    unused when the source has a validation split.
    """
    test: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction split off as test split when the source has none."""
    labelled: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training and validation labels that is used; the other samples are learned from
    the teacher alone. A label of −1, or no label at all, is unlabelled too.
    """
    image_size: tuple[PositiveInt, PositiveInt] | None = None
    """Height and width to which images of a folder are resized."""
    augment: tuple[str | dict[str, dict[str, Any]], ...] = ()
    """Augmentations in order: ``flip``, ``shift``, ``erase``, ``crop``, ``colour``, and last
    ``mixup`` or ``cutmix``; or own functions ``package.module:name``. A name, or ``{name:
    {arguments}}``.
    """
    download: bool = False
    """Whether a source may download its files."""


class BenchmarkConfig(ConfigModel):
    """Section ``benchmark``: how long to measure, and what to compare with."""

    against: Literal["teacher", "none"] = "teacher"
    """``teacher``: measured in interleaved rounds with the student; ``none``: the student alone."""
    batch_size: PositiveInt = 1
    """Samples of one query."""
    min_queries: PositiveInt = 1000
    """Timed queries of each model, unless ``max_seconds`` are reached first."""
    max_seconds: PositiveFloat = 60.0
    """Limit of the time for all queries."""


class PipelineConfig(ConfigModel):
    """A pipeline file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
    """Name of the job, of its run folder and of its bundle."""
    task: str = "classification"
    """``classification``, ``regression``, ``policy`` (several inputs, continuous actions), or
    ``package.module:name``.
    """
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, splits, order and augmentation."""
    data: DataConfig
    """Where samples come from."""
    profile: str = "host"
    """A shipped device profile (``edgekd profiles list``), or a YAML file."""
    target: str = "local"
    """Where the benchmark runs: ``local``, or ``package.module:name`` of a
    :class:`~edgekd.targets.Target`.
    """
    teacher: TeacherConfig
    """The network that is distilled from."""
    student: StudentConfig
    """The network that is shipped."""
    distill: DistillConfig = DistillConfig()
    """The student's training."""
    export: ExportConfig = ExportConfig()
    """The ONNX file and its parity check."""
    quantize: QuantizeConfig | None = None
    """INT8 and 16-bit candidates. Left out: float32 only."""
    engines: tuple[EngineConfig, ...] = (OnnxRuntimeConfig(),)
    """What the model is built for; the first one is measured. A name, or a mapping with ``kind``.
    """
    benchmark: BenchmarkConfig = BenchmarkConfig()
    """The measurement."""
    gate: GateConfig = GateConfig()
    """The budgets."""

    @property
    def loss_terms(self) -> tuple[LossTerm, ...]:
        """The terms of the student's objective: those of the file, else the task's defaults.

        A tenth against the labels and nine tenths against the teacher; continuous outputs have
        no classes, so both are distances there.
        """
        if self.distill.losses is not None:
            return self.distill.losses
        if self.task in ("regression", "policy"):
            kind = {"kind": self.task_args.get("loss", "mse")}
            hard = LossTerm(name="target_regression", args=kind, weight=0.1)
            soft = LossTerm(name="output_regression", args=kind)
        else:
            hard = LossTerm(name="hard_labels", weight=0.1)
            soft = LossTerm(name="soft_labels", args={"temperature": 4.0})
        return hard, soft.model_copy(update={"weight": 0.9})

    @field_validator("engines")
    @classmethod
    def _an_engine(cls, value: tuple[EngineConfig, ...]) -> tuple[EngineConfig, ...]:
        if not value:
            raise ValueError("nothing would be run: add onnxruntime")
        return value

    @model_validator(mode="after")
    def _gain_is_measured(self) -> PipelineConfig:
        if self.gate.accuracy.min_gain is not None and not self.distill.baseline:
            raise ValueError(
                "gate.accuracy.min_gain compares with the student alone, which "
                "distill.baseline: false does not train; set distill.baseline: true"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _short_engines(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("engines"), list):
            return {**value, "engines": [expand_engine(entry) for entry in value["engines"]]}
        return value


SCHEMA = "edgekd.pipeline/1"


def pipeline_schema() -> dict[str, Any]:
    """The JSON schema of a pipeline file, with the short forms that YAML allows.

    A term, a scheme and an augmentation may be a bare name or ``{name: {arguments}}``, an engine a
    bare kind, and the cache ``false``.
    """
    schema = PipelineConfig.model_json_schema()
    parts = schema["$defs"]
    for part, others in (("LossTerm", ("weight",)), ("SchemeConfig", ())):
        full = parts[part]
        named = {
            "type": "object",
            "properties": {key: full["properties"][key] for key in others},
            "additionalProperties": {"type": ["object", "null"]},
            "maxProperties": 1 + len(others),
        }
        parts[part] = {
            "description": full["description"],
            "anyOf": [{"type": "string"}, full, named],
        }
    cache = parts["DistillConfig"]["properties"]["cache"]
    cache["anyOf"].append({"const": False})
    engines = schema["properties"]["engines"]
    engines["items"] = {"anyOf": [{"type": "string"}, engines["items"]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **schema}
