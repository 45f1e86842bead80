"""Named inputs and outputs around any module."""

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.errors import InputError
from edgekd.models import DictModel, count_parameters
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
