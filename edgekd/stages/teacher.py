"""Stage teacher: train it, load its weights, or take an ONNX file as a black box."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.networks import TeacherConfig
from edgekd.errors import InputError
from edgekd.pipeline.fingerprint import file_sha256
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.fitting import (
    TRAINING_CODE,
    Ground,
    fit,
    hub_identity,
    open_ground,
    scale_output,
    write_json,
)

if TYPE_CHECKING:
    from edgekd.distill.history import History
    from edgekd.distill.teacher import Teacher
    from edgekd.models.named import NamedModel

WEIGHTS, BLACK_BOX = "teacher.safetensors", "teacher.onnx"
ENOUGH_LABELS = 20
"""Labelled validation samples below which a teacher is not refused for being near chance."""


class TeacherStage:
    """Writes the teacher's weights or ONNX file, its history and its validation metric."""

    name = "teacher"
    inputs = ("data",)
    code = (
        *("edgekd.stages.teacher", "edgekd.engines.onnx_adopt", "edgekd.engines.onnx_file"),
        *TRAINING_CODE,
    )
    libraries = ("torch",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        teacher = job.config.teacher
        chosen = teacher.model_dump(mode="json", exclude={"checkpoint", "onnx"})
        files = hub_identity(teacher.model)
        if teacher.checkpoint is not None:
            path = _existing(job, "teacher.checkpoint", teacher.checkpoint)
            files["checkpoint"] = file_sha256(path)
        if teacher.onnx is not None:
            from edgekd.engines.onnx import files_of_onnx

            parts = files_of_onnx(_existing(job, "teacher.onnx", teacher.onnx))
            files["onnx"] = " ".join(map(file_sha256, parts))
        training = {"seed": job.config.seed, "augment": list(job.config.data.augment)}
        task = [job.config.task, job.config.task_args]
        return {"teacher": chosen, **files, "task": task, **(training if teacher.train else {})}

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        from edgekd.distill.teacher import ModuleTeacher, OnnxTeacher
        from edgekd.engines.onnx_adopt import pack_onnx, rename_onnx
        from edgekd.models.weights import save_weights

        job = context.job
        config = job.config.teacher
        ground = open_ground(inputs["data"], job.config)
        if config.onnx is not None:
            pack_onnx(_existing(job, "teacher.onnx", config.onnx), context.out / BLACK_BOX)
            adopted = open_teacher(context.out, ground)
            assert isinstance(adopted, OnnxTeacher)
            # Student and teacher are timed on the same samples, so they share their names.
            rename_onnx(context.out / BLACK_BOX, adopted.names)
            teacher = open_teacher(context.out, ground)
        else:
            model, history = _trained_or_loaded(ground, config, context, "teacher")
            if history is not None:
                write_json(context.out / "history.json", history.to_json())
            save_weights(model, context.out / WEIGHTS)
            teacher = ModuleTeacher(model)
        write_json(context.out / "validation.json", check_teacher(teacher, ground, context))


def _trained_or_loaded(
    ground: Ground, config: TeacherConfig, context: Context, where: str
) -> tuple[NamedModel, History | None]:
    """A teacher network with its weights, and its history when it was trained here."""
    from edgekd.distill.objective import Objective
    from edgekd.models.weights import load_weights

    model = build_teacher(ground, config, where)
    if config.train is not None:
        if scaled := scale_output(ground, model):
            context.progress.message(f"  {where}: {scaled}")
        objective = Objective.supervised(ground.task, config.train.label_smoothing)
        return model, fit(ground, model, objective, config.train, where, context)
    if config.checkpoint is None:
        # A network of a hub comes with its weights.
        return model, None
    load_weights(
        model,
        _existing(context.job, f"{where}.checkpoint", config.checkpoint),
        allow_pickle=config.allow_pickle,
        where=f"{where}.checkpoint",
    )
    return model, None


def load_teacher(ground: Ground, config: TeacherConfig, context: Context, where: str) -> Teacher:
    """A teacher beside the pipeline's own, such as a member of an ensemble.

    Args:
        ground: the data and the task.
        config: its section.
        context: of the stage that needs it; a training leaves its checkpoints there.
        where: its YAML position, for errors and as the label of its training.
    """
    from edgekd.distill.runtime import training_device
    from edgekd.distill.teacher import ModuleTeacher, OnnxTeacher

    if config.onnx is not None:
        path = _existing(context.job, f"{where}.onnx", config.onnx)
        teacher: Teacher = OnnxTeacher(
            path, ground.dataset.inputs, ground.task.outputs(ground.dataset)
        )
    else:
        model, _ = _trained_or_loaded(ground, config, context, where)
        teacher = ModuleTeacher(model.to(training_device()))
    check_teacher(teacher, ground, context, where)
    return teacher


def check_teacher(
    teacher: Teacher, ground: Ground, context: Context, where: str = "teacher"
) -> dict[str, Any]:
    """Show a teacher's metric on validation beside chance, and refuse one that is no better.

    Chance is the one best answer to these labels, given to every sample. The teacher must be
    better by more than noise: the paired difference of their scores has a one-sided 95 % bound,
    which must be above 0. Below ``ENOUGH_LABELS`` labelled samples the figures are only shown.

    Returns:
        The metric, that of chance, and the number of labelled samples; None where there is none.

    Raises:
        InputError: the teacher is not better than chance.
    """
    from edgekd.distill.evaluate import score
    from edgekd.release.statistics import paired_difference

    task = ground.task
    rows = ground.labelled_rows("validation")
    if len(rows) == 0:
        context.progress.message(
            f"  {where}: no validation sample has a label, so what it knows is not checked"
        )
        return {task.metric: None, "chance": None, "labelled": 0}
    arrays = ground.dataset.splits["validation"].arrays
    targets = {s.name: arrays[s.name][rows] for s in ground.dataset.targets}
    scores = score(teacher.answer, ground.validation_loader(), task)
    by_chance = task.scores(task.constant(targets), targets)
    metric, chance = float(scores.mean()), float(by_chance.mean())
    context.progress.message(
        f"  {where}: validation {task.metric} {metric:.4f}, chance {chance:.4f} "
        f"({len(rows):,} labelled samples)"
    )
    if len(rows) >= ENOUGH_LABELS:
        sign = 1 if task.higher_is_better else -1
        # The lower end of a two-sided 90 % interval is a one-sided 95 % bound.
        above = paired_difference(sign * scores, sign * by_chance, confidence=0.9)
        if above.interval is None or above.interval[0] <= 0:
            raise InputError(
                f"the teacher does not know this task: {task.metric} {metric:.4g}, and always "
                f"giving one and the same answer gives {chance:.4g} "
                f"({len(rows):,} labelled validation samples)",
                where=where,
                remedy="see that it gets its inputs as it was trained (normalisation: data.args, "
                "channel order, image size), that labels count its outputs in their order, and "
                "that the checkpoint is the right one; if it is trained here, train it longer",
            )
    return {task.metric: metric, "chance": chance, "labelled": len(rows)}


def build_teacher(
    ground: Ground, config: TeacherConfig | None = None, where: str = "teacher"
) -> NamedModel:
    """The teacher's network with fresh weights drawn from the pipeline's seed."""
    import torch

    from edgekd.models.build import build_model

    torch.manual_seed(ground.config.seed)
    dataset = ground.dataset
    outputs = ground.task.outputs(dataset)
    return build_model(config or ground.config.teacher, dataset.inputs, outputs, where=where)


def open_teacher(folder: Path, ground: Ground) -> Teacher:
    """The teacher of a finished teacher stage, ready to answer."""
    from edgekd.distill.runtime import training_device
    from edgekd.distill.teacher import ModuleTeacher, OnnxTeacher
    from edgekd.models.weights import load_weights

    if (folder / BLACK_BOX).is_file():
        return OnnxTeacher(
            folder / BLACK_BOX, ground.dataset.inputs, ground.task.outputs(ground.dataset)
        )
    model = build_teacher(ground)
    load_weights(model, folder / WEIGHTS, where="teacher")
    return ModuleTeacher(model.to(training_device()))


def _existing(job: Job, where: str, name: str) -> Path:
    path = job.path(name)
    if not path.is_file():
        raise InputError(
            f"the file {name!r} does not exist",
            where=where,
            remedy=f"give a path from the pipeline file's folder; looked at {path}",
        )
    return path
