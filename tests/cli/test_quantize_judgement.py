"""What ``edgekd quantize`` reports about the outputs, and what it refuses because of them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from edgekd.onnx.samples import ArraySamples
from edgekd.quantization.evaluator import SampleEvaluator
from edgekd.release.statistics import wilson
from tests.cli.quantizing import CLASSES, quantize, samples
from tests.onnx_builders import Graph, run, save_onnx


@pytest.fixture
def written(model, tmp_path):
    """Runs the command without timing; the outcome, the record and the file."""

    def run(*words, model=model, code=0):
        out, to = tmp_path / "out.onnx", tmp_path / "record.json"
        done = quantize(model, "-o", out, "--no-timing", "--json", to, *words, code=code)
        return done, json.loads(to.read_text()) if to.is_file() else None, out

    return run


def said(done):
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """A linear model whose classes 8 bits cannot distinguish, and samples of it.

    In each column of the weights one large value, which no sample sees, sets the scale.
    """
    random = np.random.default_rng(3)
    weights = random.standard_normal((64, CLASSES)).astype(np.float32)
    weights[0] = 3000
    folder = tmp_path_factory.mktemp("coarse")
    x = random.standard_normal((40, 64)).astype(np.float32)
    x[:, 0] = 0
    np.savez(folder / "x.npz", x=x)
    g = Graph()
    g.add("MatMul", ["x", g.constant("w", weights)], "logits", "head")
    path = g.save(folder / "m.onnx", {"x": ["b", 64]}, {"logits": ["b", CLASSES]})
    return path, folder / "x.npz"


@pytest.mark.parametrize("method", ["weights-only", "dynamic", "static"])
@pytest.mark.parametrize("before", [None, b"an earlier model"])
def test_a_drop_over_the_budget_writes_nothing_whatever_the_method(
    coarse, written, tmp_path, method, before
):
    path, x = coarse
    if before is not None:
        (tmp_path / "out.onnx").write_bytes(before)
    words = ["--calibration", x, "--method", method, "--max-drop", "0.05"]
    done, record, out = written(*words, model=path, code=1)
    assert record["output"] is None
    assert "nothing was written" in said(done)
    if method != "static":
        assert record["drop"]["value"] > 0.05
        assert f"falls by {record['drop']['value']:.4g}" in said(done)
    assert (out.read_bytes() if out.exists() else None) == before
    assert list(tmp_path.glob("*partial*")) == []


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_16_bits_are_held_to_the_drop_too(tmp_path, written, kind):
    """A regression of 8 or 11 bits is not within a millionth of float32's outputs."""
    g = Graph(2)
    g.add("MatMul", ["x", g.weight("w", 16, 4)], "y", "first")
    path = g.save(tmp_path / "m.onnx", {"x": ["b", 2, 16]}, {"y": ["b", 2, 4]})
    x = np.random.default_rng(0).standard_normal((9, 2, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    words = ["--calibration", tmp_path / "x.npy", "--method", kind, "--max-drop"]
    _, record, out = written(*words, "1e-6", model=path, code=1)
    assert not out.exists()
    # Two roundings to the type's digits, of the input and of the weights, and one of the output.
    most = 3 * {"fp16": 2.0**-11, "bf16": 2.0**-8}[kind]
    assert 1e-6 < record["drop"]["value"] < most
    _done, record, out = written(*words, most, model=path)
    assert out.is_file()


def test_bf16_is_compared_by_its_rounding(written, model, data):
    """Its error is that of 8 bits of precision, and every layer adds its own."""
    _done, record, out = written("--calibration", data, "--method", "bf16", "--per-layer")
    assert record["metric"] == "agreement with float32"
    # Each value is off by up to 2⁻⁹, most of them by less: 40 to 60 dB over a few layers.
    assert 35 < record["errors"][0]["sqnr_db"] < 65
    by_node = {row["node"]: row for row in record["layers"]}
    assert {"", "first", "second", "head"} <= set(by_node)
    image = np.load(data)["image"]
    bits = image.view(np.uint32).astype(np.uint64)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    rounded = even.astype(np.uint32).view(np.float32).astype(float)
    noise = np.sqrt(((rounded - image) ** 2).sum() / (image.astype(float) ** 2).sum())
    assert by_node[""]["relative"] == pytest.approx(noise, rel=1e-3)
    assert {n.op_type for n in onnx.load(out).graph.node} >= {"Cast", "Conv"}


def test_the_latency_of_bf16_is_left_out_with_the_reason(model, data, tmp_path):
    done = quantize(
        model, "-o", tmp_path / "o.onnx", "--calibration", data, "--method", "bf16"
    )  # fmt: skip
    assert "latency not compared: ONNX Runtime's CPU provider has no bfloat16" in said(done)


def spoiling(path, value):
    """(n, 5) logits = x; where the first of a row is ``value``, that row is NaN."""
    g = Graph()
    first = g.add("Gather", ["x", g.constant("zero", np.array([0]))], "first", axis=1)
    hit = g.add("Equal", [first, g.constant("value", np.float32(value))], "hit")
    factors = [g.constant("bad", np.float32(np.nan)), g.constant("one", np.float32(1))]
    g.add("Where", [hit, *factors], "factor")
    g.add("Mul", ["x", "factor"], "logits")
    return g.save(path, {"x": ["b", 5]}, {"logits": ["b", 5]})


@pytest.mark.parametrize("labels", [None, np.zeros(8, int)])
def test_a_row_that_is_no_number_on_one_side_is_wrong(tmp_path, labels):
    """argmax takes the first NaN for the largest: class 0, which float32 predicts here as well."""
    x = np.tile(np.float32([5, 1, 1, 1, 1]), (8, 1))
    x[:2, 0] = 7
    sound, spoilt = spoiling(tmp_path / "a.onnx", -1), spoiling(tmp_path / "b.onnx", 7)
    judge = SampleEvaluator(sound, ArraySamples({"x": x}), labels)
    found = judge.compare(spoilt)
    assert judge.drop_of(spoilt) == pytest.approx(2 / 8)
    assert found["drop"]["value"] == pytest.approx(2 / 8)
    assert found["errors"][0]["argmax_agreement"] == pytest.approx(6 / 8)
    assert judge.drop_of(sound) == 0
    # The same NaN on both sides is no error.
    assert SampleEvaluator(spoilt, ArraySamples({"x": x}), None).drop_of(spoilt) == 0


def test_a_regression_that_is_no_number_is_as_wrong_as_zeros(tmp_path):
    def model(name, bad):
        g = Graph()
        hit = g.add("Equal", ["x", g.constant("seven", np.float32(7))], "hit")
        g.add("Where", [hit, g.constant("bad", np.float32(bad)), "x"], "y")
        return g.save(tmp_path / name, {"x": ["b", 3, 4]}, {"y": ["b", 3, 4]})

    x = np.ones((4, 3, 4), np.float32)
    x[1, 2, 3] = 7
    judge = SampleEvaluator(model("a.onnx", 7), ArraySamples({"x": x}), None)
    assert judge.drop_of(model("b.onnx", np.nan)) == pytest.approx(1 / 4)


def test_agreement_drop_is_the_disagreement_with_wilson_interval(coarse, written):
    path, x = coarse
    done, record, _ = written("--calibration", x, "--method", "weights-only", model=path)
    wrong = round((1 - record["score"]["value"]) * 40)
    assert record["drop"]["value"] == pytest.approx(wrong / 40)
    assert record["drop"]["interval"] == pytest.approx(wilson(wrong, 40).interval)
    assert record["drop"]["interval"][0] >= 0
    assert "the outputs have little in common with float32's: logits" in said(done)
    assert "only" in said(done)


def test_other_samples_are_compared_on_with_their_labels(written, model, data, tmp_path):
    other = samples(tmp_path / "other.npz", 30, seed=5)
    done, record, _ = written(
        "--calibration", data, "--validation", other, "--labels", "label", "--max-drop", "1"
    )
    with np.load(other) as archive:
        answers = run(model, {"image": archive["image"]})["logits"]
        expected = (answers.argmax(1) == archive["label"]).mean()
    assert record["float_score"]["n"] == 30
    assert record["float_score"]["value"] == pytest.approx(expected)
    assert record["compared_on"] == {
        "file": str(other), "samples": 30, "calibrated_on": False
    }  # fmt: skip
    assert record["decision"]["drop"] == pytest.approx(record["drop"]["value"])
    assert "on the 30 samples of other.npz" in said(done)
    assert "--validation" not in said(done)


def test_it_is_said_that_the_samples_are_those_of_the_calibration(written, data):
    done, record, _ = written("--calibration", data)
    assert record["compared_on"]["calibrated_on"]
    assert "on the 40 calibration samples" in said(done)
    assert "other samples are a better test: --validation DATA.npz" in said(done)


def test_a_larger_file_is_called_larger(tmp_path, written):
    g = Graph(2)
    g.add("MatMul", ["x", g.weight("w", 8, 4)], "y", "first")
    path = g.save(tmp_path / "m.onnx", {"x": ["b", 8]}, {"y": ["b", 4]})
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((4, 8)).astype("f4"))
    done, _, out = written("--calibration", tmp_path / "x.npy", model=path)
    factor = out.stat().st_size / path.stat().st_size
    assert factor > 1
    assert f"{factor:.2f}× larger" in said(done)
    assert "smaller (" not in said(done)


@pytest.mark.parametrize("calibrator", ["minmax", "entropy"])
def test_samples_that_do_not_vary_are_remarked_on(written, tmp_path, calibrator):
    np.savez(tmp_path / "zero.npz", image=np.zeros((4, 3, 8, 8), np.float32))
    done, record, _ = written("--calibration", tmp_path / "zero.npz", "--calibrator", calibrator)
    assert "one value only on all calibration samples" in said(done)
    assert "image" in " ".join(record["warnings"])
    assert "float32 predicts class" in said(done)


def test_sound_samples_are_not_remarked_on(written, tmp_path):
    g = Graph()
    g.add("MatMul", ["x", g.weight("w", 64, CLASSES)], "logits", "head")
    path = g.save(tmp_path / "m.onnx", {"x": ["b", 64]}, {"logits": ["b", CLASSES]})
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((40, 64)).astype("f4"))
    _, record, _ = written("--calibration", tmp_path / "x.npy", model=path)
    assert record["warnings"] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "dynamic", "--labels", "label"], "without samples where: --labels"),
        (["--method", "fp16", "--for", "tensorrt"], "--for is for --method static"),
        (["--method", "dynamic", "--calibrator", "entropy"], "--calibrator is for --method"),
        (["--method", "bf16", "--samples", "9"], "--samples is for --method static"),
        (["--method", "weights-only", "--calibration", "DATA", "--validation", "DATA"], "uses no"),
        (["--validation", "DATA"], "needs samples"),
    ],
)
def test_options_that_would_do_nothing_are_refused(written, data, words, says):
    done, _, out = written(*[data if word == "DATA" else word for word in words], code=2)
    assert says in said(done)
    assert not out.exists()


@pytest.mark.parametrize("count", [1, 0])
def test_too_few_samples_name_their_file(written, tmp_path, count):
    few = tmp_path / "few.npz"
    np.savez(few, image=np.zeros((count, 3, 8, 8), np.float32))
    done, _, _ = written("--calibration", few, code=2)
    assert f"where: {few}" in said(done)


def test_a_model_that_computes_nan_is_named_itself(tmp_path, written):
    g = Graph(2)
    g.add("Log", ["x"], "log")
    g.add("MatMul", ["log", g.weight("w", 8, 4)], "y", "first")
    path = g.save(tmp_path / "m.onnx", {"x": ["b", 8]}, {"y": ["b", 4]})
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((4, 8)).astype("f4"))
    done, _, _ = written("--calibration", tmp_path / "x.npy", model=path, code=2)
    assert f"where: {path}" in said(done)


@pytest.mark.parametrize("method", ["fp16", "bf16"])
def test_a_quantized_model_in_16_bits_is_refused(written, data, tmp_path, method):
    _, _, out = written("--calibration", data)
    done = quantize(out, "-o", tmp_path / "twice.onnx", "--method", method, code=2)
    assert "quantized already" in said(done)


@pytest.mark.parametrize("method", ["fp16", "bf16"])
@pytest.mark.parametrize("with_samples", [True, False])
def test_a_model_in_float64_is_refused_in_words(tmp_path, written, method, with_samples):
    text = "(double[b,4] x) => (double[b,4] y) { [first] y = MatMul (x, w) }"
    path = save_onnx(tmp_path / "m.onnx", text, {"w": np.eye(4)})
    np.savez(tmp_path / "x.npz", x=np.ones((4, 4)))
    given = ["--calibration", tmp_path / "x.npz"] if with_samples else []
    done, _, _ = written("--method", method, *given, model=path, code=2)
    assert "computes in float64" in said(done)
    done, _, _ = written("--method", "weights-only", *given, model=path, code=2)
    assert "its weights are float64" in said(done)


def test_what_the_search_tries_is_shown(coarse, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: shown.append(text))
    path, x = coarse
    quantize(path, "-o", tmp_path / "o.onnx", "--calibration", x, "--max-drop", "0.05", code=1)
    assert any("nodes in float32: drop" in text for text in shown)


def test_a_map_of_classes_is_held_to_the_share_that_is_the_same(tmp_path, written):
    """ArgMax in the graph: integers are all that the file gives."""
    g = Graph(2)
    g.add("Conv", ["x", g.weight("w1", 8, 3, 3, 3)], "c", "first", pads=[1] * 4)
    g.add("Relu", ["c"], "r")
    g.add("Conv", ["r", g.weight("w2", 5, 8, 1, 1)], "s", "second")
    g.add("ArgMax", ["s"], "mask", axis=1, keepdims=0)
    path = g.save(tmp_path / "m.onnx", {"x": ["n", 3, 8, 8]}, {"mask": ["n", 8, 8]})
    model = onnx.load(str(path))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    onnx.save(model, str(path))
    x = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    # One sample sets a scale that leaves the others a step or two.
    x[0] *= 300
    np.save(tmp_path / "x.npy", x)
    words = ["--calibration", tmp_path / "x.npy"]
    done, record, out = written(*words, model=path)
    same = (run(path, {"x": x})["mask"] == run(out, {"x": x})["mask"]).mean()
    assert same < 0.9
    assert record["score"]["value"] == pytest.approx(same)
    assert record["worst"]["drop"] == pytest.approx(1 - same)
    assert f"{same:.1%} of 1,024 values are the same" in said(done)
    _, record, _ = written(*words, "--max-drop", "0.05", model=path, code=None)
    assert record["output"] is None or record["drop"]["value"] <= 0.05
    assert record["decision"]["drop_all"] == pytest.approx(1 - same)
