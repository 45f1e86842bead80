"""The graph of an ONNX model: nodes, subgraphs, precisions, and layers as operators name them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import onnx

from edgekd.onnx.file import read_onnx


class Precisions(TypedDict):
    """The reduced precisions of TensorRT that a model's own types require."""

    half: bool
    int8: bool


def precisions_of(path: Path) -> Precisions:
    """Whether a model has float16 weights, and whether it is quantized (Q/DQ).

    For :func:`edgekd.onnx.session.default_options`. Weights in Constant nodes, subgraphs and
    functions count.

    Raises:
        InputError: as :func:`edgekd.onnx.file.read_onnx`.
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
    """The version of the standard ONNX operators; 0 where the file has none."""
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
        graph = model.graph  # too large, or inference failed: the shapes in the file
    return {
        value.name: value.type.tensor_type.elem_type
        for inner in _graphs(graph)
        for value in (*inner.value_info, *inner.input, *inner.output)
    }


def node_label(node: onnx.NodeProto) -> str:
    """A node's name; without one, its operator and output."""
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


_HALVES = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}

_SHOWN = 3  # operators of one layer that are spelt out


class LayerGraph:
    """Which node of a float model makes a tensor, and what that is made from.

    ``order`` has all activations, the inputs first; ``maker`` the node of each that is no input.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
        filled = {tensor.name for tensor in graph.initializer}
        self.order = [value.name for value in graph.input if value.name not in filled]
        self.maker: dict[str, onnx.NodeProto] = {}
        live = set(self.order)
        for node in graph.node:
            # A tensor that no input reaches is a weight in disguise, not an activation.
            if live & reads(node):
                made = [name for name in node.output if name]
                live.update(made)
                self.maker |= dict.fromkeys(made, node)
                self.order += made

    def weighted(self, nodes: Sequence[onnx.NodeProto]) -> str:
        """The name of the first node with a matrix of weights, else of the last one."""
        with_weights = [node for node in nodes if self._matrices & set(node.input)]
        node = next(iter(with_weights or nodes[-1:]), onnx.NodeProto())
        return node.name or next(iter(node.output), "")

    def between(self, tensor: str, known: Container[str]) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that make a tensor, in graph order, and the known tensors they start from."""
        needed: set[str] = set()
        sources: set[str] = set()
        todo = [tensor]
        while todo:
            name = todo.pop()
            if name not in self.maker or name in needed:
                continue
            needed.add(name)
            taken = sorted(reads(self.maker[name]))
            sources.update(other for other in taken if other in known)
            todo += [other for other in taken if other not in known]
        nodes: dict[str, onnx.NodeProto] = {}
        for name in self.order:
            if name in needed:
                node = self.maker[name]
                nodes.setdefault(next(out for out in node.output if out), node)
        return list(nodes.values()), sources


def seen_tensors(graph: onnx.GraphProto) -> dict[str, str]:
    """By tensor: the one that its consumers read, after Q and DQ or a cast to 16 bits, which may
    be cast back again."""
    seen: dict[str, str] = {}
    quantized: dict[str, str] = {}
    halved: dict[str, str] = {}
    for node in graph.node:
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        if node.op_type == "QuantizeLinear":
            quantized[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear" and node.input[0] in quantized:
            seen.setdefault(quantized[node.input[0]], node.output[0])
        elif node.op_type == "Cast" and to in _HALVES:
            if seen.setdefault(node.input[0], node.output[0]) == node.output[0]:
                halved[node.output[0]] = node.input[0]
        elif node.op_type == "Cast" and node.input[0] in halved:
            seen[halved[node.input[0]]] = node.output[0]
    return seen


def operators(types: Sequence[str]) -> str:
    """The operators of a layer in a few words; ``Input`` for no node."""
    if len(types) > _SHOWN:
        return f"{types[0]}+…+{types[-1]} ({len(types)} nodes)"
    return "+".join(types) or "Input"
