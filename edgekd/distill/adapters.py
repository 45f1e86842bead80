"""Adapters: modules that map a student's feature to the shape of a teacher's.

A feature is a map (B, C, H, W), a sequence (B, T, F) or a vector (B, F). Modules are made once,
from the captured shapes, and are trained with the student; the exported student has none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import InputError

Shape = tuple[int, ...]
"""A captured tensor's shape, the batch included."""

SAME_LAYERS = "compare layers of the same shape, for the same samples"
SAME_CLASSES = "both must have the same classes, in the same order"
"""What to do about two shapes that differ: layers', and outputs'."""

_KINDS = {2: "a vector (B, F)", 3: "a sequence (B, T, F)", 4: "a map (B, C, H, W)"}


def channel_dim(feature: Tensor | Shape) -> int:
    """Where the channels are: the second dimension of a map, the last of anything else."""
    rank = feature.ndim if isinstance(feature, Tensor) else len(feature)
    return 1 if rank == 4 else -1


def adapter(
    student: Shape,
    teacher: Shape,
    *,
    batch_norm: bool = True,
    relu: bool = False,
    always: bool = False,
) -> nn.Module:
    """A module from the student's channels to the teacher's; heights and widths are unchanged.

    A 1x1 convolution for maps, a linear layer for sequences and vectors.

    Args:
        student: the captured shape.
        teacher: the captured shape.
        batch_norm: a batch norm after the convolution.
        relu: a ReLU at the end of a map's adapter, for a teacher that is never negative.
        always: also when the channels are equal; otherwise those need no adapter.

    Raises:
        InputError: the shapes differ in rank or in sequence length.
    """
    check_same_kind(student, teacher)
    dim = channel_dim(student)
    source, target = student[dim], teacher[dim]
    if source == target and not always:
        return nn.Identity()
    if len(student) != 4:
        return nn.Linear(source, target)
    layers: list[nn.Module] = [nn.Conv2d(source, target, 1, bias=not batch_norm)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(target))
    if relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def regressor(student: Shape, teacher: Shape) -> nn.Module:
    """Three 1x1 convolutions (linear layers) as wide as the teacher, with ReLU between them.

    The network μ of VID (Ahn et al. 2019).

    Raises:
        InputError: the shapes differ in rank or in sequence length.
    """
    check_same_kind(student, teacher)
    dim = channel_dim(student)
    source, target = student[dim], teacher[dim]

    def layer(inputs: int) -> nn.Module:
        return nn.Conv2d(inputs, target, 1) if len(student) == 4 else nn.Linear(inputs, target)

    return nn.Sequential(layer(source), nn.ReLU(), layer(target), nn.ReLU(), layer(target))


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


def pool_to_smaller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps averaged down to the smaller height and the smaller width.

    Sequences and vectors are returned unchanged.
    """
    if first.ndim != 4 or second.ndim != 4:
        return first, second
    size = smaller_size(first, second)
    return _pooled(first, size), _pooled(second, size)


def _pooled(feature: Tensor, size: tuple[int, int]) -> Tensor:
    return feature if feature.shape[2:] == size else F.adaptive_avg_pool2d(feature, size)


def smaller_size(first: Tensor, second: Tensor) -> tuple[int, int]:
    """The smaller height and the smaller width of two maps."""
    return min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3])


def resize(feature: Tensor, like: Tensor) -> Tensor:
    """A map interpolated bilinearly to another one's height and width."""
    if feature.shape[2:] == like.shape[2:]:
        return feature
    return F.interpolate(feature, size=like.shape[2:], mode="bilinear", align_corners=False)


def check_same_kind(student: Shape, teacher: Shape) -> None:
    """Check that the two shapes can be matched by an adapter.

    Raises:
        InputError: the shapes differ in rank or in sequence length, or are of no known kind.
    """
    if len(student) != len(teacher) or len(student) not in _KINDS:
        raise _mismatch(
            student, teacher, "cannot be matched", f"both must be {', '.join(_KINDS.values())}"
        )
    if len(student) == 3 and student[1] != teacher[1]:
        raise _mismatch(
            student,
            teacher,
            "differ in sequence length",
            "compare layers that see the same tokens, or pooled features",
        )


def check_same_shape(student: Tensor, teacher: Tensor, remedy: str = SAME_LAYERS) -> None:
    """Check that both shapes are equal: broadcasting would silently give a wrong loss.

    Raises:
        InputError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise _mismatch(tuple(student.shape), tuple(teacher.shape), "differ in shape", remedy)


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Check that both are maps of the same samples; channels, height and width may differ.

    Raises:
        InputError: one is no map, or the batches differ.
    """
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        raise _mismatch(
            tuple(student.shape),
            tuple(teacher.shape),
            "are not two maps (B, C, H, W) of the same samples",
            "name layers that output maps",
        )


def _mismatch(student: Shape, teacher: Shape, what: str, remedy: str) -> InputError:
    return InputError(f"student {list(student)} and teacher {list(teacher)} {what}", remedy=remedy)
