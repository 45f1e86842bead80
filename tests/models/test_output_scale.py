"""A network with outputs in the user's units: in files, in training and for the device."""

import copy

import pytest
import torch
from torch import nn

from edgekd.models.dict_model import DictModel, fold_output_scale
from edgekd.models.weights import load_weights, save_weights
from edgekd.spec import ModelSpec, TensorSpec

SPEC = ModelSpec(
    (TensorSpec("x", ("batch", 4)),), (TensorSpec("prediction", ("batch", 2)),)
)  # fmt: skip
BATCH = {"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2, bias=bias)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


class Twice(nn.Module):
    """Its last layer is used in the middle too."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.layer(x)) + self.out(x)


class Tied(nn.Module):
    """The weight of its last layer is also that of another."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first.weight = self.out.weight
        self.last = nn.Linear(4, 2)
        self.other = nn.Linear(4, 2)
        self.other.weight = self.last.weight

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.other(x).sum(1, keepdim=True))


def scaled(module, offset=(150_000.0, -3.0)):
    torch.manual_seed(0)
    model = DictModel(module, SPEC).eval()
    model.scale_output(torch.tensor(77_000.0), torch.tensor(offset))
    return model


def test_the_first_output_is_scaled_and_the_network_is_not():
    model = scaled(Net())
    raw = model.module(BATCH["x"])
    expected = raw * 77_000 + torch.tensor([150_000.0, -3.0])
    assert torch.equal(model(BATCH)["prediction"], expected)
    assert "module.last.weight" in model.state_dict()


def test_the_scale_goes_with_the_weights(tmp_path):
    model, other = scaled(Net()), DictModel(Net(), SPEC).eval()
    save_weights(model, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(model(BATCH)["prediction"], other(BATCH)["prediction"])
    plain = DictModel(Net(), SPEC).eval()
    save_weights(plain, tmp_path / "plain.safetensors")
    load_weights(other, tmp_path / "plain.safetensors")
    assert other.output_scale is None
    assert torch.equal(plain(BATCH)["prediction"], other(BATCH)["prediction"])


@pytest.mark.parametrize("bias", [True, False])
def test_the_scale_is_folded_into_the_last_layer(bias):
    model = scaled(Net(bias))
    expected = model(BATCH)["prediction"]
    assert fold_output_scale(model, BATCH)
    assert model.output_scale is None
    assert torch.allclose(model(BATCH)["prediction"], expected, rtol=1e-5, atol=1e-1)


@pytest.mark.parametrize("module", [Twice, Tied, lambda: nn.Sequential(Net(), nn.Softplus())])
def test_what_cannot_be_folded_stays_as_it_is(module):
    model = scaled(module())
    before = copy.deepcopy(model.state_dict())
    expected = model(BATCH)["prediction"]
    assert not fold_output_scale(model, BATCH)
    assert torch.equal(model(BATCH)["prediction"], expected)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_network_without_a_scale_has_nothing_to_fold():
    assert not fold_output_scale(DictModel(Net(), SPEC).eval(), BATCH)
