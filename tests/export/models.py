"""Small ONNX models for tests of edgerun, made with onnx alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None]


def save(path: Path, nodes, inputs, outputs, initializers=()) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def value(name: str, shape: Shape, kind: int = TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def linear(path: Path, batch: int | str | None = "batch", features: int = 4) -> Path:
    """y = x · w, with w = [[0, 1, …], …]: (batch, features) → (batch, 3)."""
    weights = np.arange(features * 3, dtype=np.float32).reshape(features, 3)
    return save(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", [batch, features])],
        [value("y", [batch, 3])],
        [numpy_helper.from_array(weights, "w")],
    )


def linear_answer(x: np.ndarray) -> np.ndarray:
    weights = np.arange(x.shape[1] * 3, dtype=np.float32).reshape(-1, 3)
    return x.astype(np.float32) @ weights


def heavy(path: Path, size: int = 256) -> Path:
    """The same signature as :func:`linear`, and far more work."""
    big = np.ones((4, size), np.float32)
    square = np.full((size, size), 1 / size, np.float32)
    nodes = [helper.make_node("MatMul", ["x", "big"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{i}", "square"], [f"h{i + 1}"]) for i in range(8)]
    nodes += [helper.make_node("ReduceSum", ["h8"], ["y"])]
    initializers = [numpy_helper.from_array(big, "big"), numpy_helper.from_array(square, "square")]
    return save(path, nodes, [value("x", ["batch", 4])], [value("y", [1, 1])], initializers)


def every_dtype(path: Path) -> Path:
    """One input of each type that can be fed; each is cast to float and summed."""
    kinds = {
        "f16": TensorProto.FLOAT16,
        "f64": TensorProto.DOUBLE,
        "i8": TensorProto.INT8,
        "u8": TensorProto.UINT8,
        "i32": TensorProto.INT32,
        "i64": TensorProto.INT64,
        "flag": TensorProto.BOOL,
    }
    nodes = [
        helper.make_node("Cast", [name], [f"{name}_f"], to=TensorProto.FLOAT) for name in kinds
    ]
    nodes.append(helper.make_node("Sum", [f"{name}_f" for name in kinds], ["y"]))
    inputs = [value(name, ["batch", 2], kind) for name, kind in kinds.items()]
    return save(path, nodes, inputs, [value("y", ["batch", 2])])


def stateful_if(path: Path) -> Path:
    """A recurrent cell whose weights lie in Constant nodes of both branches of an If.

    Inputs: input (batch, 3), state (1, batch, 3), rate (scalar int64); outputs without shapes.
    """

    def branch(name: str, factor: float):
        weight = numpy_helper.from_array(np.eye(3, dtype=np.float32) * factor)
        nodes = [
            helper.make_node("Constant", [], [f"{name}_w"], value=weight),
            helper.make_node("MatMul", ["input", f"{name}_w"], [f"{name}_y"]),
        ]
        output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [output])

    nodes = [
        helper.make_node("Constant", [], ["limit"], value=numpy_helper.from_array(np.int64(8000))),
        helper.make_node("Greater", ["rate", "limit"], ["fast"]),
        helper.make_node(
            "If", ["fast"], ["y"], then_branch=branch("a", 2.0), else_branch=branch("b", 1.0)
        ),
        helper.make_node("Add", ["state", "y"], ["next"]),
    ]
    inputs = [
        value("input", ["batch", 3]),
        value("state", [1, "batch", 3]),
        value("rate", [], TensorProto.INT64),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "next")
    ]
    return save(path, nodes, inputs, outputs)


def of_strings(path: Path) -> Path:
    return save(
        path,
        [helper.make_node("Identity", ["text"], ["y"])],
        [value("text", ["batch"], TensorProto.STRING)],
        [value("y", ["batch"], TensorProto.STRING)],
    )
