"""Tasks: hard loss, metric and the checks of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgekd.errors import InputError
from edgekd.extension import check_arguments, resolve
from edgekd.tasks.classification import Classification
from edgekd.tasks.continuous import Policy, Regression
from edgekd.tasks.task import DatasetLike, Task, agreement_task, constant_outputs

__all__ = [
    "TASKS",
    "Classification",
    "DatasetLike",
    "Policy",
    "Regression",
    "Task",
    "agreement_task",
    "constant_outputs",
    "get_task",
]

TASKS: dict[str, Callable[..., Task]] = {
    "classification": Classification,
    "regression": Regression,
    "policy": Policy,
}
"""The built-in tasks by the names they have in a pipeline."""

_MEMBERS = (
    "output", "target", "metric", "higher_is_better",
    "check", "outputs", "hard_loss", "scores", "labelled", "pseudo_targets", "constant",
)  # fmt: skip


def get_task(name: str, args: Mapping[str, Any] | None = None, where: str = "task") -> Task:
    """The task a pipeline names.

    Args:
        name: a key of :data:`TASKS`; or an entry point of ``edgekd.tasks``, or
            ``package.module:name``, of a class or function that gives a :class:`Task`.
        args: its arguments (``task_args``).
        where: the YAML key, for errors.

    Raises:
        InputError: there is no such task, its arguments are wrong, or it is not a task.
    """
    maker = resolve(name, TASKS, "task", where, group="edgekd.tasks")
    given = check_arguments(maker, args or {}, name=f"task {name!r}", where=f"{where}_args")
    task: Task = maker(**given)
    lacking = [member for member in _MEMBERS if not hasattr(task, member)]
    if lacking:
        raise InputError(
            f"{name!r} is not a task: it has no {', '.join(lacking)}",
            where=where,
            remedy="implement the interface edgekd.tasks.Task",
        )
    return task
