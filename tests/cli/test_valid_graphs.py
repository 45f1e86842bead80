"""Whatever valid graph it is given, a command ends with a code and never with a traceback."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgekd.cli import main
from tests.cli.random_graphs import random_graph
from tests.integration.commandline import call

METHODS = ("static", "dynamic", "weights-only", "fp16", "bf16")
CODES = (0, 1, 2, 3)
QUICK = ("--min-queries", "1", "--max-seconds", "0.05")


def run(folder, *words):
    """A command in this process: what it left beside its answer, and how it ended."""
    before = os.getcwd()  # noqa: PTH109 - put back with os.chdir
    os.chdir(folder)
    try:
        done = CliRunner().invoke(main, list(words))
    finally:
        os.chdir(before)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(f"{' '.join(words)} ends with a traceback") from done.exception
    assert done.exit_code in CODES, done.output
    left = [path.name for path in folder.iterdir() if "partial" in path.name]
    assert not left, f"{' '.join(words)} leaves {left}"
    return done


def quantize_by_every_method(folder, samples):
    np.savez(folder / "d.npz", **samples)
    for index, method in enumerate(METHODS):
        words = ["quantize", "m.onnx", "-o", f"{method}.onnx", "--method", method, "--no-timing"]
        run(folder, *words, *(("--calibration", "d.npz") if index % 2 == 0 else ()))


@settings(max_examples=14, derandomize=True, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_random_graph_is_checked_and_quantized_without_a_traceback(seed):
    model, samples = random_graph(Random(seed))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        external = {"save_as_external_data": True, "location": "m.data", "size_threshold": 64}
        onnx.save(model, folder / "m.onnx", **(external if seed % 4 == 0 else {}))
        run(folder, "check", "m.onnx")
        quantize_by_every_method(folder, samples)


@settings(max_examples=3, derandomize=True, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_random_graph_is_built_and_measured_without_a_traceback_or_a_signal(seed):
    model, _ = random_graph(Random(seed))
    with tempfile.TemporaryDirectory() as name:
        onnx.save(model, Path(name) / "m.onnx")
        for words in (("benchmark", "m.onnx", *QUICK), ("build", "m.onnx", "-o", "b.onnx")):
            done = call(*words, cwd=Path(name))
            assert done.returncode in CODES, done.stderr
            assert "Traceback" not in done.stderr


def info(name, shape=("b", 4), kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, list(shape))


def weight(*shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return onnx.numpy_helper.from_array(values, "w")


PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
ODD = {
    "no node, the input is the output": ([], ["x"], ["x"]),
    "an input that is an output as well": ([PRODUCT], ["x"], ["x", "y"]),
    "a weight that is an output as well": ([PRODUCT], ["x"], ["y", "w"]),
    "only a weight is given": ([], ["x"], ["w"]),
    "no input": ([helper.make_node("Relu", ["w"], ["y"], "relu")], [], ["y"]),
    "an input that nothing reads": ([PRODUCT], ["x", "unused"], ["y"]),
    "a weight that is an input as well": ([PRODUCT], ["x", "w"], ["y"]),
    "an output that is read as well": (
        [PRODUCT, helper.make_node("MatMul", ["y", "w"], ["z"], "second")], ["x"], ["y", "z"],
    ),
    "one output twice": ([PRODUCT], ["x"], ["y", "y"]),
    "no output": ([PRODUCT], ["x"], []),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_signature_has_an_answer_or_an_error(kind, tmp_path):
    nodes, inputs, outputs = ODD[kind]
    shapes = {"w": (4, 4)}
    graph = helper.make_graph(
        nodes,
        "g",
        [info(name, shapes.get(name, ("b", 4))) for name in inputs],
        [info(name, shapes.get(name, ("b", 4))) for name in outputs],
        [weight(4, 4)],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    run(tmp_path, "check", "m.onnx")
    run(tmp_path, "build", "m.onnx", "-o", "b.onnx")
    quantize_by_every_method(tmp_path, dict.fromkeys(inputs, x))


def test_an_input_that_is_an_output_stays_one_when_the_layers_are_in_int8(tmp_path):
    graph = helper.make_graph([PRODUCT], "g", [info("x")], [info("x"), info("y")], [weight(4, 4)])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    quantize_by_every_method(tmp_path, {"x": x})
    for method in ("static", "dynamic"):
        session = onnxruntime.InferenceSession(tmp_path / f"{method}.onnx")
        same, y = session.run(None, {"x": x})
        np.testing.assert_array_equal(same, x)
        wanted = x @ onnx.numpy_helper.to_array(weight(4, 4))
        np.testing.assert_allclose(y, wanted, atol=0.1)


def test_a_model_above_two_gigabytes_is_refused_before_it_is_read(tmp_path):
    """Its weights are a sparse file, which takes no space."""
    count = 24_000
    large = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[count, count])
    large.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.data", "offset": 0, "length": 4 * count**2}.items():
        large.external_data.add(key=key, value=str(value))
    shape = ("b", count)
    graph = helper.make_graph([PRODUCT], "g", [info("x", shape)], [info("y", shape)], [large])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(4 * count**2)
    np.savez(tmp_path / "d.npz", x=np.zeros((4, count), np.float32))
    for method in METHODS:
        done = run(tmp_path, "quantize", "m.onnx", "-o", "q.onnx", "--method", method,
                   "--calibration", "d.npz")  # fmt: skip
        assert done.exit_code == 2
        assert "the model has 2.30 GB with its weights" in done.output
    with (tmp_path / "whole.onnx").open("wb") as file:
        file.truncate(2**31 + 1)
    for words in (("check",), ("build", "-o", "b.onnx"), ("quantize", "-o", "b.onnx")):
        done = run(tmp_path, words[0], "whole.onnx", *words[1:])
        assert done.exit_code == 2
        assert "save the model with its weights in a file next to it" in done.output
