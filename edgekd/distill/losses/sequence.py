"""Losses between the layers of two transformers: hidden states (B, T, F), attention (B, H, T, T).

Each gives a scalar, the mean over everything that the mask selects, 0 for an empty mask. What the
mask excludes may be NaN. Half precision is widened.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.distill.features import adapter, check_same_shape
from edgekd.distill.losses.relation import unit
from edgekd.errors import InputError
from edgekd.tasks.losses import at_least_float32, expand_mask


class HiddenStates(nn.Module):
    """:func:`hidden_states` behind a linear adapter from the student's to the teacher's width.

    Equal widths have no adapter.

    Args:
        student: shape of the student's hidden states, (B, T, F).
        teacher: shape of the teacher's.
    """

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        super().__init__()
        self.adapter = adapter(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of one batch, a scalar; arguments as :func:`hidden_states`."""
        student = at_least_float32(student)
        if mask is not None:
            # NaN in the padding would reach the adapter's weights, though its gradient is 0.
            student = torch.where(expand_mask(mask, student), student, 0)
        return hidden_states(self.adapter(student), teacher, mask)


def hidden_states(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``MSE(H_s, H_t)`` (TinyBERT, Jiao et al. 2020, eq. 8).

    Args:
        student: hidden states (B, T, F), already of the teacher's width.
        teacher: hidden states of the same shape.
        mask: (B, T), nonzero where a token counts.
    """
    check_same_shape(student, teacher)
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    return _mean_square(student - teacher, None if mask is None else expand_mask(mask, student))


def attention_maps(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``MSE(A_s, A_t)``, the mean over heads (TinyBERT, Jiao et al. 2020, eq. 7).

    Scores before the softmax, as the paper prefers, or probabilities. Networks with different
    numbers of heads are compared by the mean over theirs. A score that both networks put at −inf
    (a causal mask) is left out.

    Args:
        student: (B, H, T, T).
        teacher: the same shape, but for H.
        mask: (B, T), nonzero where a token counts; the rows and columns of others are left out.
    """
    for who, maps in (("student", student), ("teacher", teacher)):
        if maps.ndim != 4:
            raise InputError(
                f"attention maps of the {who} are {list(maps.shape)}",
                remedy="name a layer that gives attention as (B, H, T, T)",
            )
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    check_same_shape(student, teacher)
    valid = ~(student.isneginf() & teacher.isneginf())
    if mask is not None:
        token = expand_mask(mask, student[:, 0, :, 0])
        valid = valid & (token[:, :, None] & token[:, None, :])[:, None]
    return _mean_square(student - teacher, valid)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 − cos(h_s, h_t)`` of each token (DistilBERT, Sanh et al. 2019), between 0 and 2.

    Scaling any token's state changes nothing. A state of zeros has cosine 0 with all others.

    Args:
        student: hidden states (B, T, F).
        teacher: hidden states of the same shape.
        mask: (B, T), nonzero where a token counts.
    """
    check_same_shape(student, teacher)
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    valid = torch.ones_like(student[..., 0], dtype=torch.bool)
    if mask is not None:
        valid = expand_mask(mask, student[..., 0])
    # Before the norm, whose gradient would be NaN where the padding is.
    student, teacher = (torch.where(valid[..., None], states, 0) for states in (student, teacher))
    cosines = (unit(student) * unit(teacher)).sum(dim=-1)
    return torch.where(valid, 1 - cosines, 0).sum() / valid.sum().clamp(min=1)


def _mean_square(differences: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return differences.square().mean()
    return torch.where(valid, differences, 0).square().sum() / valid.sum().clamp(min=1)
