"""The families mobilenet and transformer: shapes, learning, pruning, and their ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgekd.config.networks import ModelConfig
from edgekd.config.pipeline import ExportConfig
from edgekd.config.pruning import PruneConfig
from edgekd.errors import InputError
from edgekd.models import DictModel, build_model, count_parameters
from edgekd.onnx.export import export_onnx
from edgekd.onnx.parity import check_parity, parity
from edgekd.spec import TensorSpec
from edgekd.students import prune
from tests.onnx_builders import distance, run, types_of
from tests.quantization.quantizing import quantized

LOGITS = TensorSpec("logits", ("batch", 10))
SMALL: dict[str, dict[str, Any]] = {
    "mobilenet": {"width": 0.25, "depth": 0.5, "expansion": 4},
    "transformer": {"width": 32, "depth": 2},
}
EPOCHS = {"mobilenet": 4, "transformer": 12}


def build(name: str, *shape: int, **args: Any) -> DictModel:
    torch.manual_seed(0)
    given = TensorSpec("image", ("batch", *shape))
    return build_model(ModelConfig(model=name, args=args), (given,), (LOGITS,), where="student")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 9, 13), (1, 28, 28), (3, 96, 130)])
def test_they_take_images_from_8_by_8_and_train(name: str, size: tuple[int, ...]) -> None:
    model = build(name, *size, **SMALL[name])
    model({"image": torch.randn(3, *size)})["logits"].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("mobilenet", "width", (0.5, 1.0, 1.5)),
        ("mobilenet", "depth", (0.5, 1.0, 2.0)),
        ("mobilenet", "expansion", (2, 4, 6)),
        ("transformer", "width", (16, 32, 64)),
        ("transformer", "depth", (1, 2, 4)),
        ("transformer", "expansion", (1, 2, 4)),
    ],
)
def test_each_argument_makes_it_larger(name: str, key: str, values: tuple[Any, ...]) -> None:
    sizes = [count_parameters(build(name, 1, 16, 16, **{key: value})) for value in values]
    assert sizes == sorted(set(sizes))


def test_a_transformer_takes_a_signal_and_loses_no_border() -> None:
    signal = build("transformer", 2, 50, patch=8, width=16)
    x = torch.zeros(2, 2, 50)
    first = signal.eval()({"image": x})["logits"]
    for place in (0, 49):
        changed = x.clone()
        changed[:, :, place] = 5
        assert not torch.allclose(signal({"image": changed})["logits"], first)


@pytest.mark.parametrize(
    ("name", "shape", "args", "says"),
    [
        ("mobilenet", (1, 7, 9), {}, "needs at least 8×8"),
        ("mobilenet", (5,), {}, "takes one image"),
        ("transformer", (5,), {}, "one image .* or one signal"),
        ("transformer", (1, 8, 8), {"heads": 3}, "3 heads cannot share a width of 64"),
        ("transformer", (1, 8, 8), {"patch": 9}, "larger than the input"),
        ("mobilenet", (1, 8, 8), {"width": 0}, "width"),
    ],
)
def test_what_does_not_fit(name: str, shape: tuple[int, ...], args: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(name, *shape, **args)


@pytest.mark.parametrize("name", SMALL)
def test_half_of_the_channels_can_go(name: str) -> None:
    model = build(name, 1, 12, 12, **SMALL[name])
    done = prune(model, PruneConfig(ratio=0.5))
    assert done.parameters[1] < 0.45 * done.parameters[0]
    names = {row.name for row in done.layers}
    assert names >= (
        {"patches", "blocks.1.mlp.0"} if name == "transformer" else {"stem.0", "last.0"}
    )


@pytest.fixture(scope="module", params=SMALL)
def learned(request: pytest.FixtureRequest) -> tuple[DictModel, dict[str, Any], float]:
    """A network trained for a few seconds on digits, test images, and its accuracy there."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    model = build(request.param, 1, 8, 8, **SMALL[request.param])
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS[request.param]):
        for rows in torch.randperm(1400, generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model({"image": x[rows]})["logits"], y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        right = model.eval()({"image": x[1400:]})["logits"].argmax(1) == y[1400:]
    return model, {"image": images[1400:], "label": labels[1400:]}, float(right.float().mean())


def test_it_learns(learned: tuple[DictModel, dict[str, Any], float]) -> None:
    # Ten classes: chance is 0.1. A linear model reaches 0.9.
    assert learned[2] > 0.8


def test_its_onnx_file_computes_the_same_and_in_int8_nearly(
    learned: tuple[DictModel, dict[str, Any], float], tmp_path: Path
) -> None:
    model, data, accuracy = learned
    images, path = {"image": data["image"]}, tmp_path / "m.onnx"
    export_onnx(model, path)
    check_parity(parity(model, path, images, "logits", ExportConfig()))
    _, out = quantized(path, images, tmp_path)
    assert "QuantizeLinear" in types_of(out)
    expected, found = run(path, images)["logits"], run(out, images)["logits"]
    assert distance(expected, found) < 0.2
    assert (found.argmax(1) == data["label"]).mean() > accuracy - 0.03
