"""Quantization-aware distillation from the artifacts of a run to a file."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest

from edgekd import api
from edgekd.config.pipeline import QatConfig
from edgekd.config.training import LossTerm
from edgekd.errors import InputError, StageError
from edgekd.onnx import export as engine
from edgekd.onnx.file import describe_onnx
from edgekd.pipeline.stage import Context
from edgekd.stages.quantize import train_quantized
from edgekd.stages.task_data import open_task_data
from tests import onnx_builders
from tests.integration.pipelines import DIGITS
from tests.progress import RecordedProgress

pytest.importorskip("torchao", reason="quantization-aware training needs the extra qat")

SHORT = DIGITS.replace("epochs: 6", "epochs: 4") + "export: {opset: 19}\n"
STAGES = ("data", "teacher", "student", "distill", "export")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on digits up to the export: its job, its folder and its artifacts by stage."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "p.yaml").write_text(SHORT)
    api.run(
        folder / "p.yaml",
        until="export",
        output=folder / "run",
        overrides=["distill.baseline=false"],
    )
    artifacts = {}
    for stage in STAGES:
        (artifacts[stage],) = (folder / "run" / "artifacts" / stage).iterdir()
    job = api.open_job(folder / "p.yaml", ["distill.baseline=false"])
    return job, folder / "run", artifacts


@pytest.fixture
def call(run, tmp_path):
    """Calls what the quantize stage calls."""
    job, folder, artifacts = run
    progress = RecordedProgress()

    def train(runtime="cpu", losses=None, job=job, **qat):
        context = Context(job, tmp_path, tmp_path / "scratch", folder / "cache", progress, {})
        ground = open_task_data(artifacts["data"], job.config)
        config = QatConfig(**{"epochs": 2, "batch_size": 64, **qat}, losses=losses)
        path = tmp_path / "int8.onnx"
        return train_quantized(ground, context, artifacts, runtime, config, path), path, ground

    train.progress = progress
    return train


def accuracy(path, ground):
    split = ground.dataset.splits["validation"]
    inputs = ground.dataset.model_inputs("validation", 0, len(split))
    logits = onnx_builders.run(path, inputs)["logits"]
    return float((logits.argmax(1) == split.arrays["label"]).mean())


def test_student_becomes_a_file_in_int8(run, call):
    _, _, artifacts = run
    history, path, ground = call()
    student = artifacts["export"] / "student.onnx"
    small, large = describe_onnx(path), describe_onnx(student)
    assert small.spec == large.spec
    assert small.metadata == large.metadata
    assert small.opset == large.opset == 19
    assert len(history.epochs) == 2
    # One validation sample is 0.7 points; three of them are noise.
    assert accuracy(path, ground) > accuracy(student, ground) - 0.021
    # What was validated in training is what the file does.
    assert accuracy(path, ground) == pytest.approx(
        max(epoch.validation for epoch in history.epochs), abs=0.015
    )
    assert json.loads(json.dumps(history.to_json()))
    assert set(history.epochs[0].terms) == {"hard_labels", "soft_labels"}
    # Nothing else: the teacher's outputs for these views are in the cache of the run.
    assert call.progress.labels == ["student int8 cpu"]


def test_term_of_layers_is_left_out_and_said(run, call):
    job, _, _ = run
    terms = (
        *job.config.loss_terms,
        LossTerm(name="fitnet", args={"student": "features", "teacher": "features"}),
    )
    distill = job.config.distill.model_copy(update={"losses": terms})
    changed = dataclasses.replace(job, config=job.config.model_copy(update={"distill": distill}))
    history, path, _ = call("tensorrt", job=changed, epochs=1)
    assert set(history.epochs[0].terms) == {"hard_labels", "soft_labels"}
    assert any("without fitnet" in text for text in call.progress.messages)
    assert np.isfinite(history.epochs[0].loss)
    assert path.is_file()


def test_own_losses_replace_the_pipelines(call):
    history, _, _ = call(losses=(LossTerm(name="hard_labels"),), epochs=1)
    assert set(history.epochs[0].terms) == {"hard_labels"}


@pytest.mark.parametrize(
    ("qat", "where"),
    [
        ({"losses": (LossTerm(name="no_such_loss"),)}, "quantize.qat.losses"),
        ({"precision": "bfloat16"}, "quantize.qat.precision"),
        ({"compile": True}, "quantize.qat.compile"),
    ],
)
def test_wrong_configuration_is_told_before_anything_is_trained(call, qat, where):
    with pytest.raises(InputError, match=where):
        call(**qat)
    assert not call.progress.labels


def test_file_that_gives_other_answers_fails(call, monkeypatch):
    """A wrong bias in the exported file is not let through."""
    export = engine.export_onnx

    def careless(model, path, opset, metadata):
        export(model, path, opset, metadata)
        broken = onnx.load(path)
        for tensor in broken.graph.initializer:
            if tensor.name.endswith("head.linear.0.bias"):
                bias = np.full(10, 50.0, np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(bias, tensor.name))
        onnx.save(broken, path)

    monkeypatch.setattr(engine, "export_onnx", careless)
    with pytest.raises(StageError, match="does not give PyTorch's outputs"):
        call(epochs=1)
