"""Schemes with a fixed teacher: offline, by an assistant, by an ensemble."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from edgekd.config.networks import ModelConfig, TeacherConfig
from edgekd.distill.checkpoint import History
from edgekd.distill.distributed import training_device
from edgekd.distill.features import FeatureExtractor, layer_key
from edgekd.distill.losses.response import log_probabilities
from edgekd.distill.objective import has_classes
from edgekd.distill.schemes import Network, SchemeContext
from edgekd.distill.teacher import ModuleTeacher, Teacher
from edgekd.errors import InputError
from edgekd.models.build import MODELS
from edgekd.models.dict_model import count_parameters
from edgekd.tasks.losses import at_least_float32

Combine = Literal["mean", "confidence"]

LARGE_GAP = 10
"""Ratio of teacher to student parameters from which the gap counts as large."""


def assistant(
    context: SchemeContext, models: Annotated[tuple[Network, ...], Field(min_length=1)]
) -> dict[str, History]:
    """Teacher assistants: each network is distilled from the one above it, the student last.

    Each is trained with the pipeline's loss terms. Terms that name layers need networks that all
    have them under these paths: of each pair, ``student`` is the learner's and ``teacher`` that
    of the network above it.

    Args:
        context: networks, data and training loop.
        models: the assistants from the teacher's side down.

    Raises:
        InputError: no term compares with a teacher, or one names a layer that a network lacks.
    """
    assistants = [context.build(config, index) for index, config in enumerate(models, start=1)]
    objective = context.new_objective()
    if not objective.needs_teacher:
        raise InputError(
            "no loss term compares with a teacher: an assistant would have no effect",
            where="distill.scheme.assistant",
            remedy="add soft_labels to distill.losses, or write scheme: offline",
        )
    for config, model in zip(models, assistants, strict=True):
        layers = objective.teacher_layers | objective.student_layers
        role = f"for the assistant {config.model}"
        FeatureExtractor(model, {name: f"{path}, {role}" for name, path in layers.items()}).remove()
    FeatureExtractor(context.student, objective.student_layers).remove()
    histories: dict[str, History] = {}
    teacher = context.teacher
    for number, model in enumerate(assistants, start=1):
        label = f"assistant {number}"
        histories[label] = context.fit(model, context.new_objective(), label, teacher)
        teacher = ModuleTeacher(model.to(training_device()))
    return {**histories, "student": context.fit(context.student, objective, "student", teacher)}


def propose_assistant(
    teacher_parameters: int, student_parameters: int, candidates: Mapping[str, int]
) -> str | None:
    """The best assistant for a large gap: the candidate nearest to the geometric mean of both
    sizes.

    Args:
        teacher_parameters: the teacher's number of parameters.
        student_parameters: the student's number of parameters.
        candidates: parameters by network name.

    Returns:
        Its name; None when the gap is :data:`LARGE_GAP` at most, or nothing lies between.
    """
    if teacher_parameters <= LARGE_GAP * student_parameters or student_parameters < 1:
        return None
    between = {
        name: count
        for name, count in candidates.items()
        if student_parameters < count < teacher_parameters
    }
    middle = math.sqrt(teacher_parameters * student_parameters)
    return min(between, key=lambda name: abs(math.log(between[name] / middle)), default=None)


_WHERE = "distill.scheme.ensemble"


def ensemble(
    context: SchemeContext,
    teachers: Annotated[tuple[TeacherConfig, ...], Field(min_length=1)],
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None,
    combine: Combine = "mean",
) -> dict[str, History]:
    """One training under the pipeline's teacher and others, whose outputs are combined.

    See :class:`EnsembleTeacher`. Terms that name the teacher's layers compare with those of the
    pipeline's own.

    Args:
        context: networks, data and training loop.
        teachers: the other teachers' sections, as that of the pipeline's teacher; those with
            ``train`` are trained here, each from a different seed.
        weights: the pipeline's teacher's first, then the others'; left out, all are equal.
        combine: ``mean`` of the probabilities (of the numbers, without classes), or
            ``confidence``: teachers that are certain of a sample weigh more in its mean.

    Raises:
        InputError: the weights do not fit, a section is wrong, confidence without classes, or no
            loss term compares with a teacher.
    """
    objective = context.new_objective()
    if not objective.needs_teacher:
        raise InputError(
            "no loss term compares with a teacher: the ensemble would never be used",
            where=_WHERE,
            remedy="add soft_labels to distill.losses, or remove distill.scheme",
        )
    classes = has_classes(context.task)
    # Wrong weights are found before a teacher is trained.
    member_shares(len(teachers) + 1, weights, combine, classes, _WHERE)
    others = [
        context.open_teacher(section, f"{_WHERE}.teachers[{index}]")
        for index, section in enumerate(teachers)
    ]
    teacher = EnsembleTeacher(
        [context.teacher, *others],
        context.task.output,
        classes=classes,
        weights=weights,
        combine=combine,
        where=_WHERE,
    )
    return {"student": context.fit(context.student, objective, "student", teacher)}


def offline(context: SchemeContext) -> dict[str, History]:
    """One training of the student with the pipeline's loss terms."""
    objective = context.new_objective()
    if objective.needs_teacher and (between := assistant_between(context)) is not None:
        context.say(
            f"  the teacher has {capacity_ratio(context):.0f} times the student's parameters; "
            f"{between} between them may help: distill.scheme: {{assistant: {{models: "
            f"[{between}]}}}}"
        )
    return {"student": context.fit(context.student, objective, "student", context.teacher)}


def capacity_ratio(scheme: SchemeContext) -> float | None:
    """The teacher's parameters by the student's; None for an ONNX teacher, where they are not
    known.
    """
    if not isinstance(scheme.teacher, ModuleTeacher):
        return None
    return count_parameters(scheme.teacher.model) / count_parameters(scheme.student)


def assistant_between(scheme: SchemeContext) -> str | None:
    """The built-in network that :func:`propose_assistant` takes; None where it takes none."""
    ratio, teacher = capacity_ratio(scheme), scheme.teacher
    if ratio is None or ratio <= LARGE_GAP or not isinstance(teacher, ModuleTeacher):
        return None
    below = count_parameters(scheme.student)
    candidates = {}
    kinds = (type(scheme.student.module), type(getattr(teacher.model, "module", None)))
    for name in MODELS:
        try:
            network = scheme.build(ModelConfig(model=name), 0)
        except InputError:
            continue  # It is made for other inputs.
        if isinstance(network.module, kinds):
            candidates[name] = count_parameters(network)
    return propose_assistant(round(ratio * below), below, candidates)


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
    def predict(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The combined outputs by name, and the first member's captured features.

        Raises:
            InputError: the members' outputs differ in name or shape.
        """
        outputs = [member.predict(batch) for member in self.members]
        combined = dict(outputs[0])
        for name in combined.keys() - self._layers:
            values = self._stacked(name, outputs)
            if name == self._output and self._classes:
                combined[name] = self._mixture(values)
            else:
                shares = torch.tensor(self._shares, dtype=values.dtype, device=values.device)
                combined[name] = torch.tensordot(shares, values, dims=1)
        return combined

    def capture(self, layers: Collection[str]) -> None:
        """Capture layers of the first member; see :class:`edgekd.distill.teacher.Teacher`."""
        self.members[0].capture(layers)
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

    def _stacked(self, name: str, outputs: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """An output of all members, (M, ...), in float32 or better."""
        for number, output in enumerate(outputs[1:], start=2):
            wanted = list(outputs[0][name].shape)
            given = list(output[name].shape) if name in output else "nothing"
            if given != wanted:
                raise InputError(
                    f"teacher {number} gives {given} as {name!r}, and the first one {wanted}",
                    where=self._where,
                    remedy="all teachers must have the same classes or targets, in the same order",
                )
        # An ONNX member's outputs are on the batch's device, a module's on its weights' device.
        device = outputs[0][name].device
        return torch.stack([at_least_float32(output[name].to(device)) for output in outputs])
