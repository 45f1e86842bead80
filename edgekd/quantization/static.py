"""Static INT8: activations and weights in 8 bits, scales fixed by calibration, as Q/DQ."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata

from edgekd.config.host import saturates
from edgekd.onnx.inference import BatchedModel, is_ragged
from edgekd.onnx.output_parts import APART, find_parts
from edgekd.onnx.samples import Array, Samples
from edgekd.quantization.calibration import Calibration, Ranges, calibrate
from edgekd.quantization.node_selection import (
    NodeSelection,
    QuantizationRuntime,
    masked_tensors,
    nothing_to_quantize,
)
from edgekd.quantization.prepare import prepare_onnx, save_onnx
from edgekd.quantization.rewrites import (
    copy_shared_weights,
    drop_unused,
    element_types,
    free_float_values,
    pool_spatial_means,
    readers_of,
    set_aside_outputs,
)


class StaticQuantizer:
    """Prepares and calibrates a float model once; writes quantized ones from it, many if need be.

    ``cpu``: uint8 activations with a zero point, int8 weights per channel, int32 biases: the
    form that ONNX Runtime's CPU kernels are fastest with, on ARM too. Weights have 7 bits where
    this machine's processor would overflow otherwise (:func:`edgekd.config.host.saturates`;
    ``reduce_range`` states it for another machine). ``tensorrt``: int8 activations and weights,
    zero points 0, Q/DQ at the inputs of weighted layers only, biases in float, as its parser
    demands.

    Args:
        onnx_path: a float32 model.
        samples: its real inputs, at least two.
        scratch: a folder that outlives the quantizer.
        keep: names of nodes that stay in float in every file.
        threads: of the calibration's sessions.
        reduce_range: weights of 7 bits; None follows this machine's processor.

    Raises:
        InputError: the model is broken, quantized already, too old, or has nothing to quantize;
            ``keep`` names no node; or the samples are too few, lack an input or give NaN.
        StageError: the prepared model's outputs differ from the file's.
    """

    def __init__(
        self,
        onnx_path: Path,
        samples: Samples,
        scratch: Path,
        *,
        runtime: QuantizationRuntime,
        calibration: Calibration = "minmax",
        keep: Collection[str] = (),
        threads: int = 1,
        reduce_range: bool | None = None,
    ) -> None:
        self._prepared = prepare_onnx(onnx_path, samples, threads)
        graph = self._prepared.model.graph
        kept = self.kept = self._prepared.named(keep)
        """The nodes of ``keep``, by their names in the written model."""
        if runtime == "cpu":
            plain = NodeSelection(graph, runtime, kept)
            pool_spatial_means(
                self._prepared.model,
                lambda mean: (
                    mean.name not in kept and plain.feeds_layers(mean.output[0], plain.all)
                ),
            )
        self._selection = NodeSelection(graph, runtime, kept)
        if not self._selection.all:
            raise nothing_to_quantize(self._prepared, self._selection.weighted, kept)
        self.runtime = runtime
        self._reduce_range = runtime == "cpu" and (
            saturates() if reduce_range is None else reduce_range
        )
        self.prepared = scratch / "prepared.onnx"
        """The float model that is quantized: same outputs as the file, batch norm folded."""
        scratch.mkdir(parents=True, exist_ok=True)
        save_onnx(self._prepared.model, self.prepared)
        found = calibrate(
            self.prepared,
            self._selection.tensors | _joined(graph),
            samples,
            scratch,
            calibration=calibration,
            symmetric=runtime == "tensorrt",
            threads=threads,
            source=onnx_path,
        )
        self.ranges = found.ranges
        """(lowest, highest) value covered, by activation."""
        wanted = self._selection
        self._without, self._masked = found.without, masked_tensors(graph, found.ranges)
        self._selection = self._among(kept)
        reasons = {name: self._selection.reason(name) for name in wanted.nodes}
        self.left_in_float = {
            name: reason
            for name, reason in reasons.items()
            if reason is not None and name not in self._selection.all
        }
        """Nodes that cannot be in 8 bits because of their values, with the reason."""
        if not self._selection.all:
            weighted = self._selection.weighted
            raise nothing_to_quantize(self._prepared, weighted, kept, self.left_in_float)
        self.mixed: tuple[MixedRange, ...] = ()
        """Nodes that stay in float because one 8-bit scale would lose a part of them."""
        self._leave_mixed_in_float(samples, kept)

    def _among(self, kept: Collection[str]) -> NodeSelection:
        """What can be in 8 bits when ``kept`` stays in float."""
        graph = self._prepared.model.graph
        return NodeSelection(graph, self.runtime, kept, self._without, self._masked)

    def _leave_mixed_in_float(self, samples: Samples, kept: Collection[str]) -> None:
        graph, before = self._prepared.model.graph, self._selection
        found = mixed_joins(graph, self.ranges, before.weighted)
        if self.runtime == "cpu":
            found += mixed_outputs(self.prepared, samples)
        found = tuple(mixed for mixed in found if before.all & set(mixed.floats))
        floats = {name for mixed in found for name in mixed.floats}
        after = self._among({*kept, *floats})
        # A model with no quantizable node is still written; the comparison shows it.
        if found and after.all:
            self._selection, self.mixed = after, found

    @property
    def mixed_nodes(self) -> tuple[str, ...]:
        """Names of all nodes that stay in float for :attr:`mixed`."""
        return tuple(dict.fromkeys(name for mixed in self.mixed for name in mixed.floats))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that can be quantized, in graph order."""
        return self._selection.nodes

    def input_layers(self, float_nodes: Collection[str] = ()) -> tuple[str, ...]:
        """Names of the convolutions in 8 bits that read the model's inputs, where others follow.

        With the few channels of an image they can be slower in 8 bits than in float32, and have
        few weights to gain on: a file with them in float32 may serve better.

        Args:
            float_nodes: names of nodes that stay in float32, in addition to ``keep``.
        """
        return self._selection.input_layers(self._prepared.named(float_nodes))

    @property
    def constant(self) -> tuple[str, ...]:
        """Activations that are constant on all samples: their ranges are meaningless."""
        return tuple(name for name, (low, high) in self.ranges.items() if low == high)

    def write(self, out: Path, float_nodes: Collection[str] = ()) -> None:
        """Write the Q/DQ model with the calibrated ranges; nothing is run.

        Args:
            out: where to write.
            float_nodes: names of nodes that stay in float32 in this file, in addition to ``keep``.

        Raises:
            InputError: a name is unknown, or no node is left to quantize.
            StageError: the file cannot be written.
        """
        floats = self._prepared.named(float_nodes)
        chosen = self._selection.select(floats)
        if not chosen:
            raise nothing_to_quantize(self._prepared, self._selection.weighted, floats)
        model = self._prepared.copy()
        copy_shared_weights(model.graph, chosen)
        put_outputs_back = set_aside_outputs(model.graph)
        # Tells ONNX Runtime that the types are inferred: preparation did that.
        add_infer_metadata(model)
        nodes = [node for node in model.graph.node if node.name in chosen]
        types = {node.op_type for node in nodes}
        cpu = self.runtime == "cpu"
        quantizer = QDQQuantizer(
            model,
            True,
            self._reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8 if cpu else QuantType.QInt8,
            self._tensor_ranges(),
            sorted(chosen),
            [],
            sorted(types),
            {
                "WeightSymmetric": True,
                "ActivationSymmetric": not cpu,
                "QuantizeBias": cpu,
                "OpTypesToExcludeOutputQuantization": [] if cpu else sorted(types),
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": -1},
                "TensorQuantOverrides": _one_scale_each(model.graph, nodes),
            },
        )
        quantizer.quantize_model()
        written = quantizer.model.model
        put_outputs_back(written.graph)
        free_float_values(written.graph, self._prepared.model.graph, chosen)
        quantizer.model.topological_sort()
        drop_unused(written.graph)
        self._prepared.write(written, out)

    def _tensor_ranges(self) -> TensorsData:
        # A fresh one for each file: the quantizer narrows those before a Relu in place.
        return TensorsData(
            CalibrationMethod.MinMax,
            {
                name: TensorData(lowest=np.float32(low), highest=np.float32(high))
                for name, (low, high) in self.ranges.items()
            },
        )


def _one_scale_each(
    graph: onnx.GraphProto, nodes: Collection[onnx.NodeProto]
) -> dict[str, list[dict[str, Any]]]:
    """The weights of MatMul with more than two dimensions: no runtime has a product of a stack of
    matrices with a scale for each column."""
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    names = {name for node in nodes if node.op_type == "MatMul" for name in node.input}
    return {n: [{"quant_type": QuantType.QInt8}] for n in sorted(names) if ranks.get(n, 0) > 2}


def _joined(graph: onnx.GraphProto) -> set[str]:
    """The activations that Concats join, whose ranges show whether one scale fits them all."""
    types = element_types(graph)
    weights = {tensor.name for tensor in graph.initializer}
    joined = {name for n in graph.node if n.op_type == "Concat" for name in n.input} - weights
    return {name for name in joined if types.get(name) == onnx.TensorProto.FLOAT}


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
    readers = readers_of(graph)
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
    outputs = {
        name: values
        for name, values in model.predict(next(samples.batches(model.size))).items()
        if not is_ragged(values)
    }
    graph = onnx.load(str(prepared), load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    found = []
    for name, parts in find_parts(prepared, samples, outputs, model.outputs.axes).items():
        if outputs[name].dtype.kind != "f":
            continue
        flat = np.abs(outputs[name].reshape(len(outputs[name]), -1))
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
