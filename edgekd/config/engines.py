"""Sections ``export``, ``quantize`` and ``engines``: the deployed files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from edgekd.config.base import ConfigModel, Fraction, PositiveFloat, PositiveInt
from edgekd.config.training import LossTerm, TrainConfig
from edgekd.entry_points import installed_extensions
from edgekd.extension import is_reference


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
    budgets best where it is timed; ``int8``, ``precision`` and ``float32`` force one kind (what
    is timed on this machine says little about another processor), ``smallest`` on the smallest
    file.
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
        if self.select in ("int8", "half") and getattr(self, self.select) is None:
            raise ValueError(
                f"select: {self.select} insists on what is not made: add {self.select}: …"
            )
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
    threads: PositiveInt | None = None
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
    """Memory that the builder may use. Left out: the profile's ``budget.memory_mb``."""
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


def expand_engine(entry: Any) -> Any:
    """An entry of ``engines`` as a mapping with a ``kind``, from a name or a short form."""
    engine = {"kind": entry} if isinstance(entry, str) else entry
    name = engine.get("kind") if isinstance(engine, dict) else None
    if isinstance(name, str) and (
        is_reference(name) or (name not in _BUILT_IN and installed_extensions(GROUP).get(name))
    ):
        return {**engine, "kind": "external", "name": name}
    return engine


GROUP = "edgekd.engines"
"""The group of entry points."""
_BUILT_IN = ("onnxruntime", "tensorrt", "tensorrt-rtx", "external")
