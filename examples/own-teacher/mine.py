"""The networks and a loss of a user's own: nothing to inherit from, nothing to register."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Teacher(nn.Sequential):
    """A network on 8×8 images, (B, 1, 8, 8) to (B, 10) logits."""

    def __init__(self, width: int = 128) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


class Student(Teacher):
    """The same, twelve neurons wide."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(width)


def confident(student: Tensor, teacher: Tensor, floor: float = 0.5) -> Tensor:
    """KL(teacher ‖ student) over the samples of which the teacher is sure.

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        floor: the least probability of the teacher's class.
    """
    p = torch.softmax(teacher, 1)
    sure = (p.max(1).values > floor).float()
    divergence = (p * (torch.log_softmax(teacher, 1) - torch.log_softmax(student, 1))).sum(1)
    return (sure * divergence).mean()
