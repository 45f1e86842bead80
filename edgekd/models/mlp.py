"""A multilayer perceptron over all inputs together."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from edgekd.models.head import Head, flat_size
from edgekd.spec import TensorSpec


class Mlp(nn.Module):
    """All inputs, flattened and put side by side, to the outputs.

    Args:
        inputs: of any shape; integers are taken as numbers.
        outputs: what it gives.
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
        answers: dict[str, Tensor] = self.head(self.layers(together))
        return answers
