"""Losses on the primary output: logits for classes, numbers for regression and policies.

Each takes tensors and gives a scalar. Shapes: logits (B, C) or (B, T, C); numbers (B, ...).
Sums run over classes, means over everything else, so that a weight means the same for every
batch size and sequence length. Half precision is widened before any exponential.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn.functional import log_softmax

from edgekd.errors import InputError
from edgekd.tasks.hard import Distance, at_least_float32, cross_entropy, distance

Temperature = Annotated[float, Field(ge=1)]
"""From 1 upward: below 1 it would sharpen what it is there to soften."""

Smoothing = Annotated[float, Field(ge=0, lt=1)]


def hard_labels(student: Tensor, target: Tensor, label_smoothing: Smoothing = 0.0) -> Tensor:
    """``CE(z_s, y)``: the data's own labels.

    Args:
        student: logits.
        target: integer classes, the logits' shape without C.
        label_smoothing: the part of the probability spread evenly over all classes.
    """
    return cross_entropy(student, target, label_smoothing)


def soft_labels(student: Tensor, teacher: Tensor, temperature: Temperature = 4.0) -> Tensor:
    """``T² · KL(softmax(z_t / T) ‖ softmax(z_s / T))`` (Hinton et al. 2015, section 2).

    T² keeps the gradient's size when T changes. Adding a constant to all logits of a sample
    changes nothing; equal logits give 0.

    Args:
        student: logits.
        teacher: logits of the same shape.
        temperature: T, at least 1.
    """
    _same_shape(student, teacher)
    log_p = log_softmax(at_least_float32(teacher) / temperature, dim=-1)
    log_q = log_softmax(at_least_float32(student) / temperature, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return temperature**2 * divergence.mean()


def teacher_labels(student: Tensor, teacher: Tensor) -> Tensor:
    """``CE(z_s, argmax z_t)``: the teacher's decision as a label (DeiT, Touvron et al. 2021).

    Args:
        student: logits.
        teacher: logits of the same shape.
    """
    _same_shape(student, teacher)
    return cross_entropy(student, teacher.argmax(dim=-1))


def regression(
    student: Tensor, teacher: Tensor, kind: Distance = "mse", mask: Tensor | None = None
) -> Tensor:
    """``d(student, teacher)``: the teacher's numbers imitated, or its logits matched.

    Args:
        student: (B, ...).
        teacher: the same shape.
        kind: ``mse``, ``mae`` or ``huber`` (δ = 1); the mean over all elements.
        mask: nonzero where an element counts; the leading dimensions or the full shape.
    """
    return distance(student, teacher, kind, mask)


def hard_targets(
    student: Tensor, target: Tensor, kind: Distance = "mse", mask: Tensor | None = None
) -> Tensor:
    """``d(student, y)``: the data's own continuous targets; arguments as :func:`regression`."""
    return distance(student, target, kind, mask)


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    """Broadcasting would silently give a wrong loss."""
    if student.shape != teacher.shape:
        raise InputError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in shape",
            remedy="both must have the same classes, in the same order",
        )
