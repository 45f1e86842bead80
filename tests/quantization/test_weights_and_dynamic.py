"""Weights-only and dynamic INT8 without samples: small, near float, nothing else touched."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgekd.engines.onnxruntime import build_engine
from edgekd.errors import InputError
from edgekd.onnx.file import describe_onnx
from edgekd.quantization.dynamic import quantize_dynamic
from edgekd.quantization.weights_only import quantize_weights
from tests.onnx_builders import Graph, distance, run, types_of, weights_of

# Weights within half a step of 1/127 of their channel's largest; activations, where they are 8
# bits too, within half of 1/255 of their range; a few layers of them.
NEAR = 0.03


def recurrent(path, op, direction="forward", hidden=32):
    """x (time 5, batch, 24) through one recurrent layer: (time, directions, batch, hidden)."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    ways = 2 if direction == "bidirectional" else 1
    g = Graph()
    # The recurrent matrix contracts (its norm is about 2 x 0.05 x sqrt(32)), else the errors of
    # 8 bits would grow from step to step, as any difference would.
    weights = [
        g.weight("w", ways, gates * hidden, 24, scale=0.2),
        g.weight("r", ways, gates * hidden, hidden, scale=0.05),
        g.weight("b", ways, 2 * gates * hidden, scale=0.2),
    ]
    g.add(op, ["x", *weights], "y", "layer", hidden_size=hidden, direction=direction)
    return g.save(path, {"x": [5, "batch", 24]}, {"y": [5, ways, "batch", hidden]})


@pytest.fixture
def steps():
    return {"x": np.random.default_rng(3).standard_normal((5, 3, 24)).astype(np.float32)}


@pytest.fixture
def transformer(tmp_path):
    """A table of words, one attention head of MatMuls, a Gemm."""
    g = Graph()
    table = g.weight("table", 200, 32)
    g.add("Cast", ["ids"], "words", "cast", to=7)
    g.add("Gather", [table, "words"], "x", "embedding")
    for part in "qkv":
        g.add("MatMul", ["x", g.weight(f"w{part}", 32, 32, scale=0.2)], part, part)
    g.add("Transpose", ["k"], "kt", "transpose", perm=[0, 2, 1])
    g.add("MatMul", ["q", "kt"], "scores", "scores")
    g.add("Softmax", ["scores"], "shares", "softmax")
    g.add("MatMul", ["shares", "v"], "mixed", "mix")
    g.add("ReduceMean", ["mixed"], "pooled", "mean", axes=[1], keepdims=0)
    head = [g.weight("head", 6, 32), g.weight("head_bias", 6)]
    g.add("Gemm", ["pooled", *head], "logits", "head", transB=1)
    path = g.save(tmp_path / "t.onnx", {"ids": ["batch", 7]}, {"logits": ["batch", 6]}, 17)
    ids = np.random.default_rng(0).integers(0, 200, (9, 7)).astype(np.float32)
    return path, {"ids": ids}


def test_weights_are_a_quarter_and_stay_so_in_the_file(convolutional, images, tmp_path):
    out = tmp_path / "small.onnx"
    quantize_weights(convolutional, out)
    weights = weights_of(out)
    assert sum(v.dtype == np.int8 and v.ndim == 4 for v in weights.values()) == 2
    assert not any(v.dtype == np.float32 and v.ndim == 4 for v in weights.values())
    reference = run(convolutional, images)["logits"]
    assert distance(reference, run(out, images)["logits"]) < NEAR
    assert describe_onnx(out).spec == describe_onnx(convolutional).spec
    assert describe_onnx(out).metadata == {"labels": "a,b"}


@pytest.mark.parametrize("quantize", [quantize_weights, quantize_dynamic])
def test_a_transformer_is_about_four_times_smaller(transformer, tmp_path, quantize):
    path, feed = transformer
    out = tmp_path / "out.onnx"
    quantize(path, out)
    assert distance(run(path, feed)["logits"], run(out, feed)["logits"]) < NEAR
    before = sum(v.nbytes for v in weights_of(path).values())
    assert sum(v.nbytes for v in weights_of(out).values()) < before / 3.5
    if quantize is quantize_dynamic:
        assert types_of(out)["MatMulInteger"] == 4
        assert types_of(out)["MatMul"] == 2  # of two activations


@pytest.mark.parametrize("quantize", [quantize_weights, quantize_dynamic])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers(steps, tmp_path, quantize, direction, op):
    path, out = recurrent(tmp_path / "r.onnx", op, direction), tmp_path / "out.onnx"
    quantize(path, out)
    assert distance(run(path, steps)["y"], run(out, steps)["y"]) < NEAR
    before = sum(v.nbytes for v in weights_of(path).values())
    assert sum(v.nbytes for v in weights_of(out).values()) < before / 3
    if quantize is quantize_dynamic and op == "LSTM":
        assert types_of(out)["DynamicQuantizeLSTM"] == 1


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_stored_weights_give_the_answers_of_rounded_ones(steps, tmp_path, op):
    """Rounding each channel to 1/127 of its largest is all that happens to the model."""
    path, out = recurrent(tmp_path / "r.onnx", op), tmp_path / "out.onnx"
    quantize_weights(path, out)
    model = onnx.load(str(path))
    for tensor in model.graph.initializer[:2]:
        values = numpy_helper.to_array(tensor).astype(np.float64)
        scale = np.abs(values).max(axis=(0, 2), keepdims=True) / 127
        rounded = (np.round(values / scale) * scale).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    onnx.save(model, str(tmp_path / "rounded.onnx"))
    expected = run(tmp_path / "rounded.onnx", steps)["y"]
    np.testing.assert_allclose(run(out, steps)["y"], expected, atol=1e-5)


@pytest.mark.parametrize("quantize", [quantize_weights, quantize_dynamic])
def test_kept_nodes_and_errors(transformer, tmp_path, quantize):
    path, _ = transformer
    out = tmp_path / "out.onnx"
    quantize(path, out, keep=["head", "embedding"])
    weights = weights_of(out)
    assert weights["head"].dtype == weights["table"].dtype == np.float32
    assert any(v.dtype == np.int8 for v in weights.values())
    with pytest.raises(InputError, match="did you mean 'embedding'"):
        quantize(path, out, keep=["embeding"])
    with pytest.raises(InputError, match="nothing in this model can be quantized"):
        quantize(path, out, keep=["head", "embedding", "q", "k", "v"])
    with pytest.raises(InputError, match="quantized already"):
        quantize(out, tmp_path / "twice.onnx")


def test_a_kept_gemm_is_not_split(transformer, tmp_path):
    path, _ = transformer
    out = tmp_path / "out.onnx"
    quantize_dynamic(path, out, keep=["head"])
    assert types_of(out)["Gemm"] == 1


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_an_engine_of_stored_weights_computes_in_float(tmp_path, level):
    """ONNX Runtime fuses them into MatMulNBits, which may round the activations to 8 bits too."""
    g = Graph()
    g.add("MatMul", ["x", g.weight("w", 128, 64, scale=0.1)], "y", "product")
    path = g.save(tmp_path / "m.onnx", {"x": ["batch", 128]}, {"y": ["batch", 64]})
    stored, engine = tmp_path / "stored.onnx", tmp_path / "engine.onnx"
    quantize_weights(path, stored)
    info = build_engine(stored, engine, ["CPUExecutionProvider"], 1, level, tolerance=1e-3)
    assert info.max_difference < 1e-5  # sums of 128 float32 products below 1
