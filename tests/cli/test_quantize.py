"""``edgekd quantize`` on a file that a user brings."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import onnx
import pytest

from edgekd.errors import StageError, TargetError
from edgekd.quantization.evaluator import SampleEvaluator
from edgekd.quantization.quantize_model import quantize_model
from edgekd.quantization.quantize_onnx import QuantizeSettings
from edgekd.targets import LocalTarget
from tests.cli.quantizing import quantize
from tests.onnx_builders import Graph, run


@pytest.fixture
def written(model, data, tmp_path):
    """Runs the command without timing; the outcome, the record and the file."""

    def run(*words, code=0):
        out, record = tmp_path / "out.onnx", tmp_path / "record.json"
        options = ["-o", out, "--calibration", data, "--no-timing", "--json", record]
        done = quantize(model, *options, *words, code=code)
        return done, json.loads(record.read_text()) if record.is_file() else None, out

    return run


def operators(path):
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
def test_static_int8_is_written_and_compared(written, runtime):
    _done, record, out = written("--for", runtime, "--per-layer")
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(out)
    assert record["bytes"] == out.stat().st_size
    assert record["metric"] == "agreement with float32"
    assert record["float_score"]["value"] == 1.0
    assert record["errors"][0]["name"] == "logits"
    assert {"first", "second", "head"} <= {row["node"] for row in record["layers"]}


@pytest.mark.parametrize("method", ["dynamic", "weights-only", "fp16", "bf16"])
def test_the_other_methods_write_too(written, method):
    _done, record, out = written("--method", method)
    assert record["method"] == method
    assert out.is_file()


def test_labels_make_the_metric_accuracy(written, data, model):
    _, record, _ = written("--labels", "label")
    from edgekd.onnx.inference import run_samples
    from edgekd.onnx.samples import ArraySamples

    with np.load(data) as archive:
        answers = run_samples(model, ArraySamples({"image": archive["image"]}))["logits"]
        expected = (answers.argmax(1) == archive["label"]).mean()
    assert record["metric"] == "accuracy"
    assert record["float_score"]["value"] == pytest.approx(expected)


def test_kept_nodes_stay_in_float(written):
    _, _, out = written("--keep", "second")
    graph = onnx.load(out).graph
    given = {o: n.op_type for n in graph.node for o in n.output}
    second = next(node for node in graph.node if node.name == "second")
    assert given.get(second.input[1]) is None


@pytest.mark.parametrize("before", [None, b"an earlier model"])
def test_a_drop_that_cannot_be_met_writes_nothing_and_exits_1(
    written, tmp_path, monkeypatch, before
):
    # Whatever is quantized is then off, as in a network that no 8 bits can carry.
    monkeypatch.setattr(SampleEvaluator, "drop_of", lambda self, path: 1.0)
    out = tmp_path / "out.onnx"
    if before is not None:
        out.write_bytes(before)
    done, record, _ = written("--max-drop", "0.01", code=1)
    assert "no layer can stay in INT8" in done.output
    assert record["output"] is None
    assert (out.read_bytes() if out.exists() else None) == before
    assert list(tmp_path.glob("*partial*")) == []


@pytest.mark.parametrize("before", [None, b"an earlier model"])
def test_a_failure_after_the_file_was_made_leaves_what_was_there(
    written, tmp_path, monkeypatch, before
):
    def fails(self, path):
        assert path.stat().st_size > 1000
        raise StageError("the model does not run", where=str(path))

    monkeypatch.setattr(SampleEvaluator, "compare", fails)
    out = tmp_path / "out.onnx"
    if before is not None:
        out.write_bytes(before)
    done, record, _ = written(code=3)
    assert record is None
    assert f"where: {out}" in done.output.replace("\n", " ")
    assert (out.read_bytes() if out.exists() else None) == before
    assert list(tmp_path.glob("*partial*")) == []


def test_a_search_within_the_drop_is_recorded_under_the_final_name(written):
    _done, record, out = written("--max-drop", "1")
    assert record["output"] == str(out)
    assert record["decision"]["chosen"] == out.name
    assert record["drop"]["value"] == pytest.approx(record["decision"]["drop"])


def test_a_regression_is_judged_by_its_relative_error(tmp_path):
    """Recomputed from the two files."""
    g = Graph(2)
    g.add("Conv", ["image", g.weight("w", 4, 3, 3, 3)], "y", "first", pads=[1] * 4)
    model = g.save(tmp_path / "m.onnx", {"image": ["b", 3, 8, 8]}, {"y": ["b", 4, 8, 8]})
    image = np.random.default_rng(0).standard_normal((9, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "data.npy", image)
    out, to = tmp_path / "o.onnx", tmp_path / "r.json"
    settings = ["--max-drop", "0.5", "--no-timing", "--json", to]
    quantize(model, "-o", out, "--calibration", tmp_path / "data.npy", *settings)
    record = json.loads(to.read_text())
    p, o = (run(path, {"image": image})["y"].reshape(9, -1).astype(float) for path in (model, out))
    each = np.linalg.norm(o - p, axis=1) / np.sqrt((p**2).sum() / 9)
    assert record["metric"] == "1 - relative error"
    assert record["drop"]["value"] == pytest.approx(each.mean(), rel=1e-4)
    assert record["decision"]["drop"] == pytest.approx(each.mean(), rel=1e-4)


def test_memory_does_not_grow_with_the_samples(tmp_path):
    g = Graph(1)
    g.add("Conv", ["image", g.weight("w", 64, 1, 1, 1)], "y")
    model = g.save(tmp_path / "m.onnx", {"image": ["b", 1, 8, 8]}, {"y": ["b", 64, 8, 8]})

    def peak(count):
        data = tmp_path / f"{count}.npy"
        np.save(data, np.random.default_rng(0).standard_normal((count, 1, 8, 8)).astype(np.float32))
        tracemalloc.start()
        quantize_model(model, tmp_path / "o.onnx", data, QuantizeSettings(timing=False))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(64)  # what is loaded once
    # 960 samples more are 0.25 MB of inputs and 16 MB of outputs of each model.
    assert peak(1024) - peak(64) < 1_000_000


def test_an_npy_file_with_fewer_samples_than_the_fixed_batch_can_be_timed(tmp_path):
    g = Graph(1)
    g.add("Gemm", ["file", g.weight("w", 4, 3)], "y", "head")
    model = g.save(tmp_path / "m.onnx", {"file": [8, 4]}, {"y": [8, 3]})
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((5, 4)).astype("f4"))
    to = tmp_path / "r.json"
    quantize(model, "-o", tmp_path / "o.onnx", "--calibration", tmp_path / "data.npy", "--json", to)
    assert json.loads(to.read_text())["timing"].keys() >= {"p50_ms", "float_p50_ms", "speedup"}


def test_a_model_too_slow_for_a_median_is_shown_without_one(model, data, tmp_path, monkeypatch):
    def slow(self, *args, **settings):
        none = {"latency": {"p50": {"value": None, "interval": None, "n": 6, "note": "few"}}}
        return {"models": [none, none], "comparison": {"ratio": 1.5, "interval": None}}

    monkeypatch.setattr(LocalTarget, "bench", slow)
    out, to = tmp_path / "o.onnx", tmp_path / "r.json"
    done = quantize(model, "-o", out, "--calibration", data, "--max-drop", "1", "--json", to)
    assert "n too small, float32 n too small: 1.50×" in done.output
    assert "too few were timed for a median" in done.output
    assert json.loads(to.read_text())["timing"]["p50_ms"] is None


def test_a_failed_timing_is_a_remark(model, data, tmp_path, monkeypatch):
    def fails(self, *args, **settings):
        raise TargetError("the process was killed: [9]")

    monkeypatch.setattr(LocalTarget, "bench", fails)
    out, to = tmp_path / "o.onnx", tmp_path / "r.json"
    done = quantize(model, "-o", out, "--calibration", data, "--json", to)
    assert json.loads(to.read_text())["timing"]["failed"] == "the process was killed: [9]"
    assert "latency not compared: the process was killed: [9]" in done.output
    assert "QuantizeLinear" in operators(out)


def test_latency_is_compared_in_the_same_run(model, data, tmp_path):
    record = tmp_path / "r.json"
    done = quantize(model, "-o", tmp_path / "o.onnx", "--calibration", data, "--json", record)
    timing = json.loads(record.read_text())["timing"]
    low, high = timing["interval"]
    assert low <= timing["speedup"] <= high
    said = "slower than" if high < 1 else "not shown to be faster than" if low <= 1 else ""
    assert said in done.output
    assert ("on this machine" in done.output) == bool(said)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no file to write is given"),
        (["-o", "OUT"], "needs samples"),
        (["-o", "OUT", "--calibration", "absent.npz"], "absent.npz"),
        (["-o", "OUT", "--calibration", "DATA", "--labels", "labels"], "did you mean 'label'"),
        (["-o", "OUT", "--calibration", "DATA", "--labels", "image"], "one class from 0 to 4"),
        (["-o", "OUT", "--calibration", "DATA", "--keep", "secnd"], "second"),
        (["-o", "MODEL", "--calibration", "DATA"], "would overwrite another file"),
        (["-o", "OUT", "--method", "dynamic", "--max-drop", "0.1"], "without samples"),
        (["-o", "OUT", "--calibration", "DATA", "--set", "a=1"], "for a pipeline"),
        (["-o", "/absent/folder/x.onnx", "--calibration", "DATA"], "does not exist"),
    ],
)
def test_wrong_input_is_explained(model, data, tmp_path, words, says):
    places = {"OUT": tmp_path / "o.onnx", "DATA": data, "MODEL": model}
    done = quantize(model, *[places.get(word, word) for word in words], code=2)
    assert says in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"image": np.zeros((1, 3, 8, 8), np.float32)}, "at least 2"),
        ({"image": np.zeros((0, 3, 8, 8), np.float32)}, "no sample"),
        ({"picture": np.zeros((4, 3, 8, 8), np.float32)}, "image"),
        ({"image": np.zeros((4, 3, 9, 8), np.float32)}, "(4, 3, 9, 8)"),
        ({"image": np.full((4, 3, 8, 8), np.nan, np.float32)}, "sample 0"),
    ],
)
def test_wrong_samples_are_explained(model, tmp_path, arrays, says):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    done = quantize(model, "-o", tmp_path / "o.onnx", "--calibration", path, code=2)
    assert says in done.output


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (None, "holds one array, the inputs, and no labels"),
        (np.array([0, None, 2, 3], object), "pickled objects"),
        (np.array([0.0, 1.0, 2.0, 3.0]), "one class from 0 to 4"),
        (np.array([0, 1, 2, 5]), "1 of 4 labels are no class from 0 to 4: 5"),
        (np.array([-5, 4, -1, 0]), "2 of 4 labels are no class from 0 to 4: -5, -1"),
        (np.array([0, 1, 2]), "each of the 4 samples"),
    ],
)
def test_wrong_labels_are_explained(model, tmp_path, labels, says):
    image = np.zeros((4, 3, 8, 8), np.float32)
    data = tmp_path / ("data.npy" if labels is None else "data.npz")
    if labels is None:
        np.save(data, image)
    else:
        np.savez(data, image=image, label=labels)
    out = tmp_path / "o.onnx"
    done = quantize(model, "-o", out, "--calibration", data, "--labels", "label", code=2)
    assert says in " ".join(done.output.split())
    assert not out.exists()


def test_a_quantized_model_is_refused(written, data, tmp_path):
    _, _, out = written()
    done = quantize(out, "-o", tmp_path / "twice.onnx", "--calibration", data, code=2)
    assert "quantized already" in done.output


def test_options_of_a_model_are_refused_for_a_pipeline(tmp_path):
    pipeline = tmp_path / "p.yaml"
    pipeline.write_text("name: p\n")
    done = quantize(pipeline, "--method", "dynamic", code=2)
    assert "--method is for an ONNX model" in done.output


def test_the_api_takes_every_setting(model, data, tmp_path):
    from edgekd.api import quantize as quantize_by_api

    record = quantize_by_api(
        model, tmp_path / "out.onnx", data, calibrator="percentile", samples=10, timing=False
    )
    assert record["output"] == str(tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("words", "heading"),
    [
        ((), "on the 40 calibration samples"),
        (("--samples", "5"), "on the 40 samples of data.npz, 5 of them calibrated on"),
        (("--method", "fp16"), "on the 40 calibration samples"),
        (("--method", "dynamic"), "on the 40 samples of data.npz"),
    ],
)
def test_the_table_says_what_it_is_of(written, words, heading):
    done, _, _ = written(*words)
    assert heading in " ".join(done.output.split())


def test_a_float_model_that_does_not_know_the_labels_is_said(written, model, data, tmp_path):
    _, record, _ = written("--labels", "label")  # random ones
    assert any("chance is 20.0%" in text for text in record["warnings"])
    with np.load(data) as archive:
        image = archive["image"]
    known = tmp_path / "known.npz"
    np.savez(known, image=image, label=run(model, {"image": image})["logits"].argmax(1))
    _, record, _ = written("--validation", known, "--labels", "label")
    assert not any("chance" in text for text in record["warnings"])
