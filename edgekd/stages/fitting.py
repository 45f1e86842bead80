"""What teacher and distill share: a network, an objective and the data, brought together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.config.pipeline import CacheConfig, DistillConfig, PipelineConfig, TrainConfig
from edgekd.errors import InputError
from edgekd.pipeline.fingerprint import code_sha256, library_versions, references_sha256
from edgekd.pipeline.store import digest_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from edgekd.data.dataset import Dataset
    from edgekd.data.loader import Loader
    from edgekd.distill.history import History
    from edgekd.distill.objective import Objective
    from edgekd.distill.teacher import Teacher
    from edgekd.pipeline.stage import Context
    from edgekd.tasks import Task

TRAINING_CODE = ("edgekd.stages.fitting", "edgekd.data", "edgekd.tasks", "edgekd.models",
                 "edgekd.distill")  # fmt: skip
EVALUATION_BATCH = 512
_AUGMENTATION = ("edgekd.data.augment", "edgekd.data.draws", "edgekd.data.mixing",
                 "edgekd.data.transforms")  # fmt: skip
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

    return Ground(
        open_dataset(data), digest_of(data), get_task(config.task, config.task_args), config
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
    as makes as many batches as all samples do. A validation split without labels is scored by
    agreement with the teacher.

    Raises:
        InputError: there are no labels where they are needed.
    """
    from edgekd.data.dataset import Split
    from edgekd.data.loader import Loader
    from edgekd.data.memory import take
    from edgekd.distill.trainer import train

    dataset, config = ground.dataset, ground.config
    if not objective.needs_teacher and (lacking := ground.lacks_labels()):
        raise InputError(
            lacking,
            where=label,
            remedy="give labels (-1 says that a sample has none); or give a teacher by checkpoint "
            "or onnx, and the student a loss that compares with it",
        )
    cache = train_config.cache if isinstance(train_config, DistillConfig) else None
    channels_last = train_config.channels_last
    loader = partial(
        Loader,
        dataset=dataset,
        batch_size=train_config.batch_size,
        augment=config.data.augment,
        channels_last=channels_last,
        views=_views(cache, train_config, config),
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
    if len(ground.labelled_rows("validation")) == 0:
        validation, task = _answered(ground, teacher, channels_last, label)
        context.progress.message(
            f"  {label}: no validation sample has a label: validated by {task.metric}"
        )
    if teacher is not None and objective.needs_teacher:
        teacher = _answering(ground, teacher, objective, training, cache, label, context)
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


def _views(
    cache: CacheConfig | None, train_config: TrainConfig, config: PipelineConfig
) -> int | None:
    """How many views of a sample there are; None for a new one in each epoch."""
    if cache is None:
        return None
    return min(cache.views, train_config.epochs) if config.data.augment else 1


def _answered(
    ground: Ground, teacher: Teacher | None, channels_last: bool, label: str
) -> tuple[Loader, Task]:
    """The validation split with the teacher's answers as its targets, and the task for them."""
    from edgekd.data.dataset import Split
    from edgekd.data.loader import Loader
    from edgekd.tasks import against_teacher

    if teacher is None:
        raise InputError(
            "no validation sample has a label, and there is no teacher to agree with",
            where=label,
            remedy="give labels, or a scheme with a teacher",
        )
    answers = []
    for batch in ground.validation_loader().ordered():
        outputs = {
            name: tensor.float().cpu().numpy() for name, tensor in teacher.answer(batch).items()
        }
        answers.append(ground.task.targets_from(outputs))
    targets = {name: np.concatenate([a[name] for a in answers]) for name in answers[0]}
    split = Split({**ground.dataset.splits["validation"].arrays, **targets})
    loader = Loader(split, ground.dataset, EVALUATION_BATCH, channels_last=channels_last)
    return loader, against_teacher(ground.task)


def _answering(
    ground: Ground,
    teacher: Teacher,
    objective: Objective,
    training: Loader,
    cache: CacheConfig | None,
    label: str,
    context: Context,
) -> Teacher:
    """The teacher as the objective needs it: its cached answers, or itself for its layers."""
    from edgekd.distill.cache import fill_cache

    layers = objective.teacher_layers
    teacher.watch(layers)
    if cache is None or training.views is None:
        return teacher
    if layers:
        context.progress.message(
            f"  {label}: the teacher answers live: {', '.join(layers)} of it "
            f"{'is' if len(layers) == 1 else 'are'} compared, and the cache keeps outputs only"
        )
        return teacher
    folder = context.job.path(cache.folder) if cache.folder is not None else context.cache
    dataset, augment = ground.dataset, list(ground.config.data.augment)
    outputs = ground.task.outputs(dataset)
    return fill_cache(
        teacher,
        training,
        folder,
        outputs=outputs,
        logits=[ground.task.output] if ground.task.name == "classification" else [],
        views=training.views,
        top=cache.top,
        seed=ground.config.seed,
        data=ground.digest,
        augment=[augment, code_sha256(_AUGMENTATION), references_sha256(augment)],
        preprocess={name: p.to_json() for name, p in dataset.preprocess.items()},
        progress=context.progress,
    )


def hub_identity(name: str | None) -> dict[str, str]:
    """What decides a network of a hub beside its name: the package's version, and its folder.

    Empty for all other networks.
    """
    package, _, rest = (name or "").partition(":")
    if package not in HUB_PACKAGES or not rest:
        return {}
    from edgekd.data.source import hash_path
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
