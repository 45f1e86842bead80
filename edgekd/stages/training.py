"""The training shared by the stages teacher and distill, with the teacher run live or cached."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.config.pipeline import PipelineConfig
from edgekd.config.training import DistillConfig, TrainConfig
from edgekd.errors import InputError
from edgekd.pipeline.fingerprint import (
    code_sha256,
    extension_versions,
    library_versions,
    references_sha256,
)
from edgekd.stages.task_data import EVALUATION_BATCH, TaskData
from edgekd.tasks.classification import Classification
from edgekd.tasks.continuous import ContinuousTask

if TYPE_CHECKING:
    from torch import nn

    from edgekd.data.loader import Loader
    from edgekd.distill.checkpoint import History
    from edgekd.distill.objective import Objective
    from edgekd.distill.teacher import Teacher
    from edgekd.models.dict_model import DictModel
    from edgekd.pipeline.stage import Context
    from edgekd.tasks import Task

_FIRST_OUTPUTS, _SMALLEST = 64, 1e-3
"""Number of samples to run a fresh network on; smallest scale assumed for its outputs."""

HUB_PACKAGES = ("timm", "transformers")


def scale_output(task_data: TaskData, model: DictModel) -> str:
    """Scale the outputs of a network with fresh weights to the targets, if necessary.

    A network built for the range of its targets (its own last layer multiplies) is left
    unchanged: in order of magnitude its first outputs are closer to the targets than to 1.

    Returns:
        A message about what was done; empty: nothing.
    """
    import torch

    task = task_data.task
    if not isinstance(task, ContinuousTask) or task.offset is None:
        return ""
    dataset = task_data.dataset
    count = min(_FIRST_OUTPUTS, len(dataset.splits["train"]))
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
        f"outputs its network's output · {task.unit:.4g} + {offset.mean():.4g}: deviation and mean "
        f"of the training targets (task_args: {{standardize: false}} leaves it out)"
    )


def fit(
    task_data: TaskData,
    model: nn.Module,
    objective: Objective,
    train_config: TrainConfig,
    label: str,
    context: Context,
    teacher: Teacher | None = None,
) -> History:
    """Train ``model`` in place; its weights are then the best ones on the validation split.

    A distillation's teacher is read through the cache; the student alone sees the same
    augmented views. Without a teacher only labelled samples are trained on, repeated as often
    as needed for the number of batches of all samples. Where validation samples lack a label, the
    student of a teacher is scored by agreement with it there. A student has the share of the labels
    that ``distill.labelled`` gives it.

    Raises:
        InputError: there are no labels where they are needed.
    """
    from edgekd.data.dataset import Split, take
    from edgekd.data.loader import Loader
    from edgekd.distill.trainer import Trainer

    if isinstance(train_config, DistillConfig):
        task_data = task_data.keep_labels(train_config.labelled)
    dataset, config = task_data.dataset, task_data.config
    if not objective.needs_teacher and (lacking := task_data.lacks_labels()):
        raise InputError(
            lacking,
            where=label,
            remedy="give labels (-1 marks a sample without one); or give a teacher by checkpoint "
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
        classes={task_data.task.target: count} if (count := task_data.num_classes) else {},
    )
    training = loader(dataset.splits["train"])
    rows = task_data.labelled_rows("train")
    if not objective.needs_teacher and len(rows) < training.samples:
        context.progress.message(
            f"  {label}: on the {len(rows):,} of {training.samples:,} samples that have a label"
        )
        # Not the loader's rows: mixing would still draw partners that have no label.
        part = {name: take(array, rows) for name, array in dataset.splits["train"].arrays.items()}
        training = loader(Split(part), steps=len(training))
    validation, task = task_data.validation_loader(channels_last), task_data.task
    labelled = len(task_data.labelled_rows("validation"))
    if labelled == 0 or (objective.needs_teacher and labelled < validation.samples):
        validation, task = pseudo_labelled_validation(task_data, teacher, channels_last, label)
        context.progress.message(
            f"  {label}: {labelled} validation samples have a label: validated by {task.metric} "
            "where there is none"
        )
    if teacher is not None and objective.needs_teacher:
        teacher = cached_teacher(
            task_data, teacher, objective, training, train_config, label, context
        )
    return Trainer(
        model,
        objective,
        training,
        validation,
        task,
        train_config,
        config.seed,
        checkpoint_folder=context.scratch / label.replace(" ", "-"),
        progress=context.progress,
        teacher=teacher,
        label=label,
    ).fit()


def hub_fingerprint(name: str | None) -> dict[str, str]:
    """What a network of a hub depends on besides its name: the package's version, and its folder.

    Empty for all other networks.
    """
    package, _, rest = (name or "").partition(":")
    if package not in HUB_PACKAGES or not rest:
        return {}
    from edgekd.files import hash_path
    from edgekd.models.build import find_folder

    found = library_versions((package,))
    folder = find_folder(rest) if found and package == "transformers" else None
    return found if folder is None else {**found, "folder": hash_path(folder)}


Augment = tuple[str | dict[str, dict[str, Any]], ...]


def augmentation_of(config: PipelineConfig, train_config: TrainConfig) -> Augment:
    """How a training augments: the student's own configuration where it has one."""
    own = train_config.augment if isinstance(train_config, DistillConfig) else None
    return config.data.augment if own is None else own


def views_of(config: PipelineConfig, train_config: TrainConfig) -> int | None:
    """Number of views of a sample in a training; None for a new one in each epoch.

    The student alone has as many as the student with a cached teacher.
    """
    if not isinstance(train_config, DistillConfig) or train_config.cache is None:
        return None
    if not augmentation_of(config, train_config):
        return 1
    return min(train_config.cache.views, train_config.epochs)


def cached_teacher(
    task_data: TaskData,
    teacher: Teacher,
    objective: Objective,
    training: Loader,
    train_config: TrainConfig,
    label: str,
    context: Context,
) -> Teacher:
    """The teacher as an objective needs it: its cached outputs, or the network itself for its
    layers.

    Raises:
        InputError: it has no such layers.
        StageError: the cache cannot be written.
    """
    from edgekd.distill.cache import fill_cache
    from edgekd.models.build import build_model

    layers = objective.teacher_layers
    teacher.capture(layers)
    cache = train_config.cache if isinstance(train_config, DistillConfig) else None
    if cache is None or training.views is None:
        return teacher
    if layers:
        context.progress.message(
            f"  {label}: the teacher is run live: {', '.join(layers)} of it "
            f"{'is' if len(layers) == 1 else 'are'} compared, and the cache stores outputs only"
        )
        return teacher
    dataset, augment = task_data.dataset, list(augmentation_of(task_data.config, train_config))
    config = task_data.config
    # Weights and names do not identify what a network's forward does with its arguments. Offline
    # no student is a teacher of another, and the candidates of a search share one cache.
    teaches = () if config.distill.scheme.name == "offline" else (config.student,)
    networks = [
        *(c.model_dump(mode="json", include={"model", "args"}) for c in (config.teacher, *teaches)),
        config.distill.scheme.model_dump(mode="json"),
    ]
    own = [augment, networks]
    makers = (type(teacher), type(training), build_model, fill_cache)
    modules = tuple(sorted({maker.__module__ for maker in makers}))
    code = [code_sha256(modules), references_sha256(own), extension_versions(own)]
    classes = task_data.num_classes
    top = cache.top
    if classes > top and objective.needs_full_logits:
        context.progress.message(
            f"  {label}: all {classes} logits are cached, not {top}: "
            f"{', '.join(objective.needs_full_logits)} compares every one"
        )
        top = classes
    return fill_cache(
        teacher,
        training,
        context.job.path(cache.folder) if cache.folder is not None else context.cache,
        outputs=task_data.spec.outputs,
        logits=[task_data.task.output] if isinstance(task_data.task, Classification) else [],
        views=training.views,
        top=top,
        seed=config.seed,
        data=task_data.digest,
        augment=[augment, networks, code],
        preprocess={name: p.to_json() for name, p in dataset.preprocess.items()},
        progress=context.progress,
    )


def pseudo_labelled_validation(
    task_data: TaskData, teacher: Teacher | None, channels_last: bool, label: str
) -> tuple[Loader, Task]:
    """The validation split with the teacher's predictions for unlabelled samples, and its task.

    A few labels would select the epoch by chance.

    Raises:
        InputError: there is no teacher.
    """
    from edgekd.data.dataset import Split
    from edgekd.data.loader import Loader
    from edgekd.tasks import agreement_task

    if teacher is None:
        raise InputError(
            "no validation sample has a label, and there is no teacher to agree with",
            where=label,
            remedy="give labels, or a scheme with a teacher",
        )
    predicted = []
    for batch in task_data.validation_loader().ordered():
        outputs = {
            name: tensor.float().cpu().numpy() for name, tensor in teacher.predict(batch).items()
        }
        predicted.append(task_data.task.pseudo_targets(outputs))
    arrays = dict(task_data.dataset.splits["validation"].arrays)
    labelled = task_data.labelled_rows("validation")
    for name in predicted[0]:
        targets = np.concatenate([part[name] for part in predicted])
        if len(labelled):
            targets = targets.astype(arrays[name].dtype)
            targets[labelled] = arrays[name][labelled]
        arrays[name] = targets
    split = Split(arrays)
    loader = Loader(split, task_data.dataset, EVALUATION_BATCH, channels_last=channels_last)
    return loader, agreement_task(task_data.task)
