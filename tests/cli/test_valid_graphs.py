"""Whatever valid graph it is given, a command ends with a code and never with a traceback."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from tests.cli.random_graphs import random_graph
from tests.command_line import edgekd, edgekd_process
from tests.onnx_builders import parse_onnx, save_onnx

METHODS = ("static", "dynamic", "weights-only", "fp16", "bf16")
CODES = (0, 1, 2, 3)
QUICK = ("--min-queries", "1", "--max-seconds", "0.05")


def run(folder, *words):
    """A command in this process: how it ended, and that it left no partial file."""
    done = edgekd(*words, cwd=folder, code=None)
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
def test_a_random_graph_builds_and_runs_without_traceback_or_signal(seed):
    model, _ = random_graph(Random(seed))
    with tempfile.TemporaryDirectory() as name:
        onnx.save(model, Path(name) / "m.onnx")
        for words in (("benchmark", "m.onnx", *QUICK), ("build", "m.onnx", "-o", "b.onnx")):
            done = edgekd_process(*words, cwd=Path(name), code=None)
            assert done.returncode in CODES, done.stderr
            assert "Traceback" not in done.stderr


X = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
WEIGHT = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
PRODUCT = "[product] y = MatMul (x, w)"
ODD = {
    "no node, the input is the output": ("", "x", "x"),
    "an input that is an output as well": (PRODUCT, "x", "xy"),
    "a weight that is an output as well": (PRODUCT, "x", "yw"),
    "only a weight is given": ("", "x", "w"),
    "no input": ("[relu] y = Relu (w)", "", "y"),
    "an input that nothing reads": (PRODUCT, "xu", "y"),
    "a weight that is an input as well": (PRODUCT, "xw", "y"),
    "an output that is read as well": (PRODUCT + "[second] z = MatMul (y, w)", "x", "yz"),
    "one output twice": (PRODUCT, "x", "yy"),
    "no output": (PRODUCT, "x", ""),
}


def save_odd(path, nodes, inputs, outputs):
    inputs, outputs = (
        ", ".join(f"float[{'4' if name == 'w' else 'b'},4] {name}" for name in names)
        for names in (inputs, outputs)
    )
    return save_onnx(path, f"({inputs}) => ({outputs}) {{ {nodes} }}", {"w": WEIGHT})


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_signature_has_an_answer_or_an_error(kind, tmp_path):
    save_odd(tmp_path / "m.onnx", *ODD[kind])
    run(tmp_path, "check", "m.onnx")
    run(tmp_path, "build", "m.onnx", "-o", "b.onnx")
    quantize_by_every_method(tmp_path, dict.fromkeys(ODD[kind][1], X))


def test_an_input_that_is_an_output_stays_one_when_the_layers_are_in_int8(tmp_path):
    save_odd(tmp_path / "m.onnx", PRODUCT, "x", "xy")
    quantize_by_every_method(tmp_path, {"x": X})
    for method in ("static", "dynamic"):
        session = onnxruntime.InferenceSession(tmp_path / f"{method}.onnx")
        same, y = session.run(None, {"x": X})
        np.testing.assert_array_equal(same, X)
        np.testing.assert_allclose(y, X @ WEIGHT, atol=0.1)


def test_a_model_above_two_gigabytes_is_refused_before_it_is_read(tmp_path):
    """Its weights are a sparse file, which takes no space."""
    count = 24_000
    large = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[count, count])
    large.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.data", "offset": 0, "length": 4 * count**2}.items():
        large.external_data.add(key=key, value=str(value))
    model = parse_onnx(f"(float[b,{count}] x) => (float[b,{count}] y) {{ {PRODUCT} }}")
    model.graph.initializer.append(large)
    onnx.save(model, tmp_path / "m.onnx")
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
