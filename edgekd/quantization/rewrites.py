"""Rewrites of a float graph for the quantizers, and of the Q/DQ graph that they write.

ONNX Runtime's quantizer replaces a tensor by its 8-bit version for all readers, so that a node
which stays in float would still compute from rounded weights and activations. PyTorch writes global
average pooling as ReduceMean, which ONNX Runtime computes in float between a DequantizeLinear and a
QuantizeLinear, after turning the image from channels last to first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, MutableSequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.onnx.graph import opset_of, subgraphs

LEAST_IR = 4
"""From this IR version on initializers need not be inputs."""

BIAS = 2
"""The position of the bias among the inputs of Conv, ConvTranspose and Gemm."""

# These compute float outputs from 8-bit inputs at no cost, so an output of the model need not be
# rounded.
_FLOAT_OUTPUT = {"Gemm", "MatMul"}

_PAIR = {"QuantizeLinear", "DequantizeLinear"}

_IMAGE = 4  # dimensions

_AXES_ARE_INPUT = 18  # of ReduceMean, from this opset on


def assign(field: Any, values: Iterable[Any]) -> None:
    """Replace all elements of a repeated protobuf field."""
    values = list(values)
    del field[:]
    field.extend(values)


def restore_identity(
    model: onnx.ModelProto, original: onnx.ModelProto, least_ir: int = LEAST_IR
) -> None:
    """Give a model the metadata, producer and IR version of the file it was made from, and only
    the opsets that it uses."""
    model.ir_version = max(original.ir_version, least_ir)
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(model, field, getattr(original, field))
    assign(model.metadata_props, original.metadata_props)
    assign(model.graph.metadata_props, original.graph.metadata_props)
    used = {node.domain for node in all_nodes(model.graph.node)} | {"", "ai.onnx"}
    imports = [entry for entry in model.opset_import if entry.domain in used]
    assign(model.opset_import, imports)


def set_aside_outputs(graph: onnx.GraphProto) -> Callable[[onnx.GraphProto], None]:
    """Take out the outputs that no node makes: inputs and constants that are passed through.

    ONNX Runtime's quantizers give the tensor before an output a new name, which these cannot have.

    Returns:
        a function that puts them back, with their constants, into the derived graph.
    """
    made = {name for node in graph.node for name in node.output}
    outputs = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in graph.output]
    names = {value.name for value in outputs} - made
    constants = [tensor for tensor in graph.initializer if tensor.name in names]
    constants = [TensorProto.FromString(t.SerializeToString()) for t in constants]
    kept = [value for value in outputs if value.name in made]
    assign(graph.output, kept)

    def put_back(changed: onnx.GraphProto) -> None:
        assign(changed.output, outputs)
        there = {tensor.name for tensor in changed.initializer}
        changed.initializer.extend(t for t in constants if t.name not in there)

    return put_back


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from all_nodes(graph.node)


def inner_names(graph: onnx.GraphProto) -> set[str]:
    """Tensors that subgraphs name, including those that they read from the outer graph."""
    inner = [g for node in all_nodes(graph.node) for g in subgraphs(node)]
    names = {name for g in inner for node in g.node for name in node.input}
    return names | {value.name for g in inner for value in g.output}


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give nodes without a name, or with that of an earlier one, a unique name."""
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            name = base = f"{node.name or node.op_type}_{index}"
            while name in taken:
                name = base = f"{base}_"
            node.name = name
            taken.add(name)
        seen.add(node.name)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove unused initializers."""
    used = {name for node in graph.node for name in node.input} | inner_names(graph)
    used |= {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    if len(kept) < len(graph.initializer):
        assign(graph.initializer, kept)


def element_types(graph: onnx.GraphProto) -> dict[str, int]:
    """The stated element type of each tensor that is no constant."""
    return {value.name: value.type.tensor_type.elem_type for value in _values(graph)}


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor, in graph order."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _values(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [*graph.value_info, *graph.input, *graph.output]


def _ranks(graph: onnx.GraphProto) -> dict[str, int]:
    """The number of dimensions of each tensor that has a shape."""
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in _values(graph)
        if value.type.tensor_type.HasField("shape")
    }


def free_name(name: str, taken: set[str]) -> str:
    """An unused name, which is then reserved."""
    free = name
    while free in taken:
        free += "_"
    taken.add(free)
    return free


def plain_bias(graph: onnx.GraphProto) -> None:
    """Gemm's constant C as (N,) with beta 1: ONNX Runtime's quantizer drops a beta when the bias
    stays in float, and needs one number per channel when it does not."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Gemm" or len(node.input) < 3:
            continue
        if node.input[1] not in weights or node.input[2] not in weights:
            continue
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        columns = weights[node.input[1]].dims[0 if settings.get("transB") else 1]
        bias = numpy_helper.to_array(weights[node.input[2]])
        beta = settings.get("beta", 1.0)
        if (bias.ndim == 2 and bias.shape[0] != 1) or (beta == 1.0 and bias.shape == (columns,)):
            continue
        plain = np.broadcast_to(bias * np.asarray(beta, bias.dtype), (1, columns))[0]
        name = f"{node.name}.bias"
        while name in weights:
            name += "_"
        weights[name] = numpy_helper.from_array(np.ascontiguousarray(plain), name)
        graph.initializer.append(weights[name])
        node.input[2] = name
        kept = [attribute for attribute in node.attribute if attribute.name != "beta"]
        assign(node.attribute, kept)
    drop_unused(graph)


def separate_additions(graph: onnx.GraphProto, before: onnx.GraphProto) -> None:
    """Gemm(A, B, C) whose C is not one constant number per column as a product and an Add, which
    compute in 8 bits: ONNX Runtime fuses MatMul + Add(shortcut) into such a Gemm.

    A fused product and its sum get their names from before the fusion back.

    Args:
        graph: in place.
        before: the same, not optimized.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in before.node for name in node.output}
    types = element_types(graph)
    taken = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    taken |= {tensor.name for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        added = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        beta = next((a.f for a in node.attribute if a.name == "beta"), 1.0)
        constant = added in weights and len(weights[added].dims) == 1
        floats = types.get(node.output[0], TensorProto.FLOAT) == TensorProto.FLOAT
        if not added or constant or not floats or node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        addition = makers.get(node.output[0])
        name, output, sum_name = node.name, "", ""
        if addition is not None and addition.op_type == "Add":
            product = next((makers[n] for n in addition.input if n != added and n in makers), None)
            fused = product is not None and product.op_type == "MatMul"
            if product is not None and fused and product.output[0] not in taken:
                name, output, sum_name = product.name, product.output[0], addition.name
        if not output:
            output = free_name(f"{node.output[0]}.product", taken)
            sum_name = free_name(f"{node.name}.add", taken)
        kept = [a for a in node.attribute if a.name in ("alpha", "transA", "transB")]
        plain = not any(a.i if a.name.startswith("trans") else a.f != 1.0 for a in kept)
        separate = helper.make_node(
            "MatMul" if plain else "Gemm", list(node.input[:2]), [output], name=name
        )
        if not plain:
            separate.attribute.extend(kept)
        nodes.append(separate)
        made = [output]
        if beta != 1.0:
            scaled = free_name(f"{node.output[0]}.scaled", taken)
            factor = free_name(f"{node.name}.beta", taken)
            graph.initializer.append(numpy_helper.from_array(np.float32(beta), factor))
            scale_name = free_name(f"{node.name}.scale", taken)
            nodes.append(helper.make_node("Mul", [added, factor], [scaled], name=scale_name))
            added = scaled
            made.append(scaled)
        nodes.append(helper.make_node("Add", [output, added], [node.output[0]], name=sum_name))
        taken |= {name, output, sum_name}
        graph.value_info.extend(
            helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in made
        )
    assign(graph.node, nodes)


def drop_leading_ones(graph: onnx.GraphProto) -> None:
    """MatMul's constant (1, K, N) as (K, N) where the other factor has as many dimensions: the
    same product, and a scale for each column is possible."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    ranks = _ranks(graph)
    for node in graph.node:
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
            continue
        weight = weights.get(node.input[1])
        if weight is None or len(weight.dims) < 3 or any(size != 1 for size in weight.dims[:-2]):
            continue
        if ranks.get(node.input[0], 0) < len(weight.dims):
            continue
        name = f"{weight.name}.matrix"
        if name not in weights:
            values = numpy_helper.to_array(weight)
            weights[name] = numpy_helper.from_array(values.reshape(values.shape[-2:]), name)
            graph.initializer.append(weights[name])
        node.input[1] = name
    drop_unused(graph)


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
        assign(graph.node, kept)


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


def pool_spatial_means(model: onnx.ModelProto, wanted: Callable[[onnx.NodeProto], bool]) -> None:
    """Make each ReduceMean over all positions of an image a GlobalAveragePool of the same name.

    Where the positions were dropped, a Flatten follows. Only float32 images (N, C, H, W) whose
    shape the model states; in place.

    Args:
        model: whose nodes have names.
        wanted: decides for each ReduceMean.
    """
    graph = model.graph
    ranks, types = _ranks(graph), element_types(graph)
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
            or types[node.input[0]] != TensorProto.FLOAT
            or _axes(node, settings, constants, by_input) != {2, 3}
            or not wanted(node)
        ):
            nodes.append(node)
            continue
        output = node.output[0]
        if settings.get("keepdims", 1):
            nodes.append(_pool(node, output))
            continue
        pooled = free_name(f"{output}.pooled", taken)
        flatten = free_name(f"{node.name}.flatten", taken)
        nodes += [
            _pool(node, pooled),
            helper.make_node("Flatten", [pooled], [output], name=flatten, axis=1),
        ]
        graph.value_info.append(helper.make_tensor_value_info(pooled, TensorProto.FLOAT, None))
    assign(graph.node, nodes)
    drop_unused(graph)


def _pool(mean: onnx.NodeProto, output: str) -> onnx.NodeProto:
    return helper.make_node("GlobalAveragePool", [mean.input[0]], [output], name=mean.name)


def _axes(
    node: onnx.NodeProto,
    settings: dict[str, object],
    constants: dict[str, TensorProto],
    by_input: bool,
) -> set[int]:
    """The axes of an image that are reduced, from 0; none where they are not fixed."""
    given = settings.get("axes", ())
    if by_input:
        name = node.input[1] if len(node.input) > 1 else ""
        given = numpy_helper.to_array(constants[name]).tolist() if name in constants else ()
    assert isinstance(given, (list, tuple))
    return {axis % _IMAGE for axis in given}
