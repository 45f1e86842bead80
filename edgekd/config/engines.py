"""Sections ``export``, ``quantize`` and ``engines``: the files that are run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgekd.config.section import Count, Fraction, Positive, Section
from edgekd.config.training import LossTerm, TrainConfig


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
    ``max_drop`` is what the metric on the validation split may lose against float32: a difference
    of accuracies, and of an error (mae) a share of the error that the best constant answer has;
    layers are kept in float32 until it holds. ``keep`` names nodes that are never quantized.

    ``select`` says which of the files within the drop is shipped: ``measured`` is the one that
    serves the budgets best where it is timed; ``int8``, ``half`` and ``float32`` insist on a kind
    (what this machine times says little of another processor), ``smallest`` on the smallest.
    """

    int8: Literal["static", "dynamic", "weights-only", "qat"] | None = None
    half: Literal["fp16", "bf16"] | None = None
    runtime: Literal["cpu", "tensorrt"] | None = None
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    samples: Annotated[int, Field(gt=1)] = 512
    max_drop: Annotated[float, Field(ge=0)] = 0.002
    keep: tuple[str, ...] = ()
    select: Literal["measured", "smallest", "int8", "half", "float32"] = "measured"
    qat: QatConfig = QatConfig()

    @model_validator(mode="after")
    def _something(self) -> QuantizeConfig:
        if self.int8 is None and self.half is None:
            raise ValueError(
                "it asks for nothing: add int8: static, dynamic, weights-only or qat, or half: "
                "fp16 or bf16; or remove the section"
            )
        if self.select in ("int8", "half") and getattr(self, self.select) is None:
            raise ValueError(
                f"select: {self.select} insists on what is not made: add {self.select}: …"
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
