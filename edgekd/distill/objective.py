"""The objective of a training: the task's loss and weighted loss terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add

from torch import Tensor, nn

from edgekd.config.training import LossTerm
from edgekd.distill.loss_term import ConfiguredLoss, unit_identity
from edgekd.distill.losses.response import output_regression, soft_labels
from edgekd.distill.term import BuiltinTerm, Named, Term
from edgekd.errors import InputError
from edgekd.tasks import Task
from edgekd.tasks.continuous import ContinuousTask


def has_classes(task: Task) -> bool:
    """Whether the primary output is logits; else it is numbers."""
    return not isinstance(task, ContinuousTask)


def output_loss(
    task: Task,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    temperature: float = 1.0,
) -> Tensor:
    """``soft_labels`` where the task has classes, else ``output_regression`` by the task's own
    distance.

    Args:
        task: defines the output that is compared.
        student: outputs by name, with their graph.
        teacher: outputs by name; no gradient flows into them.
        batch: contains the mask of a continuous task, if there is one.
        temperature: T of the soft labels.

    Returns:
        A scalar.
    """
    own, answer = student[task.output], teacher[task.output].detach()
    if isinstance(task, ContinuousTask):
        unit = task.unit
        return output_regression(own / unit, answer / unit, task.loss, batch.get(task.mask))
    return soft_labels(own, answer, temperature)


class TaskLoss(BuiltinTerm):
    """The task's own loss against the data's targets."""

    def __init__(self, task: Task, label_smoothing: float) -> None:
        super().__init__("hard")
        self.task = task
        self.label_smoothing = label_smoothing

    @property
    def identity(self) -> str:
        """Everything that decides the term's value, as text."""
        return f"{super().identity} {self.label_smoothing}{unit_identity(self.task)}"

    def forward(self, student: Named, teacher: Named | None, batch: Named, part: float) -> Tensor:
        """The task's hard loss, a scalar."""
        return self.task.hard_loss(student, batch, self.label_smoothing)


class Objective(nn.Module):
    """The sum of weighted terms; the configuration is validated in the constructor.

    Its parameters are those of the terms' adapters: trained with the student, never exported.

    Args:
        terms: as the pipeline file names them (``distill.losses``).
        task: defines which output is compared, and with which target.
        label_smoothing: for the terms that can smooth labels and do not set it themselves.
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
        super().__init__()
        labels: list[str] = []
        built: list[ConfiguredLoss] = []
        for index, term in enumerate(terms):
            label = term.name.rpartition(":")[2]
            seen = sum(name == label or name.startswith(f"{label} ") for name in labels)
            labels.append(f"{label} {seen + 1}" if seen else label)
            position = f"{where}[{index}].{term.name}"
            built.append(ConfiguredLoss(term, labels[-1], task, label_smoothing, position))
        if not any(term.ever_weighs for term in built):
            raise InputError(
                "no loss term has a weight above zero",
                where=where,
                remedy="give at least one term a weight",
            )
        self._hold(built)

    @classmethod
    def supervised(cls, task: Task, label_smoothing: float = 0.0) -> Objective:
        """The objective of the task's hard loss alone: for a teacher, or a student without one."""
        return cls.of([TaskLoss(task, label_smoothing)])

    @classmethod
    def of(cls, terms: Sequence[Term]) -> Objective:
        """An objective of existing terms, such as a scheme's."""
        objective = cls.__new__(cls)
        nn.Module.__init__(objective)
        objective._hold(terms)
        return objective

    def _hold(self, terms: Sequence[Term]) -> None:
        self.terms: tuple[Term, ...] = tuple(terms)
        self._modules_of_terms = nn.ModuleList(t for t in terms if isinstance(t, nn.Module))

    @property
    def labels(self) -> tuple[str, ...]:
        """The terms' names in the history."""
        return tuple(term.label for term in self.terms)

    @property
    def identity(self) -> list[str]:
        """The fingerprint that must be equal for a training to be resumed."""
        return [term.identity for term in self.terms]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return any(term.needs_teacher for term in self.terms)

    @property
    def needs_full_logits(self) -> tuple[str, ...]:
        """The labels of the terms that a teacher's largest logits alone would mislead."""
        return tuple(term.label for term in self.terms if term.needs_full_logits)

    @property
    def needs_hard_label(self) -> tuple[str, ...]:
        """The labels of the terms that need one class per sample, and no mixture."""
        return tuple(term.label for term in self.terms if term.needs_hard_label)

    @property
    def needs_shapes(self) -> bool:
        """Whether :meth:`prepare` has adapters to make."""
        return any(term.needs_shapes for term in self.terms)

    @property
    def student_layers(self) -> dict[str, str]:
        """The student's layers whose features the terms compare, and where each is first named."""
        return _named_first((t.student_layers, t.place("student")) for t in self.terms)

    @property
    def teacher_layers(self) -> dict[str, str]:
        """The teacher's layers whose features the terms compare, and where each is first named."""
        return _named_first((t.teacher_layers, t.place("teacher")) for t in self.terms)

    def prepare(self, student: Named, teacher: Named | None, samples: int) -> None:
        """Make the adapters for the shapes of a first batch; repeated calls do nothing.

        Args:
            student: the student's outputs and features.
            teacher: the teacher's, when it is needed.
            samples: how many rows the training split has, for a loss with a memory bank.

        Raises:
            InputError: shapes that cannot be matched; both layers are named.
        """
        for term in self.terms:
            term.prepare(student, teacher, samples)

    def forward(
        self, student: Named, teacher: Named | None, batch: Named, part: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of one batch.

        Args:
            student: outputs and features by name, with their graph.
            teacher: the same without a graph; None is allowed when no term needs the teacher.
            batch: inputs and targets by name.
            part: the share of the training that is done, 0 to 1, for schedules.

        Returns:
            The weighted sum, a scalar to be differentiated; and each term's value before
            weighting, detached, by the term's label.
        """
        values = {term.label: term(student, teacher, batch, part) for term in self.terms}
        weights = {term.label: term.weight(part) for term in self.terms}
        # A term of weight zero is only recorded: 0 · NaN would otherwise make the sum NaN.
        weighted = [
            value if weights[label] == 1 else weights[label] * value
            for label, value in values.items()
            if weights[label]
        ]
        total = reduce(add, weighted) if weighted else next(iter(values.values())).new_zeros(())
        return total, {label: value.detach() for label, value in values.items()}


def _named_first(named: Iterable[tuple[Sequence[str], str]]) -> dict[str, str]:
    """Each layer with the position at which it is named first."""
    places: dict[str, str] = {}
    for layers, place in named:
        for layer in layers:
            places.setdefault(layer, place)
    return places
