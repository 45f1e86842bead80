"""The data and the task of a pipeline; its validation split for ONNX models; JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.config.pipeline import PipelineConfig
from edgekd.errors import InputError
from edgekd.pipeline.store import digest_of
from edgekd.quantization.evaluator import BATCH, Evaluator
from edgekd.spec import ModelSpec
from edgekd.tasks.classification import Classification
from edgekd.tasks.continuous import ContinuousTask

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from edgekd.data.dataset import Dataset
    from edgekd.data.loader import Loader
    from edgekd.onnx.compare import OutputError
    from edgekd.onnx.samples import Array
    from edgekd.tasks import Task

EVALUATION_BATCH = 512

_UNIT_VALUES = 10_000_000
"""Number of target values from which the unit of a regression is computed."""


@dataclass(frozen=True)
class TaskData:
    """The opened data and the task of a pipeline."""

    dataset: Dataset
    digest: str
    """Identifies the samples."""
    task: Task
    config: PipelineConfig

    @property
    def spec(self) -> ModelSpec:
        """The inputs and outputs that the data and the task give a network."""
        return ModelSpec(self.dataset.inputs, self.task.outputs(self.dataset))

    @property
    def num_classes(self) -> int:
        """Number of logits per sample; 0 without classes."""
        size = self.spec.outputs[0].shape[-1]
        return size if isinstance(self.task, Classification) and isinstance(size, int) else 0

    def validation_loader(self, channels_last: bool = False) -> Loader:
        """The validation split in its order, unaugmented."""
        from edgekd.data.loader import Loader

        split = self.dataset.splits["validation"]
        return Loader(split, self.dataset, EVALUATION_BATCH, channels_last=channels_last)

    def labelled_rows(self, split: str) -> NDArray[np.int64]:
        """The rows of a split that have a target, (R,)."""
        rows: NDArray[np.int64] = np.flatnonzero(
            self.task.labelled(self.dataset.splits[split].arrays)
        )
        return rows

    def keep_labels(self, share: float) -> TaskData:
        """The same data with that share of the training and validation labels.

        The same share selects the same labels, independent of the training's seed.

        Raises:
            InputError: a target is not one class per sample.
        """
        if share == 1:
            return self
        from edgekd.data.dataset import Split
        from edgekd.data.splits import keep_share

        arrays = {name: split.arrays for name, split in self.dataset.splits.items()}
        targets = {spec.name for spec in self.dataset.targets}
        kept = keep_share(arrays, share, targets, where="distill.labelled")
        splits = {name: Split(part) for name, part in kept.items()}
        return replace(self, dataset=replace(self.dataset, splits=splits))

    def lacks_labels(self) -> str:
        """The reason why training on labels alone is impossible; empty when it is possible."""
        if len(self.labelled_rows("train")) == 0:
            return "nothing to train on: no sample has a label"
        if len(self.labelled_rows("validation")) == 0:
            return "nothing to select the best epoch by: no validation sample has a label"
        return ""


def open_task_data(data: Path, config: PipelineConfig) -> TaskData:
    """Open the data stage's artifact."""
    from edgekd.data.dataset import open_dataset
    from edgekd.tasks import get_task

    dataset, task = open_dataset(data), get_task(config.task, config.task_args)
    if isinstance(task, ContinuousTask) and not _gives_logits(config):
        task.fit_unit(_evenly(dataset.splits["train"].arrays, (task.target, task.mask)))
    return TaskData(dataset, digest_of(data), task, config)


def _gives_logits(config: PipelineConfig) -> bool:
    """Whether a loss reads the values as logits, which have their own scale."""
    return any(term.name == "multi_label" for recipe in config.recipes for term in recipe)


def _evenly(
    arrays: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """The existing arrays of these names; of large ones evenly spaced rows."""
    found = {name: arrays[name] for name in names if name in arrays}
    row = max(int(np.prod(array.shape[1:])) for array in found.values())
    total = len(next(iter(found.values())))
    rows = np.linspace(0, total - 1, min(total, max(1, _UNIT_VALUES // max(1, row)))).astype(int)
    return {name: np.asarray(array[rows]) for name, array in found.items()}


def write_json(path: Path, value: Any) -> None:
    """Write an artifact's JSON file."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


class ValidationSamples:
    """Prepared inputs of the validation split, batch by batch; at most ``limit`` samples.

    The samples are spread evenly over the split, whose order may be that of the classes.
    """

    def __init__(self, task_data: TaskData, limit: int | None = None) -> None:
        self._dataset = task_data.dataset
        total = len(task_data.dataset.splits["validation"])
        self.rows = np.unique(np.linspace(0, total - 1, min(limit or total, total)).astype(int))

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.rows)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Batches of inputs by name, at most the limit in total."""
        dataset = self._dataset
        for start in range(0, self.count, size):
            rows = self.rows[start : start + size]
            if rows[-1] - rows[0] + 1 == len(rows):
                yield dict(dataset.model_inputs("validation", int(rows[0]), int(rows[-1]) + 1))
                continue
            # Read one by one: the rows between them are never read.
            each = [dataset.model_inputs("validation", int(r), int(r) + 1) for r in rows]
            yield {name: np.concatenate([one[name] for one in each]) for name in each[0]}


def some_samples(task_data: TaskData) -> dict[str, Tensor]:
    """A few inputs of the validation split, spread over it, as copied tensors."""
    import torch

    samples = ValidationSamples(task_data, BATCH)
    return {
        name: torch.from_numpy(np.array(array))
        for name, array in next(samples.batches(BATCH)).items()
    }


class TaskEvaluator(Evaluator):
    """By the task's metric on the validation split.

    Scores of a metric that is better when lower, an error, are divided by the error of the best
    constant prediction on the same samples: a drop of them is a share, whatever the unit of the
    targets. Without labels the metric is agreement with float32.

    Attributes:
        scale: the divisor of the scores: that error, or 1 for a metric that is better when higher.

    Raises:
        InputError: the constant's error is zero, so that no share of it is defined.
    """

    def __init__(self, task_data: TaskData, model: Path) -> None:
        from edgekd.tasks import agreement_task

        super().__init__(model, ValidationSamples(task_data))
        self.task = task_data.task
        arrays = task_data.dataset.splits["validation"].arrays
        self.targets = {s.name: np.asarray(arrays[s.name]) for s in task_data.dataset.targets}
        self.labelled = self.task.labelled(self.targets)
        if not self.labelled.any():
            # The reference is then float32's predictions.
            self.task = agreement_task(self.task)
            self.targets |= self._predictions()
            self.labelled = np.ones(self.samples.count, bool)
        self.output = self.task.output if isinstance(self.task, Classification) else None
        self.scale = 1.0 if self.task.higher_is_better else self._constant_error()
        self.scores = self.scores_of(model, "disabled")

    @property
    def drop_unit(self) -> str:
        """The unit in which drops are stated, as of :func:`drop_unit_of`."""
        return drop_unit_of(self.task)

    def change_text(self, drop: float) -> str:
        """How the metric moves with a drop of that size: ``−133.6 mae against float32's``."""
        from edgekd.measurement import Measurement, drop_unit, metric_change, value_text

        better = self.task.higher_is_better
        moved = Measurement(metric_change(drop * self.scale, better), drop_unit(self.task.metric))
        if float(f"{drop:.6f}") == 0:
            return f"{self.task.metric} as float32's"
        if better:
            return f"{self.task.metric} {value_text(moved, signed=True)} against float32's"
        share = Measurement(metric_change(drop, better), self.drop_unit)
        return (
            f"{value_text(moved, signed=True)} against float32's ({value_text(share, signed=True)})"
        )

    def score(self, outputs: Mapping[str, Array], rows: slice = slice(None)) -> Array:
        """The scores of the labelled samples among these rows, signed so that higher is better."""
        sign = 1 if self.task.higher_is_better else -1
        targets = {name: values[rows] for name, values in self.targets.items()}
        scores: Array = sign * self.task.scores(outputs, targets)[self.labelled[rows]] / self.scale
        return scores

    def compare(self, path: Path, batch: int = BATCH) -> tuple[float, tuple[OutputError, ...]]:
        """:meth:`drop_of` a file, and the error of each of its outputs against float32's."""
        found = self.side_by_side(path, batch=batch)
        return float((self.scores - found.scores).mean()), found.errors

    def _constant_error(self) -> float:
        known = {name: values[self.labelled] for name, values in self.targets.items()}
        error = float(self.task.scores(self.task.constant(known), known).mean())
        if not error > 0:
            raise InputError(
                f"the same prediction is right for all {int(self.labelled.sum())} validation "
                f"samples, so that no {self.task.metric} can be a share of its error",
                where="split validation",
                remedy="give data whose targets differ, or leave quantize out",
            )
        return error

    def _predictions(self) -> dict[str, Array]:
        """Float32's own predictions as targets."""
        from edgekd.onnx.inference import joined

        batches = self.run(self.model, "disabled")
        return joined([self.task.pseudo_targets(outputs) for _, outputs in batches])


def drop_unit_of(task: Task) -> str:
    """The unit in which a drop of the task's metric is stated."""
    from edgekd.measurement import OF_CONSTANT, drop_unit

    return drop_unit(task.metric) if task.higher_is_better else OF_CONSTANT
