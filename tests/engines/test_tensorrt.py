from __future__ import annotations

import shlex

import pytest

from edgekd.config.budgets import Budgets, GateConfig
from edgekd.config.pipeline import TensorRTConfig
from edgekd.config.profile import load_profile
from edgekd.engines import tensorrt
from edgekd.engines.tensorrt import (
    can_run_here,
    check_installed,
    check_runtime,
    device_command,
    engine_settings,
    where_built,
)
from edgekd.errors import InputError
from edgerun.cli import command_parser
from edgerun.cuda_runtime import load_cuda_runtime
from edgerun.errors import NoDevice
from edgerun.tensorrt import library

JETSON = "jetson-orin-nano-8gb"


@pytest.fixture
def config():
    return TensorRTConfig(
        kind="tensorrt",
        shapes={"x:0": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))},
        version_compatible=True,
        dla=0,
        gpu_fallback=False,
    )


def test_the_profile_gives_memory_and_gpu_where_the_engine_does_not(config):
    profile = load_profile(JETSON)
    assert profile.budget.memory_mb is not None
    settings = engine_settings(config, profile)
    assert settings.workspace_mb == profile.budget.memory_mb.value
    # TensorRT builds for the GPU it runs on; only TensorRT for RTX builds for others.
    assert settings.compute_capabilities == ()
    rtx = engine_settings(TensorRTConfig(kind="tensorrt-rtx"), profile)
    assert rtx.compute_capabilities == (profile.gpu.compute_capability.value,)
    own = TensorRTConfig(kind="tensorrt-rtx", compute_capabilities=("8.6",), workspace_mb=32)
    settings = engine_settings(own, profile)
    assert (settings.compute_capabilities, settings.workspace_mb) == (("8.6",), 32)
    assert engine_settings(own, None).batch == 1
    gated = Budgets.resolve(GateConfig.model_validate({"memory": {"peak_mb": 64}}), profile)
    assert engine_settings(config, profile, gated).workspace_mb == 64


def test_the_command_for_the_device_is_one_that_edgerun_takes(config):
    settings = engine_settings(
        config, load_profile(JETSON), batch=4, precision="int8", keep=("a node",)
    )
    words = shlex.split(device_command(settings, "m.onnx", "m.engine"))
    assert words[:3] == ["python3", "-m", "edgerun"]
    options = command_parser().parse_args(words[3:])
    assert options.shape == ["x:0=1x3x8x8:2x3x8x8:4x3x8x8"]
    assert (options.batch, options.precision, options.keep) == (4, "int8", ["a node"])
    assert (options.dla, options.no_gpu_fallback, options.version_compatible) == (0, True, True)
    assert options.workspace_mb == settings.workspace_mb


def test_an_absent_library_says_what_to_install(monkeypatch, tmp_path, config):
    monkeypatch.setattr(library, "MODULES", dict.fromkeys(library.MODULES, "not_there_at_all"))
    for kind, word in (("tensorrt", "JetPack"), ("tensorrt-rtx", r"edgekd\[rtx\]")):
        settings = engine_settings(TensorRTConfig(kind=kind), None)
        with pytest.raises(InputError, match=word):
            check_runtime(settings, None, tmp_path / "m.onnx")
        with pytest.raises(InputError, match=word) as caught:
            check_installed(kind, "engines[1]")
        assert caught.value.where == "engines[1]"
    check_installed("onnxruntime")


@pytest.mark.parametrize(
    ("kind", "profile", "machine", "place"),
    [
        ("tensorrt", JETSON, "x86_64", "on the device"),
        ("tensorrt", JETSON, "aarch64", "here"),
        ("tensorrt", "raspberry-pi-5", "x86_64", "here"),
        ("tensorrt", None, "x86_64", "here"),
        ("tensorrt-rtx", JETSON, "x86_64", "here"),
        ("onnxruntime", JETSON, "x86_64", "here"),
    ],
)
def test_only_a_jetsons_own_engine_is_built_elsewhere(monkeypatch, kind, profile, machine, place):
    monkeypatch.setattr(tensorrt.platform, "machine", lambda: machine)
    assert where_built(kind, load_profile(profile) if profile else None) == place


def test_where_nothing_can_run_an_engine_the_reason_is_edgeruns(monkeypatch, tmp_path):
    # It must be detected in any folder, and in a separate process.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("raise SystemError('the wrong numpy')")
    try:
        load_cuda_runtime()
        reason = None
    except NoDevice as error:
        reason = error.what
    assert can_run_here("tensorrt") == can_run_here("tensorrt-rtx") == reason
    assert can_run_here("onnxruntime") is None


def test_a_cuda_library_that_crashes_is_a_reason(monkeypatch):
    monkeypatch.setattr(tensorrt, "_START_CUDA", "import os; os.abort()")
    assert "ended with code -6" in can_run_here("tensorrt")


def test_a_jetsons_engine_is_not_built_on_another_machine(monkeypatch, tmp_path, config):
    profile = load_profile(JETSON)
    settings = engine_settings(config, profile, precision="int8")
    monkeypatch.setattr(tensorrt.platform, "machine", lambda: "x86_64")
    with pytest.raises(InputError, match="built on the device") as caught:
        check_runtime(settings, profile, tmp_path / "m.onnx")
    assert device_command(settings, "m.onnx", "m.engine") in caught.value.remedy
