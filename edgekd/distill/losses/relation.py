"""Losses on relations between samples, and (``mk_mmd``) on the distributions of their features.

Each takes features of any layout and of different widths and gives a scalar; only the batch must
be the same. (B, F), (B, T, F) and (B, C, ...) are averaged over positions to one vector per
sample, except in :func:`sp`, which compares complete feature maps. Means run over all pairs
(triplets) of the batch, a sample with itself included, as in the authors' code for which the
published weights are.

Half precision is widened, and autocast switched off: a product of feature maps overflows 16 bits.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from edgekd.distill.features import check_same_shape
from edgekd.distill.losses import traits
from edgekd.errors import InputError
from edgekd.tasks.losses import at_least_float32

Factor = Annotated[float, Field(ge=0)]

Width = Annotated[int, Field(ge=1)]


class Correlation(nn.Module):
    """:func:`correlation` of linear embeddings of both features, trained with the student.

    Args:
        student: shape of the student's feature.
        teacher: shape of the teacher's feature; its width may differ.
        embedding: the common width.
    """

    def __init__(
        self, student: tuple[int, ...], teacher: tuple[int, ...], embedding: Width = 128
    ) -> None:
        super().__init__()
        self.student = nn.Linear(pooled_width(student), embedding)
        self.teacher = nn.Linear(pooled_width(teacher), embedding)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one batch, a scalar."""
        return correlation(
            self.student(pooled(student).to(self.student.weight.dtype)),
            self.teacher(pooled(teacher).to(self.teacher.weight.dtype)),
        )


def correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of ``δ_i · δ_{i+1}`` with ``δ_i = |s_i − t_i|`` (CC, Peng et al. 2019).

    Neighbours of a shuffled batch stand for all pairs; the batch's order therefore matters.
    Equal features give 0, a batch of one gives 0.

    Args:
        student: features, averaged over positions.
        teacher: features of the same width.
    """
    student, teacher = pooled(student), pooled(teacher)
    check_same_shape(student, teacher)
    apart = (student - teacher).abs()
    return (apart[:-1] * apart[1:]).sum() / max(len(apart) - 1, 1)


@traits(needs_full_logits=False)
def rkd(student: Tensor, teacher: Tensor, distance: Factor = 25.0, angle: Factor = 50.0) -> Tensor:
    """Smooth L1 of pairwise distances and of angles in triplets (RKD, Park et al. 2019, eq. 5-9).

    Distances are divided by their mean over the batch, so scaling, moving or rotating all features
    of one network changes nothing. A pair that is equal within rounding has distance 0, spans no
    angle and passes no gradient. Memory grows as B²·F + B³.

    Args:
        student: features, averaged over positions and not normalised.
        teacher: features of the same batch.
        distance: factor of the distances' part.
        angle: factor of the angles' part.
    """
    student, teacher = _same_batch(pooled(student), pooled(teacher))
    student_distances, student_angles = _distances_and_angles(student)
    teacher_distances, teacher_angles = _distances_and_angles(teacher)
    return distance * smooth_l1_loss(student_distances, teacher_distances) + angle * smooth_l1_loss(
        student_angles, teacher_angles
    )


@traits(needs_full_logits=False)
def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """``‖rows(G_s) − rows(G_t)‖²_F / B²``, G = QQᵀ (SP, Tung & Mori 2019, eq. 1-4).

    Q is the batch's flattened feature maps, rows() divides each row by its L2 norm. Scaling all
    features of one network changes nothing.

    Args:
        student: features (B, ...).
        teacher: features of the same batch.
    """
    student, teacher = _same_batch(student, teacher)
    rows = (unit(_gram(at_least_float32(maps).flatten(1))) for maps in (student, teacher))
    return (next(rows) - next(rows)).square().mean()


@traits(needs_full_logits=False)
def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean of p_t · log(p_t / p_s)``, p the row-normalised cosines (PKT, Passalis & Tefas 2018).

    ``p_ij = k_ij / Σ_j k_ij``, ``k_ij = (cos(x_i, x_j) + 1) / 2`` (eq. 6). Scaling any sample's
    features changes nothing.

    Args:
        student: features, averaged over positions.
        teacher: features of the same batch.
    """
    student, teacher = _same_batch(pooled(student), pooled(teacher))
    p_student, p_teacher = _neighbour_probability(student), _neighbour_probability(teacher)
    return (p_teacher * ((p_teacher + _EPS) / (p_student + _EPS)).log()).mean()


_EPS = 1e-7
"""Opposite samples have probability 0; the authors' value."""


def pooled(features: Tensor) -> Tensor:
    """One vector per sample, (B, F): the mean over the positions of (B, T, F) or (B, C, ...).

    Raises:
        InputError: no feature dimension.
    """
    pooled_width(features.shape)
    features = at_least_float32(features)
    if features.ndim == 2:
        return features
    return features.mean(dim=1) if features.ndim == 3 else features.flatten(2).mean(dim=2)


def pooled_width(shape: tuple[int, ...]) -> int:
    """The F that :func:`pooled` gives for features of this shape."""
    if len(shape) < 2:
        raise InputError(
            f"features {list(shape)} have no width",
            remedy="name a layer that gives (B, F), (B, T, F) or (B, C, H, W)",
        )
    return shape[1] if len(shape) > 3 else shape[-1]


def unit(vectors: Tensor, floor: Tensor | float = 0.0) -> Tensor:
    """Vectors (..., F) over their L2 norms; 0, without a gradient, for a squared norm ≤ floor.

    Dividing by a small constant instead would multiply the gradient of a dead feature by 1e12.
    """
    squared = vectors.square().sum(dim=-1, keepdim=True)
    nonzero = squared > floor
    return torch.where(nonzero, vectors, 0) * torch.where(nonzero, squared, 1).rsqrt()


def _distances_and_angles(features: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (B, B) over their mean, and cosines (B, B, B) at the first index's sample."""
    differences = features[None, :] - features[:, None]
    squared = differences.square().sum(dim=-1)
    floor = squared.detach().mean() * torch.finfo(squared.dtype).eps ** 2
    apart = squared > floor
    distances = torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1), _gram(unit(differences, floor))


def _neighbour_probability(features: Tensor) -> Tensor:
    kernel = (_gram(unit(features)).clamp(-1, 1) + 1) / 2
    return kernel / kernel.sum(dim=1, keepdim=True)


def _gram(vectors: Tensor) -> Tensor:
    with torch.autocast(vectors.device.type, enabled=False):
        return vectors @ vectors.mT


def _same_batch(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if len(student) != len(teacher):
        raise InputError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in the batch",
            remedy="both must see the same samples",
        )
    return student, teacher


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
