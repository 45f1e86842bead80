"""Response losses that compare a batch of predictions as a whole.

Logits (B, C), or (B, T, C) taken as B·T samples. The value of a sample depends on the others in
its batch, so that a loss of half a batch is not half the loss.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from edgekd.distill.adapters import SAME_CLASSES, check_same_shape
from edgekd.distill.losses.response import (
    Temperature,
    log_probabilities,
    soft_labels,
    unit_deviation,
)

Share = Annotated[float, Field(ge=0)]


def dist(
    student: Tensor,
    teacher: Tensor,
    beta: Share = 1.0,
    gamma: Share = 1.0,
    temperature: Temperature = 1.0,
) -> Tensor:
    """``T² · [β · (1 − ρ(rows)) + γ · (1 − ρ(columns))]``: DIST (Huang et al. 2022), ρ
    being Pearson's correlation of the probabilities softmax(z / T).

    A row is a sample's probabilities over the classes, a column a class's over the samples; the
    loss is the mean over them. A row or column that is constant correlates with nothing: ρ = 0.
    One sample alone therefore always pays γ for its columns.

    Args:
        student: logits.
        teacher: logits of the same shape.
        beta: β, the weight of the relation between classes, within each sample.
        gamma: γ, the weight of the relation between samples, within each class.
        temperature: T, at least 1; the authors take 1 for ImageNet and 4 for CIFAR.
    """
    check_same_shape(student, teacher, SAME_CLASSES)
    p = _probabilities(teacher, temperature)
    q = _probabilities(student, temperature)
    return temperature**2 * (beta * _inter_class(q, p) + gamma * _intra_class(q, p))


def mlkd(
    student: Tensor,
    teacher: Tensor,
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (2, 3, 4, 5, 6),
) -> Tensor:
    """``Σ_T [T² · KL + ‖P_tᵀP_t − P_sᵀP_s‖² / C + ‖P_tP_tᵀ − P_sP_sᵀ‖² / B]``: multi-level logit
    distillation (Jin et al. 2023), P being the probabilities softmax(z / T), one row a sample.

    The levels are the sample (KL as in :func:`~edgekd.distill.losses.response.soft_labels`), the
    relation of the classes over the batch, and that of the samples. It is summed over T, so that
    a weight is for this number of temperatures; the class level grows with B², as published.
    One view of the data only: the authors' second, strongly augmented view, and their choice of
    the less confident half, are left out. Takes memory for a matrix (B·T, B·T).

    Args:
        student: logits.
        teacher: logits of the same shape.
        temperatures: at least one, each at least 1.
    """
    check_same_shape(student, teacher, SAME_CLASSES)
    return torch.stack([_levels(student, teacher, each) for each in temperatures]).sum()


def _levels(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = _probabilities(teacher, temperature)
    q = _probabilities(student, temperature)
    sample_level = soft_labels(student, teacher, temperature)
    return sample_level + _gram_difference(q.T, p.T) + _gram_difference(q, p)


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    return log_probabilities(logits, temperature).exp().reshape(-1, logits.shape[-1])


def _inter_class(q: Tensor, p: Tensor) -> Tensor:
    """``1 − ρ``, mean over rows."""
    return 1 - (unit_deviation(q) * unit_deviation(p)).sum(dim=-1).mean()


def _intra_class(q: Tensor, p: Tensor) -> Tensor:
    return _inter_class(q.T, p.T)


def _gram_difference(q: Tensor, p: Tensor) -> Tensor:
    """``‖ppᵀ − qqᵀ‖² / rows``."""
    return (p @ p.T - q @ q.T).square().sum() / len(p)
