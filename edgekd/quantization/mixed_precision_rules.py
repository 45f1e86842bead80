"""The nodes that must compute in float32, each with the reason: by kind, weights and ranges.

The rules work on a graph whose types are known
(:func:`edgekd.quantization.mixed_precision_graph.open_graph`).
A node that none of them names may compute in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from edgekd.onnx.samples import Array

Kind = Literal["fp16", "bf16"]
FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class LowType:
    """A 16-bit type: its largest number, smallest normal one, and the roundoff (half its eps)."""

    kind: Kind
    dtype: ir.DataType
    largest: float
    normal: float
    roundoff: float

    @property
    def name(self) -> str:
        """ONNX's and numpy's name of it."""
        return self.dtype.name.lower()


def _low_type(kind: Kind, dtype: ir.DataType) -> LowType:
    info = ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
    return LowType(kind, dtype, float(info.max), float(info.tiny), float(info.eps) / 2)


LOW_TYPES: dict[Kind, LowType] = {
    "fp16": _low_type("fp16", ir.DataType.FLOAT16),
    "bf16": _low_type("bf16", ir.DataType.BFLOAT16),
}

_EXPONENTIAL = "the absolute error of its input becomes the relative error of its output"
_SQUARES = "its products leave the range of 16 bits before its result does"
_POSITIONS = "its input is a position; 16 bits do not distinguish neighbouring positions"
_ANGLE = "its input is an angle: rounding a large one changes the result"
_RANDOM = "it draws random numbers"
_SIGNAL = "it sums over a complete signal"
ALWAYS_FLOAT: dict[str, str] = {
    **dict.fromkeys(("Exp", "Pow", "Sinh", "Cosh", "Softplus", "Log"), _EXPONENTIAL),
    **dict.fromkeys(("ReduceLogSum", "ReduceLogSumExp"), _EXPONENTIAL),
    **dict.fromkeys(("ReduceSumSquare", "ReduceL2", "ReduceProd", "Det", "LRN"), _SQUARES),
    **dict.fromkeys(("LpNormalization", "LpPool", "GlobalLpPool"), _SQUARES),
    **dict.fromkeys(("InstanceNormalization", "MeanVarianceNormalization"), _SQUARES),
    **dict.fromkeys(("GridSample", "AffineGrid", "RoiAlign", "MaxRoiPool"), _POSITIONS),
    **dict.fromkeys(("Sin", "Cos", "Tan"), _ANGLE),
    **dict.fromkeys(("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"), _RANDOM),
    **dict.fromkeys(("DFT", "STFT", "MelWeightMatrix"), _SIGNAL),
    "CastLike": "its second input's type decides the type of its output",
}
"""Kinds that are never converted, with the reason."""

_SUMS = {"ReduceSum", "ReduceMean", "ReduceL1", "CumSum", "Softmax", "LogSoftmax"}
_POOLS = {"GlobalAveragePool", "AveragePool"}
INTEGERS = {
    ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
    ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
}  # fmt: skip

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

HEADROOM = 2.0
"""A safety margin for unseen data: activations may reach half of the range."""

_EACH_COUNTS = {
    **dict.fromkeys(("Div", "QuantizeLinear", "DequantizeLinear"), 1),
    **dict.fromkeys(("Sqrt", "Reciprocal"), 0),
}
"""Inputs whose small elements matter as much as the large ones: they divide, or are divided."""


def is_standard(node: ir.Node) -> bool:
    """Whether the node is of ONNX's own domain."""
    return node.domain in ("", "ai.onnx")


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The bodies of a control-flow node."""
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return graphs


def touches_float(node: ir.Node) -> bool:
    """Whether float32 (or something of unknown type) goes in or out, or a body is inside."""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
    return bool(subgraphs(node)) or any(v.dtype in (FLOAT, None) for v in values)


def low_inputs(node: ir.Node, opset: int, low: LowType) -> frozenset[int]:
    """The positions of float32 inputs that the operator takes in 16 bits at this opset."""
    return _low(node.inputs, _allowed(node.op_type, opset, low.name)[0])


def low_outputs(node: ir.Node, opset: int, low: LowType) -> frozenset[int]:
    """The positions of float32 outputs that the operator gives in 16 bits at this opset."""
    return _low(node.outputs, _allowed(node.op_type, opset, low.name)[1])


def _low(values: Sequence[ir.Value | None], allowed: tuple[bool, ...]) -> frozenset[int]:
    # The last formal parameter represents all further ones of a variadic operator.
    return frozenset(
        index
        for index, value in enumerate(values)
        if value is not None
        and value.dtype == FLOAT
        and allowed
        and allowed[min(index, len(allowed) - 1)]
    )


@cache
def _allowed(op_type: str, opset: int, name: str) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """For each formal input and output: whether the operator supports the type there."""
    schema = onnx.defs.get_schema(op_type, opset, "")
    types = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    wanted = f"tensor({name})"

    def takes(formals: object) -> tuple[bool, ...]:
        return tuple(wanted in types.get(f.type_str, {f.type_str}) for f in formals)  # type: ignore[attr-defined]

    return takes(schema.inputs), takes(schema.outputs)


def _reason(node: ir.Node, opset: int, low: LowType) -> str | None:
    if subgraphs(node):
        return "it has a body, which is kept in float32 completely"
    if not is_standard(node):
        return f"nothing is known of {node.domain}'s operators"
    if any(v is not None and v.name and not isinstance(v.type, ir.TensorType) for v in node.inputs):
        return "the type of an input is not a tensor or not known"
    if any(v.name and not isinstance(v.type, ir.TensorType) for v in node.outputs):
        return "the type of an output is not a tensor or not known"
    if node.op_type in ALWAYS_FLOAT:
        return ALWAYS_FLOAT[node.op_type]
    if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
        return _SQUARES
    if node.op_type == "Cast":
        return _cast_reason(node)
    if not low_inputs(node, opset, low):
        if all(v is None or v.dtype != FLOAT for v in node.inputs):
            return "it makes values, and does so in float32"
        return f"ONNX has no {node.op_type} in {low.name} at opset {opset}"
    if node.outputs[0].dtype == FLOAT and 0 not in low_outputs(node, opset, low):
        return f"ONNX has no {node.op_type} in {low.name} at opset {opset}"
    if _integer(node, "output_dtype", 0) or _integer(node, "stash_type", 1) != 1:
        return "its attributes fix the type it computes in"
    return _sum_reason(node, low)


def _cast_reason(node: ir.Node) -> str | None:
    source = node.inputs[0]
    if source is None or source.dtype is None:
        return "the type of its input is not known"
    if node.outputs[0].dtype != FLOAT:
        return "it reads numbers as another type"
    if source.dtype in INTEGERS:
        return f"16 bits cannot represent every {source.dtype.name.lower()}"
    return None


def _sum_reason(node: ir.Node, low: LowType) -> str | None:
    """A running sum of equal terms stops growing after 1 / roundoff of them."""
    if node.op_type not in _SUMS | _POOLS:
        return None
    terms = _terms(node)
    limit = round(1 / low.roundoff)
    if terms is None:
        return f"it sums over an unknown length; {low.name} holds {limit} terms"
    if terms > limit:
        return f"it sums {terms} terms; {low.name} holds {limit}"
    return None


def _terms(node: ir.Node) -> int | None:
    """Number of terms it adds per output element, None when a dimension is dynamic."""
    if node.op_type == "AveragePool":
        return math.prod(node.attributes["kernel_shape"].as_ints())
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    sizes = list(value.shape)
    if node.op_type == "GlobalAveragePool":
        chosen = sizes[2:]
    elif node.op_type in ("Softmax", "LogSoftmax"):
        chosen = [sizes[_integer(node, "axis", -1)]]
    else:
        axes = _axes(node)
        if axes is None:
            return None
        chosen = [sizes[axis] for axis in axes] if axes else sizes
        if not axes and _integer(node, "noop_with_empty_axes", 0):
            return 1
    if not all(isinstance(size, int) for size in chosen):
        return None
    return math.prod(size for size in chosen if isinstance(size, int))


def _axes(node: ir.Node) -> list[int] | None:
    """The reduced axes, [] for all of them, None when they are computed."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is None:
        return []
    if given.const_value is None:
        return None
    return [int(axis) for axis in np.atleast_1d(given.const_value.numpy())]


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def weight_fault(node: ir.Node, opset: int, low: LowType) -> str | None:
    """Why a weight of the node cannot be stored in 16 bits, None when all can."""
    attribute = node.attributes.get("value") if node.op_type == "ConstantOfShape" else None
    if attribute is not None:
        return _fault(attribute.as_tensor().numpy(), "its value", low, each=False)
    for position in sorted(low_inputs(node, opset, low)):
        value = node.inputs[position]
        if value is None or value.const_value is None:
            continue
        each = _EACH_COUNTS.get(node.op_type) == position
        fault = _fault(value.const_value.numpy(), f"its weight {value.name!r}", low, each=each)
        if fault is not None:
            return fault
    return None


def exceeds(node: ir.Node, low: LowType) -> bool:
    """Whether a constant of the node is a finite number beyond the range of the type."""
    constants = [v.const_value for v in node.inputs if v is not None and v.dtype == FLOAT]
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        constants.append(node.attributes["value"].as_tensor())
    return any(_largest(c.numpy()) > low.largest for c in constants if c is not None)


def _largest(array: Array) -> float:
    finite = np.abs(array[np.isfinite(array)]) if array.dtype.kind == "f" else np.zeros(0)
    return float(finite.max()) if finite.size else 0.0


def _fault(array: Array, what: str, low: LowType, *, each: bool) -> str | None:
    largest = _largest(array)
    if largest > low.largest:
        return f"{what} reaches {largest:.3g}; {low.name} ends at {low.largest:.5g}"
    # Below the smallest normal number the spacing no longer shrinks with the number. What a
    # tensor loses there counts only when nothing in it is much larger.
    if 0 < largest < low.normal:
        return f"{what} is at most {largest:.3g}; {low.name} is exact down to {low.normal:.2g}"
    if each and bool(np.any((np.abs(array) < low.normal) & (array != 0))):
        return f"{what} has divisors too small for {low.name}"
    return None


def measured_fault(node: ir.Node, ranges: dict[str, float], opset: int, low: LowType) -> str | None:
    """The reason why an input or output of the node does not fit, None when all do."""
    values = [
        *(node.inputs[i] for i in sorted(low_inputs(node, opset, low))),
        *(node.outputs[i] for i in sorted(low_outputs(node, opset, low))),
    ]
    for value in values:
        largest = ranges.get(str(value.name)) if value is not None else None
        if value is None or largest is None or largest == 0:
            continue
        if not math.isfinite(largest):
            return f"{value.name!r} is not finite on the samples"
        if largest > low.largest / HEADROOM:
            return f"{value.name!r} reaches {largest:.3g} on the samples"
        if largest < low.normal:
            return f"{value.name!r} is at most {largest:.3g} on the samples"
    return None


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


def nodes_in_float(
    graph: ir.Graph,
    opset: int,
    low: LowType,
    ranges: dict[str, float] | None,
    listed: Collection[str],
    *,
    keep_io: bool,
) -> dict[ir.Node, str]:
    """Every node that stays in float32, with the first reason that was found.

    Args:
        graph: in topological order, with known types.
        opset: of the standard operators.
        low: the type of the other nodes.
        ranges: max |x| of activations by name on samples; None where none were measured.
        listed: names of nodes to leave in float32.
        keep_io: the model's inputs and outputs stay float32.
    """
    floating = [node for node in graph if touches_float(node)]
    kept = {node: "listed in --keep" for node in floating if node.name in listed}
    by_kind = {n: reason for n in floating if (reason := _reason(n, opset, low)) is not None}
    for node, reason in (by_kind | positions(graph)).items():
        kept.setdefault(node, reason)
    large: set[ir.Node] = set()
    for node in floating:
        fault = weight_fault(node, opset, low)
        if fault is None and ranges is not None:
            fault = measured_fault(node, ranges, opset, low)
        if fault is not None:
            kept.setdefault(node, fault)
        squares = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
        grows = ranges is None and low.kind == "fp16" and (node.op_type in GROWING or squares)
        if grows or exceeds(node, low):
            large.add(node)
    for node, reason in beyond_range(graph, large, measured=ranges is not None).items():
        kept.setdefault(node, reason)
    return {**kept, **between_float(graph, kept, keep_io=keep_io)}
