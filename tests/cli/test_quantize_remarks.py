"""What ``edgekd quantize`` reports of float32 nodes, of outputs that are not one row per
sample, and of graphs that cannot run."""

from __future__ import annotations

import json

import numpy as np
import onnx

from tests.cli.quantizing import quantize
from tests.onnx_builders import Graph


def saved(path, graph, inputs, outputs, **arrays):
    np.savez(path.with_suffix(".npz"), **arrays)
    return graph.save(path, inputs, outputs), path.with_suffix(".npz")


def test_nodes_that_stay_in_float32_are_named_with_their_weights(tmp_path):
    g = Graph(1)
    g.add("Transpose", ["x"], "t", "turn", perm=[1, 0, 2])
    weights = [g.weight("w", 1, 24, 16), g.weight("r", 1, 24, 8)]
    g.add("GRU", ["t", *weights], ["ys", "hn"], "cell", hidden_size=8)
    g.add("Squeeze", ["hn", g.constant("zero", np.array([0]))], "last", "last")
    g.add("MatMul", ["last", g.weight("v", 8, 10)], "y", "head")
    x = np.random.default_rng(0).standard_normal((20, 6, 16)).astype(np.float32)
    shapes = {"x": ["N", 6, 16]}, {"y": ["N", 10]}
    model, data = saved(tmp_path / "m.onnx", g, *shapes, x=x)
    words = ["-o", tmp_path / "q.onnx", "--no-timing", "--json", tmp_path / "r.json"]
    result = quantize(model, "--calibration", data, *words)
    assert "1 node stays in float32, with 2,304 bytes of weights" in result.output
    assert "cell (GRU, 2,304 bytes)" in result.output
    assert "stores the weights of GRU in 8 bits" in result.output
    (row,) = json.loads((tmp_path / "r.json").read_text())["float32_nodes"]
    assert (row["node"], row["bytes"]) == ("cell", 2304)


def test_detections_are_compared_as_sets_and_that_is_said(tmp_path):
    g = Graph(2)
    g.add("MatMul", ["x", g.weight("w", 16, 8)], "s", "head")
    g.add("Greater", ["s", g.constant("least", np.float32(0.5))], "m", "over")
    g.add("NonZero", ["m"], "z", "places")
    g.add("Transpose", ["z"], "found", "rows", perm=[1, 0])
    x = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32)
    shapes = {"x": ["N", 16]}, {"s": ["N", 8], "found": ["K", 2]}
    model, data = saved(tmp_path / "m.onnx", g, *shapes, x=x)
    proto = onnx.load(str(model))
    proto.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    onnx.save(proto, str(model))
    result = quantize(model, "--calibration", data, "-o", tmp_path / "q.onnx")
    assert "found: its size depends on the data: samples run one at a time" in " ".join(
        result.output.split()
    )


def test_a_graph_that_cannot_run_names_its_node_and_no_memory(tmp_path):
    """A Reshape to a size that the samples do not have."""
    g = Graph(3)
    g.add("Reshape", ["x", g.constant("shape", np.array([-1, 7]))], "r", "fold")
    g.add("MatMul", ["r", g.weight("w", 7, 8)], "y", "head")
    x = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32)
    model, data = saved(tmp_path / "m.onnx", g, {"x": ["N", 16]}, {"y": None}, x=x)
    result = quantize(model, "--calibration", data, "-o", tmp_path / "q.onnx", code=3)
    assert "'fold'" in result.output
    assert "memory" not in result.output
    assert str(model) in result.output
