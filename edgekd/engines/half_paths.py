"""Which nodes must compute in float32 because of their neighbours: what they take or pass on."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from edgekd.engines.half_rules import FLOAT, INTEGERS, is_standard, touches_float

GROWING = {"Exp", "Pow", "Sinh", "Cosh", "ReduceSumSquare", "ReduceProd", "Det"}
"""Their output may be far larger than their input: without samples nothing bounds it."""

BOUNDING = {
    *("Softmax", "Hardmax", "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Softsign"),
    *("Sqrt", "Log", "Sin", "Cos", "Sign", "LayerNormalization", "GroupNormalization"),
    *("RMSNormalization", "InstanceNormalization", "MeanVarianceNormalization"),
    "LpNormalization",
}
"""Whatever they take, what they give fits 16 bits again."""

WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"}

EXACT = {
    *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Expand"),
    *("Tile", "Concat", "Split", "Slice", "Gather", "GatherND", "GatherElements", "Pad", "Where"),
    *("DepthToSpace", "SpaceToDepth", "Trilu", "Compress", "ReverseSequence", "CenterCropPad"),
    *("ScatterND", "ScatterElements", "Max", "Min", "Neg", "Abs", "Relu", "Clip", "Sign"),
    *("MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "ArgMax", "ArgMin", "TopK", "Unique"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf", "NonZero"),
    *("Floor", "Ceil", "Round", "Shape", "Size", "Hardmax"),
}
"""They move, compare or choose values: between float32 nodes they would only round them."""

_READ_AS_POSITION = {"Sin", "Cos", "Tan", "Floor", "Ceil", "Round", "Mod"}


def beyond_range(
    graph: ir.Graph, sources: Collection[ir.Node], *, measured: bool
) -> dict[ir.Node, str]:
    """The nodes that may take numbers beyond the range from a node that makes them.

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
    """The exact nodes among ``kept`` ones: in 16 bits they would round what nobody asked to.

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
    """The nodes on the way from integers to where a number is read as a place or an angle.

    The angles of a rotary embedding are position × frequency: in 16 bits the positions above
    1 / roundoff are no longer told apart.
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
