"""Which axis of inputs and outputs counts samples, and outputs whose size depends on the data."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from edgekd.onnx.compare import Reference, comparable
from edgekd.onnx.file import describe_onnx
from edgekd.onnx.inference import BatchedModel, ragged, run_samples
from edgekd.onnx.samples import ArraySamples, open_samples
from edgekd.quantization.mixed_precision import convert_mixed_precision
from edgekd.quantization.static import StaticQuantizer
from tests.onnx_builders import Graph, run, save_onnx
from tests.quantization.quantizing import quantized

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((20, 6, 8)).astype(np.float32)
SAMPLES = ArraySamples({"x": X})


def time_first(path, batch="N", declared=(6, "N", 5)):
    """(N, T, 8) to (T, N, 5), as the outputs of networks for CTC."""
    g = Graph(1)
    g.add("Transpose", ["x"], "t", "turn", perm=[1, 0, 2])
    g.add("MatMul", ["t", g.weight("w", 8, 5)], "y", "head")
    return g.save(path, {"x": [batch, 6, 8]}, {"y": declared})


@pytest.mark.parametrize("size", [1, 6, 64])
@pytest.mark.parametrize("declared", [(6, "N", 5), ("T", "M", 5), None])
def test_time_first_answers_come_with_the_samples_first(tmp_path, declared, size):
    """Also where the file does not say which axis it is, and a batch is as long as the time."""
    path = time_first(tmp_path / "m.onnx", declared=declared)
    answers = run_samples(path, SAMPLES, batch=size)["y"]
    expected = np.moveaxis(run(path, {"x": X})["y"], 1, 0)
    np.testing.assert_allclose(answers, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_time_first_answers_of_a_fixed_batch(tmp_path, batch):
    path = time_first(tmp_path / "m.onnx", batch, (6, batch, 5) if batch != 6 else (6, 6, 5))
    answers = run_samples(path, SAMPLES)["y"]
    assert len(answers) == 20
    if batch != 6:  # six samples and six steps are ambiguous
        wanted = np.moveaxis(X, 1, 0) @ onnx.numpy_helper.to_array(
            onnx.load(str(path)).graph.initializer[0]
        )
        found = answers[:, :, 0] if batch == 1 else answers
        np.testing.assert_allclose(found, np.moveaxis(wanted, 1, 0), rtol=1e-4, atol=1e-5)


def test_a_time_first_model_is_quantized_and_compared(tmp_path):
    path = time_first(tmp_path / "m.onnx")
    _, out = quantized(path, {"x": X}, tmp_path)
    found = Reference(path, SAMPLES).compare(out)
    assert found.errors[0].samples == 20
    assert found.errors[0].sqnr_db > 30


def detector(path, batch="N"):
    """Boxes and scores of a convolution, and the indices that a suppression leaves of them."""
    text = f"""(float[{batch},3,8,8] x) => (float[{batch},64,4] boxes_, int64[K,3] sel) {{
        [conv] c = Conv <pads = [1, 1, 1, 1]> (x, w)
        [boxes] b0 = Conv (c, wb)
        [scores] s0 = Conv (c, ws)
        [rb] b1 = Reshape (b0, sb)
        [tb] boxes_ = Transpose <perm = [0, 2, 1]> (b1)
        [rs] scores_ = Reshape (s0, ss)
        [nms] sel = NonMaxSuppression (boxes_, scores_, most, iou, least)
    }}"""
    g = Graph(2)
    g.weight("w", 8, 3, 3, 3), g.weight("wb", 4, 8, 1, 1), g.weight("ws", 2, 8, 1, 1)
    constants = {"sb": np.array([0, 4, 64]), "ss": np.array([0, 2, 64]), "most": np.array([10]),
                 "iou": np.float32([0.5]), "least": np.float32([0.1])}  # fmt: skip
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in g.weights}
    return save_onnx(path, text, weights | constants)


IMAGES = {"x": RANDOM.standard_normal((12, 3, 8, 8)).astype(np.float32)}


@pytest.mark.parametrize("batch", ["N", 1])
def test_what_a_suppression_leaves_is_each_samples_own(tmp_path, batch):
    path = detector(tmp_path / "m.onnx", batch)
    answers = run_samples(path, ArraySamples(IMAGES))
    assert answers["boxes_"].shape == (12, 64, 4)
    for index, found in enumerate(answers["sel"]):
        alone = run(path, {"x": IMAGES["x"][index : index + 1]})["sel"]
        np.testing.assert_array_equal(found, alone)
    notes = BatchedModel(path, ArraySamples(IMAGES)).outputs.notes()
    assert set(notes) == {"sel"}
    assert "one at a time" in notes["sel"]
    assert "set" in notes["sel"]


def test_detections_are_quantized_and_compared_as_sets(tmp_path):
    path = detector(tmp_path / "m.onnx")
    samples = ArraySamples(IMAGES)
    _, out = quantized(path, IMAGES, tmp_path)
    same, other = (
        {row.name: row for row in Reference(path, samples).compare(p).errors} for p in (path, out)
    )
    assert same["sel"].max_absolute == 0
    assert other["sel"].max_absolute == 1  # a box in one of the sets only
    assert other["sel"].cosine > 0.8


def test_sets_of_indices_and_matched_boxes_by_hand():
    ours = ragged([np.array([[0, 1, 5], [0, 1, 9]]), np.zeros((0, 3), np.int64)])
    theirs = ragged([np.array([[0, 1, 9]]), np.array([[0, 0, 2]])])
    (first,), (second,) = (d.values() for d in comparable({"sel": ours}, {"sel": theirs}))
    assert sorted(zip(first[0], second[0], strict=True)) == [(1, 0), (1, 1)]
    assert (first[1, 0], second[1, 0]) == (0, 1)

    boxes = ragged([np.array([[1.0, 1.0], [5.0, 5.0], [9.0, 9.0]])])
    moved = ragged([np.array([[9.0, 9.5], [1.0, 1.0]])])
    (first,), (second,) = (d.values() for d in comparable({"b": boxes}, {"b": moved}))
    pairs = {
        tuple(p): tuple(o) for p, o in zip(first.reshape(-1, 2), second.reshape(-1, 2), strict=True)
    }
    assert pairs == {(1, 1): (1, 1), (9, 9): (9, 9.5), (5, 5): (0, 0)}


def test_lists_of_numbers_are_compared_place_by_place():
    ours, theirs = ragged([np.array([7, 8, 7])]), ragged([np.array([7, 7])])
    (first,), (second,) = (d.values() for d in comparable({"t": ours}, {"t": theirs}))
    assert int((first * second).sum()) == 1  # the first 7; the second is elsewhere


def recurrent(path, batch="N"):
    """A GRU with its state as input and output, and a scalar that scales the data."""
    g = Graph(3)
    g.add("Mul", ["x", "gain"], "scaled", "amplify")
    g.add("Transpose", ["scaled"], "t", "turn", perm=[1, 0, 2])
    weights = [g.weight("gw", 1, 15, 8), g.weight("gr", 1, 15, 5)]
    g.add("GRU", ["t", *weights, "", "", "h"], ["ys", "hn"], "gru", hidden_size=5)
    g.add("Squeeze", ["hn", g.constant("zero", np.array([0]))], "last", "last")
    g.add("MatMul", ["last", g.weight("w", 5, 4)], "y", "head")
    return g.save(
        path,
        {"x": [batch, 6, 8], "h": [1, batch, 5], "gain": []},
        {"y": [batch, 4], "hn": [1, batch, 5]},
    )


@pytest.mark.parametrize("batch", ["N", 1, 4])
@pytest.mark.parametrize("state", ["one for all", "as the model expects it", "samples first"])
@pytest.mark.parametrize("gain", ["one", "each"])
def test_states_and_scalars_are_calibrated_with_and_compared(tmp_path, batch, state, gain):
    path = recurrent(tmp_path / "m.onnx", batch)
    h = RANDOM.standard_normal((20, 5)).astype(np.float32)
    if state == "one for all":
        h[:] = h[0]
    gains = np.full(20, 2, np.float32) if gain == "one" else np.linspace(1, 3, 20, dtype="f4")
    stored = {
        "one for all": np.repeat(h[None, :1], batch if batch != "N" else 1, axis=1),
        "as the model expects it": h[None],
        "samples first": h[:, None],
    }
    np.savez(
        tmp_path / "s.npz",
        x=X,
        h=stored[state],
        gain=np.float32(2) if gain == "one" else gains,
    )
    samples = open_samples(tmp_path / "s.npz", describe_onnx(path).spec)
    assert samples.count == 20
    answers = run_samples(path, samples)
    open_batch = recurrent(tmp_path / "open.onnx")
    for i in range(20):
        feed = {"x": X[i : i + 1], "h": h[None, i : i + 1], "gain": np.asarray(gains[i])}
        wanted = run(open_batch, feed)
        np.testing.assert_allclose(answers["y"][i], wanted["y"][0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            answers["hn"][i].ravel(), wanted["hn"].ravel(), rtol=1e-4, atol=1e-5
        )
    quantizer = StaticQuantizer(path, samples, tmp_path / "s", runtime="cpu")
    quantizer.write(tmp_path / "q.onnx")
    low, high = quantizer.ranges["y"]
    assert low == pytest.approx(answers["y"].min(), rel=1e-4)
    assert high == pytest.approx(answers["y"].max(), rel=1e-4)
    found = Reference(path, samples).compare(tmp_path / "q.onnx")
    assert found.errors[0].sqnr_db > 20
    info = convert_mixed_precision(path, tmp_path / "h.onnx", "fp16", samples=samples)
    assert info.max_difference < 0.05
