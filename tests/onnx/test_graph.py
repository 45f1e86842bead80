"""Questions to a graph: the precisions of its own numbers, wherever they lie."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.onnx.graph import precisions_of

HALF = numpy_helper.from_array(np.ones(2, np.float16), "w")


def save(path, nodes, initializers=()):
    """A graph of y = x and of more that need not be of use."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    nodes = [helper.make_node("Identity", ["x"], ["y"]), *nodes]
    graph = helper.make_graph(nodes, "g", [x], [y], list(initializers))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def inside(node):
    """The node in both branches of an If."""
    graph = helper.make_graph([node], "b", [], [helper.make_empty_tensor_value_info("w")])
    return helper.make_node("If", ["x"], ["z"], then_branch=graph, else_branch=graph)


CONSTANT = helper.make_node("Constant", [], ["w"], value=HALF)
DEQUANTIZE = helper.make_node("DequantizeLinear", ["a", "b"], ["w"])
CAST = helper.make_node("Cast", ["x"], ["w"], to=TensorProto.FLOAT16)


@pytest.mark.parametrize(
    ("nodes", "initializers", "half", "int8"),
    [
        ([], [], False, False),
        ([CAST], [], False, False),
        ([], [HALF], True, False),
        ([CONSTANT], [], True, False),
        ([inside(CONSTANT)], [], True, False),
        ([DEQUANTIZE], [], False, True),
        ([inside(DEQUANTIZE)], [HALF], True, True),
    ],
)
def test_weights_and_quantization_are_found_at_any_depth(tmp_path, nodes, initializers, half, int8):
    path = save(tmp_path / "m.onnx", nodes, initializers)
    assert precisions_of(path) == {"half": half, "int8": int8}
