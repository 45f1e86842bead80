"""Weights in 8 bits, arithmetic in float: a file a quarter as large that runs everywhere."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import InputError
from edgekd.onnx.samples import Samples
from edgekd.quantization.node_selection import nothing_to_quantize
from edgekd.quantization.prepare import prepare_onnx
from edgekd.quantization.rewrites import assign, drop_unused

_LARGEST = 127
_LEAST_ELEMENTS = 64  # below that the scales and the extra node outweigh the savings
_RECURRENT = {"LSTM", "GRU", "RNN"}

Axis = Callable[[onnx.NodeProto, int], int]


def _matmul_axis(node: onnx.NodeProto, rank: int) -> int:
    return rank - 1


def _einsum_axis(node: onnx.NodeProto, index: int, rank: int) -> int:
    """An axis of an Einsum's factor that its result has too: one that is not summed over."""
    equation = next((a.s.decode() for a in node.attribute if a.name == "equation"), "")
    factors, _, result = equation.replace(" ", "").partition("->")
    letters = factors.split(",")[index] if index < len(factors.split(",")) else ""
    if len(letters) != rank or "." in letters:
        return 0
    return max((i for i, letter in enumerate(letters) if letter in result), default=0)


def _gemm_axis(node: onnx.NodeProto, rank: int) -> int:
    settings = {a.name: a.i for a in node.attribute}
    return 0 if settings.get("transB") else 1


# The inputs that are weights, and their axis of output channels.
_WEIGHTS: dict[str, tuple[tuple[int, ...], Axis]] = {
    "Conv": ((1,), lambda node, rank: 0),
    "ConvTranspose": ((1,), lambda node, rank: 1),
    "MatMul": ((1,), _matmul_axis),
    "Gemm": ((1,), _gemm_axis),
    "Gather": ((0,), lambda node, rank: 0),
    "Attention": ((1,), _matmul_axis),
    "FusedMatMul": ((1,), _matmul_axis),
    "FusedConv": ((1,), lambda node, rank: 0),
    "Einsum": ((0, 1), _matmul_axis),
    **dict.fromkeys(_RECURRENT, ((1, 2), lambda node, rank: 1)),
}


def quantize_weights(
    onnx_path: Path,
    out: Path,
    *,
    keep: Collection[str] = (),
    samples: Samples | None = None,
) -> None:
    """Store the weights of Conv, ConvTranspose, Gemm, MatMul, Einsum, LSTM, GRU, RNN and embedding
    tables as int8 with a scale per output channel (tables: per row); biases stay float32.

    DequantizeLinear restores the weights at run time, standard ONNX since opset 13. A model
    becomes about four times smaller, not faster. The arithmetic stays in float32 in the sessions
    of this project (:data:`edgekd.onnx.session.CONFIGURATION`); other programs must set
    that entry too, or ONNX Runtime rounds the activations of MatMul to 8 bits.

    Args:
        onnx_path: a float32 model.
        out: where to write.
        keep: names of nodes that are not changed.
        samples: real inputs that the preparation is checked on; random where None.

    Raises:
        InputError: the model is broken, quantized already or too old; ``keep`` names no node;
            there are no weights to quantize, or they are not finite.
        StageError: the file cannot be written, or the prepared model's outputs differ from the
        file's.
    """
    prepared = prepare_onnx(onnx_path, samples)
    model = prepared.copy()
    kept = prepared.named(keep)
    if not dequantize_weights(model.graph, set(_WEIGHTS), kept, onnx_path):
        raise nothing_to_quantize(prepared, _WEIGHTS, kept)
    prepared.write(model, out)


def dequantize_weights(
    graph: onnx.GraphProto, types: Collection[str], keep: Collection[str], source: Path
) -> int:
    """Replace float32 weights by int8 ones that are dequantized before their nodes, in place.

    Args:
        graph: of the model.
        types: operators whose weights are replaced.
        keep: names of nodes that are not changed.
        source: the model's file, for an error.

    Returns:
        how many weights were replaced.

    Raises:
        InputError: a weight is NaN or infinite.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    done: dict[tuple[str, int], str] = {}
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in graph.node:
        inputs, axis_of = _WEIGHTS.get(node.op_type, ((), _matmul_axis))
        if node.op_type not in types or node.name in keep:
            inputs = ()
        after: list[onnx.NodeProto] = []
        for index in inputs:
            tensor = weights.get(node.input[index]) if index < len(node.input) else None
            if tensor is None or not _is_large(tensor):
                continue
            check_finite_weight(tensor, source)
            rank = len(tensor.dims)
            axis = axis_of(node, rank)
            if node.op_type == "Einsum":
                axis = _einsum_axis(node, index, rank)
            if node.op_type == "Gather":
                if len(tensor.dims) != 2 or _gather_axis(node) != 0:
                    continue
                after += _gather_rows(graph, node, tensor, done)
            else:
                node.input[index] = _given_back(graph, nodes, tensor, axis, done)
            count += 1
        nodes += [node, *after]
    assign(graph.node, nodes)
    drop_unused(graph)
    return count


def _is_large(tensor: onnx.TensorProto) -> bool:
    return (
        tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) >= 2
        and int(np.prod(tensor.dims)) >= _LEAST_ELEMENTS
    )


def check_finite_weight(tensor: onnx.TensorProto, source: Path) -> None:
    """
    Raises:
        InputError: the tensor has NaN or infinite values, which 8 bits cannot represent.
    """
    if not np.isfinite(numpy_helper.to_array(tensor)).all():
        raise InputError(
            f"the weights {tensor.name!r} hold NaN or infinite values",
            where=str(source),
            remedy="check the float model, its training may have diverged; or leave the node "
            "that reads them in float32: --keep NODE",
        )


def _gather_axis(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)


def _rounded(
    tensor: onnx.TensorProto, axis: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """int8 values, and float32 scales with which they are nearest, along one axis."""
    values: npt.NDArray[Any] = numpy_helper.to_array(tensor)
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values).max(axis=others, keepdims=True)
    # A scale below float32's normal numbers would divide by what rounds to 0.
    scale = np.where(largest > _LARGEST * 1e-37, largest / _LARGEST, 1.0).astype(np.float32)
    steps = np.clip(np.rint(values / scale), -_LARGEST, _LARGEST)
    return steps.astype(np.int8), scale.ravel()


def _given_back(
    graph: onnx.GraphProto,
    nodes: list[onnx.NodeProto],
    tensor: onnx.TensorProto,
    axis: int,
    done: dict[tuple[str, int], str],
) -> str:
    key = (tensor.name, axis)
    if key not in done:
        base = f"{tensor.name}.axis{axis}"
        steps, scale = _rounded(tensor, axis)
        graph.initializer.append(numpy_helper.from_array(steps, f"{base}.int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{base}.scale"))
        nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [f"{base}.int8", f"{base}.scale"],
                [f"{base}.float"],
                f"{base}.dequantize",
                axis=axis,
            )
        )
        done[key] = f"{base}.float"
    return done[key]


def _gather_rows(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    tensor: onnx.TensorProto,
    done: dict[tuple[str, int], str],
) -> list[onnx.NodeProto]:
    """Look int8 rows and their scales up, and multiply: the table itself is never dequantized."""
    base = f"{tensor.name}.rows"
    if (tensor.name, -1) not in done:
        steps, scale = _rounded(tensor, 0)
        graph.initializer.append(numpy_helper.from_array(steps, f"{base}.int8"))
        graph.initializer.append(numpy_helper.from_array(scale[:, None], f"{base}.scale"))
        done[tensor.name, -1] = base
    indices, output, name = node.input[1], node.output[0], node.name
    node.input[0], node.output[0] = f"{base}.int8", f"{output}.int8"
    return [
        helper.make_node("Cast", [f"{output}.int8"], [f"{output}.steps"], f"{name}.cast", to=1),
        helper.make_node(
            "Gather", [f"{base}.scale", indices], [f"{output}.scale"], f"{name}.scale"
        ),
        helper.make_node(
            "Mul", [f"{output}.steps", f"{output}.scale"], [output], f"{name}.rescale"
        ),
    ]
