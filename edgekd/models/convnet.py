"""Small convolutional networks for images from 8×8 upward.

A 3×3 stem, stages that halve the image, each with optional residual or plain blocks, the mean
over positions, a linear layer. Convolutions have no bias: a batch norm follows each of them, and
both become one operation in the exported file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import InputError
from edgekd.models.head import Head
from edgekd.spec import TensorSpec

SMALLEST_SIDE = 8
_LARGEST_SIDE_AFTER_STEM = 64
_SMALLEST_SIDE_TO_STRIDE_STEM = 16
_SMALLEST_SIDE_TO_STRIDE = 4


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3×3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_bn_relu(channels, channels)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return F.relu(x + self.second(self.first(x)))


class ConvFeatures(nn.Module):
    """An image (B, C, H, W) to features (B, ``widths[-1]``).

    Args:
        channels: C.
        side: the shorter side of the image; it decides how often the image can be halved.
        widths: channels of the stem and of each stage.
        blocks: blocks of each stage; one fewer than ``widths``.
        stem_stride: 2 halves the image already in the stem, from a side of 16 upward. Images
            whose side is above 64 after the stem are always halved until it is not.
        residual: blocks with a shortcut, or plain convolutions.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        stem_stride: int,
        residual: bool,
    ) -> None:
        super().__init__()
        strided = side > _LARGEST_SIDE_AFTER_STEM or (
            stem_stride == 2 and side >= _SMALLEST_SIDE_TO_STRIDE_STEM
        )
        layers: list[nn.Module] = [conv_bn_relu(channels, widths[0], 2 if strided else 1)]
        side = _halved(side) if strided else side
        while side > _LARGEST_SIDE_AFTER_STEM:
            layers.append(conv_bn_relu(widths[0], widths[0], 2))
            side = _halved(side)
        width = widths[0]
        for wider, count in zip(widths[1:], blocks, strict=True):
            stride = 2 if side >= _SMALLEST_SIDE_TO_STRIDE else 1
            layers.append(conv_bn_relu(width, wider, stride))
            side = _halved(side) if stride == 2 else side
            width = wider
            for _ in range(count):
                layers.append(Residual(width) if residual else conv_bn_relu(width, width))
        self.layers = nn.Sequential(*layers)
        self.width = width

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to (B, F)."""
        features: Tensor = self.layers(image)
        return features.mean((2, 3))


def _halved(side: int) -> int:
    return (side + 1) // 2


def image_features(
    spec: TensorSpec,
    widths: Sequence[int],
    blocks: Sequence[int],
    stem_stride: int,
    residual: bool,
) -> ConvFeatures:
    """The convolutional part for an image input.

    Raises:
        InputError: the input is no image, is too small, or widths and blocks do not fit.
    """
    if len(spec.shape) != 4 or not all(isinstance(size, int) for size in spec.shape[1:]):
        raise InputError(
            f"a convnet takes an image (batch, channels, height, width), and the input is {spec}",
            remedy="use the model 'mlp' for vectors, or name your own by package.module:name",
        )
    channels, height, width = (int(size) for size in spec.shape[1:])
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(
            f"the image is {height}×{width}, and a convnet needs at least "
            f"{SMALLEST_SIDE}×{SMALLEST_SIDE}",
            remedy=f"enlarge it with data.image_size: [{SMALLEST_SIDE}, {SMALLEST_SIDE}], "
            "or use the model 'mlp'",
        )
    if len(widths) != len(blocks) + 1:
        raise InputError(
            f"{len(widths)} widths need {len(widths) - 1} blocks, and there are {len(blocks)}",
            remedy="widths are those of the stem and of each stage, blocks those of each stage",
        )
    return ConvFeatures(channels, min(height, width), widths, blocks, stem_stride, residual)


class ConvNet(nn.Module):
    """One image to the outputs; see :class:`ConvFeatures` for the arguments."""

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        widths: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)],
        blocks: tuple[Annotated[int, Field(ge=0)], ...],
        stem_stride: Annotated[int, Field(ge=1, le=2)] = 1,
        residual: bool = False,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        if len(inputs) != 1:
            raise InputError(
                f"a convnet takes one image, and the data have {len(inputs)} inputs: "
                f"{', '.join(str(spec) for spec in inputs)}",
                remedy="use policy-l or policy-s, or name your own by package.module:name",
            )
        self.features = image_features(inputs[0], widths, blocks, stem_stride, residual)
        self.dropout = nn.Dropout(dropout)
        self.head = Head(self.features.width, outputs)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) to the outputs by name."""
        answers: dict[str, Tensor] = self.head(self.dropout(self.features(image)))
        return answers
