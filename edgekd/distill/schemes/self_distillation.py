"""A student without another teacher: born again under itself, or under its own deepest answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from edgekd.distill.features import Capture
from edgekd.distill.history import History
from edgekd.distill.losses.response import Temperature
from edgekd.distill.objective import Objective
from edgekd.distill.runtime import training_device
from edgekd.distill.schemes.exits import exit_terms
from edgekd.distill.schemes.scheme import Classroom
from edgekd.distill.teacher import ModuleTeacher, Teacher
from edgekd.errors import InputError

_WHERE = "distill.scheme.self"


def self_(
    room: Classroom,
    generations: Annotated[int, Field(ge=0)] | None = None,
    exits: tuple[str, ...] = (),
    temperature: Temperature = 3.0,
    share: Annotated[float, Field(ge=0, le=1)] = 0.3,
    hint: Annotated[float, Field(gt=0)] = 0.03,
    deepest: str | None = None,
) -> dict[str, History]:
    """Generations (born again, Furlanello et al. 2018), exits (Zhang et al. 2019), or both.

    Generation 0 is trained on the labels alone, each further one under the one before with the
    pipeline's loss terms; the last is the student. With exits, shallow layers answer too and learn
    from the deepest answer, in every generation. The pipeline's teacher is not asked.

    Args:
        room: what is worked with.
        generations: how many after generation 0. Left out: 1, or 0 with exits.
        exits: module paths of the student's layers, each of which gets a classifier of its own.
        temperature: T of what the deepest answer teaches the exits.
        share: α, its part beside the labels' at each exit.
        hint: λ, the weight of the features' distance when ``deepest`` is named.
        deepest: the module path of the feature that the exits' features are drawn to.

    Raises:
        InputError: nothing teaches the student, or a layer does not exist.
    """
    count = (0 if exits else 1) if generations is None else generations
    _check(room, count, exits, deepest)
    histories: dict[str, History] = {}
    teacher: Teacher | None = None
    for number in range(count + 1):
        last = number == count
        label = "student" if last else f"generation {number}"
        model = room.student if last else room.new_student(number + 1)
        objective = (
            Objective.supervised(room.task, room.label_smoothing)
            if teacher is None
            else room.new_objective()
        )
        if exits:
            shallow = exit_terms(
                exits,
                room.task,
                temperature=temperature,
                share=share,
                hint=hint,
                deepest=deepest,
                label_smoothing=room.label_smoothing,
            )
            objective = Objective.of([*objective.terms, *shallow])
        histories[label] = room.fit(model, objective, label, teacher)
        if not last:
            teacher = ModuleTeacher(model.to(training_device()))
    return histories


def _check(room: Classroom, count: int, exits: tuple[str, ...], deepest: str | None) -> None:
    """Find now what would else be found when generation 0 has been trained."""
    if not count and not exits:
        raise InputError(
            "nothing teaches the student: there are no generations and no exits",
            where=_WHERE,
            remedy="write generations: 1, or name layers as exits",
        )
    if deepest is not None and not exits:
        raise InputError(
            f"{deepest!r} is the deepest feature for exits, and there are none",
            where=_WHERE,
            remedy="name layers as exits, or remove 'deepest'",
        )
    named = [*exits, *([deepest] if deepest is not None else [])]
    Capture(room.student, named, _WHERE).remove()
    if not count:
        return
    objective = room.new_objective()
    if not objective.needs_teacher:
        raise InputError(
            "no loss term compares with a teacher: a generation would learn nothing from the one "
            "before",
            where=_WHERE,
            remedy="add soft_labels to distill.losses",
        )
    # Teacher and student are the same network, and so are their layers' paths.
    Capture(room.student, objective.teacher_layers | objective.student_layers).remove()
