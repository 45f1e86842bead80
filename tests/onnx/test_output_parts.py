"""What of an output is compared together, and how far each part is off in its own scale."""

import json

import numpy as np
import pytest
from onnx import TensorProto

from edgekd.onnx.compare import Reference
from edgekd.onnx.error_metrics import SCORE_THRESHOLD
from edgekd.onnx.output_parts import find_parts
from edgekd.onnx.samples import ArraySamples
from edgekd.quantization.evaluator import SampleEvaluator, remarks_on_errors
from tests.onnx_builders import Graph, save_onnx

X = np.random.default_rng(0).standard_normal((12, 4, 6)).astype(np.float32)
SAMPLES = ArraySamples({"x": X})


def head(path, after=(), *, lost=0.0, axis=1, boxes=640.0):
    """x (n, 4, 6) → boxes in pixels and scores in [0, 1], joined; ``lost`` is taken off them."""
    g = Graph()
    g.add("Sigmoid", ["x"], "unit", "box_unit")
    g.add("Mul", ["unit", g.constant("pixels", np.float32(boxes))], "boxes", "box_pixels")
    g.add("Slice", ["x", *(g.constant(n, np.array([v])) for n, v in SLICE)], "some", "some")
    g.add("Sigmoid", ["some"], "scores", "class_scores")
    g.add("Mul", ["scores", g.constant("kept", np.float32(1 - lost))], "given", "keep")
    last = g.add("Concat", ["boxes", "given" if lost else "scores"], "joined", "join", axis=axis)
    for number, (op, inputs, attributes) in enumerate(after):
        extra = [g.constant(f"c{number}.{i}", value) for i, value in enumerate(inputs)]
        last = g.add(op, [last, *extra], f"moved{number}", f"move{number}", **attributes)
    g.add("Identity", [last], "y", "last")
    return g.save(path, {"x": ["n", 4, 6]}, {"y": None})


SLICE = (("from", 0), ("to", 3), ("axis", 1))


@pytest.mark.parametrize(
    "after",
    [
        (),
        (("Transpose", (), {"perm": [0, 2, 1]}),),
        (("Reshape", (np.array([0, 42]),), {}),),
        (("Unsqueeze", (np.array([1]),), {}), ("Transpose", (), {"perm": [0, 3, 1, 2]})),
        (
            ("Flatten", (), {"axis": 1}),
            ("Slice", (np.array([3]), np.array([40]), np.array([1])), {}),
        ),
    ],
)
def test_the_inputs_of_a_concat_are_parts_wherever_their_values_are_moved(tmp_path, after):
    """The values of the boxes are those above 1, wherever they went."""
    path = head(tmp_path / "m.onnx", after)
    reference = Reference(path, SAMPLES)
    values = reference.first["y"].reshape(12, -1)
    boxes, scores = reference.parts["y"]
    assert (boxes.name, boxes.kind, scores.name, scores.kind) == (
        *("boxes", "values"), *("scores", "scores"),
    )  # fmt: skip
    assert values[:, boxes.positions].min() > 1 > values[:, scores.positions].max()
    assert sorted([*boxes.positions, *scores.positions]) == list(range(values.shape[1]))


def test_lost_scores_are_the_worst_part_however_good_the_whole_is(tmp_path):
    sound, spoilt = head(tmp_path / "a.onnx"), head(tmp_path / "b.onnx", lost=1.0)
    found = SampleEvaluator(sound, SAMPLES, None).compare(spoilt)
    whole = found["errors"][0]
    assert whole["sqnr_db"] > 50
    assert whole["cosine"] > 0.999
    boxes, scores = whole["parts"]
    assert boxes["drop"] == 0
    assert (scores["agreement"], scores["drop"], scores["one_value"]) == (0, 1, True)
    expected = 1 / (1 + np.exp(-X[:, :3].astype(float)))
    assert scores["decided"] == (expected > SCORE_THRESHOLD).sum()
    assert found["drop"]["value"] == found["worst"]["drop"] == 1
    assert found["worst"]["part"] == "y: scores"
    assert "y (scores)" in found["warnings"][0]
    assert "boxes" not in found["warnings"][0]
    json.dumps(found, allow_nan=False)


def test_the_error_of_a_part_is_relative_to_the_part(tmp_path):
    """Half a per cent of each score is lost, and none of 0.25 falls under the threshold by that."""
    sound, spoilt = head(tmp_path / "a.onnx"), head(tmp_path / "b.onnx", lost=0.005)
    found = Reference(sound, SAMPLES).compare(spoilt)
    boxes, scores = found.errors[0].parts
    assert boxes.relative == 0
    assert scores.relative == pytest.approx(0.005, rel=1e-3)
    assert found.worst is scores


def test_channels_of_other_scales_are_parts_without_a_concat(tmp_path):
    """Pixels and scores by a factor per channel, behind one layer."""
    g = Graph()
    g.add("Sigmoid", ["x"], "unit")
    factors = np.array([640, 640, 1, 1], np.float32).reshape(4, 1)
    g.add("Mul", ["unit", g.constant("factors", factors)], "y")
    path = g.save(tmp_path / "m.onnx", {"x": ["n", 4, 6]}, {"y": ["n", 4, 6]})
    large, small = Reference(path, SAMPLES).parts["y"]
    assert (large.name, small.name) == ("[0-1] of axis 1", "[2-3] of axis 1")
    assert (large.kind, small.kind) == ("values", "scores")
    assert list(small.positions) == list(range(12, 24))


def test_classes_of_a_softmax_are_one_part_however_rare(tmp_path):
    g = Graph()
    shift = np.array([0, 0, 0, -12], np.float32).reshape(4, 1)
    g.add("Add", ["x", g.constant("shift", shift)], "logits")
    g.add("Softmax", ["logits"], "y", axis=1)
    path = g.save(tmp_path / "m.onnx", {"x": ["n", 4, 6]}, {"y": ["n", 4, 6]})
    (part,) = Reference(path, SAMPLES).parts["y"]
    assert (part.positions, part.kind) == (None, "scores")


def segmenting(path, *, to=None, shift=0.0):
    """x (n, 4, 6) → the largest channel at each place; all but the first one are shifted."""
    text = f"""(float[n,4,6] x) => ({to or "int64"}[n,6] y) {{
        s = Add (x, shifts)
        m = ArgMax <axis = 1, keepdims = 0> (s)
        y = Cast <to = {TensorProto.DataType.Value((to or "int64").upper())}> (m)
    }}"""
    shifts = np.array([0, shift, shift, shift], np.float32).reshape(4, 1)
    return save_onnx(path, text, {"shifts": shifts})


@pytest.mark.parametrize("to", [None, "int32", "uint8", "float"])
def test_a_choice_of_classes_is_the_same_or_not(tmp_path, to):
    sound = segmenting(tmp_path / "a.onnx", to=to)
    spoilt = segmenting(tmp_path / "b.onnx", to=to, shift=-0.5)
    right = (X.argmax(1) == (X + np.float32([0, -0.5, -0.5, -0.5])[:, None]).argmax(1)).mean()
    assert 0.5 < right < 0.95
    judge = SampleEvaluator(sound, SAMPLES, None)
    found = judge.compare(spoilt)
    assert found["metric"] == "agreement with float32"
    assert found["score"]["value"] == pytest.approx(right)
    assert judge.drop_of(spoilt) == pytest.approx(1 - right)
    assert judge.drop_of(sound) == 0


def test_an_image_in_integers_is_a_number_and_no_choice(tmp_path):
    """One step of 255 off in each value is a small error, not another picture."""

    def image(name, offset):
        text = """(float[n,4,6] x) => (uint8[n,4,6] y) {
            unit = Sigmoid (x)
            scaled = Mul (unit, scale)
            shifted = Add (scaled, offset)
            y = Cast <to = 2> (shifted)
        }"""
        weights = {"scale": np.float32(255), "offset": np.float32(offset)}
        return save_onnx(tmp_path / name, text, weights)

    small = ArraySamples({"x": X * 0.5})
    assert SampleEvaluator(image("a.onnx", 0), small, None).drop_of(image("b.onnx", 1)) < 0.02


def relu(path, shift, noise=0.0):
    """max(0, x + shift) + noise."""
    g = Graph()
    g.add("Add", ["x", g.constant("shift", np.float32(shift))], "shifted")
    g.add("Relu", ["shifted"], "r")
    g.add("Add", ["r", g.constant("noise", np.float32(noise))], "y", "noise")
    return g.save(path, {"x": ["n", 4, 6]}, {"y": ["n", 4, 6]})


def test_a_sample_of_zeros_is_measured_by_the_size_of_the_others(tmp_path):
    x = np.zeros((8, 4, 6), np.float32)
    x[0] = 3
    judge = SampleEvaluator(relu(tmp_path / "a.onnx", -1), ArraySamples({"x": x}), None)
    found = judge.compare(relu(tmp_path / "b.onnx", -1, 0.01))
    # 2 in one of eight samples: a root mean square of 2 / √8.
    assert found["drop"]["value"] == pytest.approx(0.01 / (2 / np.sqrt(8)), rel=1e-3)
    assert found["warnings"] == []


def test_zeros_in_every_sample_are_compared_absolutely(tmp_path):
    samples = ArraySamples({"x": np.zeros((8, 4, 6), np.float32)})
    judge = SampleEvaluator(relu(tmp_path / "a.onnx", -1), samples, None)
    found = judge.compare(relu(tmp_path / "b.onnx", -1, 4e-5))
    assert found["drop"]["value"] == pytest.approx(4e-5, rel=1e-3)
    assert found["metric"] == "1 - error (float32 gives zeros)"
    assert found["warnings"] == []
    json.dumps(found, allow_nan=False)


def test_scores_of_images_that_show_nothing_have_the_scale_of_scores(tmp_path):
    def scores(name, shift):
        g = Graph()
        g.add("Add", ["x", g.constant("shift", np.float32(shift))], "shifted")
        g.add("Sigmoid", ["shifted"], "y")
        return g.save(tmp_path / name, {"x": ["n", 4, 6]}, {"y": ["n", 4, 6]})

    found = SampleEvaluator(scores("a.onnx", -12), SAMPLES, None).compare(scores("b.onnx", -11))
    assert found["drop"]["value"] < 0.01
    assert remarks_on_errors(found["errors"]) == []


def test_a_further_output_can_be_the_worst(tmp_path):
    """The classes are the same, and the second output is lost."""

    def two(name, factor):
        g = Graph()
        g.add("Flatten", ["x"], "logits")
        g.add("Mul", ["x", g.constant("factor", np.float32(factor))], "boxes")
        shapes = {"logits": ["n", 24], "boxes": ["n", 4, 6]}
        return g.save(tmp_path / name, {"x": ["n", 4, 6]}, shapes)

    judge = SampleEvaluator(two("a.onnx", 1), SAMPLES, None)
    spoilt = two("b.onnx", 0)
    found = judge.compare(spoilt)
    assert (found["metric"], found["drop"]["value"]) == ("agreement with float32", 0)
    assert found["worst"]["part"] == "boxes"
    assert found["worst"]["drop"] == pytest.approx(judge.drop_of(spoilt))
    assert judge.drop_of(spoilt) > 0.9


def test_a_constant_that_is_joined_to_the_answers_is_no_part(tmp_path):
    g = Graph()
    g.add("Sigmoid", ["x"], "scores")
    g.add("Mul", ["x", g.constant("hundred", np.float32(100))], "boxes")
    anchors = g.constant("anchors", np.ones((12, 1, 6), np.float32))
    g.add("Concat", ["boxes", "scores", anchors], "y", axis=1)
    path = g.save(tmp_path / "m.onnx", {"x": [12, 4, 6]}, {"y": [12, 9, 6]})
    values = {"y": np.ones((12, 9, 6), np.float32)}
    parts = find_parts(path, SAMPLES, values)["y"]
    assert [part.name for part in parts] == ["boxes", "scores"]
    assert [len(part.positions) for part in parts] == [24, 24]
