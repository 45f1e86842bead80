"""The built-in networks: MLP, ConvNet and policy, and their heads.

A 3×3 stem, stages that halve the image, each with optional residual or plain blocks, the mean
over positions, a linear layer. Convolutions have no bias: a batch norm follows each of them, and
both become one operation in the exported file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import InputError
from edgekd.spec import TensorSpec


class Head(nn.Module):
    """Features (B, F) to each output in its shape.

    Raises:
        InputError: an output has a symbolic dimension other than the batch.
    """

    def __init__(self, features: int, outputs: Sequence[TensorSpec]) -> None:
        super().__init__()
        self.names = [spec.name for spec in outputs]
        self.shapes = [_fixed(spec) for spec in outputs]
        self.linear = nn.ModuleList(nn.Linear(features, math.prod(s)) for s in self.shapes)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        outputs = {}
        for name, shape, linear in zip(self.names, self.shapes, self.linear, strict=True):
            flat = linear(features)
            outputs[name] = flat if len(shape) == 1 else flat.reshape(-1, *shape)
        return outputs


def _fixed(spec: TensorSpec) -> tuple[int, ...]:
    sizes = tuple(size for size in spec.sample_shape if isinstance(size, int))
    if len(sizes) != len(spec.sample_shape):
        raise InputError(
            f"a built-in network cannot give {spec}: only the batch may be of any size",
            remedy="name your own network by package.module:name",
        )
    return sizes


def flat_size(spec: TensorSpec) -> int:
    """Number of elements of one sample of a tensor."""
    return math.prod(_fixed(spec))


class Mlp(nn.Module):
    """All inputs, flattened and concatenated, to the outputs.

    Args:
        inputs: of any shape; integers are converted to floats.
        outputs: the output specs.
        hidden: the width of each hidden layer; empty for a linear model.
        dropout: after each hidden layer.
    """

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        hidden: tuple[Annotated[int, Field(gt=0)], ...] = (128, 128),
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        width = sum(flat_size(spec) for spec in inputs)
        layers: list[nn.Module] = []
        for wider in hidden:
            layers += [nn.Linear(width, wider), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = wider
        self.layers = nn.Sequential(*layers)
        self.head = Head(width, outputs)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The inputs in the order of their specs, each (B, ...), to the outputs by name."""
        flat = [tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in inputs]
        together = torch.cat([tensor.float() for tensor in flat], 1)
        outputs: dict[str, Tensor] = self.head(self.layers(together))
        return outputs


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
    blocks: Sequence[int] | int,
    stem_stride: int,
    residual: bool,
) -> ConvFeatures:
    """The convolutional part for an image input; one number of ``blocks`` is that of each stage.

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
    if isinstance(blocks, int):
        blocks = (blocks,) * (len(widths) - 1)
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
        blocks: tuple[Annotated[int, Field(ge=0)], ...] | Annotated[int, Field(ge=0)],
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
        outputs: dict[str, Tensor] = self.head(self.dropout(self.features(image)))
        return outputs


class PolicyNetwork(nn.Module):
    """Each image through its own convnet, each vector through a linear layer, then a joint trunk.

    Args:
        inputs: at least one image (batch, C, H, W); everything else is flattened to a vector.
        outputs: the action, and any further outputs.
        widths: channels of the image part, see :class:`edgekd.models.networks.ConvFeatures`.
        blocks: its residual blocks per stage.
        hidden: the width of the vector embedding and of the two layers of the trunk.
        stem_stride: of the image part.
        dropout: in the trunk.

    Raises:
        InputError: there is no image among the inputs, or an input has integers.
    """

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        widths: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)],
        blocks: tuple[Annotated[int, Field(ge=0)], ...] | Annotated[int, Field(ge=0)],
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
        outputs: dict[str, Tensor] = self.head(self.trunk(torch.cat(features, 1)))
        return outputs
