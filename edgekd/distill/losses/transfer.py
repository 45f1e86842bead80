"""Transfer losses: two sets of features as one distribution, whatever their samples."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distill.losses.relation import pooled
from edgekd.errors import InputError

BANDWIDTHS = tuple(2.0**power for power in range(-3, 2))
"""The kernels' σ² as parts of the mean squared distance."""


def mk_mmd(student: Tensor, teacher: Tensor) -> Tensor:
    """``E k(s, s') + E k(t, t') − 2 E k(s, t)``, unbiased (DAN, Long et al. 2015; Gretton 2012).

    k is the mean of five Gaussian kernels ``exp(−d² / 2σ²)``, σ² = 1/8 to 2 times the mean squared
    distance of all features, itself without a gradient. Pairs of a sample with itself are left
    out, so that sets of one distribution give 0 on average: it may be below 0, by the more the
    smaller the batch. Scaling, moving or rotating both sets together changes nothing.

    Args:
        student: features (B, F) or more, averaged over positions; one domain.
        teacher: features of the same width; the other domain, of any batch size.

    Raises:
        InputError: the widths differ, or a set has fewer than two samples.
    """
    student, teacher = pooled(student), pooled(teacher)
    if student.shape[1] != teacher.shape[1] or min(len(student), len(teacher)) < 2:
        raise InputError(
            f"features {list(student.shape)} and {list(teacher.shape)} are not two sets of one "
            "width with two samples or more",
            remedy="compare layers of the same width, in batches of at least two",
        )
    both, size = torch.cat([student, teacher]), len(student)
    squared = (both[:, None] - both).square().sum(dim=-1)
    mean = squared.detach().sum() / (len(both) * (len(both) - 1))
    mean = torch.where(mean > 0, mean, 1)
    kernel = sum(
        ((-squared / (2 * part * mean)).exp() for part in BANDWIDTHS), start=torch.zeros_like(mean)
    ) / len(BANDWIDTHS)
    within = _mean_of_others(kernel[:size, :size]) + _mean_of_others(kernel[size:, size:])
    return within - 2 * kernel[:size, size:].mean()


def _mean_of_others(kernel: Tensor) -> Tensor:
    size = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (size * (size - 1))
