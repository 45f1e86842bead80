"""An imported model gets the pipeline's names and the same outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from edgekd.onnx.file import describe_onnx
from edgekd.onnx.import_onnx import pack_onnx, rename_onnx
from tests.onnx_builders import parse_onnx, run, save_external


def model_with_subgraph() -> onnx.ModelProto:
    """y = x·w if its sum is positive, else x·w + x, the branches reading the outer x."""
    text = """(float[n,4] x) => (float[n,4] y) {
        p = MatMul (x, w)
        s = ReduceSum <keepdims = 0> (p)
        c = Greater (s, zero)
        y = If (c) <then_branch = then () => (float[] t) { t = Identity (p) },
                    else_branch = else () => (float[] e) { e = Add (p, x) }>
    }"""
    weights = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    return parse_onnx(text, {"w": weights, "zero": np.float32(0)}, opset=18)


def answers(path: Path, name: str) -> list[np.ndarray]:
    x = np.ones((2, 4), np.float32)
    return [next(iter(run(path, {name: sign * x}).values())) for sign in (1, -1)]


def test_packed_and_renamed_model_gives_the_same_answers(tmp_path: Path) -> None:
    source, packed = tmp_path / "a" / "m.onnx", tmp_path / "packed.onnx"
    source.parent.mkdir()
    save_external(model_with_subgraph(), source)
    before = answers(source, "x")
    pack_onnx(source, packed)
    (source.parent / "w.bin").unlink()
    rename_onnx(packed, {"x": "image", "y": "logits"})
    spec = describe_onnx(packed).spec
    assert (spec.inputs[0].name, spec.outputs[0].name) == ("image", "logits")
    for old, new in zip(before, answers(packed, "image"), strict=True):
        np.testing.assert_array_equal(old, new)
    onnx.checker.check_model(str(packed), full_check=True)
