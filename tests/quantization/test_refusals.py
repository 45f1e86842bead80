"""What cannot be quantized is refused with what is wrong about it."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgekd.errors import InputError
from edgekd.quantization.dynamic import quantize_dynamic
from edgekd.quantization.weights_only import quantize_weights
from tests.onnx_builders import Graph, parse_onnx
from tests.quantization.quantizing import quantizer

X = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)


def linear(path, weights):
    g = Graph()
    g.add("MatMul", ["x", g.constant("w", weights)], "y", "first")
    return g.save(path, {"x": ["b", 16]}, {"y": ["b", weights.shape[1]]})


def weights(value):
    values = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32)
    values[3, 4] = value
    return values


def static(path, tmp_path, keep=()):
    return quantizer(path, {"x": X}, tmp_path, keep=keep)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("write", [quantize_weights, quantize_dynamic])
def test_weights_that_are_no_numbers_are_named(tmp_path, write, value):
    path = linear(tmp_path / "m.onnx", weights(value))
    with pytest.raises(InputError, match="the weights 'w' hold NaN or infinite") as caught:
        write(path, tmp_path / "o.onnx")
    assert caught.value.where == str(path)
    assert not (tmp_path / "o.onnx").exists()


def branching(path):
    """y = x @ w, in both branches of an If; nothing outside."""
    branch = "{0} () => (float[b,8] {0}_y) {{ [{0}_product] {0}_y = MatMul (x, {0}_w) }}"
    text = f"""(float[b,16] x) => (float[b,8] y) {{
        [sum] sum = ReduceSum <keepdims = 0> (x)
        [cast] some = Cast <to = 9> (sum)
        [choice] y = If (some) <
            then_branch = {branch.format("then")}, else_branch = {branch.format("else")}>
    }}"""
    model = parse_onnx(text)
    for attribute in model.graph.node[2].attribute:
        w = numpy_helper.from_array(weights(0), f"{attribute.g.name}_w")
        attribute.g.initializer.append(w)
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("method", ["static", "dynamic", "weights-only"])
def test_layers_in_a_branch_are_named_with_the_reason(tmp_path, method):
    path = branching(tmp_path / "m.onnx")
    write = {"static": static, "dynamic": quantize_dynamic, "weights-only": quantize_weights}
    with pytest.raises(InputError, match="in a body of If 'choice'") as caught:
        write[method](path, tmp_path / "o.onnx")
    assert "MatMul 'then_product'" in str(caught.value)


def test_computed_weights_are_named_with_what_computes_them(tmp_path):
    g = Graph()
    g.add("Softmax", ["v"], "w", "gate")
    g.add("Conv", ["x", "w"], "y", "first")
    path = g.save(
        tmp_path / "m.onnx",
        {"x": ["b", 4, 5, 5], "v": [8, 4, 3, 3]},
        {"y": ["b", 8, 3, 3]},
    )
    with pytest.raises(
        InputError, match="Conv 'first' whose weights 'w' are the result of Softmax"
    ):
        quantize_weights(path, tmp_path / "o.onnx")


def test_kept_and_small_layers_are_told_apart(tmp_path):
    path = linear(tmp_path / "m.onnx", weights(0))
    with pytest.raises(InputError, match="MatMul 'first' kept in float"):
        static(path, tmp_path, keep=["first"])
    small = linear(tmp_path / "small.onnx", weights(0)[:, :2])
    with pytest.raises(InputError, match=r"whose weights 'w' \(16, 2\)"):
        quantize_weights(small, tmp_path / "o.onnx")


def test_an_answer_that_is_nan_leaks_no_warning(tmp_path):
    """Log of a negative number is NaN in both the model and the prepared one."""
    g = Graph()
    g.add("MatMul", ["x", g.constant("w", weights(0))], "y", "first")
    g.add("Log", ["y"], "z", "log")
    path = g.save(tmp_path / "m.onnx", {"x": ["b", 16]}, {"y": ["b", 8], "z": ["b", 8]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        static(path, tmp_path).write(tmp_path / "o.onnx")


def test_activations_that_do_not_vary_are_told(tmp_path):
    path = linear(tmp_path / "m.onnx", weights(0))
    assert static(path, tmp_path).constant == ()
    zeros = {"x": np.zeros((4, 16), np.float32)}
    assert set(quantizer(path, zeros, tmp_path).constant) == {"x", "y"}


def test_errors_of_the_calibration_name_the_users_model(tmp_path):
    path = linear(tmp_path / "m.onnx", weights(0))
    for samples in ({"x": X[:1]}, {"x": np.full((4, 16), np.nan, np.float32)}, {"z": X}):
        with pytest.raises(InputError) as caught:
            quantizer(path, samples, tmp_path)
        assert caught.value.where == str(path)
