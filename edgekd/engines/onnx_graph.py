"""Small questions to an ONNX graph: its opset, the graphs inside a node, what a node reads."""

from __future__ import annotations

import onnx


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators; 0 where the file names none."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    return int(opsets.get("", opsets.get("ai.onnx", 0)))


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The bodies and branches of a node."""
    found = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return found + [graph for attribute in node.attribute for graph in attribute.graphs]


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
