"""Optimizer, learning-rate schedule, moving average of weights (EMA) and compilation, as a
:class:`TrainConfig` sets them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from edgekd.config.host import world_size
from edgekd.config.training import TrainConfig
from edgekd.distill.objective import Objective
from edgekd.errors import InputError


class EMA(AveragedModel):
    """An exponential moving average of a network's weights: ``a ← d · a + (1 − d) · w`` after each
    step.

    ``d = min(decay, (1 + t) / (10 + t))`` at the t-th update, so that the first weights do not
    dominate for long; the very first update copies the weights. Buffers of floats (the
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
                update = int(updates)
                torch._foreach_lerp_(average, now, 1 - min(decay, (1 + update) / (10 + update)))
            else:
                torch._foreach_copy_(average, now)

        super().__init__(model, multi_avg_fn=follow, use_buffers=True)


WARM_UP = 0.2
"""The part of a one-cycle training in which the rate rises."""

_START = 1 / 25

_END = 1e-6


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of a step, a function of the step alone: resuming needs no state.

    ``constant``; ``cosine``: half a cosine from the given rate down to almost 0; both after a
    line up from almost 0 over the part ``warm_up`` of the steps. ``one-cycle`` (Smith & Topin
    2018): half a cosine up from 1/25 of the rate, then one down to almost 0.

    Args:
        config: ``schedule`` and its peak, ``learning_rate``; ``warm_up``.
        step: from 0.
        steps: number of steps of the complete training.
    """
    peak = config.learning_rate
    rise = 0 if config.schedule == "one-cycle" else round(config.warm_up * steps)
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        return _half_cosine(peak, peak * _END, (step - rise) / max(1, steps - 1 - rise))
    top = max(1.0, WARM_UP * steps - 1)
    if step <= top:
        return _half_cosine(peak * _START, peak, step / top)
    return _half_cosine(peak, peak * _END, (step - top) / max(1.0, steps - 1 - top))


def _half_cosine(start: float, end: float, part: float) -> float:
    """From ``start`` at 0 to ``end`` at 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, part))) / 2


def build_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; biases and norms are not decayed.

    Raises:
        InputError: there is nothing to train.
    """
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise InputError("the model has no parameters to train", remedy="give another model")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    return torch.optim.SGD(
        groups,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        fused=True,
    )


def compiled(model: nn.Module) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The model's forward, compiled when it is first called.

    Raises:
        InputError: the network cannot be compiled; raised at the first call.
    """
    from torch._dynamo.exc import TorchDynamoException

    network: Any = torch.compile(model)

    def forward(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            outputs: dict[str, Tensor] = network(batch)
        except TorchDynamoException as error:
            raise InputError(
                f"the network cannot be compiled: {str(error).strip().splitlines()[0]}",
                where="compile",
                remedy="set compile: false, or install what it says (on a CPU a C++ compiler)",
            ) from error
        return outputs

    return forward


def check_train_config(config: TrainConfig, objective: Objective, device: torch.device) -> None:
    """Refuse settings that would fail, or silently be ignored, later.

    Raises:
        InputError: float16 on a CPU, ``compile`` where layers are captured or processes share a
            batch, or a warm-up in addition to one-cycle's own.
    """
    if config.precision == "float16" and device.type == "cpu":
        raise InputError(
            "float16 is not trained on a CPU: its gradients are lost to underflow",
            where="precision",
            remedy="use bfloat16 or float32",
        )
    if config.compile and objective.student_layers:
        raise InputError(
            f"the student is to be compiled, and its layers {', '.join(objective.student_layers)} "
            "are compared, which a compiled network does not show",
            where="compile",
            remedy="set compile: false, or use losses on the outputs",
        )
    if config.compile and world_size() > 1:
        raise InputError(
            "compile is for a training in one process",
            where="compile",
            remedy="set compile: false, or start one process",
        )
    if config.warm_up and config.schedule == "one-cycle":
        raise InputError(
            "one-cycle has a warm-up of its own, and another is set",
            where="warm_up",
            remedy="leave warm_up out, or set schedule: cosine",
        )
