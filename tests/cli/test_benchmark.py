from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgekd.errors import TargetError
from edgekd.targets import LocalTarget
from tests.command_line import check_not_imported, edgekd
from tests.onnx_builders import Graph, save_onnx


@pytest.fixture
def model(tmp_path):
    text = """(float[batch,3,height,width] x) => (float[batch,3,height,width] y)
    { y = Add (x, x) }"""
    return save_onnx(tmp_path / "model.onnx", text)


def invoke(*words, **settings):
    return edgekd("benchmark", *words, columns=140, **settings)


def test_a_model_is_measured_alone_and_against_another(model, tmp_path):
    out = tmp_path / "out.json"
    done = invoke(
        *(model, "--against", model, "--shape", "x=1x3x8x8", "--profile", "raspberry-pi-5"),
        *("--min-queries", 70, "--max-seconds", 3, "--json", out),
    )
    for word in ("p50", "p99.9", "queries", "times the p50", "above empty", "1 x 3 x 8 x 8"):
        assert word in done.output
    record = json.loads(out.read_text())
    assert record["profile"] == "raspberry-pi-5"
    # This machine is only a substitute for the board.
    assert record["evidence"] == "measured-on-host"
    assert "measured-on-host" in done.output


def test_providers_of_another_device_are_shown_as_left_out(model):
    done = invoke(
        *(model, "--profile", "jetson-orin-nano-8gb", "--shape", "x=1x3x8x8"),
        *("--min-queries", 11, "--max-seconds", 1),
    )
    assert "left out: TensorrtExecutionProvider" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shape", "y=1x3x8x8"), "there is no input 'y'"),
        (("--profile", "raspberry-pi-6"), "raspberry-pi-5"),
        (("--providers", "cuda"), "has no CUDAExecutionProvider"),
        (("--inputs", "none.npz"), "there is no such file"),
        (("--against", "none.onnx"), "the file does not exist"),
        (("--json", "none/out.json"), "a folder that does not exist"),
    ],
)
def test_a_wrong_option_is_one_message_and_exit_code_2(model, words, message):
    done = invoke(model, *words, code=2)
    assert message in done.output


def test_each_model_has_the_options_of_its_own_precision(model, tmp_path, monkeypatch):
    half, asked = tmp_path / "half.onnx", {}
    made = onnx.load(model)
    made.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float16), "w"))
    onnx.save(made, half)

    def bench(self, *words, **settings):
        asked.update(settings)
        raise TargetError("not here")

    monkeypatch.setattr(LocalTarget, "bench", bench)
    invoke(model, "--against", half, "--providers", "tensorrt,cpu", code=4)
    name = "TensorrtExecutionProvider"
    assert asked["providers"] == [name, "CPUExecutionProvider"]
    assert asked["provider_options"][name]["trt_fp16_enable"] == "False"
    assert asked["against_options"][name]["trt_fp16_enable"] == "True"


def test_options_of_a_model_are_refused_for_a_pipeline(tmp_path):
    (tmp_path / "p.yaml").write_text("name: x\n")
    done = invoke(tmp_path / "p.yaml", "--threads", 2, code=2)
    assert "--threads is for an ONNX model" in done.output


def test_torch_is_never_imported(model):
    quick = ["--shape", "x=1x3x8x8", "--min-queries", "11", "--max-seconds", "1"]
    words = ["benchmark", str(model), *quick]
    code = f"from edgekd.cli import main\nmain({words!r}, standalone_mode=False)"
    check_not_imported({"torch"}, code)


def counted(path):
    """y = tanh(… tanh(x)), as many times as the input ``steps`` says."""
    text = """(float x, int64 steps) => (float y) {
        [rounds] y = Loop (steps, , x) <body = body (int64 i, bool go, float acc)
            => (bool again, float next) { again = Identity (go)  next = Tanh (acc) }>
    }"""
    return save_onnx(path, text, opset=18)


def test_random_inputs_that_decide_the_work_are_named(tmp_path):
    model, out = counted(tmp_path / "m.onnx"), tmp_path / "out.json"
    quick = ("--min-queries", 11, "--max-seconds", 1, "--json", out)
    done = invoke(model, *quick)
    told = "steps decides the number of rounds of Loop 'rounds'. Give real ones: --inputs DATA.npz"
    assert told in done.output
    fed = json.loads(out.read_text())["models"][0]["fed"]
    assert fed["decides_work"] == {"steps": "the number of rounds of Loop 'rounds'"}
    assert "a count or a size needs a real one" in fed["inputs"]["steps"]["note"]
    np.savez(tmp_path / "d.npz", x=np.float32(1), steps=np.int64(200))
    done = invoke(model, "--inputs", tmp_path / "d.npz", *quick)
    assert "random values" not in done.output
    assert "decides_work" not in json.loads(out.read_text())["models"][0]["fed"]


@pytest.mark.parametrize("command", ["benchmark", "check", "quantize"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:40], "truncated or is not ONNX"),
        (lambda data: data.replace(b"Relu", b"Re\xff\xfe"), "not UTF-8"),
    ],
)
def test_a_bad_model_is_exit_code_2_in_every_command(tmp_path, command, change, says):
    graph = Graph()
    graph.add("Relu", ["x"], "y")
    path = graph.save(tmp_path / "m.onnx", {"x": [1, 4]}, {"y": [1, 4]})
    path.write_bytes(change(path.read_bytes()))
    more = ["-o", str(tmp_path / "q.onnx"), "--method", "fp16"] if command == "quantize" else []
    done = edgekd(command, path, *more, code=2)
    assert says in done.output


def test_random_inputs_that_need_gigabytes_are_refused(tmp_path):
    graph = Graph()
    graph.add("Relu", ["x"], "y")
    graph.save(tmp_path / "m.onnx", {"x": [1, 10**6, 10**6]}, {"y": [1, 10**6, 10**6]})
    done = edgekd("benchmark", tmp_path / "m.onnx", code=2)
    assert "1e+12 elements" in done.output
