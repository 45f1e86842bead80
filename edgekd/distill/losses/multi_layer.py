"""Losses on several layers at once, in the order in which they are named: from shallow to deep.

Lists of maps (B, C, H, W), as many of the student as of the teacher. Each gives a scalar. The pure
functions compare equal shapes unless they say otherwise; the classes of the same name adapt the
student to the teacher's shapes with trained modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.distill.features import (
    Shape,
    adapter,
    check_maps,
    check_same_kind,
    check_same_shape,
    pool_to_smaller,
    smaller_size,
)
from edgekd.errors import InputError
from edgekd.tasks.losses import at_least_float32

_DEEPEST_WIDTH = 512
_LEVELS = (4, 2, 1)
"""The heights and widths to which the hierarchical context loss pools."""


class Fsp(nn.Module):
    """:func:`fsp` of the adapted student: the paper has equal channels and needs no adapter.

    Args:
        student: the captured shapes.
        teacher: the captured shapes.
    """

    def __init__(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        super().__init__()
        _check_lists(student, teacher, least=2)
        self.adapters = nn.ModuleList(adapter(s, t) for s, t in zip(student, teacher, strict=True))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar."""
        adapted = [
            adapt(at_least_float32(feature))
            for adapt, feature in zip(self.adapters, student, strict=True)
        ]
        return fsp(adapted, teacher)


def fsp(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``Σ mean (G_s − G_t)²``, ``G = F₁ᵀ F₂ / (H·W)`` (flow of solution, Yim et al. 2017,
    equations 1 and 2).

    The sum is over neighbours in the list, the mean over samples and over the elements of a Gram
    matrix, where the paper has their sum. The equations are for maps of one size: of two neighbours
    the larger is max-pooled to the smaller's, as in the paper's section 4 (RepDistiller averages).
    The student's sizes may differ from the teacher's.

    Args:
        student: at least 2 maps.
        teacher: as many maps, with the same channels.
    """
    _check_lists(student, teacher, least=2)
    for s, t in zip(student, teacher, strict=True):
        check_maps(s, t)
    total = at_least_float32(student[0]).new_zeros(())
    for of_student, of_teacher in zip(pairwise(student), pairwise(teacher), strict=True):
        gram_s, gram_t = _gram(*of_student), _gram(*of_teacher)
        check_same_shape(gram_s, gram_t)
        total = total + F.mse_loss(gram_s, gram_t)
    return total


def _gram(first: Tensor, second: Tensor) -> Tensor:
    """The Gram matrices (B, C, C') of two maps of a network."""
    size = smaller_size(first, second)
    x, y = (
        F.adaptive_max_pool2d(at_least_float32(feature), size).flatten(2)
        for feature in (first, second)
    )
    return torch.bmm(x, y.mT) / x.shape[2]


class Ofd(nn.Module):
    """:func:`ofd` of the adapted student; maps are averaged down to the smaller size.

    The adapter, a 1x1 convolution with batch norm, is there even for equal channels (Heo et al.
    2019, section 3.1).

    Args:
        student: the captured shapes.
        teacher: the captured shapes.
    """

    def __init__(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
        super().__init__()
        _check_lists(student, teacher, least=1)
        self.adapters = nn.ModuleList(
            adapter(s, t, always=True) for s, t in zip(student, teacher, strict=True)
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar."""
        pairs = [
            pool_to_smaller(at_least_float32(s), at_least_float32(t))
            for s, t in zip(student, teacher, strict=True)
        ]
        adapted = [adapt(s) for adapt, (s, _) in zip(self.adapters, pairs, strict=True)]
        return ofd(adapted, [t for _, t in pairs])


def ofd(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``Σ_i 2^(i+1−n) · d(f_s, max(f_t, m))`` on features before their ReLU (Heo et al. 2019).

    d is the squared distance, but for elements where ``f_s ≤ f_t ≤ 0``, which count 0: the ReLU
    makes them equal anyway. A sum over channels and positions, a mean over samples, hence the
    paper's weight of 0.001; the deepest of n layers counts 1, each shallower one half.

    The margin m of a channel is the mean of its negative values, here those of the batch; the
    paper derives the same from the scale and shift of the teacher's batch norm, which a captured
    feature does not have. A channel without negative values needs no margin.

    Args:
        student: at least 1 map.
        teacher: maps of the same shapes.
    """
    _check_lists(student, teacher, least=1)
    total = at_least_float32(student[0]).new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        total = 0.5 * total + _partial_l2(s, t)
    return total


def _partial_l2(student: Tensor, teacher: Tensor) -> Tensor:
    check_maps(student, teacher)
    check_same_shape(student, teacher)
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    target = torch.maximum(teacher, _margin(teacher))
    counts = (target > 0) | (student > target)
    return torch.where(counts, (student - target).square(), 0.0).sum() / len(student)


def _margin(teacher: Tensor) -> Tensor:
    """``E[f | f < 0]`` of each channel over the batch, (1, C, 1, 1)."""
    dims = (0, 2, 3)
    number = (teacher < 0).sum(dim=dims, keepdim=True).clamp(min=1)
    return teacher.clamp(max=0).sum(dim=dims, keepdim=True) / number


class AttentionFusion(nn.Module):
    """One level of knowledge review (Chen et al. 2021, section 3.3): a layer and all deeper ones.

    The layer and the fused feature of the deeper levels are weighted, position by position, by two
    attention maps made from both, and added.

    Args:
        student: the student's channels.
        teacher: the output channels.
        width: the channels in which levels are fused.
        deepest: there is no deeper level; the layer is passed on unchanged.
    """

    def __init__(self, student: int, teacher: int, width: int, deepest: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(student, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attend = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        self.widen = nn.Sequential(
            nn.Conv2d(width, teacher, 3, padding=1, bias=False), nn.BatchNorm2d(teacher)
        )

    def forward(
        self, feature: Tensor, deeper: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The level's output and the fused feature for the next shallower level.

        Args:
            feature: the student's layer (B, C, H, W).
            deeper: the fused feature of the next deeper level; None for the deepest.
            size: the teacher's height and width.

        Returns:
            (B, teacher, *size) and (B, width, *size).
        """
        fused: Tensor = self.narrow(feature)
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, size=fused.shape[2:], mode="nearest")
            own, other = self.attend(torch.cat([fused, deeper], dim=1)).split(1, dim=1)
            fused = own * fused + other * deeper
        if fused.shape[2:] != size:
            fused = F.interpolate(fused, size=size, mode="nearest")
        return self.widen(fused), fused


class Review(nn.Module):
    """:func:`review` of the student's layers, each fused with all deeper ones.

    Args:
        student: the captured shapes, from shallow to deep.
        teacher: the captured shapes.
        width: the channels in which levels are fused; those of the student's deepest layer, at
            most 512, when not given.
    """

    def __init__(
        self,
        student: Sequence[Shape],
        teacher: Sequence[Shape],
        width: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        super().__init__()
        _check_lists(student, teacher, least=1)
        for s, t in zip(student, teacher, strict=True):
            check_same_kind(s, t)
        width = width or min(_DEEPEST_WIDTH, student[-1][1])
        self.levels = nn.ModuleList(
            AttentionFusion(s[1], t[1], width, deepest=index == len(student) - 1)
            for index, (s, t) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar."""
        fused: list[Tensor] = []
        deeper: Tensor | None = None
        for level, s, t in reversed(list(zip(self.levels, student, teacher, strict=True))):
            check_maps(s, t)
            adapted, deeper = level(at_least_float32(s), deeper, tuple(t.shape[2:]))
            fused.append(adapted)
        return review(fused[::-1], teacher)


def review(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``Σ_layers HCL(f_s, f_t)``, the hierarchical context loss (Chen et al. 2021, section 3.3).

    HCL is the mean squared error of the maps and of the maps averaged down to 4x4, 2x2 and 1x1,
    with the weights 1, ½, ¼, ⅛ divided by their sum. A level that is no smaller than the map is
    left out, and the next takes its weight.

    Args:
        student: at least 1 map, fused.
        teacher: maps of the same shapes.
    """
    _check_lists(student, teacher, least=1)
    total = at_least_float32(student[0]).new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        total = total + _hierarchical_context(s, t)
    return total


def _hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    check_maps(student, teacher)
    check_same_shape(student, teacher)
    difference = at_least_float32(student) - at_least_float32(teacher)
    # Averaging is linear: the difference of the averages is the average of the difference.
    pooled = [
        F.adaptive_avg_pool2d(difference, level)
        for level in _LEVELS
        if level < min(difference.shape[2:])
    ]
    distances = torch.stack([error.square().mean() for error in (difference, *pooled)])
    weights = 0.5 ** torch.arange(len(distances), device=distances.device)
    return (weights.to(distances) * distances).sum() / weights.sum()


def _check_lists(student: Sequence[object], teacher: Sequence[object], least: int) -> None:
    if len(student) != len(teacher) or len(student) < least:
        raise InputError(
            f"{len(student)} layers of the student and {len(teacher)} of the teacher",
            remedy=f"name at least {least}, as many of each, from shallow to deep",
        )
