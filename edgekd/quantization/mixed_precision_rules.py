"""The nodes that must compute in float32 by their kind: no samples are needed.

The rules work on a graph whose types are known
(:func:`edgekd.quantization.mixed_precision_graph.open_graph`).
A node that none of them names may compute in 16 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

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
    allowed = _allowed(node.op_type, opset, low.name)
    return frozenset(
        i
        for i, value in enumerate(node.inputs)
        if value is not None and value.dtype == FLOAT and _at(allowed[0], i)
    )


def low_outputs(node: ir.Node, opset: int, low: LowType) -> frozenset[int]:
    """The positions of float32 outputs that the operator gives in 16 bits at this opset."""
    allowed = _allowed(node.op_type, opset, low.name)
    return frozenset(
        i for i, value in enumerate(node.outputs) if value.dtype == FLOAT and _at(allowed[1], i)
    )


def float_by_kind(graph: ir.Graph, opset: int, low: LowType) -> dict[ir.Node, str]:
    """The nodes that must stay in float32 for any values, with the reason."""
    reasons: dict[ir.Node, str] = {}
    for node in graph:
        if touches_float(node):
            reason = _reason(node, opset, low)
            if reason is not None:
                reasons[node] = reason
    return reasons


@cache
def _allowed(op_type: str, opset: int, name: str) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """For each formal input and output: whether the operator supports the type there."""
    schema = onnx.defs.get_schema(op_type, opset, "")
    types = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    wanted = f"tensor({name})"

    def takes(formals: object) -> tuple[bool, ...]:
        return tuple(wanted in types.get(f.type_str, {f.type_str}) for f in formals)  # type: ignore[attr-defined]

    return takes(schema.inputs), takes(schema.outputs)


def _at(allowed: tuple[bool, ...], position: int) -> bool:
    # The last formal parameter represents all further ones of a variadic operator.
    return bool(allowed) and allowed[min(position, len(allowed) - 1)]


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
