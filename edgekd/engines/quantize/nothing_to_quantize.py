"""Why a model has nothing that a method could quantize."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import onnx

from edgekd.engines.onnx_graph import subgraphs
from edgekd.engines.quantize.prepare import all_nodes
from edgekd.errors import InputError

_OTHER_FLOATS = {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.DOUBLE: "float64"}
STORED_IN_8_BITS = {"GRU", "RNN", "LSTM", "Gather", "Einsum"}
"""Operators whose weights the other methods store in 8 bits, if they do not compute in them."""
_NAMED = 3  # nodes, and reasons, that an error spells out


def nothing_to_quantize(
    model: onnx.ModelProto,
    source: Path,
    wanted: Collection[str],
    kept: Collection[str] = (),
    left: Mapping[str, str] | None = None,
) -> InputError:
    """The error for a model without a single node that the method can quantize.

    Args:
        model: the prepared model.
        source: the file that it was made from.
        wanted: the operators that the method quantizes.
        kept: names of nodes that were asked to stay in float.
        left: names of nodes whose numbers 8 bits do not hold, and why.
    """
    types = sorted({node.op_type for node in all_nodes(model.graph.node)})
    stored = {tensor.data_type for tensor in model.graph.initializer}
    hint = "leave the model in float"
    if others := sorted(STORED_IN_8_BITS.intersection(types) - set(wanted)):
        hint = (
            f"--method dynamic or weights-only stores the weights of {', '.join(others)} in 8 bits"
        )
    for kind, name in _OTHER_FLOATS.items():
        if kind in stored:
            hint = f"its weights are {name}: give the float32 model"
    reasons = _why_not(model.graph, wanted, kept, left or {})
    return InputError(
        f"nothing in this model can be quantized: {', '.join(sorted(wanted))} with constant "
        "float32 weights that are not kept in float are needed, "
        + (f"and of those it has {reasons}" if reasons else f"it has {', '.join(types) or 'none'}"),
        where=str(source),
        remedy=hint,
    )


def _why_not(
    graph: onnx.GraphProto,
    wanted: Collection[str],
    kept: Collection[str],
    left: Mapping[str, str],
) -> str:
    """The nodes of the wanted kinds, with the reason why they do not count."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node.op_type for node in graph.node for name in node.output}
    reasons: dict[str, list[str]] = {}
    for node in graph.node:
        for body in subgraphs(node):
            for inner in all_nodes(body.node):
                if inner.op_type in wanted:
                    why = f"in a body of {node.op_type} {node.name!r}, which stays as it is"
                    reasons.setdefault(why, []).append(f"{inner.op_type} {inner.name!r}")
        if node.op_type not in wanted or not node.input:
            continue
        name = node.input[0 if node.op_type == "Gather" else 1]
        if node.name in kept:
            why = "kept in float"
        elif node.name in left:
            why = f"where {left[node.name]}"
        elif name not in weights:
            made = f"the result of {makers[name]}" if name in makers else "an input of the model"
            why = f"whose weights {name!r} are {made}, not a constant"
        elif weights[name].data_type != onnx.TensorProto.FLOAT:
            kind = onnx.TensorProto.DataType.Name(weights[name].data_type).lower()
            why = f"whose weights {name!r} are {kind}"
        else:
            shape = tuple(weights[name].dims)
            why = f"whose weights {name!r} {shape} or settings the method does not take"
        reasons.setdefault(why, []).append(f"{node.op_type} {node.name!r}")
    return "; ".join(
        ", ".join(nodes[:_NAMED]) + (" and others " if len(nodes) > _NAMED else " ") + why
        for why, nodes in list(reasons.items())[:_NAMED]
    )
