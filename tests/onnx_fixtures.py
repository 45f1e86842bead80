"""Small named models to export."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.onnx.export import export_onnx
from edgekd.spec import ModelSpec, TensorSpec

IMAGE = TensorSpec("image", ("batch", 3, 8, 8))


class Named(nn.Module):
    """A model with a spec, whose forward is a function of its parts and the batch."""

    def __init__(self, parts: nn.Module, spec: ModelSpec, call: Callable) -> None:
        super().__init__()
        self.parts, self.spec, self.call = parts, spec, call

    def forward(self, batch):
        return self.call(self.parts, batch)


@pytest.fixture(scope="session")
def classifier():
    """Builds an image classifier of 5 classes; ``answer`` replaces its outputs."""

    def build(answer: Callable | None = None) -> Named:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 5),
        )
        nn.init.uniform_(net[1].running_mean, -1, 1)
        spec = ModelSpec((IMAGE,), (TensorSpec("logits", ("batch", 5)),))
        call = answer or (lambda parts, batch: {"logits": parts(batch["image"])})
        return Named(net, spec, call)

    return build


@pytest.fixture(scope="session")
def exported_bytes(classifier, tmp_path_factory):
    """The classifier's file: exported once, as that takes a second."""
    path = tmp_path_factory.mktemp("exported") / "student.onnx"
    export_onnx(classifier(), path, metadata={"labels": "a,b"})
    return path.read_bytes()


@pytest.fixture
def exported(exported_bytes, tmp_path):
    """The classifier's file, in the test's own folder."""
    path = tmp_path / "student.onnx"
    path.write_bytes(exported_bytes)
    return path


@pytest.fixture
def policy():
    """Image and state in, action and value out."""
    torch.manual_seed(0)
    parts = nn.ModuleDict(
        {"eye": nn.Conv2d(3, 4, 3, 2, 1), "body": nn.Linear(6, 4), "act": nn.Linear(8, 3)}
    )

    def call(p, batch):
        seen = p["eye"](batch["image"]).mean((2, 3))
        both = torch.cat([seen, p["body"](batch["state"])], 1)
        return {"action": p["act"](both).tanh(), "value": both.sum(1)}

    spec = ModelSpec(
        (IMAGE, TensorSpec("state", ("batch", 6))),
        (TensorSpec("action", ("batch", 3)), TensorSpec("value", ("batch",))),
    )
    return Named(parts, spec, call)


@pytest.fixture
def samples():
    random = np.random.default_rng(0)
    return {
        "image": random.standard_normal((23, 3, 8, 8)).astype(np.float32),
        "state": random.standard_normal((23, 6)).astype(np.float32),
    }
