"""The mean over an image's positions is computed in 8 bits."""

import numpy as np
import onnx
import pytest

from tests.onnx_builders import distance, pairs_of, run, types_of
from tests.quantization import quantizing

IMAGES = np.random.default_rng(2).standard_normal((40, 3, 6, 8)).astype("f4")


def network(graph, path, opset, axes, keepdims, gemm_inputs):
    """Conv → ReduceMean over ``axes`` → Flatten → Gemm."""
    graph.add("Conv", ["image", graph.weight("w", 4, 3, 3, 3)], "c", "conv", pads=[1] * 4)
    if opset >= 18:
        names = ["c", graph.constant("axes", np.array(axes))]
        graph.add("ReduceMean", names, "m", "mean", keepdims=keepdims)
    else:
        graph.add("ReduceMean", ["c"], "m", "mean", axes=axes, keepdims=keepdims)
    graph.add("Flatten", ["m"], "f", "flatten")
    graph.add("Gemm", ["f", graph.weight("v", gemm_inputs, 5)], "y", "head")
    return graph.save(path, {"image": ["batch", 3, 6, 8]}, {"y": ["batch", 5]}, opset)


def quantized(path, tmp_path, runtime="cpu", **settings):
    return quantizing.quantized(path, {"image": IMAGES}, tmp_path, runtime=runtime, **settings)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_it_becomes_global_average_pooling(graph, tmp_path, opset, axes, keepdims):
    path = network(graph, tmp_path / "m.onnx", opset, axes, keepdims, 4)
    quantizer, out = quantized(path, tmp_path)
    assert "mean" in quantizer.nodes
    types = types_of(out)
    assert types["GlobalAveragePool"] == 1
    assert types["ReduceMean"] == 0
    assert pairs_of(out)["mean"] == [True]
    reference = run(path, {"image": IMAGES})["y"]
    assert distance(reference, run(quantizer.prepared, {"image": IMAGES})["y"]) < 1e-5
    assert distance(reference, run(out, {"image": IMAGES})["y"]) < 8 / 255


def test_onnx_runtime_then_computes_all_of_the_model_in_8_bits(graph, tmp_path):
    import onnxruntime

    path = network(graph, tmp_path / "m.onnx", 18, [2, 3], 0, 4)
    _, out = quantized(path, tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"])
    types = types_of(tmp_path / "optimized.onnx")
    assert types["QLinearGlobalAveragePool"] == 1
    assert types["DequantizeLinear"] == 0


@pytest.mark.parametrize(
    ("axes", "keepdims", "gemm_inputs"), [([1], 1, 48), ([3], 0, 24), ([1, 2, 3], 0, 1)]
)
def test_other_means_stay(graph, tmp_path, axes, keepdims, gemm_inputs):
    path = network(graph, tmp_path / "m.onnx", 18, axes, keepdims, gemm_inputs)
    _, out = quantized(path, tmp_path)
    assert types_of(out)["ReduceMean"] == 1


def test_it_stays_for_tensorrt_which_fuses_it_by_itself(graph, tmp_path):
    path = network(graph, tmp_path / "m.onnx", 18, [2, 3], 0, 4)
    _, out = quantized(path, tmp_path, "tensorrt")
    assert types_of(out)["ReduceMean"] == 1


@pytest.mark.parametrize("tail", ["output", "softmax", "norm", "both"])
def test_a_mean_that_no_layer_rounds_keeps_its_precision(graph, tmp_path, tail):
    graph.add("Conv", ["image", graph.weight("w", 4, 3, 3, 3)], "c", "conv", pads=[1] * 4)
    mean = "y" if tail == "output" else "m"
    graph.add("ReduceMean", ["c"], mean, "mean", axes=[2, 3], keepdims=0)
    if tail == "softmax":
        graph.add("Softmax", ["m"], "y")
    if tail == "norm":
        scale = graph.constant("scale", np.ones(4, np.float32))
        graph.add("LayerNormalization", ["m", scale], "n")
    if tail in ("norm", "both"):
        source = "n" if tail == "norm" else "m"
        graph.add("Gemm", [source, graph.weight("v", 4, 4)], "y", "head")
    outputs = {"y": ["batch", 4]} | ({"m": ["batch", 4]} if tail == "both" else {})
    path = graph.save(tmp_path / "m.onnx", {"image": ["batch", 3, 6, 8]}, outputs)
    _, out = quantized(path, tmp_path)
    assert types_of(out)["ReduceMean"] == 1
    (given,) = (node for node in onnx.load(out).graph.node if node.name == "mean")
    rounded = run(out, {"image": IMAGES})["y"]
    assert given.output[0] in ("m", "y")
    assert len(np.unique(rounded)) > 128  # of 160: no steps of a scale


def test_pooling_that_no_layer_rounds_keeps_its_precision_too(graph, tmp_path):
    graph.add("Conv", ["image", graph.weight("w", 4, 3, 3, 3)], "c", "conv", pads=[1] * 4)
    graph.add("GlobalAveragePool", ["c"], "p", "pool")
    graph.add("Flatten", ["p"], "y", "flatten")
    path = graph.save(tmp_path / "m.onnx", {"image": ["batch", 3, 6, 8]}, {"y": ["batch", 4]})
    _, out = quantized(path, tmp_path)
    assert len(np.unique(run(out, {"image": IMAGES})["y"])) > 128


def test_new_names_are_free(graph, tmp_path):
    graph.add("Conv", ["image", graph.weight("w", 4, 3, 3, 3)], "m.pooled", "mean.flatten")
    graph.add("ReduceMean", ["m.pooled"], "m", "mean", axes=[2, 3], keepdims=0)
    graph.add("Gemm", ["m", graph.weight("v", 4, 5)], "y", "head")
    path = graph.save(tmp_path / "m.onnx", {"image": ["batch", 3, 6, 8]}, {"y": ["batch", 5]})
    _, out = quantized(path, tmp_path)
    assert types_of(out)["GlobalAveragePool"] == 1
    assert distance(run(path, {"image": IMAGES})["y"], run(out, {"image": IMAGES})["y"]) < 8 / 255


def test_it_is_kept_as_it_is_by_its_name(graph, tmp_path):
    path = network(graph, tmp_path / "m.onnx", 18, [2, 3], 0, 4)
    _, out = quantized(path, tmp_path, keep=["mean"])
    assert types_of(out)["ReduceMean"] == 1
