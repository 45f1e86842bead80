"""``edgekd quantize`` on a file that a user brings."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from edgekd.cli import main
from tests.engines.quantize.graphs import Graph

CLASSES = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two convolutions and a linear layer: image (batch, 3, 8, 8) to logits (batch, 5)."""
    g = Graph(1)
    g.add("Conv", ["image", g.weight("w1", 8, 3, 3, 3)], "c1", "first", pads=[1] * 4)
    g.add("Relu", ["c1"], "r1")
    g.add("Conv", ["r1", g.weight("w2", 8, 8, 3, 3)], "c2", "second", pads=[1] * 4)
    g.add("GlobalAveragePool", ["c2"], "pooled")
    g.add("Flatten", ["pooled"], "flat")
    g.add("Gemm", ["flat", g.weight("w3", CLASSES, 8)], "logits", "head", transB=1)
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    return g.save(path, {"image": ["batch", 3, 8, 8]}, {"logits": ["batch", CLASSES]})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    image = random.standard_normal((40, 3, 8, 8)).astype(np.float32)
    np.savez(path, image=image, label=random.integers(0, CLASSES, 40))
    return path


def quantize(*words):
    return CliRunner().invoke(main, ["quantize", *map(str, words)])


@pytest.fixture
def written(model, data, tmp_path):
    """Runs the command without timing; the outcome, the record and the file."""

    def run(*words):
        out, record = tmp_path / "out.onnx", tmp_path / "record.json"
        options = ["-o", out, "--calibration", data, "--no-timing", "--json", record]
        done = quantize(model, *options, *words)
        return done, json.loads(record.read_text()) if record.is_file() else None, out

    return run


def operators(path):
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
def test_static_int8_is_written_and_compared(written, runtime):
    done, record, out = written("--for", runtime, "--per-layer")
    assert done.exit_code == 0, done.output
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(out)
    assert record["bytes"] == out.stat().st_size
    assert record["metric"] == "agreement with float32"
    assert record["float_score"]["value"] == 1.0
    assert record["errors"][0]["name"] == "logits"
    assert {"first", "second", "head"} <= {row["node"] for row in record["layers"]}


@pytest.mark.parametrize("method", ["dynamic", "weights-only", "fp16", "bf16"])
def test_the_other_methods_write_too(written, method):
    done, record, out = written("--method", method)
    assert done.exit_code == 0, done.output
    assert record["method"] == method
    assert out.is_file()


def test_labels_make_the_metric_accuracy(written, data, model):
    _, record, _ = written("--labels", "label")
    from edgekd.engines.compare import run_samples
    from edgekd.engines.samples import ArraySamples

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


def test_a_drop_that_cannot_be_met_writes_nothing_and_exits_1(model, data, tmp_path, monkeypatch):
    from edgekd.stages import own_model

    # Whatever is quantized is then off, as in a network that no 8 bits can carry.
    monkeypatch.setattr(own_model._Judge, "drop_of", lambda self, path: 1.0)
    out = tmp_path / "out.onnx"
    done = quantize(model, "-o", out, "--calibration", data, "--max-drop", "0.01", "--no-timing")
    assert done.exit_code == 1, done.output
    assert "no layer can stay in INT8" in done.output
    assert not out.exists()


def test_latency_is_compared_in_the_same_run(model, data, tmp_path):
    record = tmp_path / "r.json"
    done = quantize(model, "-o", tmp_path / "o.onnx", "--calibration", data, "--json", record)
    assert done.exit_code == 0, done.output
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
        (["-o", "MODEL", "--calibration", "DATA"], "the output is the model itself"),
        (["-o", "OUT", "--method", "dynamic", "--max-drop", "0.1"], "without samples"),
        (["-o", "OUT", "--calibration", "DATA", "--set", "a=1"], "for a pipeline"),
        (["-o", "/absent/folder/x.onnx", "--calibration", "DATA"], "does not exist"),
    ],
)
def test_wrong_input_is_explained(model, data, tmp_path, words, says):
    places = {"OUT": tmp_path / "o.onnx", "DATA": data, "MODEL": model}
    done = quantize(model, *[places.get(word, word) for word in words])
    assert done.exit_code == 2, done.output
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
    done = quantize(model, "-o", tmp_path / "o.onnx", "--calibration", path)
    assert done.exit_code == 2, done.output
    assert says in done.output


def test_a_quantized_model_is_refused(written, data, tmp_path):
    _, _, out = written()
    done = quantize(out, "-o", tmp_path / "twice.onnx", "--calibration", data)
    assert done.exit_code == 2
    assert "quantized already" in done.output


def test_options_of_a_model_are_refused_for_a_pipeline(tmp_path):
    pipeline = tmp_path / "p.yaml"
    pipeline.write_text("name: p\n")
    done = quantize(pipeline, "--method", "dynamic")
    assert done.exit_code == 2
    assert "--method is for an ONNX model" in done.output
