"""An exponential moving average of a network's weights over its training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage(AveragedModel):
    """A copy of a network that follows it: ``a ← d · a + (1 − d) · w`` after each step.

    ``d = min(decay, (1 + t) / (10 + t))`` at the t-th update, so that the first weights do not
    count for long; the very first update takes the weights as they are. Buffers of floats (the
    statistics of batch norms) are averaged alike, for they belong to the weights they were
    measured with; integer ones are copied.

    Args:
        model: the network, copied.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def follow(
            average: tuple[Tensor, ...] | list[Tensor],
            now: tuple[Tensor, ...] | list[Tensor],
            updates: Tensor | int,
        ) -> None:
            if average[0].is_floating_point():
                torch._foreach_lerp_(average, now, 1 - decay_at(int(updates), decay))
            else:
                torch._foreach_copy_(average, now)

        super().__init__(model, multi_avg_fn=follow, use_buffers=True)


def decay_at(update: int, decay: float) -> float:
    """The decay of an update, counted from 0."""
    return min(decay, (1 + update) / (10 + update))
