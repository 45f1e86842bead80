"""The graph side of FP16: which paths stay in float, and how casts are placed."""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes import common

from edgekd.quantization.mixed_precision_rules import (
    FLOAT,
    INTEGERS,
    LowType,
    is_standard,
    low_inputs,
    low_outputs,
    touches_float,
)

GROWING = {"Exp", "Pow", "Sinh", "Cosh", "ReduceSumSquare", "ReduceProd", "Det"}
"""Their output may be far larger than their input: without samples nothing bounds it."""

BOUNDING = {
    "Softmax", "Hardmax", "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Softsign",
    "Sqrt", "Log", "Sin", "Cos", "Sign", "LayerNormalization", "GroupNormalization",
    "RMSNormalization", "InstanceNormalization", "MeanVarianceNormalization",
    "LpNormalization",
}  # fmt: skip
"""Operators whose outputs fit 16 bits for any input."""

WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"}

EXACT = {
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Expand",
    "Tile", "Concat", "Split", "Slice", "Gather", "GatherND", "GatherElements", "Pad", "Where",
    "DepthToSpace", "SpaceToDepth", "Trilu", "Compress", "ReverseSequence", "CenterCropPad",
    "ScatterND", "ScatterElements", "Max", "Min", "Neg", "Abs", "Relu", "Clip", "Sign",
    "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "ArgMax", "ArgMin", "TopK", "Unique",
    "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf", "NonZero",
    "Floor", "Ceil", "Round", "Shape", "Size", "Hardmax",
}  # fmt: skip
"""They move, compare or choose values: between float32 nodes they would only round them."""

_READ_AS_POSITION = {"Sin", "Cos", "Tan", "Floor", "Ceil", "Round", "Mod"}


def beyond_range(
    graph: ir.Graph, sources: Collection[ir.Node], *, measured: bool
) -> dict[ir.Node, str]:
    """The nodes that may get numbers beyond the range from a node that makes them.

    Args:
        graph: in topological order.
        sources: nodes whose output may be beyond the range.
        measured: activations were measured too, so that only what masks add is followed here,
            as far as the next node with weights.
    """
    wide: dict[ir.Node, str] = {}
    reasons: dict[ir.Node, str] = {}
    for node in graph:
        if not touches_float(node):
            continue
        origin = next((wide[p] for p in node.predecessors() if p in wide), None)
        if origin is not None:
            reasons[node] = f"it may take numbers beyond 16 bits from {origin!r}"
        if node in sources:
            wide[node] = str(node.name)
        elif (
            origin is not None
            and node.op_type not in BOUNDING
            and not (measured and node.op_type in WEIGHTED)
        ):
            wide[node] = origin
    return reasons


def between_float(
    graph: ir.Graph, kept: dict[ir.Node, str], *, keep_io: bool
) -> dict[ir.Node, str]:
    """The exact nodes among ``kept`` ones: in 16 bits they would round float32 values.

    With ``keep_io`` the model's inputs and outputs are float32 too.
    """
    found: dict[ir.Node, str] = {}

    def stays(node: ir.Node) -> bool:
        return node in kept or node in found or not touches_float(node)

    def comes_in_float(node: ir.Node) -> bool:
        values = [
            v for v in node.inputs if v is not None and v.dtype == FLOAT and v.const_value is None
        ]
        return bool(values) and all(
            keep_io if (p := v.producer()) is None else p in kept or p in found for v in values
        )

    def goes_out_float(node: ir.Node) -> bool:
        leaves = any(v.is_graph_output() and v.dtype == FLOAT for v in node.outputs)
        return (keep_io or not leaves) and all(stays(user) for user in node.successors())

    changed = True
    while changed:
        changed = False
        for node in graph:
            if stays(node) or not is_standard(node) or node.op_type not in EXACT:
                continue
            if comes_in_float(node) and goes_out_float(node):
                found[node] = "it passes values between nodes in float32"
                changed = True
    return found


def positions(graph: ir.Graph) -> dict[ir.Node, str]:
    """The nodes between integers and where a number is read as a position or an angle.

    The angles of a rotary embedding are position × frequency: in 16 bits the positions above
    1 / roundoff are no longer distinguishable.
    """
    made_of_integers: set[ir.Node] = set()
    for node in graph:
        inputs = [v for v in node.inputs if v is not None and v.dtype == FLOAT]
        free = [v for v in inputs if v.const_value is None]
        starts = node.op_type == "Range" or (
            node.op_type == "Cast"
            and node.inputs[0] is not None
            and node.inputs[0].dtype in INTEGERS
        )
        if starts or (free and all(v.producer() in made_of_integers for v in free)):
            made_of_integers.add(node)
    pending = [n for n in made_of_integers if _reads_position(n)]
    seen: set[ir.Node] = set()
    while pending:
        node = pending.pop()
        if node in seen or node not in made_of_integers:
            continue
        seen.add(node)
        pending.extend(node.predecessors())
    return dict.fromkeys(seen, "it computes positions from integers")


def _reads_position(node: ir.Node) -> bool:
    if node.op_type == "Cast":
        return node.outputs[0].dtype in {*INTEGERS, ir.DataType.UINT8, ir.DataType.INT8}
    return node.op_type in _READ_AS_POSITION


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
