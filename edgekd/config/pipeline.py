"""The model of a pipeline file, with its sections ``data``, ``export``, ``quantize``, ``engines``
and ``benchmark``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from edgekd.config.base import ConfigModel, Fraction, PositiveFloat, PositiveInt, Threads
from edgekd.config.budgets import GateConfig
from edgekd.config.loader import load_section
from edgekd.config.networks import StudentConfig, TeacherConfig
from edgekd.config.recipes import built_in_recipes, default_recipe
from edgekd.config.training import DistillConfig, LossTerm, Recipe, TrainConfig
from edgekd.errors import InputError
from edgekd.extension import installed_extensions, is_reference


class ExportConfig(ConfigModel):
    """Section ``export``: the ONNX file and the parity check against PyTorch, which is a hard gate
    at batch sizes 1, 2 and 7.
    """

    opset: Annotated[int, Field(ge=17, le=23)] = 18
    """ONNX opset."""
    absolute_tolerance: PositiveFloat = 1e-3
    """Largest absolute difference of an output."""
    relative_tolerance: PositiveFloat = 1e-3
    """Largest difference relative to the output's size."""
    argmax_agreement: Fraction = 1.0
    """Share of samples that must get the same class (classification only)."""
    samples: PositiveInt = 256
    """Number of validation samples compared."""


class QatConfig(TrainConfig):
    """Section ``quantize.qat``: how the student is trained further with fake quantization in it.
    All keys of a training, with these defaults.
    """

    epochs: PositiveInt = 3
    """Passes over the training split."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    losses: tuple[LossTerm, ...] | None = Field(default=None, min_length=1)
    """Loss terms. Left out: those of ``distill`` that compare outputs; the layers that other terms
    name no longer exist in the prepared graph.
    """


class QuantizeConfig(ConfigModel):
    """Section ``quantize``: what is tried in addition to the float32 student. The engines stage
    measures every candidate and selects one.
    """

    renamed: ClassVar[Mapping[str, str]] = {"half": "precision", "keep": "exclude_nodes"}

    int8: Literal["static", "dynamic", "weights-only", "qat"] | None = None
    """``static`` (calibrated), ``dynamic``, ``weights-only``, or ``qat`` (quantization-aware
    distillation; the extra ``qat``).
    """
    precision: Literal["fp16", "bf16"] | None = None
    """The same network in 16 bits: ``fp16`` or ``bf16``."""
    runtime: Literal["cpu", "tensorrt"] | None = None
    """Decides the scheme: asymmetric uint8 activations for ``cpu``, symmetric int8 with biases in
    float for ``tensorrt``. Left out, it follows the profile.
    """
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    """How the ranges of activations are determined."""
    samples: Annotated[int, Field(gt=1)] = 512
    """Number of validation samples calibrated on, at most."""
    max_drop: Annotated[float, Field(ge=0)] = 0.002
    """What the metric on the validation split may lose against float32: a difference of
    accuracies, or of an error (mae) a share of the error of the best constant prediction. Layers
    stay in float32 until it holds.
    """
    exclude_nodes: tuple[str, ...] = ()
    """Names of nodes that are never quantized."""
    select: Literal["measured", "smallest", "int8", "half", "float32"] = "measured"
    """Which of the files within the drop is shipped: ``measured`` is the one that meets the
    budgets best where it is timed. What is timed on this machine says little about another
    processor: ``int8``, ``half`` and ``float32`` force the file of that kind, ``smallest`` forces
    the smallest file.
    """
    qat: QatConfig = QatConfig()
    """The training of ``int8: qat``."""

    @model_validator(mode="after")
    def _something(self) -> QuantizeConfig:
        if self.int8 is None and self.precision is None:
            raise ValueError(
                "it requests nothing: add int8: static, dynamic, weights-only or qat, or "
                "precision: fp16 or bf16; or remove the section"
            )
        kind = {"int8": self.int8, "half": self.precision}
        if self.select in kind and kind[self.select] is None:
            key = "precision" if self.select == "half" else self.select
            raise ValueError(f"select: {self.select} insists on what is not made: add {key}: …")
        return self


class OnnxRuntimeConfig(ConfigModel):
    """An engine of kind ``onnxruntime``."""

    kind: Literal["onnxruntime"] = "onnxruntime"
    """ONNX Runtime."""
    providers: tuple[str, ...] | None = None
    """Execution providers, the preferred first. Left out: the profile's."""
    fallback: Literal["error", "allow"] = "error"
    """What happens when a node runs on another provider than the preferred one: ``error`` or
    ``allow``.
    """
    threads: Threads | None = None
    """Threads within an operator. Left out: the profile's."""
    optimization: Literal["disabled", "basic", "extended", "all"] = "all"
    """Level of ONNX Runtime's graph optimizations."""


class TensorRTConfig(ConfigModel):
    """An engine of kind ``tensorrt`` or ``tensorrt-rtx`` (the extra ``rtx``)."""

    kind: Literal["tensorrt", "tensorrt-rtx"]
    """``tensorrt`` builds on the device it runs on; ``tensorrt-rtx`` also builds without a GPU."""
    compute_capabilities: tuple[Annotated[str, Field(pattern=r"^\d+\.\d$")], ...] = ()
    """GPUs to build for, such as ``"8.6"`` (``tensorrt-rtx``)."""
    shapes: dict[
        str, tuple[tuple[PositiveInt, ...], tuple[PositiveInt, ...], tuple[PositiveInt, ...]]
    ] = Field(default_factory=dict)
    """Symbolic dimensions of an input as three shapes: smallest, usual, largest. Without it the
    sizes range from 1 over ``benchmark.batch_size`` to the larger of both.
    """
    workspace_mb: PositiveFloat | None = None
    """Memory that the builder may use. Left out: ``gate.memory.peak_mb``, else the limit of the
    profile.
    """
    version_compatible: bool = False
    """Whether the engine also loads in later releases."""
    hardware_compatible: bool = False
    """Whether the engine also loads on other GPUs (``tensorrt``)."""
    dla: Annotated[int, Field(ge=0)] | None = None
    """Core of a Jetson's DLA. Left out: the GPU."""
    gpu_fallback: bool = True
    """Whether layers that the DLA cannot run may run on the GPU."""


class ExternalEngineConfig(ConfigModel):
    """An engine of your own. ``kind`` may be its name at once: ``{kind: "mine:Compiler"}``."""

    kind: Literal["external"]
    """An engine that is not built in."""
    name: str
    """``package.module:name`` of an :class:`edgekd.engines.builder.EngineBuilder` or of what makes
    one, or an entry point of ``edgekd.engines``."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of what makes the engine."""
    runtime: Literal["cpu", "tensorrt"] = "cpu"
    """The INT8 scheme of the files it is given; see ``quantize.runtime``."""


EngineConfig = Annotated[
    OnnxRuntimeConfig | TensorRTConfig | ExternalEngineConfig, Field(discriminator="kind")
]
ENGINES_GROUP = "edgekd.engines"
"""The group of entry points."""
_BUILT_IN_ENGINES = ("onnxruntime", "tensorrt", "tensorrt-rtx", "external")


def expand_engine(entry: Any) -> Any:
    """An entry of ``engines`` as a mapping with a ``kind``, from a name or a short form."""
    engine = {"kind": entry} if isinstance(entry, str) else entry
    name = engine.get("kind") if isinstance(engine, dict) else None
    if isinstance(name, str) and (
        is_reference(name)
        or (name not in _BUILT_IN_ENGINES and installed_extensions(ENGINES_GROUP).get(name))
    ):
        return {**engine, "kind": "external", "name": name}
    return engine


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
    """Timed queries of each model in all processes, unless ``max_seconds`` are reached first."""
    max_seconds: PositiveFloat = 60.0
    """Limit of the time for all queries."""
    processes: PositiveInt = 5
    """Fresh processes at least, each of which opens the models anew. Up to three times as many are
    added while an interval contains a latency budget, or is wide where there is none.
    """


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
    """Where the benchmark runs: ``local``, ``ssh://user@host:port``, a name in the user's file of
    targets (``edgekd target list``), or ``package.module:name`` of a
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
        """The terms of the student's objective: those of the file, else the default ones.

        Raises:
            InputError: they are ``auto``, which the stage ``distill`` decides; see ``recipes``.
        """
        if self.distill.auto is not None:
            raise InputError(
                "the losses are auto: they are known when the stage distill has raced the recipes",
                where="distill.losses",
                remedy="name the losses, or run the stage distill first",
            )
        return self.recipes[0]

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The objectives that the student may be trained with: one, or the candidates of
        ``distill.losses: auto``, the default first.
        """
        losses = self.distill.losses
        if isinstance(losses, tuple):
            return (losses,)
        default = default_recipe(self.task, self.task_args)
        if losses is None:
            return (default,)
        own = losses.auto.recipes
        candidates = built_in_recipes(self.task, self.task_args) if own is None else own
        return (default, *(recipe for recipe in candidates if recipe != default))

    def with_losses(self, recipe: Recipe) -> PipelineConfig:
        """The same pipeline with these terms in ``distill.losses``."""
        return self.model_copy(
            update={"distill": self.distill.model_copy(update={"losses": tuple(recipe)})}
        )

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


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read and validate a pipeline file.

    Args:
        path: the YAML file.
        overrides: ``key.sub=value`` strings that replace values of the file (``--set``).

    Raises:
        InputError: anything in the file or the overrides is wrong; all problems are named.
    """
    return load_section(path, PipelineConfig, overrides=overrides)


SCHEMA = "edgekd.pipeline/1"


def pipeline_schema() -> dict[str, Any]:
    """The JSON schema of a pipeline file, with the short forms that YAML allows.

    A term, a scheme and an augmentation may be a bare name or ``{name: {arguments}}``, an engine a
    bare kind, the cache ``false``, and a list of a search's candidates one value.
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
    parts["AutoLosses"] = {"anyOf": [{"enum": ["auto", {"auto": None}]}, parts["AutoLosses"]]}
    cache = parts["DistillConfig"]["properties"]["cache"]
    cache["anyOf"].append({"const": False})
    engines = schema["properties"]["engines"]
    engines["items"] = {"anyOf": [{"type": "string"}, engines["items"]]}
    for part in ("CandidateSource", "DropLayersGrid", "PruneGrid"):
        for about in parts[part]["properties"].values():
            kinds = about.get("anyOf", [about])
            lists = [kind for kind in kinds if kind.get("type") == "array"]
            if lists:
                items = [kind["items"] for kind in lists]
                about["anyOf"] = [*(dict(kind) for kind in kinds), *items]
                about.pop("type", None)
        grid = parts[part]["properties"].get("grid")
        if grid is not None:
            grid.pop("additionalProperties")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **schema}
