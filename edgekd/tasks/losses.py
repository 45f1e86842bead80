"""Losses against the data's own targets, shared by the tasks and by the objective's terms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekd.errors import InputError
from edgekd.spec import UNLABELLED

Distance = Literal["mse", "mae", "l1", "huber"]
"""``l1`` is another name of ``mae``."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened to float32; float32 and float64 unchanged.

    A sum of exponentials over classes loses too much, or overflows, in 16 bits.
    """
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits (B, ..., C), mean over all but C.

    Args:
        logits: (B, ..., C).
        target: integer classes (B, ...), of which those below 0 are unlabelled and excluded from
            the mean (none left gives 0); or class probabilities of the logits' own shape, where
            a row of zeros is unlabelled.
        label_smoothing: the part of the probability spread evenly over all classes.

    Raises:
        InputError: the target is neither.
    """
    logits = at_least_float32(logits)
    rows = logits.reshape(-1, logits.shape[-1])
    if target.is_floating_point() and target.shape == logits.shape:
        mixture = target.to(logits.dtype).reshape(rows.shape)
        mass = mixture.sum(dim=-1, keepdim=True)
        smoothed = (1 - label_smoothing) * mixture + label_smoothing * mass / rows.shape[-1]
        costs = -(smoothed * F.log_softmax(rows, dim=-1)).sum(dim=-1)
        return costs.sum() / (mass > 0).sum().clamp(min=1)
    classes = class_numbers(logits, target).reshape(-1)
    summed = F.cross_entropy(
        rows,
        classes.clamp(min=UNLABELLED),
        ignore_index=UNLABELLED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return summed / (classes >= 0).sum().clamp(min=1)


def class_numbers(logits: Tensor, target: Tensor) -> Tensor:
    """The target as int64 classes, one for each row of logits (B, ..., C).

    Raises:
        InputError: the target is not integer, or its shape is not the logits' without C.
    """
    if target.is_floating_point():
        raise InputError(
            f"labels must be integers, and they are {str(target.dtype).removeprefix('torch.')}",
            remedy="for continuous targets use the losses target_regression and output_regression",
        )
    if target.shape != logits.shape[:-1]:
        raise InputError(
            f"logits {list(logits.shape)} do not fit labels {list(target.shape)}",
            remedy=f"labels must have the shape {list(logits.shape[:-1])}",
        )
    return target.long()


def distance(
    prediction: Tensor, target: Tensor, kind: Distance = "mse", mask: Tensor | None = None
) -> Tensor:
    """Mean squared, mean absolute or Huber (δ = 1) error over the unmasked elements.

    Args:
        prediction: (B, ...).
        target: the same shape; (B,) also fits a prediction (B, 1).
        kind: ``mse``, ``mae`` (or ``l1``) or ``huber``.
        mask: nonzero where an element counts; (B,), (B, T) or the full shape. With a mask the
            mean is over the selected elements, 0 without any.

    Raises:
        InputError: the shapes differ; broadcasting would silently give a wrong loss.
    """
    prediction = at_least_float32(prediction)
    target = align(target.to(prediction.dtype), prediction)
    if mask is None:
        return _error(prediction, target, kind).mean()
    selected = expand_mask(mask, target)
    # Padding may hold NaN, whose gradient survives a product with 0: it is replaced beforehand.
    target = torch.where(selected, target, prediction.detach())
    return _error(prediction, target, kind).sum() / selected.sum().clamp(min=1)


def _error(prediction: Tensor, target: Tensor, kind: Distance) -> Tensor:
    if kind == "mse":
        return (prediction - target).square()
    if kind in ("mae", "l1"):
        return (prediction - target).abs()
    return F.huber_loss(prediction, target, reduction="none")


def align(target: Tensor, prediction: Tensor) -> Tensor:
    """The target in the prediction's shape, where they differ by a last dimension of 1 only."""
    if target.shape == prediction.shape:
        return target
    if prediction.shape == (*target.shape, 1):
        return target.unsqueeze(-1)
    raise InputError(
        f"prediction {list(prediction.shape)} does not fit target {list(target.shape)}",
        remedy="the model's output must have the shape of the target",
    )


def expand_mask(mask: Tensor, values: Tensor) -> Tensor:
    """A mask over the leading dimensions as a boolean mask over every element."""
    if mask.shape != values.shape[: mask.ndim]:
        raise InputError(
            f"mask {list(mask.shape)} does not fit target {list(values.shape)}",
            remedy="a mask has the shape of the target, or of its leading dimensions",
        )
    trailing = (1,) * (values.ndim - mask.ndim)
    return (mask != 0).reshape(*mask.shape, *trailing).expand_as(values)
