"""Every matrix product with constant weights computes in 8 bits, whatever is added to it and
however many dimensions its weights have."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.quantization.dynamic import quantize_dynamic
from edgekd.quantization.weights_only import quantize_weights
from tests.onnx_builders import Graph, distance, run, save_onnx, weights_of
from tests.quantization import quantizing
from tests.quantization.quantizing import quantized

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def static(path, samples, tmp_path, runtime="cpu"):
    return quantized(path, samples, tmp_path, runtime=runtime)[1]


def float_matrices(path):
    return {
        name: values.size
        for name, values in weights_of(path).items()
        if values.dtype == np.float32 and values.ndim > 1 and values.size >= 64
    }


def residual(path, blocks=2, width=32):
    """h + relu(h U) V, two-dimensional: what ONNX Runtime fuses to Gemm(relu(h U), V, h)."""
    g, h = Graph(1), "x"
    for i in range(blocks):
        g.add("MatMul", [h, g.weight(f"u{i}", width, 24, scale=0.2)], f"a{i}", f"up{i}")
        g.add("Relu", [f"a{i}"], f"r{i}", f"relu{i}")
        g.add("MatMul", [f"r{i}", g.weight(f"v{i}", 24, width, scale=0.2)], f"b{i}", f"down{i}")
        h = g.add("Add", [f"b{i}", h], f"h{i}", f"sum{i}")
    return g.save(path, {"x": ["N", width]}, {h: ["N", width]})


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
def test_a_product_whose_shortcut_is_added_is_in_8_bits(tmp_path, runtime):
    path, x = residual(tmp_path / "m.onnx"), {"x": normal(40, 32)}
    out = static(path, x, tmp_path, runtime)
    assert float_matrices(out) == {}
    assert distance(run(path, x)["h1"], run(out, x)["h1"]) < 0.05


def test_a_fused_product_and_its_sum_keep_their_names(tmp_path):
    path, x = residual(tmp_path / "m.onnx"), {"x": normal(40, 32)}
    quantizer = quantizing.quantizer(path, x, tmp_path)
    assert {"up0", "down0", "sum0", "up1", "down1", "sum1"} <= set(quantizer.nodes)
    quantizer.write(tmp_path / "kept.onnx", ["down0"])
    assert set(float_matrices(tmp_path / "kept.onnx")) == {"v0"}


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("settings", [{}, {"transB": 1}, {"transB": 1, "alpha": 2.0}])
def test_a_gemm_whose_c_is_computed_is_in_8_bits(tmp_path, beta, settings):
    g = Graph(2)
    shape = (24, 16) if settings.get("transB") else (16, 24)
    inputs = ["x", g.weight("w", *shape), "skip"]
    g.add("Gemm", inputs, "y", "fc", beta=beta, **settings)
    path = g.save(tmp_path / "m.onnx", {"x": ["N", 16], "skip": ["N", 24]}, {"y": ["N", 24]})
    x = {"x": normal(40, 16), "skip": normal(40, 24)}
    out = static(path, x, tmp_path)
    assert float_matrices(out) == {}
    assert distance(run(path, x)["y"], run(out, x)["y"]) < 0.03


@pytest.mark.parametrize("shape", [(), (1,), (24,), (1, 24), (40, 1), (40, 24)])
def test_a_constant_c_of_any_shape_is_no_obstacle(tmp_path, shape):
    g = Graph(3)
    g.add("Gemm", ["x", g.weight("w", 16, 24), g.weight("c", *shape)], "y", "fc", beta=0.5)
    path = g.save(tmp_path / "m.onnx", {"x": [40, 16]}, {"y": [40, 24]})
    x = {"x": normal(80, 16)}
    out = static(path, x, tmp_path)
    assert set(float_matrices(out)) <= {"c"}
    first = {"x": x["x"][:40]}
    assert distance(run(path, first)["y"], run(out, first)["y"]) < 0.03


@pytest.mark.parametrize("write", [quantize_dynamic, quantize_weights])
def test_other_methods_take_them_too(tmp_path, write):
    path, x = residual(tmp_path / "m.onnx"), {"x": normal(40, 32)}
    write(path, tmp_path / "o.onnx")
    assert float_matrices(tmp_path / "o.onnx") == {}
    assert distance(run(path, x)["h1"], run(tmp_path / "o.onnx", x)["h1"]) < 0.05


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
@pytest.mark.parametrize(
    ("x", "w", "y"),
    [
        (["N", 6, 16], (1, 16, 8), ["N", 6, 8]),
        (["N", 6, 2, 16], (6, 16, 8), ["N", 6, 2, 8]),
        (["N", 3, 6, 16], (1, 3, 16, 8), ["N", 3, 6, 8]),
        (["N", 3, 6, 16], (3, 16, 8), ["N", 3, 6, 8]),
        (["N", 3, 6, 16], (1, 1, 16, 8), ["N", 3, 6, 8]),
        (["N", 16], (1, 16, 8), [1, "N", 8]),
        (["N", 16], (4, 16, 8), [4, "N", 8]),
    ],
)
def test_weights_of_three_and_four_dimensions(tmp_path, runtime, x, w, y):
    """numpy's broadcasting: a stack of matrices, one matrix for all, or one more dimension."""
    g = Graph(4)
    g.add("MatMul", ["x", g.weight("w", *w)], "y", "mm")
    path = g.save(tmp_path / "m.onnx", {"x": x}, {"y": y})
    data = {"x": normal(40, *x[1:])}
    out = static(path, data, tmp_path, runtime)
    assert float_matrices(out) == {}
    assert distance(run(path, data)["y"], run(out, data)["y"]) < 0.05


def test_one_matrix_in_a_stack_has_a_scale_for_each_column(tmp_path):
    g = Graph(5)
    columns = np.geomspace(0.001, 1, 8).astype(np.float32)
    g.add("MatMul", ["x", g.constant("w", normal(1, 16, 8) * columns)], "y", "mm")
    path = g.save(tmp_path / "m.onnx", {"x": ["N", 6, 16]}, {"y": ["N", 6, 8]})
    x = {"x": normal(40, 6, 16)}
    for out in (static(path, x, tmp_path), tmp_path / "d.onnx"):
        if not out.exists():
            quantize_dynamic(path, out)
        scales = [v for n, v in weights_of(out).items() if "scale" in n and v.shape == (8,)]
        assert len(scales) == 1
        assert scales[0].max() / scales[0].min() > 100


def test_integer_inputs_beside_the_data(tmp_path):
    """x W + float(ids): the addend is computed from integers."""
    text = """(float[N,16] x, int64[N,1] ids) => (float[N,5] y)
    { [mm] t = MatMul (x, w)  [cast] f = Cast <to = 1> (ids)  [sum] y = Add (t, f) }"""
    path = save_onnx(tmp_path / "m.onnx", text, {"w": 0.3 * normal(16, 5)})
    x = {"x": normal(32, 16), "ids": RANDOM.integers(0, 3, (32, 1))}
    out = static(path, x, tmp_path)
    assert float_matrices(out) == {}
    assert distance(run(path, x)["y"], run(out, x)["y"]) < 0.03
