"""The last layer of the built-in networks: one linear map per named output."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

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
        answers = {}
        for name, shape, linear in zip(self.names, self.shapes, self.linear, strict=True):
            flat = linear(features)
            answers[name] = flat if len(shape) == 1 else flat.reshape(-1, *shape)
        return answers


def _fixed(spec: TensorSpec) -> tuple[int, ...]:
    sizes = tuple(size for size in spec.sample_shape if isinstance(size, int))
    if len(sizes) != len(spec.sample_shape):
        raise InputError(
            f"a built-in network cannot give {spec}: only the batch may be of any size",
            remedy="name your own network by package.module:name",
        )
    return sizes


def flat_size(spec: TensorSpec) -> int:
    """How many numbers one sample of a tensor holds."""
    return math.prod(_fixed(spec))
