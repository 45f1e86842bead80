"""The pipeline file: what a person writes for ``edgekd run``."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from edgekd.figure import Evidence

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are not changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Where samples come from and how they are split.

    ``source`` is a built-in name (``digits``, ``fashion-mnist``), ``npz``, ``image-folder`` or
    ``package.module:name``. ``test`` is never used to choose anything; ``validation`` is the
    fraction cut from the training split, stratified where there are labels. ``labelled`` below 1
    keeps that part of the training and validation labels, the rest is taught by the teacher alone.
    """

    source: str
    path: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    targets: tuple[str, ...] | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] | None = None
    labelled: Annotated[float, Field(gt=0, le=1)] = 1.0
    image_size: tuple[Count, Count] | None = None
    augment: tuple[str | dict[str, dict[str, Any]], ...] = ()
    download: bool = False


class Schedule(Section):
    """A number that goes from ``start`` to ``end`` and stays there.

    ``over`` is the part of the training that it takes: ``{start: 0, end: 8, over: 0.1}`` is a
    warm-up over the first tenth.
    """

    start: float
    end: float
    over: Annotated[float, Field(gt=0, le=1)] = 1.0
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, part: float) -> float:
        """Its value when ``part`` of the training is done, from 0 to 1."""
        share = min(1.0, part / self.over)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


class TrainConfig(Section):
    """How a network is trained; the same keys for teacher, student and distillation.

    ``warm_up`` is the part of the steps over which the learning rate rises from almost 0 (for
    ``constant`` and ``cosine``; ``one-cycle`` has its own). ``ema`` is the decay per step of an
    average of the weights, which is then what is validated and kept. ``accumulate`` batches make
    one step. ``patience`` stops when validation was not better for that many epochs.
    """

    epochs: Count = 10
    batch_size: Count = 128
    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: Positive = 2e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["constant", "cosine", "one-cycle"] = "one-cycle"
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Positive | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    accumulate: Count = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    patience: Count | None = None
    channels_last: bool = True
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class ModelConfig(Section):
    """A network: a built-in name or ``package.module:name``, and its arguments."""

    model: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)


TEACHERS_OWN = "teacher"
"""The student's ``model`` that is the teacher's network with the teacher's weights."""

HUBS = ("timm:", "transformers:")
"""Prefixes of model names whose networks come with their weights."""


class TeacherConfig(ModelConfig):
    """Trained here (``train``), loaded (``checkpoint``), or an ONNX file as a black box.

    A network of a hub (``transformers:NAME``) needs none of them: it is finished.
    """

    checkpoint: str | None = None
    onnx: str | None = None
    train: TrainConfig | None = None
    allow_pickle: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        origins = [k for k in ("checkpoint", "onnx", "train") if getattr(self, k) is not None]
        if not origins and self.model is not None and self.model.startswith(HUBS):
            return self
        if len(origins) != 1:
            found = " and ".join(origins) or "none of them"
            raise ValueError(f"give one of train, checkpoint or onnx; there is {found}")
        if self.onnx is None and self.model is None:
            raise ValueError(f"{origins[0]} needs a model to fill: add 'model: …'")
        if self.onnx is not None and self.model is not None:
            raise ValueError("an onnx teacher is a black box: remove 'model'")
        return self


class PruneConfig(Section):
    """Structured pruning: whole channels and neurons go, by the dependency graph of the network.

    ``ratio`` is the share of channels that goes, of each layer or (``scope: global``) of all
    together. ``round_to`` keeps widths a multiple of it. ``keep`` names layers that stay whole.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)]
    importance: Literal["magnitude", "taylor", "lamp", "random"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    round_to: Count = 1
    keep: tuple[str, ...] = ()


class StudentConfig(ModelConfig):
    """The network that is shipped. ``checkpoint`` starts it from given weights.

    ``model: teacher`` is the teacher's own network with its weights: to be pruned, or quantized
    as it is. ``prune`` needs weights to choose by: those of the teacher or of a checkpoint.
    """

    model: str
    checkpoint: str | None = None
    prune: PruneConfig | None = None

    @model_validator(mode="after")
    def _weights_to_prune(self) -> StudentConfig:
        if self.model == TEACHERS_OWN and self.checkpoint is not None:
            raise ValueError("'model: teacher' has the teacher's weights: remove 'checkpoint'")
        if self.model == TEACHERS_OWN and self.args:
            raise ValueError("'model: teacher' has the teacher's arguments: remove 'args'")
        if self.prune is not None and self.model != TEACHERS_OWN and self.checkpoint is None:
            raise ValueError(
                "pruning chooses by trained weights: add 'checkpoint: …', or 'model: teacher'"
            )
        return self


def _one_name(value: Any, kind: str, example: str, beside: tuple[str, ...] = ()) -> Any:
    """``name`` or ``{name: {arguments}, …}`` as written in YAML, as a mapping with the two keys."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict) or not value or "name" in value:
        return value
    names = [key for key in value if key not in beside]
    if len(names) != 1:
        found = ", ".join(map(str, names)) or "none"
        raise ValueError(f"{kind} names one thing, e.g. {example}; here: {found}")
    rest = {key: value[key] for key in beside if key in value}
    return {"name": names[0], "args": value[names[0]] or {}, **rest}


class LossTerm(Section):
    """One term of the objective: ``{soft_labels: {temperature: 4}, weight: 0.9}``.

    The arguments ``student`` and ``teacher`` name the layers it compares (a list of them for
    several pairs); without them it compares the primary outputs. The weight, and any number
    among the arguments, may be a :class:`Schedule`.
    """

    name: str
    args: dict[str, Any] = Field(default_factory=dict)
    weight: Annotated[float, Field(ge=0)] | Schedule = 1.0

    @field_validator("weight")
    @classmethod
    def _never_negative(cls, value: float | Schedule) -> float | Schedule:
        if isinstance(value, Schedule) and min(value.start, value.end) < 0:
            raise ValueError("a weight below 0 would drive the student away from the teacher")
        return value

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        example = "{soft_labels: {temperature: 4}, weight: 0.9}"
        return _one_name(value, "a loss term", example, ("weight",))


class SchemeConfig(Section):
    """Who teaches whom: ``offline``, or ``{online: {peers: 2}}``."""

    name: str = "offline"
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        return _one_name(value, "a scheme", "{online: {peers: 2}}")


class CacheConfig(Section):
    """The teacher's answers on disk, so that it answers each view of a sample once.

    ``views`` different augmentations of each sample are gone through in turn. ``top`` logits of
    each answer are kept; all of them when there are no more classes. ``folder`` is shared
    between runs; without it the answers lie in the run's folder.
    """

    views: Count = 8
    top: Count = 10
    folder: str | None = None


class DistillConfig(TrainConfig):
    """The student's training: the terms of the objective beside the training keys.

    ``baseline: true`` also trains the same student, from the same initial weights and over the
    same batches, without the teacher, so that the gap closed is measured.
    """

    losses: tuple[LossTerm, ...] | None = Field(default=None, min_length=1)
    """None: those of :meth:`PipelineConfig.loss_terms`."""
    scheme: SchemeConfig = SchemeConfig()
    cache: CacheConfig | None = CacheConfig()
    """None (in YAML also ``false``): the teacher answers each batch anew."""
    augment: tuple[str | dict[str, dict[str, Any]], ...] | None = None
    """The student's augmentation; None: that of ``data``, which the teacher is trained with."""
    epochs: Count = 20
    baseline: bool = True

    @model_validator(mode="before")
    @classmethod
    def _no_cache(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("cache") is False:
            return {**value, "cache": None}
        return value


class ExportConfig(Section):
    """The ONNX file. Tolerances are those of the parity check against PyTorch."""

    opset: Annotated[int, Field(ge=17, le=23)] = 18
    absolute_tolerance: Positive = 1e-3
    relative_tolerance: Positive = 1e-3
    argmax_agreement: Fraction = 1.0
    samples: Count = 256


class QatConfig(TrainConfig):
    """How the student is trained on after fake quantization was put into it.

    ``losses`` None takes those of ``distill`` that compare outputs; the layers that others name
    are not there any more in the prepared graph.
    """

    epochs: Count = 3
    learning_rate: Positive = 1e-3
    losses: tuple[LossTerm, ...] | None = Field(default=None, min_length=1)


class QuantizeConfig(Section):
    """What is tried beside the float32 student; the engines stage measures all and chooses.

    ``int8``: ``static`` (calibrated on ``samples`` validation samples), ``dynamic``,
    ``weights-only`` or ``qat`` (quantization-aware distillation, :class:`QatConfig`). ``half``:
    the same network in 16 bits. ``runtime`` decides the scheme: asymmetric uint8 activations for
    the CPU, symmetric int8 and float biases for TensorRT; None follows the profile.
    ``max_drop`` is what the metric on the validation split may lose against float32, in the
    metric's own unit; layers are kept in float32 until it holds. ``keep`` names nodes that are
    never quantized.
    """

    int8: Literal["static", "dynamic", "weights-only", "qat"] | None = None
    half: Literal["fp16", "bf16"] | None = None
    runtime: Literal["cpu", "tensorrt"] | None = None
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    samples: Annotated[int, Field(gt=1)] = 512
    max_drop: Annotated[float, Field(ge=0)] = 0.002
    keep: tuple[str, ...] = ()
    qat: QatConfig = QatConfig()

    @model_validator(mode="after")
    def _something(self) -> QuantizeConfig:
        if self.int8 is None and self.half is None:
            raise ValueError(
                "it asks for nothing: add int8: static, dynamic, weights-only or qat, or half: "
                "fp16 or bf16; or remove the section"
            )
        return self


class OnnxRuntimeConfig(Section):
    """ONNX Runtime. ``providers`` None means the profile's, the preferred first.

    A node that the preferred provider does not run falls back to another one; that is an error
    unless ``fallback: allow``.
    """

    kind: Literal["onnxruntime"] = "onnxruntime"
    providers: tuple[str, ...] | None = None
    fallback: Literal["error", "allow"] = "error"
    threads: Count | None = None
    optimization: Literal["disabled", "basic", "extended", "all"] = "all"


class TensorRTConfig(Section):
    """TensorRT, or TensorRT for RTX, which builds without a GPU for named ``compute_capabilities``.

    ``shapes`` gives symbolic dimensions of an input as ``[least, usual, largest]`` shapes; without
    it they go from 1 over ``benchmark.batch_size`` to the larger of both. ``workspace_mb`` None
    is the profile's ``budget.memory_mb``. ``dla`` is the core of a Jetson's DLA.
    """

    kind: Literal["tensorrt", "tensorrt-rtx"]
    compute_capabilities: tuple[Annotated[str, Field(pattern=r"^\d+\.\d$")], ...] = ()
    shapes: dict[str, tuple[tuple[Count, ...], tuple[Count, ...], tuple[Count, ...]]] = Field(
        default_factory=dict
    )
    workspace_mb: Positive | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    dla: Annotated[int, Field(ge=0)] | None = None
    gpu_fallback: bool = True


EngineConfig = Annotated[OnnxRuntimeConfig | TensorRTConfig, Field(discriminator="kind")]


class BenchmarkConfig(Section):
    """How long to measure, and against what."""

    against: Literal["teacher", "none"] = "teacher"
    batch_size: Count = 1
    min_queries: Count = 1000
    max_seconds: Positive = 60.0


class AccuracyBudget(Section):
    """The primary metric: an absolute bound, and the largest drop below the teacher.

    ``min`` is the floor of a metric that is better when higher (accuracy), ``max`` the ceiling
    of one that is better when lower (mae).
    """

    min: float | None = None
    max: float | None = None
    max_drop: float | None = None


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


class PipelineConfig(Section):
    """A whole pipeline file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
    task: str = "classification"
    task_args: dict[str, Any] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: DataConfig
    profile: str = "host"
    target: str = "local"
    teacher: TeacherConfig
    student: StudentConfig
    distill: DistillConfig = DistillConfig()
    export: ExportConfig = ExportConfig()
    quantize: QuantizeConfig | None = None
    engines: tuple[EngineConfig, ...] = (OnnxRuntimeConfig(),)
    benchmark: BenchmarkConfig = BenchmarkConfig()
    gate: GateConfig = GateConfig()

    @property
    def loss_terms(self) -> tuple[LossTerm, ...]:
        """The terms of the student's objective: the file's, or soft labels for the task.

        A tenth against the labels and nine tenths against the teacher; continuous outputs have
        no classes, so both are distances there.
        """
        if self.distill.losses is not None:
            return self.distill.losses
        if self.task in ("regression", "policy"):
            kind = {"kind": self.task_args.get("loss", "mse")}
            hard = LossTerm(name="hard_targets", args=kind, weight=0.1)
            soft = LossTerm(name="regression", args=kind)
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

    @model_validator(mode="before")
    @classmethod
    def _short_engines(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("engines"), list):
            engines = [{"kind": e} if isinstance(e, str) else e for e in value["engines"]]
            return {**value, "engines": engines}
        return value
