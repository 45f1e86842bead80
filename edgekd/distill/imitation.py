"""How far one network's answer is from another's, whatever the task."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edgekd.distill.losses.response import regression, soft_labels
from edgekd.tasks import Task
from edgekd.tasks.continuous import ContinuousTask


def has_classes(task: Task) -> bool:
    """Whether the primary output is logits; else it is numbers."""
    return not isinstance(task, ContinuousTask)


def imitation(
    task: Task,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    temperature: float = 1.0,
) -> Tensor:
    """``soft_labels`` where the task has classes, else ``regression`` by the task's own distance.

    Args:
        task: names the output that is compared.
        student: outputs by name, with their graph.
        teacher: outputs by name; no gradient flows into them.
        batch: holds the mask of a continuous task, if there is one.
        temperature: T of the soft labels.

    Returns:
        A scalar.
    """
    own, answer = student[task.output], teacher[task.output].detach()
    if isinstance(task, ContinuousTask):
        unit = task.unit
        return regression(own / unit, answer / unit, task.loss, batch.get(task.mask))
    return soft_labels(own, answer, temperature)
