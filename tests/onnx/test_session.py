from __future__ import annotations

from pathlib import Path

import onnxruntime

from edgekd.onnx.session import default_options, options_record, session_options
from edgerun.onnx_session import CONFIGURATION


def test_a_model_is_measured_with_the_configuration_of_its_build():
    options = session_options(1, "all")
    for key, value in CONFIGURATION.items():
        assert options.get_session_config_entry(key) == value
        assert options_record(1, "all")[key] == value


def test_the_cache_of_a_compiling_provider_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chain = ["TensorrtExecutionProvider"]
    options = default_options(chain, 1, half=True, int8=False, cache=tmp_path / "kept")
    relative = default_options(chain, 1, half=True, int8=False, cache=Path("kept"))
    assert relative == options
    assert options["TensorrtExecutionProvider"]["trt_fp16_enable"] == "True"


def test_all_threads_asked_for_reach_the_providers_of_the_cpu():
    chain = ["OpenVINOExecutionProvider", "XnnpackExecutionProvider", "CPUExecutionProvider"]
    options = default_options(chain, 3, half=False, int8=False)
    assert options["OpenVINOExecutionProvider"]["num_of_threads"] == "3"
    assert options["XnnpackExecutionProvider"] == {"intra_op_num_threads": "3"}
    assert set(options) < {*onnxruntime.get_all_providers()}
