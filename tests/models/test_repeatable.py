"""A network that is not a function of its input alone is found, and its module named."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgekd.errors import InputError
from edgekd.models.dict_model import DictModel
from edgekd.models.repeatable import check_repeatable
from edgekd.spec import ModelSpec, TensorSpec

SPEC = ModelSpec((TensorSpec("x", ("batch", 6)),), (TensorSpec("logits", ("batch", 3)),))


class AlwaysDrops(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return x


class StaysInTraining(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(True)


def network(layer):
    torch.manual_seed(0)
    return DictModel(nn.Sequential(nn.Linear(6, 6), nn.Sequential(layer), nn.Linear(6, 3)), SPEC)


def batch():
    return {"x": torch.randn(16, 6, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("layer", [AlwaysDrops(), Counts()])
def test_two_answers_to_one_batch_name_the_innermost_module(layer):
    with pytest.raises(InputError, match=rf"1\.0 \({type(layer).__name__}\)"):
        check_repeatable(network(layer), batch(), "teacher")


@pytest.mark.parametrize(
    ("layer", "name"), [(Remembers(), "1.0.mean"), (StaysInTraining(6), "1.0.running_mean")]
)
def test_a_changed_buffer_is_named_and_put_back(layer, name):
    model = network(layer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=rf"buffer '{name}'"):
        check_repeatable(model, batch(), "student.model")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_forward_itself_is_named_when_no_layer_is_at_fault():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(x + torch.randn_like(x))

    with pytest.raises(InputError, match="forward of Noise itself"):
        check_repeatable(DictModel(Noise(), SPEC), batch(), "teacher")


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(6), nn.ReLU(inplace=True)])
def test_layers_that_are_random_or_counting_in_training_only_pass(layer):
    model = network(layer).train()
    state = torch.get_rng_state()
    check_repeatable(model, batch(), "student.model")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
