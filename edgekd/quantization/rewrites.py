"""Rewrites of a graph before quantization: shared weights copied, spatial means as pools.

It replaces a tensor by its 8-bit version for all readers, so that a node which stays in float
would still compute from rounded weights and activations.

PyTorch writes global average pooling as ReduceMean, which ONNX Runtime computes in float between
a DequantizeLinear and a QuantizeLinear, after turning the image from channels last to first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, MutableSequence

import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.onnx.graph import opset_of
from edgekd.quantization.prepare import drop_unused, inner_names

# These compute float outputs from 8-bit inputs at no cost, so an output of the model need not be
# rounded.
_FLOAT_OUTPUT = {"Gemm", "MatMul"}

BIAS = 2
"""The position of the bias among the inputs of Conv, ConvTranspose and Gemm."""

_PAIR = {"QuantizeLinear", "DequantizeLinear"}


def copy_shared_weights(graph: onnx.GraphProto, chosen: Collection[str]) -> None:
    """Give each weight that float nodes or subgraphs read too a copy for the quantized ones, and
    one for each kind of quantized node, as kinds differ in the axis of their scales. A bias gets
    one for each node, as its scale is that of the node's weights: the quantizer's own copies may
    take the name of another tensor."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    elsewhere = inner_names(graph) | {value.name for value in graph.output}
    elsewhere |= {name for node in graph.node if node.name not in chosen for name in node.input}
    taken = {*weights, *elsewhere, *(name for node in graph.node for name in node.output)}
    taken |= {value.name for value in graph.input}
    owners: dict[str, str] = {}
    copies: dict[tuple[str, str], str] = {}
    for node in graph.node:
        if node.name not in chosen:
            continue
        kind = node.op_type + "".join(
            f".{a.name}{a.i}" for a in node.attribute if a.name == "transB"
        )
        for index, name in enumerate(node.input):
            if name not in weights:
                continue
            owner = node.name if index == BIAS else kind
            if name not in elsewhere and owners.setdefault(name, owner) == owner:
                continue
            if (name, owner) not in copies:
                copies[name, owner] = free_name(f"{name}.{owner}", taken)
                tensor = graph.initializer.add()
                tensor.CopyFrom(weights[name])
                tensor.name = copies[name, owner]
            node.input[index] = copies[name, owner]


def free_name(name: str, taken: set[str]) -> str:
    """An unused name, which is then reserved."""
    free = name
    while free in taken:
        free += "_"
    taken.add(free)
    return free


def free_float_values(
    graph: onnx.GraphProto, before: onnx.GraphProto, chosen: Collection[str]
) -> None:
    """Make float nodes and the model's outputs read float values where a float node (or the
    caller) made them; an 8-bit node's result stays 8 bits for all readers, as it is computed so.

    Args:
        graph: the Q/DQ graph, changed in place.
        before: the same graph in float.
        chosen: names of the nodes in 8 bits.
    """
    makers = {name: node for node in before.node for name in node.output}
    outputs = {value.name for value in before.output}
    quantizers = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    producers = {name: node for node in graph.node for name in node.output}
    dead: set[str] = set()
    for pair in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        quantize = quantizers.get(pair.input[0])
        if quantize is None:
            continue
        # At an output of the model the pair's result has the tensor's own name.
        at_output = pair.output[0] in outputs
        maker = makers.get(pair.output[0] if at_output else quantize.input[0])
        in_float = maker is None or maker.name not in chosen
        if at_output and maker and (in_float or maker.op_type in _FLOAT_OUTPUT):
            _give_float(graph, quantize, pair, producers[quantize.input[0]])
        rounded, value = pair.output[0], quantize.input[0]
        if in_float:
            for node in graph.node:
                if node.name not in chosen and node.op_type not in _PAIR:
                    _replace(node.input, rounded, value)
        if rounded not in outputs and not any(rounded in node.input for node in graph.node):
            dead |= {quantize.name, pair.name}
    kept = [node for node in graph.node if node.name not in dead]
    if dead:
        del graph.node[:]
        graph.node.extend(kept)


def _give_float(
    graph: onnx.GraphProto,
    quantize: onnx.NodeProto,
    dequantize: onnx.NodeProto,
    maker: onnx.NodeProto,
) -> None:
    """Maker -> Q -> DQ -> output becomes maker -> output, with Q -> DQ in parallel for readers."""
    name = dequantize.output[0]
    rounded = f"{name}.rounded"
    for node in graph.node:
        _replace(node.input, name, rounded)
    _replace(maker.output, quantize.input[0], name)
    quantize.input[0] = name
    dequantize.output[0] = rounded


def _replace(names: MutableSequence[str], old: str, new: str) -> None:
    for index, name in enumerate(names):
        if name == old:
            names[index] = new


_IMAGE = 4  # dimensions

_AXES_ARE_INPUT = 18  # of ReduceMean, from this opset on


def pool_spatial_means(model: onnx.ModelProto, wanted: Callable[[onnx.NodeProto], bool]) -> None:
    """Make each ReduceMean over all positions of an image a GlobalAveragePool of the same name.

    Where the positions were dropped, a Flatten follows. Only float32 images (N, C, H, W) whose
    shape the model states; in place.

    Args:
        model: whose nodes have names.
        wanted: decides for each ReduceMean.
    """
    graph = model.graph
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
        and value.type.tensor_type.HasField("shape")
    }
    constants = {tensor.name: tensor for tensor in graph.initializer}
    by_input = opset_of(model) >= _AXES_ARE_INPUT
    taken = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if (
            node.op_type != "ReduceMean"
            or node.domain not in ("", "ai.onnx")
            or ranks.get(node.input[0]) != _IMAGE
            or _axes(node, settings, constants, by_input) != {2, 3}
            or not wanted(node)
        ):
            nodes.append(node)
            continue
        answer = node.output[0]
        if settings.get("keepdims", 1):
            nodes.append(_pool(node, answer))
            continue
        pooled = free_name(f"{answer}.pooled", taken)
        flatten = free_name(f"{node.name}.flatten", taken)
        nodes += [
            _pool(node, pooled),
            helper.make_node("Flatten", [pooled], [answer], name=flatten, axis=1),
        ]
        graph.value_info.append(helper.make_tensor_value_info(pooled, TensorProto.FLOAT, None))
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)


def _pool(mean: onnx.NodeProto, output: str) -> onnx.NodeProto:
    return helper.make_node("GlobalAveragePool", [mean.input[0]], [output], name=mean.name)


def _axes(
    node: onnx.NodeProto,
    settings: dict[str, object],
    constants: dict[str, onnx.TensorProto],
    by_input: bool,
) -> set[int]:
    """The axes of an image that are reduced, from 0; none where they are not fixed."""
    given = settings.get("axes", ())
    if by_input:
        name = node.input[1] if len(node.input) > 1 else ""
        given = numpy_helper.to_array(constants[name]).tolist() if name in constants else ()
    assert isinstance(given, (list, tuple))
    return {axis % _IMAGE for axis in given}
