"""A foreign model gets the pipeline's names and keeps its answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgekd.onnx.file import describe_onnx
from edgekd.onnx.import_onnx import pack_onnx, rename_onnx


def model_with_subgraph() -> onnx.ModelProto:
    """y = x·w if its sum is positive, else x·w + x, the branches reading the outer x."""
    then = helper.make_graph(
        [helper.make_node("Identity", ["p"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Add", ["p", "x"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("ReduceSum", ["p"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    weights = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.float32(0), "zero")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def answers(path: Path, name: str) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.ones((2, 4), np.float32)
    return [session.run(None, {name: sign * x})[0] for sign in (1, -1)]


def test_packed_and_renamed_model_gives_the_same_answers(tmp_path: Path) -> None:
    source, packed = tmp_path / "a" / "m.onnx", tmp_path / "packed.onnx"
    source.parent.mkdir()
    onnx.save(
        model_with_subgraph(),
        source,
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    before = answers(source, "x")
    pack_onnx(source, packed)
    (source.parent / "w.bin").unlink()
    rename_onnx(packed, {"x": "image", "y": "logits"})
    spec = describe_onnx(packed).spec
    assert (spec.inputs[0].name, spec.outputs[0].name) == ("image", "logits")
    for old, new in zip(before, answers(packed, "image"), strict=True):
        np.testing.assert_array_equal(old, new)
    onnx.checker.check_model(str(packed), full_check=True)
