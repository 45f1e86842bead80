"""Questions to a graph: the precisions of its own numbers, wherever they lie."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.onnx.graph import precisions_of
from tests.onnx_builders import save_onnx

CONSTANT = "w = Constant <value = float16[2] {1, 1}> ()"
DEQUANTIZE = "w = DequantizeLinear (a, b)"
CAST = "w = Cast <to = 10> (x)"


def inside(node):
    """The node in both branches of an If."""
    body = f"b () => (w) {{ {node} }}"
    return f"z = If (x) <then_branch = {body}, else_branch = {body}>"


@pytest.mark.parametrize(
    ("node", "half_weight", "half", "int8"),
    [
        ("", False, False, False),
        (CAST, False, False, False),
        ("", True, True, False),
        (CONSTANT, False, True, False),
        (inside(CONSTANT), False, True, False),
        (DEQUANTIZE, False, False, True),
        (inside(DEQUANTIZE), True, True, True),
    ],
)
def test_weights_and_quantization_are_found_at_any_depth(tmp_path, node, half_weight, half, int8):
    """y = x, and more that need not be of use."""
    text = f"(float[2] x) => (float[2] y) {{ y = Identity (x)  {node} }}"
    path = save_onnx(
        tmp_path / "m.onnx", text, {"w": np.ones(2, np.float16)} if half_weight else {}
    )
    assert precisions_of(path) == {"half": half, "int8": int8}
