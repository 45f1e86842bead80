"""An ensemble of teachers that acts as one teacher."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from edgekd.distill.features import layer_key
from edgekd.distill.losses.response import log_probabilities
from edgekd.distill.teacher import Teacher
from edgekd.errors import InputError
from edgekd.tasks.losses import at_least_float32

Combine = Literal["mean", "confidence"]


def member_shares(
    members: int, weights: Sequence[float] | None, combine: Combine, classes: bool, where: str
) -> list[float]:
    """The members' weights, normalised to a sum of 1; arguments and errors as
    :class:`EnsembleTeacher`.
    """
    given = [1.0] * members if weights is None else list(weights)
    if not members or len(given) != members:
        raise InputError(
            f"there are {len(given)} weights for {members} teachers",
            where=where,
            remedy="give one for each, the pipeline's own teacher first",
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise InputError(
            f"the weights are {', '.join(map(str, given))}",
            where=where,
            remedy="give numbers above zero; remove a teacher that should not count",
        )
    if combine == "confidence" and not classes:
        raise InputError(
            "confidence is defined for classes only, not for continuous outputs",
            where=where,
            remedy="write combine: mean",
        )
    return [weight / sum(given) for weight in given]


class EnsembleTeacher:
    """The weighted mean of its members' outputs.

    For classes it is the mean of their probabilities, returned as its logarithm, which is a valid
    set of logits: softmax(log p) = p. Other outputs are averaged directly.

    Args:
        members: at least one; all give the same outputs.
        output: the primary output.
        classes: the primary output is logits.
        weights: one above zero for each member, of which only the ratios matter; None: equal.
        combine: ``mean``; or ``confidence``: a member's weight for a sample is multiplied by
            ``exp(−H)``, H the entropy of its probabilities there: from 1 where it is certain down
            to 1/C where it is uniform. Labels are not used.

    Attributes:
        digest: hash of the members' digests in order, the weights and the combination.

    Raises:
        InputError: no members, weights that do not fit, or confidence without classes.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        output: str,
        *,
        classes: bool = True,
        weights: Sequence[float] | None = None,
        combine: Combine = "mean",
        where: str = "distill.scheme.ensemble",
    ) -> None:
        self.members = tuple(members)
        self._output, self._classes, self._combine = output, classes, combine
        self._shares = member_shares(len(members), weights, combine, classes, where)
        self._layers: frozenset[str] = frozenset()
        self._where = where
        parts = [
            combine,
            *(f"{m.digest} {s!r}" for m, s in zip(members, self._shares, strict=True)),
        ]
        self.digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @torch.no_grad()
    def answer(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The combined outputs by name, and the first member's captured features.

        Raises:
            InputError: the members' outputs differ in name or shape.
        """
        answers = [member.answer(batch) for member in self.members]
        combined = dict(answers[0])
        for name in combined.keys() - self._layers:
            values = self._stacked(name, answers)
            if name == self._output and self._classes:
                combined[name] = self._mixture(values)
            else:
                shares = torch.tensor(self._shares, dtype=values.dtype, device=values.device)
                combined[name] = torch.tensordot(shares, values, dims=1)
        return combined

    def watch(self, layers: Collection[str]) -> None:
        """Capture layers of the first member; see :class:`edgekd.distill.teacher.Teacher`."""
        self.members[0].watch(layers)
        self._layers = frozenset(map(layer_key, layers))

    def member_weights(self, log_p: Tensor) -> Tensor:
        """The weight of each member, with a sum of 1 over the members.

        Args:
            log_p: their log-probabilities (M, B, ..., C).

        Returns:
            (M, B, ...).
        """
        shares = torch.tensor(self._shares, dtype=log_p.dtype, device=log_p.device)
        weights = shares.reshape(-1, *[1] * (log_p.ndim - 2)).expand(log_p.shape[:-1])
        if self._combine == "confidence":
            weights = weights * torch.special.entr(log_p.exp()).sum(dim=-1).neg().exp()
        return weights / weights.sum(dim=0)

    def _mixture(self, logits: Tensor) -> Tensor:
        """Logits (M, B, ..., C) to the log of the mean of their probabilities (B, ..., C)."""
        log_p = log_probabilities(logits)
        return torch.logsumexp(log_p + self.member_weights(log_p).log().unsqueeze(-1), dim=0)

    def _stacked(self, name: str, answers: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """An output of all members, (M, ...), in float32 or better."""
        for number, answer in enumerate(answers[1:], start=2):
            wanted = list(answers[0][name].shape)
            given = list(answer[name].shape) if name in answer else "nothing"
            if given != wanted:
                raise InputError(
                    f"teacher {number} gives {given} as {name!r}, and the first one {wanted}",
                    where=self._where,
                    remedy="all teachers must have the same classes or targets, in the same order",
                )
        # An ONNX member's outputs are on the batch's device, a module's on its weights' device.
        device = answers[0][name].device
        return torch.stack([at_least_float32(answer[name].to(device)) for answer in answers])
