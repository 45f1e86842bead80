"""Built-in families beside the convnets: a MobileNet-like one and a small transformer.

Both scale by ``width`` and ``depth``, and use only what exports to ONNX, quantizes to INT8 and can
be pruned.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import InputError
from edgekd.models.networks import Head
from edgekd.spec import TensorSpec

_SMALLEST_SIDE = 8
_SMALLEST_SIDE_TO_STRIDE_STEM = 64
_SMALLEST_SIDE_TO_STRIDE = 6
_STAGES = ((16, 1, 1, 1), (24, 6, 2, 2), (32, 6, 3, 2), (64, 6, 3, 2), (96, 6, 2, 1))
"""Channels, expansion, blocks and stride of each stage, after MobileNetV2's first five."""
_STEM, _LAST = 16, 256


def _conv_bn(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Convolution, batch norm and, where wanted, ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU6()] if act else []))


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, linear 1×1 projection; a shortcut where the shape is the same.

    Sandler et al., MobileNetV2, 2018.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        expansion: channels of the middle by those of the input; 1 leaves the expansion out.
        stride: of the depthwise convolution.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        self.expand = _conv_bn(inputs, hidden) if expansion > 1 else nn.Identity()
        self.depthwise = _conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.project = _conv_bn(hidden, outputs, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/stride, W/stride)."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """An image to the outputs by inverted residuals, as MobileNetV2, for images from 8×8 up.

    Small images are halved less often: the stem's and the stages' strides are 1 where the image
    would become too small.

    Args:
        inputs: one image (batch, C, H, W).
        outputs: the output specs.
        width: multiplies the channels, which stay multiples of 8.
        depth: multiplies the blocks of each stage, rounded, at least 1.
        expansion: of the blocks after the first stage.
        dropout: before the last layer.

    Raises:
        InputError: the input is no image, or too small.
    """

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        width: Annotated[float, Field(gt=0)] = 1.0,
        depth: Annotated[float, Field(gt=0)] = 1.0,
        expansion: Annotated[int, Field(ge=1)] = 6,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        channels, side = _image_of(inputs, "mobilenet")

        def scaled(count: int) -> int:
            return max(8, int(count * width / 8 + 0.5) * 8)

        stride = 2 if side >= _SMALLEST_SIDE_TO_STRIDE_STEM else 1
        side = -(-side // stride)
        size = scaled(_STEM)
        self.stem = _conv_bn(channels, size, 3, stride)
        blocks: list[nn.Module] = []
        for count, wider, repeats, wanted in _STAGES:
            for number in range(max(1, int(repeats * depth + 0.5))):
                stride = wanted if number == 0 and side >= _SMALLEST_SIDE_TO_STRIDE else 1
                by = 1 if wider == 1 else expansion
                blocks.append(InvertedResidual(size, scaled(count), by, stride))
                side, size = -(-side // stride), scaled(count)
        self.blocks = nn.Sequential(*blocks)
        self.last = _conv_bn(size, scaled(_LAST))
        self.dropout = nn.Dropout(dropout)
        self.head = Head(scaled(_LAST), outputs)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) to the outputs by name."""
        features = self.last(self.blocks(self.stem(image))).mean((2, 3))
        outputs: dict[str, Tensor] = self.head(self.dropout(features))
        return outputs


class Attention(nn.Module):
    """Multi-head self-attention with query, key and value as layers of their own.

    Args:
        width: of the tokens.
        heads: their number; each has ``width / heads`` channels.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same shape."""

        def split(y: Tensor) -> Tensor:
            # The heads of a pruned layer are narrower.
            return torch.unflatten(y, 2, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        y: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return y


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        width: of the tokens.
        heads: of the attention.
        hidden: of the two-layer perceptron.
        dropout: after each of both.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        y: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return y


class Transformer(nn.Module):
    """Patches of an image, or pieces of a signal, as the tokens of a small transformer.

    As a vision transformer (Dosovitskiy et al. 2021) with learned positions, whose outputs are read
    from the mean over the tokens.

    Args:
        inputs: one image (batch, C, H, W), or one signal (batch, C, T).
        outputs: the output specs.
        width: of the tokens, a multiple of ``heads``.
        depth: the number of blocks.
        heads: of the attention.
        expansion: the perceptrons' width by the tokens'.
        patch: the side of a patch, or the length of a piece. Left out: the power of two with
            about 7 along the shorter side of an image, or 32 in a signal.
        dropout: in the blocks.

    Raises:
        InputError: the input is neither, or the numbers do not fit.
    """

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        width: Annotated[int, Field(gt=0)] = 64,
        depth: Annotated[int, Field(gt=0)] = 4,
        heads: Annotated[int, Field(gt=0)] = 4,
        expansion: Annotated[float, Field(gt=0)] = 2.0,
        patch: Annotated[int, Field(gt=0)] | None = None,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        super().__init__()
        spec = inputs[0]
        sizes = [size for size in spec.shape[1:] if isinstance(size, int)]
        floats = spec.dtype.startswith("float")
        if len(inputs) != 1 or not floats or len(spec.shape) not in (3, 4) or len(sizes) < 2:
            raise InputError(
                "a transformer takes one image (batch, channels, height, width) or one signal "
                f"(batch, channels, time) of numbers, and the data give "
                f"{', '.join(map(str, inputs))}",
                remedy="use another model, or name your own by package.module:name",
            )
        if width % heads:
            raise InputError(
                f"{heads} heads cannot share a width of {width}",
                remedy=f"give a width that is a multiple of {heads}, or other heads",
            )
        channels, *lengths = sizes
        if patch is None:
            image = len(lengths) == 2
            nearest = round(math.log2(min(lengths) / (7 if image else 32)))
            patch = min(max(2 ** max(0, nearest), 2 if image else 1), *lengths)
        if patch > min(lengths):
            raise InputError(
                f"a patch of {patch} is larger than the input {spec}", remedy="give a smaller patch"
            )
        # Sizes that the patch does not divide lose no border.
        padding = [(-length % patch) for length in reversed(lengths)]
        self.padding = [pad for extra in padding for pad in (extra // 2, extra - extra // 2)]
        tokens = 1
        for length in lengths:
            tokens *= -(-length // patch)
        kind = nn.Conv2d if len(lengths) == 2 else nn.Conv1d
        self.patches = kind(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, int(width * expansion), dropout) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = Head(width, outputs)

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) or (B, C, T) to the outputs by name."""
        if any(self.padding):
            values = F.pad(values, self.padding)
        tokens = self.patches(values).flatten(2).transpose(1, 2)
        features = self.norm(self.blocks(tokens + self.positions)).mean(1)
        outputs: dict[str, Tensor] = self.head(features)
        return outputs


def _image_of(inputs: tuple[TensorSpec, ...], name: str) -> tuple[int, int]:
    """The channels and the shorter side of the only input, an image."""
    sizes = [size for size in inputs[0].shape[1:] if isinstance(size, int)]
    if len(inputs) != 1 or len(sizes) != 3 or not inputs[0].dtype.startswith("float"):
        raise InputError(
            f"a {name} takes one image (batch, channels, height, width), and the data give "
            f"{', '.join(map(str, inputs))}",
            remedy="use the model 'mlp' for vectors, or name your own by package.module:name",
        )
    if min(sizes[1:]) < _SMALLEST_SIDE:
        raise InputError(
            f"the image is {sizes[1]}×{sizes[2]}, and a {name} needs at least "
            f"{_SMALLEST_SIDE}×{_SMALLEST_SIDE}",
            remedy="enlarge it with data.image_size, or use the model 'mlp'",
        )
    return sizes[0], min(sizes[1:])
