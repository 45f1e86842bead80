"""Exits: a network's shallow layers answer too, and learn from its deepest answer.

Zhang et al. 2019, "Be your own teacher". The exits are trained with the network and are no part
of it, so that the exported student has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgekd.config.training import LossTerm
from edgekd.distill.features import layer_key
from edgekd.distill.imitation import imitation
from edgekd.distill.named_loss import NamedLoss
from edgekd.distill.term import Named, OwnTerm
from edgekd.errors import InputError
from edgekd.tasks import Task

_WHERE = "distill.scheme.self"


class Exit(OwnTerm):
    """``(1 − α) · hard + α · soft labels of the deepest answer`` at one layer (equation 6).

    A mean over positions and a linear layer make the layer's feature an answer. No gradient flows
    into the deepest answer from here.

    Args:
        layer: the module path.
        task: says what an answer is.
        temperature: T of the soft labels.
        share: α, from 0 to 1.
        label_smoothing: for the labels.
    """

    needs_shapes = True

    def __init__(
        self, layer: str, task: Task, temperature: float, share: float, label_smoothing: float
    ) -> None:
        super().__init__(f"exit {layer}", layers=(layer,))
        self._key = layer_key(layer)
        self._task, self._temperature, self._share = task, temperature, share
        self._label_smoothing = label_smoothing
        self.head: nn.Linear | None = None

    @property
    def identity(self) -> str:
        """See :class:`edgekd.distill.term.Term`."""
        return f"{super().identity} {self._temperature} {self._share} {self._label_smoothing}"

    def prepare(self, student: Named, teacher: Named | None, samples: int) -> None:
        """Make the head for the layer's channels and the answer's size.

        Raises:
            InputError: the layer gives no map, sequence or vector.
        """
        if self.head is None:
            feature, answer = pooled(student[self._key], self._key[1:]), student[self._task.output]
            self.head = nn.Linear(feature.shape[1], answer[0].numel()).to(feature.device)

    def forward(self, student: Named, teacher: Named | None, batch: Named, part: float) -> Tensor:
        """The loss, a scalar."""
        assert self.head is not None
        deepest = student[self._task.output]
        answer = self.head(pooled(student[self._key], self._key[1:])).reshape(deepest.shape)
        own = {self._task.output: answer}
        hard = self._task.hard_loss(own, batch, self._label_smoothing)
        soft = imitation(self._task, own, student, batch, self._temperature)
        return (1 - self._share) * hard + self._share * soft


class OwnHint(OwnTerm):
    """A feature loss of a shallow layer, with the same network's deepest one as the teacher.

    Args:
        layer: the module path of the shallow layer.
        deepest: that of the deepest one, which gets no gradient from here.
        task: as in :class:`edgekd.distill.named_loss.NamedLoss`.
        weight: the paper's λ.
    """

    needs_shapes = True

    def __init__(self, layer: str, deepest: str, task: Task, weight: float) -> None:
        super().__init__(f"hint {layer}", weight, (layer, deepest))
        term = LossTerm(name="fitnets", args={"student": layer, "teacher": deepest})
        self.loss = NamedLoss(term, self.label, task, 0.0, f"{_WHERE}.hint")

    def prepare(self, student: Named, teacher: Named | None, samples: int) -> None:
        """Make the adapter."""
        self.loss.prepare(student, student, samples)

    def forward(self, student: Named, teacher: Named | None, batch: Named, part: float) -> Tensor:
        """The loss, a scalar."""
        own = {key: value.detach() for key, value in student.items()}
        value: Tensor = self.loss(student, own, batch, part)
        return value


def exit_terms(
    layers: Sequence[str],
    task: Task,
    *,
    temperature: float,
    share: float,
    hint: float,
    deepest: str | None,
    label_smoothing: float,
) -> list[OwnTerm]:
    """An :class:`Exit` at each layer, and with ``deepest`` an :class:`OwnHint`."""
    terms: list[OwnTerm] = []
    for layer in layers:
        terms.append(Exit(layer, task, temperature, share, label_smoothing))
        if deepest is not None:
            terms.append(OwnHint(layer, deepest, task, hint))
    return terms


def pooled(feature: Tensor, layer: str) -> Tensor:
    """A feature's mean over its positions: a map or a sequence to a vector (B, C).

    Raises:
        InputError: it is neither of them, nor a vector.
    """
    if feature.ndim == 4:
        return feature.mean((2, 3))
    if feature.ndim == 3:
        return feature.mean(1)
    if feature.ndim == 2 and torch.is_floating_point(feature):
        return feature
    raise InputError(
        f"the layer {layer!r} gives {list(feature.shape)}, and an exit takes a map (B, C, H, W), "
        "a sequence (B, T, F) or a vector (B, F)",
        where=f"{_WHERE}.exits",
        remedy="name another layer; 'edgekd layers' lists them with their shapes",
    )
