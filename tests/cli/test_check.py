"""``edgekd check``: a table to read, a record to keep, and an exit code to act on."""

from __future__ import annotations

import importlib.util
import json
import platform

import onnx
import pytest

from tests.command_line import edgekd
from tests.onnx_builders import parse_onnx


@pytest.fixture
def model(tmp_path):
    """The node's name would be markup on the terminal."""
    text = "(float[batch,length] x) => (float[batch,length] y) { y = Relu (x) }"
    path, made = tmp_path / "model.onnx", parse_onnx(text, opset=18)
    made.graph.node[0].name = "[bold]relu"
    onnx.save(made, path)
    return path


def invoke(*words, **settings):
    return edgekd("check", *words, columns=200, **settings)


def test_a_model_that_holds_leaves_with_0_and_a_whole_record(model, tmp_path):
    out = tmp_path / "out.json"
    done = invoke(model, "--engine", "onnxruntime", "--shape", "x=2x300", "--json", out)
    for word in ("opset 18", "x float32[batch, length]", "runs 1 of 1 nodes", "[bold]relu"):
        assert word in done.output
    record = json.loads(out.read_text())
    assert record["schema"] == "edgekd.check/2"
    assert record["passed"] is True
    assert record["memory"]["activations_bytes"] == 2 * (2 * 300 * 4)
    assert record["coverage"][0]["nodes"][0]["name"] == "[bold]relu"


def test_what_does_not_hold_leaves_with_1(model):
    done = invoke(model, "--profile", "raspberry-pi-5", code=1)
    assert "give open sizes: --shape" in done.output
    assert "not all checks passed for onnxruntime on raspberry-pi-5" in done.output
    invoke(model, "--profile", "raspberry-pi-5", "--shape", "x=1x16")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='needs TensorRT\'s parser: pip install "edgekd[rtx]"',
)
def test_tensorrt_is_asked_in_a_process_of_its_own(model):
    done = invoke(model, "--engine", "tensorrt-rtx", "--engine", "onnxruntime")
    assert "its parser takes the model; not built" in done.output
    assert f"edgekd build {model} --engine tensorrt-rtx -o model.engine" in done.output
    assert "as far as can be determined without a build" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shape", "x=0x3"), "is not a shape"),
        (("--shape", "x=1x3", "--shape", "x=1x4"), "is given twice"),
        (("--shape", "z=1x3"), "there is no input 'z'"),
        (("--providers", "CPUExecutionProvder"), "did you mean 'CPUExecutionProvider'"),
        (("--profile", "raspbery-pi-5"), "raspberry-pi-5"),
        (("--engine", "tensorflow"), "Invalid value"),
        (("--json", "no-such-folder/out.json"), "a folder that does not exist"),
    ],
)
def test_wrong_options_are_explained(model, words, message):
    done = invoke(model, *words, code=2)
    assert message in done.output


def test_a_file_that_is_no_model_is_wrong_input(tmp_path):
    path = tmp_path / "notes.onnx"
    path.write_text("not a model")
    done = invoke(path, code=2)
    assert "truncated or is not ONNX" in done.output


def test_a_pipeline_is_told_from_a_damaged_file(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("name: p")
    done = invoke(path, code=2)
    assert "takes an ONNX file, and this is a pipeline" in done.output
    assert f"edgekd build {path}" in done.output


def test_an_engine_for_the_device_is_not_reported_as_built_here(model):
    pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
    if platform.machine() == "aarch64":
        pytest.skip("this may be the device")
    done = invoke(model, "--profile", "jetson-orin-nano-8gb", code=1)
    assert "only a build on the device shows" in " ".join(done.output.split())
