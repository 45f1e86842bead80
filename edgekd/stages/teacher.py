"""Stage teacher: train it, load its weights, or take an ONNX file as a black box."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import InputError
from edgekd.pipeline.fingerprint import file_sha256
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.fitting import TRAINING_CODE, Ground, fit, open_ground, write_json

if TYPE_CHECKING:
    from edgekd.distill.teacher import Teacher
    from edgekd.models.named import NamedModel

WEIGHTS, BLACK_BOX = "teacher.safetensors", "teacher.onnx"


class TeacherStage:
    """Writes the teacher's weights or ONNX file, its history and its validation metric."""

    name = "teacher"
    inputs = ("data",)
    code = ("edgekd.stages.teacher", "edgekd.engines", *TRAINING_CODE)
    libraries = ("torch",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        teacher = job.config.teacher
        chosen = teacher.model_dump(mode="json", exclude={"checkpoint", "onnx"})
        files = {}
        if teacher.checkpoint is not None:
            path = _existing(job, "checkpoint", teacher.checkpoint)
            files["checkpoint"] = file_sha256(path)
        if teacher.onnx is not None:
            from edgekd.engines.onnx import files_of_onnx

            parts = files_of_onnx(_existing(job, "onnx", teacher.onnx))
            files["onnx"] = " ".join(map(file_sha256, parts))
        training = {"seed": job.config.seed, "augment": list(job.config.data.augment)}
        task = [job.config.task, job.config.task_args]
        return {"teacher": chosen, **files, "task": task, **(training if teacher.train else {})}

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        from edgekd.distill.objective import Objective
        from edgekd.distill.teacher import ModuleTeacher, OnnxTeacher
        from edgekd.distill.trainer import score
        from edgekd.engines.onnx_adopt import pack_onnx, rename_onnx
        from edgekd.models.weights import load_weights, save_weights

        job = context.job
        config = job.config.teacher
        ground = open_ground(inputs["data"], job.config)
        if config.onnx is not None:
            pack_onnx(_existing(job, "onnx", config.onnx), context.out / BLACK_BOX)
            adopted = open_teacher(context.out, ground)
            assert isinstance(adopted, OnnxTeacher)
            # Student and teacher are timed on the same samples, so they share their names.
            rename_onnx(context.out / BLACK_BOX, adopted.names)
            teacher = open_teacher(context.out, ground)
        else:
            model = build_teacher(ground)
            if config.train is not None:
                objective = Objective.supervised(ground.task, config.train.label_smoothing)
                history = fit(ground, model, objective, config.train, "teacher", context)
                write_json(context.out / "history.json", history)
            else:
                assert config.checkpoint is not None
                load_weights(
                    model,
                    _existing(job, "checkpoint", config.checkpoint),
                    allow_pickle=config.allow_pickle,
                    where="teacher.checkpoint",
                )
            save_weights(model, context.out / WEIGHTS)
            teacher = ModuleTeacher(model)
        scores = score(teacher.answer, ground.validation_loader(), ground.task)
        metric = float(scores.mean())
        write_json(context.out / "validation.json", {ground.task.metric: metric})
        context.progress.message(f"  teacher: validation {ground.task.metric} {metric:.4f}")


def build_teacher(ground: Ground) -> NamedModel:
    """The teacher's network with fresh weights drawn from the pipeline's seed."""
    import torch

    from edgekd.models.build import build_model

    torch.manual_seed(ground.config.seed)
    dataset = ground.dataset
    outputs = ground.task.outputs(dataset)
    return build_model(ground.config.teacher, dataset.inputs, outputs, where="teacher")


def open_teacher(folder: Path, ground: Ground) -> Teacher:
    """The teacher of a finished teacher stage, ready to answer."""
    from edgekd.distill.teacher import ModuleTeacher, OnnxTeacher
    from edgekd.models.weights import load_weights

    if (folder / BLACK_BOX).is_file():
        return OnnxTeacher(
            folder / BLACK_BOX, ground.dataset.inputs, ground.task.outputs(ground.dataset)
        )
    model = build_teacher(ground)
    load_weights(model, folder / WEIGHTS, where="teacher")
    return ModuleTeacher(model)


def _existing(job: Job, key: str, name: str) -> Path:
    path = job.path(name)
    if not path.is_file():
        raise InputError(
            f"the file {name!r} does not exist",
            where=f"teacher.{key}",
            remedy=f"give a path from the pipeline file's folder; looked at {path}",
        )
    return path
