from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from tests.command_line import edgerun
from tests.export import models
from tests.onnx_builders import save_external, save_onnx

QUICK = ("--threads", 1, "--min-queries", 70, "--max-seconds", 4)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """One model against a heavier one, measured once for the tests below."""
    folder = tmp_path_factory.mktemp("bench")
    model = models.linear(folder / "light.onnx")
    other = models.heavy(folder / "heavy.onnx")
    edgerun("bench", model, "--against", other, *QUICK, "--json", folder / "out.json")
    return json.loads((folder / "out.json").read_text())


def test_the_record_keeps_every_sample_that_its_figures_rest_on(record):
    assert record["schema"] == "edgerun.bench/1"
    for model in record["models"]:
        samples = np.array(model["samples_ms"])
        assert samples.size == model["latency"]["n"] >= 70
        assert model["latency"]["mean_ms"] == pytest.approx(samples.mean())
        p50 = model["latency"]["p50"]
        assert p50["value"] in samples
        assert p50["interval"][0] <= p50["value"] <= p50["interval"][1]
        assert model["warmup"]["steady"] in (True, False)


def test_the_ratio_is_that_of_the_second_to_the_first(record):
    # More than a thousand times the arithmetic: the sign of the ratio is beyond any noise.
    comparison = record["comparison"]
    assert comparison["interval"][0] > 1
    assert comparison["interval"][0] <= comparison["ratio"] <= comparison["interval"][1]
    assert comparison["rounds"] >= 6


def test_providers_are_those_of_each_node(record):
    providers = record["models"][0]["providers"]
    assert providers["session"] == ["CPUExecutionProvider"]
    assert providers["nodes"] == {"CPUExecutionProvider": 1}


def test_a_sensor_that_is_missing_is_null(record):
    environment = record["environment"]
    for moment in ("before", "after"):
        for value in environment[moment].values():
            assert value is None or value or isinstance(value, float)
    assert environment["versions"].keys() == {"edgerun", "numpy", "onnxruntime"}


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_memory_grows_with_what_the_model_holds(tmp_path):
    peaks = []
    for size in (16, 2048):
        model = models.heavy(tmp_path / f"{size}.onnx", size)
        edgerun("bench", model, *QUICK, "--json", tmp_path / "out.json")
        peaks.append(json.loads((tmp_path / "out.json").read_text())["models"][0]["memory"])
    small, large = peaks
    assert small["above_empty_mb"] == pytest.approx(small["peak_mb"] - small["empty_mb"])
    # The weights alone are 2048² · 4 bytes = 16.8 MB.
    assert large["above_empty_mb"] - small["above_empty_mb"] > 16


def test_weights_outside_the_file_count_in_its_size(tmp_path):
    save_external(models.heavy(tmp_path / "m.onnx"), tmp_path / "split.onnx")
    done = edgerun("info", tmp_path / "split.onnx", "--json", tmp_path / "out.json")
    described = json.loads((tmp_path / "out.json").read_text())["model"]
    parts = [tmp_path / "split.onnx", tmp_path / "w.bin"]
    assert described["size_bytes"] == sum(p.stat().st_size for p in parts)

    (tmp_path / "w.bin").unlink()
    done = edgerun("bench", tmp_path / "split.onnx", code=2)
    assert "weights are in another file" in done.stderr


def test_a_model_of_branches_states_and_constants_is_measured(tmp_path):
    model = models.stateful_if(tmp_path / "m.onnx")
    done = edgerun("bench", model, *QUICK, "--batch", 2, "--no-memory")
    assert "state float32 1x2x3" in done.stdout
    assert "rate int64 scalar" in done.stdout


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_a_file_that_is_not_a_whole_model_is_bad_input(tmp_path, content):
    path = models.heavy(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    done = edgerun("bench", path, code=2)
    assert "not a complete ONNX model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shape", "z=1x4"), "there is no input 'z'"),
        (("--shape", "x=1x5"), "does not fit input x"),
        (("--shape", "x"), "is not a shape"),
        (("--providers", "cuda"), "has no CUDAExecutionProvider"),
        (("--providers", "none"), "has no none"),
        (("--inputs", "missing.npz"), "there is no such file"),
        (("--threads", "0"), "not a whole number"),
        (("--max-seconds", "nan"), "not a number of seconds"),
    ],
)
def test_a_wrong_option_is_bad_input(tmp_path, words, message):
    done = edgerun("bench", models.linear(tmp_path / "m.onnx"), *words, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_size_that_was_chosen_and_does_not_run_is_told(tmp_path):
    text = "(float[n] x) => (float[?,2] y) { y = Reshape (x, pairs) }"
    model = save_onnx(tmp_path / "m.onnx", text, {"pairs": np.array([-1, 2])})
    done = edgerun("bench", model, code=2)
    assert "axis 0 (n) = 1 (batch)" in done.stderr
    edgerun("bench", model, "--shape", "x=4", *QUICK, "--no-memory")
