"""What a student is trained for: a weighted sum of loss terms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from edgekd.arguments import check_arguments, parameters_of
from edgekd.config.pipeline import LossTerm
from edgekd.distill.losses import LOSSES, Loss
from edgekd.errors import EdgekdError, InputError
from edgekd.extension import resolve
from edgekd.tasks import Policy, Regression, Task

TENSORS = ("student", "teacher", "target", "mask")
"""The parameters of a loss that the objective fills in; all others come from YAML."""

_FOR_CLASSES = ("hard_labels", "soft_labels", "teacher_labels")


class Term(Protocol):
    """One weighted summand."""

    @property
    def label(self) -> str:
        """Its name in the history."""
        ...

    @property
    def weight(self) -> float:
        """Its factor in the sum."""
        ...

    @property
    def args(self) -> Mapping[str, object]:
        """What it was given beside the tensors."""
        ...

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with the teacher."""
        ...

    def __call__(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor] | None,
        batch: Mapping[str, Tensor],
    ) -> Tensor:
        """Its value, a scalar."""
        ...


@dataclass(frozen=True)
class NamedLoss:
    """A loss function of the pipeline with its arguments bound."""

    label: str
    weight: float
    loss: Loss
    tensors: tuple[str, ...]
    args: Mapping[str, object]
    task: Task
    where: str

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss has a parameter ``teacher``."""
        return "teacher" in self.tensors

    def __call__(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor] | None,
        batch: Mapping[str, Tensor],
    ) -> Tensor:
        """The loss of the task's primary output, a scalar.

        Raises:
            InputError: shapes that do not fit, or a loss that gives no single number.
        """
        supplied: dict[str, Tensor | None] = {"student": student[self.task.output]}
        if "teacher" in self.tensors:
            supplied["teacher"] = _teacher_output(teacher, self.task.output, self.where)
        if "target" in self.tensors:
            supplied["target"] = batch[self.task.target]
        if "mask" in self.tensors:
            supplied["mask"] = batch.get(f"{self.task.target}_mask")
        try:
            value = self.loss(**supplied, **self.args)
        except EdgekdError as error:
            raise InputError(
                error.what, where=error.where or self.where, remedy=error.remedy
            ) from error
        if not isinstance(value, Tensor) or value.ndim:
            given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"a loss must give one number (a tensor without dimensions), and this one gives "
                f"{given}",
                where=self.where,
                remedy="end it with .mean()",
            )
        return value


@dataclass(frozen=True)
class HardLoss:
    """The task's own loss against the data's targets."""

    task: Task
    label_smoothing: float
    label: str = "hard"
    weight: float = 1.0
    needs_teacher: bool = False

    @property
    def args(self) -> Mapping[str, object]:
        """How much the labels are smoothed."""
        return {"label_smoothing": self.label_smoothing}

    def __call__(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor] | None,
        batch: Mapping[str, Tensor],
    ) -> Tensor:
        """The task's hard loss, a scalar."""
        return self.task.hard_loss(student, batch, self.label_smoothing)


class Objective:
    """The sum of weighted terms; everything a user can get wrong is checked when it is made.

    Args:
        terms: as the pipeline file names them (``distill.losses``).
        task: says which output is compared, and with which target.
        label_smoothing: for the terms that can smooth labels and do not say how much.
        where: the YAML position of the terms, for errors.

    Raises:
        InputError: no such loss (the nearest is suggested), an unknown argument, a wrong value,
            a loss for classes in a task without them, or weights that are all zero.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        task: Task,
        label_smoothing: float = 0.0,
        where: str = "distill.losses",
    ) -> None:
        labels: list[str] = []
        built: list[Term] = []
        for index, term in enumerate(terms):
            label = term.name.rpartition(":")[2]
            seen = sum(name == label or name.startswith(f"{label} ") for name in labels)
            labels.append(f"{label} {seen + 1}" if seen else label)
            position = f"{where}[{index}].{term.name}"
            built.append(_named_loss(term, labels[-1], task, label_smoothing, position))
        self._hold(built, task, where)

    @classmethod
    def supervised(cls, task: Task, label_smoothing: float = 0.0) -> Objective:
        """The task's own hard loss alone: how a teacher, or a student alone, is trained."""
        objective = cls.__new__(cls)
        objective._hold([HardLoss(task, label_smoothing)], task, task.name)
        return objective

    def _hold(self, terms: Sequence[Term], task: Task, where: str) -> None:
        if not any(term.weight for term in terms):
            raise InputError(
                "no loss term has a weight above zero",
                where=where,
                remedy="give at least one term a weight",
            )
        self.terms = tuple(terms)
        self.task = task

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return any(term.needs_teacher for term in self.terms)

    def __call__(
        self,
        student_outputs: Mapping[str, Tensor],
        teacher_outputs: Mapping[str, Tensor] | None,
        batch: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of one batch.

        Args:
            student_outputs: by name, with their graph.
            teacher_outputs: by name; None is allowed when no term needs the teacher.
            batch: inputs and targets by name.

        Returns:
            The weighted sum, a scalar to be differentiated; and each term's value before
            weighting, detached, by the term's label.
        """
        values = {term.label: term(student_outputs, teacher_outputs, batch) for term in self.terms}
        # A term of weight zero is only watched: 0 · NaN would otherwise spoil the sum.
        total = sum(
            (term.weight * values[term.label] for term in self.terms if term.weight),
            start=next(iter(values.values())).new_zeros(()),
        )
        return total, {label: value.detach() for label, value in values.items()}


def _named_loss(
    term: LossTerm, label: str, task: Task, label_smoothing: float, where: str
) -> NamedLoss:
    loss: Loss = resolve(term.name, LOSSES, "loss", where)
    parameters = parameters_of(loss, where)
    if "student" not in parameters:
        raise InputError(
            f"{term.name!r} is no loss: it has no parameter 'student'",
            where=where,
            remedy="write it as def name(student, teacher, …) or def name(student, target, …)",
        )
    if term.name in _FOR_CLASSES and isinstance(task, Regression | Policy):
        other = "hard_targets" if term.name == "hard_labels" else "regression"
        raise InputError(
            f"{term.name} compares classes, and the task {task.name} has none",
            where=where,
            remedy=f"use {other}",
        )
    if not math.isfinite(term.weight):
        raise InputError(f"the weight is {term.weight}", where=where, remedy="give a number")
    args = check_arguments(
        loss, term.args, supplied=TENSORS, name=f"loss {term.name!r}", where=where
    )
    if label_smoothing and "label_smoothing" in parameters:
        args.setdefault("label_smoothing", label_smoothing)
    tensors = tuple(name for name in TENSORS if name in parameters)
    return NamedLoss(label, term.weight, loss, tensors, args, task, where)


def _teacher_output(teacher: Mapping[str, Tensor] | None, name: str, where: str) -> Tensor:
    if teacher is None:
        raise InputError(
            "this loss compares with a teacher, and there is none",
            where=where,
            remedy="give a teacher, or use hard_labels or hard_targets alone",
        )
    if name not in teacher:
        raise InputError(
            f"the teacher gives {', '.join(teacher)}, and not {name!r}",
            where=where,
            remedy=f"name its output {name!r}",
        )
    return teacher[name]
