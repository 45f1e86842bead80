"""A graph: the precisions of its own numbers, and the inputs that decide how much is computed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from edgekd.onnx.graph import deciding_inputs, precisions_of
from tests.onnx_builders import parse_onnx, save_onnx

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


def model(inputs, body):
    return parse_onnx(f"({inputs}) => (float y) {{ {body} }}", opset=18)


@pytest.mark.parametrize(
    ("inputs", "body", "what"),
    [
        ("int64 n, float[1] x", "y = Expand(x, n)", "the shape of Expand"),
        ("int32 n", "c = Cast<to = 7>(n) y = ConstantOfShape(c)", "the shape of ConstantOfShape"),
        ("int64 n, float[9] x", "y, i = TopK(x, n)", "k of TopK"),
        ("int64[2] n, float[1,1] x", "y = Tile(x, n)", "the repeats of Tile"),
        ("float n", "y = Range(n, n, n)", "the length of Range"),
        ("int64 n, float[1] x", "o = Add(n, n) y = Slice(x, n, o)", "what is cut out of Slice"),
        ("float[4] n, float[1,1,2,2] x", 'y = Resize(x, "", n)', "the size of Resize"),
        ("bool[b,t] n", "i = NonZero(n) y = Cast<to = 1>(i)", "how many there are of NonZero"),
        (
            "int64[b] n",
            "m = ReduceMax(n) k = Max(m, m) z = Cast<to = 1>(k) y = Range(z, z, z)",
            "the length of Range",
        ),
    ],
)
def test_a_number_that_decides_a_size_is_found_through_arithmetic(inputs, body, what):
    found = deciding_inputs(model(inputs, body))
    assert set(found) == {"n"}
    assert found["n"].startswith(what)


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        ("int64[b,t] n, float[9,4] w", "y = Gather(w, n)"),
        ("uint8[1,3,4,4] n", "c = Cast<to = 1>(n) y = Relu(c)"),
        ("float[b,4] n", "s = Shape(n) y = ConstantOfShape(s)"),
        ("float[b,4] n, int64[1] k", "y = Unsqueeze(n, k)"),
    ],
)
def test_values_that_decide_no_size_are_none_of_them(inputs, body):
    assert deciding_inputs(model(inputs, body)) == {}


def looped(trips, condition, again):
    """A loop over ``acc`` whose body computes ``again``, whether to go on."""
    body = f"""body (int64 i, bool go, float acc) => (bool again, float next)
    {{ again = {again}  next = Tanh (acc) }}"""
    loop = f"[rounds] y = Loop ({trips}, {condition}, x) <body = {body}>"
    return model("int64 n, bool on, float x", loop)


def test_loop_length_depends_on_trip_count_condition_and_body():
    same, below = "Identity (go)", "Less (i, n)"
    assert set(deciding_inputs(looped("n", "", same))) == {"n"}
    assert set(deciding_inputs(looped("n", "on", same))) == {"n", "on"}
    assert deciding_inputs(looped("", "", below)) == {"n": "the number of rounds of Loop 'rounds'"}
    assert deciding_inputs(looped("", "", same)) == {}


def test_a_function_is_looked_into():
    made = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18, "local" : 1]>
        g (int64[2] n) => (float[?,?] y) { [z] y = local.Zeros (n) }
        <domain: "local", opset_import: ["" : 18]>
        Zeros (a) => (b) { b = ConstantOfShape (a) }
    """)
    onnx.checker.check_model(made)
    assert set(deciding_inputs(made)) == {"n"}
