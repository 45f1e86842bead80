"""A network of other preprocessing, class order and output form gives what it gave where it was."""

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from torch import nn
from torch.nn import functional as F

from edgekd.config.networks import PreprocessConfig
from edgekd.config.pipeline import ExportConfig
from edgekd.data.dataset import Preprocess
from edgekd.errors import InputError
from edgekd.models.adapted import (
    Adaptation,
    AdaptedModel,
    InputAdaptation,
    adapt,
    as_logits,
    check_form,
    input_adaptation,
    input_resolution,
    recognized_form,
    resize,
)
from edgekd.models.dict_model import DictModel
from edgekd.onnx.export import export_onnx
from edgekd.onnx.import_onnx import adapt_onnx
from edgekd.onnx.parity import check_parity, parity
from edgekd.spec import ModelSpec, TensorSpec
from tests.onnx_builders import distance, run
from tests.quantization.quantizing import quantized

NORMALIZATION = Preprocess(1 / 255, (0.4, 0.5, 0.6), (0.2, 0.3, 0.1))


def spec(channels=3, size=8, classes=4):
    image = TensorSpec("image", ("batch", channels, size, size))
    return ModelSpec((image,), (TensorSpec("logits", ("batch", classes)),))


def adaptation(order=None, outputs=None, form="logits", given=3, **preprocess):
    own = input_adaptation(
        PreprocessConfig(**preprocess) if preprocess else None,
        spec(given).inputs,
        {"image": NORMALIZATION if given == 3 else Preprocess(1 / 255, (0.3,), (0.2,))},
        "teacher.preprocess",
    )
    return Adaptation("logits", order, outputs, form, own)


def pixels(channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, channels, 8, 8), generator=generator).float() / 255


def normalized(image):
    channels = image.shape[1]
    mean, std = (NORMALIZATION.mean, NORMALIZATION.std) if channels == 3 else ((0.3,), (0.2,))
    return (image - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


CASES = [
    (3, {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}),
    (3, {"scale": 255, "channel_order": "bgr", "mean": [103.9, 116.8, 123.7]}),
    (3, {"mean": [0.5], "std": [0.5], "layout": "nhwc"}),
    (3, {"image_size": [13, 11]}),
    (3, {"image_size": [16, 16], "interpolation": "nearest", "scale": 255}),
    (3, {"image_size": [16, 12], "interpolation": "bicubic", "mean": [0.1]}),
    (1, {"channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}),
    (3, {"channels": 1, "mean": [0.5]}),
]


def by_hand(image, keys):
    """The teacher's own preprocessing of pixels from 0 to 1."""
    if not {"scale", "mean", "std"} & keys.keys():
        image = normalized(image)
    if keys.get("channels") == 3:
        image = image.repeat(1, 3, 1, 1)
    elif keys.get("channels") == 1:
        red, green, blue = image.unbind(1)
        image = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]
    if keys.get("channel_order") == "bgr":
        image = image.flip(1)
    if "image_size" in keys:
        mode = keys.get("interpolation", "bilinear")
        align = None if mode == "nearest" else False
        image = F.interpolate(image, keys["image_size"], mode=mode, align_corners=align)
    mean = torch.tensor(keys.get("mean", [0.0])).view(-1, 1, 1)
    std = torch.tensor(keys.get("std", [1.0])).view(-1, 1, 1)
    if {"scale", "mean", "std"} & keys.keys():
        image = (image * keys.get("scale", 1) - mean) / std
    return image.permute(0, 2, 3, 1) if keys.get("layout") == "nhwc" else image


class Pooled(nn.Module):
    """Sees where and in which channel a value lies, and how large it is."""

    def __init__(self, shape, outputs):
        super().__init__()
        torch.manual_seed(1)
        self.shape = tuple(shape)
        self.fc = nn.Linear(int(np.prod(shape)), outputs)

    def forward(self, image):
        assert tuple(image.shape[1:]) == self.shape
        return self.fc(image.flatten(1))


@pytest.mark.parametrize(("channels", "keys"), CASES)
def test_a_teacher_is_given_what_it_was_trained_on(tmp_path, channels, keys):
    own = adaptation(order=(2, 0, 4, 1), outputs=5, given=channels, **keys)
    inner = own.network_spec(spec(channels))
    network = DictModel(Pooled(inner.inputs[0].shape[1:], 5), inner).eval()
    wanted = network.module(by_hand(pixels(channels), keys))[:, [2, 0, 4, 1]]
    model = adapt(network, spec(channels), own).eval()
    batch = {"image": normalized(pixels(channels))}
    kept = batch["image"].clone()
    # The data's normalisation is undone in float32.
    torch.testing.assert_close(
        model(batch)["logits"], wanted, rtol=1e-4, atol=1e-4 * keys.get("scale", 1)
    )
    assert torch.equal(batch["image"], kept)

    export_onnx(model, tmp_path / "whole.onnx")
    export_onnx(network, tmp_path / "t.onnx")
    adapt_onnx(tmp_path / "t.onnx", own, spec(channels))
    onnx.checker.check_model(onnx.load(tmp_path / "t.onnx"), full_check=True)
    for name in ("whole.onnx", "t.onnx"):
        session = InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"image": kept.numpy()})
        np.testing.assert_allclose(
            found, wanted.detach(), rtol=1e-3, atol=1e-4 * keys.get("scale", 1)
        )


@pytest.mark.parametrize(
    ("channels", "keys", "words"),
    [
        (3, {"mean": [1.0, 2.0]}, "2 numbers for 3 channels"),
        (1, {"channel_order": "bgr"}, "no order bgr"),
    ],
)
def test_preprocessing_that_does_not_fit_is_an_error(channels, keys, words):
    with pytest.raises(InputError, match=words):
        adaptation(given=channels, **keys)


def test_preprocessing_of_several_images_is_asked_for():
    two = [TensorSpec(n, ("batch", 3, 8, 8)) for n in ("left", "right")]
    with pytest.raises(InputError, match="left, right"):
        input_adaptation(PreprocessConfig(scale=255), two, {}, "teacher.preprocess")


@pytest.mark.parametrize("classes", [2, 3, 1000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_the_form_of_the_outputs_is_recognized_and_changes_nothing(classes, scale):
    logits = scale * torch.randn(50, classes, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    assert recognized_form(logits) == "logits"
    assert recognized_form(p) == "probabilities"
    assert recognized_form(p.half()) == "probabilities"
    assert recognized_form(logits.log_softmax(-1)) == "log_probabilities"
    for form, given in (("probabilities", p), ("log_probabilities", logits.log_softmax(-1))):
        found = as_logits(given, form)
        assert found.isfinite().all()
        torch.testing.assert_close(found.softmax(-1), p, rtol=1e-4, atol=1e-6)


def test_sigmoids_become_the_logits_they_were_made_of():
    logits = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    assert recognized_form(logits.sigmoid()) == "sigmoid"
    torch.testing.assert_close(as_logits(logits.sigmoid(), "sigmoid"), logits, rtol=1e-4, atol=1e-4)
    assert as_logits(torch.tensor([[0.0, 1.0]]), "sigmoid").isfinite().all()
    assert as_logits(torch.tensor([[0.0, 1.0]]), "probabilities").isfinite().all()


def test_a_form_that_cannot_be_is_an_error():
    with pytest.raises(InputError, match="look like logits"):
        check_form(torch.tensor([[-1.0, 3.0]]), "probabilities", "teacher.output")


def test_an_adapted_network_has_the_networks_own_weights_and_layers():
    network = DictModel(Pooled((3, 8, 8), 4), spec())
    model = adapt(network, spec(), adaptation(form="probabilities"))
    assert isinstance(model, AdaptedModel)
    assert model.state_dict().keys() == network.state_dict().keys()
    assert adapt(network, spec(), Adaptation("logits")) is network


def test_whole_factors_are_averaged_and_others_interpolated():
    image = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    blocks = image.reshape(2, 3, 4, 2, 4, 3).mean((3, 5))
    torch.testing.assert_close(resize(image, (4, 4)), blocks)
    assert resize(image, (5, 16)).shape == (2, 3, 5, 16)
    flat = torch.full((1, 1, 9, 9), 0.7)
    torch.testing.assert_close(resize(flat, (7, 12)), torch.full((1, 1, 7, 12), 0.7))


@pytest.mark.parametrize(
    ("resolution", "size"), [(8, (8, 12)), (20, (20, 30)), ((9, 9), (9, 9)), (16, None)]
)
def test_a_resolution_is_the_shorter_side_or_both(resolution, size):
    image = TensorSpec("image", ("batch", 3, 16, 24))
    found = input_resolution(
        resolution, (image, TensorSpec("state", ("batch", 4))), None, "student"
    )
    assert (found and found.resolution) == size
    if found is not None:
        assert found.spec(image).shape == ("batch", 3, *size)
        assert found(torch.zeros(2, 3, 16, 24)).shape == (2, 3, *size)


def test_a_resolution_replaces_the_teachers_image_size_and_keeps_its_scale():
    config = PreprocessConfig(image_size=(32, 32), mean=(0.5,), std=(0.25,))
    own = InputAdaptation("image", config, None)
    image = TensorSpec("image", ("batch", 1, 16, 16))
    found = input_resolution(8, (image,), own, "student")
    assert found.spec(image).shape == ("batch", 1, 8, 8)
    torch.testing.assert_close(found(torch.ones(2, 1, 16, 16)), torch.full((2, 1, 8, 8), 2.0))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ((TensorSpec("x", ("batch", 4)),), "resizes one image"),
        ((TensorSpec("a", ("batch", 1, 8, 8)), TensorSpec("b", ("batch", 1, 8, 8))), "one image"),
        ((TensorSpec("image", ("batch", 1, 8, 8), "uint8"),), "needs floats and a fixed size"),
        ((TensorSpec("image", ("batch", 1, "height", 8)),), "needs floats and a fixed size"),
    ],
)
def test_what_cannot_be_resized(inputs, says):
    with pytest.raises(InputError, match=says):
        input_resolution(4, inputs, None, "student")


@pytest.mark.parametrize("resolution", [4, (5, 7), 12])
def test_a_resolution_is_in_the_onnx_file_and_in_its_int8(resolution, tmp_path):
    torch.manual_seed(0)
    outer = spec(size=8)
    own = input_resolution(resolution, outer.inputs, None, "student")
    adaptation = Adaptation(input=own)
    inner = adaptation.network_spec(outer)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    model = adapt(DictModel(network, inner), outer, adaptation).eval()
    images = {"image": np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)}
    path = tmp_path / "m.onnx"
    export_onnx(model, path)
    check_parity(parity(model, path, images, "logits", ExportConfig()))
    _, out = quantized(path, images, tmp_path)
    assert distance(run(path, images)["logits"], run(out, images)["logits"]) < 8 * 2 / 255
