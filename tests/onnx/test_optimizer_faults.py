"""ONNX Runtime's own optimization: changed outputs are found, named and prevented."""

import contextlib
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from edgekd.engines import onnxruntime as engine
from edgekd.engines.onnxruntime import build_engine
from edgekd.errors import StageError
from edgekd.onnx.optimizer_faults import (
    OPTIMIZERS,
    changed,
    find_fault,
    guard_padding,
    guarded,
    optimizers_to_disable,
)
from edgekd.onnx.samples import ArraySamples
from edgekd.quantization.dynamic import quantize_dynamic
from edgekd.quantization.mixed_precision import convert_mixed_precision
from edgekd.quantization.prepare import prepare_onnx
from edgekd.quantization.weights_only import quantize_weights
from tests.cli.quantizing import quantize
from tests.command_line import edgekd
from tests.onnx_builders import Graph

X = np.random.default_rng(0).standard_normal((8, 3, 6, 6)).astype(np.float32)
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def tiny(path, *, opset=17, before=None, value=None, pads=(0, 0, 0, 0, 0, 0, 1, 1)):
    """A convolution with negative results, padding with 0, a 2 × 2 maximum, a convolution: the
    layer of YOLOv3-tiny with stride 1."""
    g = Graph(5)
    low = g.constant("b1", np.full(8, -3, np.float32))
    last = g.add("Conv", ["x", g.weight("w1", 8, 3, 3, 3), low], "c", "first", pads=[1] * 4)
    if before:
        last = g.add(before, [last], "h", "activation")
    if opset < 11:
        g.add("Pad", [last], "p", "pad", pads=list(pads))
    else:
        given = [g.constant("pads", np.array(pads))]
        given += [] if value is None else [g.constant("value", np.float32(value))]
        g.add("Pad", [last, *given], "p", "pad")
    g.add("MaxPool", ["p"], "m", "pool", kernel_shape=[2, 2], strides=[1, 1])
    g.add("Conv", ["m", g.weight("w2", 4, 8, 3, 3)], "y", "second", pads=[1] * 4)
    return g.save(path, {"x": ["n", 3, 6, 6]}, {"y": ["n", 4, 6, 6]}, opset=opset)


def expected(path):
    """By PyTorch."""
    w = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in weights(path)}
    conv = torch.nn.functional.conv2d
    h = conv(torch.from_numpy(X), w["w1"], w["b1"], padding=1)
    h = torch.nn.functional.max_pool2d(torch.nn.functional.pad(h, (0, 1, 0, 1)), 2, 1)
    return conv(h, w["w2"], padding=1).numpy()


def weights(path):
    return onnx.load(str(path)).graph.initializer


def answers(path, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def decibels(reference, other):
    error = ((other - reference).astype(float) ** 2).sum()
    return 10 * np.log10((reference.astype(float) ** 2).sum() / max(error, 1e-30))


@pytest.fixture
def unguarded(monkeypatch):
    """As with a fault that no rewrite is known for."""
    monkeypatch.setattr("edgekd.quantization.prepare.guard_padding", lambda model: ())
    monkeypatch.setattr(engine, "guarded", contextlib.nullcontext)


def test_the_optimizer_that_changes_the_answers_is_named(tmp_path):
    path = tiny(tmp_path / "m.onnx")
    reference = expected(path)
    assert decibels(reference, answers(path, LEVELS[0])) > 100
    assert decibels(reference, answers(path, LEVELS[-1])) < 20, "mended in the runtime by now"
    fault = find_fault(path, {"x": X})
    assert (fault.output, fault.level, fault.disabled) == ("y", "basic", ("Pad_Fusion",))
    largest = np.abs(answers(path, LEVELS[-1]) - answers(path, LEVELS[0])).max()
    assert fault.difference == pytest.approx(largest, rel=1e-3)
    assert "Pad_Fusion" in str(fault)
    assert "disabled_optimizers=['Pad_Fusion']" in fault.remedy
    json.dumps(fault.to_json(), allow_nan=False)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 18, 19, 21])
def test_guarded_padding_is_right_at_every_level(tmp_path, opset):
    path = tiny(tmp_path / "m.onnx", opset=opset)
    with guarded(path) as other:
        assert other != path
        for level in LEVELS:
            assert decibels(expected(path), answers(other, level)) > 100
        assert find_fault(other, {"x": X}) is None


@pytest.mark.parametrize(
    "harmless", [{"before": "Relu"}, {"before": "Sigmoid"}, {"value": -1.0}, {"value": 2.0}]
)
def test_padding_that_is_fused_rightly_or_not_at_all_stays_as_it_is(tmp_path, harmless):
    path = tiny(tmp_path / "m.onnx", **harmless)
    with guarded(path) as other:
        assert other == path
    assert find_fault(path, {"x": X}) is None


def test_padding_with_a_zero_that_is_written_is_guarded_too(tmp_path):
    model = onnx.load(str(tiny(tmp_path / "m.onnx", value=0.0)))
    assert guard_padding(model) == ("pad",)
    assert guard_padding(model) == ()
    onnx.checker.check_model(model, full_check=True)


def test_padding_in_16_bits_is_guarded_by_a_number_of_16_bits(tmp_path):
    path, out = tiny(tmp_path / "m.onnx"), tmp_path / "half.onnx"
    convert_mixed_precision(path, out, "fp16", samples=ArraySamples({"x": X}))
    for level in LEVELS:
        assert decibels(expected(path), answers(out, level)) > 50
    pad = next(node for node in onnx.load(str(out)).graph.node if node.op_type == "Pad")
    constant = next(t for t in weights(out) if t.name == pad.input[2])
    assert constant.data_type == TensorProto.FLOAT16
    assert 0 < float(numpy_helper.to_array(constant)) < 1e-7


@pytest.mark.parametrize("method", ["weights-only", "static", "fp16", "bf16"])
def test_every_method_writes_a_file_that_is_right_in_any_session(tmp_path, method):
    path, out = tiny(tmp_path / "m.onnx"), tmp_path / "o.onnx"
    np.save(tmp_path / "x.npy", X)
    to = tmp_path / "r.json"
    words = ["--calibration", tmp_path / "x.npy", "--method", method, "--no-timing", "--json", to]
    quantize(path, "-o", out, *words)
    record = json.loads(to.read_text())
    # Of 7 or 8 bits of each value, besides those of the float32 model as PyTorch computes it.
    least = {"weights-only": 30, "static": 20, "fp16": 50, "bf16": 35}[method]
    assert record["errors"][0]["sqnr_db"] > least
    assert record["warnings"] == []
    if method != "bf16":  # which the CPU does not run
        for level in LEVELS:
            assert decibels(expected(path), answers(out, level)) > least


def test_a_built_engine_is_right_in_any_session(tmp_path):
    path, out = tiny(tmp_path / "m.onnx"), tmp_path / "engine.onnx"
    info = build_engine(path, out, ("CPUExecutionProvider",), samples={"x": X})
    assert (info.disabled_optimizers, info.run_level) == ((), "all")
    assert info.max_difference < 1e-4
    for level in LEVELS:
        assert decibels(expected(path), answers(out, level)) > 100


@pytest.mark.usefixtures("unguarded")
def test_an_engine_is_built_without_the_optimizer_that_is_wrong(tmp_path):
    path, out = tiny(tmp_path / "m.onnx"), tmp_path / "engine.onnx"
    info = build_engine(path, out, ("CPUExecutionProvider",), samples={"x": X})
    assert (info.disabled_optimizers, info.run_level) == (("Pad_Fusion",), "disabled")
    assert info.session_options["graph_optimization_level"] == "disabled"
    assert decibels(expected(path), answers(out, "ORT_DISABLE_ALL")) > 100
    # What is not to blame was done ahead all the same: both convolutions are in blocks or fused.
    kept = [node.op_type for node in onnx.load(str(out)).graph.node]
    assert "Pad" in kept


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("samples", [ArraySamples({"x": X}), None])
def test_a_model_is_prepared_without_the_optimizer_that_is_wrong(tmp_path, samples):
    prepared = prepare_onnx(tiny(tmp_path / "m.onnx"), samples)
    assert prepared.left_out == ("Pad_Fusion",)
    assert "Pad" in {node.op_type for node in prepared.model.graph.node}


@pytest.mark.parametrize("write", [quantize_weights, quantize_dynamic])
def test_a_preparation_that_changes_outputs_is_refused_for_any_method(tmp_path, monkeypatch, write):
    g = Graph(2)
    g.add("MatMul", ["x", g.weight("w", 16, 8)], "y", "first")
    path = g.save(tmp_path / "m.onnx", {"x": ["b", 16]}, {"y": ["b", 8]})

    def spoilt(graph):
        weight = next(t for t in graph.initializer if t.name == "w")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, "w"))

    monkeypatch.setattr("edgekd.quantization.prepare.plain_bias", spoilt)
    with pytest.raises(StageError, match=r"output 'y' changed by .* when the model was prepared"):
        write(path, tmp_path / "o.onnx")
    assert not (tmp_path / "o.onnx").exists()


def test_a_model_that_draws_random_numbers_is_not_called_changed(tmp_path):
    g = Graph(2)
    g.add("MatMul", ["x", g.weight("w", 16, 8)], "h", "first")
    g.add("RandomNormalLike", ["h"], "noise")
    g.add("Add", ["h", "noise"], "y")
    path = g.save(tmp_path / "m.onnx", {"x": ["b", 16]}, {"y": ["b", 8]})
    quantize_weights(path, tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx").is_file()


@pytest.mark.usefixtures("unguarded")
def test_a_file_that_only_a_setting_keeps_right_is_named_with_the_setting(tmp_path):
    """The float model is right, its preparation is, and a plain session changes the file."""
    path, out, to = tiny(tmp_path / "m.onnx"), tmp_path / "o.onnx", tmp_path / "r.json"
    np.save(tmp_path / "x.npy", X)
    words = ["--calibration", tmp_path / "x.npy", "--method", "weights-only", "--no-timing"]
    quantize(path, "-o", out, *words, "--json", to)
    record = json.loads(to.read_text())
    assert record["optimizer_fault"]["disabled"] == ["Pad_Fusion"]
    assert record["drop"]["value"] > 10 * record["optimizer_fault"]["drop_without"]
    assert "disabled_optimizers=['Pad_Fusion']" in " ".join(record["warnings"])


@pytest.mark.parametrize("blamed", [("GeluFusion",), ("ConstantFolding", "Pad_Fusion")])
def test_the_optimizers_to_blame_are_found_in_few_trials(blamed):
    trials = []

    def right_without(names):
        trials.append(names)
        return set(blamed) <= set(names)

    assert set(optimizers_to_disable(right_without)) == set(blamed)
    assert len(trials) < 40 < len(OPTIMIZERS)
    assert optimizers_to_disable(lambda names: False) == ()


def test_answers_are_held_against_their_own_size():
    reference = {"a": np.array([1000.0, 0.0]), "b": np.array([0.01, 0.0]), "i": np.arange(4)}
    same = {name: values.copy() for name, values in reference.items()}
    assert changed(reference, same, 1e-3) is None
    assert changed(reference, same | {"a": np.array([1000.5, 0.0])}, 1e-3) is None
    assert changed(reference, same | {"b": np.array([0.011, 0.0])}, 1e-3)[0] == "b"
    assert changed(reference, same | {"i": np.array([0, 1, 2, 9])}, 1e-3)[0] == "i"
    assert changed(reference, same | {"b": np.array([np.nan, 0.0])}, 1e-3)[0] == "b"
    assert changed(reference, same | {"b": np.zeros(3)}, 1e-3)[0] == "b"


def test_check_and_benchmark_name_it(tmp_path):
    path = tiny(tmp_path / "m.onnx")
    checked = edgekd("check", str(path), code=1)
    assert "(Pad_Fusion) changes the outputs" in " ".join(checked.output.split())
    timed = edgekd("benchmark", str(path), "--min-queries", "20")
    assert "disabled_optimizers=['Pad_Fusion']" in " ".join(timed.output.split())
    right = tiny(tmp_path / "r.onnx", before="Relu")
    checked = edgekd("check", str(right))
    assert "those of the model as written" in " ".join(checked.output.split())
