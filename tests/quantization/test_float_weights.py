"""Nodes that keep float weights are reported, with the bytes; what has an 8-bit form gets it."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import InputError
from edgekd.quantization.dynamic import quantize_dynamic
from edgekd.quantization.node_selection import float_nodes
from edgekd.quantization.weights_only import quantize_weights
from tests.onnx_builders import Graph, distance, run
from tests.quantization.quantizing import quantized

X = np.random.default_rng(0).standard_normal((40, 6, 16)).astype(np.float32)
GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}


def recurrent(path, op, head=True):
    g = Graph(1)
    rows = GATES[op] * 32
    g.add("Transpose", ["x"], "t", "turn", perm=[1, 0, 2])
    weights = [g.weight("w", 1, rows, 16), g.weight("r", 1, rows, 32)]
    g.add(op, ["t", *weights], ["ys", "hn"], "cell", hidden_size=32)
    g.add("Squeeze", ["hn", g.constant("zero", np.array([0]))], "last" if head else "y", "last")
    if head:
        g.add("MatMul", ["last", g.weight("v", 32, 10)], "y", "head")
    return g.save(path, {"x": ["N", 6, 16]}, {"y": ["N", 10 if head else 32]})


def static(path, tmp_path):
    return quantized(path, {"x": X}, tmp_path)[1]


@pytest.mark.parametrize("op", GATES)
def test_recurrent_weights_are_named_by_static_and_stored_by_the_others(tmp_path, op):
    path = recurrent(tmp_path / "m.onnx", op)
    (row,) = float_nodes(static(path, tmp_path), {}, "none")
    assert (row.node, row.op, row.bytes) == ("cell", op, 4 * GATES[op] * 32 * (16 + 32))
    for write in (quantize_dynamic, quantize_weights):
        write(path, tmp_path / "o.onnx")
        assert float_nodes(tmp_path / "o.onnx", {}, "none") == ()
        assert distance(run(path, {"x": X})["y"], run(tmp_path / "o.onnx", {"x": X})["y"]) < 0.05


def test_a_recurrent_network_alone_is_sent_to_the_other_methods(tmp_path):
    with pytest.raises(InputError, match="nothing in this model") as error:
        static(recurrent(tmp_path / "m.onnx", "GRU", head=False), tmp_path)
    assert "--method dynamic or weights-only stores the weights of GRU" in error.value.remedy


def test_weights_behind_other_nodes_in_bodies_and_in_constants_are_found(tmp_path):
    """A weight that is turned, cast and reshaped; one in a Constant; one that a branch reads."""
    g = Graph(2)
    g.weight("w", 16, 8)
    for op, source, output, settings in (
        ("Transpose", ["w"], "w1", {"perm": [1, 0]}),
        ("Cast", ["w1"], "w2", {"to": TensorProto.FLOAT}),
        ("Identity", ["w2"], "w3", {}),
        ("Reshape", ["w3", g.constant("shape", np.array([16, 8]))], "w4", {}),
    ):
        g.add(op, source, output, **settings)
    g.add("MatMul", ["x", "w4"], "a", "behind")
    value = numpy_helper.from_array(np.ones((16, 5), np.float32), "value")
    g.nodes.append(helper.make_node("Constant", [], ["c"], "constant", value=value))
    g.add("MatMul", ["x", "c"], "b", "of_constant")
    g.weight("then_w", 16, 6)
    g.weight("else_w", 16, 6)

    def branch(name):
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        node = helper.make_node("MatMul", ["x", f"{name}_w"], [name], f"{name}_product")
        return helper.make_graph([node], name, [], [made])

    g.constant("yes", np.array(True))
    g.add("If", ["yes"], "d", "choice", then_branch=branch("then"), else_branch=branch("else"))
    g.add("Mul", ["a", g.weight("scale", 1, 8)], "y", "scaled")
    outputs = {"y": ["N", 8], "b": ["N", 5], "d": ["N", 6]}
    path = g.save(tmp_path / "m.onnx", {"x": ["N", 16]}, outputs)
    rows = {row.node: row for row in float_nodes(path, {"behind": "asked"}, "none")}
    assert {n: row.bytes for n, row in rows.items()} == {
        "behind": 4 * 16 * 8,
        "of_constant": 4 * 16 * 5,
        "then_product": 4 * 16 * 6,
        "else_product": 4 * 16 * 6,
    }
    assert rows["behind"].reason == "asked"
    assert rows["then_product"].reason == "in a body of If 'choice'"
    assert rows["of_constant"].reason == "none"


def test_a_node_without_weights_is_listed_where_there_is_a_reason(tmp_path):
    g = Graph(3)
    g.add("Add", ["x", "x"], "y", "sum")
    path = g.save(tmp_path / "m.onnx", {"x": ["N", 16]}, {"y": ["N", 16]})
    assert float_nodes(path, {}, "none") == ()
    (row,) = float_nodes(path, {"sum": "'y' is infinite"}, "none")
    assert (row.bytes, row.reason) == (0, "'y' is infinite")


@pytest.mark.parametrize(
    ("equation", "shape", "output"),
    [
        ("bti,ij->btj", (16, 12), 12),
        ("bti,ji->btj", (12, 16), 12),
        ("bti,hij->bhtj", (2, 16, 6), None),
        ("...i,ij->...j", (16, 12), 12),
    ],
)
def test_weights_of_einsum_are_stored_in_8_bits(tmp_path, equation, shape, output):
    g = Graph(4)
    g.add("Einsum", ["x", g.weight("w", *shape)], "y", "einsum", equation=equation)
    wanted = ["N", 6, output] if output else ["N", 2, 6, 6]
    path = g.save(tmp_path / "m.onnx", {"x": ["N", 6, 16]}, {"y": wanted})
    for write in (quantize_weights, quantize_dynamic):
        write(path, tmp_path / "o.onnx")
        assert float_nodes(tmp_path / "o.onnx", {}, "none") == ()
        assert distance(run(path, {"x": X})["y"], run(tmp_path / "o.onnx", {"x": X})["y"]) < 0.02


def test_an_ordinary_network_has_none(tmp_path, convolutional, images):
    for write in (quantize_weights, quantize_dynamic):
        write(convolutional, tmp_path / "o.onnx")
        left = {row.op for row in float_nodes(tmp_path / "o.onnx", {}, "none")}
        assert left == (set() if write is quantize_weights else {"Conv"})
    quantizer, out = quantized(convolutional, images, tmp_path)
    assert float_nodes(out, {}, "none") == ()
    assert quantizer.left_in_float == {}
    quantizer.write(tmp_path / "q.onnx", ["second"])
    (row,) = float_nodes(tmp_path / "q.onnx", {"second": "for accuracy"}, "none")
    assert (row.node, row.bytes) == ("second", 4 * 8 * 8 * 3 * 3)
