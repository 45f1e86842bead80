"""The nodes of a quantized file that still read float weights, with their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from edgekd.onnx.file import read_onnx
from edgekd.onnx.graph import node_label, subgraphs

LEAST_ELEMENTS = 64
_BYTES: dict[int, int] = {
    TensorProto.FLOAT: 4,
    TensorProto.DOUBLE: 8,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
}
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
    rows = [
        FloatNode(label, op, size, reasons.get(label, inside or default))
        for label, op, size, inside in [
            *_rows(model.graph, {}, counted, ""),
            *(
                row
                for function in model.functions
                for row in _of_nodes(function.node, {}, counted, f"in function {function.name}")
            ),
        ]
        if size or label in reasons
    ]
    return tuple(rows)


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
    count = 1
    for size in tensor.dims:
        count *= size
    long = sum(size > 1 for size in tensor.dims)
    if tensor.data_type not in _BYTES or count < LEAST_ELEMENTS or long < 2:
        return frozenset()
    return frozenset([f"{name}:{count * _BYTES[tensor.data_type]}"])
