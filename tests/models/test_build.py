"""Built-in networks, users' own, and the shapes they are tried with."""

import sys
import types

import pytest
import torch
from torch import nn

from edgekd.config.networks import ModelConfig
from edgekd.errors import InputError
from edgekd.models import MODELS, build_model, count_parameters
from edgekd.spec import TensorSpec


def image(channels, height, width):
    return TensorSpec("image", ("batch", channels, height, width))


LOGITS = TensorSpec("logits", ("batch", 7))
STATE = TensorSpec("state", ("batch", 5))
ACTIONS = TensorSpec("action", ("batch", 3, 2))


def build(name, inputs, outputs=(LOGITS,), **args):
    return build_model(ModelConfig(model=name, args=args), inputs, outputs, where="student")


@pytest.fixture
def module():
    """A module that a user could have next to the pipeline file."""
    made = types.ModuleType("users_models")
    sys.modules["users_models"] = made
    yield made
    del sys.modules["users_models"]


@pytest.mark.parametrize("name", ["convnet-l", "convnet-m", "convnet-s", "convnet-xs"])
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 9, 13), (1, 28, 28), (3, 96, 130)])
def test_convnets_take_images_from_8_by_8_and_train(name, size):
    model = build(name, [image(*size)])
    model.train()
    answers = model({"image": torch.randn(2, *size)})
    assert answers["logits"].shape == (2, 7)
    answers["logits"].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_sizes_of_the_convnet_family():
    sizes = [
        count_parameters(
            build(f"convnet-{size}", [image(1, 28, 28)], [TensorSpec("logits", ("batch", 10))])
        )
        for size in ("xs", "s", "m", "l")
    ]
    assert sizes == sorted(sizes)
    assert sizes[1] * 10 < sizes[3]
    assert sizes[0] < 5_000


def test_an_image_that_is_too_small_is_refused():
    with pytest.raises(InputError, match=r"7×9.*at least 8×8"):
        build("convnet-s", [image(1, 7, 9)])


@pytest.mark.parametrize("name", ["policy-l", "policy-s", "mlp"])
def test_two_inputs_to_a_chunk_of_actions(name):
    model = build(name, [image(3, 16, 16), STATE], [ACTIONS])
    batch = {"image": torch.randn(4, 3, 16, 16), "state": torch.randn(4, 5)}
    answers = model(batch)["action"]
    assert answers.shape == (4, 3, 2)
    moved = model({**batch, "state": batch["state"] + 1})["action"]
    assert not torch.equal(answers, moved)


def test_a_convnet_for_two_inputs_points_to_the_policies():
    with pytest.raises(InputError, match="policy-l"):
        build("convnet-s", [image(1, 8, 8), STATE])


def test_misspelt_model_suggests_the_nearest():
    with pytest.raises(InputError, match=r"did you mean 'convnet-xs'|did you mean 'convnet-s'"):
        build("convnet_s", [image(1, 8, 8)])


def test_unknown_argument_suggests_the_nearest():
    with pytest.raises(InputError, match=r"no argument 'width'[\s\S]*student.args[\s\S]*'widths'"):
        build("convnet-s", [image(1, 8, 8)], width=[8, 16])


def test_wrong_type_of_argument():
    with pytest.raises(InputError, match=r"dropout.*'much'"):
        build("convnet-s", [image(1, 8, 8)], dropout="much")


def test_widths_and_blocks_that_do_not_fit():
    with pytest.raises(InputError, match="3 widths need 2 blocks"):
        build("convnet-l", [image(1, 8, 8)], widths=[8, 16, 32], blocks=[1])


def test_arguments_change_the_network():
    small = build("convnet-l", [image(1, 8, 8)], widths=[4, 8], blocks=[1])
    assert count_parameters(small) < 3_000


def test_building_is_determined_by_the_seed_and_draws_nothing_more():
    torch.manual_seed(3)
    first = build("policy-s", [image(3, 16, 16), STATE], [ACTIONS])
    after = torch.rand(1)
    torch.manual_seed(3)
    second = MODELS["policy-s"](inputs=(image(3, 16, 16), STATE), outputs=(ACTIONS,))
    assert torch.equal(after, torch.rand(1))
    for a, b in zip(first.module.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_users_class_gets_num_classes(module):
    class Net(nn.Module):
        def __init__(self, num_classes, width=4):
            super().__init__()
            self.fc = nn.Sequential(
                nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_classes)
            )

        def forward(self, x):
            return self.fc(x)

    module.Net = Net
    model = build("users_models:Net", [image(1, 8, 8)], width=6)
    assert model({"image": torch.zeros(3, 1, 8, 8)})["logits"].shape == (3, 7)


def test_users_output_of_another_size_names_both_shapes(module):
    module.net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(InputError, match=r"gives logits \[batch, 10\].*needs \[batch, 7\]"):
        build("users_models:net", [image(1, 8, 8)])


def test_users_network_for_another_image_size(module):
    module.net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(InputError, match=r"cannot take image float32\[batch, 1, 9, 9\].*81"):
        build("users_models:net", [image(1, 9, 9)])


def test_users_callable_that_gives_no_module(module):
    module.net = lambda: 3
    with pytest.raises(InputError, match="returns a int, not a torch module"):
        build("users_models:net", [image(1, 8, 8)])


def test_users_callable_that_fails(module):
    def net():
        raise KeyError("weights")

    module.net = net
    with pytest.raises(InputError, match="fails when built: KeyError: 'weights'"):
        build("users_models:net", [image(1, 8, 8)])


def test_trying_leaves_batch_norm_as_it_was():
    model = build("convnet-xs", [image(1, 8, 8)])
    assert model.training
    assert all(int(b) == 0 for k, b in model.named_buffers() if k.endswith("num_batches_tracked"))
