"""What teacher and distill share: a network, an objective and the data, brought together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.config.pipeline import PipelineConfig
from edgekd.config.training import DistillConfig, TrainConfig
from edgekd.errors import InputError
from edgekd.pipeline.fingerprint import library_versions
from edgekd.pipeline.store import digest_of
from edgekd.tasks.continuous import ContinuousTask

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from edgekd.data.dataset import Dataset
    from edgekd.data.loader import Loader
    from edgekd.distill.history import History
    from edgekd.distill.objective import Objective
    from edgekd.distill.teacher import Teacher
    from edgekd.models.named import NamedModel
    from edgekd.pipeline.stage import Context
    from edgekd.tasks import Task

EVALUATION_BATCH = 512
_UNIT_VALUES = 10_000_000
"""Target values that the unit of a regression is taken from."""
_FIRST_ANSWERS, _SMALLEST = 64, 1e-3
"""Samples that a fresh network is tried on; the least size that its answers count as."""
HUB_PACKAGES = ("timm", "transformers")


@dataclass(frozen=True)
class Ground:
    """The data and the task of a pipeline, opened."""

    dataset: Dataset
    digest: str
    """Identifies the samples."""
    task: Task
    config: PipelineConfig

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

    def keep_labels(self, share: float) -> Ground:
        """The same data with that share of the training and validation labels.

        The same share keeps the same labels, whatever the seed of the training.

        Raises:
            InputError: a target is not one class per sample.
        """
        if share == 1:
            return self
        from edgekd.data.dataset import Split
        from edgekd.data.labelled import keep_share

        arrays = {name: split.arrays for name, split in self.dataset.splits.items()}
        targets = {spec.name for spec in self.dataset.targets}
        kept = keep_share(arrays, share, targets, where="distill.labelled")
        splits = {name: Split(part) for name, part in kept.items()}
        return replace(self, dataset=replace(self.dataset, splits=splits))

    def lacks_labels(self) -> str:
        """Why nothing can be trained by labels alone; empty when it can."""
        if len(self.labelled_rows("train")) == 0:
            return "nothing to train on: no sample has a label"
        if len(self.labelled_rows("validation")) == 0:
            return "nothing to choose the best epoch by: no validation sample has a label"
        return ""


def open_ground(data: Path, config: PipelineConfig) -> Ground:
    """Open the data stage's artifact."""
    from edgekd.data.store import open_dataset
    from edgekd.tasks import get_task

    dataset, task = open_dataset(data), get_task(config.task, config.task_args)
    if isinstance(task, ContinuousTask) and not _gives_logits(config):
        task.fit_unit(_evenly(dataset.splits["train"].arrays, (task.target, task.mask)))
    return Ground(dataset, digest_of(data), task, config)


def _gives_logits(config: PipelineConfig) -> bool:
    """Whether a loss takes the numbers for logits, which have a scale of their own."""
    return any(term.name == "multi_label" for term in config.loss_terms)


def _evenly(
    arrays: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """The named arrays that there are; of large ones rows spread evenly over them."""
    found = {name: arrays[name] for name in names if name in arrays}
    row = max(int(np.prod(array.shape[1:])) for array in found.values())
    total = len(next(iter(found.values())))
    rows = np.linspace(0, total - 1, min(total, max(1, _UNIT_VALUES // max(1, row)))).astype(int)
    return {name: np.asarray(array[rows]) for name, array in found.items()}


def scale_output(ground: Ground, model: NamedModel) -> str:
    """Let a network with fresh weights answer in the unit of the targets, if it does not yet.

    A network that was made for the range of its targets (its own last layer multiplies) is left
    as it is: by their order of magnitude its first answers are nearer to the targets than to 1.

    Returns:
        What was done, for a person; empty: nothing.
    """
    import torch

    task = ground.task
    if not isinstance(task, ContinuousTask) or task.offset is None:
        return ""
    dataset = ground.dataset
    count = min(_FIRST_ANSWERS, len(dataset.splits["train"]))
    inputs = dataset.model_inputs("train", 0, count)
    training = model.training
    with torch.no_grad():
        given = model.eval()({name: torch.from_numpy(array) for name, array in inputs.items()})
    model.train(training)
    first = max(float(given[task.output].double().square().mean().sqrt()), _SMALLEST)
    wanted = math.sqrt(float(np.square(task.offset).mean()) + task.unit**2)
    if task.standardize == "auto" and abs(math.log(first / wanted)) <= abs(math.log(first)):
        return ""
    offset = np.asarray(task.offset, np.float32).reshape(given[task.output].shape[1:])
    model.scale_output(torch.tensor(task.unit, dtype=torch.float32), torch.from_numpy(offset))
    return (
        f"answers its network's output · {task.unit:.4g} + {offset.mean():.4g}: deviation and mean "
        f"of the training targets (task_args: {{standardize: false}} leaves it out)"
    )


def fit(
    ground: Ground,
    model: nn.Module,
    objective: Objective,
    train_config: TrainConfig,
    label: str,
    context: Context,
    teacher: Teacher | None = None,
) -> History:
    """Train ``model`` in place; its weights are then the best ones on the validation split.

    A distillation's teacher answers through the cache; so does its student alone see the same
    augmented views. Without a teacher only labelled samples are trained on, gone through as often
    as makes as many batches as all samples do. Where validation samples lack a label, the student
    of a teacher is scored by agreement with it there. A student has the share of the labels that
    ``distill.labelled`` gives it.

    Raises:
        InputError: there are no labels where they are needed.
    """
    from edgekd.data.dataset import Split
    from edgekd.data.loader import Loader
    from edgekd.data.memory import take
    from edgekd.distill.trainer import train
    from edgekd.stages.answers import (
        answered_validation,
        answering,
        augmentation_of,
        classes_of,
        views_of,
    )

    if isinstance(train_config, DistillConfig):
        ground = ground.keep_labels(train_config.labelled)
    dataset, config = ground.dataset, ground.config
    if not objective.needs_teacher and (lacking := ground.lacks_labels()):
        raise InputError(
            lacking,
            where=label,
            remedy="give labels (-1 says that a sample has none); or give a teacher by checkpoint "
            "or onnx, and the student a loss that compares with it",
        )
    channels_last = train_config.channels_last
    loader = partial(
        Loader,
        dataset=dataset,
        batch_size=train_config.batch_size,
        augment=augmentation_of(config, train_config),
        channels_last=channels_last,
        views=views_of(config, train_config),
        classes={ground.task.target: count} if (count := classes_of(ground)) else {},
    )
    training = loader(dataset.splits["train"])
    rows = ground.labelled_rows("train")
    if not objective.needs_teacher and len(rows) < training.samples:
        context.progress.message(
            f"  {label}: on the {len(rows):,} of {training.samples:,} samples that have a label"
        )
        # Not the loader's rows: mixing would still draw partners that have no label.
        part = {name: take(array, rows) for name, array in dataset.splits["train"].arrays.items()}
        training = loader(Split(part), steps=len(training))
    validation, task = ground.validation_loader(channels_last), ground.task
    labelled, asked = len(ground.labelled_rows("validation")), objective.needs_teacher
    if labelled == 0 or (asked and labelled < validation.samples):
        validation, task = answered_validation(ground, teacher, channels_last, label)
        context.progress.message(
            f"  {label}: {labelled} validation samples have a label: validated by {task.metric} "
            "where there is none"
        )
    if teacher is not None and objective.needs_teacher:
        teacher = answering(ground, teacher, objective, training, train_config, label, context)
    return train(
        model,
        objective,
        (training, validation),
        task,
        train_config,
        config.seed,
        teacher=teacher,
        checkpoint_folder=context.scratch / label.replace(" ", "-"),
        progress=context.progress,
        label=label,
    )


def hub_identity(name: str | None) -> dict[str, str]:
    """What decides a network of a hub beside its name: the package's version, and its folder.

    Empty for all other networks.
    """
    package, _, rest = (name or "").partition(":")
    if package not in HUB_PACKAGES or not rest:
        return {}
    from edgekd.files import hash_path
    from edgekd.models.hub import find_folder

    try:
        found = library_versions((package,))
    except PackageNotFoundError:
        return {}
    folder = find_folder(rest) if package == "transformers" else None
    return found if folder is None else {**found, "folder": hash_path(folder)}


def write_json(path: Path, value: Any) -> None:
    """Write JSON values in the form all artifacts use."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
