"""Networks of a size between teacher and student pass on what they learnt: Mirzadeh et al. 2020."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from edgekd.distill.features import Capture
from edgekd.distill.history import History
from edgekd.distill.runtime import training_device
from edgekd.distill.schemes.scheme import Classroom, Network
from edgekd.distill.teacher import ModuleTeacher
from edgekd.errors import InputError

LARGE_GAP = 10
"""From so many times the student's parameters on, a teacher is far above it."""


def assistant(
    room: Classroom, models: Annotated[tuple[Network, ...], Field(min_length=1)]
) -> dict[str, History]:
    """The teacher teaches the first assistant, that one the next, and the last the student.

    Each is trained with the pipeline's loss terms. Terms that name layers need networks that all
    have them under these paths: of each pair, ``student`` is the learner's and ``teacher`` that
    of the network above it.

    Args:
        room: what is worked with.
        models: the assistants from the teacher's side down.

    Raises:
        InputError: no term compares with a teacher, or one names a layer that a network lacks.
    """
    assistants = [room.build(config, index) for index, config in enumerate(models, start=1)]
    objective = room.new_objective()
    if not objective.needs_teacher:
        raise InputError(
            "no loss term compares with a teacher: an assistant would pass nothing on",
            where="distill.scheme.assistant",
            remedy="add soft_labels to distill.losses, or write scheme: offline",
        )
    for config, model in zip(models, assistants, strict=True):
        layers = objective.teacher_layers | objective.student_layers
        role = f"for the assistant {config.model}"
        Capture(model, {name: f"{place}, {role}" for name, place in layers.items()}).remove()
    Capture(room.student, objective.student_layers).remove()
    histories: dict[str, History] = {}
    teacher = room.teacher
    for number, model in enumerate(assistants, start=1):
        label = f"assistant {number}"
        histories[label] = room.fit(model, room.new_objective(), label, teacher)
        teacher = ModuleTeacher(model.to(training_device()))
    return {**histories, "student": room.fit(room.student, objective, "student", teacher)}


def propose_assistant(
    teacher_parameters: int, student_parameters: int, candidates: Mapping[str, int]
) -> str | None:
    """The network that bridges a large gap best: the nearest to the geometric mean of both sizes.

    Args:
        teacher_parameters: how many the teacher has.
        student_parameters: how many the student has.
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
