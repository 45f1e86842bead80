"""Which nodes a runtime computes in INT8, and why a model has none."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from edgekd.errors import InputError
from edgekd.onnx.file import read_onnx
from edgekd.onnx.graph import node_label, subgraphs
from edgekd.quantization.prepare import Prepared
from edgekd.quantization.rewrites import all_nodes, element_types, inner_names, readers_of

QuantizationRuntime = Literal["cpu", "tensorrt"]

WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators whose arithmetic benefits from 8 bits by itself."""

# Those with an 8-bit kernel in ONNX Runtime's CPU provider. ConvTranspose, normalizations and
# TopK have none; Softmax has one, which is coarse where probabilities are small.
_CPU_WEIGHTED = {"Conv", "Gemm", "MatMul"}

_CPU_JOINED = {"Add", "Mul", "Concat", "GlobalAveragePool", "LeakyRelu", "Sigmoid"}

# These pass on 8 bits with the scale of their input, and do nothing to a float one.
_CPU_PASSED = {
    "Relu", "Clip", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool",
    "AveragePool", "Slice", "Resize", "Pad", "Split", "Gather",
}  # fmt: skip

# Where a mask's values end: values far below the others have no weight there.
_MASKED_BY = {"Softmax", "LogSoftmax", "Hardmax", "ArgMax", "TopK"}

_BEFORE_SOFTMAX = {*_CPU_PASSED, "Add", "Sub", "Mul", "Div", "Where", "Cast", "Identity", "Concat"}

# From here on a constant that is 0 elsewhere is a mask (Swin's is -100); a range, whose other end
# is this many times closer to 0, from where 8 bits cannot distinguish the other values.
_LEAST_MASK = 50.0

_LEAST_MASKED_RANGE = 1000.0

_ONE_SIDED = 20.0

# What a graph does to an image before its first layer.
_NORMALIZING = {"Add", "Sub", "Mul", "Div", "Cast"}


class NodeSelection:
    """The nodes of a prepared graph that a runtime computes in 8 bits.

    For TensorRT, Q/DQ is only at the inputs of weighted layers: it moves them through pooling
    and joins by itself, and fuses a convolution with the addition after it only in between.

    Args:
        graph: with the types of its tensors.
        runtime: whose 8 bits these are.
        keep: names of nodes that stay in float.
        without_range: tensors that 8 bits cannot represent, with the reason.
        masked: tensors with values far from the others, which nodes without weights do not
            round, and why.
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        runtime: QuantizationRuntime,
        keep: Collection[str],
        without_range: Mapping[str, str] | None = None,
        masked: Mapping[str, str] | None = None,
    ) -> None:
        self._graph, self._runtime, self._keep = graph, runtime, frozenset(keep)
        self._without, self._masked = without_range or {}, masked or {}
        self.weighted = _CPU_WEIGHTED if runtime == "cpu" else WEIGHTED
        """The operators whose arithmetic the runtime has in 8 bits."""
        self._weights = {t.name: t for t in graph.initializer}
        types = {t.name: t.data_type for t in graph.initializer} | element_types(graph)
        self._floats = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
        # Their values are model outputs before a following Relu or Clip.
        self._seen = inner_names(graph) | {value.name for value in graph.output}
        self._readers = readers_of(graph)
        self.all = self.select(())
        """Every node that can compute in 8 bits or pass them on, in graph order."""

    def reason(self, name: str) -> str | None:
        """The reason why a node cannot be in 8 bits because of its values."""
        node = next(n for n in self._graph.node if n.name == name)
        found = {**self._masked, **self._without}
        tensor = next((t for t in (*node.output, *node.input) if t in found), None)
        return None if tensor is None else f"{tensor!r} {found[tensor]}"

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that the search decides on: all but those that only pass 8 bits on."""
        chosen = (node for node in self._graph.node if node.name in self.all)
        return tuple(node.name for node in chosen if node.op_type not in _CPU_PASSED)

    def input_layers(self, float_nodes: Collection[str]) -> tuple[str, ...]:
        """The convolutions in 8 bits that read the model's inputs, when some nodes stay in float;
        none where nothing else would be in 8 bits."""
        seen = {value.name for value in self._graph.input}
        for node in self._graph.node:
            given = [name for name in node.input if name and name not in self._weights]
            if node.op_type in _CPU_PASSED | _NORMALIZING and given and seen.issuperset(given):
                seen.update(node.output)
        chosen = self.select(float_nodes)
        first = [
            node.name
            for node in self._graph.node
            if node.op_type == "Conv" and node.name in chosen and node.input[0] in seen
        ]
        return tuple(first) if self.select({*float_nodes, *first}) else ()

    def feeds_layers(self, name: str, chosen: Collection[str]) -> bool:
        """Whether all readers of a tensor are weighted nodes in 8 bits, directly or behind nodes
        that pass it on: they round it to 8 bits themselves."""
        readers = self._readers.get(name, ())
        return (
            bool(readers)
            and name not in self._seen
            and all(
                (reader.name in chosen and self._is_weighted(reader))
                or (reader.op_type in _CPU_PASSED and self.feeds_layers(reader.output[0], chosen))
                for reader in readers
            )
        )

    @property
    def tensors(self) -> set[str]:
        """The activations whose ranges any choice of nodes may need."""
        names = {
            name
            for node in self._graph.node
            if node.name in self.all
            for name in (*node.input, *node.output)
        }
        return {n for n in names if n in self._floats and n not in self._weights}

    def select(self, float_nodes: Collection[str]) -> frozenset[str]:
        """The nodes in 8 bits when some stay in float: weighted ones, and those between them.

        A join (Add, Concat) or a pass (Relu, pooling) is in 8 bits only where one of its inputs
        is: between float layers it would cost time and precision for nothing.
        """
        chosen: set[str] = set()
        quantized: set[str] = set()
        fixed = {*self._keep, *float_nodes}
        weighted = [n for n in self._graph.node if n.name not in fixed and self._is_weighted(n)]
        for node in weighted:
            chosen.add(node.name)
            quantized.update(node.input, node.output if self._runtime == "cpu" else ())
        if self._runtime == "cpu":
            for node in self._graph.node:
                if node.name in fixed or not self._follows(node, quantized):
                    continue
                # A mean of many numbers is finer than 8 bits: it is rounded only where it is
                # rounded anyway.
                pools = node.op_type == "GlobalAveragePool"
                if pools and not self.feeds_layers(node.output[0], chosen):
                    continue
                chosen.add(node.name)
                quantized.update(node.output)
        return frozenset(chosen)

    def _is_weighted(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in self.weighted:
            return False
        if node.domain not in ("", "ai.onnx") or node.output[0] not in self._floats:
            return False
        first, weight = node.input[0], node.input[1]
        if first in self._weights or first not in self._floats or weight not in self._floats:
            return False
        rounded = {first, weight, *(node.output if self._runtime == "cpu" else ())}
        if not rounded.isdisjoint(self._without):
            return False
        if weight not in self._weights:
            return node.op_type == "MatMul"
        if node.op_type == "MatMul" and len(self._weights[weight].dims) < 2:
            return False
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
            bias = self._weights.get(node.input[2])
            return bias is not None and len(bias.dims) == 1
        return True

    def _follows(self, node: onnx.NodeProto, quantized: set[str]) -> bool:
        if node.domain not in ("", "ai.onnx") or not node.input:
            return False
        inputs = node.input[:1] if node.op_type in _CPU_PASSED else node.input
        if node.op_type not in _CPU_PASSED | _CPU_JOINED or not any(n in quantized for n in inputs):
            return False
        if any(name and name not in self._floats for name in node.output):
            return False
        if any(name in self._without or name in self._masked for name in (*inputs, *node.output)):
            return False
        if node.op_type in ("Relu", "Clip"):
            # ONNX Runtime's quantizer removes these and lets the 8-bit range clip instead: wrong
            # where the unclipped value is read elsewhere or the range must not reach 0.
            return node.input[0] not in self._seen and self._spans_zero(node)
        return True

    def _spans_zero(self, node: onnx.NodeProto) -> bool:
        if node.op_type == "Relu":
            return True
        for index, sign in ((1, 1), (2, -1)):
            if len(node.input) <= index or not node.input[index]:
                continue
            bound = self._weights.get(node.input[index])
            if bound is None or sign * float(numpy_helper.to_array(bound)) > 0:
                return False
        return True


def masked_tensors(
    graph: onnx.GraphProto, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, str]:
    """Tensors with a mask's large numbers among others before a softmax, with the reason.

    8 bits over the range of -1e9 to 10 cannot distinguish the others. A tensor is masked
    where its maker adds a constant of 0 and of -50 or less, or where its range reaches 1,000 on
    one side and not a twentieth of it on the other.

    Args:
        graph: prepared.
        ranges: of its tensors on real samples.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    to_softmax: set[str] = set()
    for node in reversed(graph.node):
        follows = node.op_type in _BEFORE_SOFTMAX and not to_softmax.isdisjoint(node.output)
        if node.op_type in _MASKED_BY:
            to_softmax.update(node.input[:1])
        elif follows:
            to_softmax.update(node.input)
    masked: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in _BEFORE_SOFTMAX or to_softmax.isdisjoint(node.output):
            continue
        low, high = ranges.get(node.output[0], (0.0, 0.0))
        larger, other = max(abs(low), abs(high)), min(abs(low), abs(high))
        if node.op_type == "Add" and any(_is_mask_of_zeros(weights.get(n)) for n in node.input):
            masked[node.output[0]] = "has a mask added"
        elif low < 0 < high and larger >= _LEAST_MASKED_RANGE and larger > _ONE_SIDED * other:
            masked[node.output[0]] = f"ranges from {low:.3g} to {high:.3g}, as under a mask"
        elif any(name in masked for name in node.input):
            masked[node.output[0]] = "has a mask added"
    return masked


def _is_mask_of_zeros(tensor: onnx.TensorProto | None) -> bool:
    if tensor is None or tensor.data_type != TensorProto.FLOAT:
        return False
    values = numpy_helper.to_array(tensor)
    return bool(
        values.size
        and values.min() <= -_LEAST_MASK
        and np.all((values == 0) | (values <= -_LEAST_MASK))
    )


_OTHER_FLOATS = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.DOUBLE: "float64"}

STORED_IN_8_BITS = {"GRU", "RNN", "LSTM", "Gather", "Einsum"}
"""Operators whose weights the other methods store in 8 bits, if they do not compute in them."""

_NAMED = 3  # nodes, and reasons, that an error spells out


def nothing_to_quantize(
    prepared: Prepared,
    wanted: Collection[str],
    kept: Collection[str] = (),
    left: Mapping[str, str] | None = None,
) -> InputError:
    """The error for a model without a single node that the method can quantize.

    Args:
        prepared: the model.
        wanted: the operators that the method quantizes.
        kept: names of nodes listed in ``keep``.
        left: names of nodes whose values 8 bits cannot represent, with the reason.
    """
    graph = prepared.model.graph
    types = sorted({node.op_type for node in all_nodes(graph.node)})
    stored = {tensor.data_type for tensor in graph.initializer}
    hint = "leave the model in float"
    if others := sorted(STORED_IN_8_BITS.intersection(types) - set(wanted)):
        hint = (
            f"--method dynamic or weights-only stores the weights of {', '.join(others)} in 8 bits"
        )
    for kind, name in _OTHER_FLOATS.items():
        if kind in stored:
            hint = f"its weights are {name}: give the float32 model"
    reasons = _why_not(graph, wanted, kept, left or {})
    return InputError(
        f"nothing in this model can be quantized: {', '.join(sorted(wanted))} with constant "
        "float32 weights that are not kept in float are needed, "
        + (f"and of those it has {reasons}" if reasons else f"it has {', '.join(types) or 'none'}"),
        where=str(prepared.source),
        remedy=hint,
    )


def _why_not(
    graph: onnx.GraphProto,
    wanted: Collection[str],
    kept: Collection[str],
    left: Mapping[str, str],
) -> str:
    """The nodes of the wanted kinds, with the reason why they are excluded."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node.op_type for node in graph.node for name in node.output}
    reasons: dict[str, list[str]] = {}
    for node in graph.node:
        for body in subgraphs(node):
            for inner in all_nodes(body.node):
                if inner.op_type in wanted:
                    why = f"in a body of {node.op_type} {node.name!r}, which is not quantized"
                    reasons.setdefault(why, []).append(f"{inner.op_type} {inner.name!r}")
        if node.op_type not in wanted or not node.input:
            continue
        name = node.input[0 if node.op_type == "Gather" else 1]
        if node.name in kept:
            why = "kept in float"
        elif node.name in left:
            why = f"where {left[node.name]}"
        elif name not in weights:
            made = f"the result of {makers[name]}" if name in makers else "an input of the model"
            why = f"whose weights {name!r} are {made}, not a constant"
        elif weights[name].data_type != onnx.TensorProto.FLOAT:
            kind = onnx.TensorProto.DataType.Name(weights[name].data_type).lower()
            why = f"whose weights {name!r} are {kind}"
        else:
            shape = tuple(weights[name].dims)
            why = f"whose weights {name!r} {shape} or settings the method does not take"
        reasons.setdefault(why, []).append(f"{node.op_type} {node.name!r}")
    return "; ".join(
        ", ".join(nodes[:_NAMED]) + (" and others " if len(nodes) > _NAMED else " ") + why
        for why, nodes in list(reasons.items())[:_NAMED]
    )


LEAST_ELEMENTS = 64
_BYTES: dict[int, int] = {
    TensorProto.FLOAT: 4, TensorProto.DOUBLE: 8,
    TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2,
}  # fmt: skip
_PASSED_ON = {
    "Identity", "Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice",
    "Expand", "Tile", "Concat", "Split",
}  # fmt: skip


@dataclass(frozen=True)
class FloatNode:
    """A node that stays in float, the ``bytes`` of weights that it reads, and the reason.

    Weights are constants of 64 elements or more with two dimensions or more that are longer than
    1: biases, and scales of normalizations, are not counted. A tensor that several nodes read
    counts for the first.
    """

    node: str
    op: str
    bytes: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return asdict(self)


def float_nodes(path: Path, reasons: Mapping[str, str], default: str) -> tuple[FloatNode, ...]:
    """The nodes of a quantized file that read float weights, and those that have a reason to stay
    in float; in graph order, those in bodies of If, Loop and Scan and in functions too.

    Args:
        path: the file.
        reasons: by node name.
        default: the reason of a node that has none.

    Raises:
        InputError: as :func:`edgekd.onnx.file.read_onnx`.
    """
    model = read_onnx(path)
    counted: set[str] = set()
    rows = list(_rows(model.graph, {}, counted, ""))
    for function in model.functions:
        rows += _of_nodes(function.node, {}, counted, f"in function {function.name}")
    return tuple(
        FloatNode(label, op, size, reasons.get(label, inside or default))
        for label, op, size, inside in rows
        if size or label in reasons
    )


_Row = tuple[str, str, int, str]


def _rows(
    graph: onnx.GraphProto, outer: Mapping[str, frozenset[str]], counted: set[str], inside: str
) -> Iterable[_Row]:
    own = {tensor.name: _origin(tensor, tensor.name) for tensor in graph.initializer}
    return _of_nodes(graph.node, {**outer, **own}, counted, inside)


def _of_nodes(
    nodes: Iterable[onnx.NodeProto],
    weights: Mapping[str, frozenset[str]],
    counted: set[str],
    inside: str,
) -> Iterable[_Row]:
    """``weights``: tensor → the constants in it, each as ``name:bytes``."""
    known = dict(weights)
    for node in nodes:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    known[node.output[0]] = _origin(attribute.t, node.output[0])
            continue
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        read = frozenset[str]().union(*(known.get(name, frozenset()) for name in node.input))
        constant = all(not name or name in known for name in node.input[:1])
        if node.op_type in _PASSED_ON and read and constant:
            known.update(dict.fromkeys(node.output, read))
            continue
        new = read - counted
        counted |= new
        size = sum(int(origin.rpartition(":")[2]) for origin in new)
        yield node_label(node), node.op_type, size, inside
        for body in subgraphs(node):
            yield from _rows(body, known, counted, f"in a body of {node.op_type} {node.name!r}")


def _origin(tensor: onnx.TensorProto, name: str) -> frozenset[str]:
    count = math.prod(tensor.dims)
    long = sum(size > 1 for size in tensor.dims)
    if tensor.data_type not in _BYTES or count < LEAST_ELEMENTS or long < 2:
        return frozenset()
    return frozenset([f"{name}:{count * _BYTES[tensor.data_type]}"])
