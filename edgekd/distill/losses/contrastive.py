"""Contrastive losses: identify a sample's teacher feature among those of other samples."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from edgekd.distill.losses import traits
from edgekd.distill.losses.relation import Width, pooled, pooled_width, unit
from edgekd.errors import InputError
from edgekd.tasks.losses import at_least_float32

Count = Annotated[int, Field(ge=1)]
Rows = Annotated[int, Field(ge=2)]
Temperature = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


@traits(needs_full_logits=False, needs_hard_label=True)
class Crd(nn.Module):
    """Contrastive representation distillation (CRD, Tian et al. 2020, eq. 17-19).

    Both features are embedded on the unit sphere. Each student embedding is contrasted with a
    bank of the teacher's embeddings, and each teacher embedding with a bank of the student's; a
    bank's row is a running mean over the epochs. The loss is the sum of both
    :func:`noise_contrast`, their Z estimated in the first batch and then constant.

    Sample i is stored in row ``i mod rows``. A data set larger than the bank shares rows: a sample
    that finds another's embedding (or none) in its row replaces it, and its own fresh embedding
    is its positive. Memory is ``2 · rows · embedding`` floats and O(B · rows) per step, independent
    of the size of the data set.

    Random numbers come from torch's generator and all else is in the state dict, so a restored run
    continues with the same numbers. In evaluation mode nothing is updated.

    Args:
        student: shape of the student's feature.
        teacher: shape of the teacher's feature.
        samples: size of the training split.
        embedding: width of the embeddings.
        negatives: K, drawn per sample and with replacement from the other rows; at most as many
            as there are.
        temperature: τ.
        momentum: the share of a row that remains when its sample is seen again.
        bank: the largest number of rows.
        other_classes: whether negatives are of other classes only (the paper's supervised
            policy; needs integer targets), or of any other sample.

    Raises:
        InputError: fewer than two samples.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    owner: Tensor
    label: Tensor
    log_z: Tensor

    def __init__(
        self,
        student: tuple[int, ...],
        teacher: tuple[int, ...],
        samples: int,
        embedding: Width = 128,
        negatives: Count = 16384,
        temperature: Temperature = 0.07,
        momentum: Momentum = 0.5,
        bank: Rows = 65536,
        other_classes: bool = False,
    ) -> None:
        super().__init__()
        if samples < 2:
            raise InputError(
                f"{samples} training samples leave none to contrast with",
                remedy="train with more data, or without crd",
            )
        rows = min(samples, bank)
        self.negatives = min(negatives, rows - 1)
        self.temperature = temperature
        self.momentum = momentum
        self.other_classes = other_classes
        self.student = nn.Linear(pooled_width(student), embedding)
        self.teacher = nn.Linear(pooled_width(teacher), embedding)
        self.register_buffer("student_bank", unit(torch.randn(rows, embedding)))
        self.register_buffer("teacher_bank", unit(torch.randn(rows, embedding)))
        self.register_buffer("owner", torch.full((rows,), -1))
        self.register_buffer("label", torch.full((rows,), -1))
        self.register_buffer("log_z", torch.full((2,), math.nan))

    def forward(
        self, student: Tensor, teacher: Tensor, sample: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """The loss of one batch, a scalar.

        Args:
            student: features, averaged over positions.
            teacher: features of the same batch.
            sample: (B,) row numbers in the training split.
            target: (B,) integer classes; used with ``other_classes`` only.

        Raises:
            InputError: sample or target do not fit the batch.
        """
        s, t = self._embed(self.student, student), self._embed(self.teacher, teacher)
        self._check(len(s), len(t), sample, target)
        row = sample % len(self.owner)
        negative = self._draw(row)
        mask = None
        if self.other_classes and target is not None:
            mask = self.label[negative] != target[:, None]
        known = (self.owner[row] == sample)[:, None]
        teacher_positive = torch.where(known, self.teacher_bank[row], t.detach())
        student_positive = torch.where(known, self.student_bank[row], s.detach())

        loss, log_z = s.new_zeros(()), []
        sides = ((s, teacher_positive, self.teacher_bank), (t, student_positive, self.student_bank))
        for before, (anchor, positive, bank) in zip(self.log_z, sides, strict=True):
            scores = bank_scores(anchor, bank, negative) / self.temperature
            estimate = scores.detach().flatten().logsumexp(0) - math.log(scores.numel())
            log_z.append(torch.where(before.isnan(), estimate, before))
            own = (anchor * positive).sum(dim=-1) / self.temperature
            loss = loss + noise_contrast(own, scores, log_z[-1], mask)
        if self.training:
            self._remember(s.detach(), t.detach(), sample, row, target)
            self.log_z = torch.stack(log_z)
        return loss

    def _embed(self, layer: nn.Linear, features: Tensor) -> Tensor:
        return unit(at_least_float32(layer(pooled(features).to(layer.weight.dtype))))

    def _draw(self, row: Tensor) -> Tensor:
        """K rows for each sample, (B, K), uniformly from all rows but its own."""
        others = len(self.owner) - 1
        drawn = torch.randint(others, (len(row), self.negatives), device=row.device)
        return drawn + (drawn >= row[:, None])

    @torch.no_grad()
    def _remember(
        self, s: Tensor, t: Tensor, sample: Tensor, row: Tensor, target: Tensor | None
    ) -> None:
        """Move the rows of a batch towards its embeddings, in place of no tensor of the graph."""
        # Of samples that share a row the last one is stored: all of them write the same values, or
        # the order of writing, which a GPU does not fix, would decide.
        position = torch.arange(len(row), device=row.device)
        last = torch.where(row[:, None] == row, position, -1).amax(dim=1)
        s, t, sample = s[last], t[last], sample[last]
        stays = torch.where(self.owner[row] == sample, self.momentum, 0.0)[:, None].to(s.dtype)
        for name, fresh in (("student_bank", s), ("teacher_bank", t)):
            bank = getattr(self, name)
            moved = unit(stays * bank[row] + (1 - stays) * fresh)
            setattr(self, name, bank.index_copy(0, row, moved.to(bank.dtype)))
        self.owner = self.owner.index_copy(0, row, sample)
        if self.other_classes and target is not None:
            self.label = self.label.index_copy(0, row, target[last].to(self.label.dtype))

    def _check(self, student: int, teacher: int, sample: Tensor, target: Tensor | None) -> None:
        if not student == teacher == sample.numel() or sample.ndim != 1:
            raise InputError(
                f"student, teacher and sample numbers are of {student}, {teacher} and "
                f"{list(sample.shape)} samples",
                remedy="all three must be of one batch",
            )
        if self.other_classes and (
            target is None or target.shape != sample.shape or target.is_floating_point()
        ):
            given = "none" if target is None else f"{target.dtype} {list(target.shape)}"
            raise InputError(
                f"other_classes needs one integer class per sample, and the target is {given}",
                remedy="leave other_classes out",
            )


def bank_scores(anchor: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """``anchor_b · bank[rows_bk]``, (B, K).

    All B·N products in one GEMM, of which K are selected: gathering the vectors first would need
    B·K·D numbers, which is 128 times more for D = 128 and K = N.

    Args:
        anchor: (B, D).
        bank: (N, D).
        rows: (B, K) integers below N.
    """
    with torch.autocast(anchor.device.type, enabled=False):
        return (anchor @ bank.to(anchor.dtype).mT).gather(1, rows)


def noise_contrast(
    positive: Tensor, negative: Tensor, log_z: Tensor, mask: Tensor | None = None
) -> Tensor:
    """``−log h(positive) − Σ_k log(1 − h(negative_k))``, the mean over the batch.

    ``h = x / (x + K/M)`` with ``x = exp(score) / Z`` is the probability that a pair is the
    sample's own and not one of K drawn from M (CRD eq. 10, 19; NCE, Gutmann & Hyvärinen 2010).
    With ``Z = M · z``, z the mean of exp(score), M cancels: ``h = σ(score − log(K · z))``.

    Args:
        positive: scores over the temperature, (B,).
        negative: scores over the temperature, (B, K).
        log_z: log z, a scalar.
        mask: (B, K), which negatives count; their mean replaces the ones left out.
    """
    drawn = negative.shape[1]
    even = math.log(drawn) + log_z
    noise = softplus(negative - even)
    if mask is None:
        rejected = noise.sum(dim=1)
    else:
        rejected = drawn * (noise * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return (softplus(even - positive) + rejected).mean()
