"""Losses on the primary output: logits for classes, numbers for regression and policies.

Each takes tensors and gives a scalar. Shapes: logits (B, C) or (B, T, C), the latter taken as B·T
samples; numbers (B, ...). Sums run over classes, means over everything else, so that a weight means
the same for every batch size and sequence length. Half precision is widened before any exponential.

Unless a loss says otherwise, ``student`` and ``teacher`` are logits of the same shape, and
``temperature`` is T, at least 1. ``dkd``, ``wsld`` and ``tf_kd`` treat the right class separately:
their ``target`` is one integer class per row of logits, C at least 2. A row whose class is below 0
is unlabelled and left out; the mean is over the labelled rows, and none gives 0. Shapes that do not
fit, or a target of probabilities, raise an InputError.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import log_softmax

from edgekd.distill.features import SAME_CLASSES, check_same_shape
from edgekd.distill.losses import traits
from edgekd.errors import InputError
from edgekd.tasks.losses import Distance, at_least_float32, class_numbers, cross_entropy, distance

Temperature = Annotated[float, Field(ge=1)]
"""From 1 upward: below 1 it would sharpen the probabilities instead of softening them."""

Smoothing = Annotated[float, Field(ge=0, lt=1)]

Share = Annotated[float, Field(ge=0)]


@traits(compares="classes")
def hard_labels(student: Tensor, target: Tensor, label_smoothing: Smoothing = 0.0) -> Tensor:
    """``CE(z_s, y)``: the data's own labels.

    Args:
        student: logits.
        target: integer classes, the logits' shape without C, below 0 for unlabelled samples; or
            class probabilities in the logits' shape, as mixup and cutmix give.
        label_smoothing: the part of the probability spread evenly over all classes.
    """
    return cross_entropy(student, target, label_smoothing)


@traits(needs_full_logits=False, compares="classes")
def soft_labels(student: Tensor, teacher: Tensor, temperature: Temperature = 4.0) -> Tensor:
    """``T² · KL(softmax(z_t / T) ‖ softmax(z_s / T))`` (Hinton et al. 2015, section 2).

    T² keeps the gradient's size when T changes. Adding a constant to all logits of a sample
    changes nothing; equal logits give 0.
    """
    check_same_shape(student, teacher, SAME_CLASSES)
    log_p = log_probabilities(teacher, temperature)
    log_q = log_probabilities(student, temperature)
    rows = log_p.numel() // log_p.shape[-1]
    # On small tensors a loss costs as much as it has operations: the sum over classes and the
    # mean over rows are one dot product.
    total = torch.dot(log_p.exp().flatten(), (log_q - log_p).flatten())
    return total * (-(temperature**2) / rows)


@traits(needs_full_logits=False, compares="classes")
def hard_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """``CE(z_s, argmax z_t)``: the teacher's decision as a label (DeiT, Touvron et al. 2021)."""
    check_same_shape(student, teacher, SAME_CLASSES)
    return cross_entropy(student, teacher.argmax(dim=-1))


@traits(compares="numbers")
def output_regression(
    student: Tensor, teacher: Tensor, kind: Distance = "mse", mask: Tensor | None = None
) -> Tensor:
    """``d(student, teacher)``: regression to the teacher's values, or logit matching.

    Args:
        student: (B, ...).
        teacher: the same shape.
        kind: ``mse``, ``mae`` (or ``l1``) or ``huber`` (δ = 1); the mean over all elements.
        mask: nonzero where an element counts; the leading dimensions or the full shape.
    """
    return distance(student, teacher, kind, mask)


@traits(compares="numbers")
def target_regression(
    student: Tensor, target: Tensor, kind: Distance = "mse", mask: Tensor | None = None
) -> Tensor:
    """``d(student, y)``: the data's continuous targets; arguments as :func:`output_regression`."""
    return distance(student, target, kind, mask)


@traits(compares="classes")
def logit_standardization(
    student: Tensor, teacher: Tensor, temperature: Temperature = 2.0
) -> Tensor:
    """``T² · KL(softmax(Z(z_t) / T) ‖ softmax(Z(z_s) / T))`` (logit standardization, Sun et al.
    2024, algorithms 1 and 2): the student need not reach the size of the teacher's logits.

    Z takes each sample's mean away and divides by its standard deviation over the C classes: with
    1/C and nothing added, as in the paper. The authors' code has 1/(C − 1), which is a T larger
    by √(C/(C − 1)) in the softmax, and adds 1e-7 to the deviation. The loss is invariant to shift
    and scale of a sample. Logits that are all equal have no Z; they count as 0, without gradient.

    Args:
        temperature: T, at least 1. The authors weight this loss by 9 and hard labels by 0.1.
    """
    check_same_shape(student, teacher, SAME_CLASSES)
    size = math.sqrt(student.shape[-1])
    return soft_labels(size * unit_deviation(student), size * unit_deviation(teacher), temperature)


@traits(needs_full_logits=False, compares="classes")
def jsd(
    student: Tensor,
    teacher: Tensor,
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5,
    temperature: Temperature = 1.0,
) -> Tensor:
    """``T² · [β · KL(p ‖ m) + (1 − β) · KL(q ‖ m)]``, ``m = β·p + (1 − β)·q``: the generalized
    Jensen–Shannon divergence of GKD (Agarwal et al. 2024, equation 1); p teacher, q student.

    At its ends it is 0 for all logits, while JSD/β tends to KL(p ‖ q) and JSD/(1 − β) to
    KL(q ‖ p). Exactly 0 and 1 therefore mean these: 0 is :func:`soft_labels`, which covers all
    that the teacher considers possible; 1 the reverse, which settles on one of its modes. Close to
    an end the loss is small and needs a larger weight. T² is not in the paper, where T is 1.

    Args:
        beta: β, from 0 to 1.
    """
    check_same_shape(student, teacher, SAME_CLASSES)
    log_p = log_probabilities(teacher, temperature)
    log_q = log_probabilities(student, temperature)
    if beta == 0:
        divergence = kl_divergence(log_p, log_q)
    elif beta == 1:
        divergence = kl_divergence(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        divergence = beta * kl_divergence(log_p, log_m) + (1 - beta) * kl_divergence(log_q, log_m)
    return temperature**2 * divergence.mean()


def multi_label(student: Tensor, teacher: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """``T² · KL(Bernoulli(σ(z_t / T)) ‖ Bernoulli(σ(z_s / T)))``, mean over all outputs.

    Soft labels of classes that do not exclude each other: each logit is a separate yes-or-no
    question, so that a shift of a sample's logits does change the loss.
    """
    check_same_shape(student, teacher, SAME_CLASSES)
    log_p = log_probabilities(_yes_and_no(teacher), temperature)
    log_q = log_probabilities(_yes_and_no(student), temperature)
    return temperature**2 * kl_divergence(log_p, log_q).mean()


def _yes_and_no(logits: Tensor) -> Tensor:
    """Logits (..., 2) whose softmax is (σ(z), σ(−z))."""
    half = at_least_float32(logits) / 2
    return torch.stack([half, -half], dim=-1)


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(z / T)`` over the last dimension, in float32 or better."""
    logits = at_least_float32(logits)
    return log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p ‖ q)`` over the last dimension, from log-probabilities; one number per row."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def unit_deviation(values: Tensor) -> Tensor:
    """``(x − mean(x)) / ‖x − mean(x)‖`` over the last dimension, in float32 or better.

    Its product with another's is Pearson's correlation; √C times it is the z-score. A row that
    is constant within its rounding has no direction: the result is 0, without a gradient, where a
    small number added to the norm would give a gradient of its reciprocal.
    """
    values = at_least_float32(values)
    rounding = 8 * torch.finfo(values.dtype).eps
    deviation = values - values.mean(dim=-1, keepdim=True)
    size = vector_norm(deviation, dim=-1, keepdim=True)
    varies = size > rounding * (vector_norm(values, dim=-1, keepdim=True) + rounding)
    return torch.where(varies, deviation, 0) / torch.where(varies, size, 1)


@traits(needs_full_logits=False, compares="classes")
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
        beta: β, the weight of the relation between classes, within each sample.
        gamma: γ, the weight of the relation between samples, within each class.
        temperature: T, at least 1; the authors take 1 for ImageNet and 4 for CIFAR.
    """
    check_same_shape(student, teacher, SAME_CLASSES)
    p = _probabilities(teacher, temperature)
    q = _probabilities(student, temperature)
    return temperature**2 * (beta * _inter_class(q, p) + gamma * _intra_class(q, p))


@traits(needs_full_logits=False, compares="classes")
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
        alpha: α, the weight of TCKD.
        beta: β, the weight of NCKD.
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
        temperature: T, at least 1. The authors weight this loss by 2.5 and hard labels by 1.
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
        correct: the probability of the right class; the paper takes 0.9 and above.
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
