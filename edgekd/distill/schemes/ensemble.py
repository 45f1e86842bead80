"""Several teachers teach the student together: Hinton et al. 2015, section 5; You et al. 2017."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from edgekd.config.networks import TeacherConfig
from edgekd.distill.ensemble import Combine, EnsembleTeacher, member_shares
from edgekd.distill.history import History
from edgekd.distill.imitation import has_classes
from edgekd.distill.schemes.scheme import Classroom
from edgekd.errors import InputError

_WHERE = "distill.scheme.ensemble"


def ensemble(
    room: Classroom,
    teachers: Annotated[tuple[TeacherConfig, ...], Field(min_length=1)],
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None,
    combine: Combine = "mean",
) -> dict[str, History]:
    """One training under the pipeline's teacher and others, whose answers are made one.

    See :class:`EnsembleTeacher`. Terms that name the teacher's layers compare with those of the
    pipeline's own.

    Args:
        room: what is worked with.
        teachers: the other teachers' sections, as that of the pipeline's teacher; those with
            ``train`` are trained here, each from a seed of its own.
        weights: the pipeline's teacher's first, then the others'; left out, all count the same.
        combine: ``mean`` of the probabilities (of the numbers, without classes), or
            ``confidence``: each sample's mean leans to the teachers that are sure of it.

    Raises:
        InputError: the weights do not fit, a section is wrong, confidence without classes, or no
            loss term compares with a teacher.
    """
    objective = room.new_objective()
    if not objective.needs_teacher:
        raise InputError(
            "no loss term compares with a teacher: the ensemble would never be asked",
            where=_WHERE,
            remedy="add soft_labels to distill.losses, or remove distill.scheme",
        )
    classes = has_classes(room.task)
    # Wrong weights are found before a teacher is trained.
    member_shares(len(teachers) + 1, weights, combine, classes, _WHERE)
    others = [
        room.open_teacher(section, f"{_WHERE}.teachers[{index}]")
        for index, section in enumerate(teachers)
    ]
    together = EnsembleTeacher(
        [room.teacher, *others],
        room.task.output,
        classes=classes,
        weights=weights,
        combine=combine,
        where=_WHERE,
    )
    return {"student": room.fit(room.student, objective, "student", together)}
