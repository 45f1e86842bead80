"""Networks from images and vectors to actions."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from edgekd.errors import InputError
from edgekd.models.convnet import image_features
from edgekd.models.head import Head, flat_size
from edgekd.spec import TensorSpec


class Policy(nn.Module):
    """Each image through its own convnet, each vector through a linear layer, then a joint trunk.

    Args:
        inputs: at least one image (batch, C, H, W); everything else is flattened to a vector.
        outputs: the action, and whatever else is wanted.
        widths: channels of the image part, see :class:`edgekd.models.convnet.ConvFeatures`.
        blocks: its residual blocks per stage.
        hidden: the width of the vector embedding and of the two layers of the trunk.
        stem_stride: of the image part.
        dropout: in the trunk.

    Raises:
        InputError: there is no image among the inputs, or an input holds integers.
    """

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        widths: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)],
        blocks: tuple[Annotated[int, Field(ge=0)], ...],
        hidden: Annotated[int, Field(gt=0)] = 64,
        stem_stride: Annotated[int, Field(ge=1, le=2)] = 1,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        images = [spec for spec in inputs if len(spec.shape) == 4]
        if not images:
            raise InputError(
                f"a policy network takes an image, and the inputs are "
                f"{', '.join(str(spec) for spec in inputs)}",
                remedy="use the model 'mlp', or name your own by package.module:name",
            )
        for spec in inputs:
            if not spec.dtype.startswith("float"):
                raise InputError(
                    f"a policy network takes numbers, and the input is {spec}",
                    remedy="embed tokens in a network of your own (package.module:name)",
                )
        self.is_image = [len(spec.shape) == 4 for spec in inputs]
        self.encoders = nn.ModuleList()
        width = 0
        for spec, is_image in zip(inputs, self.is_image, strict=True):
            if is_image:
                features = image_features(spec, widths, blocks, stem_stride, residual=True)
                self.encoders.append(features)
                width += features.width
            else:
                self.encoders.append(nn.Sequential(nn.Linear(flat_size(spec), hidden), nn.ReLU()))
                width += hidden
        self.trunk = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
        )
        self.head = Head(hidden, outputs)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The inputs in the order of their specs to the outputs by name."""
        features = [
            encoder(tensor if is_image else tensor.reshape(tensor.shape[0], -1))
            for tensor, is_image, encoder in zip(inputs, self.is_image, self.encoders, strict=True)
        ]
        answers: dict[str, Tensor] = self.head(self.trunk(torch.cat(features, 1)))
        return answers
