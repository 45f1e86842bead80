"""Outputs of two models: errors computed by hand, and batches that must not change them."""

import json
import tracemalloc

import numpy as np
import pytest

from edgekd.errors import InputError
from edgekd.onnx.compare import ComparisonSums, Reference
from edgekd.onnx.inference import run_samples
from edgekd.onnx.samples import ArraySamples
from edgekd.release.statistics import wilson
from tests.onnx_builders import save_onnx
from tests.samples import CountedSamples, GeneratedSamples

RANDOM = np.random.default_rng(0)
INPUT = RANDOM.standard_normal((11, 6)).astype(np.float32)
WEIGHTS = RANDOM.standard_normal((6, 3)).astype(np.float32)


def compare_outputs(reference, candidate, classes):
    """The errors of outputs (N, …) by name."""
    sums = ComparisonSums(classes)
    sums.add(reference, candidate)
    return sums.rows()


def linear(path, batch="batch", dtype="float", output="", node="", weights=WEIGHTS):
    """x (batch, 6) → logits = x·W and label = argmax; ``output`` and ``node`` are further ones."""
    text = f"""({dtype}[{batch},6] x)
        => ({dtype}[{batch},{weights.shape[1]}] logits, int64[{batch}] label {output})
    {{ logits = MatMul (x, w)  label = ArgMax <axis = 1, keepdims = 0> (logits) {node} }}"""
    weights = weights.astype({"float": "f4", "float16": "f2"}[dtype])
    return save_onnx(path, text, {"w": weights}, opset=18)


@pytest.mark.parametrize("batch", ["batch", 1, 4, 11, 16])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_outputs_do_not_depend_on_the_batch_of_model_or_run(tmp_path, batch, size):
    path = linear(tmp_path / "m.onnx", batch)
    answers = run_samples(path, ArraySamples({"x": INPUT, "unused": INPUT}), batch=size)
    expected = INPUT.astype(np.float64) @ WEIGHTS
    assert set(answers) == {"logits", "label"}
    # Six products in float32.
    assert np.allclose(answers["logits"], expected, rtol=0, atol=1e-5)
    assert (answers["label"] == expected.argmax(1)).all()


def test_large_samples_are_run_few_at_a_time(tmp_path):
    wide = {"x": INPUT, "image": np.broadcast_to(np.float32(0), (11, 1 << 20))}
    samples = CountedSamples(wide)
    run_samples(linear(tmp_path / "m.onnx"), samples, batch=64)
    # 4 MB each and 8 MB at a time.
    assert max(samples.sizes) <= 2


def test_a_model_that_takes_16_bits_is_given_them(tmp_path):
    path = linear(tmp_path / "m.onnx", dtype="float16")
    answers = run_samples(path, ArraySamples({"x": INPUT}))
    expected = INPUT.astype(np.float16).astype(float) @ WEIGHTS.astype(np.float16).astype(float)
    # The result is rounded to float16: 2⁻¹¹ of values below 8.
    assert np.allclose(answers["logits"], expected, rtol=0, atol=8 * 2**-11)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": INPUT}, "lack the model's input 'x'"),
        ({"x": INPUT[:, :5]}, "does not run on x float32"),
        ({"x": INPUT.astype(np.int64)}, "does not run on x int64"),
        ({"x": INPUT[:0]}, "no samples"),
    ],
)
def test_samples_that_do_not_fit_are_the_users_error(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        run_samples(linear(tmp_path / "m.onnx"), ArraySamples(arrays))


def test_an_output_without_an_axis_for_the_samples_is_run_one_by_one(tmp_path):
    mean = "mean = ReduceMean <keepdims = 0> (logits)"
    path = linear(tmp_path / "m.onnx", output=", mean", node=mean)
    answers = run_samples(path, ArraySamples({"x": INPUT}))
    for found, row in zip(answers["mean"], answers["logits"], strict=True):
        assert found == pytest.approx(row.mean(), abs=1e-6)


def test_the_figures_are_those_worked_out_by_hand():
    reference = {"logits": np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)}
    candidate = {"logits": np.array([[4.0, 3.0], [0.0, 1.0]], np.float32)}
    (row,) = compare_outputs(reference, candidate, "logits")
    assert row.max_absolute == 1.0
    assert row.rmse == pytest.approx((3 / 4) ** 0.5)
    assert row.sqnr_db == pytest.approx(10 * np.log10(29 / 3))
    assert row.cosine == pytest.approx((24 / 25 + 1) / 2)
    assert row.cosine_worst == pytest.approx(24 / 25)
    assert row.argmax_agreement == 0.5
    assert row.argmax_interval == pytest.approx(wilson(1, 2).interval)


def test_the_same_answers_have_no_error_and_no_ratio():
    answers = {"logits": INPUT, "zero": np.zeros((11, 2)), "label": INPUT.argmax(1)}
    rows = {row.name: row for row in compare_outputs(answers, answers, "logits")}
    assert all(row.max_absolute == row.rmse == 0.0 for row in rows.values())
    assert all(row.sqnr_db is None and row.not_finite == 0 for row in rows.values())
    assert rows["logits"].cosine_worst == pytest.approx(1.0)
    assert rows["logits"].argmax_agreement == 1.0
    assert rows["label"].argmax_agreement is None


def test_mean_errors_do_not_depend_on_order_or_number_of_samples():
    """More samples than are compared at a time."""
    noise = 0.1 * RANDOM.standard_normal((1100, 4))
    reference = RANDOM.standard_normal((1100, 4))
    once = compare_outputs({"y": reference}, {"y": reference + noise}, "y")[0]
    order = RANDOM.permutation(1100)
    again = compare_outputs({"y": reference[order]}, {"y": (reference + noise)[order]}, "y")[0]
    assert once.rmse == pytest.approx(np.sqrt((noise**2).mean()))
    assert once.samples == 1100
    for key, value in once.to_json().items():
        assert again.to_json()[key] == (pytest.approx(value) if key != "name" else value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_a_value_that_is_not_finite_on_one_side_is_shown(bad, side):
    """It stands where the largest class is, so that argmax alone would not notice it."""
    sides = {"reference": np.tile([1.0, 2.0], (5, 1)), "candidate": np.tile([1.0, 2.0], (5, 1))}
    sides[side][3, 1] = bad
    (row,) = compare_outputs({"y": sides["reference"]}, {"y": sides["candidate"]}, "y")
    assert row.not_finite == 1
    assert {row.max_absolute, row.rmse, row.sqnr_db, row.cosine, row.cosine_worst} == {None}
    assert row.argmax_agreement == 0.8
    json.dumps(row.to_json(), allow_nan=False)


def test_values_that_are_not_finite_on_both_sides_alike_are_no_error():
    reference = np.array([[1.0, -np.inf, np.nan], [1.0, 2.0, 3.0]])
    candidate = reference.copy()
    candidate[0, 0] += 0.5
    (row,) = compare_outputs({"y": reference}, {"y": candidate}, None)
    assert row.not_finite == 0
    assert row.max_absolute == 0.5
    assert row.sqnr_db == pytest.approx(10 * np.log10((1 + 1 + 4 + 9) / 0.25))
    opposite = compare_outputs({"y": reference}, {"y": -reference}, None)[0]
    assert opposite.not_finite == 1


def test_answers_that_cannot_be_compared_say_why():
    with pytest.raises(InputError, match="no output of the candidate named 'y'"):
        compare_outputs({"y": INPUT}, {"z": INPUT}, None)
    with pytest.raises(InputError, match="no output named 'z'"):
        compare_outputs({"y": INPUT}, {"y": INPUT}, "z")
    with pytest.raises(InputError, match=r"\(11, 6\) in one model and \(10, 6\)"):
        compare_outputs({"y": INPUT}, {"y": INPUT[:10]}, None)


@pytest.mark.parametrize("batches", [("batch", "batch"), (4, "batch"), ("batch", 4), (16, 3)])
@pytest.mark.parametrize("sizes", [(64, None), (3, 1)])
def test_models_side_by_side_give_the_figures_of_all_answers_at_once(tmp_path, batches, sizes):
    noise = 0.3 * np.random.default_rng(1).standard_normal(WEIGHTS.shape).astype(np.float32)
    one = linear(tmp_path / "a.onnx", batches[0])
    other = linear(tmp_path / "b.onnx", batches[1], weights=WEIGHTS + noise)
    samples = ArraySamples({"x": INPUT})
    labels = np.arange(11) % 3

    def right(_, answers, rows):
        return answers["label"] == labels[rows]

    reference = Reference(one, samples, batch=sizes[0])
    found = reference.compare(other, "logits", right, batch=sizes[1])
    answers = run_samples(one, samples), run_samples(other, samples)
    for row, whole in zip(found.errors, compare_outputs(*answers, "logits"), strict=True):
        for key, value in whole.to_json().items():
            if key == "parts":  # of a model's graph, which outputs alone do not have
                continue
            # Matrix products of other sizes are summed in another order.
            inexact = isinstance(value, (float, tuple))
            assert row.to_json()[key] == (pytest.approx(value, rel=1e-4) if inexact else value)
    assert (found.reference_scores == (answers[0]["label"] == labels)).all()
    assert (found.scores == (answers[1]["label"] == labels)).all()


def test_answers_may_come_in_any_parts():
    """More than are compared at a time in float64."""
    random = np.random.default_rng(0)
    reference = random.standard_normal((300, 5000))
    candidate = reference + 0.1 * random.standard_normal(reference.shape)
    errors = ComparisonSums("y")
    for rows in (slice(0, 7), slice(7, 8), slice(8, 300)):
        errors.add({"y": reference[rows]}, {"y": candidate[rows]})
    (parts,) = errors.rows()
    (whole,) = compare_outputs({"y": reference}, {"y": candidate}, "y")
    assert parts.samples == 300
    assert parts.rmse == pytest.approx(np.sqrt(((candidate - reference) ** 2).mean()))
    for key, value in whole.to_json().items():
        assert parts.to_json()[key] == (value if key == "name" else pytest.approx(value))


def test_a_comparison_of_models_holds_one_batch_in_memory(tmp_path):
    wide = np.ones((6, 4096), np.float32)
    path = linear(tmp_path / "m.onnx", weights=wide)

    def compare(count):
        tracemalloc.start()
        reference = Reference(path, GeneratedSamples("x", count, lambda row: np.full(6, row)))
        reference.compare(path, None, lambda *args: np.zeros(len(args[1]["label"])))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    compare(64)  # what is loaded once
    # 960 samples more are 31 MB of outputs of both models, and 15 kB of scores.
    assert compare(1024) - compare(64) < 1_000_000


def test_words_count_as_the_same_or_not():
    reference = {"word": np.array(["cat", "dog", "cat", "owl"], dtype=object)}
    candidate = {"word": np.array(["cat", "dog", "owl", "owl"], dtype=object)}
    (row,) = compare_outputs(reference, candidate, None)
    assert row.max_absolute == 1.0
    assert row.rmse == 0.5
