"""A user's own teacher, student and data: a module and a short pipeline file, no subclassing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

MODULE = """\
import torch
from torch import nn


def network(width):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)
    )


def confident(student, teacher, floor=0.5):
    p = torch.softmax(teacher, 1)
    sure = (p.max(1).values > floor).float()
    return (sure * (p * (p.log() - torch.log_softmax(student, 1))).sum(1)).mean()
"""

PIPELINE = """\
name: mine
data: {source: npz, path: scans.npz}
teacher: {model: "mine:network", args: {width: 128}, train: {epochs: 30}}
student: {model: "mine:network", args: {width: 12}}
distill:
  epochs: 30
  losses: [hard_labels, {"mine:confident": {floor: 0.3}, weight: 2}]
benchmark: {min_queries: 200, max_seconds: 2}
gate: {accuracy: {min: 0.5}, size: {max_mb: 1}}
"""


@pytest.fixture
def own_work(tmp_path: Path) -> Path:
    digits = load_digits()
    image, label = digits.images.astype(np.float32) / 16, digits.target
    np.savez(
        tmp_path / "scans.npz",
        train_image=image[:1400],
        train_label=label[:1400],
        test_image=image[1400:],
        test_label=label[1400:],
    )
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path


def test_own_model_loss_and_data_in_fifteen_lines(own_work: Path, edgekd) -> None:
    assert len(PIPELINE.splitlines()) <= 15
    edgekd("run", "pipeline.yaml")
    result = json.loads((own_work / "runs/mine/benchmark/result.json").read_text())
    assert result["models"]["student"]["metric"]["value"] > 0.8

    # The user's own source is part of the fingerprint.
    (own_work / "mine.py").write_text(MODULE.replace("nn.ReLU()", "nn.Tanh()"))
    plan = edgekd("plan", "pipeline.yaml")
    assert "your own source changed" in plan.stdout
    assert ["data", "cached"] in [line.split()[:2] for line in plan.stdout.splitlines()]


# safetensors: examples/own-teacher, which tests/docs runs.
@pytest.mark.parametrize("kind", ["state dict", "onnx"])
def test_own_teacher_from_a_file(kind: str, own_work: Path, edgekd) -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    digits = load_digits()
    image = torch.tensor(digits.images[:1400] / 16, dtype=torch.float32)
    label = torch.tensor(digits.target[:1400])
    # The pipeline normalizes by the training split, so the teacher is trained on such images.
    image = (image - image.mean()) / image.std()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(image), label).backward()
        optimizer.step()

    lines = PIPELINE.replace("train: {epochs: 30}", "CHECKPOINT")
    if kind == "state dict":
        torch.save(network.state_dict(), own_work / "t.pt")
        teacher = lines.replace("CHECKPOINT", "checkpoint: t.pt")
    else:
        torch.onnx.export(
            network.eval(),
            (torch.zeros(2, 1, 8, 8),),
            own_work / "t.onnx",
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
        teacher = PIPELINE.replace(
            'model: "mine:network", args: {width: 128}, train: {epochs: 30}', "onnx: t.onnx"
        )
    (own_work / "pipeline.yaml").write_text(teacher)
    quick = ("--set", "distill.epochs=5", "--set", "distill.baseline=false")
    edgekd("run", "pipeline.yaml", "--until", "benchmark", *quick)
    result = json.loads((own_work / "runs/mine/benchmark/result.json").read_text())
    assert result["models"]["teacher"]["metric"]["value"] > 0.85
    assert result["models"]["teacher"]["parameters"]["value"] == 64 * 128 + 128 + 1280 + 10
