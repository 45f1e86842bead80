"""A model of many equal layers: a given share of more layers makes it that much slower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

UNITS, ROWS = 128, 16


def save_layers(path: Path, layers: int) -> Path:
    """Write a chain of matrix products with activations; about 8 µs a layer on a desktop."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for index in range(layers):
        weight = rng.normal(0, UNITS**-0.5, (UNITS, UNITS)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"]))
        last = f"y{index}"
        nodes.append(helper.make_node("Tanh", [f"m{index}"], [last]))
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, UNITS])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [ROWS, UNITS])],
        weights,
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path
