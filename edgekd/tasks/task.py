"""The interface of a task, and the checks of samples and outputs that tasks share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgekd.errors import InputError, StageError
from edgekd.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Arrays = Mapping[str, "np.ndarray[Any, Any]"]
"""Named arrays of one split, the samples along the first dimension."""


class SplitLike(Protocol):
    """One split of a data set: named arrays with the same number of samples."""

    @property
    def arrays(self) -> Arrays:
        """The arrays by name, each (N, ...)."""
        ...


class DatasetLike(Protocol):
    """The properties of a data set that a task needs."""

    @property
    def splits(self) -> Mapping[str, SplitLike]:
        """``train``, ``validation`` and ``test``."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of a model."""
        ...

    @property
    def targets(self) -> tuple[TensorSpec, ...]:
        """The targets."""
        ...

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Class names; None when the task has no classes or they are unnamed."""
        ...


class Task(Protocol):
    """What the outputs of a model mean.

    A sample may have no target; the metric of a split is that of its labelled samples. A split
    without any is scored by agreement with the teacher (:func:`agreement_task`).

    Attributes:
        name: the task's name in a pipeline.
        output: the primary output of the model, such as ``logits``.
        target: the array it is compared with, such as ``label``.
        metric: the primary metric's name.
        higher_is_better: the metric's direction.
    """

    name: str
    output: str
    target: str
    metric: str
    higher_is_better: bool

    def check(self, dataset: DatasetLike) -> None:
        """Raise InputError when the data do not fit the task; names split, sample and value."""
        ...

    def outputs(self, dataset: DatasetLike) -> tuple[TensorSpec, ...]:
        """The required outputs of a model for this data set, the primary output first."""
        ...

    def hard_loss(
        self,
        outputs: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The loss against the data's own targets, a scalar."""
        ...

    def scores(self, outputs: Arrays, targets: Arrays) -> np.ndarray[Any, Any]:
        """The metric of each sample, (N,) float64; the metric of a set is their mean.

        Only scores of samples that are :meth:`labelled` are valid.
        """
        ...

    def labelled(self, targets: Arrays) -> np.ndarray[Any, Any]:
        """(N,) bool: which samples have a target."""
        ...

    def pseudo_targets(self, outputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """The targets that a model with these outputs would be right about in every sample."""
        ...

    def constant(self, targets: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """The outputs of the best constant prediction for these targets.

        Its score is the level of chance: it uses the targets but not the samples.
        """
        ...


def constant_outputs(task: Task, known: Arrays, count: int) -> dict[str, np.ndarray[Any, Any]]:
    """The prediction of the best constant for these targets, repeated for ``count`` samples.

    Args:
        task: defines the best constant: the most frequent class, the median, the mean.
        known: its targets of labelled samples, at least one.
        count: number of predicted samples.

    Returns:
        Outputs by name, (count, ...) each, every row the same.
    """
    return {
        name: np.broadcast_to(values[:1], (count, *values.shape[1:]))
        for name, values in task.constant(known).items()
    }


AGREEMENT = "agreement"
"""The metric against the teacher's predictions, for data without labels."""


def agreement_task(task: Task) -> Task:
    """The same task with the metric named for what it is when its targets are the teacher's.

    The share of samples in which student and teacher agree, or for a task with another metric
    its distance to the teacher's predictions.
    """
    agreeing = copy.copy(task)
    agreeing.metric = AGREEMENT if task.metric == "accuracy" else f"{task.metric} to the teacher"
    return agreeing


_ROWS_AT_ONCE = 4096
"""Reads a memory-mapped array in chunks, so that it is never loaded completely."""


def target_arrays(dataset: DatasetLike, target: str, task: str) -> dict[str, np.ndarray[Any, Any]]:
    """The target array of each split.

    Raises:
        InputError: a split is empty or has no such array.
    """
    found = {}
    for split, content in dataset.splits.items():
        if target not in content.arrays:
            known = ", ".join(sorted(content.arrays)) or "nothing"
            raise InputError(
                f"the task {task} needs the target {target!r}, and the data have {known}",
                where=f"split {split}",
                remedy=f"name the array in the pipeline: task_args: {{target: …}}; it is "
                f"{target!r} when left out",
            )
        array = content.arrays[target]
        if len(array) == 0:
            raise InputError(
                f"the split {split!r} has no samples",
                where=f"split {split}",
                remedy="give more data, or change the fraction that is split off for it",
            )
        found[split] = array
    return found


def check_inputs(dataset: DatasetLike) -> None:
    """Raise InputError for an input that is missing or contains NaN or infinity."""
    for split, content in dataset.splits.items():
        for spec in dataset.inputs:
            if spec.name not in content.arrays:
                raise InputError(
                    f"the split {split!r} has no input {spec.name!r}",
                    where=f"split {split}",
                    remedy=f"it has {', '.join(sorted(content.arrays))}",
                )
            check_finite(content.arrays[spec.name], f"input {spec.name!r}", split)


def check_finite(array: np.ndarray[Any, Any], what: str, split: str) -> None:
    """Raise InputError for the first NaN or infinity, with its sample and position."""
    if array.dtype.kind not in "fc":
        return
    for start in range(0, len(array), _ROWS_AT_ONCE):
        bad = ~np.isfinite(array[start : start + _ROWS_AT_ONCE])
        if not bad.any():
            continue
        position = np.argwhere(bad)[0]
        value = array[start : start + _ROWS_AT_ONCE][tuple(position)]
        inside = [int(i) for i in position[1:]]
        raise InputError(
            f"{what} of sample {start + int(position[0])} is {value}"
            + (f" at {inside}" if inside else ""),
            where=f"split {split}",
            remedy="remove the sample or fill in the value; nothing can be learned from NaN",
        )


def check_outputs_finite(output: np.ndarray[Any, Any], name: str) -> None:
    """Raise StageError for outputs with NaN or infinity: no metric of them is meaningful."""
    finite = np.isfinite(output.reshape(len(output), -1)).all(axis=1)
    if not finite.all():
        raise StageError(
            f"the model's {name!r} is not finite for {int((~finite).sum())} of "
            f"{len(finite)} samples, first for sample {int(np.argmin(finite))}",
            remedy="lower the learning rate, set clip_norm, or look at the weights it started from",
        )


def required(arrays: Arrays, name: str, kind: str) -> np.ndarray[Any, Any]:
    """An array by name.

    Raises:
        InputError: there is none; the names there are are listed.
    """
    if name not in arrays:
        raise InputError(
            f"there is no {kind} named {name!r}",
            remedy=f"there are: {', '.join(sorted(arrays)) or 'none'}",
        )
    return np.asarray(arrays[name])
