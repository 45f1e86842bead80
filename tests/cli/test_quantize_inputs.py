"""``edgekd quantize``: layers at the input in float32, where that is faster."""

from __future__ import annotations

import json

import pytest

from edgekd.quantization.evaluator import SampleEvaluator
from tests.cli.quantizing import quantize
from tests.onnx_builders import pairs_of

LATENCY = "edgekd.quantization.quantize_model.compare_latency"


@pytest.fixture
def timed(monkeypatch):
    """Makes every comparison of latency come out with this interval."""

    def with_interval(interval):
        timing = {"speedup": 1.1, "interval": interval, "p50_ms": 1.0, "float_p50_ms": 1.1}
        monkeypatch.setattr(LATENCY, lambda *_: {**timing, "threads": 1})

    return with_interval


@pytest.mark.parametrize(
    ("interval", "words", "in_float"),
    [
        ([1.01, 1.2], (), True),
        ([1.01, 1.2], ("--max-drop", "1"), True),
        ([0.99, 1.2], (), False),
        (None, (), False),
        ([1.01, 1.2], ("--no-timing",), False),
        ([1.01, 1.2], ("--for", "tensorrt"), False),
    ],
)
def test_input_layers_stay_in_float_where_measured_faster(
    model, data, tmp_path, timed, interval, words, in_float
):
    timed(interval)
    out, record = tmp_path / "out.onnx", tmp_path / "record.json"
    done = quantize(model, "-o", out, "--calibration", data, "--json", record, *words)
    assert pairs_of(out)["first"][1] is not in_float
    assert pairs_of(out)["second"][1]
    assert ("first at the input stays in float32: 1.10× faster so" in done.output) is in_float
    tried = json.loads(record.read_text()).get("float_inputs")
    assert (tried["taken"] if tried else False) is in_float
    if tried:
        assert tried["nodes"] == ["first"]
        assert tried["int8_p50_ms"] == 1.1


def test_input_layers_stay_in_int8_where_float_exceeds_the_drop(
    model, data, tmp_path, timed, monkeypatch
):
    timed([1.01, 1.2])
    drops = {"float-inputs.onnx": 0.5}
    monkeypatch.setattr(SampleEvaluator, "drop_of", lambda self, path: drops.get(path.name, 0.0))
    out = tmp_path / "out.onnx"
    quantize(model, "-o", out, "--calibration", data, "--max-drop", "0.4")
    assert pairs_of(out)["first"][1]


def test_the_decision_is_of_the_file_with_the_input_in_float(
    model, data, tmp_path, timed, monkeypatch
):
    timed([1.01, 1.2])
    drops = {"float-inputs.onnx": 0.25}
    monkeypatch.setattr(SampleEvaluator, "drop_of", lambda self, path: drops.get(path.name, 0.125))
    out, record = tmp_path / "out.onnx", tmp_path / "record.json"
    words = ("--calibration", data, "--max-drop", "0.4", "--json", record)
    done = quantize(model, "-o", out, *words)
    decision = json.loads(record.read_text())["decision"]
    assert decision["kept"] == ["first"]
    assert "first" not in decision["quantized"]
    assert [row["node"] for row in decision["rows"] if row["kept"]] == ["first"]
    assert (decision["drop"], decision["drop_all"]) == (0.25, 0.125)
    assert "drop 0.125, budget 0.4" in done.output
    assert "first at the input stays in float32: 1.10× faster so" in done.output
    assert "found with" not in done.output  # the drop required no float layer


def test_where_only_the_input_can_be_in_int8_it_is(model, data, tmp_path, monkeypatch):
    def drop_of(self, path):
        return 0.0 if [pairs_of(path)[n][1] for n in ("second", "head")] == [False, False] else 1.0

    monkeypatch.setattr(SampleEvaluator, "drop_of", drop_of)
    timed = []
    monkeypatch.setattr(LATENCY, lambda *files: timed.append(files) or {"failed": "no"})
    out = tmp_path / "out.onnx"
    quantize(model, "-o", out, "--calibration", data, "--max-drop", "0.9")
    assert pairs_of(out)["first"][1]
    assert [files[1] for files in timed] == [model]  # no other INT8 file was tried
