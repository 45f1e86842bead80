"""Online distillation: peers teach each other while they are trained (Zhang et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from edgekd.distill.checkpoint import History
from edgekd.distill.loss_term import Named, Term
from edgekd.distill.losses.response import Temperature
from edgekd.distill.objective import Objective, output_loss
from edgekd.distill.schemes import Network, SchemeContext
from edgekd.errors import InputError
from edgekd.models.dict_model import DictModel
from edgekd.tasks import Task


def online(
    context: SchemeContext,
    peers: Annotated[int, Field(ge=2)] | None = None,
    models: tuple[Network, ...] = (),
    temperature: Temperature = 1.0,
    weight: Annotated[float, Field(ge=0)] = 1.0,
) -> dict[str, History]:
    """Deep mutual learning: the student and its peers are trained together; the student is shipped.

    ``Σ_i [hard_i + weight · mean_{j≠i} T² · KL(p_j ‖ p_i)]`` (equations 8 and 9), p_j without a
    gradient. All peers take their step together, from one forward each; in the paper they take
    turns. For numbers instead of classes the task's distance stands in for the divergence. Neither
    the pipeline's teacher nor its loss terms are used; ``clip_norm`` bounds all peers together.

    Args:
        context: networks, data and training loop.
        peers: their number, including the student. Left out: one more than ``models``, or 2.
        models: the other peers' networks; without them, the student's network, each with initial
            weights of its own.
        temperature: T, at least 1.
        weight: weight of the mutual terms relative to the labels.

    Raises:
        InputError: ``peers`` and ``models`` do not agree.
    """
    others = len(models) or (peers or 2) - 1
    if peers is not None and others != peers - 1:
        raise InputError(
            f"there are {len(models)} models for {peers - 1} peers of the student",
            where="distill.scheme.online",
            remedy=f"write peers: {len(models) + 1}, or leave it out",
        )
    context.say("  online: the peers learn from each other; no teacher and no distill.losses")
    members = [context.student]
    if models:
        members += [context.build(config, index) for index, config in enumerate(models, start=1)]
    else:
        members += [context.new_student(index) for index in range(1, others + 1)]
    objective = mutual_objective(
        len(members), context.task, temperature, weight, context.label_smoothing
    )
    return {"student": context.fit(Peers(members), objective, "student")}


class Peers(nn.Module):
    """Several networks as one module, of which the first is scored.

    In training mode it returns the outputs of all, the first's under their own names; in
    evaluation mode the first's alone.
    """

    def __init__(self, members: Sequence[DictModel]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name; :func:`outputs_of` selects one peer's."""
        outputs: dict[str, Tensor] = self.members[0](batch)
        if self.training:
            for number, member in enumerate(self.members):
                if number:
                    own = {k + _suffix(number): v for k, v in member(batch).items()}
                    outputs = outputs | own
        return outputs

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Check a batch's inputs before the forward pass; raises InputError."""
        for member in self.members:
            assert isinstance(member, DictModel)
            member.check_batch(batch)


def outputs_of(number: int, outputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """One peer's outputs by their own names, from those of :class:`Peers`."""
    if number == 0:
        return outputs
    suffix = _suffix(number)
    return {key.removesuffix(suffix): v for key, v in outputs.items() if key.endswith(suffix)}


def _suffix(number: int) -> str:
    return f" of peer {number}"


def mutual_objective(
    peers: int, task: Task, temperature: float, weight: float, label_smoothing: float = 0.0
) -> Objective:
    """The terms of all peers of a :class:`Peers`; see :func:`online`."""
    terms: list[Term] = []
    for number in range(peers):
        terms.append(_PeerHard(number, task, label_smoothing))
        terms.append(_PeerMutual(number, peers, task, temperature, weight))
    return Objective.of(terms)


class _PeerHard(Term):
    """A peer's loss against the data's targets."""

    def __init__(self, number: int, task: Task, label_smoothing: float) -> None:
        super().__init__(f"peer {number} hard", settings=(label_smoothing,))
        self._number, self._task, self._label_smoothing = number, task, label_smoothing

    def forward(
        self, student: Named, teacher: Named | None, batch: Named, progress: float
    ) -> Tensor:
        return self._task.hard_loss(outputs_of(self._number, student), batch, self._label_smoothing)


class _PeerMutual(Term):
    """The mean distance of a peer to the others; only the peer gets a gradient."""

    def __init__(
        self, number: int, peers: int, task: Task, temperature: float, weight: float
    ) -> None:
        super().__init__(f"peer {number} mutual", weight, settings=(peers, temperature))
        self._number, self._task, self._temperature = number, task, temperature
        self._others = [other for other in range(peers) if other != number]

    def forward(
        self, student: Named, teacher: Named | None, batch: Named, progress: float
    ) -> Tensor:
        own = outputs_of(self._number, student)
        distances = [
            output_loss(self._task, own, outputs_of(other, student), batch, self._temperature)
            for other in self._others
        ]
        return sum(distances[1:], start=distances[0]) / len(distances)
