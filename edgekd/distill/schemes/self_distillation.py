"""Self-distillation: a network's deepest exit teaches its early exits.

Zhang et al. 2019, "Be your own teacher". The exits are trained with the network but are not part
of it, so that the exported student has none.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from edgekd.config.training import LossTerm
from edgekd.distill.checkpoint import History
from edgekd.distill.distributed import training_device
from edgekd.distill.features import FeatureExtractor, layer_key
from edgekd.distill.loss_term import ConfiguredLoss, Named, Term
from edgekd.distill.losses.response import Temperature
from edgekd.distill.objective import Objective, output_loss
from edgekd.distill.schemes import SchemeContext
from edgekd.distill.teacher import ModuleTeacher, Teacher
from edgekd.errors import InputError
from edgekd.tasks import Task

_EXITS = "distill.scheme.self"


class Exit(Term):
    """``(1 − α) · hard + α · soft labels of the deepest output`` at one layer (equation 6).

    A mean over positions and a linear layer turn the layer's feature into an output. No gradient
    flows into the deepest output from here.

    Args:
        layer: the module path.
        task: defines the output.
        temperature: T of the soft labels.
        share: α, from 0 to 1.
        label_smoothing: for the labels.
    """

    needs_shapes = True

    def __init__(
        self, layer: str, task: Task, temperature: float, share: float, label_smoothing: float
    ) -> None:
        super().__init__(f"exit {layer}", 1.0, (layer,), (temperature, share, label_smoothing))
        self._key = layer_key(layer)
        self._task, self._temperature, self._share = task, temperature, share
        self._label_smoothing = label_smoothing
        self.head: nn.Linear | None = None

    def prepare(self, student: Named, teacher: Named | None, samples: int) -> None:
        """Make the head for the layer's channels and the output's size.

        Raises:
            InputError: the layer outputs no map, sequence or vector.
        """
        if self.head is None:
            feature, output = pooled(student[self._key], self._key[1:]), student[self._task.output]
            self.head = nn.Linear(feature.shape[1], output[0].numel()).to(feature.device)

    def forward(
        self, student: Named, teacher: Named | None, batch: Named, progress: float
    ) -> Tensor:
        """The loss, a scalar."""
        assert self.head is not None
        deepest = student[self._task.output]
        early = self.head(pooled(student[self._key], self._key[1:])).reshape(deepest.shape)
        own = {self._task.output: early}
        hard = self._task.hard_loss(own, batch, self._label_smoothing)
        soft = output_loss(self._task, own, student, batch, self._temperature)
        return (1 - self._share) * hard + self._share * soft


class OwnHint(Term):
    """A feature loss of a shallow layer, with the same network's deepest one as the teacher.

    Args:
        layer: the module path of the shallow layer.
        deepest: that of the deepest one, which gets no gradient from here.
        task: as in :class:`edgekd.distill.loss_term.ConfiguredLoss`.
        weight: the paper's λ.
    """

    needs_shapes = True

    def __init__(self, layer: str, deepest: str, task: Task, weight: float) -> None:
        super().__init__(f"hint {layer}", weight, (layer, deepest))
        term = LossTerm(name="fitnets", args={"student": layer, "teacher": deepest})
        self.loss = ConfiguredLoss(term, self.label, task, 0.0, f"{_EXITS}.hint")

    def prepare(self, student: Named, teacher: Named | None, samples: int) -> None:
        """Make the adapter from the shapes of a first batch."""
        self.loss.prepare(student, student, samples)

    def forward(
        self, student: Named, teacher: Named | None, batch: Named, progress: float
    ) -> Tensor:
        """The loss, a scalar."""
        own = {key: value.detach() for key, value in student.items()}
        value: Tensor = self.loss(student, own, batch, progress)
        return value


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
        where=f"{_EXITS}.exits",
        remedy="name another layer; 'edgekd layers' lists them with their shapes",
    )


_WHERE = "distill.scheme.self"


def self_(
    context: SchemeContext,
    generations: Annotated[int, Field(ge=0)] | None = None,
    exits: tuple[str, ...] = (),
    temperature: Temperature = 3.0,
    share: Annotated[float, Field(ge=0, le=1)] = 0.3,
    hint: Annotated[float, Field(gt=0)] = 0.03,
    deepest: str | None = None,
) -> dict[str, History]:
    """Generations (born again, Furlanello et al. 2018), exits (Zhang et al. 2019), or both.

    Generation 0 is trained on the labels alone, each later one is distilled from the one before
    with the pipeline's loss terms; the last is the student. With exits, shallow layers predict too
    and learn from the deepest output, in every generation. The pipeline's teacher is not used.

    Args:
        context: networks, data and training loop.
        generations: number of generations after generation 0. Left out: 1, or 0 with exits.
        exits: module paths of the student's layers, each of which gets its own classifier.
        temperature: T of the deepest output's soft labels.
        share: α, the share of the soft labels against the hard ones at each exit.
        hint: λ, the weight of the features' distance when ``deepest`` is named.
        deepest: the module path of the feature that the exits' features imitate.

    Raises:
        InputError: nothing teaches the student, or a layer does not exist.
    """
    count = (0 if exits else 1) if generations is None else generations
    _check(context, count, exits, deepest)
    histories: dict[str, History] = {}
    teacher: Teacher | None = None
    for number in range(count + 1):
        last = number == count
        label = "student" if last else f"generation {number}"
        model = context.student if last else context.new_student(number + 1)
        objective = (
            Objective.supervised(context.task, context.label_smoothing)
            if teacher is None
            else context.new_objective()
        )
        terms = list(objective.terms)
        for layer in exits:
            terms.append(Exit(layer, context.task, temperature, share, context.label_smoothing))
            if deepest is not None:
                terms.append(OwnHint(layer, deepest, context.task, hint))
        objective = Objective.of(terms)
        histories[label] = context.fit(model, objective, label, teacher)
        if not last:
            teacher = ModuleTeacher(model.to(training_device()))
    return histories


def _check(context: SchemeContext, count: int, exits: tuple[str, ...], deepest: str | None) -> None:
    """Report now what would otherwise fail after the training of generation 0."""
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
    FeatureExtractor(context.student, named, _WHERE).remove()
    if not count:
        return
    objective = context.new_objective()
    if not objective.needs_teacher:
        raise InputError(
            "no loss term compares with a teacher: a generation would learn nothing from the one "
            "before",
            where=_WHERE,
            remedy="add soft_labels to distill.losses",
        )
    # Teacher and student are the same network, and so are their layers' paths.
    FeatureExtractor(context.student, objective.teacher_layers | objective.student_layers).remove()
