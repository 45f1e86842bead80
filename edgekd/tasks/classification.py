"""Classification: one class out of C per sample, or per position of a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from edgekd.errors import InputError
from edgekd.spec import UNLABELLED, Dimension, TensorSpec
from edgekd.tasks.task import (
    Arrays,
    DatasetLike,
    check_finite,
    check_inputs,
    check_outputs_finite,
    required,
    target_arrays,
)

if TYPE_CHECKING:
    from torch import Tensor


class Classification:
    """Logits (B, C) or (B, T, C) against integer labels (B,) or (B, T); the metric is accuracy.

    The label -1 marks unlabelled samples: they count neither in the loss nor in the metric.

    Args:
        target: the name of the label array.
        output: the name of the logits.
        classes: the number of classes; left out, that of the data's class names, and
            without names the largest label of the training split. Data without labels need
            it.
    """

    name = "classification"
    metric = "accuracy"
    higher_is_better = True

    def __init__(
        self,
        target: str = "label",
        output: str = "logits",
        classes: Annotated[int, Field(ge=2)] | None = None,
    ) -> None:
        self.target = target
        self.output = output
        self.classes = classes

    def check(self, dataset: DatasetLike) -> None:
        """Check that the data fit the task; raises InputError."""
        arrays = target_arrays(dataset, self.target, self.name)
        for split, labels in arrays.items():
            self._check_integers(labels, split)
        classes = self._classes(dataset)
        for split, labels in arrays.items():
            outside = (labels < UNLABELLED) | (labels >= classes)
            if outside.any():
                position = np.argwhere(outside)[0]
                raise InputError(
                    f"the label of sample {int(position[0])} is {labels[tuple(position)]}, outside "
                    f"0…{classes - 1} ({int(outside.sum())} of {outside.size} labels are)",
                    where=f"split {split}, {self.target!r}",
                    remedy=f"labels count from 0, and {UNLABELLED} is for samples without one; "
                    f"there are {classes} classes ({self._classes_from(dataset)})",
                )
        check_inputs(dataset)

    def outputs(self, dataset: DatasetLike) -> tuple[TensorSpec, ...]:
        """The logits, (batch, C) or (batch, T, C)."""
        labels = target_arrays(dataset, self.target, self.name)["train"]
        shape: tuple[Dimension, ...] = ("batch", *labels.shape[1:], self._classes(dataset))
        return (TensorSpec(self.output, shape, "float32"),)

    def hard_loss(
        self,
        outputs: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy, mean over the batch."""
        from edgekd.tasks.losses import cross_entropy

        return cross_entropy(outputs[self.output], batch[self.target], label_smoothing)

    def scores(self, outputs: Arrays, targets: Arrays) -> np.ndarray[Any, Any]:
        """1 where the largest logit is the label's, else 0; the mean over a sample's positions.

        Positions without a label do not count; a sample without any has the score NaN.
        """
        logits = required(outputs, self.output, "output")
        labels = required(targets, self.target, "target")
        if logits.shape[:-1] != labels.shape:
            raise InputError(
                f"logits {list(logits.shape)} do not fit labels {list(labels.shape)}",
                remedy="the model must give one row of logits per label",
            )
        check_outputs_finite(logits, self.output)
        right = (logits.argmax(axis=-1) == labels).reshape(len(labels), -1)
        known = (labels > UNLABELLED).reshape(len(labels), -1)
        count = known.sum(axis=1)
        scores: np.ndarray[Any, Any] = np.full(len(labels), np.nan)
        np.divide((right & known).sum(axis=1), count, out=scores, where=count > 0)
        return scores

    def labelled(self, targets: Arrays) -> np.ndarray[Any, Any]:
        """(N,) bool: which samples have a label (at any position)."""
        labels = required(targets, self.target, "target")
        known = (labels > UNLABELLED).reshape(len(labels), -1)
        return np.asarray(known.any(axis=1))

    def pseudo_targets(self, outputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """The predicted classes as targets, int64."""
        return {self.target: required(outputs, self.output, "output").argmax(axis=-1)}

    def constant(self, targets: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Constant logits: 1 for the most frequent class and 0 for the others."""
        labels = required(targets, self.target, "target")
        frequency = np.bincount(labels[labels > UNLABELLED], minlength=1)
        logits = np.zeros((*labels.shape, len(frequency)))
        logits[..., frequency.argmax()] = 1
        return {self.output: logits}

    def _check_integers(self, labels: np.ndarray[Any, Any], split: str) -> None:
        where = f"split {split}, {self.target!r}"
        if labels.dtype.kind in "iu":
            return
        if labels.dtype.kind == "f":
            check_finite(labels, f"the label {self.target!r}", split)
            fractional = labels != np.floor(labels)
            if fractional.any():
                position = np.argwhere(fractional)[0]
                raise InputError(
                    f"the label of sample {int(position[0])} is {labels[tuple(position)]}, "
                    "not an integer",
                    where=where,
                    remedy="classification needs class numbers from 0; for continuous targets "
                    "write 'task: regression'",
                )
        raise InputError(
            f"labels are of type {labels.dtype}, not integers",
            where=where,
            remedy=f"save them as integers: {self.target}.astype('int64')"
            if labels.dtype.kind in "fb"
            else "save class numbers from 0, and give the names as 'labels'",
        )

    def _classes(self, dataset: DatasetLike) -> int:
        if self.classes is not None:
            return self.classes
        if dataset.labels:
            count = len(dataset.labels)
        else:
            count = int(dataset.splits["train"].arrays[self.target].max()) + 1
            if count <= 0:
                raise InputError(
                    "no training sample has a label, so the number of classes is unknown",
                    where=f"split train, {self.target!r}",
                    remedy="set it in the pipeline: task_args: {classes: …}",
                )
        if count < 2:
            raise InputError(
                f"the data have {count} class; there is nothing to classify",
                where=f"split train, {self.target!r}",
                remedy="give data of two classes or more",
            )
        return count

    def _classes_from(self, dataset: DatasetLike) -> str:
        if self.classes is not None:
            return "as set in task_args.classes"
        if dataset.labels:
            return "as many as class names"
        return "by the largest label of the training split; see task_args.classes"
