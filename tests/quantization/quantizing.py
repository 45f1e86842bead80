"""Static INT8 of a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgekd.onnx.samples import ArraySamples
from edgekd.quantization.static import StaticQuantizer


def quantizer(
    path: Path, arrays: dict[str, np.ndarray], folder: Path, runtime: str = "cpu", **settings: Any
) -> StaticQuantizer:
    """Calibrated on the arrays; its scratch files are in ``folder``."""
    return StaticQuantizer(
        path, ArraySamples(arrays), folder / "scratch", runtime=runtime, **settings
    )


def quantized(
    path: Path, arrays: dict[str, np.ndarray], folder: Path, **settings: Any
) -> tuple[StaticQuantizer, Path]:
    """The quantizer and the file that it wrote in ``folder``."""
    made = quantizer(path, arrays, folder, **settings)
    made.write(folder / "int8.onnx")
    return made, folder / "int8.onnx"
