"""Static INT8: near the float outputs, in the runtime's scheme, with the chosen nodes in float."""

import numpy as np
import onnx
import pytest

from edgekd.errors import InputError
from edgekd.onnx.file import describe_onnx
from tests.onnx_builders import distance, pairs_of, run, types_of, weights_of
from tests.quantization.quantizing import quantized, quantizer

# Eight bits give steps of 1/255 of a tensor's range, an error of at most 1/510 of it each; four
# layers of weights and activations add up eight such errors, with a margin for their growth.
NEAR = 8 * 2 / 255


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_answers_are_near_float(convolutional, images, tmp_path, runtime, calibration):
    q, out = quantized(convolutional, images, tmp_path, runtime=runtime, calibration=calibration)
    reference = run(convolutional, images)["logits"]
    np.testing.assert_allclose(run(q.prepared, images)["logits"], reference, rtol=1e-4, atol=1e-4)
    assert distance(reference, run(out, images)["logits"]) < NEAR
    # The batch is still dynamic.
    assert run(out, {"image": images["image"][:3]})["logits"].shape == (3, 5)
    float_info, info = describe_onnx(convolutional), describe_onnx(out)
    assert info.spec == float_info.spec
    assert info.metadata == {"labels": "a,b"}
    assert onnx.load(str(out)).ir_version == 8


def test_weights_have_a_symmetric_scale_per_channel(convolutional, images, tmp_path):
    _, out = quantized(convolutional, images, tmp_path, reduce_range=False)
    float_weight = weights_of(convolutional)["w2"]
    weights = weights_of(out)
    largest = np.abs(float_weight).max(axis=(1, 2, 3))
    scale = weights["w2_scale"]
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-3)
    assert not weights["w2_zero_point"].any()
    back = weights["w2_quantized"] * scale[:, None, None, None]
    assert (np.abs(back - float_weight) <= scale[:, None, None, None] * 0.5001).all()


def test_seven_bit_weights_where_eight_would_overflow(convolutional, images, tmp_path):
    _, out = quantized(convolutional, images, tmp_path, reduce_range=True)
    assert np.abs(weights_of(out)["w2_quantized"]).max() <= 64


def test_tensorrt_gets_int8_with_zero_points_0_and_float_biases(convolutional, images, tmp_path):
    _, out = quantized(convolutional, images, tmp_path, runtime="tensorrt")
    weights = weights_of(out)
    zeros = [v for name, v in weights.items() if name.endswith("zero_point")]
    assert zeros
    assert all(z.dtype == np.int8 and not z.any() for z in zeros)
    assert not any(v.dtype == np.int32 for v in weights.values())
    assert weights["b2"].dtype == np.float32


def test_tensorrt_parses_and_builds_it(convolutional, images, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX (extra 'rtx')")
    _, out = quantized(convolutional, images, tmp_path, runtime="tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)  # the parser and network die with it
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(out.read_bytes())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", (1, 3, 8, 8), (1, 3, 8, 8), (4, 3, 8, 8))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_one_calibration_writes_many_files(convolutional, images, tmp_path):
    q = quantizer(convolutional, images, tmp_path)
    first, again = tmp_path / "a.onnx", tmp_path / "b.onnx"
    q.write(first)
    q.write(tmp_path / "other.onnx", float_nodes=["first"])
    q.write(again)
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
def test_float_nodes_stay_float(convolutional, images, tmp_path, runtime):
    q = quantizer(convolutional, images, tmp_path, runtime=runtime)
    assert {"first", "second", "head"} <= set(q.nodes)
    out = tmp_path / "mixed.onnx"
    q.write(out, float_nodes=["second"])
    inputs = pairs_of(out)
    # 'second' reads float weights and bias; on the CPU its input was computed in 8 bits.
    assert inputs["second"] == [runtime == "cpu", False, False]
    assert inputs["head"][:2] == [True, True]
    np.testing.assert_array_equal(weights_of(out)["w2"], weights_of(q.prepared)["w2"])
    q.write(out, float_nodes=["first"])
    # Nothing computed before it is in 8 bits, so it gives exactly what it gave.
    assert pairs_of(out)["first"] == [False, False, False]


def test_a_kept_node_is_never_touched_and_found_by_its_name_in_the_file(graph, tmp_path):
    """Preparation makes one Gemm of MatMul and Add."""
    graph.add("MatMul", ["x", graph.weight("w1", 6, 6)], "m", "product")
    graph.add("Add", ["m", graph.weight("b1", 6)], "a", "bias")
    graph.add("Relu", ["a"], "r")
    graph.add("MatMul", ["r", graph.weight("w2", 6, 4)], "y", "last")
    path = graph.save(tmp_path / "mlp.onnx", {"x": ["n", 6]}, {"y": ["n", 4]})
    arrays = {"x": np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)}
    q = quantizer(path, arrays, tmp_path, keep=["product"])
    assert q.nodes == ("last",)
    out = tmp_path / "out.onnx"
    q.write(out)
    assert weights_of(out)["w1"].dtype == np.float32
    with pytest.raises(InputError, match="did you mean 'product'"):
        quantizer(path, arrays, tmp_path, keep=["prodct"])
    with pytest.raises(InputError, match="did you mean 'last'"):
        q.write(out, float_nodes=["lost"])
    with pytest.raises(InputError, match="nothing in this model can be quantized"):
        q.write(out, float_nodes=q.nodes)


def test_a_weight_shared_with_a_float_node_stays_float_there(graph, tmp_path):
    graph.weight("w", 6, 6)
    graph.add("MatMul", ["x", "w"], "a", "one")
    graph.add("Relu", ["a"], "r")
    graph.add("MatMul", ["r", "w"], "b", "two")
    graph.add("Gemm", ["b", "w"], "y", "three", transB=1)
    path = graph.save(tmp_path / "tied.onnx", {"x": ["n", 6]}, {"y": ["n", 6]})
    arrays = {"x": np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)}
    q = quantizer(path, arrays, tmp_path)
    out = tmp_path / "out.onnx"
    q.write(out, float_nodes=["two"])
    inputs = pairs_of(out)
    assert (inputs["one"][1], inputs["two"][1], inputs["three"][1]) == (True, False, True)
    q.write(out)
    assert distance(run(path, arrays)["y"], run(out, arrays)["y"]) < NEAR


def test_a_value_read_before_its_relu_is_not_clipped(graph, tmp_path):
    """ONNX Runtime's quantizer gives a convolution the range of the ReLU after it."""
    graph.add("Conv", ["image", graph.weight("w", 4, 3, 3, 3)], "before", "conv")
    graph.add("Relu", ["before"], "after")
    graph.add("Conv", ["after", graph.weight("v", 4, 4, 1, 1)], "last", "conv2")
    path = graph.save(
        tmp_path / "two.onnx",
        {"image": [2, 3, 8, 8]},
        {"before": [2, 4, 6, 6], "after": [2, 4, 6, 6], "last": [2, 4, 6, 6]},
    )
    arrays = {"image": np.random.default_rng(0).standard_normal((7, 3, 8, 8)).astype(np.float32)}
    # A fixed batch of 2 and 7 samples: the last batch is filled up.
    _, out = quantized(path, arrays, tmp_path)
    feed = {"image": arrays["image"][:2]}
    reference, answer = run(path, feed), run(out, feed)
    assert reference["before"].min() < -0.5
    for name in ("before", "after", "last"):
        assert distance(reference[name], answer[name]) < NEAR


def test_a_clip_away_from_zero_still_clips(graph, tmp_path):
    graph.add("Conv", ["image", graph.weight("w", 4, 3, 3, 3)], "c", "conv")
    low, high = graph.constant("low", np.float32(0.5)), graph.constant("high", np.float32(1.0))
    graph.add("Clip", ["c", low, high], "clipped", "clip")
    graph.add("Conv", ["clipped", graph.weight("v", 4, 4, 1, 1)], "y", "conv2")
    path = graph.save(tmp_path / "clip.onnx", {"image": ["n", 3, 8, 8]}, {"y": ["n", 4, 6, 6]})
    arrays = {"image": np.random.default_rng(0).standard_normal((9, 3, 8, 8)).astype(np.float32)}
    _, out = quantized(path, arrays, tmp_path)
    assert distance(run(path, arrays)["y"], run(out, arrays)["y"]) < NEAR
    assert types_of(out)["Clip"] == 1


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
def test_gemm_with_factors_and_a_row_of_bias(graph, tmp_path, runtime):
    """ONNX Runtime's quantizer drops beta when the bias stays in float."""
    graph.add(
        "Gemm",
        ["x", graph.weight("w", 6, 4), graph.weight("b", 1, 4, scale=2)],
        "y",
        "gemm",
        alpha=0.5,
        beta=3.0,
    )
    path = graph.save(tmp_path / "gemm.onnx", {"x": ["n", 6]}, {"y": ["n", 4]})
    arrays = {"x": np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)}
    _, out = quantized(path, arrays, tmp_path, runtime=runtime)
    assert distance(run(path, arrays)["y"], run(out, arrays)["y"]) < NEAR


def test_weights_in_constant_nodes_subgraphs_and_two_inputs(graph, tmp_path):
    """NHWC input; the branches of an If read a tensor and a weight of the graph around them."""
    values = graph.random.standard_normal((4, 3, 3, 3)).astype(np.float32)
    constant = onnx.numpy_helper.from_array(values, "value")
    graph.weight("shared", 4, 4)
    graph.nodes.append(onnx.helper.make_node("Constant", [], ["w"], value=constant))
    graph.add("Transpose", ["image"], "nchw", "", perm=[0, 3, 1, 2])
    graph.add("Conv", ["nchw", "w"], "c", "")
    graph.add("Relu", ["c"], "r", "")
    graph.add("GlobalAveragePool", ["r"], "p", "")
    graph.add("Flatten", ["p"], "f", "")
    graph.add("MatMul", ["f", "shared"], "m", "")
    graph.add("Add", ["m", "state"], "s", "")
    graph.add("ReduceSum", ["s"], "total", "", keepdims=0)
    graph.constant("zero", np.float32(0))
    graph.add("Greater", ["total", "zero"], "positive", "")

    def branch(name, op, inputs):
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        node = onnx.helper.make_node(op, inputs, [name])
        return onnx.helper.make_graph([node], name, [], [value])

    graph.add(
        "If",
        ["positive"],
        "y",
        "",
        then_branch=branch("a", "MatMul", ["s", "shared"]),
        else_branch=branch("b", "Sub", ["c", "r"]),
    )
    path = graph.save(
        tmp_path / "if.onnx", {"image": ["n", 8, 8, 3], "state": ["n", 4]}, {"y": None}
    )
    random = np.random.default_rng(0)
    arrays = {
        "image": random.standard_normal((9, 8, 8, 3)).astype(np.float32),
        "state": np.linspace([-3] * 4, [3] * 4, 9, dtype=np.float32),
    }
    _, out = quantized(path, arrays, tmp_path)
    assert any(v.dtype == np.int8 and v.shape == (4, 3, 3, 3) for v in weights_of(out).values())
    for sign in (1, -1):
        feed = {**arrays, "state": np.full((9, 4), 3.0 * sign, np.float32)}
        assert distance(run(path, feed)["y"], run(out, feed)["y"]) < NEAR


def test_an_old_opset_and_ir_version_are_raised(tmp_path, graph):
    graph.add("Conv", ["image", graph.weight("w", 4, 3, 3, 3)], "c", "conv")
    graph.add(
        "BatchNormalization",
        [
            "c",
            *(
                graph.constant(n, np.full(4, v, np.float32))
                for n, v in zip("stuv", (1.5, 0.5, 0.1, 2.0), strict=True)
            ),
        ],
        "y",
        "norm",
    )
    path = graph.save(tmp_path / "old.onnx", {"image": [4, 3, 8, 8]}, {"y": [4, 4, 6, 6]}, 9, 3)
    model = onnx.load(str(path))
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, 1, t.dims) for t in model.graph.initializer
    )
    onnx.save(model, str(path))
    arrays = {"image": np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)}
    _, out = quantized(path, arrays, tmp_path)
    feed = {"image": arrays["image"][:4]}
    assert distance(run(path, feed)["y"], run(out, feed)["y"]) < NEAR
    assert types_of(out)["BatchNormalization"] == 0
    assert describe_onnx(out).spec == describe_onnx(path).spec


def test_an_already_quantized_model_and_one_without_weights(convolutional, images, graph, tmp_path):
    _, out = quantized(convolutional, images, tmp_path)
    with pytest.raises(InputError, match="quantized already"):
        quantizer(out, images, tmp_path)
    graph.add("Softmax", ["x"], "y")
    path = graph.save(tmp_path / "plain.onnx", {"x": ["n", 4]}, {"y": ["n", 4]})
    with pytest.raises(InputError, match="it has Softmax"):
        quantizer(path, {"x": np.ones((3, 4), np.float32)}, tmp_path)


def test_an_exported_student(tmp_path):
    torch = pytest.importorskip("torch")
    from edgekd.config.networks import ModelConfig
    from edgekd.models.build import build_model
    from edgekd.onnx.export import export_onnx
    from edgekd.spec import TensorSpec

    torch.manual_seed(0)
    given = (TensorSpec("image", ("batch", 1, 28, 28)),)
    model = build_model(
        ModelConfig(model="convnet-s"), given, (TensorSpec("logits", ("batch", 10)),)
    )
    path, out = tmp_path / "student.onnx", tmp_path / "int8.onnx"
    export_onnx(model, path)
    arrays = {"image": np.random.default_rng(0).random((64, 1, 28, 28)).astype(np.float32)}
    q = quantizer(path, arrays, tmp_path)
    q.write(out)
    assert len(q.nodes) >= 5
    assert out.stat().st_size < path.stat().st_size / 2
    assert distance(run(path, arrays)["logits"], run(out, arrays)["logits"]) < NEAR


def test_copies_of_a_shared_bias_take_no_other_tensors_name(graph, tmp_path):
    """A bias "b" of two convolutions, of which the first gives "b2"."""
    g = graph
    bias = g.weight("b", 4)
    g.add("Conv", ["x", g.weight("w1", 4, 4, 3, 3), bias], "b2", "first", pads=[1] * 4)
    g.add("Relu", ["b2"], "r")
    g.add("Conv", ["r", g.weight("w2", 4, 4, 3, 3), bias], "c", "second", pads=[1] * 4)
    g.add("Neg", ["b2"], "n")
    g.add("Add", ["c", "n"], "y")
    path = g.save(tmp_path / "m.onnx", {"x": ["batch", 4, 6, 6]}, {"y": ["batch", 4, 6, 6]})
    x = np.random.default_rng(0).standard_normal((16, 4, 6, 6)).astype(np.float32)
    _, out = quantized(path, {"x": x}, tmp_path)
    expected, answer = run(path, {"x": x})["y"], run(out, {"x": x})["y"]
    # Four roundings of activations, each of half a step of its range's 255.
    assert np.abs(answer - expected).max() < 4 * (expected.max() - expected.min()) / 255 * 2
