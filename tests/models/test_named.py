"""Named inputs and outputs around any module."""

import pytest
import torch
from torch import nn

from edgekd.errors import InputError
from edgekd.models import NamedModel, count_parameters
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
    model = NamedModel(module, ModelSpec((IMAGE, STATE), (ACTION,)))
    answers = model({**BATCH, "label": torch.zeros(2)})
    assert list(answers) == ["action"]
    assert torch.equal(answers["action"], torch.full((2, 2), 3.0))


def test_a_forward_that_cannot_take_the_inputs_is_refused():
    with pytest.raises(InputError, match="cannot take the 2 inputs image, state"):
        NamedModel(nn.Linear(2, 2), ModelSpec((IMAGE, STATE), (ACTION,)))


def test_a_missing_input_is_named():
    model = NamedModel(ByName(), ModelSpec((IMAGE, STATE), (ACTION,)))
    with pytest.raises(InputError, match="lacks the input 'state'"):
        model({"image": BATCH["image"]})


class Two(nn.Module):
    def forward(self, image):
        return image, image


def test_a_wrong_number_of_outputs_is_refused():
    model = NamedModel(Two(), ModelSpec((IMAGE,), (ACTION,)))
    with pytest.raises(InputError, match="gives 2 outputs, and 1 are wanted: action"):
        model(BATCH)


def test_another_image_size_names_both():
    model = NamedModel(ByName(), ModelSpec((IMAGE, STATE), (ACTION,)))
    model.check_batch(BATCH)
    with pytest.raises(InputError, match=r"batch, 1, 4, 4\], and 'image' is \[2, 1, 8, 8\]"):
        model.check_batch({**BATCH, "image": torch.zeros(2, 1, 8, 8)})


def test_buffers_are_not_parameters():
    assert count_parameters(nn.BatchNorm2d(7)) == 14
