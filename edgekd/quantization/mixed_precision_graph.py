"""The graph of a model in 16 bits: opened, with casts placed, and the same rounding in float32."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes import common

from edgekd.quantization.mixed_precision_rules import (
    FLOAT,
    LOW_TYPES,
    Kind,
    LowType,
    low_inputs,
    low_outputs,
)

_QUANTIZE = {"QuantizeLinear", "DequantizeLinear"}


def open_graph(model: onnx.ModelProto, low: LowType) -> ir.Model:
    """The model flat and typed: functions inlined, constants as initializers, nodes named.

    The opset is raised where the type needs it and ONNX can: convolutions take bfloat16 from
    opset 22, quantized nodes take float16 from 19.
    """
    flat = ir.from_proto(model)
    common.InlinePass()(flat)
    proto = ir.to_proto(flat)
    opset = next((e.version for e in proto.opset_import if e.domain in ("", "ai.onnx")), 0)
    quantized = any(node.op_type in _QUANTIZE for node in proto.graph.node)
    needed = 22 if low.kind == "bf16" else 19 if quantized else 0
    if 0 < opset < needed:
        proto = _raised(proto, needed)
    opened = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    common.RemoveInitializersFromInputsPass()(opened)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(opened)
    # Before IR version 4 every initializer had to be an input too.
    opened.ir_version = max(opened.ir_version, 4)
    opened.graph.sort()
    taken = {node.name for node in opened.graph.all_nodes()}
    for index, node in enumerate(opened.graph):
        if not node.name:
            node.name = _free(f"{node.op_type}_{index}", taken)
    return opened


def _raised(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    try:
        return onnx.version_converter.convert_version(proto, opset)
    except (RuntimeError, ValueError):
        # An operator without an adapter: at the old opset more nodes stay in float32, each with
        # that reason.
        return proto


def opset_of(model: ir.Model) -> int:
    """The version of the standard ONNX operators."""
    imports = model.graph.opset_imports
    return imports.get("", imports.get("ai.onnx", 1))


def lower(model: ir.Model, chosen: Collection[ir.Node], low: LowType, *, keep_io: bool) -> None:
    """Make the chosen nodes compute in 16 bits, in place.

    A tensor has the type of the node that makes it; where it is needed in the other type it is
    cast once, right after it is made. A weight that both need is stored in both.

    Args:
        model: from :func:`open_graph`.
        chosen: the nodes that compute in 16 bits.
        low: the type.
        keep_io: the model's inputs and outputs stay float32, else they become 16 bits.
    """
    graph = model.graph
    opset = opset_of(model)
    # All positions are read before any type changes.
    takes = {node: low_inputs(node, opset, low) for node in chosen}
    gives = {node: low_outputs(node, opset, low) for node in chosen}
    taken = {v.name for node in graph.all_nodes() for v in node.outputs}
    taken |= {v.name for v in graph.inputs} | set(graph.initializers)
    taken |= {node.name for node in graph.all_nodes()}
    weights = [v for v in graph.initializers.values() if v.dtype == FLOAT]
    made = [v for node in graph for v in node.outputs if v.name and v.dtype == FLOAT]
    entering = [v for v in graph.inputs if v.dtype == FLOAT]

    for value in weights:
        lowered = [(n, i) for n, i in value.uses() if i in takes.get(n, ())]
        others = [(n, i) for n, i in value.uses() if i not in takes.get(n, ())]
        own_low = not keep_io if value.is_graph_output() else bool(lowered) and not others
        moved = others if own_low else lowered
        if moved:
            copy = ir.Value(
                name=_free(f"{value.name}_{'float32' if own_low else low.name}", taken),
                shape=value.shape,
                type=ir.TensorType(FLOAT),
                const_value=value.const_value,
            )
            if not own_low:
                _store(copy, low)
            graph.register_initializer(copy)
            for node, index in moved:
                node.replace_input_with(index, copy)
        if own_low:
            _store(value, low)

    for node in chosen:
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(low.dtype))
    for value in (*entering, *made):
        producer = value.producer()
        is_low = not keep_io if producer is None else value.index() in gives.get(producer, ())
        wanted_low = [(n, i) for n, i in value.uses() if i in takes.get(n, ())]
        wanted_float = [(n, i) for n, i in value.uses() if i not in takes.get(n, ())]
        if is_low:
            value.type = ir.TensorType(low.dtype)
        leaves = value.is_graph_output() and is_low == keep_io
        others = wanted_float if is_low else wanted_low
        if others or leaves:
            _cast(graph, value, FLOAT if is_low else low.dtype, others, taken, leaves=leaves)


def _store(value: ir.Value, low: LowType) -> None:
    if value.const_value is None:
        return
    array = value.const_value.numpy().astype(low.dtype.numpy())
    value.const_value = ir.Tensor(array, dtype=low.dtype, name=value.name)
    value.type = ir.TensorType(low.dtype)


def _cast(
    graph: ir.Graph,
    value: ir.Value,
    dtype: ir.DataType,
    uses: list[tuple[ir.Node, int]],
    taken: set[str | None],
    *,
    leaves: bool,
) -> None:
    """Give the value to ``uses`` (and, if it ``leaves``, to the outside) in another type."""
    name = _free(f"{value.name}_{_suffix(dtype)}", taken)
    if leaves:
        # The outside keeps the original name.
        own = _suffix(FLOAT if value.dtype is None else value.dtype)
        name, value.name = str(value.name), _free(f"{value.name}_{own}", taken)
    other = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
    cast = ir.Node(
        "",
        "Cast",
        [value],
        [ir.AttrInt64("to", int(dtype))],
        outputs=[other],
        name=_free(f"cast_{name}", taken),
    )
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, cast)
    else:
        graph.insert_before(graph[0], cast)
    for node, index in uses:
        node.replace_input_with(index, other)
    if leaves:
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = other


def _suffix(dtype: ir.DataType) -> str:
    return "float32" if dtype == FLOAT else dtype.name.lower()


def _free(name: str, taken: set[str | None]) -> str:
    """The name, with a suffix number if it is in use; reserved from now on."""
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(found)
    return found


def rounded(converted: onnx.ModelProto, low: LowType) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The same computation in float32, with every 16-bit tensor rounded to its 16 bits.

    That is what hardware with float32 accumulators computes, and any runtime can run it. Also
    returns the node of ``converted`` that makes each rounded tensor.
    """
    model = ir.from_proto(converted)
    graph = model.graph
    for weight in graph.initializers.values():
        if weight.dtype == low.dtype and weight.const_value is not None:
            array = weight.const_value.numpy().astype(np.float32)
            weight.const_value = ir.Tensor(array, name=weight.name)
            weight.type = ir.TensorType(FLOAT)
    makers: dict[str, str] = {}
    made = [v for node in list(graph) for v in node.outputs if v.dtype == low.dtype]
    for value in (*(v for v in graph.inputs if v.dtype == low.dtype), *made):
        name = f"{value.name}/float32"
        uses = list(value.uses())
        producer = value.producer()
        added = []
        # A cast from float32 rounds already, and its input keeps one name.
        source = producer.inputs[0] if producer and producer.op_type == "Cast" else None
        lowered = value
        if source is None or source.dtype != FLOAT:
            value.type = ir.TensorType(FLOAT)
            added = [ir.node("Cast", [value], {"to": int(low.dtype)})]
            lowered = added[0].outputs[0]
            lowered.name = f"{value.name}/{low.name}"
        wide = ir.node("Cast", [lowered], {"to": int(FLOAT)})
        wide.outputs[0].name, wide.outputs[0].type = name, ir.TensorType(FLOAT)
        wide.outputs[0].shape = value.shape
        if producer is None:
            graph.insert_before(graph[0], [*added, wide])
        else:
            if added and producer.op_type == "Cast":
                producer.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
            graph.insert_after(producer, [*added, wide])
            makers[name] = str(producer.name)
        for node, index in uses:
            node.replace_input_with(index, wide.outputs[0])
        for index, output in enumerate(graph.outputs):
            if output is value:
                value.name, wide.outputs[0].name = name, value.name
                makers[str(output.name)] = makers.pop(name, "")
                graph.outputs[index] = wide.outputs[0]
    return ir.to_proto(model), makers


def write_rounded(path: Path, out: Path, kind: Kind) -> None:
    """:func:`rounded` of a file, as a file that any runtime can run."""
    model, _ = rounded(onnx.load(str(path)), LOW_TYPES[kind])
    onnx.save(model, str(out))
