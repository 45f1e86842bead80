"""Tensors that one 8-bit scale cannot represent: values of different ranges joined."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgekd.onnx.inference import BatchedModel, is_ragged
from edgekd.onnx.output_parts import APART, find_parts
from edgekd.onnx.samples import Array, Samples
from edgekd.quantization.ranges import Ranges

OUTPUT_RATIO = 4.0
"""Ratio of a Concat's input ranges above which it stays in float where no layer reads it: that
costs next to nothing, and the smaller part would lose two of its 8 bits."""
INNER_RATIO = 16.0
"""The ratio where a layer reads it, which then stays in float too: a part may have 16 of 256
steps.
"""

_MOVED = {
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather",
    "Identity", "Pad", "Resize", "MaxPool", "AveragePool", "Relu", "Clip", "LeakyRelu",
}  # fmt: skip
_JOINED = {"Concat", "Add", "Sub", "Mul", "Div"}
_LOOKED_AT = 16  # samples whose outputs show the scales of an output


@dataclass(frozen=True)
class MixedRange:
    """A node whose result has parts of different ranges."""

    node: str
    smallest: float
    largest: float
    """The largest absolute value of the parts with the smallest and the largest."""
    floats: tuple[str, ...]
    """All nodes that stay in float for it: this one, the nodes that pass its result on, and the
    layers that read it."""

    def __str__(self) -> str:
        return f"{self.node} (±{self.smallest:.3g} next to ±{self.largest:.3g})"


def mixed_joins(
    graph: onnx.GraphProto, ranges: Ranges, weighted: Collection[str]
) -> tuple[MixedRange, ...]:
    """The Concats that would bring inputs of different ranges under one scale, in graph order.

    Args:
        graph: prepared, see :func:`edgekd.quantization.prepare.prepare_onnx`.
        ranges: the (lowest, highest) value of activations, calibrated.
        weighted: operators of layers with weights.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type != "Concat":
            continue
        # Zeros fit any scale.
        sizes = [size for name in node.input if (size := _size(name, ranges, constants))]
        if len(sizes) < 2:
            continue
        tail, layers = _behind(node, readers, weighted)
        if max(sizes) > (INNER_RATIO if layers else OUTPUT_RATIO) * min(sizes):
            names = (node.name, *tail, *layers)
            found.append(MixedRange(node.name, min(sizes), max(sizes), names))
    return tuple(found)


def mixed_outputs(prepared: Path, samples: Samples) -> tuple[MixedRange, ...]:
    """The nodes that make outputs whose channels are of different ranges without a Concat.

    Args:
        prepared: the float model.
        samples: its real inputs; the first are run.

    Raises:
        InputError, StageError: as :class:`edgekd.onnx.inference.BatchedModel`.
    """
    model = BatchedModel(prepared, samples, optimization="disabled", batch=_LOOKED_AT)
    answers = {
        name: values
        for name, values in model.predict(next(samples.batches(model.size))).items()
        if not is_ragged(values)
    }
    graph = onnx.load(str(prepared), load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    found = []
    for name, parts in find_parts(prepared, samples, answers, model.outputs.axes).items():
        if answers[name].dtype.kind != "f":
            continue
        flat = np.abs(answers[name].reshape(len(answers[name]), -1))
        peaks = [_peak(flat[:, part.positions]) for part in parts if part.positions is not None]
        peaks = [peak for peak in peaks if peak > 0]
        if len(peaks) < 2 or max(peaks) < APART * min(peaks):
            continue
        chain = []
        node = makers.get(name)
        while node is not None and node.op_type in _MOVED:
            chain.append(node.name)
            node = makers.get(node.input[0])
        if node is not None and node.op_type != "Concat":
            names = (node.name, *reversed(chain))
            found.append(MixedRange(node.name, min(peaks), max(peaks), names))
    return tuple(found)


def _peak(values: Array) -> float:
    return float(values[np.isfinite(values)].max(initial=0.0))


def _size(name: str, ranges: Ranges, constants: Mapping[str, onnx.TensorProto]) -> float:
    """The largest absolute value of a tensor; 0 where it is not known."""
    if name in ranges:
        return max(map(abs, ranges[name]))
    if name not in constants:
        return 0.0
    values = numpy_helper.to_array(constants[name])
    return _peak(np.abs(values)) if values.dtype.kind == "f" else 0.0


def _behind(
    node: onnx.NodeProto,
    readers: Mapping[str, Sequence[onnx.NodeProto]],
    weighted: Collection[str],
) -> tuple[list[str], list[str]]:
    """The nodes that pass a result on with its ranges, and the layers that read it there."""
    tail: dict[str, None] = {}
    layers: dict[str, None] = {}
    todo = [node]
    while todo:
        for name in todo.pop().output:
            for reader in readers.get(name, ()):
                if reader.op_type in weighted:
                    layers.setdefault(reader.name)
                elif reader.op_type in _MOVED | _JOINED and reader.name not in tail:
                    tail.setdefault(reader.name)
                    todo.append(reader)
    return list(tail), list(layers)
