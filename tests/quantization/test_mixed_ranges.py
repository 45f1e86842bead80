"""Static INT8 does not bring values of different ranges under one scale."""

import json

import numpy as np
import pytest

from tests.cli.quantizing import classifier, quantize, samples
from tests.onnx_builders import Graph, pairs_of, run
from tests.quantization.quantizing import quantized, quantizer

X = np.random.default_rng(0).standard_normal((32, 3, 8, 8)).astype(np.float32)
MOVES = {
    "as it is": [],
    "transposed": [("Transpose", [], {"perm": [0, 2, 3, 1]})],
    "reshaped": [("Reshape", [np.array([0, 7, 64])], {}), ("Transpose", [], {"perm": [0, 2, 1]})],
    "flat": [("Flatten", [], {"axis": 1})],
    "scaled": [("Mul", [np.float32(2)], {}), ("Reshape", [np.array([0, 7, 64])], {})],
}


def detector(path, moves=(), *, then=None, pixels=640.0):
    """image → boxes (4 channels) in pixels and 3 scores in [0, 1], joined."""
    g = Graph(4)
    g.add("Conv", ["x", g.weight("w", 8, 3, 3, 3)], "c", "first", pads=[1] * 4)
    g.add("Relu", ["c"], "r")
    g.add("Conv", ["r", g.weight("wb", 4, 8, 1, 1)], "b", "box_head")
    g.add("Sigmoid", ["b"], "bs", "box_sigmoid")
    g.add("Mul", ["bs", g.constant("pixels", np.float32(pixels))], "boxes", "box_pixels")
    g.add("Conv", ["r", g.weight("wc", 3, 8, 1, 1)], "s", "class_head")
    g.add("Sigmoid", ["s"], "scores", "class_sigmoid")
    last = g.add("Concat", ["boxes", "scores"], "joined", "join", axis=1)
    for number, (op, given, attributes) in enumerate(moves):
        given = [g.constant(f"k{number}.{i}", value) for i, value in enumerate(given)]
        last = g.add(op, [last, *given], f"moved{number}", f"move{number}", **attributes)
    if then:
        last = g.add("Conv", [last, g.weight("wt", 5, 7, 1, 1)], "t", then)
    g.add("Identity", [last], "y", "last")
    return g.save(path, {"x": ["n", 3, 8, 8]}, {"y": None})


def written(path, tmp_path, **settings):
    return quantized(path, {"x": X}, tmp_path, **({"reduce_range": False} | settings))


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES.keys())
def test_scores_beside_boxes_survive_wherever_they_are_moved(tmp_path, moves):
    path = detector(tmp_path / "m.onnx", moves)
    quantizer, out = written(path, tmp_path)
    assert quantizer.mixed[0].node == "join"
    assert "join" in quantizer.mixed_nodes
    reference, answers = (np.sort(run(p, {"x": X})["y"].ravel()) for p in (path, out))
    limit = 2 if moves and moves[0][0] == "Mul" else 1
    scores = reference <= limit
    assert scores.sum() == 32 * 3 * 64
    # 8 bits of [0, 1]: a handful of values would be left of one scale with the pixels.
    assert len(np.unique(answers[scores])) > 50
    assert np.abs(answers[scores] - reference[scores]).max() < 0.1 * limit
    assert pairs_of(out)["class_head"][0]


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
def test_inside_a_network_the_layer_that_reads_them_stays_in_float_too(tmp_path, runtime):
    path = detector(tmp_path / "m.onnx", then="reader")
    quantizer, out = written(path, tmp_path, runtime=runtime)
    assert {"join", "reader"} <= set(quantizer.mixed_nodes)
    assert not any(pairs_of(out)["reader"])
    assert pairs_of(out)["class_head"][0]


def test_ranges_that_are_alike_are_joined_in_8_bits(tmp_path):
    quantizer, out = written(detector(tmp_path / "m.onnx", pixels=2.0), tmp_path)
    assert quantizer.mixed == ()
    assert all(pairs_of(out)["join"])
    quantizer, out = written(detector(tmp_path / "n.onnx", then="reader", pixels=8.0), tmp_path)
    assert quantizer.mixed == ()
    assert pairs_of(out)["reader"][0]


def test_a_factor_for_each_channel_at_the_end_stays_in_float(tmp_path):
    """No Concat: pixels and scores by one product."""
    g = Graph(4)
    g.add("Conv", ["x", g.weight("w", 8, 3, 3, 3)], "c", "first", pads=[1] * 4)
    g.add("Conv", ["c", g.weight("w2", 4, 8, 1, 1)], "h", "head")
    g.add("Sigmoid", ["h"], "s", "sigmoid")
    factors = np.array([640, 640, 1, 1], np.float32).reshape(4, 1, 1)
    g.add("Mul", ["s", g.constant("factors", factors)], "p", "scale")
    g.add("Reshape", ["p", g.constant("shape", np.array([0, 4, 64]))], "y", "fold")
    path = g.save(tmp_path / "m.onnx", {"x": ["n", 3, 8, 8]}, {"y": ["n", 4, 64]})
    quantizer, out = written(path, tmp_path)
    assert [mixed.node for mixed in quantizer.mixed] == ["scale"]
    reference, answers = (run(p, {"x": X})["y"][:, 2:] for p in (path, out))
    assert len(np.unique(answers)) > 50
    assert np.abs(answers - reference).max() < 0.1


def test_a_model_of_which_nothing_would_be_left_is_quantized_all_the_same(tmp_path):
    g = Graph(4)
    scale = np.array([600, 600, 1, 1], np.float32).reshape(4, 1, 1, 1)
    weights = g.random.standard_normal((4, 3, 3, 3)).astype(np.float32) * scale
    g.add("Conv", ["x", g.constant("w", weights)], "y", "only", pads=[1] * 4)
    path = g.save(tmp_path / "m.onnx", {"x": ["n", 3, 8, 8]}, {"y": ["n", 4, 8, 8]})
    quantizer, out = written(path, tmp_path)
    assert quantizer.mixed == ()
    assert pairs_of(out)["only"][0]


def test_a_classifier_has_nothing_that_is_mixed(tmp_path):
    path = classifier(tmp_path / "m.onnx")
    data = samples(tmp_path / "x.npz")
    with np.load(data) as archive:
        image = archive["image"]
    assert quantizer(path, {"image": image}, tmp_path, reduce_range=False).mixed == ()


def test_float_nodes_are_reported_and_the_worst_part_meets_the_budget(tmp_path):
    path, to = detector(tmp_path / "m.onnx", MOVES["reshaped"]), tmp_path / "r.json"
    np.save(tmp_path / "x.npy", X)
    words = ["--calibration", tmp_path / "x.npy", "--no-timing", "--json", to]
    done = quantize(path, "-o", tmp_path / "o.onnx", *words)
    record = json.loads(to.read_text())
    assert record["mixed"][0].startswith("join (±")
    assert "would lose the smaller part: join" in " ".join(done.output.split())
    assert [part["part"] for part in record["errors"][0]["parts"]] == ["boxes", "scores"]
    worst = max(part["drop"] for part in record["errors"][0]["parts"])
    assert record["worst"]["drop"] == worst
    assert record["warnings"] == []
    done = quantize(path, "-o", tmp_path / "p.onnx", *words, "--max-drop", worst * 0.9)
    record = json.loads(to.read_text())
    assert max(part["drop"] for part in record["errors"][0]["parts"]) <= worst * 0.9
    assert record["decision"]["kept"]
