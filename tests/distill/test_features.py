"""Features of named layers: the right tensor, and an error where it would not be it."""

import pytest
import torch
from torch import nn

from edgekd.distill.features import FeatureExtractor, layer_key, list_layers
from edgekd.errors import InputError
from edgekd.models import DictModel
from edgekd.spec import ModelSpec, TensorSpec

SPEC = ModelSpec((TensorSpec("x", ("batch", 4)),), (TensorSpec("logits", ("batch", 3)),))
BATCH = {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(0))}


def named(*modules):
    torch.manual_seed(0)
    return DictModel(nn.Sequential(*modules), SPEC)


class Two(nn.Module):
    """A layer that gives a tensor, something else and another tensor."""

    def forward(self, x):
        return x, "text", 2 * x


class First(nn.Module):
    def forward(self, parts):
        return parts[0]


def test_the_layers_own_output_with_its_graph():
    model = named(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    capture = FeatureExtractor(model, ["1", "0", "1"])
    logits = model(BATCH)["logits"]
    features = capture.take()
    assert list(features) == [layer_key("1"), layer_key("0")]
    hidden = model.module[0](BATCH["x"])
    torch.testing.assert_close(features[layer_key("0")], hidden)
    torch.testing.assert_close(model.module[2](features[layer_key("1")]), logits)
    features[layer_key("1")].sum().backward()
    assert model.module[0].weight.grad is not None


def test_an_in_place_activation_after_the_layer_is_an_error():
    model = named(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    capture = FeatureExtractor(model, ["0"], "teacher")
    with torch.no_grad():
        model(BATCH)
    with pytest.raises(InputError, match=r"'0' is changed in place[\s\S]*teacher[\s\S]*inplace"):
        capture.take()
    # The activation itself is compared below, and is correct.
    capture.remove()
    after = FeatureExtractor(model, ["1"])
    model(BATCH)
    assert (after.take()[layer_key("1")] >= 0).all()


def test_a_residual_sum_in_place_is_detected_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            y = self.inner(x)
            y += 1
            return y

    model = DictModel(Block(), SPEC)
    capture = FeatureExtractor(model, ["inner"])
    model(BATCH)
    with pytest.raises(InputError, match="in place"):
        capture.take()


def test_an_element_of_several():
    model = named(Two(), First(), nn.Linear(4, 3))
    capture = FeatureExtractor(model, ["0[2]"])
    model(BATCH)
    assert torch.equal(capture.take()[layer_key("0[2]")], 2 * BATCH["x"])
    capture.remove()
    for layer in ("0", "0[1]", "0[9]"):
        capture = FeatureExtractor(model, [layer])
        with pytest.raises(InputError, match="outputs 3 values"):
            model(BATCH)
        capture.remove()


def test_a_misspelt_layer_suggests_the_nearest():
    with pytest.raises(InputError, match=r"no layer named 'encodr'[\s\S]*'encoder'"):
        FeatureExtractor(nn.ModuleDict({"encoder": nn.ReLU()}), ["encodr"])


def test_an_error_says_where_the_layer_was_named():
    model = named(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    with pytest.raises(InputError, match=r"named '22'[\s\S]*where: the second[\s\S]*mean '2'"):
        FeatureExtractor(model, {"0": "the first", "22": "the second"})
    model = named(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    capture = FeatureExtractor(model, {"2": "the first", "0": "the second"})
    model(BATCH)
    with pytest.raises(InputError, match=r"changed in place[\s\S]*where: the second"):
        capture.take()


def test_a_layer_that_is_not_run_or_run_twice():
    relu = nn.ReLU()
    model = named(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 3))
    capture = FeatureExtractor(model, ["1"])
    with pytest.raises(InputError, match="more than once"):
        model(BATCH)
    capture.remove()
    capture = FeatureExtractor(model, ["0"])
    with pytest.raises(InputError, match="is not run in"):
        capture.take()


def test_taken_off_it_leaves_nothing():
    model = named(nn.Linear(4, 3))
    capture = FeatureExtractor(model, ["0"])
    capture.remove()
    assert not model.module[0]._forward_hooks


def test_the_list_of_layers_and_the_model_stays_as_it_was():
    model = named(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).train()
    before = model.module[1].running_mean.clone()
    rows = list_layers(model, BATCH)
    assert [(row.path, row.kind, row.shape) for row in rows] == [
        ("0", "Linear", (5, 6)),
        ("1", "BatchNorm1d", (5, 6)),
        ("2", "Linear", (5, 3)),
    ]
    assert [row.parameters for row in rows] == [30, 12, 21]
    assert model.training
    assert torch.equal(model.module[1].running_mean, before)
