"""How a teacher's answers reach a training: live, from the cache, or in place of labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.config.pipeline import PipelineConfig
from edgekd.config.training import DistillConfig, TrainConfig
from edgekd.errors import InputError
from edgekd.pipeline.fingerprint import code_sha256, references_sha256
from edgekd.stages.fitting import EVALUATION_BATCH, Ground

if TYPE_CHECKING:
    from edgekd.data.loader import Loader
    from edgekd.distill.objective import Objective
    from edgekd.distill.teacher import Teacher
    from edgekd.pipeline.stage import Context
    from edgekd.tasks import Task

_DECIDES_ANSWERS = (
    *("edgekd.data.loader", "edgekd.models.build"),
    *("edgekd.distill.teacher", "edgekd.distill.ensemble", "edgekd.distill.answer_records"),
)
"""Where the code begins on which a teacher's answer depends, beside its weights."""

Augment = tuple[str | dict[str, dict[str, Any]], ...]


def augmentation_of(config: PipelineConfig, train_config: TrainConfig) -> Augment:
    """How a training augments: the student's own way where it has one."""
    own = train_config.augment if isinstance(train_config, DistillConfig) else None
    return config.data.augment if own is None else own


def views_of(config: PipelineConfig, train_config: TrainConfig) -> int | None:
    """How many views of a sample a training goes through; None for a new one in each epoch.

    The student alone has as many as the student whose teacher answers from the cache.
    """
    if not isinstance(train_config, DistillConfig) or train_config.cache is None:
        return None
    if not augmentation_of(config, train_config):
        return 1
    return min(train_config.cache.views, train_config.epochs)


def answering(
    ground: Ground,
    teacher: Teacher,
    objective: Objective,
    training: Loader,
    train_config: TrainConfig,
    label: str,
    context: Context,
) -> Teacher:
    """The teacher as an objective needs it: its cached answers, or itself for its layers.

    Raises:
        InputError: it has no such layers.
        StageError: the cache cannot be written.
    """
    from edgekd.distill.cache import fill_cache

    layers = objective.teacher_layers
    teacher.watch(layers)
    cache = train_config.cache if isinstance(train_config, DistillConfig) else None
    if cache is None or training.views is None:
        return teacher
    if layers:
        context.progress.message(
            f"  {label}: the teacher answers live: {', '.join(layers)} of it "
            f"{'is' if len(layers) == 1 else 'are'} compared, and the cache keeps outputs only"
        )
        return teacher
    dataset, augment = ground.dataset, list(augmentation_of(ground.config, train_config))
    # Weights and names do not tell what a network's own forward does with its arguments.
    networks = [
        ground.config.teacher.model_dump(mode="json", include={"model", "args"}),
        ground.config.student.model_dump(mode="json", include={"model", "args"}),
        ground.config.distill.scheme.model_dump(mode="json"),
    ]
    code = [code_sha256(_DECIDES_ANSWERS), references_sha256([augment, networks])]
    classes = classes_of(ground)
    top = cache.top
    if classes > top and objective.reads_all_logits:
        context.progress.message(
            f"  {label}: all {classes} logits are cached, not {top}: "
            f"{', '.join(objective.reads_all_logits)} compares every one"
        )
        top = classes
    return fill_cache(
        teacher,
        training,
        context.job.path(cache.folder) if cache.folder is not None else context.cache,
        outputs=ground.task.outputs(dataset),
        logits=[ground.task.output] if ground.task.name == "classification" else [],
        views=training.views,
        top=top,
        seed=ground.config.seed,
        data=ground.digest,
        augment=[augment, networks, code],
        preprocess={name: p.to_json() for name, p in dataset.preprocess.items()},
        progress=context.progress,
    )


def classes_of(ground: Ground) -> int:
    """How many logits an answer has; 0 where there are no classes."""
    size = ground.task.outputs(ground.dataset)[0].shape[-1]
    return size if ground.task.name == "classification" and isinstance(size, int) else 0


def answered_validation(
    ground: Ground, teacher: Teacher | None, channels_last: bool, label: str
) -> tuple[Loader, Task]:
    """The validation split with the teacher's answers where it has no label, and the task for it.

    A handful of labels would choose the epoch by chance.

    Raises:
        InputError: there is no teacher.
    """
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
    arrays = dict(ground.dataset.splits["validation"].arrays)
    labelled = ground.labelled_rows("validation")
    for name in answers[0]:
        targets = np.concatenate([answer[name] for answer in answers])
        if len(labelled):
            targets = targets.astype(arrays[name].dtype)
            targets[labelled] = arrays[name][labelled]
        arrays[name] = targets
    split = Split(arrays)
    loader = Loader(split, ground.dataset, EVALUATION_BATCH, channels_last=channels_last)
    return loader, against_teacher(ground.task)
