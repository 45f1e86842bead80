"""Small ONNX models for tests of edgerun."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.onnx_builders import save_onnx


def linear(path: Path, batch: int | str = "batch", features: int = 4) -> Path:
    """y = x · w, with w = [[0, 1, …], …]: (batch, features) → (batch, 3)."""
    text = f"(float[{batch},{features}] x) => (float[{batch},3] y) {{ y = MatMul (x, w) }}"
    weights = np.arange(features * 3, dtype=np.float32).reshape(features, 3)
    return save_onnx(path, text, {"w": weights})


def linear_answer(x: np.ndarray) -> np.ndarray:
    weights = np.arange(x.shape[1] * 3, dtype=np.float32).reshape(-1, 3)
    return x.astype(np.float32) @ weights


def heavy(path: Path, size: int = 256) -> Path:
    """The same signature as :func:`linear`, and far more work."""
    products = "\n".join(f"h{i + 1} = MatMul (h{i}, square)" for i in range(8))
    text = f"""(float[batch,4] x) => (float[1,1] y)
    {{ h0 = MatMul (x, big) {products} y = ReduceSum (h8) }}"""
    square = np.full((size, size), 1 / size, np.float32)
    return save_onnx(path, text, {"big": np.ones((4, size), np.float32), "square": square})


def every_dtype(path: Path) -> Path:
    """One input of each type that can be fed; each is cast to float and summed."""
    kinds = {"f16": "float16", "f64": "double", "i8": "int8", "u8": "uint8", "i32": "int32",
             "i64": "int64", "flag": "bool"}  # fmt: skip
    inputs = ", ".join(f"{kind}[batch,2] {name}" for name, kind in kinds.items())
    casts = "\n".join(f"{name}_f = Cast <to = 1> ({name})" for name in kinds)
    parts = ", ".join(f"{name}_f" for name in kinds)
    return save_onnx(path, f"({inputs}) => (float[batch,2] y) {{ {casts} y = Sum ({parts}) }}")


def stateful_if(path: Path) -> Path:
    """A recurrent cell whose weights lie in Constant nodes of both branches of an If.

    Inputs: input (batch, 3), state (1, batch, 3), rate (scalar int64); outputs without shapes.
    """

    def branch(name: str, factor: float) -> str:
        values = ", ".join(map(str, (np.eye(3) * factor).ravel()))
        return f"""{name} () => (float[] {name}_y) {{
            {name}_w = Constant <value = float[3,3] {{{values}}}> ()
            {name}_y = MatMul (input, {name}_w)
        }}"""

    text = f"""(float[batch,3] input, float[1,batch,3] state, int64 rate)
        => (float[] y, float[] next)
    {{
        fast = Greater (rate, limit)
        y = If (fast) <then_branch = {branch("a", 2.0)}, else_branch = {branch("b", 1.0)}>
        next = Add (state, y)
    }}"""
    return save_onnx(path, text, {"limit": np.int64(8000)})


def of_strings(path: Path) -> Path:
    return save_onnx(path, "(string[batch] text) => (string[batch] y) { y = Identity (text) }")
