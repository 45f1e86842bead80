"""Small questions to an ONNX graph: its opset, the graphs inside a node, what a node reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import onnx

from edgekd.engines.onnx_file import read_onnx


class Precisions(TypedDict):
    """What of TensorRT's precisions a model's own numbers ask for."""

    half: bool
    int8: bool


def precisions_of(path: Path) -> Precisions:
    """Whether a model holds float16 weights, and whether it is quantized (Q/DQ).

    For :func:`edgekd.engines.session.default_options`. Weights in Constant nodes, subgraphs and
    functions count.

    Raises:
        InputError: as :func:`edgekd.engines.onnx_file.read_onnx`.
    """
    model = read_onnx(path)
    graphs = list(_graphs(model.graph))
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    tensors = [tensor for graph in graphs for tensor in graph.initializer]
    tensors += [a.t for node in nodes for a in node.attribute if node.op_type == "Constant"]
    return {
        "half": any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in tensors),
        "int8": any(node.op_type == "DequantizeLinear" for node in nodes),
    }


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _graphs(inner)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators; 0 where the file names none."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    return int(opsets.get("", opsets.get("ai.onnx", 0)))


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The bodies and branches of a node."""
    found = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return found + [graph for attribute in node.attribute for graph in attribute.graphs]


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element types of tensors by name, inferred where that can be done."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except (ValueError, RuntimeError, onnx.shape_inference.InferenceError):
        graph = model.graph  # too large, or not to be inferred: what the file says
    return {
        value.name: value.type.tensor_type.elem_type
        for inner in _graphs(graph)
        for value in (*inner.value_info, *inner.input, *inner.output)
    }


def node_label(node: onnx.NodeProto) -> str:
    """A node's name; where it has none, what it is and gives."""
    return str(node.name) or f"{node.op_type} → {', '.join(node.output)}"


def reads(node: onnx.NodeProto) -> set[str]:
    """The tensors that a node reads, those of the outer graph in its subgraphs included."""
    names = {name for name in node.input if name}
    for graph in subgraphs(node):
        made = {name for inner in graph.node for name in inner.output}
        made |= {value.name for value in graph.input}
        needed = {name for inner in graph.node for name in reads(inner)}
        names |= (needed | {value.name for value in graph.output}) - made
    return names
