"""Schemes with a fixed teacher: offline, by an assistant, by an ensemble."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from edgekd.config.networks import ModelConfig, TeacherConfig
from edgekd.distill.checkpoint import History
from edgekd.distill.distributed import training_device
from edgekd.distill.ensemble import Combine, EnsembleTeacher, member_shares
from edgekd.distill.features import FeatureExtractor
from edgekd.distill.objective import has_classes
from edgekd.distill.schemes.scheme import Network, SchemeContext
from edgekd.distill.teacher import ModuleTeacher
from edgekd.errors import InputError
from edgekd.models.build import MODELS
from edgekd.models.dict_model import count_parameters

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
        FeatureExtractor(
            model, {name: f"{place}, {role}" for name, place in layers.items()}
        ).remove()
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
    together = EnsembleTeacher(
        [context.teacher, *others],
        context.task.output,
        classes=classes,
        weights=weights,
        combine=combine,
        where=_WHERE,
    )
    return {"student": context.fit(context.student, objective, "student", together)}


def offline(context: SchemeContext) -> dict[str, History]:
    """One training of the student with the pipeline's loss terms."""
    objective = context.new_objective()
    if objective.needs_teacher:
        _propose_assistant(context)
    return {"student": context.fit(context.student, objective, "student", context.teacher)}


def _propose_assistant(context: SchemeContext) -> None:
    """Suggest an assistant between a large teacher and the student."""
    if not isinstance(context.teacher, ModuleTeacher):
        return  # The parameters of an ONNX file are not known.
    above, below = count_parameters(context.teacher.model), count_parameters(context.student)
    if above <= LARGE_GAP * below:
        return
    candidates = {}
    kinds = (type(context.student.module), type(getattr(context.teacher.model, "module", None)))
    for name in MODELS:
        try:
            network = context.build(ModelConfig(model=name), 0)
        except InputError:
            continue  # It is made for other inputs.
        if isinstance(network.module, kinds):
            candidates[name] = count_parameters(network)
    between = propose_assistant(above, below, candidates)
    if between is not None:
        context.say(
            f"  the teacher has {above / below:.0f} times the student's parameters; {between} "
            f"between them may help: distill.scheme: {{assistant: {{models: [{between}]}}}}"
        )
