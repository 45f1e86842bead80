"""Networks of timm and transformers: missing packages are reported, local folders load and run."""

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from edgekd.config.networks import ModelConfig
from edgekd.errors import InputError
from edgekd.models import build_model, load_weights, save_weights
from edgekd.spec import TensorSpec
from edgekd.stages.training import hub_fingerprint

IMAGE = TensorSpec("image", ("batch", 3, 16, 16))
TOKENS = [
    TensorSpec("input_ids", ("batch", 6), "int64"),
    TensorSpec("attention_mask", ("batch", 6), "int64"),
]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed: pip install 'edgekd[transformers]'",
)


def build(name, inputs=(IMAGE,), classes=5, **args):
    outputs = [TensorSpec("logits", ("batch", classes))]
    return build_model(ModelConfig(model=name, args=args), inputs, outputs, where="teacher")


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_a_missing_package_says_how_to_install_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"not installed[\s\S]*pip install 'edgekd\[{package}\]'"):
        build(f"{package}:anything")


def test_a_package_that_breaks_while_imported_is_no_traceback(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"operator nms does not exist[\s\S]*torchvision"):
        build("timm:resnet18")


@pytest.fixture
def timm(monkeypatch):
    """What the project uses of timm; timm itself needs a torchvision of torch's own build."""
    package = types.ModuleType("timm")
    package.is_model = lambda name: name in ("resnet18", "vit_tiny_patch16_224")
    package.list_models = lambda: ["resnet18", "vgg11"]

    package.get_pretrained_cfg = lambda name, allow_unregistered: types.SimpleNamespace(
        fixed_input_size=name.startswith("vit")
    )

    def create_model(name, pretrained, num_classes, in_chans, width=4, **size):
        package.asked = (name, pretrained, width)
        package.size = size
        return nn.Sequential(
            nn.Conv2d(in_chans, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(width, num_classes),
        )  # fmt: skip

    package.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", package)
    return package


def test_timm_gets_the_channels_and_classes_of_the_data(timm):
    model = build("timm:resnet18", [TensorSpec("image", ("batch", 1, 16, 16))], 7, width=6)
    assert model({"image": torch.zeros(2, 1, 16, 16)})["logits"].shape == (2, 7)
    assert timm.asked == ("resnet18", False, 6)
    build("timm:resnet18", pretrained=True)
    assert timm.asked == ("resnet18", True, 4)


def test_timm_gets_the_images_size_where_it_is_fixed(timm):
    build("timm:vit_tiny_patch16_224")
    assert timm.size == {"img_size": (16, 16)}
    build("timm:vit_tiny_patch16_224", img_size=32)
    assert timm.size == {"img_size": 32}
    build("timm:resnet18")
    assert timm.size == {}


def test_timm_names_are_looked_up_and_only_one_image_fits(timm):
    with pytest.raises(InputError, match="did you mean 'timm:resnet18'"):
        build("timm:resnet81")
    with pytest.raises(InputError, match=r"takes one image[\s\S]*teacher\.model"):
        build("timm:resnet18", [IMAGE, TensorSpec("state", ("batch", 2))])


def test_a_folder_beside_the_pipeline_is_part_of_the_fingerprint(tmp_path, monkeypatch):
    transformers = types.ModuleType("transformers")
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setattr("edgekd.stages.training.library_versions", lambda names: {names[0]: "1"})
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    before = hub_fingerprint("transformers:mine")
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"other weights")
    assert before.keys() == {"transformers", "folder"}
    assert hub_fingerprint("transformers:mine")["folder"] != before["folder"]
    assert hub_fingerprint("transformers:some/name") == {"transformers": "1"}
    assert (
        hub_fingerprint("convnet-s")
        == hub_fingerprint("mine:network")
        == hub_fingerprint(None)
        == {}
    )


@pytest.fixture
def vision(tmp_path):
    """A folder with a tiny vision transformer of 5 classes, and the network itself."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, num_channels=3, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, num_labels=5,
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config).eval()
    network.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", network


@needs_transformers
def test_a_saved_vision_transformer_answers_as_it_did(vision, monkeypatch):
    folder, network = vision
    image = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = network(image).logits
        model = build(f"transformers:{folder}").eval()
        torch.testing.assert_close(model({"image": image})["logits"], expected)
        monkeypatch.syspath_prepend(folder.parent)
        beside = build("transformers:vit", pretrained=False).eval()
        assert not torch.allclose(beside({"image": image})["logits"], expected)
        save_weights(model, folder / "as_edgekd_keeps_them.safetensors")
        load_weights(beside, folder / "as_edgekd_keeps_them.safetensors")
        torch.testing.assert_close(beside({"image": image})["logits"], expected)


@needs_transformers
def test_only_the_head_may_have_another_size(vision):
    folder, network = vision
    model = build(f"transformers:{folder}", classes=9)
    kept = model.module.vit.embeddings.patch_embeddings.projection.weight
    assert torch.equal(kept, network.vit.embeddings.patch_embeddings.projection.weight)
    grey = TensorSpec("image", ("batch", 1, 16, 16))
    with pytest.raises(InputError, match=r"weights of .* do not fit"):
        build(f"transformers:{folder}", [grey])
    fresh = build(f"transformers:{folder}", [grey], pretrained=False)
    assert fresh({"image": torch.zeros(2, 1, 16, 16)})["logits"].shape == (2, 5)


@needs_transformers
def test_unknown_arguments_and_folders_without_weights_are_named(vision):
    folder, _ = vision
    with pytest.raises(InputError, match="has no 'imagesize'"):
        build(f"transformers:{folder}", imagesize=16)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="pretrained: false"):
        build(f"transformers:{folder}")
    with pytest.raises(InputError, match=r"images or integer tokens"):
        build(f"transformers:{folder}", [TensorSpec("state", ("batch", 4))])


@needs_transformers
def test_tokens_and_their_mask_reach_a_text_classifier(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = build(f"transformers:{tmp_path}", TOKENS, 3).eval()
    ids, mask = torch.randint(1, 30, (4, 6)), torch.ones(4, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    other = ids.clone()
    other[:, 4:] = 0
    with torch.no_grad():
        one = model({"input_ids": ids, "attention_mask": mask})["logits"]
        two = model({"input_ids": other, "attention_mask": mask})["logits"]
        unmasked = model({"input_ids": ids, "attention_mask": torch.ones_like(mask)})["logits"]
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, unmasked)
