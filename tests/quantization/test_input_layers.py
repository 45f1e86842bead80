"""Which convolutions see the model's inputs, and a file with them in float32."""

import numpy as np
import pytest

from edgekd.onnx.samples import ArraySamples
from edgekd.quantization.static import StaticQuantizer
from tests.onnx_builders import pairs_of


def quantizer(path, tmp_path, *inputs, runtime="cpu", keep=()):
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal((8, 3, 8, 8)).astype("f4") for name in inputs}
    return StaticQuantizer(
        path, ArraySamples(arrays), tmp_path / "scratch", runtime=runtime, keep=keep
    )


def test_the_first_convolution_of_each_input(graph, tmp_path):
    for side in ("left", "right"):
        graph.add("Conv", [side, graph.weight(f"{side}.w", 4, 3, 3, 3)], f"{side}.c", side)
        graph.add("Relu", [f"{side}.c"], f"{side}.r", f"{side}.relu")
    graph.add("Add", ["left.r", "right.r"], "sum", "add")
    graph.add("Conv", ["sum", graph.weight("w", 5, 4, 6, 6)], "y", "last")
    shapes = {"left": ["batch", 3, 8, 8], "right": ["batch", 3, 8, 8]}
    path = graph.save(tmp_path / "m.onnx", shapes, {"y": ["batch", 5, 1, 1]})
    assert quantizer(path, tmp_path, *shapes).input_layers() == ("left", "right")
    kept = quantizer(path, tmp_path, *shapes, keep=["left"])
    assert kept.input_layers() == ("right",)
    assert kept.input_layers(["right"]) == ()
    kept.write(tmp_path / "float-inputs.onnx", kept.input_layers())
    pairs = pairs_of(tmp_path / "float-inputs.onnx")
    assert [pairs[name][1] for name in ("left", "right", "last")] == [False, False, True]


def test_it_is_found_behind_preprocessing(graph, tmp_path):
    pads = graph.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    graph.add("Sub", ["image", graph.weight("mean", 3, 1, 1)], "centred", "sub")
    graph.add("Div", ["centred", graph.constant("std", np.float32(0.5))], "scaled", "div")
    graph.add("Pad", ["scaled", pads], "padded", "pad")
    graph.add("Conv", ["padded", graph.weight("v", 4, 3, 3, 3)], "c", "first")
    graph.add("Conv", ["c", graph.weight("w", 5, 4, 8, 8)], "y", "last")
    path = graph.save(tmp_path / "m.onnx", {"image": ["batch", 3, 8, 8]}, {"y": ["batch", 5, 1, 1]})
    assert quantizer(path, tmp_path, "image").input_layers() == ("first",)


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
def test_none_where_nothing_would_be_left_in_8_bits(graph, tmp_path, runtime):
    graph.add("Conv", ["image", graph.weight("w", 5, 3, 8, 8)], "y", "only")
    path = graph.save(tmp_path / "m.onnx", {"image": ["batch", 3, 8, 8]}, {"y": ["batch", 5, 1, 1]})
    assert quantizer(path, tmp_path, "image", runtime=runtime).input_layers() == ()


def test_none_where_all_others_stay_in_float(graph, tmp_path):
    graph.add("Conv", ["image", graph.weight("v", 4, 3, 3, 3)], "c", "first")
    graph.add("Conv", ["c", graph.weight("w", 5, 4, 6, 6)], "y", "last")
    path = graph.save(tmp_path / "m.onnx", {"image": ["batch", 3, 8, 8]}, {"y": ["batch", 5, 1, 1]})
    q = quantizer(path, tmp_path, "image")
    assert q.input_layers() == ("first",)
    assert q.input_layers(["last"]) == ()
