"""Parity is a hard gate: models broken on purpose must not pass, and the worst sample is named."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgekd.config.pipeline import ExportConfig
from edgekd.errors import InputError, StageError
from edgekd.onnx.export import export_onnx
from edgekd.onnx.parity import check_parity, parity

CONFIG = ExportConfig()


@pytest.fixture
def exported(classifier, exported_bytes, tmp_path):
    path = tmp_path / "student.onnx"
    path.write_bytes(exported_bytes)
    return classifier(), path


def perturbed(path, name_part, change):
    """Change one weight in the file."""
    model = onnx.load(str(path))
    tensor = next(t for t in model.graph.initializer if name_part in t.name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, str(path))


def test_a_faithful_export_passes_at_every_batch_size(exported, samples):
    report = parity(*exported, samples, "logits", CONFIG)
    check_parity(report)
    assert report.passed
    assert [row.batch_size for row in report.rows] == [1, 2, 7]
    assert [row.samples for row in report.rows] == [23, 22, 21]
    # Two float32 evaluations of 128 products differ by rounding only.
    assert all(row.max_absolute is not None and row.max_absolute < 1e-5 for row in report.rows)
    assert all(row.argmax_agreement == 1.0 for row in report.rows)
    assert "holds" in report.summary()
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"] is True


def test_two_inputs_and_outputs_are_all_compared(policy, samples, tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(policy, path)
    report = parity(policy, path, samples, "action", CONFIG, classification=False)
    check_parity(report)
    assert {row.output for row in report.rows} == {"action", "value"}
    assert all(row.argmax_agreement is None for row in report.rows)


def test_a_changed_weight_fails_and_the_worst_sample_is_named(exported, samples):
    """One weight of the last layer is changed; sample 4 alone is lit where it counts."""
    model, path = exported
    model.eval()
    bright = {"image": samples["image"].copy()}
    bright["image"][4] *= 50
    with torch.inference_mode():
        images = torch.from_numpy(bright["image"])
        hidden = model.parts[:4](images).numpy()
        reference = model({"image": images})["logits"].numpy()
    lit = int(hidden[4].argmax())

    def change(values):
        weights = values if values.shape == (5, 128) else values.T
        weights[0, lit] += 0.5

    perturbed(path, "4.weight", change)
    report = parity(model, path, bright, "logits", CONFIG)
    row = report.rows[0]
    error = 0.5 * hidden[:, lit]
    expected = int((error - 1e-3 * np.abs(reference[:, 0])).argmax())
    assert expected == 4
    assert not report.passed
    assert row.worst.index == expected
    assert row.worst.element == (0,)
    assert row.max_absolute == pytest.approx(error.max(), rel=1e-4)
    with pytest.raises(StageError) as caught:
        check_parity(report)
    text = str(caught.value)
    assert f"worst sample {expected}" in text
    assert "'logits'" in text
    assert f"{row.worst.pytorch:.6g}" in text
    assert f"{row.worst.onnxruntime:.6g}" in text
    assert caught.value.exit_code == 3


def test_a_difference_within_the_tolerance_passes(exported, samples):
    model, path = exported

    def change(values):
        values += 1e-5

    perturbed(path, "4.bias", change)
    assert parity(model, path, samples, "logits", CONFIG).passed
    strict = ExportConfig(absolute_tolerance=1e-6, relative_tolerance=1e-9)
    assert not parity(model, path, samples, "logits", strict).passed


def test_another_class_fails_even_within_the_tolerance(exported, samples):
    """Tolerances as wide as the logits let any value pass; the class may still not change."""
    model, path = exported

    def change(values):
        values[1] += 3

    perturbed(path, "4.bias", change)
    wide = ExportConfig(absolute_tolerance=10, relative_tolerance=1)
    report = parity(model, path, samples, "logits", wide)
    assert all(row.beyond == 0 for row in report.rows)
    assert not report.passed
    with pytest.raises(StageError, match="same class"):
        check_parity(report)
    with torch.inference_mode():
        logits = model({"image": torch.from_numpy(samples["image"])})["logits"].numpy()
    moved = logits + 3 * np.eye(5)[1]
    assert logits[report.rows[0].worst.index].argmax() != moved[report.rows[0].worst.index].argmax()
    assert parity(model, path, samples, "logits", wide, classification=False).passed


def test_answers_that_depend_on_the_batch_fail_where_they_differ(classifier, samples, tmp_path):
    """The graph was traced with a batch size as a number: right at 2, wrong at 1 and 7."""
    path = tmp_path / "m.onnx"
    export_onnx(classifier(lambda net, batch: {"logits": net(batch["image"]) * 2.0}), path)
    truth = classifier(
        lambda net, batch: {"logits": net(batch["image"]) * float(batch["image"].shape[0])}
    )
    report = parity(truth, path, samples, "logits", CONFIG)
    assert [row.passed for row in report.rows] == [False, True, False]
    with pytest.raises(StageError, match="batch size 7"):
        check_parity(report)


def test_a_graph_of_a_fixed_batch_does_not_run_at_another(exported, samples):
    model, path = exported
    proto = onnx.load(str(path))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(proto, str(path))
    with pytest.raises(StageError, match="cannot run the exported graph at batch size 1"):
        parity(model, path, samples, "logits", CONFIG)


def test_nan_on_one_side_fails(exported, samples):
    model, path = exported

    def change(values):
        values[2] = np.nan

    perturbed(path, "4.bias", change)
    report = parity(model, path, samples, "logits", CONFIG)
    assert not report.passed
    assert report.rows[0].max_absolute is None
    assert report.rows[0].worst.element == (2,)
    with pytest.raises(StageError, match="nan in ONNX Runtime"):
        check_parity(report)


def test_nan_in_pytorch_is_not_blamed_on_the_exporter(exported, samples):
    model, path = exported
    with torch.no_grad():
        model.parts[4].bias[0] = float("nan")
    with pytest.raises(StageError, match="PyTorch's own output 'logits' is NaN"):
        parity(model, path, samples, "logits", CONFIG)


def test_too_few_samples_and_missing_inputs(exported, samples):
    few = {"image": samples["image"][:6]}
    with pytest.raises(InputError, match="at least 7"):
        parity(*exported, few, "logits", CONFIG)
    with pytest.raises(InputError, match="lack the model's input 'image'"):
        parity(*exported, {"state": samples["state"]}, "logits", CONFIG)


def test_a_model_in_training_is_compared_in_evaluation_and_left_as_it_was(exported, samples):
    model, path = exported
    model.train()
    before = model.parts[1].running_mean.clone()
    assert parity(model, path, samples, "logits", CONFIG).passed
    assert model.training
    assert torch.equal(model.parts[1].running_mean, before)
