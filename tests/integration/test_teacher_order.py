"""A teacher whose outputs, numbers or inputs are not the data's: refused, or made to fit."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.onnx_builders import run

PIPELINE = """\
name: order
data: {source: image-folder, path: photos}
teacher: {model: "nets:Net", checkpoint: teacher.pt}
student: {model: convnet-xs}
distill: {epochs: 1, baseline: false}
"""

NETS = """\
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=10, soft=False):
        super().__init__()
        self.fc, self.soft = nn.Linear(64, num_classes), soft

    def forward(self, image):
        z = self.fc(image.flatten(1))
        return z.softmax(1) if self.soft else z
"""

ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
"""The class that each output of the teacher stands for."""

NAMES = [f"digit {c}" for c in "abcdefghij"]


@pytest.fixture(scope="module")
def weights():
    """A linear classifier of pixels from 0 to 255, its outputs in another order."""
    digits = load_digits()
    x = torch.tensor(digits.images.reshape(-1, 64) / 16 * 255, dtype=torch.float32)
    outputs = torch.tensor(np.argsort(ORDER))[torch.tensor(digits.target)]
    fc = torch.nn.Linear(64, 10)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(fc.parameters(), 1e-3)
    for _ in range(400):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(fc(x), outputs).backward()
        optimizer.step()
    return {"fc.weight": fc.weight.detach(), "fc.bias": fc.bias.detach()}


@pytest.fixture
def folder(tmp_path, weights):
    digits = load_digits()
    images = np.round(digits.images / 16 * 255).astype(np.uint8)
    for number, (pixels, label) in enumerate(zip(images, digits.target, strict=True)):
        place = tmp_path / "photos" / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.png")
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "order.yaml").write_text(PIPELINE)
    torch.save({"model": weights}, tmp_path / "teacher.pt")
    return tmp_path


PIXELS = "teacher.preprocess={channels: 1, scale: 255}"


def test_another_order_is_refused_and_its_line_mends_it(edgekd, folder):
    done = edgekd("run", "order.yaml", "--until", "teacher", "--set", PIXELS, code=2)
    assert "in another order than the data's classes" in done.stderr
    line = done.stderr.split("'classes: ")[1].split("'")[0]
    assert json.loads(line) == [NAMES[c] for c in ORDER]
    classes = f"teacher.classes={line}"
    done = edgekd("run", "order.yaml", "--until", "export", "--set", PIXELS, "--set", classes)
    (artifact,) = (folder / "runs/order/artifacts/teacher").glob("*/validation.json")
    assert json.loads(artifact.read_text())["accuracy"] > 0.9
    # The exported teacher takes the student's samples and predicts in the data's order.
    (file,) = (folder / "runs/order/artifacts/export").glob("*/teacher.onnx")
    digits = load_digits()
    image = np.round(digits.images / 16 * 255).astype(np.float32)[:, None].repeat(3, 1) / 255
    (data,) = (folder / "runs/order/artifacts/data").glob("*/dataset.json")
    own = json.loads(data.read_text())["preprocess"]["image"]
    mean, std = (np.float32(own[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    logits = run(file, {"image": (image - mean) / std})["logits"]
    assert (logits.argmax(1) == digits.target).mean() > 0.9


@pytest.mark.parametrize("soft", ["false", "true"])
def test_the_order_is_read_from_the_checkpoint(edgekd, folder, weights, soft):
    known = {name: ORDER.index(c) for c, name in enumerate(NAMES)}
    torch.save({"model": weights, "class_to_idx": known}, folder / "teacher.pt")
    args = f"teacher.args={{soft: {soft}}}"
    done = edgekd("run", "order.yaml", "--until", "teacher", "--set", PIXELS, "--set", args)
    assert "by class_to_idx" in done.stdout + done.stderr
    assert ("they are probabilities" in done.stdout + done.stderr) == (soft == "true")
