"""From a float32 ONNX model to one that computes in 8 bits."""

from edgekd.engines.quantize.calibration import Calibration
from edgekd.engines.quantize.candidates import Runtime
from edgekd.engines.quantize.dynamic import quantize_dynamic
from edgekd.engines.quantize.static import StaticQuantizer
from edgekd.engines.quantize.weights_only import quantize_weights

__all__ = [
    "Calibration",
    "Runtime",
    "StaticQuantizer",
    "quantize_dynamic",
    "quantize_weights",
]
