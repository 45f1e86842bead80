"""How a model is made smaller: the settings of ``edgekd quantize``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Method = Literal["static", "dynamic", "weights-only", "fp16", "bf16"]


@dataclass(frozen=True)
class QuantizeSettings:
    """How a model is made smaller.

    Attributes:
        method: ``static`` needs samples; ``fp16`` finds with them what overflows.
        runtime: whose scheme static INT8 follows: ``cpu`` or ``tensorrt``.
        calibrator: how ``static`` finds the ranges of activations.
        samples: at most this many samples are calibrated on.
        max_drop: the largest allowed drop of the metric; ``static`` keeps layers in float32 until
        it
            is met. None accepts any.
        labels: the array with a class for each sample compared on, for the metric accuracy;
            without it the metric is agreement with float32.
        validation: file of the samples to compare on, all of them; None takes those of the
            calibration, which the result was fitted to.
        keep: names of nodes that are not quantized.
        threads: of ONNX Runtime.
        timing: compare latency on this machine.
        per_layer: list each layer's error.
    """

    method: Method = "static"
    runtime: Literal["cpu", "tensorrt"] = "cpu"
    calibrator: Literal["minmax", "entropy", "percentile"] = "minmax"
    samples: int = 512
    max_drop: float | None = None
    labels: str | None = None
    validation: str | Path | None = None
    keep: tuple[str, ...] = ()
    threads: int = 1
    timing: bool = True
    per_layer: bool = False
