"""What is known about TensorRT without asking it: opsets by version, remedies for refusals."""

from __future__ import annotations

import importlib.util
import re

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Library → the module that it is imported as."""

OPSETS = {(10, 0): (9, 20), (10, 15): (9, 24), (11, 0): (9, 25)}
"""TensorRT version → the ONNX opsets that its parser takes, as its documentation states: of 10.0
and 10.15 onnx-tensorrt's docs/operators.md, of 11.x NVIDIA's ONNX opset guide."""

OTHERWISE = "replace the operation in the network and export again, or run it in ONNX Runtime"

_REMEDIES = {
    r"zero point|Int32 but must|DynamicQuantizeLinear|MatMulInteger|ConvInteger|QLinear": (
        "quantize the float model for TensorRT (symmetric int8, biases in float): "
        "edgekd quantize MODEL.onnx --calibration DATA -o OUT.onnx --for tensorrt"
    ),
    r"^(NonZero|Unique|NonMaxSuppression|Compress)\b": (
        "the shape of its answer depends on values: select a fixed number of elements (TopK), "
        "or leave this step to the program around the model"
    ),
    r"^(Loop|Scan|If|Sequence\w*)\b": "export the model without control flow and lists",
    r"STRING|^String": "strings stay outside: turn them into numbers before the model",
    r"[Pp]lugin not found": (
        "the operation is not one of ONNX: export the model without it, or run it where its "
        "plugin is installed"
    ),
}


def installed_libraries() -> tuple[str, ...]:
    """Which of TensorRT and TensorRT for RTX can be imported here."""
    return tuple(name for name, module in LIBRARIES.items() if importlib.util.find_spec(module))


def takes_opset(version: str, opset: int) -> bool | None:
    """Whether a TensorRT version takes an opset.

    For a version between two documented ones, only what both have in common is claimed; None
    where nothing documented tells.
    """
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    ours = (numbers[0], numbers[1] if len(numbers) > 1 else 0) if numbers else (0, 0)
    older = [span for known, span in OPSETS.items() if known <= ours]
    newer = [span for known, span in OPSETS.items() if known >= ours]
    if older and older[-1][0] <= opset <= older[-1][1]:
        return True
    if newer and opset > newer[0][1]:
        return False
    if older and opset < older[-1][0]:
        return False
    return None


def remedy_for(op: str, message: str) -> str:
    """What to do about a node that TensorRT's parser refuses."""
    said = f"{op} {message}"
    return next((remedy for key, remedy in _REMEDIES.items() if re.search(key, said)), OTHERWISE)
