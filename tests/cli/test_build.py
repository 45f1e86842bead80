from __future__ import annotations

import json
import os
import platform
import sys

import numpy as np
import onnx
import pytest

from edgekd.engines.tensorrt import can_run_here
from edgekd.errors import TargetError
from edgekd.targets import LocalTarget, local
from edgerun.tensorrt.settings import BuildSettings
from tests.command_line import check_not_imported, edgekd
from tests.onnx_builders import run, save_onnx


@pytest.fixture
def model(tmp_path):
    text = """(float[batch,1,8,8] x) => (float[batch,2,6,6] y)
    { [conv] c = Conv (x, w)  [relu] y = Relu (c) }"""
    return save_onnx(tmp_path / "m.onnx", text, {"w": np.ones((2, 1, 3, 3), np.float32)})


@pytest.fixture
def rtx():
    pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")


def invoke(*words, **settings):
    return edgekd("build", *words, **settings)


def test_an_onnxruntime_engine_answers_as_the_model(model, tmp_path):
    out, record = tmp_path / "opt.onnx", tmp_path / "r.json"
    invoke(model, "-o", out, "--engine", "onnxruntime", "--json", record)
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    answers = [run(path, {"x": x})["y"] for path in (model, out)]
    # Fusing Conv and Relu keeps float32's own rounding.
    np.testing.assert_allclose(*answers, rtol=1e-5, atol=1e-5)
    assert json.loads(record.read_text())["engine"] == "onnxruntime"


def test_an_engine_for_two_gpus_is_built_without_one(rtx, model, tmp_path):
    out, record = tmp_path / "m.engine", tmp_path / "r.json"
    done = invoke(
        *(model, "-o", out, "--engine", "tensorrt-rtx", "--sm", "8.6", "--sm", "8.9"),
        *("--shape", "x=1x1x8x8:1x1x8x8:8x1x8x8", "--json", record),
    )
    assert "SM 8.6, 8.9" in done.output
    written = json.loads(record.read_text())
    assert written == json.loads((tmp_path / "m.engine.json").read_text())
    assert written["engine"]["bytes"] == out.stat().st_size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "tensorrt-rtx", "--precision", "int8"), "1 of 1 in FP32: conv"),
        (("--engine", "tensorrt-rtx", "--sm", "8.7"), "no compute capability 8.7"),
        (("--engine", "tensorrt-rtx", "--profile", "jetson-orin-nano-8gb"), "8.7"),
        (("--engine", "tensorrt-rtx", "--shape", "y=1x1"), "no input 'y'"),
        (("--engine", "tensorrt-rtx", "--threads", 2), "--threads is for ONNX Runtime"),
        (("--engine", "onnxruntime", "--sm", "8.6"), "--sm is for TensorRT"),
        (("--precision", "fp16"), "--precision is for TensorRT"),
        (("--set", "a=1"), "--set is for a pipeline"),
        (("--profile", "jetson-orin-nono"), "jetson-orin-nano"),
    ],
)
def test_a_wrong_option_is_one_message_and_exit_code_2(rtx, model, tmp_path, words, message):
    done = invoke(model, "-o", tmp_path / "m.engine", *words, code=2)
    assert message in done.output
    assert not (tmp_path / "m.engine").exists()


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine may be the Jetson")
def test_a_jetson_profile_says_what_to_type_on_the_jetson(model, tmp_path):
    done = invoke(model, "-o", tmp_path / "m.engine", "--profile", "jetson-orin-nano-8gb", code=2)
    assert "python3 -m edgerun build m.onnx --engine m.engine" in done.output


@pytest.mark.skipif(can_run_here("tensorrt-rtx") is None, reason="an engine runs here")
@pytest.mark.parametrize("with_record", [True, False])
def test_measuring_an_engine_where_none_can_run_is_one_message(rtx, model, tmp_path, with_record):
    out = tmp_path / "m.engine"
    invoke(model, "-o", out, "--engine", "tensorrt-rtx")
    if not with_record:
        (tmp_path / "m.engine.json").unlink()
    done = edgekd("benchmark", out, code=4)
    assert f"cannot be loaded here: {can_run_here('tensorrt-rtx')}" in done.output
    assert done.output.count("error: ") == 1
    assert "Traceback" not in done.output


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with a name")
@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("pipe", 2, "this is a device or a pipe, which a file would replace"),
        ("folder", 2, "this is a folder, not a file to write"),
        ("none/m.engine", 2, "the file to write lies in a folder that does not exist"),
        ("e" * 256, 3, "cannot be written: File name too long"),
    ],
)
def test_an_output_that_cannot_be_is_told_in_the_same_words(
    rtx, model, tmp_path, monkeypatch, engine, name, code, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    # As a device is, but the test's own: where it is replaced, the machine loses nothing.
    os.mkfifo(tmp_path / "pipe")
    done = invoke(model, "-o", name, "--engine", engine, code=code)
    assert message in done.output
    # The name that the user gave, and none that is written to meanwhile.
    assert name in done.output
    assert "partial" not in done.output
    assert f".{name}." not in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "m.onnx", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_record_that_cannot_be_is_told_before_the_work(model, tmp_path):
    for record in (tmp_path / "none" / "r.json", tmp_path, model, tmp_path / "e"):
        invoke(model, "-o", tmp_path / "e", "--json", record, code=2)
        assert not (tmp_path / "e").exists()
    invoke(model, "-o", tmp_path / "e", "--json", "/dev/full", code=3)


def test_an_engine_is_no_model_to_build_from(tmp_path):
    path = tmp_path / "m.engine"
    path.write_bytes(b"ftrt" + bytes(range(256)))
    done = invoke(path, "-o", tmp_path / "e", code=2)
    assert "this is a TensorRT engine, not an ONNX model" in done.output


def test_what_the_library_remarks_is_shown_as_its_own(rtx, tmp_path):
    text = "(int64[1,4] x) => (int64[1,4] y) { y = Add (x, x) }"
    path = save_onnx(tmp_path / "ids.onnx", text)
    done = invoke(path, "-o", tmp_path / "e", "--engine", "tensorrt-rtx")
    (line,) = [line for line in done.output.splitlines() if "input x has Int64 binding" in line]
    assert line.startswith("  tensorrt-rtx warns: ")


def test_bad_files_are_named(rtx, model, tmp_path):
    done = invoke(tmp_path / "none.onnx", "-o", tmp_path / "e", "--engine", "tensorrt-rtx", code=2)
    assert "does not exist" in done.output
    done = invoke(model, "-o", model, "--engine", "tensorrt-rtx", code=2)
    assert "would overwrite" in done.output
    assert onnx.load(model).graph.node[0].name == "conv"
    model.write_bytes(model.read_bytes()[:-60])
    done = invoke(model, "-o", tmp_path / "e", "--engine", "tensorrt-rtx", code=2)
    assert "truncated" in done.output
    invoke(model, code=2)


def test_options_of_a_model_are_refused_for_a_pipeline(tmp_path):
    (tmp_path / "p.yaml").write_text("name: x\n")
    done = invoke(tmp_path / "p.yaml", "--sm", "8.6", "--engine", "tensorrt-rtx", code=2)
    assert "--engine, --sm is for an ONNX model" in done.output


def test_a_pipeline_is_run_up_to_its_engines(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("edgekd.cli.run.run_pipeline_until", lambda *words: asked.append(words))
    invoke(tmp_path / "p.yaml", "-o", tmp_path / "run", "--set", "seed=1", "-q")
    assert asked == [(tmp_path / "p.yaml", "engines", ("seed=1",), tmp_path / "run", True)]


def test_a_target_gives_the_parsers_verdict(rtx, model):
    verdict = LocalTarget().parse(model, "tensorrt-rtx")
    assert (verdict["library"], verdict["supported"]) == ("tensorrt-rtx", True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_crash_of_the_builder_does_not_take_edgekd_down(tmp_path, model, monkeypatch):
    folder = tmp_path / "fake" / "edgerun"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "__main__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(local, "edgerun_folder", lambda: folder)
    with pytest.raises(TargetError, match="edgerun build was killed by signal 11"):
        LocalTarget().build(model, tmp_path / "e", BuildSettings("tensorrt-rtx"))


def test_neither_torch_nor_tensorrt_is_imported(rtx, model, tmp_path):
    words = ["build", str(model), "-o", str(tmp_path / "e"), "--engine", "tensorrt-rtx"]
    code = f"from edgekd.cli import main\nmain({words!r}, standalone_mode=False)"
    check_not_imported({"torch", "tensorrt_rtx"}, code)
