"""The mean over an image's positions as the operator that has a kernel in 8 bits.

PyTorch writes global average pooling as ReduceMean, which ONNX Runtime computes in float between
a DequantizeLinear and a QuantizeLinear, after turning the image from channels last to first.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.engines.onnx_graph import opset_of
from edgekd.engines.quantize.float_islands import free_name
from edgekd.engines.quantize.prepare import drop_unused

_IMAGE = 4  # dimensions
_AXES_ARE_INPUT = 18  # of ReduceMean, from this opset on


def pool_spatial_means(model: onnx.ModelProto, wanted: Callable[[onnx.NodeProto], bool]) -> None:
    """Make each ReduceMean over all positions of an image a GlobalAveragePool of the same name.

    Where the positions were dropped, a Flatten follows. Only float32 images (N, C, H, W) whose
    shape the model states; in place.

    Args:
        model: whose nodes have names.
        wanted: asked about each ReduceMean.
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
