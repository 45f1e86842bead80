"""Named inputs and outputs around any module."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgekd.errors import InputError
from edgekd.models import count_parameters
from edgekd.models.dict_model import DictModel, check_repeatable
from edgekd.spec import ModelSpec, TensorSpec

IMAGE = TensorSpec("image", ("batch", 1, 4, 4))
STATE = TensorSpec("state", ("batch", 3))
ACTION = TensorSpec("action", ("batch", 2))
BATCH = {"image": torch.full((2, 1, 4, 4), 2.0), "state": torch.full((2, 3), 5.0)}


class ByName(nn.Module):
    def forward(self, state, image):
        return state[:, :2] - image.mean()


class ByPosition(nn.Module):
    def forward(self, x, y):
        return (y[:, :2] - x.mean(),)


class ByMapping(nn.Module):
    def forward(self, batch):
        assert set(batch) == {"image", "state"}
        return {"action": batch["state"][:, :2] - batch["image"].mean(), "features": None}


@pytest.mark.parametrize("module", [ByName(), ByPosition(), ByMapping()])
def test_inputs_reach_the_module_whatever_its_signature(module):
    model = DictModel(module, ModelSpec((IMAGE, STATE), (ACTION,)))
    answers = model({**BATCH, "label": torch.zeros(2)})
    assert list(answers) == ["action"]
    assert torch.equal(answers["action"], torch.full((2, 2), 3.0))


def test_a_forward_that_cannot_take_the_inputs_is_refused():
    with pytest.raises(InputError, match="cannot take the 2 inputs image, state"):
        DictModel(nn.Linear(2, 2), ModelSpec((IMAGE, STATE), (ACTION,)))


def test_a_missing_input_is_named():
    model = DictModel(ByName(), ModelSpec((IMAGE, STATE), (ACTION,)))
    with pytest.raises(InputError, match="lacks the input 'state'"):
        model({"image": BATCH["image"]})


class Two(nn.Module):
    def forward(self, image):
        return image, image


def test_a_wrong_number_of_outputs_is_refused():
    model = DictModel(Two(), ModelSpec((IMAGE,), (ACTION,)))
    with pytest.raises(InputError, match="returns 2 outputs, and 1 are needed: action"):
        model(BATCH)


def test_another_image_size_names_both():
    model = DictModel(ByName(), ModelSpec((IMAGE, STATE), (ACTION,)))
    model.check_batch(BATCH)
    with pytest.raises(InputError, match=r"batch, 1, 4, 4\], and 'image' is \[2, 1, 8, 8\]"):
        model.check_batch({**BATCH, "image": torch.zeros(2, 1, 8, 8)})


def test_buffers_are_not_parameters():
    assert count_parameters(nn.BatchNorm2d(7)) == 14


class Centres(nn.Module):
    """Writes into its own input."""

    def __init__(self, when=(True, False)):
        super().__init__()
        self.fc, self.when = nn.Linear(4, 3), when

    def forward(self, x):
        if self.training in self.when:
            x.view(-1).sub_(2.0)
        return self.fc(x)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("when", [(True,), (False,), (True, False)])
def test_a_batch_stays_as_it_is_whatever_the_network_writes(when, inference):
    spec = ModelSpec((TensorSpec("x", ("batch", 4)),), (TensorSpec("logits", ("batch", 3)),))
    model = DictModel(Centres(when), spec)
    array = np.arange(8, dtype=np.float32).reshape(2, 4)
    batch = {"x": torch.from_numpy(array)}
    with torch.inference_mode(inference):
        for training in (True, False, True, False):
            model.train(training)
            first, second = model(batch)["logits"], model(batch)["logits"]
            shift = 2.0 if training in when else 0.0
            torch.testing.assert_close(first, model.module.fc(batch["x"] - shift))
            assert torch.equal(first, second)
    assert array.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_network_that_does_not_write_is_given_the_batch_itself():
    given = []

    class Looks(nn.Module):
        def forward(self, x):
            given.append(x.data_ptr())
            return x[:, :3]

    spec = ModelSpec((TensorSpec("x", ("batch", 4)),), (TensorSpec("logits", ("batch", 3)),))
    model, x = DictModel(Looks(), spec), torch.zeros(2, 4)
    for _ in range(3):
        model({"x": x})
    assert given[1:] == [x.data_ptr()] * 2


def test_a_network_that_begins_to_write_later_is_an_error_and_not_silent():
    class Sometimes(nn.Module):
        def forward(self, x):
            return (x.add_(1) if x[0, 0] > 5 else x)[:, :3]

    spec = ModelSpec((TensorSpec("x", ("batch", 4)),), (TensorSpec("logits", ("batch", 3)),))
    model = DictModel(Sometimes(), spec)
    model({"x": torch.zeros(2, 4)})
    with pytest.raises(InputError, match="writes into its input 'x'"):
        model({"x": torch.full((2, 4), 9.0)})


def test_two_networks_that_write_learn_from_one_batch():
    spec = ModelSpec((TensorSpec("x", ("batch", 4)),), (TensorSpec("logits", ("batch", 3)),))
    one, other = DictModel(Centres(), spec), DictModel(Centres(), spec)
    batch = {"x": torch.ones(2, 4)}
    (one(batch)["logits"] - other(batch)["logits"]).square().sum().backward()
    assert torch.equal(batch["x"], torch.ones(2, 4))
    assert one.module.fc.weight.grad is not None


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
