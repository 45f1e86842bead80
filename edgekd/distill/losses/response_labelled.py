"""Response losses that use the label, and treat the right class separately from the others.

Logits (B, C) or (B, T, C), C at least 2, with one integer class per row of logits. A row whose
class is below 0 is unlabelled and left out; the mean is over the labelled rows, and none gives 0.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import log_softmax

from edgekd.distill.adapters import SAME_CLASSES, check_same_shape
from edgekd.distill.losses.response import (
    Temperature,
    kl_divergence,
    log_probabilities,
)
from edgekd.distill.losses.traits import traits
from edgekd.errors import InputError
from edgekd.tasks.losses import class_numbers

Share = Annotated[float, Field(ge=0)]


@traits(needs_full_logits=False, needs_hard_label=True, compares="classes")
def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: Share = 1.0,
    beta: Share = 8.0,
    temperature: Temperature = 4.0,
) -> Tensor:
    """``T² · (α · TCKD + β · NCKD)``: decoupled distillation (Zhao et al. 2022).

    TCKD is the KL of (right class, all others together), NCKD the KL among the others alone.
    Soft labels weight NCKD by 1 − p_t(right class); here the two weights are independent.
    With two classes there is one other, and NCKD is 0.

    Args:
        student: logits.
        teacher: logits of the same shape.
        target: integer classes, below 0 where there is none.
        alpha: α, the weight of TCKD.
        beta: β, the weight of NCKD.
        temperature: T, at least 1.

    Raises:
        InputError: shapes that do not fit; targets that are probabilities.
    """
    check_same_shape(student, teacher, SAME_CLASSES)
    classes = _one_class_each("dkd", student, target)
    log_p = log_probabilities(teacher, temperature)
    log_q = log_probabilities(student, temperature)
    tckd = kl_divergence(_right_or_wrong(log_p, classes), _right_or_wrong(log_q, classes))
    nckd = kl_divergence(_among_others(log_p, classes), _among_others(log_q, classes))
    return temperature**2 * _labelled_mean(alpha * tckd + beta * nckd, classes)


@traits(needs_full_logits=False, needs_hard_label=True, compares="classes")
def wsld(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: Temperature = 2.0
) -> Tensor:
    """``T² · (1 − exp(−CE(z_s, y) / CE(z_t, y))) · H(softmax(z_t / T), softmax(z_s / T))``:
    weighted soft labels (Zhou et al. 2021, "Rethinking soft labels").

    A sample on which the student does better than the teacher weighs less. The weight is computed
    at T = 1 and carries no gradient. H is the cross-entropy, as in the paper: its gradient
    is that of the KL, its lowest value the teacher's entropy and not 0.

    Args:
        student: logits.
        teacher: logits of the same shape.
        target: integer classes, below 0 where there is none.
        temperature: T, at least 1. The authors weight this loss by 2.5 and hard labels by 1.

    Raises:
        InputError: shapes that do not fit; targets that are probabilities.
    """
    check_same_shape(student, teacher, SAME_CLASSES)
    classes = _one_class_each("wsld", student, target)
    weight = _student_lag(student.detach(), teacher.detach(), classes)
    p = log_probabilities(teacher, temperature).exp()
    cross_entropies = -(p * log_probabilities(student, temperature)).sum(dim=-1)
    return temperature**2 * _labelled_mean(weight * cross_entropies, classes)


@traits(needs_hard_label=True, compares="classes")
def tf_kd(
    student: Tensor,
    target: Tensor,
    correct: Annotated[float, Field(gt=0, lt=1)] = 0.99,
    temperature: Temperature = 20.0,
) -> Tensor:
    """Soft labels of a teacher that is always right: the right class has the probability
    ``correct``, the others share the rest evenly (Tf-KD_reg, Yuan et al. 2020).

    The teacher's probabilities are softened through their logarithms, as those of a real one,
    and T² keeps the gradient's size. The authors' code takes the softmax of the probabilities
    themselves and leaves the student at T = 1; its weights do not carry over.

    Args:
        student: logits.
        target: integer classes, below 0 where there is none.
        correct: the probability of the right class; the paper takes 0.9 and above.
        temperature: T, at least 1.

    Raises:
        InputError: shapes that do not fit; targets that are probabilities.
    """
    classes = _one_class_each("tf_kd", student, target)
    log_q = log_probabilities(student, temperature)
    others = log_q.shape[-1] - 1
    teacher = torch.full_like(log_q, math.log((1 - correct) / others), requires_grad=False)
    teacher = teacher.scatter(-1, _index(classes), math.log(correct))
    divergence = kl_divergence(log_probabilities(teacher, temperature), log_q)
    return temperature**2 * _labelled_mean(divergence, classes)


def _one_class_each(name: str, logits: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point() and target.shape == logits.shape:
        raise InputError(
            f"{name} needs one class for each sample, and the targets are class probabilities",
            remedy="mixup and cutmix give mixtures; train without them, or use soft_labels",
        )
    return class_numbers(logits, target)


def _index(classes: Tensor) -> Tensor:
    """Class indices for gather; unlabelled rows are excluded from the mean afterwards."""
    return classes.clamp(min=0).unsqueeze(-1)


def _among_others(log_p: Tensor, classes: Tensor) -> Tensor:
    """Log-probabilities (..., C − 1) among the classes that are not the right one."""
    column = torch.arange(log_p.shape[-1] - 1, device=log_p.device)
    # Removed, not set to −1000: the remaining logits may be smaller still, or a single class.
    others = column + (column >= _index(classes)).long()
    return log_softmax(log_p.gather(-1, others), dim=-1)


def _right_or_wrong(log_p: Tensor, classes: Tensor) -> Tensor:
    """Log-probabilities (..., 2) of the right class and of all others together."""
    right = log_p.gather(-1, _index(classes))
    # Not log(1 − p): a certain teacher has p = 1, and the remaining probability would be lost in
    # rounding.
    wrong = log_p.scatter(-1, _index(classes), -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([right, wrong], dim=-1)


def _student_lag(student: Tensor, teacher: Tensor, classes: Tensor) -> Tensor:
    """``1 − exp(−CE_s / CE_t)``, between 0 and 1: how far the student is behind, per row."""
    of_student, of_teacher = (
        -log_probabilities(logits).gather(-1, _index(classes)).squeeze(-1)
        for logits in (student, teacher)
    )
    # A teacher that is right beyond rounding has 0, which a student may have, too.
    smallest = torch.finfo(of_teacher.dtype).eps
    return -torch.expm1(-of_student / of_teacher.clamp(min=smallest))


def _labelled_mean(rows: Tensor, classes: Tensor) -> Tensor:
    labelled = classes >= 0
    return torch.where(labelled, rows, 0).sum() / labelled.sum().clamp(min=1)
