"""The objective of a training: the task's loss and weighted loss terms."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from edgekd.config.training import LossTerm
from edgekd.distill.loss_term import ConfiguredLoss, Named, Term, unit_fingerprint
from edgekd.distill.losses.response import output_regression, soft_labels
from edgekd.errors import InputError
from edgekd.tasks import Task
from edgekd.tasks.continuous import ContinuousTask

GRADIENT_BATCHES = 4
"""Number of batches that must all show no gradient before a term is refused."""

_BINARY = 2
_TWO_CLASSES = (
    "use soft_labels or wsld: of two classes the standardized logits are always (1, -1) or "
    "(-1, 1), dkd without alpha is constant, and dist without gamma correlates fully"
)

_NOTHING = {torch.float64: 1e-9, torch.float32: 1e-5}
"""‖gradient‖ · ‖outputs‖ as a share of the loss, below which a gradient is rounding."""


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
    own, soft = student[task.output], teacher[task.output].detach()
    if isinstance(task, ContinuousTask):
        unit = task.unit
        return output_regression(own / unit, soft / unit, task.loss, batch.get(task.mask))
    return soft_labels(own, soft, temperature)


class TaskLoss(Term):
    """The task's own loss against the data's targets."""

    def __init__(self, task: Task, label_smoothing: float) -> None:
        super().__init__("hard")
        self.task = task
        self.label_smoothing = label_smoothing

    @property
    def fingerprint(self) -> str:
        """Everything that decides the term's value, as text."""
        unit = getattr(self.task, "unit", 1.0)
        return f"{super().fingerprint} {self.label_smoothing}{unit_fingerprint(unit)}"

    def forward(
        self, student: Named, teacher: Named | None, batch: Named, progress: float
    ) -> Tensor:
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
        self.terms = tuple(terms)
        self._modules_of_terms = nn.ModuleList(terms)

    @property
    def labels(self) -> tuple[str, ...]:
        """The terms' names in the history."""
        return tuple(term.label for term in self.terms)

    @property
    def fingerprint(self) -> list[str]:
        """The fingerprint that must be equal for a training to be resumed."""
        return [term.fingerprint for term in self.terms]

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
        return _named_first((t.student_layers, t.config_path("student")) for t in self.terms)

    @property
    def teacher_layers(self) -> dict[str, str]:
        """The teacher's layers whose features the terms compare, and where each is first named."""
        return _named_first((t.teacher_layers, t.config_path("teacher")) for t in self.terms)

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
        self, student: Named, teacher: Named | None, batch: Named, progress: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of one batch.

        Args:
            student: outputs and features by name, with their graph.
            teacher: the same without a graph; None is allowed when no term needs the teacher.
            batch: inputs and targets by name.
            progress: the share of the training that is done, 0 to 1, for schedules.

        Returns:
            The weighted sum, a scalar to be differentiated; and each term's value before
            weighting, detached, by the term's label.
        """
        values = {term.label: term(student, teacher, batch, progress) for term in self.terms}
        weights = {term.label: term.weight(progress) for term in self.terms}
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
    paths: dict[str, str] = {}
    for layers, path in named:
        for layer in layers:
            paths.setdefault(layer, path)
    return paths


def check_gradients(
    objective: Objective, batches: Iterable[tuple[Named, Named | None, Named]]
) -> list[str]:
    """Refuse a term whose gradient to the student is zero on every batch that could have one.

    The gradient is taken at the student's outputs and at perturbed ones, because a student
    that starts with its teacher's outputs has none at first. Terms that a scheme makes are not
    checked. The objective and the random state are left unchanged.

    Args:
        objective: prepared.
        batches: the student's outputs and features, the teacher's, and the batch; as many are
            taken as needed, most often one.

    Returns:
        A remark on each loss of the user's own that was 0 on all of these batches: one that counts
        some samples only, such as those that the teacher is sure of, may find them later.

    Raises:
        InputError: a term has no gradient.
    """
    remarks = []
    silent = [t for t in objective.terms if isinstance(t, ConfiguredLoss) and t.ever_weighs]
    tried = dict.fromkeys((term.label for term in silent), 0)
    largest = dict.fromkeys(tried, 0.0)
    student: Named = {}
    for number, (student, teacher, batch) in enumerate(batches, start=1):
        for term in list(silent):
            if not term.can_teach(batch):
                continue
            tried[term.label] += 1
            found, value = _has_gradient(term, student, teacher, batch)
            largest[term.label] = max(largest[term.label], abs(value))
            if found:
                silent.remove(term)
        if not silent or number == GRADIENT_BATCHES:
            break
    for term in silent:
        if tried[term.label] and largest[term.label] == 0 and not term.is_built_in:
            remarks.append(
                f"the loss {term.label!r} is 0 on the first {tried[term.label]} batches, and "
                "teaches nothing until it is not"
            )
        elif tried[term.label]:
            size = student[term.task.output].shape[-1]
            raise InputError(
                f"the loss {term.label!r} has no gradient to the student: whatever the student "
                f"predicts, it is the same (on {tried[term.label]} of the first batches)",
                where=term.where,
                remedy=_TWO_CLASSES
                if size == _BINARY and has_classes(term.task)
                else "remove it, or change what makes it constant: a batch of one sample, a "
                "factor of 0, a .detach() or a decision such as argmax",
            )
    return remarks


def _has_gradient(
    term: ConfiguredLoss, student: Named, teacher: Named | None, batch: Named
) -> tuple[bool, float]:
    """Whether there is a gradient, and the loss; 1 for one that is not connected to the student."""
    # Modules have weights in float32, and may update buffers when called.
    own = copy.deepcopy(term) if term.needs_shapes else term
    dtype = torch.float32 if term.needs_shapes else torch.float64
    largest = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for share in (0.0, 0.1):
            leaves = {k: _leaf(t, dtype, share) for k, t in student.items()}
            taught = None if teacher is None else {k: _wide(t, dtype) for k, t in teacher.items()}
            floats = [t for t in leaves.values() if t.requires_grad]
            with torch.enable_grad():
                value = own(leaves, taught, batch, 0.5)
            if not value.requires_grad:
                largest = 1.0
                continue
            largest = max(largest, abs(float(value.detach())))
            found = torch.autograd.grad(value, floats, allow_unused=True)
            size = sum(
                float(g.double().norm() * t.detach().double().norm())
                for g, t in zip(found, floats, strict=True)
                if g is not None
            )
            # NaN is a gradient too: the training itself reports it.
            if not size <= _NOTHING[dtype] * abs(float(value.detach())):
                return True, largest
    return False, largest


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor


def _leaf(tensor: Tensor, dtype: torch.dtype, share: float) -> Tensor:
    """The tensor as a leaf that requires a gradient, with noise proportional to its spread."""
    if not tensor.is_floating_point():
        return tensor
    wide = tensor.detach().to(dtype)
    if share:
        spread = wide.std() if wide.numel() > 1 else wide.abs().mean()
        wide = wide + share * (spread + 1e-3) * torch.randn_like(wide)
    else:
        wide = wide.clone()
    return wide.requires_grad_()
